"""What is trained of a model, by name: what a checkpoint keeps, and takes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from k2quant.errors import BadValue, MissingTensor
from k2quant.qat.rounding.scales import LearnedScale
from k2quant.qat.rounding.shards import like
from k2quant.qat.run import checkpoints


def trained_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what a checkpoint keeps of a model: what is trained, and the scales that learned ones began with."""
    yield from ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    for name, module in model.named_modules():
        if isinstance(module, LearnedScale):
            yield f"{name}.start", module.start


def restore_weights(model: nn.Module, path: Path) -> None:
    """Take over what `trained_tensors` gave from a checkpoint.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    places = dict(trained_tensors(model))
    file = path / "weights.safetensors"
    for name, value in checkpoints.read_tensors(file):
        if name not in places:
            raise BadValue("the model trains no such tensor", tensor=name, file=file)
        with torch.no_grad():
            place = places.pop(name)
            place.copy_(like(value, place, file=file, name=name))
    if places:
        raise MissingTensor("lacks what the model trains", tensor=next(iter(places)), file=file)
