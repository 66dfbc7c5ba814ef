"""Checkpoints of equal values in several formats: no drift at all, and some if one bit differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from k2quant.checkpoint.reader import open_checkpoint
from k2quant.cli import main
from k2quant.conversion.convert import convert
from k2quant.eval.drift.blame import find_blame
from k2quant.eval.drift.fidelity import measure_fidelity
from k2quant.eval.drift.findings import Fidelity
from k2quant.nano import vocabulary

LETTERS = "In the beginning 17 + 25 = 42; then (x, y) -> y!\n"
OPTIONS: dict[str, Any] = {"context": 61, "tokens": 120}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text in ASCII, which nano-K2's tokenizer reads character by character."""
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text(LETTERS * 60)
    return path


@pytest.fixture(scope="module")
def equals(
    k2_source: Path, k2_thinking: Path, k2_mixed: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """By format a checkpoint and its exact BF16 conversion, and one whose BF16 has layers of experts half decoded."""
    room, found = tmp_path_factory.mktemp("equals"), {}
    for name, source in {"fp8": k2_source, "int4": k2_thinking, "mixed": k2_mixed}.items():
        own = Path(shutil.copytree(source, room / name))
        for file, data in vocabulary.files().items():
            (own / file).write_bytes(data)
        found[name] = own, convert(own, room / f"{name}-bf16", to="bf16").folder
    recipe = {"version": 1, "rules": [{"match": r"experts\.[0-2]\.|up_proj", "to": "bf16"}, {"to": "fp8"}]}
    half = convert(found["fp8"][0], room / "half", recipe=recipe, allow_split=True).folder
    return found | {"half": (found["fp8"][0], half)}


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run torch on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _nothing(found: Fidelity) -> bool:
    """Tell whether every figure is exactly that of no difference."""
    sums = [found.kl, found.reverse_kl, found.log_ratio]
    return (
        all((one.value, one.error) == (0, 0) for one in sums)
        and (found.kl_max, found.same_top.value, found.base_perplexity) == (0, 1, found.candidate_perplexity)
        and all((one.relative_mse, one.cosine, one.kl) == (0, 1, 0) for one in found.layers)
        and all({one.overlap, one.same_experts} <= {None, 1} and not one.load_shift for one in found.layers)
    )


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["fp8", "int4", "mixed", "half"])
def test_equal_values_drift_by_nothing(name: str, dtype: str, equals: dict[str, tuple[Path, Path]], text: Path) -> None:
    """In whatever format each layer, expert or projection is, in both dtypes, on one thread and on several."""
    assert _nothing(measure_fidelity(*equals[name], text=text, dtype=dtype, **OPTIONS))


def test_equal_values_drift_by_nothing_over_lines_and_rows(
    equals: dict[str, tuple[Path, Path]], text: Path, tmp_path: Path
) -> None:
    """Texts of many lengths, and rows of which completions alone are scored; and whichever of the two is the base."""
    one, other = equals["int4"]
    assert _nothing(measure_fidelity(other, one, text=text, lines=True, **OPTIONS))
    rows = [{"prompt": LETTERS[:cut], "completion": LETTERS[cut:]} for cut in (3, 17, 31)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert _nothing(measure_fidelity(one, other, text=path, **OPTIONS))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_fused_kernels_alone_would_drift(dtype: str, equals: dict[str, tuple[Path, Path]], text: Path) -> None:
    """By the fused kernels the same two drift a little: what `decoded` takes away is there."""
    assert not _nothing(measure_fidelity(*equals["int4"], text=text, dtype=dtype, backend="auto", **OPTIONS))


@pytest.mark.parametrize("part", ["self_attn.o_proj.weight", "mlp.experts.{}.down_proj.weight", "lm_head.weight"])
def test_one_bit_of_one_weight_is_seen(
    part: str, equals: dict[str, tuple[Path, Path]], text: Path, tmp_path: Path
) -> None:
    """The lowest bit of one BF16 weight: the divergence is above 0, in the layer of that weight for the first time."""
    one, other = equals["int4"]
    damaged = Path(shutil.copytree(other, tmp_path / "damaged"))
    layers = measure_fidelity(one, one, text=text, dtype="float32", **OPTIONS).layers
    visited = next(expert for expert in range(1000) if expert not in layers[-1].never)
    where = "" if part.startswith("lm_head") else f"model.layers.{layers[-1].layer}."
    name = where + part.format(visited)
    entry = open_checkpoint(damaged).tensors[name]
    with (damaged / entry.file).open("r+b") as file:
        file.seek(entry.start)
        values = np.frombuffer(file.read(entry.nbytes), np.uint16)
        place = int(np.argmax(values & 0x7FFF))  # the largest: the same bit of it is worth the most
        file.seek(entry.start + 2 * place)
        file.write((values[place] ^ 1).tobytes())
    found = measure_fidelity(one, damaged, text=text, dtype="float32", **OPTIONS)
    assert found.kl_max > 0
    assert all(layer.relative_mse == 0 for layer in found.layers[:-1])
    assert (found.layers[-1].relative_mse > 0) == bool(where)


def test_blame_of_equal_values_is_nothing_and_stays_so_when_resumed(
    equals: dict[str, tuple[Path, Path]], text: Path, tmp_path: Path
) -> None:
    """Every expert is stored otherwise, the damage is exactly 0; read back from kept measurements it is so again."""
    options = {"text": text, "context": 20, "tokens": 400, "resume": tmp_path / "passes"}
    first, again = (find_blame(*equals["int4"], **options) for _ in range(2))  # type: ignore[arg-type]
    assert first == again
    assert (first.damage.value, first.damage.error, first.classes, first.suspects) == (0, 0, (), ())
    assert first.changed == 96
    assert first.backend == "decoded"


def test_commands_say_what_was_multiplied(equals: dict[str, tuple[Path, Path]], text: Path) -> None:
    """`fidelity` names the products and prints 0; `blame` says that not one bit differs."""
    folders = [*map(str, equals["int4"]), "--text", str(text)]
    said = CliRunner().invoke(main, ["eval", "fidelity", *folders, "--tokens", "60"]).output
    assert "equal values give exactly 0" in said
    assert "KL divergence, nats a token  0 +- 0" in said
    said = CliRunner().invoke(main, ["eval", "blame", *folders, "--tokens", "400", "--context", "20"]).output
    assert "not one bit of a prediction differs" in said
