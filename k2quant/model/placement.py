"""Where each module of a model lies and where it computes: one device, several, or memory and disk behind them.

What does not fit waits on the CPU or in the checkpoint's own files and is brought to the computing device when its turn
comes, module by module, by accelerate's hooks. Nothing is ever written to disk: the checkpoint is there already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from accelerate.utils import get_max_memory, infer_auto_device_map, send_to_device
from torch import nn

from k2quant.errors import UsageError
from k2quant.model.assembly import Assembly, own_tensors
from k2quant.model.filling import fill, release
from k2quant.model.modules import Quantized

DISK = "disk"
DeviceMap = dict[str, torch.device | str]
"""Name of a module to its device, or to `disk`; the empty name is the whole model."""


def checked_device(device: str | int | torch.device) -> torch.device:
    """Return a device of this machine.

    Raises:
        UsageError: there is no such device here.
    """
    try:
        found = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"unknown device {device!r}; expected cpu, cuda, cuda:N, auto or a map") from error
    if found.type not in {"cpu", "cuda"}:
        raise UsageError(f"unknown device {device!r}; expected cpu, cuda, cuda:N, auto or a map")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {device!r} is not available: torch {torch.__version__} finds {torch.cuda.device_count()} GPUs"
        )
    return torch.device("cuda", found.index or 0) if found.type == "cuda" else torch.device("cpu")


def execution_device(device: str | torch.device | Mapping[str, Any]) -> torch.device:
    """Return the device that computes, of several the first."""
    if isinstance(device, Mapping):
        places = [checked_device(place) for place in device.values() if place != DISK]
        return next((place for place in places if place.type == "cuda"), torch.device("cpu"))
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return checked_device(device)


def spread(
    assembly: Assembly,
    device: str | torch.device | Mapping[str, str | int],
    max_memory: Mapping[int | str, int | str] | None,
) -> DeviceMap:
    """Return where each part of a model lies.

    Raises:
        UsageError: a map leaves a module out or names one that is not there, or `max_memory` without `auto`.
    """
    if max_memory is not None and device != "auto":
        raise UsageError(f"max_memory has a meaning with device auto alone, found {device!r}")
    if isinstance(device, Mapping):
        places = dict(device)
    elif device == "auto":
        for module in assembly.model.modules():
            release(module, assembly.dtype)  # so that the sizes are those that it will have
        try:
            places = infer_auto_device_map(
                assembly.model,
                max_memory=get_max_memory(dict(max_memory) if max_memory else None),
                no_split_module_classes=assembly.model._no_split_modules,  # noqa: SLF001  how accelerate is told
                offload_buffers=True,
            )
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"max_memory: {error}") from error
    else:
        places = {"": str(device)}
    mapping: DeviceMap = {name: DISK if place == DISK else checked_device(place) for name, place in places.items()}
    _check_covers(assembly.model, mapping)
    return mapping


def _check_covers(model: nn.Module, mapping: DeviceMap) -> None:
    """Refuse a map that does not say where each tensor of the model lies."""
    known = {name for name, _ in model.named_modules()}
    stray = next((name for name in mapping if name not in known), None)
    if stray is not None:
        raise UsageError(
            f"device map: the model has no module {stray!r}; expected such as 'model.layers.0' or 'lm_head'"
        )
    for name, module in model.named_modules():
        if _holds_tensors(module) and place_of(name, mapping) is None:
            raise UsageError(f"device map: it does not say where `{name}` goes")


def place_of(name: str, mapping: DeviceMap) -> torch.device | str | None:
    """Return where a module lies: what the map says of it, or of the nearest module around it."""
    while name not in mapping:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return mapping[name]


def resident(assembly: Assembly, mapping: DeviceMap) -> Iterator[tuple[str, nn.Module, torch.device]]:
    """Yield the modules that are loaded at once, with their devices."""
    for name, module in assembly.model.named_modules():
        place = place_of(name, mapping)
        if isinstance(place, torch.device):
            yield name, module, place


def place(assembly: Assembly, mapping: DeviceMap) -> None:
    """Have each module compute on its device, and bring what lies elsewhere when its turn comes."""
    main = assembly.device
    places = set(mapping.values())
    if len(places) == 1 and DISK not in places:
        assembly.model.model.rotary_emb.to(next(iter(places)))
        return
    skipped = assembly.model._skip_keys_device_placement  # noqa: SLF001  how accelerate is told
    for name, module in assembly.model.named_modules():
        where = place_of(name, mapping)
        if name in mapping and where is not None:
            computes_on = where if isinstance(where, torch.device) and where.type != "cpu" else main
            add_hook_to_module(module, _InputsTo(computes_on, skipped), append=True)
        if not _holds_tensors(module):
            continue
        if where == DISK:
            add_hook_to_module(module, _FromDisk(assembly, name), append=True)
        elif where == torch.device("cpu") and main.type != "cpu":
            waiting = AlignDevicesHook(main, offload=True, offload_buffers=True, skip_keys=skipped)
            add_hook_to_module(module, waiting, append=True)
        elif isinstance(where, torch.device):
            add_hook_to_module(module, _InputsTo(where, skipped), append=True)
    assembly.model.model.rotary_emb.to(main)
    add_hook_to_module(assembly.model, AlignDevicesHook(main, io_same_device=True, skip_keys=skipped), append=True)
    setattr(assembly.model, "hf_device_map", {name: str(where) for name, where in mapping.items()})  # noqa: B010  untyped


def _holds_tensors(module: nn.Module) -> bool:
    return isinstance(module, Quantized) or any(True for _ in own_tensors(module))


class _FromDisk(ModelHook):  # type: ignore[misc]  # accelerate has no types
    """Reads a module's weights from the checkpoint before it computes, and forgets them afterwards."""

    def __init__(self, assembly: Assembly, name: str) -> None:
        self._assembly, self._name = assembly, name

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Read."""
        device = self._assembly.device
        fill(self._assembly, [(self._name, module, device)])
        return send_to_device(args, device), send_to_device(kwargs, device)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Forget."""
        release(module, self._assembly.dtype)
        return output


class _InputsTo(ModelHook):  # type: ignore[misc]  # accelerate has no types
    """Gives a block its inputs on the device where it computes."""

    def __init__(self, device: torch.device, skipped: Any) -> None:
        self._device, self._skipped = device, skipped

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:  # noqa: ARG002  the hook's
        """Move them."""
        return send_to_device(args, self._device), send_to_device(kwargs, self._device, skip_keys=self._skipped)
