"""The inline assembly of the Triton kernels, proved on a CPU: its instructions are carried out here, one by one."""

# ruff: noqa: ANN001, ANN202, N803, SLF001  kernels, as in kernels/**/gpu/*.py
# ruff: noqa: E402  Triton's absence skips the file before anything imports it
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl

from k2quant.kernels.codecs import reference
from k2quant.kernels.codecs.fp4 import E2M1
from k2quant.kernels.devices.launch import launch
from k2quant.kernels.devices.rounding import INTERPRETED
from k2quant.kernels.products.gpu import linear as linear_triton
from k2quant.kernels.products.gpu import tiles as tiles_triton
from k2quant.kernels.products.prepare import prepare_int4
from k2quant.kernels.products.tables.configs import Config

pytestmark = pytest.mark.skipif(
    not INTERPRETED.value, reason="on a GPU the assembly itself runs, in the tests of the products"
)

Registers = dict[str, int]


def lop3(a: int, b: int, c: int, table: int) -> int:
    """Look each bit up in a truth table by the bits of a, b and c, a's weighing 4."""
    result = 0
    for bit in range(32):
        index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
        result |= (table >> index & 1) << bit
    return result


def prmt(a: int, b: int, selector: int) -> int:
    """Pick four of the eight bytes of a and b; the default mode, without spreading a sign."""
    result = 0
    for place in range(4):
        choice = selector >> 4 * place & 0xF
        assert choice < 8, "a sign is not expected to be spread"
        result |= ((b << 32 | a) >> 8 * choice & 0xFF) << 8 * place
    return result


def bf16(bits: int) -> float:
    """Return the number that 16 bits mean in BF16."""
    return float(np.uint32(bits << 16).view(np.float32))


def fma(a: int, b: int, c: int) -> int:
    """Return a * b + c for both halves, exactly; one that needs rounding is not expected."""
    result = 0
    for shift in (0, 16):
        number = bf16(a >> shift & 0xFFFF) * bf16(b >> shift & 0xFFFF) + bf16(c >> shift & 0xFFFF)
        bits = int(np.float32(number).view(np.uint32))
        assert float(np.uint32(bits).view(np.float32)) == number
        assert bits & 0xFFFF == 0, f"{number} is no BF16 number"
        result |= bits >> 16 << shift
    return result


INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": lop3,
    "prmt.b32": prmt,
    "fma.rn.bf16x2": fma,
}


def run(assembly: str, inputs: list[int], outputs: int) -> list[int]:
    """Carry the assembly out; inputs and outputs are 32-bit registers, outputs numbered first."""
    registers: Registers = {f"${outputs + number}": value for number, value in enumerate(inputs)}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for statement in assembly.strip().strip("{}").split(";"):
        if not statement.strip() or statement.strip().startswith(".reg"):
            continue
        name, target, *operands = re.split(r",?\s+", statement.strip())
        registers[target] = INSTRUCTIONS[name](*map(value, operands)) & 0xFFFFFFFF
    return [registers[f"${number}"] for number in range(outputs)]


class Results:
    """What the interpreter makes of several outputs."""

    def __init__(self, results: list[Any]) -> None:
        self.results = results

    def get_result(self, number: int) -> Any:
        """Return one output."""
        return self.results[number]


def inline_asm(
    _self: Any, assembly: str, _constraints: str, values: list[Any], types: list[Any], _pure: Any, pack: int
) -> Results:
    """Stand in for the interpreter's missing instruction: `pack` neighbours share the registers of one run."""
    from triton.runtime.interpreter import TensorHandle

    registers = [as_registers(value.data, pack) for value in values]
    inputs = np.concatenate(registers, axis=1)
    count = len(types) * pack * 2 // 4  # every output is of two bytes
    found = np.array([run(assembly, [int(word) for word in row], count) for row in inputs], np.uint32)
    halves = found.view(np.uint16).reshape(len(inputs), len(types), pack)
    shape = values[0].data.shape
    return Results([TensorHandle(halves[:, i].reshape(shape).copy(), tl.bfloat16) for i in range(len(types))])


def as_registers(data: Any, pack: int) -> Any:
    """Return uint32 `[n, registers]`: `pack` neighbours to a row, several small ones to a register."""
    return np.ascontiguousarray(data).reshape(-1, pack).view(np.uint32)


@pytest.fixture
def assembled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter run inline assembly."""
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", inline_asm)


@triton.jit
def _unpack(words_ptr, out_ptr, WORDS: tl.constexpr, PLAIN: tl.constexpr):
    words = tl.load(words_ptr + tl.arange(0, WORDS))[None, :]
    codes = tiles_triton._unpack_words_plainly(words) if PLAIN else tiles_triton._unpack_words(words)
    tl.store(out_ptr + tl.arange(0, WORDS * 8), codes.to(tl.float32).reshape(WORDS * 8))


@triton.jit
def _read_fp8(bits_ptr, out_ptr, COUNT: tl.constexpr):
    bits = tl.load(bits_ptr + tl.arange(0, COUNT))
    tl.store(out_ptr + tl.arange(0, COUNT), tiles_triton._fp8_to_bf16(bits).to(tl.float32))


@triton.jit
def _read_fp4(words_ptr, out_ptr, WORDS: tl.constexpr):
    words = tl.load(words_ptr + tl.arange(0, WORDS))[None, :]
    codes = tiles_triton._fp4_numbers(words)
    tl.store(out_ptr + tl.arange(0, WORDS * 8), codes.to(tl.float32).reshape(WORDS * 8))


def int4_codes() -> Tensor:
    """Return int8 `[16, 32]`: each of the 16 codes at each of the 32 places of a group."""
    return ((torch.arange(16)[:, None] + torch.arange(32)[None, :]) % 16 - 8).to(torch.int8)


@pytest.mark.usefixtures("assembled")
@pytest.mark.parametrize("plain", [False, True])
def test_words_come_out_in_column_order(*, plain: bool) -> None:
    """Every code at every place of a group comes out of the layout `groups` at its own column, exactly."""
    codes = int4_codes()
    weight = prepare_int4(reference.pack_int4(codes), torch.ones(16, 1).bfloat16(), layout="groups")
    found = torch.empty(16, 32)
    for row in range(16):
        launch(_unpack, (1,), weight.codes[0, row].contiguous(), found[row], WORDS=4, PLAIN=plain)
    assert torch.equal(found, codes.float())


def test_halves_belong_to_neighbouring_words() -> None:
    """Of each output the low half is a nibble of the first word and the high half one of the second, 16 in all."""
    places = {}
    for place in range(16):
        words = [0x88888888, 0x88888888]
        words[place // 8] ^= 0x1 << 4 * (place % 8)  # one code is 1, all others are 0
        outputs = run(tiles_triton._UNPACK_INT4.value, words, 8)
        halves = [(i, half) for i in range(8) for half in range(2) if outputs[i] >> 16 * half & 0x7FFF]
        assert len(halves) == 1
        places[halves[0]] = place
    assert len(places) == 16
    assert places == {(s + 4 * q, h): 8 * q + 4 * h + s for s in range(4) for q in range(2) for h in range(2)}


@pytest.mark.usefixtures("assembled")
def test_every_fp8_code_at_every_place() -> None:
    """All 254 numbers of e4m3, subnormals and both zeros included, come out exactly, whichever byte holds them."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0
    for shift in range(4):
        bits, found = codes.roll(shift).contiguous(), torch.empty(256)
        launch(_read_fp8, (1,), bits, found, COUNT=256)
        expected = bits.view(torch.float8_e4m3fn).float()
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.usefixtures("assembled")
def test_every_fp4_code_at_every_place() -> None:
    """All 16 codes of E2M1, 0.5 and both zeros included, come out exactly at each of the 16 places of two words."""
    codes = (torch.arange(16)[:, None] + torch.arange(16)[None, :]) % 16
    words = (codes.reshape(16, 2, 8) << torch.arange(0, 32, 4)).sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    numbers = torch.tensor([*E2M1, *(-number for number in E2M1)])
    found = torch.empty(16, 16)
    for row in range(16):
        launch(_read_fp4, (1,), words[row].contiguous(), found[row], WORDS=2)
    assert torch.equal(found.view(torch.int32), numbers[codes].view(torch.int32))


def test_fp4_words_know_nothing_of_each_other() -> None:
    """The low half of each result is of the first word and the high half of the second: any two may go together."""
    one, other = 0x76543210, 0xFEDCBA98
    pairs = run(tiles_triton._UNPACK_FP4.value, [one, other], 8)
    for half, word in enumerate((one, other)):
        alone = run(tiles_triton._UNPACK_FP4.value, [word, word], 8)
        assert [pair >> 16 * half & 0xFFFF for pair in pairs] == [pair & 0xFFFF for pair in alone]


@pytest.mark.usefixtures("assembled")
@pytest.mark.parametrize("depth", [128, 256])
def test_thin_tiles(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that go to the matrix units as they are unpacked meet the right columns of x, times their scales."""
    assembled = tiles_triton._scaled_words
    monkeypatch.setattr(tiles_triton, "_scaled_words_plainly", assembled)
    codes = int4_codes().repeat(2, 8)[:18]
    scale = 2.0 ** ((torch.arange(18)[:, None] + torch.arange(8)) % 5 - 2)
    weight = prepare_int4(reference.pack_int4(codes), scale.bfloat16(), layout="groups")
    x = torch.randint(-8, 9, (3, 256), generator=torch.Generator().manual_seed(5)).bfloat16()
    for splits in (1, 2):
        config = Config(rows=16, columns=16, depth=depth, splits=splits)
        found = linear_triton.linear(x, weight, config)
        exact = x.double() @ (codes.double() * scale.repeat_interleave(32, -1).double()).T
        assert torch.equal(found, exact.bfloat16())
    monkeypatch.setattr(tiles_triton, "_scaled_words_plainly", None)
    with pytest.raises(Exception, match="not callable"):  # so the assembly it was
        linear_triton.linear(x, weight, config)
