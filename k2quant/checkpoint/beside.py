"""What lies beside the weights in a checkpoint's folder: tokenizer, code, licence, weights that nobody asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from k2quant.checkpoint.cards import CARD
from k2quant.checkpoint.files.kinds import fetched_at_once, of_weights
from k2quant.checkpoint.files.paths import check_inside, open_regular
from k2quant.checkpoint.reader import CONFIG, INCOMPLETE, INDEX, REPORT, Checkpoint
from k2quant.errors import CheckpointError, UnsafePath
from k2quant.formats.configs import modelopt

_OWN = {CONFIG, REPORT, INCOMPLETE}  # written anew, or meant for the source alone
_NOTES = re.compile(r"k2quant_\w+\.(json|html|txt|lock(\.soft(\.taking)?)?)")  # of our commands, about the source
_QUANTIZED_ELSEWHERE = {
    modelopt.COMPANION,
    "quantize_config.json",  # GPTQ
    "quant_config.json",  # AWQ
    "quant_model_description.json",  # ModelSlim
}
"""Where other tools say how weights are quantised. Engines believe these files, and none is true of an output."""
_TOKENIZER = {
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
}


def of_tokenizer(name: str) -> bool:
    """Tell whether a file is a tokenizer's, by its name; chat templates and code are."""
    code = name.startswith("tokenization") and name.endswith(".py")
    return name in _TOKENIZER or name.startswith("chat_template") or code


def check_tokenizer(folder: Path) -> None:
    """Refuse a folder in which no tokenizer begins, before what reads one is loaded.

    Raises:
        CheckpointError: it has none of the files that one is loaded from.
    """
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tiktoken.model")):
        raise CheckpointError("has no tokenizer", file=folder, remedy="take its files from the model's release")


def describes_quantization(name: str) -> bool:
    """Tell whether a file beside config.json is one in which other tools say how weights are quantised."""
    return name in _QUANTIZED_ELSEWHERE


PASSED_OVER = "left out, for they are neither files nor folders, or links to folders"
"""What is said of `Beside.passed_over`; links to files are followed or refused."""


class Beside(NamedTuple):
    """What lies in a checkpoint's folder beside the weights, by paths below it."""

    copied: tuple[str, ...]
    """Tokenizer, code, licence."""
    left_out: tuple[str, ...]
    """Weights that the index does not name, and what other tools say of a quantization."""
    passed_over: tuple[str, ...]
    """What is neither file nor folder, and links to folders that are not followed."""


def other_files(source: Checkpoint) -> Beside:
    """Return the files beside the weights that are copied (tokenizer, code, licence), and those that are not.

    Where links are followed, one to a folder counts as that folder, unless it was looked into already or holds the
    checkpoint's own. Hidden files and folders do not count.

    Raises:
        UnsafePath: one is a link that leaves the folder, or has a name that is not printable.
        CheckpointError: one is a pointer to its content, or a link to nothing.
        OSError: one, or a folder, cannot be read.
    """
    copied: list[str] = []
    left_out: list[str] = list(_elsewhere(source))
    passed_over: list[str] = []
    expected = {INDEX, *source.shards}
    followed: set[Path] = set()
    for folder, folders, files in os.walk(source.folder, onerror=_raise, followlinks=source.follow_links):
        here = Path(folder)
        inner = here.relative_to(source.folder)
        taken = {name for name in folders if name in {*_OWN, CARD} or of_weights(name)}  # a file of ours may go there
        left_out += sorted(str(inner / name) for name in taken)
        seen = sorted(name for name in set(folders) - taken if not name.startswith("."))
        folders[:] = [name for name in seen if _is_entered(source, here / name, followed)]
        passed_over += [str(inner / name) for name in seen if name not in folders]
        for path in (here / name for name in sorted(files) if not name.startswith(".")):
            below = str(inner / path.name)
            if below in _OWN or below in expected or _NOTES.fullmatch(below):
                continue
            if of_weights(path.name) or describes_quantization(below):
                left_out.append(below)
                continue
            check_inside(source.folder, path, follow_links=source.follow_links)
            if not below.isprintable():  # journal and report could not name it
                raise UnsafePath("not a plain file name", file=repr(below), remedy="rename or remove it")
            if path.is_file():
                os.close(open_regular(path))  # a pointer in its place, or no right to read it, is said now
                copied.append(below)
            else:
                passed_over.append(below)
    return Beside(tuple(copied), tuple(left_out), tuple(passed_over))


def _elsewhere(source: Checkpoint) -> Iterator[str]:
    """Yield the weights of a place that the index does not name; they are not in the folder of its other files."""
    for name in () if source.supply is None else source.supply.place.files:
        hidden = any(part.startswith(".") for part in name.split("/"))
        if not (hidden or fetched_at_once(name) or name in source.shards):
            yield name


def _raise(error: OSError) -> None:
    raise error


def _is_entered(source: Checkpoint, folder: Path, followed: set[Path]) -> bool:
    """Tell whether what lies in a folder belongs to the checkpoint; one behind a link does once, if links count."""
    if not folder.is_symlink():
        return True
    real = folder.resolve()
    if not source.follow_links or real in followed or source.folder.resolve().is_relative_to(real):
        return False
    followed.add(real)
    return True
