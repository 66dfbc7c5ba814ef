"""`stream_forward`: a forward pass with one decoder layer in memory at a time, for models larger than the machine.

The layers are run by transformers' own model, which is given one layer after another; what it gives is therefore, bit
for bit, what the loaded model gives.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.errors import UsageError
from k2quant.model.assembly import EMBEDDING, Assembly
from k2quant.model.loading import assemble
from k2quant.model.modules import Backend
from k2quant.model.passes.activations import Activations, held
from k2quant.model.passes.layers import Layers
from k2quant.model.placement import execution_device

Batch = Tensor | Mapping[str, Tensor]
"""`input_ids` int64 `[B, T]`, or a map with these and an `attention_mask` or `position_ids` `[B, T]`, or both.

Without a mask, texts whose positions begin anew within a row do not see one another.
"""

_KEYS = {"input_ids", "attention_mask", "position_ids"}

_EMBEDDING, _FIRST = 0, 1  # stages: the embedding, then layer 0, layer 1, ...
_BUDGET = 4_000_000_000


class LayerHooks:
    """What may happen at each layer; a subclass overrides what it needs.

    A layer that an interrupted pass had finished is not run again, and no hook is called for it.
    """

    identity: str = ""
    """What a pass that goes on must agree on, where hooks change layers: their name and settings."""

    def before(self, layer: int, module: nn.Module) -> None:
        """Look at a layer, or change it, when its weights have been read. Forward hooks may be set on its parts."""

    def batch(self, layer: int, number: int, inputs: Tensor, outputs: Tensor) -> None:
        """Look at what went into a layer and came out of it, `[B, T, H]`, for the batch of this number."""

    def after(self, layer: int, module: nn.Module) -> bool:  # noqa: ARG002  for those who override it
        """Look at a layer, or change it, when all batches went through; True runs them through it once more."""
        return False

    def ending(self, norm: nn.Module, head: nn.Module) -> None:
        """Look at the last norm and the head when their weights have been read, which stay until all logits are taken.

        A hook may have them make logits of any hidden states, `head(norm(hidden))`.
        """


def stream_forward(
    path: str | os.PathLike[str] | Checkpoint,
    batches: Iterable[Batch],
    hooks: LayerHooks | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.bfloat16,
    backend: Backend = "auto",
    budget: int = _BUDGET,
    folder: str | os.PathLike[str] | None = None,
    soft_lock: bool = False,
    follow_links: bool = False,
) -> Iterator[Tensor]:
    """Run batches through a checkpoint, one decoder layer in memory at a time, and yield their logits.

    Args:
        path: folder of the checkpoint, in any format; or the checkpoint, opened.
        batches: what to run; all are held, as they are small.
        hooks: called at each layer.
        device: where layers compute.
        dtype: of activations and of what is not quantised.
        backend: `auto` for the fused kernels, `reference` or `decoded` as in `load_model`.
        budget: bytes of activations to keep in memory; the rest goes to files.
        folder: for these files. A killed pass resumes from it after the last whole layer, when it is called again in
            the same way. Without it they are temporary, and nothing can be resumed.
        soft_lock: where its file system has no locks, lock the folder by a file, as `convert` does.
        follow_links: whether links of the checkpoint's folder may lead out of it.

    Returns:
        an iterator that does the work as it is asked for logits `[B, T, vocabulary]` of each batch in turn. They equal
        those of `load_model` and lie on `device`. When the last is taken, the pass's files are removed.

    Raises:
        CheckpointError: see `load_model`.
        UsageError: an option or a batch makes no sense.
        DestinationForeign: the folder holds something else.
        DestinationStale: it belongs to another pass.
        DestinationInUse: another process works in it.
        OutputError: the disk is full or fails.
    """
    if type(budget) is not int or budget < 0:
        raise UsageError(f"budget: expected bytes, found {budget!r}")
    hooks = hooks or LayerHooks()
    inputs = _checked(batches)
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(Path(path), follow_links=follow_links)
    assembly = assemble(checkpoint, device=execution_device(device), dtype=dtype, backend=backend)
    _check_tokens(inputs, assembly.config.vocab_size)
    place = None if folder is None else Path(folder)
    return _streamed(_Pass(assembly, inputs, hooks), place, budget, soft_lock=soft_lock)


def _streamed(run: _Pass, folder: Path | None, budget: int, *, soft_lock: bool) -> Iterator[Tensor]:
    """Run a pass with its activations in a folder, or in a temporary one."""
    if folder is not None:
        with held(folder, soft_lock=soft_lock):
            yield from run.logits(run.activations(folder, budget, lasting=True))
        return
    with tempfile.TemporaryDirectory(prefix="k2quant-") as place:
        yield from run.logits(run.activations(Path(place), budget, lasting=False))


class _Pass:
    """One pass of all batches through all layers."""

    def __init__(self, assembly: Assembly, inputs: list[dict[str, Tensor]], hooks: LayerHooks) -> None:
        self._assembly, self._inputs, self._hooks = assembly, inputs, hooks
        self._layers = Layers(assembly)

    def activations(self, folder: Path, budget: int, *, lasting: bool) -> Activations:
        """Return where this pass keeps what lies between its layers."""
        width = self._assembly.config.hidden_size
        shapes = [(*batch["input_ids"].shape, width) for batch in self._inputs]
        identity = _identity(self._assembly, self._inputs, self._hooks)
        return Activations(folder, shapes, self._assembly.dtype, budget=budget, identity=identity, lasting=lasting)

    @torch.no_grad()
    def logits(self, kept: Activations) -> Iterator[Tensor]:
        """Run what is not done yet and yield the logits."""
        layers = self._layers
        if kept.finished < _EMBEDDING:
            self._embed(kept)
        for number in range(kept.finished, len(layers.all)):
            self._layer(number, layers.all[number], kept)
        with layers.ending():
            self._hooks.ending(layers.norm, layers.head)
            for number in range(len(self._inputs)):
                yield layers.head(layers.norm(self._get(kept, kept.finished, number)))
        kept.clear()

    def _get(self, kept: Activations, stage: int, number: int) -> Tensor:
        return kept.get(stage, number).to(self._assembly.device)

    def _embed(self, kept: Activations) -> None:
        with self._layers.loaded(EMBEDDING, self._layers.embedding):
            for number, batch in enumerate(self._inputs):
                kept.put(_EMBEDDING, number, self._layers.embed(batch["input_ids"]))
        kept.finish(_EMBEDDING)

    def _layer(self, number: int, layer: nn.Module, kept: Activations) -> None:
        with self._layers.loaded(f"model.layers.{number}", layer):
            self._hooks.before(number, layer)
            self._run_batches(number, layer, kept)
            while self._hooks.after(number, layer):
                self._run_batches(number, layer, kept)
        kept.finish(number + _FIRST)

    def _run_batches(self, number: int, layer: nn.Module, kept: Activations) -> None:
        for batch, given in enumerate(self._inputs):
            inputs = self._get(kept, number + _FIRST - 1, batch)
            outputs = self._layers.through(layer, inputs, given.get("attention_mask"), given.get("position_ids"))
            self._hooks.batch(number, batch, inputs, outputs)
            kept.put(number + _FIRST, batch, outputs)


def _checked(batches: Iterable[Batch]) -> list[dict[str, Tensor]]:
    """Return each batch as a map.

    Raises:
        UsageError: there is none, or one that makes no sense.
    """
    if isinstance(batches, Tensor | Mapping) or not isinstance(batches, Iterable):
        raise UsageError(f"batches: expected several, such as a list, found {type(batches).__name__}")
    found = [_as_map(batch) for batch in batches]
    if not found:
        raise UsageError("batches: expected at least one, found none")
    return found


def _as_map(batch: object) -> dict[str, Tensor]:
    given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    if not isinstance(given, Mapping) or not {"input_ids"} <= given.keys() <= _KEYS:
        raise UsageError("batch: expected input_ids, or a map with these and an attention_mask or position_ids")
    for name, value in given.items():
        whole = isinstance(value, Tensor) and value.dtype in {torch.int64, torch.int32, torch.bool}
        if not whole or value.ndim != 2 or not value.numel() or value.shape != given["input_ids"].shape:
            kind = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"{name}: expected int64 [B, T], found {kind}")
    return dict(given)


def _check_tokens(inputs: list[dict[str, Tensor]], vocabulary: int) -> None:
    for number, batch in enumerate(inputs):
        low, high = int(batch["input_ids"].min()), int(batch["input_ids"].max())
        if low < 0 or high >= vocabulary:
            raise UsageError(f"batch {number}: expected tokens from 0 to {vocabulary - 1}, found {low} to {high}")


def _identity(assembly: Assembly, inputs: list[dict[str, Tensor]], hooks: LayerHooks) -> dict[str, Any]:
    """Return what makes a pass this pass: checkpoint, options, batches, and what hooks say of themselves."""
    digest = hashlib.sha256()
    for batch in inputs:
        for key in sorted(batch):
            digest.update(f"{key} {list(batch[key].shape)} ".encode())
            digest.update(batch[key].to("cpu", torch.int64).contiguous().numpy().tobytes())
    return {
        "source": assembly.checkpoint.fingerprint(),
        "dtype": str(assembly.dtype),
        "backend": assembly.backend,
        "device": assembly.device.type,
        "batches": digest.hexdigest(),
        "hooks": hooks.identity,
    }
