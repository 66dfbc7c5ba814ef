"""Tables of kernel configurations: what ships, what a user measured, and how a table is made."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from k2quant.cli import main
from k2quant.errors import UsageError
from k2quant.ground.release import HIDDEN, INNER
from k2quant.kernels.devices import gpus
from k2quant.kernels.ops import (
    Fp8Weight,
    PackedWeight,
    fp8_linear_w8a8,
    linear,
    moe,
    prepare_fp8,
    prepare_int4,
    prepare_nvfp4,
    warmup,
)
from k2quant.kernels.products import dispatch
from k2quant.kernels.products.prepare import PACKED
from k2quant.kernels.products.tables import configs
from k2quant.kernels.products.tables.configs import (
    BUCKETS,
    TABLES,
    Config,
    Table,
    bucket_of,
    read_table,
    table_for,
    write_table,
)
from k2quant.kernels.tuning import candidates
from k2quant.kernels.tuning import choosing as tuning
from k2quant.kernels.tuning.candidates import Cell
from k2quant.kernels.tuning.choosing import Trial

if TYPE_CHECKING:
    from k2quant.kernels.devices.launch import Launch

PRODUCTS = tuple(f"{product}/{name}" for name, kind in PACKED.items() for product in kind.products)


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


@pytest.mark.parametrize("form", ["vector", "dequantize"])
@pytest.mark.parametrize("product", ["gate_up/int4", "down/fp8", "w8a8/fp8"])
def test_only_a_dense_product_has_other_forms_than_tiles(product: str, form: str, tmp_path: Path) -> None:
    """A table that has experts or FP8 activations done in a form that they do not know is refused, and says why."""
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"name": "x", "measured": None, "products": {product: {"*": {"1": {"form": form}}}}}))
    with pytest.raises(UsageError, match=f"form `{form}` in {product}, which knows only `tile`"):
        read_table(path)


CELL = Cell("linear", "int4", (64, 96), 4)
SM_90 = read_table(TABLES / "sm_90.json")


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_candidates_fit_the_gpu_and_begin_with_what_ships(path: Path) -> None:
    """The table's own comes first; no other asks for too much shared memory; every product and bucket has some."""
    base = read_table(path)
    for cell in candidates.cells():
        found = candidates.candidates(cell, base=base, shared_limit=227 * 1024, processors=132)
        assert found[0] == base.choose(cell.product, cell.weight_format, cell.shape, cell.rows), str(cell)
        assert 12 <= len(found) <= candidates.CANDIDATES, str(cell)
        assert all(candidates.shared_bytes(config, cell) <= 227 * 1024 for config in found[1:])
        assert len(set(found)) == len(found)


def test_candidates_are_of_every_kind() -> None:
    """For few rows there are vectors, the path that x is the left factor in, deep tiles, few warps and odd splits."""
    for cell in candidates.cells():
        found = candidates.candidates(cell, base=SM_90, shared_limit=227 * 1024, processors=132)
        vectors = [config for config in found if config.form == "vector"]
        assert len(vectors) == (candidates.VECTORS if cell.product == "linear" and cell.rows == 1 else 0), str(cell)
        assert (Config(form="dequantize") in found) == (cell.product == "linear" and cell.rows >= 256)
        if cell.rows <= 16 and cell.product in {"linear", "gate_up"}:
            assert {config.rows for config in found} >= {8, 16, 32}, str(cell)
        if cell.rows <= 16 and cell.product == "linear" and cell.weight_format == "int4":
            assert {config.depth for config in found} >= {64, 128, 256}, str(cell)
            assert any(config.rows >= 16 and config.depth >= 128 and config.warps <= 2 for config in found), str(cell)
        if cell.product == "gate_up" and cell.rows == 4096:
            assert {config.rows for config in found} >= {64, 128}
    tried = {
        config.splits
        for cell in candidates.cells(["linear"])
        for config in candidates.candidates(cell, base=SM_90, shared_limit=227 * 1024, processors=132)
    }
    assert tried >= {1, 2, 4, 7, 8, 14, 16}


def test_decoding_is_tuned_first() -> None:
    """M goes before the product, and a layer's gate and up before its down."""
    found = candidates.cells()
    assert [cell.rows for cell in found] == sorted(cell.rows for cell in found)
    formats = len(PACKED)
    assert [cell.product for cell in found[: 2 * formats]] == ["gate_up"] * formats + ["down"] * formats
    assert {cell.product for cell in candidates.cells(["down"])} == {"down"}


def test_long_calls_are_timed_in_shorter_rows() -> None:
    """So many calls are timed together as take 20 ms, but at least four."""
    assert [tuning.calls_for(seconds, 20) for seconds in (0, 1e-4, 2e-3, 0.5)] == [20, 20, 10, 4]


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
    assert refusals[raising] == "while it was run: RuntimeError: out of resource: shared memory"
    assert refusals[moving] == "two runs gave different bits"


def test_what_fails_is_refused_and_the_rest_goes_on() -> None:
    """Triton's own errors, which are no RuntimeError, refuse one configuration, whether it is run or timed."""
    errors = pytest.importorskip("triton.runtime.errors")
    exact = torch.ones(4, 64).double()
    large, broken, right, empty = (Config(columns=columns) for columns in (256, 128, 64, 32))

    def run(config: Config) -> Tensor:
        if config == large:
            raise errors.OutOfResources(300000, 232448, "shared memory")
        return exact.float()

    def time(_: Cell, config: Config) -> float:
        if config == broken:
            raise errors.PTXASError("line one\nline two")
        if config == empty:
            raise AssertionError
        return 1.0

    trials = tuning.choose(CELL, [large, broken, empty, right], run, time, exact, allowed=1e-3)
    assert trials[0] == Trial(right, 1.0)
    assert {trial.config: trial.refusal for trial in trials[1:]} == {
        large: (
            "while it was run: OutOfResources: out of resource: shared memory, Required: 300000, Hardware limit: "
            "232448. Reducing block sizes or `n"
        ),
        broken: "while it was timed: PTXASError: PTXAS error: line one",
        empty: "while it was timed: AssertionError",
    }


def test_trials_count_when_the_time_is_over() -> None:
    """What a cell has timed when time runs out is returned; nothing more is tried."""
    exact = torch.ones(4, 64).double()
    configs = [Config(columns=columns) for columns in (32, 64, 128)]
    timed: list[Config] = []

    def time(_: Cell, config: Config) -> float:
        timed.append(config)
        return 1.0

    def over() -> bool:
        return len(timed) == 2

    trials = tuning.choose(CELL, configs, lambda _: exact.float(), time, exact, allowed=1e-3, over=over)
    assert [trial.config for trial in trials] == timed == configs[:2]


def rows_agree(table: Table) -> bool:
    """Say whether gate_up and down have equal rows for both formats in every bucket, for K2's shapes and others."""
    shapes = ((INNER, HIDDEN), (64, 96))
    return all(
        table.choose("gate_up", kind, shape, rows).rows == table.choose("down", kind, shape[::-1], rows).rows
        for kind in PACKED
        for shape in shapes
        for rows in BUCKETS
    )


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_tables_have_equal_rows_for_both_products_of_a_layer(path: Path) -> None:
    """A layer of experts cuts its tokens into blocks once."""
    assert rows_agree(read_table(path))
    assert tuning.paired(read_table(path)) == read_table(path)


def test_pairing_gives_down_the_rows_of_gate_up() -> None:
    """Where a table's rows differ, or stand under other names or buckets, those of gate_up hold; the rest stays."""
    inward = {"*": {16: Config(rows=8), 4096: Config(rows=64)}, "32x96": {4096: Config(rows=32)}}
    outward = {"*": {4096: Config(rows=16, columns=128)}, "64x32": {64: Config(rows=128)}}
    each = {
        f"{product}/{kind}": shapes for product, shapes in (("gate_up", inward), ("down", outward)) for kind in PACKED
    }
    table = Table("x", None, each)
    fixed = tuning.paired(table)
    assert rows_agree(fixed)
    assert fixed.choose("down", "int4", (96, 32), 1) == Config(rows=32, columns=128)
    assert [fixed.choose("down", "fp8", (64, 32), rows).rows for rows in (1, 4096)] == [8, 64]
    assert fixed.choose("down", "int4", (7, 7), 16) == Config(rows=8, columns=128)
    assert fixed.products["gate_up/int4"] == inward
    assert not rows_agree(table)


def test_tuned_rows_agree_whenever_the_time_is_over() -> None:
    """After any number of cells the table is paired, and down was tried only with the rows gate_up has by then."""
    dice = random.Random(0)  # noqa: S311 - no secret

    def any_of(cell: Cell, table: Table) -> list[Trial]:
        found = candidates.candidates(cell, base=table, shared_limit=227 * 1024, processors=132)
        if cell.product == "down":
            rows = table.choose("gate_up", cell.weight_format, cell.shape[::-1], cell.rows).rows
            assert {config.rows for config in found} == {rows}
        return [Trial(dice.choice(found), 1.0)] if dice.random() < 0.7 else [Trial(found[0], None, "refused")]

    for products in (["gate_up", "down"], ["down"], ["gate_up"]):
        wanted = candidates.cells(products)  # type: ignore[arg-type]
        count = 0
        for cell, trials, table in tuning.tune_cells(wanted, "GPU", SM_90, {"date": "x"}, any_of, lambda: False):
            count += 1
            assert rows_agree(table), str(cell)
            if trials[0].seconds is not None:
                assert table.choose(cell.product, cell.weight_format, cell.shape, cell.rows) == trials[0].config
                assert (table.name, table.measured) == ("GPU", {"date": "x"})
        assert count == len(wanted)


def test_each_cell_is_on_disk_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopping `k2quant tune` loses only the cell that it was busy with, and says where the others are."""
    pytest.importorskip("triton")
    from k2quant.kernels.tuning import on_gpu as tuner_cuda

    out = tmp_path / "table.json"

    def stopped(*_: object, **__: object) -> Iterator[tuple[Cell, list[Trial], Table]]:
        yield CELL, [Trial(Config(), None, "while it was run: PTXASError: no")], SM_90
        assert not out.exists()
        yield CELL, [Trial(Config(), 1e-6)], SM_90
        assert read_table(out) == SM_90
        raise KeyboardInterrupt

    monkeypatch.setattr("k2quant.kernels.devices.driver.refuse_without_driver", lambda *_, **__: None)
    monkeypatch.setattr(gpus, "require_gpu", torch.device)
    monkeypatch.setattr(tuner_cuda, "tune", stopped)
    done = CliRunner().invoke(main, ["tune", "-o", str(out)])
    assert done.exit_code == 130
    assert f"wrote {out}" in done.stderr
    assert "refused linear/int4 64x96 M=4: Config(" in done.stderr
    assert "linear/int4 64x96 M=4: 1.0 us" in done.stdout
    assert read_table(out) == SM_90


def test_a_tuned_table_keeps_what_was_not_reached() -> None:
    """Chosen cells, and the buckets just below them, take the measured configuration; the rest is the base's."""
    base = SM_90
    config = Config(columns=32, splits=4)
    cell = Cell("linear", "int4", (1536, 7168), 16)
    table = tuning.table_of("NVIDIA X", {cell: config}, base, {"device": "NVIDIA X"})
    assert [table.choose("linear", "int4", (1536, 7168), rows) for rows in (9, 16)] == [config, config]
    for rows in (1, 64, 4096):
        assert table.choose("linear", "int4", (1536, 7168), rows) == base.choose("linear", "int4", (1536, 7168), rows)
    assert table.choose("linear", "int4", (2048, 7168), 16) == base.choose("linear", "int4", (2048, 7168), 16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
def test_tuning_without_a_gpu_says_so(tmp_path: Path) -> None:
    """`k2quant tune` ends with one line and exit code 2 where there is no GPU, and writes nothing."""
    out = tmp_path / "table.json"
    done = CliRunner().invoke(main, ["tune", "--minutes", "1", "-o", str(out)])
    assert done.exit_code == 2
    assert "`cuda` is not available" in done.stderr
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
    assert warmup([weight, fp8], w8a8=True) == 3 * alone


def stack_of(kind: str, *shape: int) -> PackedWeight:
    """Return a weight of zeros in a GPU's layout."""
    if kind == "nvfp4":
        codes = torch.zeros(*shape[:-1], shape[-1] // 2, dtype=torch.uint8)
        scale = torch.full((*shape[:-1], shape[-1] // 16), 0x38, dtype=torch.uint8)
        return prepare_nvfp4(codes, scale, torch.ones(shape[:-2]), divides=False)
    if kind == "int4":
        packed = torch.zeros(*shape[:-1], shape[-1] // 8, dtype=torch.int32)
        return prepare_int4(packed, torch.ones(*shape[:-1], shape[-1] // 32).bfloat16(), layout="groups")
    return prepare_fp8(torch.zeros(shape).to(torch.float8_e4m3fn), torch.ones(*shape[:-2], 1, 1))


@pytest.mark.parametrize(
    ("kind", "experts"), [*((kind, experts) for kind in ("int4", "fp8") for experts in (48, 256, 384)), ("nvfp4", 48)]
)
def test_nothing_is_compiled_after_warming_up(kind: str, experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of rows or tokens, a kernel is launched only as it was launched while warming up."""
    pytest.importorskip("triton")
    from k2quant.kernels.devices.launch import recorded

    monkeypatch.setattr(dispatch, "on_triton", lambda _: True)
    monkeypatch.setattr(dispatch, "table_of", lambda _: SM_90)
    monkeypatch.setattr(dispatch, "_capability", lambda _: (9, 0))
    weight = stack_of(kind, 64, 96)
    layer = stack_of(kind, experts, 32, 64), stack_of(kind, experts, 32, 64), stack_of(kind, experts, 64, 32)

    def kinds(launches: list[Launch]) -> set[tuple[object, ...]]:
        return {
            (
                launch.kernel.__name__,
                launch.warps,
                launch.stages,
                tuple(sorted(launch.constants.items())),
                tuple(getattr(value, "dtype", type(value)) for value in launch.arguments.values()),
            )
            for launch in launches
        }

    with recorded() as warm:
        warmup([weight], [layer], rows=200, w8a8=True, ids_dtype=torch.int32, weights_dtype=torch.bfloat16)
    with recorded() as later:
        for rows in range(1, 201):
            x = torch.zeros(rows, 96, dtype=torch.bfloat16)
            ids, shares = torch.zeros(rows, 8, dtype=torch.int32), torch.zeros(rows, 8, dtype=torch.bfloat16)
            linear(x, weight)
            moe(x[:, :64], *layer, ids, shares)
            if isinstance(weight, Fp8Weight):
                fp8_linear_w8a8(x, weight)
    assert {launch.kernel.__name__ for launch in later} >= {"_linear", "_gate_up", "_down", "_combine", "_place"}
    assert kinds(later) <= kinds(warm)


def test_few_tokens_and_many_are_rehearsed() -> None:
    """Low tiles are compiled both for pairs that are sorted by expert and for those that are not; each kernel once."""
    pytest.importorskip("triton")
    from k2quant.kernels.tuning.compiling import rehearse

    def forms(rows: int, **options: Any) -> list[tuple[str, bool]]:
        found = rehearse("down", "int4", (7168, 2048), Config(rows=rows), **options)
        return [(launch.kernel.__name__, launch.constants["DIRECT"]) for launch in found]

    assert sorted(forms(16)) == [("_back", False), ("_back", True), ("_down", False), ("_down", True)]
    assert sorted(forms(64)) == [("_back", False), ("_down", False)]
    assert forms(16, tokens=(12,), backward=False) == [("_down", True)]
    assert forms(16, tokens=(16,), backward=False) == [("_down", False)]


def test_both_forms_of_a_bucket_are_checked() -> None:
    """Of 9 to 16 tokens some are sorted by expert and some not; elsewhere the cell's own number tells all."""
    pytest.importorskip("triton")
    from k2quant.kernels.tuning.on_gpu import checked_tokens

    found = {cell.rows: checked_tokens(cell) for cell in candidates.cells(["gate_up"])}
    assert found == {1: (1,), 8: (8,), 16: (16, 12), 64: (64,), 256: (256,), 1024: (512,), 4096: (512,)}


def test_json_tables_hold_one_configuration_to_a_line() -> None:
    """A table is read by people: a line of it is one bucket."""
    for path in TABLES.glob("*.json"):
        text = path.read_text()
        buckets = sum(len(buckets) for shapes in json.loads(text)["products"].values() for buckets in shapes.values())
        assert (
            sum(line.strip().startswith(tuple(f'"{bucket}": {{' for bucket in BUCKETS)) for line in text.splitlines())
            == buckets
        )
