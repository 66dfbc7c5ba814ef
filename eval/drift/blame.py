"""`find_blame`: which layers or tensor classes carry the damage of a candidate.

Weights are put back to the baseline, group by group, and the KL divergence that is left says what the group explains.
Each measurement is a forward pass with one layer in memory at a time, so that it works for models larger than memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.errors import BadValue, Incomparable, UsageError
from k2quant.eval.drift.findings import Blame, Suspect
from k2quant.eval.gating.verdict import Side
from k2quant.eval.runs.identity import tokenizer_hash
from k2quant.eval.statistics.group_testing import LEAST_CHUNKS, Findings, Found, clear, search
from k2quant.ground.intervals import Estimate
from k2quant.model.generation import load_tokenizer
from k2quant.model.modules import Backend
from k2quant.model.passes.activations import Activations
from k2quant.model.passes.divergence import clustered, kl
from k2quant.model.passes.mixture import Mixer, Part
from k2quant.model.passes.streaming import LayerHooks, stream_forward
from k2quant.model.passes.texts import Text, read_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONTEXT, TOKENS, PASSES = 128, 8192, 100
"""Tokens of a chunk, tokens of the text, and forward passes at most, unless the caller says otherwise."""

_NOISE = 2
"""Times the noise that damage must be, at least, to be explained."""
_LEVEL = 0.025
"""Chance that damage of just so much counts as more."""
_BUDGET = 4_000_000_000
"""Bytes of the baseline's logits that are kept in memory; the rest goes to files."""

Progress = Callable[[int, int], None]
"""Called with the passes done and the most there may be."""


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
    backend: Backend = "auto",
    passes: int = PASSES,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> Blame:
    """Find the tensor classes, layers and weights whose return to the baseline takes the damage away.

    Args:
        base: folder of the baseline, in any format.
        candidate: folder of the same model in another format, or changed.
        text: a file to run them on; None for the sample that k2quant brings. Only what the text visits can be found.
        context: tokens of a chunk. Chunks are what intervals are resampled over; there must be at least 16.
        tokens: how much of the text to read.
        lines: whether each line is a text of its own.
        device: where layers compute.
        dtype: of activations and of what is not quantised; narrower ones hide damage that is below their rounding.
        backend: `auto` for the fused kernels, `reference` for plain torch.
        passes: forward passes at most; with few of them the search ends at larger groups.
        progress: called after each pass.
        trust_remote_code: whether the baseline's own tokenizer code may run.

    Raises:
        CheckpointError: one of them is no sound checkpoint, or predicts what is no number.
        Incomparable: they are different models.
        MalformedFile: the text cannot be read.
        UsageError: an option makes no sense, or the text is too short.
        OutputError: the disk is full.
    """
    mixer = Mixer(open_checkpoint(Path(base)), open_checkpoint(Path(candidate)))
    sides = _sides(Path(base), Path(candidate))
    tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
    read = read_text(text, tokenizer, context=context, limit_tokens=tokens, lines=lines)
    if read.chunks < LEAST_CHUNKS:
        raise UsageError(
            f"{read.name} gives {read.chunks} chunks of {context} tokens; expected at least {LEAST_CHUNKS}:"
            " take a longer text or shorter chunks"
        )
    changed = mixer.changed()
    with tempfile.TemporaryDirectory(prefix="k2quant-") as folder:
        bench = _Bench(read, Path(folder), limit=passes, progress=progress)
        bench.options = {"device": device, "dtype": dtype, "backend": backend}
        return _blame(mixer, changed, bench, sides)


def _sides(base: Path, candidate: Path) -> tuple[Side, Side]:
    """Name both; the baseline's tokenizer reads the text, so that the candidate's may be missing, but not another."""
    hashes = tokenizer_hash(base), tokenizer_hash(candidate)
    if hashes[1] not in {None, hashes[0]}:
        raise Incomparable("another tokenizer, which reads another text", file=candidate, expected=f"that of {base}")
    one, other = (
        Side(folder=str(folder), model=folder.resolve().name, model_hash=None, tokenizer_hash=tokenizer)
        for folder, tokenizer in zip((base, candidate), hashes, strict=True)
    )
    return one, other


def _blame(mixer: Mixer, changed: list[Part], bench: _Bench, sides: tuple[Side, Side]) -> Blame:
    nothing = Estimate(value=0.0, error=0.0)
    damage = noise = nothing
    findings = Findings(classes=(), suspects=(), together=None)
    if changed:
        _check_limit(bench.left, changed)
        bench.run_baseline(mixer.mixed([part.name for part in mixer.parts]))
        noises, damages = bench.noise(mixer), bench.damage(mixer.mixed(()))
        damage, noise = bench.mean(damages), bench.mean(noises)
        if clear((damages - _NOISE * noises).numpy(), _LEVEL):
            findings = _searched(mixer, changed, bench, damages)
    return Blame(
        base=sides[0],
        candidate=sides[1],
        text=bench.text.name,
        text_hash=bench.text.hash,
        damage=damage,
        noise=noise,
        changed=len(changed),
        passes=bench.passes,
        classes=tuple(_suspect(one, changed, _kind(one, changed)) for one in findings.classes),
        suspects=_suspects(findings.suspects, changed),
        together=None if findings.together is None else _suspect(findings.together, changed, "all suspects together"),
    )


def _check_limit(passes: int, changed: Sequence[Part]) -> None:
    """Refuse fewer passes than baseline, noise, damage, each class and all suspects take."""
    needed = len({part.kind for part in changed}) + 4
    if type(passes) is not int or passes < needed:
        raise UsageError(f"passes: expected at least {needed} for these tensor classes, found {passes!r}")


def _searched(mixer: Mixer, changed: Sequence[Part], bench: _Bench, damages: Tensor) -> Findings:
    def measure(restored: frozenset[int]) -> NDArray[Any]:
        left = bench.damage(mixer.mixed([changed[number].name for number in restored])) if restored else damages
        found: NDArray[Any] = left.numpy()
        return found

    # The whole damage has been measured: it counts as a pass in the search, not here.
    keys, sizes = [part.key for part in changed], [part.size for part in changed]
    return search(keys, sizes, measure, passes=bench.left + 1)


class _Bench:
    """Runs models over a text and holds their predictions against the baseline's."""

    options: dict[str, Any]
    """Of every pass: device, dtype, backend."""

    def __init__(self, text: Text, folder: Path, *, limit: int, progress: Progress | None) -> None:
        self.text, self._folder = text, folder
        self._limit, self._progress = limit, progress
        self._kept: Activations | None = None
        self.passes = 0

    @property
    def left(self) -> int:
        """Passes that may still be run."""
        return self._limit - self.passes

    def run_baseline(self, source: Checkpoint) -> None:
        """Keep the baseline's logits, in the dtype in which it gives them: nothing is lost, BF16 takes 2 bytes each."""
        for number, logits in enumerate(stream_forward(source, self.text.batches, **self.options)):
            if self._kept is None:
                shapes = [(*batch.shape, logits.shape[-1]) for batch in self.text.batches]
                self._kept = Activations(self._folder, shapes, logits.dtype, budget=_BUDGET, identity={}, lasting=False)
            self._kept.put(0, number, logits)
        self._done()

    def damage(self, source: Checkpoint) -> Tensor:
        """Return the KL divergence of a model from the baseline, summed over each chunk: float64 `[C]`."""
        logits = stream_forward(source, self.text.batches, **self.options)
        found = torch.cat([self._chunks(number, slice(None), one) for number, one in enumerate(logits)])
        self._done()
        return _checked(found, source)

    def noise(self, mixer: Mixer) -> Tensor:
        """Return the same of the baseline from itself, in other batches and rounded otherwise."""
        source = mixer.mixed([part.name for part in mixer.parts])
        places = [place for number, batch in enumerate(self.text.batches) for place in _halves(number, len(batch))]
        batches = [self.text.batches[number][rows] for number, rows in places]
        logits = stream_forward(source, batches, _RoundedOtherwise(), **self.options)
        found = torch.cat([self._chunks(*place, one) for place, one in zip(places, logits, strict=True)])
        self._done()
        return _checked(found, source)

    def _chunks(self, number: int, rows: slice, logits: Tensor) -> Tensor:
        assert self._kept is not None  # noqa: S101  the baseline runs first
        ours = self._kept.get(0, number)[rows, :-1].to(logits.device)
        return kl(ours, logits[:, :-1]).sum(1).cpu()

    def mean(self, sums: Tensor) -> Estimate:
        """Return the mean over tokens of sums over chunks."""
        sizes = torch.tensor([len(row) - 1 for batch in self.text.batches for row in batch])
        values = (sums / sizes).repeat_interleave(sizes)
        return clustered(values, torch.arange(len(sizes)).repeat_interleave(sizes))

    def _done(self) -> None:
        self.passes += 1
        if self._progress:
            self._progress(self.passes, self._limit)


def _halves(number: int, rows: int) -> list[tuple[int, slice]]:
    middle = (rows + 1) // 2
    return [(number, part) for part in (slice(0, middle), slice(middle, rows)) if part.start < part.stop]


def _checked(sums: Tensor, source: Checkpoint) -> Tensor:
    if not bool(sums.isfinite().all()):
        raise BadValue("predicts what is no number", file=source.folder, remedy="check it with k2quant verify")
    return sums


class _RoundedOtherwise(LayerHooks):
    """Moves what comes out of each layer by up to a last bit, at random: what another order of sums may do."""

    def __init__(self) -> None:
        self._random = torch.Generator().manual_seed(0)
        self._handle: Any = None

    def before(self, layer: int, module: nn.Module) -> None:  # noqa: ARG002  the hook's signature
        """See `LayerHooks`."""
        self._handle = module.register_forward_hook(self._move)

    def _move(self, module: nn.Module, inputs: Any, outputs: Tensor) -> Tensor:  # noqa: ARG002  torch's signature
        relative = (torch.rand(outputs.shape, generator=self._random) * 2 - 1) * torch.finfo(outputs.dtype).eps
        return (outputs.float() * (1 + relative.to(outputs.device))).to(outputs.dtype)

    def after(self, layer: int, module: nn.Module) -> bool:  # noqa: ARG002  the hook's signature
        """See `LayerHooks`."""
        self._handle.remove()
        return False


def _suspects(found: Iterable[Found], changed: Sequence[Part]) -> tuple[Suspect, ...]:
    return tuple(_suspect(one, changed, _title([changed[part] for part in one.parts], changed)) for one in found)


def _kind(found: Found, changed: Sequence[Part]) -> str:
    return changed[min(found.parts)].kind


def _suspect(found: Found, changed: Sequence[Part], name: str) -> Suspect:
    tensors = sum(len(changed[part].candidate.parts) for part in found.parts)
    return Suspect(name=name, tensors=tensors, share=found.share, interval=found.interval)


def _title(parts: Sequence[Part], changed: Sequence[Part]) -> str:
    """Name a group: `attention`, `attention of layer 3`, `experts 4-7 of layer 3`, or the one weight."""
    if len(parts) == 1:
        return parts[0].name
    kind, layers, experts = parts[0].kind, {part.key[1] for part in parts}, {part.key[2] for part in parts}
    if len(layers) > 1:
        whole = len(parts) == sum(part.kind == kind for part in changed)
        return kind if whole else f"{kind} of layers {_ranges(layers)}"
    where = f"layer {min(layers)}"
    if len(experts) == 1 and experts != {-1}:
        where = f"expert {min(experts)} of {where}"
    level = 3 if where.startswith("expert") else 2
    if len(parts) == sum(part.key[:level] == parts[0].key[:level] for part in changed):
        return where if level == 3 else f"{kind} of {where}"
    if len(experts) > 1:
        return f"experts {_ranges(experts)} of {where}"
    return f"{', '.join(sorted(part.name.rpartition('.')[2] for part in parts))} of {where}"


def _ranges(numbers: Iterable[int]) -> str:
    """Return numbers as people write them: `1, 3-5`; -1, for weights outside the layers, comes last in words."""
    runs: list[list[int]] = []
    inside = set(numbers)
    outside = " and outside them" if -1 in inside else ""
    for number in sorted(inside - {-1}):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) + outside
