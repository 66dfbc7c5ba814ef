"""A model without weights, and where in a checkpoint each of its weights lies.

Everything that names, dtypes and shapes can tell is checked here, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts, DeepseekV3RotaryEmbedding

from k2quant.checkpoint.reader import CONFIG, Checkpoint
from k2quant.checkpoint.reading import check_packed_shapes
from k2quant.checkpoint.weights import Weight as Source
from k2quant.checkpoint.weights import group_tensors
from k2quant.conversion.config import check_source
from k2quant.errors import CheckpointError, MalformedFile, MissingTensor, ShapeMismatch, UnsupportedFormat, UsageError
from k2quant.formats.layouts import INT4_GROUP, Fp8, Int4
from k2quant.ground import names
from k2quant.kernels.products.prepare import Weight, best_layout, empty_fp8, empty_int4
from k2quant.model.architecture import architecture, in_one_line
from k2quant.model.matrices import Dense, Matrix, joined
from k2quant.model.modules import (
    IMPLEMENTATION,
    PROJECTIONS,
    Backend,
    FusedExperts,
    Quantized,
    QuantizedExperts,
    QuantizedLinear,
    SeparateExperts,
    SpeaksCheckpoint,
)


class Placed(NamedTuple):
    """A weight of the checkpoint, and where it goes in a model."""

    source: Source
    matrix: Matrix


class Assembly:
    """A model on torch's meta device, whose modules can be filled from the checkpoint one by one."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, backend: Backend, device: torch.device) -> None:
        """Build the model and find a source for each of its tensors.

        Args:
            checkpoint: in any format, mixed too.
            dtype: of what is not quantised, and of activations.
            backend: who multiplies.
            device: where quantised weights will be used; it decides their layout in memory.

        Raises:
            CheckpointError: the checkpoint is no model of this family, incomplete, or contradicts its config.
        """
        self.checkpoint, self.dtype, self.device, self.backend = checkpoint, dtype, device, backend
        weights, problems = group_tensors(checkpoint.tensors)
        if problems:
            raise problems[0]
        check_source(checkpoint.config, weights)
        self.config = architecture(checkpoint)
        self._sources = _by_name(weights)
        _check_layers(self.config, self._sources.values())
        self.model = _skeleton(self.config)
        self.model.assembly = self
        self._install()
        self._check_complete()
        self.model.model.rotary_emb = DeepseekV3RotaryEmbedding(self.config)  # its size is that of checked tensors
        check_packed_shapes(checkpoint, self._sources.values())

    def placed(self, name: str, module: nn.Module) -> Iterator[Placed]:
        """Yield what the checkpoint holds for a module's own tensors, its children's left out."""
        for full, matrix in _own_matrices(name, module):
            yield Placed(self._source(full), matrix)

    def _source(self, name: str) -> Source:
        source = self._sources.get(name)
        if source is None:
            raise MissingTensor(
                "the model needs it",
                tensor=f"{name}.weight" if not name.endswith(("bias", "weight")) else name,
                file=self.checkpoint.folder,
                remedy="the checkpoint is incomplete, or config.json belongs to another one",
            )
        return source

    def _install(self) -> None:
        """Put modules for quantised weights in the place of transformers' own."""
        for name, module in list(self.model.named_modules()):
            if isinstance(module, DeepseekV3Experts):
                experts = self._experts(name, module)
                self.model.set_submodule(name, experts)
                if isinstance(experts, SeparateExperts):
                    for below, linear in list(experts.named_modules()):
                        if isinstance(linear, nn.Linear):
                            self._install_linear(f"{name}.{below}", linear)
            elif isinstance(module, nn.Linear):
                self._install_linear(name, module)

    def _install_linear(self, name: str, linear: nn.Linear) -> None:
        source = self._source(name)
        layout = source.format
        if isinstance(layout, Fp8 | Int4):
            _check_shape(source, (linear.out_features, linear.in_features))
            weight = self._empty(source, (linear.out_features, linear.in_features))
            self.model.set_submodule(name, QuantizedLinear(weight, layout, self.backend, linear.bias))

    def _experts(self, name: str, module: Any) -> nn.Module:
        """Return what will hold the routed experts of a layer: one stack where all are of one format."""
        inner, hidden = module.intermediate_dim, module.hidden_dim
        shapes = {part: (hidden, inner) if part == "down_proj" else (inner, hidden) for part in PROJECTIONS}
        sources = [
            (part, self._source(f"{name}.{expert}.{part}"))
            for expert in range(module.num_experts)
            for part in PROJECTIONS
        ]
        for part, source in sources:
            _check_shape(source, shapes[part])
        layouts = {source.format for _, source in sources}
        if all(layout is not None and layout.name == "bf16" for layout in layouts):
            with torch.device("meta"):
                return FusedExperts(self.config)  # type: ignore[no-untyped-call]
        layout = layouts.pop()
        if layouts or not isinstance(layout, Fp8 | Int4):
            with torch.device("meta"):
                return SeparateExperts(self.config)
        stacks = {part: self._empty(sources[0][1], (module.num_experts, *shape)) for part, shape in shapes.items()}
        return QuantizedExperts(stacks, layout, self.backend, self.config)

    def _empty(self, source: Source, shape: tuple[int, ...]) -> Weight:
        """Return a quantised weight without memory, in the layout of the device where it will be used."""
        _check_readable(source)
        if isinstance(source.format, Fp8):
            return empty_fp8(shape, block=source.format.block, device="meta")
        return empty_int4(shape, layout=best_layout(self.device, shape[-2]), device="meta")

    def _check_complete(self) -> None:
        """Refuse a checkpoint that lacks a tensor of the model, has one of another shape, or has one too many."""
        used = set()
        for name, module in self.model.named_modules():
            for full, matrix in _own_matrices(name, module):
                source = self._source(full)
                _check_shape(source, matrix.shape)
                if isinstance(matrix, Dense) and isinstance(source.format, Fp8 | Int4):
                    raise UnsupportedFormat(
                        "this weight cannot be quantised", tensor=source.main.name, file=source.main.file
                    )
                used.add(full)
        for name in self._sources.keys() - used:
            if not _left_out(name, self.config):
                source = self._sources[name]
                raise CheckpointError(
                    "the model has no place for it",
                    tensor=source.main.name,
                    file=source.main.file,
                    remedy="does config.json belong to this checkpoint?",
                )


class K2ForCausalLM(DeepseekV3ForCausalLM):
    """transformers' DeepSeek-V3 with the weights of a K2 checkpoint, which it can write back byte for byte."""

    assembly: Assembly
    """Where each weight came from."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that the weights came from."""
        return self.assembly.checkpoint

    def load_state_dict(self, state_dict: Any, *args: Any, **options: Any) -> Any:
        """Take weights over under the checkpoint's names.

        Raises:
            UsageError: a part of the model waits elsewhere, where it cannot be changed.
        """
        self._refuse_waiting_parts("load weights into")
        return super().load_state_dict(state_dict, *args, **options)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: FBT001, FBT002  torch's signature
        self._refuse_waiting_parts("move or cast")
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _refuse_waiting_parts(self, what: str) -> None:
        places = getattr(self, "hf_device_map", None)
        waiting = next((name for name, tensor in self.named_parameters() if places and tensor.is_meta), None)
        if waiting is not None:
            raise UsageError(f"cannot {what} a model whose `{waiting}` waits on disk or in memory; load it whole")

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Answer for the modules of experts, which are not in the file where transformers looks for them."""
        return True

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """Write the checkpoint; see `k2quant.model.save_model`. No other option of transformers has a meaning here."""
        from k2quant.model.saving import save_pretrained

        save_pretrained(self, save_directory, *args, **options)


def _by_name(weights: Iterable[Source]) -> dict[str, Source]:
    """Return the language model's weights by the name that the model gives them, `weight` left out.

    Raises:
        MalformedFile: two tensors would have one name.
    """
    found: dict[str, Source] = {}
    for weight in weights:
        suffix = "" if weight.format else next(iter(weight.parts))
        name = names.in_language_model(joined(weight.base, suffix or "weight"))
        if name is None:
            continue
        name = name if suffix else name.removesuffix(".weight")
        if name in found:
            raise MalformedFile(
                "stands for the same weight as another", tensor=weight.main.name, found=found[name].main.name
            )
        found[name] = weight
    return found


def _check_layers(config: DeepseekV3Config, sources: Iterable[Source]) -> None:
    """Refuse a number of layers that the checkpoint does not have, before any is built."""
    present = {layer for source in sources if (layer := names.layer(source.main.name)) is not None}
    if not set(range(min(config.num_hidden_layers, len(present) + 1))) <= present:
        raise MalformedFile(
            "num_hidden_layers",
            file=CONFIG,
            expected=f"the layers in the shards: {len(present)}",
            found=config.num_hidden_layers,
        )


def _skeleton(config: DeepseekV3Config) -> K2ForCausalLM:
    """Build the model on the meta device, as transformers does."""
    try:
        with torch.device("meta"):
            model = K2ForCausalLM(config)
    except Exception as error:  # whatever transformers stumbles over, the file is to blame
        raise MalformedFile("transformers cannot build its model", file=CONFIG, found=in_one_line(error)) from error
    model.set_experts_implementation(IMPLEMENTATION)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _own_matrices(name: str, module: nn.Module) -> Iterator[tuple[str, Matrix]]:
    """Yield a module's own weights with their names in the model, `weight` left out."""
    if isinstance(module, SpeaksCheckpoint):
        for below, matrix in module.matrices():
            last = matrix.suffix if isinstance(matrix, Dense) and matrix.suffix != "weight" else ""
            yield joined(name, below, last), matrix
        return
    for own, tensor in own_tensors(module):
        yield joined(name, "" if own == "weight" else own), Dense(tensor, own)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a module's own parameters and those buffers that a checkpoint holds, without its children's."""
    yield from ((name, tensor) for name, tensor in module.named_parameters(recurse=False))
    lasting = module.state_dict(keep_vars=True).keys() if not isinstance(module, Quantized) else ()
    yield from ((name, tensor) for name, tensor in module.named_buffers(recurse=False) if name in lasting)


def _check_shape(source: Source, shape: tuple[int, ...]) -> None:
    if source.shape != shape:
        raise ShapeMismatch(
            "the config asks for another shape",
            tensor=source.main.name,
            file=source.main.file,
            expected=shape,
            found=source.shape,
        )


def _check_readable(source: Source) -> None:
    """Refuse what the kernels do not multiply by: other INT4 than Kimi's, and widths that are not whole groups."""
    layout, kimi = source.format, f"groups of {INT4_GROUP} with BF16 scales"
    if isinstance(layout, Int4) and (layout.group, layout.scale_dtype) != (INT4_GROUP, "BF16"):
        found = f"groups of {layout.group} with {layout.scale_dtype} scales"
        raise _unrunnable(source, kimi, found)
    if source.shape[-1] % INT4_GROUP:
        raise _unrunnable(source, f"a multiple of {INT4_GROUP} columns", source.shape)


def _unrunnable(source: Source, expected: str, found: object) -> UnsupportedFormat:
    return UnsupportedFormat(
        "it cannot be run as it is",
        tensor=source.main.name,
        file=source.main.file,
        expected=expected,
        found=found,
        remedy="convert it to bf16",
    )


def _left_out(name: str, config: DeepseekV3Config) -> bool:
    """Tell whether a model does without a tensor: stray rotary buffers, and layers that only predict further tokens."""
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    layer, extra = names.layer(name), config.num_nextn_predict_layers or 0
    return layer is not None and config.num_hidden_layers <= layer < config.num_hidden_layers + extra
