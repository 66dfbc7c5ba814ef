"""`prepare`: a model whose forward pass sees its weights as they will be shipped.

Before a module runs, an attribute of the same name shadows its parameter: the rounded values, with a straight-through
gradient to the parameter. After it has run the attribute is gone. No parameter is replaced or renamed, no class is
changed, and every implementation of experts, of linears and of gradient checkpointing sees the same values, for it
reads the same attribute.

Rounded values are kept from one micro-batch to the next and made anew when the parameter may have changed: after any
optimizer's step, and when its version counter, its memory or a sample of its values differ. Neither is enough alone:
fused optimizers do not count versions, and a copy into `.data` is no step.
"""

from __future__ import annotations

import contextlib
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from k2quant.errors import BadValue, UsageError
from k2quant.formats.format import Format
from k2quant.kernels import ops
from k2quant.kernels.codecs import reference
from k2quant.kernels.codecs.grids import largest_code
from k2quant.kernels.codecs.values import ValueAt
from k2quant.qat.config import QATConfig
from k2quant.qat.rounding import adapters, scales
from k2quant.qat.rounding.adapters import LowRank, low_rank
from k2quant.qat.rounding.autocast import keep_out_of_autocast
from k2quant.qat.rounding.estimators import (
    clipped,
    counted_from,
    largest_of,
    learned,
    learned_into,
    round_into,
    straight,
)
from k2quant.qat.rounding.rules import ROUNDED, Rule, as_bf16, check_packed, plain_rule
from k2quant.qat.rounding.scales import LearnedScale, learned_scale
from k2quant.qat.rounding.shadows import Shadowed, by_module
from k2quant.qat.rounding.shards import whole
from k2quant.qat.rounding.sharing import sharing
from k2quant.qat.rounding.survey import is_router, rounded_only
from k2quant.qat.rounding.targets import Part, Target, canonical, find_targets

ATTRIBUTE = "k2quant_qat"
"""Where a prepared model keeps its `Prepared`."""

_SAMPLE = 64  # values of a parameter that are compared to notice a change that nothing else tells of

_steps = [0]  # of all optimizers of this process


def _count_step(*_: Any) -> None:
    _steps[0] += 1


register_optimizer_step_post_hook(_count_step)


@dataclass(slots=True)
class _Kept:
    """Rounded values and what they were made of."""

    mark: tuple[Any, ...]
    sample: Tensor
    values: Tensor


class Prepared:
    """What fake-quantises a model."""

    def __init__(self, model: nn.Module, config: QATConfig) -> None:
        """Find the targets, add what trains beside the weights, and hook into their modules. See `prepare`."""
        self.config = config
        self.model = model
        """The model itself, whatever wraps it."""
        self.targets: tuple[Target, ...] = tuple(find_targets(model, config))
        """What is fake-quantised, in the model's order."""
        self._quantised = frozenset(self.targets)
        self._shared = sharing(self.targets, config.format)
        self._bits = config.bits
        self.enabled = True
        """Whether weights are fake-quantised now, not only rounded to BF16."""
        self._kept: dict[str, _Kept] = {}
        self._set_trained(model)
        for target in self.targets:
            self._add_trained(target)
        self.plain: tuple[Target, ...] = tuple(rounded_only(model, self.targets))
        """What is only rounded to BF16, since the export keeps no more of it."""
        # Weakly: where sharding puts its own parameters in their place, nothing here may keep the whole ones alive.
        self._objects = {target.name: weakref.ref(target.master) for target in self.targets + self.plain}
        self._routers = keep_out_of_autocast(model)
        self._shadowed = [Shadowed(self.shadow, group) for group in by_module(self.targets + self.plain)]

    @property
    def bits(self) -> int:
        """Width of the codes now."""
        return self._bits

    def set_bits(self, bits: int) -> None:
        """Set the width of the codes; learned scales begin anew from the weights as they are.

        Raises:
            UsageError: there is no such width.
        """
        if not self.config.bit_widths:
            raise UsageError("bits: only INT4 has a width that changes")
        largest_code(self.config.grid, bits)
        self._bits = bits
        for target in self.targets:
            if (scale := learned_scale(target)) is not None:
                scale.restart(target.master, bits)
        self.refresh()

    def refresh(self) -> None:
        """Forget rounded values. Needed after writing into a parameter's `.data`, and nowhere else.

        Such a write leaves no trace. On a CPU one of a whole tensor is noticed all the same, by a sample of its values.
        """
        self._kept.clear()

    @contextlib.contextmanager
    def unquantised(self) -> Iterator[None]:
        """Let the model run with its weights rounded to BF16 alone while the block runs."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def remove(self) -> None:
        """Undo `prepare`: the model runs on its master weights; learned scales and adapters are gone."""
        for shadowed in self._shadowed:
            shadowed.remove()
        for target in self.targets:
            for child in (scales.CHILD, adapters.CHILD):
                target.module._modules.pop(child, None)  # noqa: SLF001  added by `prepare`
        for router in self._routers:
            router.remove()
        self._kept.clear()
        self.model.__dict__.pop(ATTRIBUTE, None)

    def __getstate__(self) -> dict[str, Any]:
        """Leave rounded values out of copies: they are made anew. A copy has its own parameters to know."""
        known = {name: parameter for name, known in self._objects.items() if (parameter := known()) is not None}
        return {**self.__dict__, "_kept": {}, "_objects": known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Know the parameters of the copy."""
        self.__dict__.update(state)
        self._objects = {name: weakref.ref(parameter) for name, parameter in state["_objects"].items()}

    def quantises(self, target: Target) -> bool:
        """Tell whether a target is fake-quantised, not only rounded to BF16."""
        return target in self._quantised

    def rule(self, target: Target) -> Rule:
        """Return the rule of a target whose scales come from its weights."""
        return plain_rule(self.config, self._bits) if target in self._quantised and self.enabled else ROUNDED

    def fill(self, target: Target, out: Tensor) -> None:
        """Write what the forward pass sees of a target into a tensor of its shape, of any float dtype."""
        master, scale, update = target.master.detach(), learned_scale(target), low_rank(target)
        if update is not None:
            master = update.merged(master)
        with _naming(target):
            if scale is not None and self.enabled:
                learned_into(out, master, as_bf16(scale.scale().detach()), self._bits)
            else:
                # Blocks of FP8 may not span the two matrices of a stack that lie one below the other.
                height, rule = target.height, self.rule(target)
                largest = self._largest(target, master) if rule.surveyed else None
                round_into(_matrices(out, height), _matrices(master, height), rule, largest)

    def _largest(self, target: Target, master: Tensor) -> Tensor:
        """Return the largest magnitude of all that shares a scale of whole matrices, by such parts of a target.

        Args:
            target: one that is fake-quantised.
            master: its weights, updated where they are.

        Returns:
            float32 `[P]`, parts of equal height: of a stack the experts, each with all its matrices.
        """
        shared = self._shared[target.name]
        found = largest_of(master, shared.parts)
        for partner in shared.partners:
            weights, update = whole(partner.master), low_rank(partner)
            with _naming(partner):
                other = largest_of(weights if update is None else update.merged(weights), 1)
            found = torch.maximum(found, other.to(found.device))
        return found

    def _together(self, target: Target) -> tuple[Target, ...]:
        """Return a target, and what shares a scale with it."""
        shared = self._shared.get(target.name)
        return (target,) if shared is None else (target, *shared.partners)

    def stored(self, target: Target, part: Part, rows: slice, settled: Format | None = None) -> dict[str, Tensor]:
        """Return what a checkpoint holds of some rows of a matrix, by suffix, `weight_shape` left out.

        Args:
            target: one that is fake-quantised.
            part: the matrix.
            rows: the first is a multiple of the rows that share a scale.
            settled: of a format that is `surveyed`, with what was decided of the whole matrix.
        """
        weights = as_bf16(self.master(target, part, rows))
        scale = learned_scale(target)
        with _naming(target, part), counted_from(rows.start):
            if scale is None:
                rule = self.rule(target)
                rule = replace(rule, format=settled) if settled is not None else rule
                return rule.stored(weights.contiguous())
            check_packed(self._bits)
            factors = as_bf16(part.of(scale.scale().detach())[rows])
            codes, _ = reference.int4_at_scale(weights, factors, self._bits)
            return dict(zip(self.config.format.streamed, (reference.pack_int4(codes), factors), strict=True))

    def codes(self, target: Target, rows: slice) -> Tensor:
        """Return the codes of some rows of an INT4 target, int8 `[.., K]`; its stack counts as one matrix."""
        weights = as_bf16(self._rows(target, rows))
        if self.config.grid == "compressed-tensors":
            return reference.unpack_int4(ops.bf16_to_int4(weights, self.config.grid, recover=False)[0])
        if (scale := learned_scale(target)) is not None:
            factors = as_bf16(scale.scale().detach()).reshape(-1, weights.shape[-1] // reference.GROUP)[rows]
        else:
            factors = reference.plain_int4_scale(weights, self.config.grid, self._bits)
        return reference.int4_at_scale(weights, factors, self._bits)[0].to(torch.int8)

    def _rows(self, target: Target, rows: slice) -> Tensor:
        master, update = target.master.detach(), low_rank(target)
        height, width = master.shape[-2:]
        found = master.reshape(-1, width)[rows]
        if update is None:
            return found
        experts = torch.arange(master.shape[:-1].numel(), device=master.device)[rows] // height
        low = update.a.detach().reshape(-1, *update.a.shape[-2:])[experts].double()
        high = update.b.detach().reshape(-1, update.b.shape[-1])[rows].double()
        return adapters.updated(found, torch.einsum("nr,nrk->nk", high, low), update.scaling)

    def master(self, target: Target, part: Part, rows: slice) -> Tensor:
        """Return some rows of a matrix as they are trained, with their update; not rounded where there is none."""
        master, update = part.of(target.master.detach())[rows], low_rank(target)
        if update is None:
            return master
        a = update.a.detach() if part.expert is None else update.a.detach()[part.expert]
        return adapters.merged(master, a, part.of(update.b.detach())[rows], update.scaling)

    def _set_trained(self, model: nn.Module) -> None:
        """Say which parameters have a gradient."""
        quantised = {id(target.master) for target in self.targets}
        routers = {
            id(parameter) for module in model.modules() if is_router(module) for parameter in module.parameters()
        }
        for parameter in model.parameters():
            if self.config.train == "all":
                trained = self.config.train_router or id(parameter) not in routers
            else:
                trained = self.config.train == "experts" and id(parameter) in quantised
            parameter.requires_grad_(trained and parameter.is_floating_point())

    def _add_trained(self, target: Target) -> None:
        """Add learned scales or an adapter beside a target's module."""
        if self.config.estimator == "learned":
            _child(target.module, scales.CHILD)[target.parameter] = LearnedScale(target.master, self._bits)
        elif (adapter := self.config.low_rank) is not None:
            seed = zlib.crc32(canonical(target.name).encode())
            _child(target.module, adapters.CHILD)[target.parameter] = LowRank(target.master, adapter, seed)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # rounding is no part of a compiled graph
    def shadow(self, target: Target) -> Tensor | None:
        """Return what stands in for a parameter, or None where it stands for itself."""
        master = target.master
        quantised = target in self._quantised
        if not quantised and (master.dtype == torch.bfloat16 or not master.is_floating_point()):
            return None
        values = self._values(target, _seen_dtype(master, quantised=quantised))
        return self._linked(target, values)

    def _linked(self, target: Target, values: Tensor) -> Tensor:
        """Give rounded values their gradient."""
        master, update, scale = target.master, low_rank(target), learned_scale(target)
        if update is not None:
            return adapters.adapted(update, values)
        if scale is not None and self.enabled:
            return learned(master, scale.scale(), values, self._bits)
        if self.config.estimator == "clipped" and self.enabled and target in self._quantised:
            rule = self.rule(target)
            return clipped(master, values, rule, self._largest(target, master.detach()) if rule.surveyed else None)
        return straight(master, values)

    def _values(self, target: Target, dtype: torch.dtype) -> Tensor:
        """Return rounded values, made anew where they may have changed."""
        if (current := self._current(target, dtype)) is not None:
            return current
        mark, kept = self._mark(target, dtype), self._kept.get(target.name)
        # Memory is used again only where the weights have moved: what still waits for its backward pass is void then.
        # After a pass of another kind, such as a teacher's without quantisation, a student's values may be in use.
        again = kept is not None and kept.mark[:2] == mark[:2] and _fits(kept.values, target.master, dtype)
        out = kept.values if again and kept is not None else None
        with torch.inference_mode(mode=False), torch.no_grad():  # a tensor of inference mode could not be trained with
            if out is None:
                self._kept.pop(target.name, None)
                out = torch.empty_like(target.master, dtype=dtype, memory_format=torch.contiguous_format)
            self.fill(target, out)
        if self._lasts(target):
            self._kept[target.name] = _Kept(mark, _sample(self._sources(target)), out)
        return out

    def kept(self, target: Target) -> Tensor | None:
        """Return the rounded values that a forward pass now would use without making them anew, if there are any."""
        kept = self._kept.get(target.name)
        return None if kept is None else self._current(target, kept.values.dtype)

    def _current(self, target: Target, dtype: torch.dtype) -> Tensor | None:
        kept = self._kept.get(target.name)
        if kept is None or not self._lasts(target) or kept.mark != self._mark(target, dtype):
            return None
        return kept.values if torch.equal(kept.sample, _sample(self._sources(target))) else None

    def _mark(self, target: Target, dtype: torch.dtype) -> tuple[Any, ...]:
        moved = ((x.data_ptr(), x._version) for x in self._sources(target))  # noqa: SLF001  torch has no other way
        return (self.enabled, self._bits, dtype, _steps[0], *moved)

    def _sources(self, target: Target) -> list[Tensor]:
        return [x for each in self._together(target) for x in (each.master, *self.beside(each))]

    def beside(self, target: Target) -> list[Tensor]:
        """Return what is trained beside a target's weights."""
        update, scale = low_rank(target), learned_scale(target)
        return [*([update.a, update.b] if update else []), *([scale.ratio] if scale else [])]

    def _lasts(self, target: Target) -> bool:
        """Tell whether a parameter is the model's own, and no copy that was gathered for this pass from its shards.

        A gathered copy keeps version and memory of the last one whatever its values, and what is made of it is as large
        as what sharding saves.
        """
        return all(self._objects[each.name]() is each.master for each in self._together(target))


def prepare(model: nn.Module, config: QATConfig | None = None) -> nn.Module:
    """Have a model's forward pass see its weights as an export will hold them, and its gradients pass straight through.

    What is in scope is fake-quantised; every other float32 weight is seen rounded to BF16. Parameters keep their names
    and objects; `requires_grad` is set to what the config trains. Learned scales and adapters are added as child
    modules `learned_scale` and `adapter` beside the weights they belong to; nothing else is added.

    Args:
        model: a causal LM of the K2 family (transformers' DeepSeek-V3, or from `k2quant.qat.load`), float32 or BF16.
        config: what and how; None for INT4 on the routed experts.

    Returns:
        the same model. `prepared(model)` gives what steers it.

    Raises:
        UsageError: no routed expert would be fake-quantised, the weights are packed, or the model is prepared already.
        UnsupportedFormat: experts lie otherwise than transformers' DeepSeek-V3 has them.
        ShapeMismatch: a group does not divide a width.
    """
    if any(
        ATTRIBUTE in module.__dict__ or isinstance(module.__dict__.get("forward"), Shadowed)
        for module in model.modules()
    ):
        raise UsageError("the model is prepared already; `prepared(model).remove()` undoes that")
    setattr(model, ATTRIBUTE, Prepared(model, config or QATConfig()))
    return model


def prepared(model: nn.Module) -> Prepared:
    """Return what fake-quantises a model, wrapped by DDP, torch.compile and the like or not.

    Raises:
        UsageError: nothing does.
    """
    inner: Any = model
    while inner is not None:
        found = inner.__dict__.get(ATTRIBUTE)
        if isinstance(found, Prepared):
            return found
        wrapped = getattr(inner, "_modules", {})
        inner = wrapped.get("module", wrapped.get("_orig_mod"))  # of DDP, and of torch.compile
    raise UsageError("the model is not prepared; call k2quant.qat.prepare first")


@contextlib.contextmanager
def _naming(target: Target, part: Part | None = None) -> Iterator[None]:
    """Say in which weight a bad value is; without a part, rows are those of the target's stack as one matrix."""
    try:
        yield
    except ValueAt as error:
        row, height = error.row, target.height
        if part is None:
            part, row = (target.parts[0], row) if height is None else (target.parts[row // height], row % height)
        at = ValueAt(row=row, column=error.column, what=error.what, of=error.of)
        remedy = "has the training diverged, or is the base damaged?"
        raise BadValue(str(at), tensor=part.base, remedy=remedy) from error


def _matrices(stack: Tensor, height: int | None) -> Tensor:
    """See a stack `[E, N, K]` as one of matrices of a height, or a tensor that is no stack as it is."""
    return stack if height is None else stack.reshape(-1, height, stack.shape[-1])


def _child(module: nn.Module, name: str) -> nn.ModuleDict:
    if name not in module._modules:  # noqa: SLF001
        module.add_module(name, nn.ModuleDict())
    child = module._modules[name]  # noqa: SLF001
    assert isinstance(child, nn.ModuleDict)  # noqa: S101  made above
    return child


def _seen_dtype(master: Tensor, *, quantised: bool) -> torch.dtype:
    """Return the dtype of what the forward pass sees: BF16 under autocast, which would cast a matrix to it anyway.

    Raises:
        UsageError: autocast to float16, which cannot hold every value of the grid.
    """
    kind = master.device.type
    if not (quantised and torch.is_autocast_enabled(kind)):
        return master.dtype
    if torch.get_autocast_dtype(kind) == torch.float16:
        raise UsageError("autocast to float16 cannot hold the values that are served; use bfloat16")
    return torch.get_autocast_dtype(kind)


def _sample(sources: list[Tensor]) -> Tensor:
    """Return some values of each tensor; nothing on a GPU, where looking would make the processor wait."""
    found = [x.detach().reshape(-1)[:: max(x.numel() // _SAMPLE, 1)].float() for x in sources if x.device.type == "cpu"]
    return torch.cat(found) if found else torch.empty(0)


def _fits(values: Tensor, master: Tensor, dtype: torch.dtype) -> bool:
    return values.shape == master.shape and values.dtype == dtype and values.device == master.device
