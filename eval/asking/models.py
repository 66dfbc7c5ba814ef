"""Models to be asked: who they are before they are loaded, and loaded as one of lm-eval's own kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2quant.checkpoint.files.paths import inside, read_limited
from k2quant.checkpoint.files.sources import no_folder
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.reader import CONFIG, open_checkpoint
from k2quant.errors import CheckpointError, HarnessFault, UsageError
from k2quant.eval.asking.endpoint.server import Server, client_of
from k2quant.eval.asking.engines import longest
from k2quant.eval.asking.request import Request
from k2quant.eval.asking.thinking import END
from k2quant.eval.runs.identity import model_hash, tokenizer_hash
from k2quant.eval.runs.resuming import Progress
from k2quant.ground.saying.faults import said

if TYPE_CHECKING:
    from k2quant.eval.asking.harness import Tasks

_CONFIG_LIMIT = 2**24  # bytes of config.json
_LONGEST = 131_072  # tokens of a text where no config says: that of Kimi K2; a server says itself when that is too long
_CODE = "transformers_modules"  # where transformers imports code of checkpoints to
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.py", "*.jinja"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that is not loaded yet."""

    folder: Path | None
    """Where its files lie; None for a server of which nobody said."""
    model_hash: str | None
    """SHA-256 over config and weights; None for such a server."""
    tokenizer_hash: str | None
    """SHA-256 over the tokenizer's files; None where there are none."""
    max_length: int
    """The most tokens of prompt and answer."""


def describe(request: Request, progress: Progress | None) -> Model:
    """Find a model's files and hash them.

    Raises:
        UsageError: there is no such folder.
        CheckpointError: the folder holds no model in safetensors.
    """
    folder = request.served_from if request.backend == "api" else _folder(request)
    for place in filter(None, (folder, request.tokenizer)):
        if why := no_folder(place):
            raise UsageError(f"{place}: {why}")
    if folder is None:
        tokens = tokenizer_hash(request.tokenizer, follow_links=request.follow_links) if request.tokenizer else None
        return Model(folder=None, model_hash=None, tokenizer_hash=tokens, max_length=_asked_room(request) or _LONGEST)
    if request.backend == "k2quant":
        from k2quant.model.generation import load_tokenizer

        # One that is code, or is none, is refused before terabytes are hashed.
        load_tokenizer(folder, trust_remote_code=request.trust_remote_code, follow_links=request.follow_links)
    return Model(
        folder=folder,
        model_hash=model_hash(folder, follow_links=request.follow_links, reread=request.reread, progress=progress),
        tokenizer_hash=tokenizer_hash(request.tokenizer or folder, follow_links=request.follow_links),
        max_length=_asked_room(request) or _positions(folder, follow_links=request.follow_links),
    )


def _asked_room(request: Request) -> int | None:
    return longest(request.model_args, request.max_length)


def _folder(request: Request) -> Path:
    folder = Path(request.model)
    if folder.is_dir() or request.backend == "k2quant":
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(request.model, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:
        raise UsageError(f"{request.model:.200}: no such folder, and not on the hub: {said(error)}") from error


def _positions(folder: Path, *, follow_links: bool) -> int:
    """Return how many tokens a model's config has room for."""
    path = inside(folder, "config.json", follow_links=follow_links)
    if not path.exists():
        return _LONGEST
    config = parse_object(read_limited(path, _CONFIG_LIMIT), file=path)
    text = config.get("text_config")
    found = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return found if type(found) is int and found > 1 else _LONGEST


def load(
    model: Model,
    request: Request,
    tasks: Tasks,
    progress: Progress | None = None,
    remark: Callable[[str], None] | None = None,
) -> Any:
    """Return a model of lm-eval's with its `settings`, a dictionary of what was found out while it was loaded.

    Args:
        model: that was described.
        request: what it will be asked.
        tasks: that will be asked.
        progress: called with the bytes that are read and all bytes.
        remark: called with why a server keeps everybody waiting.

    Raises:
        HarnessFault: a server cannot do what a task needs, or prompts would not be what they should.
        CheckpointError: the model cannot be loaded.
        UsageError: options that make no sense, or do not go with the tasks.
    """
    if request.backend == "api":
        return _served(model, request, tasks, remark)
    if request.backend == "vllm":
        return _vllm(model, request)
    return _local(model, request, progress)


def _local(model: Model, request: Request, progress: Progress | None) -> Any:
    from k2quant.eval.asking.harness import transformers_model
    from k2quant.model.generation import silence

    silence()
    packed = request.backend == "k2quant"
    loaded, tokenizer = _packed(model, request, progress) if packed else _transformers(model, request)
    begins = _added_tokens(tokenizer)
    lm = transformers_model(loaded, tokenizer, batch_size=request.batch_size, max_length=model.max_length)
    lm.settings = {"prompts_begin_with": begins}
    return lm


def _packed(model: Model, request: Request, progress: Progress | None) -> tuple[Any, Any]:
    from k2quant.model import load_model
    from k2quant.model.generation import load_tokenizer

    assert model.folder  # noqa: S101  a local model has one
    tokenizer = load_tokenizer(
        model.folder, trust_remote_code=request.trust_remote_code, follow_links=request.follow_links
    )
    return load_model(
        model.folder, device=request.device, dtype=request.dtype, follow_links=request.follow_links, progress=progress
    ), tokenizer


def _transformers(model: Model, request: Request) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    assert model.folder  # noqa: S101  a local model has one
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(model.folder),
            dtype=request.dtype,
            device_map=request.device,
            local_files_only=True,
            trust_remote_code=request.trust_remote_code,
            **request.model_args,
        )
        if _CODE in type(loaded).__module__:  # which may load and fail at the first token, or at the second
            loaded.generate(torch.zeros(1, 2, dtype=torch.long).to(loaded.device), max_new_tokens=2, do_sample=False)
    except Exception as error:  # code of a checkpoint may raise anything
        remedy = "it needs no code with `backend=k2quant`" if _runs_here(model.folder, request) else None
        what = "transformers cannot run it"
        raise CheckpointError(what, file=model.folder, found=said(error), remedy=remedy) from error
    return loaded.eval(), _tokenizer(model.folder, request, loaded.config)


def _runs_here(folder: Path, request: Request) -> bool:
    """Tell whether a model is one that k2quant runs itself, without code of the checkpoint."""
    from k2quant.model.architecture import architecture

    try:
        architecture(open_checkpoint(folder, follow_links=request.follow_links))
    except CheckpointError:
        return False
    return True


def _tokenizer(folder: Path | None, request: Request, config: Any = None) -> Any:
    from k2quant.model.architecture import architecture
    from k2quant.model.generation import open_tokenizer

    assert folder  # noqa: S101  callers have one
    try:
        return open_tokenizer(
            folder, config=config, trust_remote_code=request.trust_remote_code, follow_links=request.follow_links
        )
    except CheckpointError as first:
        if not (folder / CONFIG).exists():
            raise
        try:  # such as a config of Kimi K2's, which transformers does not know
            known = architecture(open_checkpoint(folder, follow_links=request.follow_links))
        except CheckpointError:
            raise first from None  # what is wrong with the model beside it was not asked
        return open_tokenizer(
            folder, config=known, trust_remote_code=request.trust_remote_code, follow_links=request.follow_links
        )


def _added_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts before a text of its own accord.

    Raises:
        HarnessFault: it puts some behind it, so that every prompt would look finished.
    """
    plain, full = tokenizer.encode("1", add_special_tokens=False), tokenizer.encode("1")
    if full[len(full) - len(plain) :] != plain:
        raise HarnessFault(
            "the tokenizer ends every prompt",
            found=f"tokens {full[-1:]} behind it",
            remedy="its post-processor should add tokens before a text only",
        )
    return [int(token) for token in full[: len(full) - len(plain)]]


def _served(model: Model, request: Request, tasks: Tasks, remark: Callable[[str], None] | None) -> Any:
    from k2quant.eval.asking.harness import served_model

    server = Server(client=client_of(request, remark), model=request.model, chat=request.chat)
    if tasks.scored and request.chat:
        raise UsageError(
            f"chat messages cannot be scored, and {', '.join(tasks.scored)} need it; leave out `chat=True`"
        )
    server.check_writes()
    tokenizer = None
    if tasks.scored:
        folder = request.tokenizer or request.served_from
        if folder is None:
            raise UsageError(f"{', '.join(tasks.scored)} need `tokenizer=` or `served_from=`: text is scored by tokens")
        tokenizer = _tokenizer(folder, request)
        server.check_scores(tokenizer.encode("1 2 3 4 5"), tasks.scored)
    marker = END if request.think_end is None else request.think_end
    lm = served_model(server, tokenizer, max_length=model.max_length, marker=marker)
    lm.settings = {"url": server.url, "prompts_begin_with": _added_tokens(tokenizer) if tokenizer else None}
    return lm


def _vllm(model: Model, request: Request) -> Any:
    from k2quant.eval.asking.harness import vllm_model

    settings = {
        **request.model_args,
        "pretrained": str(model.folder),
        "dtype": request.dtype,
        "max_model_len": model.max_length,
        "batch_size": "auto",
        "trust_remote_code": request.trust_remote_code,
        "seed": 1234,
    }
    lm = vllm_model(settings)
    lm.settings = {}
    return lm
