"""A model without weights, and where in a checkpoint each of its weights lies.

Everything that names, dtypes and shapes can tell is checked here, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts, DeepseekV3RotaryEmbedding

from k2quant.checkpoint.header import TensorEntry
from k2quant.checkpoint.reader import CONFIG, Checkpoint
from k2quant.checkpoint.reading import check_constants
from k2quant.checkpoint.weights import StoredWeight, group_tensors
from k2quant.conversion.metadata.carrying import check_decodable, remarks
from k2quant.conversion.metadata.config import check_source
from k2quant.conversion.metadata.promises import inventory, overruled, tied
from k2quant.errors import CheckpointError, MalformedFile, MissingTensor, ShapeMismatch, UnsupportedFormat
from k2quant.formats.activations import flow
from k2quant.formats.format import Format
from k2quant.ground import names
from k2quant.ground.saying.faults import said
from k2quant.kernels.products.packed.weight import PackedWeight
from k2quant.model.architecture import architecture
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

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
"""The modules that are one where a config ties them."""


class Placed(NamedTuple):
    """A weight of the checkpoint, and where it goes in a model."""

    source: StoredWeight
    matrix: Matrix

    @property
    def entries(self) -> dict[str, TensorEntry]:
        """The weight's tensors that a model has, by suffix; scales of a layer's inputs are none of these."""
        beside = self.source.format.adopted if self.source.format is not None else ()
        return {suffix: entry for suffix, entry in self.source.parts.items() if suffix not in beside}


class Assembled(nn.Module):
    """A model that knows where its weights came from."""

    assembly: Assembly
    """Where each weight came from."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that the weights came from."""
        return self.assembly.checkpoint


class Assembly:
    """A model on torch's meta device, whose modules can be filled from the checkpoint one by one."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        skeleton: type[Any],
        dtype: torch.dtype,
        backend: Backend,
        device: torch.device,
    ) -> None:
        """Build the model and find a source for each of its tensors.

        Args:
            checkpoint: in any format, mixed too.
            skeleton: transformers' class of the model, one that is `Assembled`.
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
        check_decodable(checkpoint.config, weights)
        self.config = architecture(checkpoint)
        found = inventory(weights)
        self.remarks = (*overruled(checkpoint.config or {}, found), *remarks(checkpoint.config, weights))
        """What the checkpoint says of the model that is not so, or that it does without, a sentence each."""
        self._predictors = found.predictors
        self._sources = _by_name(weights)
        self.tied = tied(checkpoint.config or {}) and HEAD not in self._sources
        """Whether the head is the embedding, which the checkpoint then has only once."""
        if self.tied and EMBEDDING in self._sources:
            self._sources[HEAD] = self._sources[EMBEDDING]
        _check_layers(self.config, self._sources.values())
        self.model = _skeleton(skeleton, self.config)
        self.model.assembly = self
        self._install()
        self._check_complete()
        self.model.model.rotary_emb = DeepseekV3RotaryEmbedding(self.config)  # its size is that of checked tensors
        check_constants(checkpoint, self._sources.values())

    def make_dense(self) -> None:
        """Put transformers' own modules, without weights, in the place of those that would hold packed ones.

        Filled, they hold the BF16 values that the checkpoint's weights mean, in the assembly's dtype.
        """
        replaced: dict[str, nn.Module] = {}
        for name, module in list(self.model.named_modules()):
            if isinstance(module, QuantizedExperts | SeparateExperts):
                with torch.device("meta"):
                    replaced[name] = FusedExperts(self.config)  # type: ignore[no-untyped-call]
            elif isinstance(module, QuantizedLinear) and not any(name.startswith(f"{above}.") for above in replaced):
                rows, columns = module.packed("weight").shape
                linear = nn.Linear(columns, rows, bias=False, device="meta")
                linear.register_parameter("bias", module.bias)
                replaced[name] = linear
        for name, module in replaced.items():
            self.model.set_submodule(name, module)

    def placed(self, name: str, module: nn.Module) -> Iterator[Placed]:
        """Yield what the checkpoint holds for a module's own tensors, its children's left out."""
        for full, matrix in _own_matrices(name, module):
            yield Placed(self._source(full), matrix)

    def _source(self, name: str) -> StoredWeight:
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
        if source.format is not None and source.format.quantised:
            _check_shape(source, (linear.out_features, linear.in_features))
            weight = _empty(source, source.format, (linear.out_features, linear.in_features), self.device)
            self.model.set_submodule(name, QuantizedLinear(weight, source.format, self.backend, linear.bias))

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
        formats = {source.format for _, source in sources}
        if not any(each is None or each.quantised for each in formats):
            with torch.device("meta"):
                fused = FusedExperts(self.config)  # type: ignore[no-untyped-call]
            fused.backend = self.backend
            return fused
        stored = formats.pop()
        if formats or stored is None or not stored.quantised:
            with torch.device("meta"):
                return SeparateExperts(self.config)
        stacks = {
            part: _empty(sources[0][1], stored, (module.num_experts, *shape), self.device)
            for part, shape in shapes.items()
        }
        return QuantizedExperts(stacks, stored, self.backend, self.config)

    def _check_complete(self) -> None:
        """Refuse a checkpoint that lacks a tensor of the model, has one of another shape, or has one too many."""
        used = set()
        for name, module in self.model.named_modules():
            for full, matrix in _own_matrices(name, module):
                source = self._source(full)
                _check_shape(source, matrix.shape)
                if isinstance(matrix, Dense) and source.format is not None and source.format.quantised:
                    raise UnsupportedFormat(
                        "this weight cannot be quantised", tensor=source.main.name, file=source.main.file
                    )
                used.add(full)
        for name in self._sources.keys() - used:
            if not _left_out(name, self.config, self._predictors):
                source = self._sources[name]
                raise CheckpointError(
                    "the model has no place for it",
                    tensor=source.main.name,
                    file=source.main.file,
                    remedy="does config.json belong to this checkpoint?",
                )


def _by_name(weights: Iterable[StoredWeight]) -> dict[str, StoredWeight]:
    """Return the language model's weights by the name that the model gives them, `weight` left out.

    Raises:
        MalformedFile: two tensors would have one name.
    """
    found: dict[str, StoredWeight] = {}
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


def _check_layers(config: DeepseekV3Config, sources: Iterable[StoredWeight]) -> None:
    """Refuse a number of layers that the checkpoint does not have, before any is built."""
    present = {layer for source in sources if (layer := names.layer(source.main.name)) is not None}
    if not set(range(min(config.num_hidden_layers, len(present) + 1))) <= present:
        raise MalformedFile(
            "num_hidden_layers",
            file=CONFIG,
            expected=f"the layers in the shards: {len(present)}",
            found=config.num_hidden_layers,
        )


def _skeleton(kind: type[Any], config: DeepseekV3Config) -> Any:
    """Build the model on the meta device, as transformers does."""
    try:
        with torch.device("meta"):
            model = kind(config)
    except Exception as error:  # whatever transformers stumbles over, the file is to blame
        raise MalformedFile("transformers cannot build its model", file=CONFIG, found=said(error)) from error
    model.set_experts_implementation(IMPLEMENTATION)
    model.eval()
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


def _check_shape(source: StoredWeight, shape: tuple[int, ...]) -> None:
    if source.shape != shape:
        raise ShapeMismatch(
            "the config asks for another shape",
            tensor=source.main.name,
            file=source.main.file,
            expected=shape,
            found=source.shape,
        )


def _empty(source: StoredWeight, stored: Format, shape: tuple[int, ...], device: torch.device) -> PackedWeight:
    """Return a quantised weight without memory, in the layout of the device where it will be used.

    Raises:
        UnsupportedFormat: the kernels do not multiply by it.
    """
    reason = stored.unrunnable(source.shape)
    if reason is not None:
        expected, found = reason
        raise UnsupportedFormat(
            "it cannot be run as it is",
            tensor=source.main.name,
            file=source.main.file,
            expected=expected,
            found=found,
            remedy="convert it to bf16",
        )
    return stored.packed(shape, on=device)


def _left_out(name: str, config: DeepseekV3Config, predictors: Collection[int]) -> bool:
    """Tell whether a model does without a tensor.

    So it does without stray rotary buffers, scales of activations, and layers that only predict further tokens. Such
    layers lie behind the decoder's, whether the config promises them or not.
    """
    if name.endswith(".rotary_emb.inv_freq") or flow(names.split(name)[1]) is not None:
        return True
    layer, extra = names.layer(name), config.num_nextn_predict_layers or 0
    end = config.num_hidden_layers
    return layer is not None and layer >= end and (layer < end + extra or layer in predictors)
