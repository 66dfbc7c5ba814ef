"""A model's weights in the place of its base's: what an export writes of each weight."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from k2quant import names
from k2quant.checkpoint.weights import Weight
from k2quant.errors import MissingTensor, ShapeMismatch, UsageError
from k2quant.formats.transcode import Parts
from k2quant.model.memory import TORCH_DTYPES
from k2quant.plan import Job, Plan
from k2quant.qat import adapters, scales
from k2quant.qat.prepared import Prepared
from k2quant.qat.rules import as_bf16
from k2quant.qat.targets import Part, Target, canonical, is_fused, stack

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from k2quant.kernels.figures import Figures

_SAMPLE = 4096  # values of each parameter that tell one training from another


class Place(NamedTuple):
    """Where a model holds a weight of the checkpoint."""

    target: Target | None
    """The parameter that is seen rounded; None: the tensor is seen as it is."""
    part: Part | None
    tensor: Tensor
    """The weight itself, a view of the master."""


class Trained:
    """A `stream.Substitute` with the weights of a model."""

    def __init__(self, model: nn.Module, found: Prepared, plan: Plan) -> None:
        """Find for each weight of the model its place in the plan.

        Raises:
            UsageError: a parameter is sharded over processes.
            MissingTensor: the base has no such weight.
            ShapeMismatch: the base has it in another shape.
        """
        self.prepared = found
        self.places: dict[str, Place] = dict(_places(model, found))
        """By name in the language model, `.weight` left out."""
        self.jobs = {name: job for job in plan.jobs() if (name := key(job.weight)) in self.places}
        for name, place in self.places.items():
            _check(name, place, self.jobs.get(name), plan)

    def identity(self) -> dict[str, Any]:
        """Return what tells this training's values from another's."""
        digest = 0
        for name, place in self.places.items():
            digest = zlib.crc32(_sampled(place.tensor), zlib.crc32(name.encode(), digest))
        config = self.prepared.config
        return {"trained": f"{digest:08x}", "bits": self.prepared.bits, "estimator": config.estimator}

    def replaces(self, weight: Weight) -> bool:
        """Tell whether the model holds a weight."""
        return key(weight) in self.places

    def panel(self, job: Job, start: int, stop: int) -> tuple[Parts, Figures | None]:
        """Return rows of the tensors that are written, by suffix."""
        target, part, tensor = self.places[key(job.weight)]
        if target is not None and part is not None and self.prepared.quantises(target):
            stored = self.prepared.stored(target, part, slice(start, stop))
            return {suffix: as_array(values) for suffix, values in stored.items()}, None
        suffix = next(suffix for suffix, entry in job.outputs.items() if entry.name == job.output_main.name)
        rows = (tensor if tensor.ndim == 2 else tensor.reshape(-1, 1))[start:stop]
        seen = as_bf16(rows) if target is not None else rows
        return {suffix: as_array(seen.to(TORCH_DTYPES[job.output_main.dtype]))}, None


def key(weight: Weight) -> str:
    """Return the name of a checkpoint's weight within the language model, or its own; `.weight` is left out."""
    name = f"{weight.base}.weight" if weight.format else weight.main.name
    return (names.in_language_model(name) or name).removesuffix(".weight")


def as_array(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor's bytes as the converter takes them: BF16 and FP8 as bit patterns."""
    plain = tensor.detach().to("cpu").contiguous()
    bits = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}.get(plain.dtype, plain.dtype)
    return plain.view(bits).numpy()


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
                yield part.base, Place(target, part, part.of(tensor.detach()))


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    lasting = module._buffers.keys() - module._non_persistent_buffers_set  # noqa: SLF001  torch has no other way
    yield from module.named_parameters(recurse=False)
    yield from ((own, tensor) for own, tensor in module._buffers.items() if own in lasting and tensor is not None)  # noqa: SLF001


def _parts(name: str, module: nn.Module, own: str) -> tuple[Part, ...]:
    if is_fused(module) and module._parameters[own] is not None:  # noqa: SLF001  an attribute may shadow it
        return stack(name, module, own).parts
    full = canonical(f"{name}.{own}" if name else own)
    return (Part(full.removesuffix(".weight"), None, slice(None)),)


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
