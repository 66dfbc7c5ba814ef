"""transformers' own model, a layer of which has weights at a time: so there is no second forward pass to keep right."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Self

import torch
from torch import Tensor, nn

from k2quant.model.assembly import Assembly
from k2quant.model.filling import fill, release


class Layers:
    """The parts of an assembled model, and what each makes of hidden states."""

    def __init__(self, assembly: Assembly) -> None:
        """Take the model apart; its parts have no weights until they are `loaded`."""
        self.assembly = assembly
        self._core = assembly.model.model
        self.embedding: nn.Module = self._core.embed_tokens
        self.all: nn.ModuleList = self._core.layers
        self.norm: nn.Module = self._core.norm
        self.head: nn.Module = assembly.model.lm_head
        self._core.layers, self._core.norm = nn.ModuleList(), nn.Identity()
        self._core.rotary_emb.to(assembly.device)

    def loaded(self, name: str, module: nn.Module, *, without: Collection[str] = ()) -> Loaded:
        """Return what holds a part's weights in memory as long as a block runs.

        Args:
            name: of the part within the model, such as `model.layers.3`.
            module: the part.
            without: names within the model of modules in it that stay without weights, all below them too.
        """
        return Loaded(self.assembly, name, module, without)

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Hold the last norm and the head in memory as long as a block runs."""
        with self.loaded("model.norm", self.norm), self.loaded("lm_head", self.head):
            yield

    def embed(self, ids: Tensor) -> Tensor:
        """Return the hidden states `[B, T, H]` of tokens int64 `[B, T]`; the embedding is loaded."""
        result: Tensor = self.embedding(ids.to(self.assembly.device))
        return result

    def through(
        self, layer: nn.Module, hidden: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Return what one layer makes of hidden states: the model's own forward pass with this layer alone.

        Args:
            layer: one that is loaded.
            hidden: `[B, T, H]`, on the device.
            mask: `[B, T]`, 0 for padding; None for none.
            positions: int64 `[B, T]`; without a mask, texts whose positions begin anew within a row do not see one
                another. None: each row is one text.
        """
        device = self.assembly.device
        self._core.layers = nn.ModuleList([layer])
        try:
            mask = None if mask is None else mask.to(device)
            positions = None if positions is None else positions.to(device, torch.int64)
            output = self._core(inputs_embeds=hidden, attention_mask=mask, position_ids=positions, use_cache=False)
        finally:
            self._core.layers = nn.ModuleList()
        result: Tensor = output.last_hidden_state
        return result


class Loaded:
    """A part with its weights in memory, as long as the block runs."""

    def __init__(self, assembly: Assembly, name: str, module: nn.Module, without: Collection[str]) -> None:
        self._assembly = assembly
        parts = dict(module.named_modules(prefix=name))
        below = tuple(f"{each}." for each in without)
        self.parts = {own: part for own, part in parts.items() if own not in without and not own.startswith(below)}
        """The modules that get weights, by name within the model."""

    def __enter__(self) -> Self:
        """Read the weights."""
        fill(self._assembly, [(name, module, self._assembly.device) for name, module in self.parts.items()])
        return self

    def __exit__(self, *_: object) -> None:
        """Let them go."""
        for module in self.parts.values():
            release(module, self._assembly.dtype)
