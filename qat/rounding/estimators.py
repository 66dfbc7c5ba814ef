"""Fake quantisation with straight-through gradients, as functions.

The forward pass rounds a master weight to BF16, then to the grid, by the arithmetic of `k2quant.kernels`. The backward
pass saves nothing but references to what lives anyway, and computes masks anew, a piece at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from k2quant.errors import UsageError
from k2quant.formats.format import Layout
from k2quant.formats.known import ExportFormat
from k2quant.kernels.codecs import reference
from k2quant.kernels.codecs.grids import Grid, largest_code
from k2quant.kernels.codecs.values import ValueAt
from k2quant.qat.config import Estimator, QATConfig
from k2quant.qat.rounding.rules import Rule, as_bf16, plain_rule

GROUP = reference.GROUP
PIECE = 2**22
"""Weights that are worked on at once, so that temporary copies stay small whatever the size of a stack of experts."""


def fake_quantize(
    weights: Tensor,
    *,
    to: ExportFormat = "int4",
    bits: int = 4,
    grid: Grid = "moonshot",
    estimator: Estimator = "plain",
    layout: Layout | None = None,
    largest: Tensor | None = None,
) -> Tensor:
    """Round weights as an export would store them, with a straight-through gradient.

    Args:
        weights: float32 or BF16, `[R, K]`, or a stack `[.., R, K]` of matrices that are rounded one by one.
        to: the format.
        bits: width of INT4 codes: 4, 3, 2, or 8.
        grid: the rounding rule of INT4.
        estimator: `plain` or `clipped`; for `learned` there is `fake_quantize_learned`.
        layout: whose names the export has, which decides the last bits of NVFP4; None: the format's own.
        largest: of NVFP4, which has one scale for a whole matrix beside those of its blocks: the magnitude from which
            that is taken, one number or one for each matrix `[..]`, such as the largest of gate and up where engines
            fuse them; None: each matrix's own.

    Returns:
        the same shape and dtype; every value is a BF16 number.

    Raises:
        UsageError: the weights or the options do not fit.
        ValueAt: a weight is not finite.
    """
    config = QATConfig(to=to, bits=bits, grid=grid, estimator=estimator, layout=layout)
    if estimator == "learned":
        raise UsageError("estimator: learned scales are a tensor of their own; call fake_quantize_learned")
    _check_weights(weights)
    values = torch.empty_like(weights, memory_format=torch.contiguous_format)
    rule, master = plain_rule(config, bits), weights.detach()
    known = _largest_asked(rule, master, largest)
    round_into(values, master, rule, known)
    if estimator == "clipped":
        return clipped(weights, values, rule, known)
    return straight(weights, values)


def _largest_asked(rule: Rule, master: Tensor, largest: Tensor | None) -> Tensor | None:
    """Return the largest magnitude for each matrix of a stack, given or its own; None where the rule needs none."""
    if not rule.surveyed:
        if largest is not None:
            raise UsageError(f"largest: {rule.format.name} has no scale of a whole matrix; leave it out")
        return None
    own = largest_of(master, master.shape[:-2].numel())
    if largest is None:
        return own
    if largest.shape not in {(), master.shape[:-2]}:
        raise UsageError(
            f"largest: expected one number, or one for each matrix of {list(master.shape)}, found {list(largest.shape)}"
        )
    given = largest.detach().to(own.device, torch.float32).expand(master.shape[:-2]).reshape(-1)
    if not ((given >= own) & given.isfinite()).all():
        raise UsageError("largest: expected finite numbers that no weight exceeds")
    return given


def fake_quantize_learned(weights: Tensor, scale: Tensor, *, bits: int = 4) -> Tensor:
    """Round weights to moonshot's INT4 with scales that are trained too (LSQ, Esser et al., arXiv 1902.08153).

    The forward pass uses bf16(scale), which is what is shipped. Its gradient is LSQ's: round(q) - q within the range of
    the codes and the largest code beyond it, times 1/sqrt(32 L).

    Args:
        weights: float32 or BF16, `[.., R, K]`.
        scale: float32, `[.., R, K/32]`; above zero when rounded to BF16.
        bits: width of the codes.

    Returns:
        the same shape and dtype as the weights.

    Raises:
        UsageError: the shapes do not fit, or a scale is not above zero.
        ValueAt: a weight is not finite.
    """
    QATConfig(bits=bits, estimator="learned")  # refuses what is no width
    _check_weights(weights)
    if scale.shape != (*weights.shape[:-1], weights.shape[-1] // GROUP) or weights.shape[-1] % GROUP:
        raise UsageError(
            f"scale: expected a number for each {GROUP} of {list(weights.shape)}, found {list(scale.shape)}"
        )
    factors = as_bf16(scale.detach())
    if not ((factors > 0) & factors.isfinite()).all():
        raise UsageError("scale: expected numbers above 0 that BF16 can hold")
    values = torch.empty_like(weights, memory_format=torch.contiguous_format)
    learned_into(values, weights.detach(), factors, bits)
    return learned(weights, scale, values, bits)


def _check_weights(weights: Tensor) -> None:
    if weights.dtype not in {torch.float32, torch.bfloat16}:
        raise UsageError(f"weights: expected float32 or bfloat16, found {weights.dtype}")
    if weights.ndim < 2 or not weights.shape[-1]:
        raise UsageError(f"weights: expected a matrix or a stack of matrices, found the shape {list(weights.shape)}")


def pieces(shape: torch.Size, rows_together: int = 1) -> Iterator[slice]:
    """Yield ranges of the rows of a stack seen as one matrix, of about `PIECE` weights and whole `rows_together`."""
    rows = shape[:-1].numel()
    step = max(PIECE // max(shape[-1], 1) // rows_together, 1) * rows_together
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def largest_of(master: Tensor, count: int) -> Tensor:
    """Return the largest magnitude, as BF16, of each of `count` parts of equal height of a stack: float32 `[count]`.

    Raises:
        ValueAt: on a CPU, a weight is not finite; on a GPU, where nothing waits for that, the magnitude is not.
    """
    source = as_matrix(master.contiguous())
    found = torch.zeros(count, device=master.device)
    for number, part in enumerate(source.view(count, len(source) // max(count, 1), source.shape[-1])):
        for rows in pieces(part.shape):
            piece = as_bf16(part[rows])
            amax = piece.abs().amax().float()
            if amax.device.type == "cpu" and not amax.isfinite():
                with counted_from(number * len(part) + rows.start):
                    reference.require_finite(piece)
            found[number] = torch.maximum(found[number], amax)
    return found


def round_into(out: Tensor, master: Tensor, rule: Rule, largest: Tensor | None = None) -> None:
    """Fill a tensor with what a rule makes of master weights `[.., R, K]`, each matrix of a stack for itself.

    Args:
        out: of the shape of the weights.
        master: the weights.
        rule: how they are rounded.
        largest: float32 `[P]`, where the rule needs it: of each of P parts of equal height of the whole stack.
    """
    height = master.shape[-2] if master.ndim > 1 else 1
    if height % rule.height:  # blocks would span two matrices
        matrices = zip(out.flatten(0, -3), master.flatten(0, -3), strict=True) if master.ndim > 2 else [(out, master)]
        for number, (target, source) in enumerate(matrices):
            with counted_from(number * height):
                target.copy_(rule.values(as_bf16(source)))
        return
    flat, source = as_matrix(out), as_matrix(master.contiguous())
    for rows, one in _ruled(source.shape, rule, largest):
        with counted_from(rows.start):
            flat[rows].copy_(one.values(as_bf16(source[rows])))


def _ruled(shape: torch.Size, rule: Rule, largest: Tensor | None) -> Iterator[tuple[slice, Rule]]:
    """Yield pieces of a stack seen as one matrix, each with the rule that knows the largest weight of its part."""
    if largest is None:
        yield from ((rows, rule) for rows in pieces(shape, rule.height))
        return
    height = shape[0] // len(largest)
    for number, each in enumerate(largest):
        for rows in pieces(torch.Size((height, shape[1])), rule.height):
            yield slice(number * height + rows.start, number * height + rows.stop), rule.knowing(each)


def learned_into(out: Tensor, master: Tensor, scale: Tensor, bits: int) -> None:
    """Fill a tensor with what given BF16 scales `[.., R, K/32]` make of master weights `[.., R, K]`."""
    flat, source, factors = as_matrix(out), as_matrix(master.contiguous()), as_matrix(scale.contiguous())
    for rows in pieces(source.shape):
        with counted_from(rows.start):
            flat[rows].copy_(reference.int4_at_scale(as_bf16(source[rows]), factors[rows], bits)[1])


@contextlib.contextmanager
def counted_from(first: int) -> Iterator[None]:
    """Count the rows of a bad value from the first of the stack, not of the piece that is worked on."""
    try:
        yield
    except ValueAt as error:
        raise ValueAt(row=first + error.row, column=error.column, what=error.what, of=error.of) from error


def as_matrix(stack: Tensor) -> Tensor:
    """See a stack `[.., K]` as one matrix; a vector is one row.

    Raises:
        RuntimeError: it has gaps.
    """
    return stack.view(-1, stack.shape[-1]) if stack.ndim else stack.view(1, 1)


class _Straight(Function):
    """Values in the place of a master weight; the gradient passes unchanged and nothing is saved."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, values: Tensor) -> Tensor:  # noqa: ARG004  torch's signature
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ARG004  torch's signature
        return grads[0], None


class _Clipped(Function):
    """The same, with no gradient where a code was clamped; the mask is made anew from the master weight."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, values: Tensor, rule: Rule, largest: Tensor | None) -> Tensor:
        ctx.save_for_backward(master)
        ctx.rule = rule, largest
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (master,), (rule, largest) = ctx.saved_tensors, ctx.rule
        out = torch.empty_like(master, memory_format=torch.contiguous_format)
        flat, source, grad = as_matrix(out), as_matrix(master.contiguous()), grads[0].reshape(-1, master.shape[-1])
        for rows, one in _ruled(source.shape, rule, largest):
            flat[rows] = grad[rows] * one.inside(as_bf16(source[rows]))
        return out, None, None, None


class _Learned(Function):
    """Values made with a learned scale; gradients of both, from the master weight and the scale alone."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, scale: Tensor, values: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(master, scale)
        ctx.bits = bits
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        master, scale = ctx.saved_tensors
        largest = largest_code("moonshot", ctx.bits)
        contiguous = torch.contiguous_format
        of_master = torch.empty_like(master, memory_format=contiguous)
        of_scale = torch.empty_like(scale, memory_format=contiguous)
        flat, source = as_matrix(of_master), as_matrix(master.contiguous())
        grad = grads[0].reshape(-1, master.shape[-1])
        factors, out = as_matrix(scale.contiguous()), as_matrix(of_scale)
        for rows in pieces(source.shape):
            groups = (-1, flat.shape[1] // GROUP, GROUP)
            quotient = as_bf16(source[rows]).float().view(groups) / as_bf16(factors[rows]).float().unsqueeze(-1)
            inside, part = quotient.abs() <= largest, grad[rows].view(groups)
            slope = torch.where(inside, quotient.round() - quotient, quotient.sign() * largest)
            out[rows] = (part.float() * slope).sum(-1) / (GROUP * largest) ** 0.5
            flat[rows] = (part * inside).view(flat[rows].shape)
        return of_master, of_scale, None, None


def straight(master: Tensor, values: Tensor) -> Tensor:
    """Return `values` with a gradient that passes unchanged to `master`."""
    result: Tensor = _Straight.apply(  # type: ignore[no-untyped-call]
        master, values
    )
    return result


def clipped(master: Tensor, values: Tensor, rule: Rule, largest: Tensor | None = None) -> Tensor:
    """Return `values` with a gradient that passes to `master` where no code was clamped."""
    result: Tensor = _Clipped.apply(  # type: ignore[no-untyped-call]
        master, values, rule, largest
    )
    return result


def learned(master: Tensor, scale: Tensor, values: Tensor, bits: int) -> Tensor:
    """Return `values` with LSQ's gradients of `master` and `scale`."""
    result: Tensor = _Learned.apply(  # type: ignore[no-untyped-call]
        master, scale, values, bits
    )
    return result
