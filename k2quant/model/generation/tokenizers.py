"""The tokenizer of a checkpoint: K2's own from tiktoken.model, any other as transformers loads it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from k2quant.checkpoint.beside import check_tokenizer, of_tokenizer
from k2quant.checkpoint.files.paths import inside, open_regular
from k2quant.checkpoint.files.tokenizer.ranks import TIKTOKEN
from k2quant.checkpoint.files.tokenizer.splitting import code_of, read_code
from k2quant.checkpoint.files.tokenizer.words import FAST, is_kimi
from k2quant.checkpoint.reader import CONFIG, open_checkpoint
from k2quant.errors import CheckpointError, K2QuantError, MalformedFile, MissingExtra
from k2quant.ground.extras import install
from k2quant.ground.saying.faults import said
from k2quant.model.architecture import architecture
from k2quant.model.generation.kimi import open_kimi

_OWN = {".jinja", ".model", ".py", ".tiktoken"}
"""Suffixes of what a tokenizer is made of, beside the names that all have."""
_MOVED = "bytes_to_unicode"
"""What tokenization_kimi.py of K2's first releases imports from a place that transformers 5 no longer has."""


def load_tokenizer(path: str | os.PathLike[str], *, trust_remote_code: bool = False, follow_links: bool = False) -> Any:
    """Return a checkpoint's tokenizer.

    Args:
        path: folder of the checkpoint.
        trust_remote_code: whether the checkpoint's own Python code may run. K2's tokenizer is such code, but is read
            from tiktoken.model without it.
        follow_links: whether links of the folder may lead out of it.

    Raises:
        CheckpointError: there is none that can be loaded.
        MissingExtra: it needs a package that is not installed.
        UnsafePath: a file of the folder is a link that leaves it.
    """
    folder = Path(path)
    config = architecture(open_checkpoint(folder, follow_links=follow_links))  # transformers does not know kimi_k2
    return open_tokenizer(folder, config=config, trust_remote_code=trust_remote_code, follow_links=follow_links)


def open_tokenizer(
    folder: Path, *, config: Any = None, trust_remote_code: bool = False, follow_links: bool = False
) -> Any:
    """Return the tokenizer of a folder that need hold nothing else.

    Args:
        folder: with its files.
        config: of the model, where transformers might not know the folder's own.
        trust_remote_code: as in `load_tokenizer`, like `follow_links`.
        follow_links: whether links of the folder may lead out of it.

    Raises:
        CheckpointError: there is none that can be loaded.
        MissingExtra: it needs a package that is not installed.
        UnsafePath: a file of the folder is a link that leaves it.
    """
    check_tokenizer(folder)
    _check_files(folder, follow_links=follow_links)
    ours = [FAST, "tokenizer_config.json"] if (folder / FAST).exists() else ["its tokenizer's files"]
    remedy = f"are its files whole? take {' and '.join(ours)} from the model's release"
    with blamed(folder, "its tokenizer cannot be loaded", remedy):
        if not trust_remote_code and is_kimi(folder):
            return open_kimi(folder)
        return AutoTokenizer.from_pretrained(
            str(folder), config=config, trust_remote_code=trust_remote_code, local_files_only=True
        )


@contextlib.contextmanager
def blamed(folder: Path, what: str, remedy: str | None = None) -> Iterator[None]:
    """Blame the checkpoint's files for whatever its tokenizer stumbles over, a panic of compiled code included."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, K2QuantError):
        raise
    except BaseException as error:
        if own := _of_its_code(folder, error):
            raise own from error
        raise CheckpointError(what, file=folder, found=said(error), remedy=remedy) from error


def _of_its_code(folder: Path, error: BaseException) -> K2QuantError | None:
    """Return what there is to say of a tokenizer that is code, if that is the trouble."""
    words = str(error)
    if "trust_remote_code" in words:
        trust = "if you trust that code, say `trust_remote_code=True`"
        code = next(iter(_codes(folder, TIKTOKEN)), None)
        if code is None:
            return CheckpointError("its tokenizer is code of the checkpoint", file=folder, remedy=trust)
        what = f"is not there, and without it {code.name} reads nothing, nor does k2quant"
        return CheckpointError(what, file=folder / TIKTOKEN, remedy=f"take it from the model's release; {trust}")
    if not isinstance(error, ImportError):
        return None
    if _MOVED in words:
        code = next(iter(_codes(folder, _MOVED)), folder)
        again = f"take {code.name} anew from the model's release"
        alone = ", or leave out `trust_remote_code=True`" if (folder / TIKTOKEN).exists() else ""
        what = f"imports {_MOVED} from a place that transformers 5 no longer has"
        return CheckpointError(what, file=code, remedy=again + alone)
    if "tiktoken" in words:
        return MissingExtra("its tokenizer needs tiktoken", file=folder, found=said(error), remedy=install("tokenizer"))
    remedy = "install the package that its tokenizer's code asks for"
    return MissingExtra("its tokenizer is code that cannot be imported", file=folder, found=said(error), remedy=remedy)


def _codes(folder: Path, word: str) -> list[Path]:
    """Return the folder's files of tokenizer code in which a word stands."""
    return [path for path in code_of(folder) if word in read_code(path)]


def _check_files(folder: Path, *, follow_links: bool) -> None:
    """Refuse links that leave the folder and files that are none, for transformers follows and opens anything.

    Pointers are refused among the tokenizer's own files: a clone for its sake alone has pointers of all shards.
    """
    for entry in folder.iterdir():
        path = inside(folder, entry.name, follow_links=follow_links)
        if path.is_dir():
            continue
        if of_tokenizer(path.name) or path.name == CONFIG or path.suffix in _OWN:
            os.close(open_regular(path))
        elif not path.is_file():
            raise MalformedFile("not a regular file", file=path)
