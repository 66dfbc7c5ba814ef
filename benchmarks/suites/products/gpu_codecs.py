"""The codecs on a GPU, held to the bits of their references."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from k2quant.kernels.codecs import reference
from k2quant.kernels.ops import prepare_int4
from k2quant.kernels.products import reference as matmul_reference
from suites.products.cases import SEARCH, Cell
from suites.products.inputs import BLOCK, CodecBank, Entry, Work


class CodecProblem:
    """One codec."""

    def __init__(self, bank: CodecBank, cell: Cell) -> None:
        self.bank, self.cell = bank, cell
        self.function, self.truth, self.inputs = _codec(cell.shape, bank)

    @property
    def work(self) -> Work:
        """What the codec costs: its inputs and outputs, once."""
        inputs, outputs = self.inputs, self.function(*self.inputs)
        return Work(bytes=float(sum(part.nbytes for part in (*inputs, *outputs))), flops=0.0)


def our_codec(problem: CodecProblem) -> Entry:
    """Make the call of a codec; its check is on the first rows."""
    function, inputs = problem.function, problem.inputs
    rows = problem.bank.size[0]
    few = min(rows, 2 * BLOCK)
    slices = [part[: -(-few * part.shape[0] // rows)].contiguous() for part in inputs]

    def error() -> float:
        pairs = list(zip(function(*slices), problem.truth(*slices), strict=True))
        wrong = sum(int((_bytes(ours) != _bytes(exact)).sum()) for ours, exact in pairs)
        return wrong / sum(exact.nbytes for _, exact in pairs)

    return Entry(calls=[lambda: function(*inputs)], weight_bytes=sum(part.nbytes for part in inputs), error=error)


Codec = Callable[..., tuple[Tensor, ...]]


def _codec(name: str, bank: CodecBank) -> tuple[Codec, Codec, tuple[Tensor, ...]]:
    """Return a codec, its reference, and what they take."""
    from k2quant.kernels.codecs.gpu import fp4, fp8, int4, search
    from k2quant.kernels.products.gpu import repack as repack_triton
    from k2quant.kernels.products.gpu import w8a8 as w8a8_triton

    block, bf16 = (BLOCK, BLOCK), (bank.bf16,)
    recover = not name.endswith("no recovery")
    found: dict[str, Callable[[], tuple[Codec, Codec, tuple[Tensor, ...]]]] = {
        "INT4 -> BF16": lambda: (
            lambda packed, scale: (int4.int4_to_bf16(packed, scale),),
            lambda packed, scale: (reference.int4_to_bf16(packed, scale.float(), reference.GROUP),),
            (bank.packed, bank.scale4),
        ),
        "FP8 -> BF16": lambda: (
            lambda codes, scale: (fp8.fp8_to_bf16(codes, scale, block),),
            lambda codes, scale: (reference.fp8_to_bf16(codes, scale, block),),
            (bank.codes, bank.scale8),
        ),
        "BF16 -> INT4": lambda: (
            lambda weights: int4.bf16_to_int4(weights, "moonshot", recover=recover)[:2],
            lambda weights: reference.bf16_to_int4(weights, "moonshot", recover=recover)[:2],
            bf16,
        ),
        "BF16 -> FP8": lambda: (
            lambda weights: fp8.bf16_to_fp8(weights, block, recover=recover)[:2],
            lambda weights: reference.bf16_to_fp8(weights, block)[:2],
            bf16,
        ),
        "activations -> FP8 1x128": lambda: (
            w8a8_triton.quantize_activations,
            matmul_reference.fp8_quantize_activations,
            bf16,
        ),
        SEARCH: lambda: (
            lambda weights: (search.search_int4_scales(weights, bank.importance, bank.mean),),
            lambda weights: (reference.searched_int4_scales(weights, bank.importance, bank.mean),),
            bf16,
        ),
        "NVFP4 -> BF16": lambda: (
            lambda codes, scale: (fp4.nvfp4_to_bf16(codes, scale, bank.tensor, divides=False),),
            lambda codes, scale: (reference.nvfp4_to_bf16(codes, scale, bank.tensor, divides=False),),
            (bank.nvfp4.codes, bank.nvfp4.scale),
        ),
        "MXFP4 -> BF16": lambda: (
            lambda codes, scale: (fp4.mxfp4_to_bf16(codes, scale),),
            lambda codes, scale: (reference.mxfp4_to_bf16(codes, scale),),
            (bank.mxfp4.codes, bank.mxfp4.scale),
        ),
        "BF16 -> NVFP4": lambda: (
            lambda weights: fp4.bf16_to_nvfp4(weights, bank.tensor, divides=False)[:2],
            lambda weights: reference.bf16_to_nvfp4(weights, bank.tensor, divides=False)[:2],
            bf16,
        ),
        "BF16 -> MXFP4": lambda: (
            lambda weights: fp4.bf16_to_mxfp4(weights)[:2],
            lambda weights: reference.bf16_to_mxfp4(weights)[:2],
            bf16,
        ),
        "repack INT4": lambda: (repack_triton.repack_int4, _repacked, (bank.packed, bank.scale4)),
    }
    return found[name.removesuffix(", no recovery")]()


def _repacked(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Repack on the CPU, in plain torch."""
    weight = prepare_int4(packed.cpu(), scale.cpu(), layout="groups")
    return weight.codes.to(packed.device), weight.scale.to(packed.device)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
