"""The gate of an export: every value on the disk is the one that the forward pass sees, or the export is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from k2quant.checkpoint import panels
from k2quant.checkpoint.header import TensorEntry
from k2quant.checkpoint.weights import StoredWeight
from k2quant.conversion.placing import place
from k2quant.conversion.recipes.recipe import Recipe
from k2quant.errors import CheckFailed
from k2quant.formats.bf16 import Bf16
from k2quant.formats.int4 import Int4
from k2quant.kernels.codecs import reference
from k2quant.qat.exporting.gate import check_export
from k2quant.qat.exporting.trained import Place
from k2quant.qat.rounding.targets import Part, Target

ROWS = 300


class Export:
    """A folder with an INT4 matrix, a BF16 one, a vector and an empty tensor, and the model that they come from."""

    def __init__(self, folder: Path) -> None:
        generator = torch.Generator().manual_seed(4)
        self.folder = folder
        self.codes = torch.randn(ROWS, 32, generator=generator).bfloat16()
        self.plain = torch.randn(3, 5, generator=generator).bfloat16()
        self.vector = torch.randn(7, generator=generator)
        self.seen = reference.fake_quantize_int4(self.codes, "moonshot")
        self.kept: Tensor | None = None
        module = nn.Module()
        module.codes = nn.Parameter(self.codes)
        target = Target(name="experts.codes", module=module, parameter="codes", parts=())
        self.places: dict[str, Any] = {
            "codes": Place(target, Part("codes", None, slice(None)), self.codes, moves=True),
            "plain": Place(None, Part("plain", None, slice(None)), self.plain, moves=True),
            "vector": Place(None, None, self.vector, moves=False),
            "empty": Place(None, None, torch.empty(0), moves=False),
        }
        self._write()

    def _write(self) -> None:
        weights = [
            self._weight("codes", "BF16", self.codes),
            self._weight("plain", "BF16", self.plain),
            self._weight("vector", "F32", self.vector),
            self._weight("empty", "F32", torch.empty(0)),
        ]
        recipe = SimpleNamespace(format_of=lambda found: Int4() if found.base == "codes" else None)
        (self.shard,) = place(weights, cast("Recipe", recipe), None)
        words, scale, _ = reference.bf16_to_int4(self.codes, "moonshot", recover=False)
        data = {
            "codes.weight_packed": words,
            "codes.weight_scale": scale.view(torch.int16),
            "codes.weight_shape": torch.tensor([ROWS, 32], dtype=torch.int32),
            "plain.weight": self.plain.view(torch.int16),
            "vector.weight": self.vector,
            "empty.weight": torch.empty(0),
        }
        content = bytearray(self.shard.size)
        content[: len(self.shard.header)] = self.shard.header
        for job in self.shard.jobs:
            for entry in job.outputs.values():
                content[entry.start : entry.stop] = data[entry.name].contiguous().numpy().tobytes()
        (self.folder / self.shard.file).write_bytes(content)

    @staticmethod
    def _weight(base: str, dtype: str, values: Tensor) -> StoredWeight:
        nbytes = values.numel() * values.element_size()
        entry = TensorEntry(f"{base}.weight", dtype, tuple(values.shape), "one.safetensors", 0, nbytes)
        return StoredWeight(base, Bf16(dtype=dtype), tuple(values.shape), {"weight": entry})

    def check(self) -> int:
        """Ask the gate."""
        jobs = {job.name: job for job in self.shard.jobs}
        plan = SimpleNamespace(shards=(self.shard,), jobs=lambda: iter(self.shard.jobs))
        prepared = SimpleNamespace(fill=lambda _, out: out.copy_(self.seen), kept=lambda _: self.kept)
        trained = SimpleNamespace(prepared=prepared, places=self.places, jobs=jobs)
        return check_export(self.folder, cast("Any", plan), cast("Any", trained))

    def refused(self) -> str:
        """Return what the gate says when it refuses."""
        with pytest.raises(CheckFailed) as caught:
            self.check()
        return str(caught.value)


@pytest.fixture(params=[2**22, 128 * 32], ids=["one panel", "three panels"])
def export(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    """Return an export whose INT4 matrix is read at once or in pieces."""
    monkeypatch.setattr(panels, "PANEL_WEIGHTS", request.param)
    return Export(tmp_path)


def test_equal_values_pass_and_are_counted(export: Export) -> None:
    """All four tensors, with codes, matrices, vectors and nothing."""
    assert export.check() == 4


def test_the_sign_of_a_zero_is_no_difference(export: Export) -> None:
    """INT4 has but one zero."""
    export.seen = torch.where(export.seen == 0, -0.0, export.seen)
    assert export.check() == 4


def test_the_smallest_value_is_not_zero(export: Export) -> None:
    """Beside a weight of one it would vanish; here it is another value."""
    row, column = (export.seen == 0).nonzero()[0].tolist()
    export.seen[row, column] = 2.0**-120
    assert f"1 values differ, the first at row {row}, column {column}" in export.refused()


@pytest.mark.parametrize(("row", "column"), [(0, 0), (129, 31), (299, 5)])
def test_a_value_that_differs_is_named_with_its_place(row: int, column: int, export: Export) -> None:
    """Row and column of the whole matrix, what was expected and what is there, and how many there are."""
    there = float(export.seen[row, column])
    export.seen[row, column] = 1000.0
    said = export.refused()
    assert f"1 values differ, the first at row {row}, column {column}" in said
    assert "`codes`" in said
    assert f"expected 1000.0, found {there}" in said


def test_the_first_of_several_is_named(export: Export) -> None:
    """In the order of rows, then columns."""
    export.seen[130, 3], export.seen[130, 7], export.seen[131, 0] = 1000.0, 1000.0, 1000.0
    assert "3 values differ, the first at row 130, column 3" in export.refused()


@pytest.mark.parametrize("name", ["plain", "vector"])
def test_a_tensor_that_is_not_rounded_is_compared_too(name: str, export: Export) -> None:
    """Its own values are expected, in the last bit of its last element."""
    held: Tensor = getattr(export, name)
    bits = held.view(torch.int16 if held.dtype == torch.bfloat16 else torch.int32)
    bits.view(-1)[-1] ^= 1
    said = export.refused()
    last = "row 2, column 4" if name == "plain" else "row 6, column 0"
    assert f"1 values differ, the first at {last}" in said


def test_a_forward_pass_on_older_values_is_refused(export: Export) -> None:
    """What it keeps must be what it would be filled with; without anything kept there is nothing to compare."""
    export.kept = export.seen.clone()
    assert export.check() == 4
    export.kept[7, 7] += 1
    said = export.refused()
    assert "rounded values of older weights" in said
    assert "experts.codes" in said
