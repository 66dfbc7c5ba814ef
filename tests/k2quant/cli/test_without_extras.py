"""What each command does where its extra is not installed: it works without one, or says which and begins nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import numpy as np
import pytest
from safetensors.numpy import save_file

from bare import Outcome, without
from k2quant.cli import main
from k2quant.conversion.convert import convert
from k2quant.ground.extras import PACKAGES
from places import ROOT

ALL = sorted({name for names in PACKAGES.values() for name in names} | {"datasets", "tensorboard", "triton"})

PLAIN = {
    "convert": "convert --to int4 fp8 out",
    "export gguf": "export gguf fp8 out.gguf --dry-run",
    "export mlx": "export mlx fp8 out-mlx --dry-run",
    "merge": "merge fp8 adapter merged --to int4",
    "clean": "clean int4",
    "push": f"push int4 hf://user/int4@{'0' * 40}",
    "inspect": "inspect fp8",
    "verify": "verify fp8 int4",
    "check": "check --engine vllm fp8",
    "diff": "diff fp8 fp8",
    "demo": "demo demo --steps 2",
    "qat init": "qat init fp8 -o new.yaml",
    "eval gate": "eval gate runs/base runs/other --aa --json",
    "eval plan": "eval plan --power 0.5 --flips 1% --margin 5pp",
}
"""A call of each command that needs no extra."""

NEEDY = {
    "report": ("report", "report int4"),
    "generate": ("run", "generate int4 --prompt a"),
    "calibrate": ("run", "calibrate fp8 new --data data.jsonl"),
    "tune": ("run", "tune"),
    "nano": ("run", "nano new"),
    "eval run": ("eval", "eval run int4 --tasks gsm8k -o new"),
    "eval tools": ("eval", "eval tools int4 -o new"),
    "eval fidelity": ("run", "eval fidelity fp8 int4"),
    "eval blame": ("run", "eval blame fp8 int4"),
    "qat plan": ("qat", "qat plan job.yaml"),
    "qat train": ("qat", "qat train job.yaml"),
    "qat export": ("qat", "qat export int4 new"),
}
"""The extra that each other command names, and a call of it."""

OPTIONS = {
    "convert --device": ("run", "convert --to int4 --device cuda fp8 new"),
    "convert --method gptq": ("run", "convert --to int4 --method gptq --data data.jsonl fp8 new"),
    "eval gate -o": ("report", "eval gate runs/base runs/other -o new"),
}
"""Options that need more than their command."""

PYTHON = {
    "k2quant.load_model": "run",
    "k2quant.convert('fp8', 'new', to='int4', device='cuda')": "run",
    "k2quant.eval.measure_fidelity": "run",
    "k2quant.eval.find_blame": "run",
    "k2quant.calib.calibrate": "run",
    "k2quant.calib.solve": "run",
    "k2quant.eval.run(__import__('k2quant.eval.asking.request').eval.asking.request.Request("
    "model='int4', tasks=('gsm8k',)), __import__('pathlib').Path('new'))": "eval",
    "k2quant.qat.load": "run",
    "__import__('k2quant.report').report.write_html(__import__('pathlib').Path('int4'))": "report",
    "__import__('k2quant.eval.report').eval.report.write_reports(None, 'new')": "report",
}
"""Functions for those who write Python, and the extra that each names."""


@pytest.fixture(scope="module")
def place(k2_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the calls speak of."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "fp8").symlink_to(k2_source)
    convert(k2_source, folder / "int4", to="int4")
    write_adapter(folder / "adapter")
    for name in ("base", "other"):
        write_run(folder / "runs" / name)
    (folder / "job.yaml").write_text("model: fp8\n")
    return folder


def write_adapter(folder: Path) -> None:
    """Write a LoRA of one attention matrix as PEFT does."""
    folder.mkdir()
    module = "base_model.model.model.layers.0.self_attn.o_proj"
    random = np.random.default_rng(0)
    factors = {"lora_A": (2, 256), "lora_B": (512, 2)}
    tensors = {f"{module}.{name}.weight": random.random(shape, np.float32) for name, shape in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none", "peft_version": "0.21.2"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["o_proj"]}))


def write_run(folder: Path) -> None:
    """Write four answers of a task, two of them right, as `lm_eval --log_samples` does."""
    folder.mkdir(parents=True)
    rows = [
        {
            "doc_id": number,
            "doc": {"question": f"ask {number}"},
            "target": "yes",
            "arguments": {"gen_args_0": {"arg_0": f"ask {number}", "arg_1": {}}},
            "resps": [[f"no {number}"]],
            "filtered_resps": [f"no {number}"],
            "filter": "none",
            "metrics": ["exact_match"],
            "doc_hash": f"{number:064x}",
            "prompt_hash": "1" * 64,
            "target_hash": "2" * 64,
            "exact_match": float(number < 2),
        }
        for number in range(4)
    ]
    time = "2026-11-22T09-44-46.769087"
    (folder / f"samples_picking_{time}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "results": {},
        "configs": {"picking": {"output_type": "generate_until"}},
        "versions": {"picking": 1},
        "n-shot": {"picking": 0},
        "n-samples": {"picking": {"original": 4, "effective": 4}},
        "config": {"model": "hf", "model_args": {}, "gen_kwargs": None},
        "model_name": "some/model",
    }
    (folder / f"results_{time}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def outcomes(place: Path) -> Mapping[str, Outcome]:
    """What became of all calls, in one process that can import none of what extras bring."""
    calls = PLAIN | {name: call for name, (_, call) in (NEEDY | OPTIONS).items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        found = without(ALL, commands=[call.split() for call in calls.values()], expressions=list(PYTHON))
    return dict(zip([*calls, *PYTHON], found, strict=True))


def leaves(group: click.Group, path: str = "") -> Iterator[str]:
    """Yield the full names of a group's commands."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from leaves(command, f"{path}{name} ")
        else:
            yield path + name


def test_every_command_is_spoken_of() -> None:
    """Each command of the line says above which extra it needs, or that it needs none."""
    assert isinstance(main, click.Group)
    assert sorted(leaves(main)) == sorted(PLAIN | NEEDY)


def test_the_page_on_installing_says_the_same() -> None:
    """The table of docs/install.md has each command in the row of what it needs, and a row for each extra."""
    lines = (ROOT / "docs" / "install.md").read_text().splitlines()
    cells = [line.split("|") for line in lines if line.startswith("| `.")]
    rows = {row[1].strip(" `."): row[3] for row in cells}
    assert rows.keys() == {"", "[all]", *(f"[{extra}]" for extra in PACKAGES)}
    assert [name for name in PLAIN if f"`{name}`" not in rows[""]] == []
    assert [name for name, (extra, _) in NEEDY.items() if f"`{name}`" not in rows[f"[{extra}]"]] == []


@pytest.mark.parametrize("name", PLAIN)
def test_what_base_installs_is_enough(name: str, outcomes: Mapping[str, Outcome]) -> None:
    """Converting, checking, merging and deciding work without any extra."""
    done = outcomes[name]
    # Two runs of one model are no PASS; a commit is fixed; the source has no tokenizer.
    said = {"eval gate": 4, "push": 2, "check": 3, "export gguf": 1}
    assert done.code == said.get(name, 0), done.stderr
    assert "installed" not in done.stderr or name == "demo"


@pytest.mark.parametrize("name", NEEDY | OPTIONS)
def test_a_command_names_the_extra_that_it_lacks(name: str, outcomes: Mapping[str, Outcome], place: Path) -> None:
    """One line with the command that installs it, exit 1, and nothing written."""
    extra, _ = (NEEDY | OPTIONS)[name]
    done = outcomes[name]
    assert (done.code, done.stdout) == (1, "")
    assert done.stderr.startswith("k2quant: ")
    assert done.stderr.endswith(f"not installed; pip install 'k2quant[{extra}]'\n")
    assert done.stderr.count("\n") == 1
    assert not (place / "new").exists()


@pytest.mark.parametrize("text", PYTHON)
def test_a_function_names_the_extra_that_it_lacks(text: str, outcomes: Mapping[str, Outcome]) -> None:
    """The same error in Python, and no ImportError."""
    done = outcomes[text]
    assert done.stderr.startswith("MissingExtra: ")
    assert done.stderr.endswith(f"not installed; pip install 'k2quant[{PYTHON[text]}]'")


def test_demo_says_first_where_it_ends(outcomes: Mapping[str, Outcome], place: Path) -> None:
    """With base alone it converts through every format, and says before what it leaves out and what installs that."""
    done = outcomes["demo"]
    assert done.stderr == (
        "note: this demo ends after the conversions, without nano-K2 and the gate: torch, transformers, accelerate, "
        "lm-eval and matplotlib not installed; pip install 'k2quant[eval]'\n"
    )
    assert "fp8>int4>fp8" in done.stdout
    assert "nano-K2" not in done.stdout
    assert (place / "demo" / "fp8-int4-fp8" / "config.json").exists()


@pytest.mark.parametrize(
    ("package", "extra", "call"),
    [
        ("matplotlib", "qat", "qat train job.yaml"),
        ("accelerate", "run", "nano new"),
        ("lm_eval", "eval", "eval run int4 --tasks gsm8k -o new"),
    ],
)
def test_a_part_of_an_extra_is_missed_before_anything_begins(package: str, extra: str, call: str, place: Path) -> None:
    """Of an extra that is there but for one package, that one is named, and nothing heavy is loaded first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        done, loaded = without([package], commands=[call.split()], expressions=["'torch' in __import__('sys').modules"])
    assert done.code == 1
    assert f" needs {package.replace('_', '-')}, which is not installed; pip install 'k2quant[{extra}]'" in done.stderr
    assert loaded.stdout == "False"
    assert not (place / "new").exists()
