"""A model's weights in the place of its base's: what an export writes of each weight."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from k2quant.checkpoint.panels import naming, panel_state, read_panel
from k2quant.checkpoint.weights import StoredWeight
from k2quant.conversion.convert import codecs_of
from k2quant.conversion.placing import Job
from k2quant.conversion.plan import Plan
from k2quant.errors import BadValue, MissingTensor, ShapeMismatch, UnsupportedFormat, UsageError
from k2quant.formats.activations import flow
from k2quant.formats.dtypes import as_bits, torch_dtype
from k2quant.formats.format import Format, Parts
from k2quant.formats.transcode import Scratch
from k2quant.ground import names
from k2quant.qat.exporting.distance import Distance
from k2quant.qat.preparing import Prepared
from k2quant.qat.rounding import adapters, scales
from k2quant.qat.rounding.rules import as_bf16
from k2quant.qat.rounding.targets import STACKS, Part, Target, canonical, is_fused, stack

if TYPE_CHECKING:
    from k2quant.kernels.codecs.figures import Figures

_REMEDY = "has the training diverged, or is the base damaged?"
_SAMPLE = 4096  # values of each parameter that tell one training from another


class Place(NamedTuple):
    """Where a model holds a weight of the checkpoint."""

    target: Target | None
    """The parameter that is seen rounded; None: the tensor is seen as it is."""
    part: Part | None
    tensor: Tensor
    """The weight itself, a view of the master."""
    moves: bool
    """Whether it is trained."""


class Trained:
    """A `stream.Substitute` with the weights of a model."""

    def __init__(self, model: nn.Module, found: Prepared, plan: Plan) -> None:
        """Find for each weight of the model its place in the plan.

        Raises:
            UsageError: a parameter is sharded over processes, fake quantisation is off, or a weight that was trained
                without it would have to be written quantised.
            MissingTensor: the base has no such weight, or one that the model does not have.
            ShapeMismatch: the base has it in another shape.
            UnsupportedFormat: the base is quantised in other groups or blocks than the model was trained for.
        """
        if not found.enabled:
            raise UsageError("fake quantisation is off: the model does not run on what would be exported")
        self.prepared = found
        self._source = plan.source
        self._distance = Distance(plan.source)
        self.places: dict[str, Place] = dict(_places(model, found))
        """By name in the language model, `.weight` left out."""
        self.jobs = {name: job for job in plan.jobs() if (name := key(job.weight)) in self.places}
        for name, place in self.places.items():
            _check(name, place, self.jobs.get(name), plan)
            self._check_layout(name, place)
        _check_complete(plan, self.places)

    def identity(self) -> dict[str, Any]:
        """Return what tells this training's values from another's."""
        digest = 0
        for name, place in self.places.items():
            digest = zlib.crc32(_sampled(place.tensor), zlib.crc32(name.encode(), digest))
        for target in self.prepared.targets:
            for beside in self.prepared.beside(target):
                digest = zlib.crc32(_sampled(beside), digest)
        config = self.prepared.config
        return {"trained": f"{digest:08x}", "bits": self.prepared.bits, "estimator": config.estimator}

    def replaces(self, weight: StoredWeight) -> bool:
        """Tell whether the model holds a weight, other than the base's own that stays quantised as it was."""
        name = key(weight)
        return name in self.places and not self._stays(name)

    def survey(self, job: Job, asked: Format, start: int, stop: int) -> object:
        """Return what a format says of rows of the masters, rounded to BF16 as the forward pass has them."""
        target, part, tensor, _ = self.places[key(job.weight)]
        rows = slice(start, stop)
        values = tensor[rows] if target is None or part is None else self.prepared.master(target, part, rows)
        return asked.survey(as_bits(as_bf16(values)), codecs_of("cpu"))

    def panel(self, job: Job, start: int, stop: int) -> tuple[Parts, Figures | None]:
        """Return rows of the tensors that are written, by suffix, and how far their values are from the base's.

        Raises:
            BadValue: a weight is not finite.
        """
        parts = self._parts(job, start, stop)
        return parts, self._distance.measured(job, start, stop, parts)

    def _parts(self, job: Job, start: int, stop: int) -> Parts:
        target, part, tensor, _ = self.places[key(job.weight)]
        if target is not None and part is not None and self.prepared.quantises(target):
            settled = job.written if self.prepared.config.format.surveyed else None
            stored = self.prepared.stored(target, part, slice(start, stop), settled)
            return {suffix: as_bits(values) for suffix, values in stored.items()} | self._along(job, start, stop)
        suffix = next(suffix for suffix, entry in job.outputs.items() if entry.name == job.output_main.name)
        rows = (tensor if tensor.ndim == 2 else tensor.reshape(-1, 1))[start:stop]
        seen = as_bf16(rows) if target is not None else rows
        if not seen.isfinite().all():
            raise BadValue("not finite, so nothing is exported", tensor=job.weight.base, remedy=_REMEDY)
        return {suffix: as_bits(seen.to(torch_dtype(job.output_main.dtype)))}

    def _along(self, job: Job, start: int, stop: int) -> Parts:
        """Return what goes along with a weight from the base, whatever its values are now."""
        written, base = job.written, job.weight.format
        if written is None or base is None or not written.along:
            return {}
        state = panel_state(written, job.weight.shape, start, stop)
        outputs: Parts = {suffix: Scratch().take(suffix, state[suffix]) for suffix in written.along}
        with naming(job.weight, start):
            base.pass_on(read_panel(self._source, job.weight, start, stop, Scratch()), outputs, written)
        return outputs

    def _stays(self, name: str) -> bool:
        """Tell whether a weight that is not fake-quantised is copied from the base, which holds it quantised."""
        place, job = self.places[name], self.jobs[name]
        quantised = place.target is not None and self.prepared.quantises(place.target)
        return not quantised and job.written is not None and job.written.quantised

    def _check_layout(self, name: str, place: Place) -> None:
        """Refuse a weight that was trained as it cannot be written."""
        job = self.jobs[name]
        written, wanted = job.written, self.prepared.config.format
        if self._stays(name):
            if place.moves:
                raise UsageError(
                    f"`{name}` was trained without fake quantisation, but the base holds it in {wanted.name} and out "
                    "of scope it stays so: take it into the scope, freeze it, or train from the base in BF16"
                )
        elif written is not None and written.quantised and written.scales != wanted.scales:
            raise UnsupportedFormat(
                "the base is quantised in other units",
                tensor=name,
                file=job.weight.main.file,
                expected=wanted.scales,
                found=written.scales,
                remedy="convert the base to bf16 and export with that",
            )


def key(weight: StoredWeight) -> str:
    """Return the name of a checkpoint's weight within the language model, or its own; `.weight` is left out."""
    name = f"{weight.base}.weight" if weight.format else weight.main.name
    return (names.in_language_model(name) or name).removesuffix(".weight")


def _places(model: nn.Module, found: Prepared) -> Iterator[tuple[str, Place]]:
    """Yield what a checkpoint holds of a model: its parameters, and the buffers that last."""
    rounded = {id(target.master): target for target in found.targets + found.plain}
    for name, module in model.named_modules():
        if {adapters.CHILD, scales.CHILD} & set(name.split(".")):
            continue
        for own, tensor in _own(module):
            full = f"{name}.{own}" if name else own
            if type(tensor).__name__ == "DTensor":
                raise UsageError(f"`{full}` is sharded over processes; save a checkpoint and export that with one")
            target = rounded.get(id(tensor))
            for part in target.parts if target else _parts(name, module, own):
                yield part.base, Place(target, part, part.of(tensor.detach()), tensor.requires_grad)


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    lasting = module._buffers.keys() - module._non_persistent_buffers_set  # noqa: SLF001  torch has no other way
    yield from module.named_parameters(recurse=False)
    yield from ((own, tensor) for own, tensor in module._buffers.items() if own in lasting and tensor is not None)  # noqa: SLF001


def _parts(name: str, module: nn.Module, own: str) -> tuple[Part, ...]:
    if own in STACKS and is_fused(module):
        return stack(name, module, own).parts
    full = canonical(f"{name}.{own}" if name else own)
    return (Part(full.removesuffix(".weight"), None, slice(None)),)


def _check_complete(plan: Plan, places: Mapping[str, Place]) -> None:
    """Refuse a base with weights that the model should have, and has not."""
    config = plan.source.config or {}
    text = config.get("text_config", config)
    layers = text.get("num_hidden_layers") if isinstance(text, dict) else None
    for weight in (job.weight for job in plan.jobs()):
        name, layer = key(weight), names.layer(weight.main.name)
        ahead = layer is not None and isinstance(layers, int) and layer >= layers  # predicts further tokens
        stray = name.endswith(".rotary_emb.inv_freq") or flow(names.split(name)[1]) is not None
        if name in places or ahead or stray or names.in_language_model(weight.main.name) is None:
            continue
        raise MissingTensor(
            "the model does not have it", tensor=name, file=plan.source.folder, remedy="is the base another model's?"
        )


def _check(name: str, place: Place, job: Job | None, plan: Plan) -> None:
    if job is None:
        raise MissingTensor(
            "the base has no such weight", tensor=name, file=plan.source.folder, remedy="is it another model's?"
        )
    if job.weight.shape != tuple(place.tensor.shape):
        raise ShapeMismatch(
            "the base has another shape",
            tensor=name,
            file=job.weight.main.file,
            expected=tuple(place.tensor.shape),
            found=job.weight.shape,
        )


def _sampled(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(flat.numel() // _SAMPLE, 1)].float().cpu().contiguous()
    return sample.numpy().tobytes()
