"""FP4 codecs on a GPU: one launch each, one read and one write of memory, the bits of `reference`.

A block of NVFP4 is two words of eight codes, one of MXFP4 four; as for INT4, everything is flat: block b has the words
that follow each other from b on, whatever the tensor's shape. Two codes of a byte, the even column in the low nibble,
are nibbles of a word in the order of columns.

NVFP4's tensor scale lies on the device and is read there. Nothing here waits for the device. What the seam refuses (see
`values`) is reported in a flag, which the caller reads when it likes; the output is void then.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from k2quant.kernels.codecs.fp4 import MXFP4_BLOCK, NVFP4_BLOCK
from k2quant.kernels.codecs.gpu.bf16 import INFINITY, any_of, magnitude_of, round_to_bf16, tally
from k2quant.kernels.codecs.gpu.figures import bits_of, flag_for, sums_for, total
from k2quant.kernels.codecs.gpu.fp4_rules import (
    bad_fp4_scale,
    bad_tensor_scale,
    fp4_codes_of,
    fp4_scale,
    fp4_step,
    fp4_value,
)
from k2quant.kernels.codecs.gpu.loads import load_bf16
from k2quant.kernels.devices.launch import launch

_WORDS = 512
"""Words that a program decodes: 4 a thread."""

_WEIGHTS = 4096
"""Weights that a program encodes: 32 a thread."""

Encoded = tuple[Tensor, Tensor, Tensor | None]
"""Codes, scales, and the figures as `figures.figures_of` reads them."""


# --- decoding -------------------------------------------------------------------------------------------------------


@triton.jit
def _fp4_to_bf16(
    codes_ptr,
    scale_ptr,
    tensor_ptr,
    out_ptr,
    bad_ptr,
    words,
    FORMAT: tl.constexpr,
    DIVIDES: tl.constexpr,
    SIZE: tl.constexpr,
    CHECK: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Write the eight weights of each of WORDS words."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    inside = word < words
    lane = tl.arange(0, 8)[None, :]
    packed = tl.load(codes_ptr + word, mask=inside, other=0)
    scale = tl.load(scale_ptr + word // (SIZE // 8), mask=inside, other=0).to(tl.int32)
    tensor = tl.load(tensor_ptr)
    step = fp4_step(scale, tensor, FORMAT, DIVIDES)
    out = round_to_bf16(fp4_value((packed[:, None] >> (4 * lane)) & 15) * step[:, None])
    tl.store(out_ptr + word[:, None] * 8 + lane, out, mask=inside[:, None])
    if CHECK:
        bad = any_of(bad_fp4_scale(scale, FORMAT)) | (tl.max(magnitude_of(out)) >= INFINITY).to(tl.int32)
        if FORMAT == "nvfp4":
            bad = bad | bad_tensor_scale(tensor, DIVIDES)
        if bad > 0:
            tl.store(bad_ptr, 1)


def nvfp4_to_bf16(codes: Tensor, scale: Tensor, tensor: Tensor, *, divides: bool, bad: Tensor | None = None) -> Tensor:
    """Return BF16 `[.., K]`: code * S, rounded to float32, then to BF16; S is scale * tensor, or scale / tensor.

    Args:
        codes: uint8 `[.., K/2]`, the even column in the low nibble.
        scale: e4m3 bits, uint8 `[.., K/16]`.
        tensor: float32, one number on the device.
        divides: whether the tensor scale divides.
        bad: int32 `[1]`, set to 1 if a scale is negative or NaN, the tensor scale negative, not finite or a zero that
            divides, or a weight exceeds BF16.
    """
    return _decoded(codes, scale, tensor, bad, FORMAT="nvfp4", DIVIDES=divides, SIZE=NVFP4_BLOCK)


def mxfp4_to_bf16(codes: Tensor, scale: Tensor, *, bad: Tensor | None = None) -> Tensor:
    """Return BF16 `[.., K]`: code * 2^(scale - 127), exactly.

    Args:
        codes: uint8 `[.., K/2]`, the even column in the low nibble.
        scale: e8m0, uint8 `[.., K/32]`.
        bad: int32 `[1]`, set to 1 if a scale is 255 or a weight exceeds BF16.
    """
    return _decoded(codes, scale, None, bad, FORMAT="mxfp4", DIVIDES=False, SIZE=MXFP4_BLOCK)


def _decoded(codes: Tensor, scale: Tensor, tensor: Tensor | None, bad: Tensor | None, **constants: Any) -> Tensor:
    _check(scale, (*codes.shape[:-1], codes.shape[-1] * 2), constants["SIZE"])
    words = _words(codes)
    out = torch.empty((*codes.shape[:-1], codes.shape[-1] * 2), dtype=torch.bfloat16, device=codes.device)
    launch(
        _fp4_to_bf16,
        (triton.cdiv(words.numel(), _WORDS),),
        words,
        bits_of(scale),
        _nothing(codes) if tensor is None else tensor,
        bits_of(out),
        flag_for(bad, codes),
        words.numel(),
        CHECK=bad is not None,
        WORDS=_WORDS,
        exact=True,
        **constants,
    )
    return out


def _words(codes: Tensor) -> Tensor:
    """Return bytes `[.., K/2]` as int32 words `[.., K/8]`; such as do not begin with a word are copied."""
    codes = codes.contiguous()
    if not codes.is_meta and codes.data_ptr() % 4:
        codes = codes.clone()
    return codes.view(torch.int32)


def _check(scale: Tensor, shape: tuple[int, ...], size: int) -> None:
    """Refuse block scales that are not one for each `size` columns of weights: a kernel would read beside them."""
    expected = (*shape[:-1], shape[-1] // size)
    if shape[-1] % size or tuple(scale.shape) != expected:
        raise ValueError(f"expected scales {list(expected)} of {size} columns each, found {list(scale.shape)}")


def _nothing(like: Tensor) -> Tensor:
    """Return what stands for the tensor scale of a format that has none."""
    return torch.empty(1, dtype=torch.float32, device=like.device)


# --- encoding -------------------------------------------------------------------------------------------------------


@triton.jit
def _encode_fp4(
    weights_ptr,
    tensor_ptr,
    given_ptr,
    codes_ptr,
    scale_ptr,
    sums_ptr,
    bad_ptr,
    blocks,
    FORMAT: tl.constexpr,
    DIVIDES: tl.constexpr,
    SIZE: tl.constexpr,
    GIVEN: tl.constexpr,
    WRITES: tl.constexpr,
    FIGURES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Encode BLOCKS blocks of SIZE weights.

    GIVEN: take the scales at `given_ptr`, not the rule's. WRITES: "codes" and scales, "scales" alone, or the decoded
    "weights", at `codes_ptr`.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    word = (block * (SIZE // 8))[:, None] + tl.arange(0, SIZE // 8)[None, :]
    place = (word * 8)[:, :, None] + tl.arange(0, 8)[None, None, :]
    bits = load_bf16(weights_ptr + place, inside[:, None, None])
    amax = tl.max(tl.max(magnitude_of(bits), 2), 1)
    tensor = tl.load(tensor_ptr)
    bad = any_of(amax >= INFINITY)
    if FORMAT == "nvfp4":
        bad = bad | bad_tensor_scale(tensor, True)
    if GIVEN:
        scale = tl.load(given_ptr + block, mask=inside, other=0x38).to(tl.int32)  # any good one
        bad = bad | any_of(bad_fp4_scale(scale, FORMAT))
    else:
        scale = fp4_scale(amax, tensor, FORMAT, DIVIDES)
    if WRITES == "scales":
        tl.store(scale_ptr + block, scale.to(tl.uint8), mask=inside)
    else:
        step = fp4_step(scale, tensor, FORMAT, DIVIDES)
        bad = bad | any_of((step == 0) | (step == float("inf")))
        step = step[:, None, None]
        code = fp4_codes_of(bits, step, FORMAT)
        after = round_to_bf16(fp4_value(code) * step)
        bad = bad | (tl.max(magnitude_of(after)) >= INFINITY).to(tl.int32)
        if WRITES == "weights":
            # NaN spreads over its block; unlike a flag that nobody reads, it is noticed.
            after = tl.where((amax >= INFINITY)[:, None, None], 0x7FC0, after).to(tl.int16)
            tl.store(codes_ptr + place, after, mask=inside[:, None, None])
        else:
            packed = tl.sum(code << (4 * tl.arange(0, 8)[None, None, :]), 2)  # no two share a bit
            tl.store(codes_ptr + word, packed, mask=inside[:, None])
            if not GIVEN:
                tl.store(scale_ptr + block, scale.to(tl.uint8), mask=inside)
        if FIGURES:
            tally(bits, after, sums_ptr, tl.program_id(0))
    if bad > 0:
        tl.store(bad_ptr, 1)


def bf16_to_nvfp4(
    weights: Tensor, tensor: Tensor, *, divides: bool, figures: bool = False, bad: Tensor | None = None
) -> Encoded:
    """Encode blocks of 16 columns.

    Args:
        weights: BF16 `[.., K]`, or float32, which is rounded to BF16 first; K is a multiple of 16.
        tensor: float32, one number on the device.
        divides: whether the tensor scale divides.
        figures: whether to compute them.
        bad: int32 `[1]`, set to 1 if a weight is not finite or decodes to more than BF16 holds, or the tensor scale is
            not above zero or not finite.

    Returns:
        uint8 codes `[.., K/2]`, e4m3 bits of the scales, uint8 `[.., K/16]`, and the figures.
    """
    return _encoded(weights, tensor, None, bad, figures=figures, **_nvfp4(divides=divides))


def bf16_to_mxfp4(weights: Tensor, *, figures: bool = False, bad: Tensor | None = None) -> Encoded:
    """Encode blocks of 32 columns.

    Args:
        weights: BF16 `[.., K]`, or float32, which is rounded to BF16 first; K is a multiple of 32.
        figures: whether to compute them.
        bad: int32 `[1]`, set to 1 if a weight is not finite or decodes to more than BF16 holds.

    Returns:
        uint8 codes `[.., K/2]`, e8m0 scales, uint8 `[.., K/32]`, and the figures.
    """
    return _encoded(weights, None, None, bad, figures=figures, **_MXFP4)


def bf16_to_nvfp4_at(
    weights: Tensor,
    scale: Tensor,
    tensor: Tensor,
    *,
    divides: bool,
    figures: bool = False,
    bad: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return codes at block scales that are given, e4m3 bits `[.., K/16]`, and the figures; else as `bf16_to_nvfp4`.

    `bad` is set to 1 by a block scale that is negative or NaN, or with the tensor scale zero or infinite, too.
    """
    found = _encoded(weights, tensor, scale, bad, figures=figures, **_nvfp4(divides=divides))
    return found[0], found[2]


def bf16_to_mxfp4_at(
    weights: Tensor, scale: Tensor, *, figures: bool = False, bad: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return codes at scales that are given, e8m0 `[.., K/32]`, and the figures; else as `bf16_to_mxfp4`.

    `bad` is set to 1 by a scale of 255, too.
    """
    found = _encoded(weights, None, scale, bad, figures=figures, **_MXFP4)
    return found[0], found[2]


def nvfp4_scales(weights: Tensor, tensor: Tensor, *, divides: bool, bad: Tensor | None = None) -> Tensor:
    """Return the block scales that `bf16_to_nvfp4` takes; what a code decodes to is not looked at for `bad`."""
    scale = _room(weights, weights.shape[-1] // NVFP4_BLOCK)
    _encode(weights, tensor, None, weights, scale, bad, WRITES="scales", FIGURES=False, **_nvfp4(divides=divides))
    return scale


def mxfp4_scales(weights: Tensor, *, bad: Tensor | None = None) -> Tensor:
    """Return the scales that `bf16_to_mxfp4` takes; what a code decodes to is not looked at for `bad`."""
    scale = _room(weights, weights.shape[-1] // MXFP4_BLOCK)
    _encode(weights, None, None, weights, scale, bad, WRITES="scales", FIGURES=False, **_MXFP4)
    return scale


def fake_quantize_nvfp4(weights: Tensor, tensor: Tensor, *, divides: bool, bad: Tensor | None = None) -> Tensor:
    """Return BF16 `[.., K]`: the weights as they are after encoding and decoding, in one launch.

    The arguments are those of `bf16_to_nvfp4`. A block that holds NaN or infinity becomes NaN.
    """
    return _fake(weights, tensor, bad, **_nvfp4(divides=divides))


def fake_quantize_mxfp4(weights: Tensor, *, bad: Tensor | None = None) -> Tensor:
    """Return BF16 `[.., K]`: the weights as they are after encoding and decoding, in one launch.

    The arguments are those of `bf16_to_mxfp4`. A block that holds NaN or infinity becomes NaN.
    """
    return _fake(weights, None, bad, **_MXFP4)


_MXFP4: dict[str, Any] = {"FORMAT": "mxfp4", "DIVIDES": False, "SIZE": MXFP4_BLOCK}


def _nvfp4(*, divides: bool) -> dict[str, Any]:
    return {"FORMAT": "nvfp4", "DIVIDES": divides, "SIZE": NVFP4_BLOCK}


def _encoded(
    weights: Tensor, tensor: Tensor | None, given: Tensor | None, bad: Tensor | None, *, figures: bool, **constants: Any
) -> Encoded:
    """Encode, at scales that are given if there are any."""
    codes = _room(weights, weights.shape[-1] // 2)
    scale = _room(weights, weights.shape[-1] // constants["SIZE"]) if given is None else given
    words = codes.view(torch.int32)
    sums = _encode(weights, tensor, given, words, scale, bad, WRITES="codes", FIGURES=figures, **constants)
    return codes, scale, total(sums) if figures else None


def _fake(weights: Tensor, tensor: Tensor | None, bad: Tensor | None, **constants: Any) -> Tensor:
    out = torch.empty(weights.shape, dtype=torch.bfloat16, device=weights.device)
    _encode(weights, tensor, None, bits_of(out), out, bad, WRITES="weights", FIGURES=False, **constants)
    return out


def _room(weights: Tensor, columns: int) -> Tensor:
    """Return room for that many bytes for each row of weights."""
    return torch.empty((*weights.shape[:-1], columns), dtype=torch.uint8, device=weights.device)


def _encode(
    weights: Tensor,
    tensor: Tensor | None,
    given: Tensor | None,
    out: Tensor,
    scale: Tensor,
    bad: Tensor | None,
    **constants: Any,
) -> Tensor:
    """Launch `_encode_fp4` and return the figures of its tiles; what it does not write stands there unread."""
    if constants["WRITES"] != "weights":
        _check(scale, tuple(weights.shape), constants["SIZE"])
    blocks = weights.numel() // constants["SIZE"]
    together = _WEIGHTS // constants["SIZE"]
    programs = triton.cdiv(blocks, together)
    sums = sums_for(programs, weights.device, wanted=constants["FIGURES"])
    launch(
        _encode_fp4,
        (programs,),
        bits_of(weights),
        _nothing(weights) if tensor is None else tensor,
        bits_of(scale if given is None else given),
        bits_of(out),
        bits_of(scale),
        sums,
        flag_for(bad, weights),
        blocks,
        GIVEN=given is not None,
        BLOCKS=together,
        exact=True,
        **constants,
    )
    return sums
