"""Tables of kernel configurations: what ships, what a user measured, and how a table is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from k2quant.cli import main
from k2quant.errors import UsageError
from k2quant.kernels import configs, tuning
from k2quant.kernels.configs import BUCKETS, TABLES, Config, Table, bucket_of, read_table, table_for, write_table
from k2quant.kernels.ops import prepare_fp8, prepare_int4, warmup
from k2quant.kernels.tuning import Cell

PRODUCTS = ("linear/int4", "linear/fp8", "w8a8/fp8", "gate_up/int4", "gate_up/fp8", "down/int4", "down/fp8")


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_tables_answer_every_question(path: Path) -> None:
    """Each shipped table has every product, any shape and any M, and writing it back changes no byte."""
    table = read_table(path)
    for product in PRODUCTS:
        kind, weight_format = product.split("/")
        for rows in (0, 1, 3, 100, 5000):
            assert isinstance(table.choose(kind, weight_format, (48, 96), rows), Config)  # type: ignore[arg-type]
    assert table.name == path.stem or table.measured


def test_a_table_survives_writing(tmp_path: Path) -> None:
    """What is written is read back equal, and a written table is written the same again."""
    for path in TABLES.glob("*.json"):
        write_table(read_table(path), tmp_path / path.name)
        assert read_table(tmp_path / path.name) == read_table(path)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("rows", "bucket"), [(0, 1), (1, 1), (3, 4), (64, 64), (65, 128), (4096, 4096), (16384, 4096)])
def test_buckets_round_up(rows: int, bucket: int) -> None:
    """M is rounded up to a bucket; what is larger than all counts as the last."""
    assert bucket_of(rows) == bucket


def test_the_nearest_larger_bucket_answers() -> None:
    """A shape's own entry goes before `*`; a missing bucket takes the next larger one, else the last."""
    own, small, large = Config(columns=32), Config(columns=64), Config(columns=128)
    table = Table("x", None, {"linear/int4": {"8x32": {1: own}, "*": {4: small, 64: large}}})
    assert table.choose("linear", "int4", (8, 32), 1) == own
    others = [table.choose("linear", "int4", (9, 32), rows) for rows in (1, 4, 5, 64, 999)]
    assert others == [
        small,
        small,
        large,
        large,
        large,
    ]
    with pytest.raises(UsageError, match="no configuration for w8a8/fp8"):
        table.choose("w8a8", "fp8", (8, 32), 1)


def test_depth_divides_what_it_must() -> None:
    """BLOCK_K is lowered to a power of two that divides K and the columns of a block."""
    assert [Config(depth=128).depth_for(columns) for columns in (7168, 192, 96)] == [128, 64, 32]
    assert Config(depth=128).depth_for(7168, 64) == 64


def test_the_users_table_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measured table in the user's cache wins; an unknown GPU takes the nearest older architecture."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table_for.cache_clear()
    assert table_for("NVIDIA Imaginary 9", (9, 0)).name == "sm_90"
    assert table_for("NVIDIA Imaginary 8", (8, 9)).name == "sm_80"
    with pytest.raises(UsageError, match=r"compute capability 7\.5: 8\.0 or later is needed"):
        table_for("NVIDIA Old", (7, 5))
    base = read_table(TABLES / "sm_90.json")
    write_table(
        Table("NVIDIA Imaginary 9", {"device": "x"}, base.products), configs.user_tables() / "NVIDIA-Imaginary-9.json"
    )
    table_for.cache_clear()
    assert table_for("NVIDIA Imaginary 9", (9, 0)).name == "NVIDIA Imaginary 9"
    table_for.cache_clear()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"name": "x", "measured": null, "products": {"linear/int4": {"*": {"one": {}}}}}',
        '{"name": "x", "measured": null, "products": {"linear/int4": {"*": {"1": {"colums": 64}}}}}',
        '{"name": "x", "measured": null, "products": {"linear/int4": {"*": {"1": {"columns": 48}}}}}',
        '{"name": "x", "measured": null, "products": {"linear/int4": {"*": {"1": {"columns": "64"}}}}}',
        '{"name": "x", "measured": null, "products": {"linear/int4": {"*": {"1": {"splits": 0}}}}}',
        '{"name": "x", "measured": null, "products": {"linear/int4": {"*": {"1": {"form": "magic"}}}}}',
        '{"name": "x", "measured": null, "products": {"linear/int4": {"*": 3}}}',
    ],
)
def test_a_damaged_table_is_refused_by_name(text: str, tmp_path: Path) -> None:
    """A table that is no table, or holds what no kernel can be run with, is refused with its path."""
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"gpu\.json: not a table of kernel configurations"):
        read_table(path)


CELL = Cell("linear", "int4", (64, 96), 4)


def test_candidates_fit_the_gpu() -> None:
    """No candidate asks for more shared memory than there is; every product and bucket has some."""
    for cell in tuning.cells():
        found = tuning.candidates(cell, shared_limit=227 * 1024, processors=132)
        assert 4 <= len(found) <= 33
        assert all(tuning.shared_bytes(config, cell.weight_format) <= 227 * 1024 for config in found)
        assert len(set(found)) == len(found)


def test_wrong_configurations_are_never_timed() -> None:
    """A configuration whose numbers are wrong, that raises, or that gives other bits the second time is refused."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(4, 64, generator=generator).double()
    wrong, raising, moving, right, slow = (Config(columns=columns) for columns in (16, 32, 64, 128, 256))
    timed: list[Config] = []

    def run(config: Config) -> Tensor:
        if config == raising:
            raise RuntimeError("out of resource: shared memory")
        if config == moving:
            return exact.float() + 1e-7 * torch.rand(4, 64, generator=generator)
        out = exact.float()
        if config == wrong:
            out[3, 63] += 0.5
        return out

    def time(cell: Cell, config: Config) -> float:
        assert cell == CELL
        timed.append(config)
        return 2.0 if config == slow else 1.0

    trials = tuning.choose(CELL, [wrong, raising, moving, slow, right], run, time, exact, allowed=1e-3)
    assert timed == [slow, right]
    assert [trial.config for trial in trials[:2]] == [right, slow]
    refusals = {trial.config: trial.refusal for trial in trials[2:]}
    assert refusals[wrong].startswith("error")
    assert refusals[raising] == "RuntimeError: out of resource: shared memory"
    assert refusals[moving] == "two runs gave different bits"


def test_a_tuned_table_keeps_what_was_not_reached() -> None:
    """Chosen cells, and the buckets just below them, take the measured configuration; the rest is the base's."""
    base = read_table(TABLES / "sm_90.json")
    config = Config(columns=32, splits=4)
    cell = Cell("linear", "int4", (1536, 7168), 16)
    table = tuning.table_of("NVIDIA X", {cell: config}, base, {"device": "NVIDIA X"})
    assert [table.choose("linear", "int4", (1536, 7168), rows) for rows in (5, 16)] == [config, config]
    for rows in (1, 64, 4096):
        assert table.choose("linear", "int4", (1536, 7168), rows) == base.choose("linear", "int4", (1536, 7168), rows)
    assert table.choose("linear", "int4", (2048, 7168), 16) == base.choose("linear", "int4", (2048, 7168), 16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
def test_tuning_without_a_gpu_says_so(tmp_path: Path) -> None:
    """`k2quant tune` ends with one line and exit code 2 where there is no GPU, and writes nothing."""
    out = tmp_path / "table.json"
    done = CliRunner().invoke(main, ["tune", "--minutes", "1", "-o", str(out)])
    assert done.exit_code == 2
    assert "finds no CUDA" in done.stderr
    assert not out.exists()


def test_warmup_runs_each_kind_once() -> None:
    """Equal weights are run once for each height; experts too; the number of runs is returned."""
    packed, scale = torch.zeros(64, 4, dtype=torch.int32), torch.ones(64, 1).bfloat16()
    weight = prepare_int4(packed, scale)
    fp8 = prepare_fp8(torch.zeros(64, 32).to(torch.float8_e4m3fn), torch.ones(1, 1))
    stack = prepare_int4(torch.zeros(4, 32, 4, dtype=torch.int32), torch.ones(4, 32, 1).bfloat16())
    alone = warmup([weight])
    assert warmup([weight, weight]) == alone
    assert warmup([weight, fp8], [(stack, stack, stack)] * 3, top=2) == 3 * alone
    assert warmup([weight], rows=1) == 1


def test_json_tables_hold_one_configuration_to_a_line() -> None:
    """A table is read by people: a line of it is one bucket."""
    for path in TABLES.glob("*.json"):
        text = path.read_text()
        buckets = sum(len(buckets) for shapes in json.loads(text)["products"].values() for buckets in shapes.values())
        assert (
            sum(line.strip().startswith(tuple(f'"{bucket}": {{' for bucket in BUCKETS)) for line in text.splitlines())
            == buckets
        )
