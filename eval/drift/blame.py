"""`find_blame`: which layers or tensor classes carry the damage of a candidate.

Weights are put back to the baseline, group by group, and the KL divergence that is left says what the group explains.
Each measurement is a forward pass with one layer in memory at a time, so that it works for models larger than memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.errors import Incomparable, UsageError
from k2quant.eval.drift.findings import Blame
from k2quant.eval.drift.keeping import asked, measurements
from k2quant.eval.drift.measuring import Bench, Progress
from k2quant.eval.drift.suspects import kind_of, suspect, suspects
from k2quant.eval.gating.verdict import Side
from k2quant.eval.runs.identity import model_hash, tokenizer_hash
from k2quant.eval.statistics.group_testing import LEAST_CHUNKS, Findings, clear, search
from k2quant.ground.intervals import Estimate
from k2quant.ground.saying.meter import each
from k2quant.ground.saying.progress import Asked, barred, told
from k2quant.ground.units import counted
from k2quant.model.generation import load_tokenizer
from k2quant.model.modules import Backend
from k2quant.model.passes.mixture import Mixer, Part
from k2quant.model.passes.texts import read_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONTEXT, TOKENS, PASSES = 128, 8192, 100
"""Tokens of a chunk, tokens of the text, and forward passes at most, unless the caller says otherwise."""

_NOISE = 2
"""Times the noise that damage must be, at least, to be explained."""
_LEVEL = 0.025
"""Chance that damage of just so much counts as more."""


@barred("blame", each("pass", "passes"))
def find_blame(
    base: str | os.PathLike[str],
    candidate: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | None = None,
    context: int = CONTEXT,
    tokens: int = TOKENS,
    lines: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    backend: Backend = "decoded",
    passes: int = PASSES,
    resume: str | os.PathLike[str] | None = None,
    soft_lock: bool = False,
    reading: Progress | None = None,
    progress: Asked = None,
    remark: Callable[[str], None] | None = None,
    follow_links: bool = False,
    trust_remote_code: bool = False,
) -> Blame:
    """Find the tensor classes, layers and weights whose return to the baseline takes the damage away.

    Args:
        base: folder of the baseline, in any format.
        candidate: folder of the same model in another format, or changed.
        text: a file to run them on, as `measure_fidelity` takes it; None for the sample that k2quant brings. Only what
            the text visits can be found.
        context: tokens of a chunk. Chunks are what intervals are resampled over; there must be at least 16.
        tokens: how much of the text to read.
        lines: whether each line is a text of its own.
        device: where layers compute.
        dtype: of activations and of what is not quantised; narrower ones hide damage that is below their rounding.
        backend: who multiplies, as in `measure_fidelity`.
        passes: forward passes at most; with few of them the search ends at larger groups.
        resume: a folder for what each pass measured, made if need be: a call that was stopped goes on from there and
            ends with the same numbers to the last bit. So does one with more `passes`; another model, text or setting
            is refused. The folder stays until `discard_passes` takes it away. None keeps nothing.
        soft_lock: where the folder's file system has no locks, lock it by a file.
        reading: called with the bytes of both models that are hashed and all their bytes, where there is `resume`.
        progress: called after each pass; True for a bar.
        remark: called with what is worth knowing on the way.
        follow_links: whether links of both folders may lead out of them.
        trust_remote_code: whether the baseline's own tokenizer code may run.

    Raises:
        CheckpointError: one of them is no sound checkpoint, or predicts what is no number.
        Incomparable: they are different models.
        MalformedFile: the text cannot be read.
        UsageError: an option makes no sense, or the text is too short.
        OutputError: the disk is full; or `resume` holds something else, other measurements, or is in use.
    """
    one, other = (open_checkpoint(Path(folder), follow_links=follow_links) for folder in (base, candidate))
    mixer = Mixer(one, other)
    sides = _sides(one, other)
    tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code, follow_links=follow_links)
    read = read_text(text, tokenizer, context=context, limit_tokens=tokens, lines=lines)
    if read.chunks < LEAST_CHUNKS:
        raise UsageError(
            f"{read.name} gives {read.chunks} chunks of {context} tokens; expected at least {LEAST_CHUNKS}:"
            " take a longer text or shorter chunks"
        )
    options: dict[str, Any] = {"device": device, "dtype": dtype, "backend": backend}

    def identity() -> dict[str, Any]:
        models = _hashes((one, other), reading)
        settings = options | {"context": context, "tokens": tokens, "lines": lines}
        return asked("blame", models, sides[0], read, settings)

    changed = mixer.changed()
    if changed:
        _check_limit(passes, changed)
    kept = Path(resume) if resume is not None and changed else None
    with measurements(kept, identity, soft_lock=soft_lock) as known:
        if remark and len(known):
            remark(f"{kept}: resumes after {counted(len(known), 'measurement')}")
        with tempfile.TemporaryDirectory(prefix="k2quant-") as folder:
            bench = Bench(mixer, read, Path(folder), known, limit=passes, progress=told(progress))
            bench.options = options
            return _blame(changed, bench, sides)


def _hashes(models: tuple[Checkpoint, Checkpoint], reading: Progress | None) -> list[str]:
    """Read every byte of both, with the progress of the two together."""
    sizes = [sum(entry.nbytes for entry in model.tensors.values()) for model in models]

    def together(number: int) -> Progress | None:
        before = sum(sizes[:number])
        return reading and (lambda done, _: reading(min(before + done, sum(sizes)), sum(sizes)))

    return [
        model_hash(model.folder, follow_links=model.follow_links, progress=together(number))
        for number, model in enumerate(models)
    ]


def _sides(base: Checkpoint, candidate: Checkpoint) -> tuple[Side, Side]:
    """Name both; the baseline's tokenizer reads the text, so that the candidate's may be missing, but not another."""
    both = (base, candidate)
    hashes = [tokenizer_hash(model.folder, follow_links=model.follow_links) for model in both]
    if hashes[1] not in {None, hashes[0]}:
        expected = f"that of {base.folder}"
        raise Incomparable("another tokenizer, which reads another text", file=candidate.folder, expected=expected)
    one, other = (
        Side(folder=str(model.folder), model=model.folder.resolve().name, model_hash=None, tokenizer_hash=tokenizer)
        for model, tokenizer in zip(both, hashes, strict=True)
    )
    return one, other


def _blame(changed: list[Part], bench: Bench, sides: tuple[Side, Side]) -> Blame:
    nothing = Estimate(value=0.0, error=0.0)
    damage = noise = nothing
    findings = Findings(classes=(), suspects=(), together=None)
    if changed:
        bench.begin()
        noises, damages = bench.noise(), bench.damage(())
        damage, noise = bench.mean(damages), bench.mean(noises)
        if clear((damages - _NOISE * noises).numpy(), _LEVEL):
            findings = _searched(changed, bench, damages)
    return Blame(
        base=sides[0],
        candidate=sides[1],
        text=bench.text.name,
        text_hash=bench.text.hash,
        damage=damage,
        noise=noise,
        changed=len(changed),
        passes=bench.passes,
        classes=tuple(suspect(one, changed, kind_of(one, changed)) for one in findings.classes),
        suspects=suspects(findings.suspects, changed),
        together=None if findings.together is None else suspect(findings.together, changed, "all suspects together"),
        completions=bench.text.completions,
        backend=bench.options["backend"],
    )


def _check_limit(passes: int, changed: Sequence[Part]) -> None:
    """Refuse fewer passes than baseline, noise, damage, each class and all suspects take."""
    needed = len({part.kind for part in changed}) + 4
    if type(passes) is not int or passes < needed:
        raise UsageError(f"passes: expected at least {needed} for these tensor classes, found {passes!r}")


def _searched(changed: Sequence[Part], bench: Bench, damages: Tensor) -> Findings:
    def measure(restored: frozenset[int]) -> NDArray[Any]:
        left = bench.damage([changed[number].name for number in restored]) if restored else damages
        found: NDArray[Any] = left.numpy()
        return found

    # The whole damage has been measured: it counts as a pass in the search, not here.
    keys, sizes = [part.key for part in changed], [part.size for part in changed]
    return search(keys, sizes, measure, passes=bench.left + 1)
