"""`measure_fidelity`: how far a candidate's predictions drift from the baseline's on a text, and in which layers.

Both models are streamed layer by layer, so that neither has to fit into memory; the text may be shared out among
machines. What comes out is a tripwire and a map of where to look, never a verdict on accuracy.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, overload

import torch

from k2quant.checkpoint.reader import open_checkpoint
from k2quant.conversion.spreading.part import Part, divided, part_of
from k2quant.errors import CheckpointError, Incomparable, UsageError
from k2quant.eval.drift.comparing import Comparison, Progress
from k2quant.eval.drift.findings import Fidelity, Unfinished
from k2quant.eval.drift.keeping import asked
from k2quant.eval.drift.parts import Parts, meeting
from k2quant.eval.gating.verdict import Side
from k2quant.eval.runs.identity import digest, tokenizer_hash
from k2quant.ground.saying.meter import each
from k2quant.ground.saying.progress import Asked, barred, told
from k2quant.ground.units import one_of
from k2quant.model.architecture import architecture
from k2quant.model.generation import load_tokenizer
from k2quant.model.loading import DTYPES
from k2quant.model.modules import Backend
from k2quant.model.passes.texts import Text, read_text
from k2quant.model.placement import execution_device

_ALIKE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "first_k_dense_replace",
    "n_routed_experts",
    "num_experts_per_tok",
)
"""What two models must share for their layers, routers and predictions to be comparable."""


@overload
def measure_fidelity(
    base: str | os.PathLike[str],
    candidate: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | None = ...,
    context: int = ...,
    tokens: int = ...,
    lines: bool = ...,
    device: str | torch.device = ...,
    dtype: str = ...,
    backend: Backend = ...,
    follow_links: bool = ...,
    trust_remote_code: bool = ...,
    progress: Asked = ...,
) -> Fidelity: ...


@overload
def measure_fidelity(
    base: str | os.PathLike[str],
    candidate: str | os.PathLike[str],
    *,
    part: str,
    shared: str | os.PathLike[str],
    soft_lock: bool = ...,
    text: str | os.PathLike[str] | None = ...,
    context: int = ...,
    tokens: int = ...,
    lines: bool = ...,
    device: str | torch.device = ...,
    dtype: str = ...,
    backend: Backend = ...,
    follow_links: bool = ...,
    trust_remote_code: bool = ...,
    progress: Asked = ...,
) -> Fidelity | Unfinished: ...


@barred("fidelity", each("layer", "layers"))
def measure_fidelity(
    base: str | os.PathLike[str],
    candidate: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | None = None,
    context: int = 512,
    tokens: int = 4096,
    lines: bool = False,
    device: str | torch.device = "cpu",
    dtype: str = "bfloat16",
    backend: Backend = "decoded",
    part: str | None = None,
    shared: str | os.PathLike[str] | None = None,
    soft_lock: bool = False,
    follow_links: bool = False,
    trust_remote_code: bool = False,
    progress: Asked = None,
) -> Fidelity | Unfinished:
    """Compare two checkpoints' predictions, hidden states and routes on a text.

    Everything that names, shapes, configs and tokenizers can tell is checked before a weight is read.

    Args:
        base: folder of the baseline, in any format; its tokenizer is used.
        candidate: folder of the candidate, in any format.
        text: plain UTF-8, or JSON Lines (`.jsonl`) of `prompt` and `completion`, of which prompts are context and only
            completions are scored; None for the sample that k2quant brings.
        context: tokens of a chunk; chunks know nothing of each other.
        tokens: how much of the text to read.
        lines: whether each line is a text of its own.
        device: where layers compute.
        dtype: of activations and of what is not quantised.
        backend: `decoded` to multiply by the BF16 values that weights mean: what is equal in value then gives exactly
            no drift, in whatever formats the two are. `auto` for the fused kernels, as a model is run: their sums have
            another order than those of BF16, which is drift too. `reference` for plain torch.
        part: `K/N`, such as `2/8`: measure the K-th of N shares of the text alone, beside other processes, on whatever
            machines see both checkpoints, the text and `shared`, that measure the others. A share is a run of batches,
            of up to 1,024 tokens each. Whoever finds all of them measured returns the figures, which are those of one
            process to the last bit, where all machines round alike.
        shared: a folder where the parts meet, made if need be: batches until all are there, then the result, which a
            part that comes late returns. It is nobody's then, and may be deleted. A part that was killed is called
            again; another model, text or setting is refused there until the result is.
        soft_lock: where that folder's file system has no locks, lock it by a file.
        follow_links: whether links of both folders may lead out of them.
        trust_remote_code: whether the baseline's own tokenizer code may run.
        progress: called as the work goes on, with layers; True for a bar.

    Returns:
        the figures; two checkpoints of equal values give exactly none. The hashes of the models stay None: they would
        cost another reading of every byte. With `part`, what is still to come, as long as something is.

    Raises:
        CheckpointError: one of them cannot be loaded, or has no tokenizer that can.
        Incomparable: they have other vocabularies, tokenizers, layers or experts.
        MalformedFile: the text is none; or a file of another part is damaged.
        UsageError: an option makes no sense, or the text is too short.
        HarnessFault: a model gives NaN or infinity.
        OutputError: there is no room for temporary files; or `shared` holds something else, another measurement, or
            this very part is being measured.
    """
    own = _part(part, shared, soft_lock=soft_lock)
    folders = Path(base), Path(candidate)
    one_of("dtype", dtype, tuple(DTYPES))
    config, sides = _checked(*folders, follow_links=follow_links)
    tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code, follow_links=follow_links)
    read = read_text(text, tokenizer, context=context, limit_tokens=tokens, lines=lines)
    _check_fits(read, config, folders[0])
    options: dict[str, Any] = {"device": device, "dtype": dtype, "backend": backend, "follow_links": follow_links}
    comparison = Comparison(folders=folders, sides=sides, config=config, text=read, options=options)
    if own is None or shared is None:
        return comparison.whole(told(progress))
    cut = {"context": context, "tokens": tokens, "lines": lines}
    with meeting(Path(shared), own, _identity(comparison, cut), soft_lock=soft_lock) as parts:
        return _share(comparison, parts, own, told(progress))


def _part(part: str | None, shared: object, *, soft_lock: bool) -> Part | None:
    """Return the part that is asked for.

    Raises:
        UsageError: it is none, one of `part=` and `shared=` lacks the other, or `soft_lock=` both.
    """
    if soft_lock and part is None:
        raise UsageError("`soft_lock=` locks the folder in which parts meet: it belongs to `part=`")
    if (part is None) != (shared is None):
        raise UsageError("`part=` and `shared=` belong together: parts meet in a folder that all of them see")
    return None if part is None else part_of(part)


def _identity(comparison: Comparison, cut: dict[str, int]) -> dict[str, Any]:
    """Return all that a part's measurements depend on; checkpoints are told by sizes, times and headers."""
    options = comparison.options
    opened = (open_checkpoint(folder, follow_links=options["follow_links"]) for folder in comparison.folders)
    settings = {
        "device": execution_device(options["device"]).type,
        "dtype": options["dtype"],
        "backend": options["backend"],
        **cut,
    }
    models = [digest(model.fingerprint()) for model in opened]
    return asked("fidelity", models, comparison.sides[0], comparison.text, settings)


def _share(comparison: Comparison, parts: Parts, own: Part, progress: Progress | None) -> Fidelity | Unfinished:
    """Measure what is left of a part, and complete the whole if nothing else is left."""
    if (result := parts.result()) is not None:
        return result
    layouts = comparison.layouts()
    share = divided([layout.tokens for layout in layouts], own.of)[own.number - 1]
    left = [number for number in share if not parts.standing(number, layouts[number])]
    for number, measured in comparison.measured(left, progress):
        parts.put(number, measured, layouts[number])
    found, missing = parts.gathered(layouts)
    if (result := parts.result()) is not None:  # another was faster
        return result
    if missing:
        return Unfinished(part=str(own), missing=missing, batches=len(layouts))
    result = comparison.completed(found)
    parts.finish(result)
    return result


def _checked(base: Path, candidate: Path, *, follow_links: bool) -> tuple[Any, tuple[Side, Side]]:
    """Return the config that both models share, and their names.

    Raises:
        Incomparable: they do not share it.
    """
    both = (base, candidate)
    one, other = (architecture(open_checkpoint(folder, follow_links=follow_links)) for folder in both)
    for key in _ALIKE:
        wanted, found = getattr(one, key), getattr(other, key)
        if found != wanted:
            raise Incomparable(
                f"{key} of two models that are to be compared",
                file=candidate,
                expected=f"{wanted}, as in {base}",
                found=found,
            )
    hashes = [tokenizer_hash(folder, follow_links=follow_links) for folder in both]
    if hashes[0] != hashes[1]:
        raise Incomparable(
            "another tokenizer, which reads another text",
            file=candidate,
            expected=f"the tokenizer's files of {base}",
            found="none" if hashes[1] is None else "files of other content",
            remedy="if they should be the same, copy those files",
        )
    return one, (_side(base, hashes[0]), _side(candidate, hashes[1]))


def _side(folder: Path, tokenizer: str | None) -> Side:
    return Side(folder=str(folder), model=folder.resolve().name, model_hash=None, tokenizer_hash=tokenizer)


def _check_fits(text: Text, config: Any, folder: Path) -> None:
    """Refuse a text that the model has no tokens or no positions for."""
    longest = max(batch.shape[1] for batch in text.batches)
    if longest > config.max_position_embeddings:
        raise UsageError(
            f"context: expected at most the {config.max_position_embeddings:,} tokens that the model has room for, "
            f"found {longest:,}"
        )
    highest = max(int(batch.max()) for batch in text.batches)
    if highest >= config.vocab_size:
        raise CheckpointError(
            "its tokenizer belongs to another model",
            file=folder,
            expected=f"tokens below {config.vocab_size}",
            found=highest,
        )
