"""lm-eval's own GSM8K and BIG-Bench-Hard on local files: the same prompts, no network; and the presets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import lm_eval.tasks
import pytest
import torch
from click.testing import CliRunner
from lm_eval.tasks import TaskManager

from k2quant.cli import main
from k2quant.errors import MalformedFile, UsageError
from k2quant.eval.asking.harness import Tasks, load_tasks, own_tasks
from k2quant.eval.asking.localdata import find_files, local_files, read_rows
from k2quant.eval.asking.presets import PRESETS, expand
from k2quant.eval.runs.folder import MANIFEST
from k2quant.nano import architecture, writing
from places import DATA

PARTS = ("boolean_expressions", "date_understanding", "multistep_arithmetic_two")
STYLES = ("zeroshot", "fewshot", "cot_zeroshot", "cot_fewshot")
BBH = [f"bbh_{style}_{part}" for style in STYLES for part in PARTS]


@pytest.fixture(scope="module")
def ours() -> Tasks:
    """The real tasks as `k2quant eval run` loads them from local files."""
    data = {"gsm8k": DATA} | {f"bbh_{style}": DATA / "bbh" for style in STYLES}
    return load_tasks(["gsm8k", *BBH], data=data)


def yaml_of(task: str) -> Path:
    """Return the file that lm-eval keeps a task in."""
    root = Path(lm_eval.tasks.__file__).parent
    if task == "gsm8k":
        return root / "gsm8k" / "gsm8k.yaml"
    style, part = next((style, part) for style in STYLES for part in PARTS if task == f"bbh_{style}_{part}")
    return root / "bbh" / style / f"{part}.yaml"


def from_the_hub(monkeypatch: pytest.MonkeyPatch, task: str) -> Any:
    """Load a task with lm-eval alone, where the hub gives the rows of the local files."""

    def hub(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
        if path == "openai/gsm8k":
            lines = {split: (DATA / f"gsm8k_{split}.jsonl").read_text().splitlines() for split in ("train", "test")}
            rows = {split: [json.loads(line) for line in lines[split]] for split in lines}
        else:
            assert path == "SaylorTwift/bbh"
            rows = {"test": json.loads((DATA / "bbh" / f"{name}.json").read_text())["examples"]}
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows[split]) for split in rows})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    loaded = TaskManager(include_defaults=False).load([str(yaml_of(task))])["tasks"][task]
    loaded.set_fewshot_seed(seed=1234)  # as `simple_evaluate` does
    return loaded


def requests_of(task: Any) -> list[tuple[Any, ...]]:
    """Return every request that lm-eval would send."""
    task.build_all_requests(rank=0, world_size=1)
    return [(instance.doc_id, instance.arguments[0]) for instance in task.instances]


@pytest.mark.parametrize("task", ["gsm8k", *BBH])
def test_prompts_are_those_of_lm_eval(ours: Tasks, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    """All 20 prompts of each task are equal, shots included, and so are targets and settings."""
    theirs = from_the_hub(monkeypatch, task)
    mine = ours.by_name[task]
    prompts = requests_of(mine)
    assert prompts == requests_of(theirs)
    assert len({prompt for _, prompt in prompts}) == 20
    docs = [doc for _, doc in theirs.doc_iterator()]
    assert [mine.doc_to_target(doc) for doc in ours.docs(task)] == [theirs.doc_to_target(doc) for doc in docs]
    kept = {"doc_to_text", "doc_to_target", "metric_list", "num_fewshot", "filter_list", "description"}
    assert {key: mine.get_config(key) for key in kept} == {key: theirs.get_config(key) for key in kept}
    generation = theirs.get_config("generation_kwargs")
    assert mine.get_config("generation_kwargs") == {"max_gen_toks": 1024} | generation


def test_shots_of_gsm8k_come_from_its_train_split(ours: Tasks) -> None:
    """Five examples before each question, all of them in the train file, none in the test file."""
    train = [row["question"] for row in read_rows(DATA / "gsm8k_train.jsonl")]
    test = [row["question"] for row in read_rows(DATA / "gsm8k_test.jsonl")]
    for place, prompt in requests_of(ours.by_name["gsm8k"]):
        *shots, question = prompt.removeprefix("Question: ").split("\n\nQuestion: ")
        assert question == f"{test[place]}\nAnswer:"
        assert [sum(shot.startswith(text + "\nAnswer: ") for text in train) for shot in shots] == [1] * 5


def test_a_run_makes_no_attempt_at_the_network(tmp_path: Path) -> None:
    """With every connection and name look-up refused, GSM8K and BBH run from local files to their scores."""
    torch.manual_seed(1)
    nano = tmp_path / "nano"
    with writing.claimed(nano):
        writing.write(nano, architecture.build(), {})
    data = ["--data", f"gsm8k={DATA}", "--data", f"bbh_zeroshot={DATA / 'bbh'}"]
    tasks = ["--tasks", "gsm8k,bbh_zeroshot_date_understanding", "--limit", "2", "--max-new-tokens", "2"]
    command = ["eval", "run", str(nano), *tasks, *data, "--shots", "1", "-o", str(tmp_path / "run")]
    code = (
        "import sys\n"
        "def refuse(event, arguments):\n"
        "    if event in {'socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.sendto'}:\n"
        "        print('NETWORK', event, arguments, file=sys.stderr)\n"
        "        raise OSError('no network')\n"
        "sys.addaudithook(refuse)\n"
        "from k2quant.cli import main\n"
        f"main({command!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "NETWORK" not in done.stderr
    manifest = json.loads((tmp_path / "run" / MANIFEST).read_bytes())
    assert {name: task["documents"] for name, task in manifest["tasks"].items()} == {
        "gsm8k": 2,
        "bbh_zeroshot_date_understanding": 2,
    }
    metrics = manifest["tasks"]["gsm8k"]["metrics"]
    assert metrics.keys() == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert manifest["tasks"]["gsm8k"]["rows"] == 4
    assert manifest["tasks"]["gsm8k"]["truncated"] <= 2


def test_unknown_tasks_are_named_with_near_ones() -> None:
    """A misspelt task ends with what it may have meant."""
    with pytest.raises(UsageError, match=r"'gsm8kk'; did you mean .*gsm8k"):
        load_tasks(["gsm8kk"])


def test_presets_are_tasks_of_lm_eval() -> None:
    """Each name of a preset is a task or group that lm-eval has."""
    known = own_tasks().task_index
    for benchmarks in PRESETS.values():
        assert [benchmark.task for benchmark in benchmarks if benchmark.task not in known] == []
    assert expand(["k2-quick", "arc_easy", "gsm8k"]) == ["gsm8k", "mmlu_stem", "arc_easy"]


def test_presets_are_listed_with_their_differences() -> None:
    """`--list-presets` needs no other option; every benchmark has a line that says how the report asks it."""
    done = CliRunner().invoke(main, ["eval", "run", "--list-presets"])
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert [line for line in lines if line and line[0] != " "] == list(PRESETS)
    assert sum("in the report:" in line for line in lines) == sum(map(len, PRESETS.values()))


def test_files_of_splits_are_found_by_name(tmp_path: Path) -> None:
    """A split's own file comes before one of the dataset's name; two that could be meant are refused."""
    for name in ("train.jsonl", "x_test.jsonl", "part.json"):
        (tmp_path / name).write_text("[]")
    splits, names = ("test", "train"), ("part", "task")
    found = find_files(tmp_path, splits, names=names)
    assert found == {"test": (tmp_path / "x_test.jsonl",), "train": (tmp_path / "train.jsonl",)}
    (tmp_path / "part_test.jsonl").write_text("")
    assert find_files(tmp_path, splits, names=names)["test"] == (tmp_path / "part_test.jsonl",)
    (tmp_path / "part_test.jsonl").unlink()
    (tmp_path / "y_test.json").write_text("")
    with pytest.raises(UsageError, match=r"x_test\.jsonl, y_test\.json"):
        find_files(tmp_path, splits, names=names)
    assert find_files(tmp_path / "part.json", splits, names=names) == {"test": (tmp_path / "part.json",)}


def test_a_file_with_a_wrapper_gives_its_rows(tmp_path: Path) -> None:
    """BBH keeps its rows under `examples`, beside a canary; without a field, the only list is taken, never one row."""
    path = tmp_path / "a.json"
    assert len(read_rows(DATA / "bbh" / "date_understanding.json")) == 20
    path.write_text('{"canary": "x", "examples": [{"a": 1}], "more": [{"a": 2}]}')
    assert read_rows(path, "more") == [{"a": 2}]
    with pytest.raises(MalformedFile, match="no list of rows"):
        read_rows(path)
    path.write_text('[{"a": 1},\n {"a": 2}]')
    assert read_rows(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert read_rows(path) == [{"a": 1}, {"a": 2}]


def test_only_local_json_is_read_by_us(tmp_path: Path) -> None:
    """A YAML that names the hub, a URL or other arguments of a loader is left to `datasets`."""
    path = tmp_path / "a.json"
    path.write_text("[]")
    assert local_files("json", {"data_files": {"test": str(path)}, "field": "x"}) == ({"test": (path,)}, "x")
    assert local_files("json", {"data_files": [str(path)]}) == ({"train": (path,)}, None)
    for other in (
        ("openai/gsm8k", {"data_files": str(path)}),
        ("json", {"data_files": "https://example.org/a.json"}),
        ("json", {"data_files": str(path), "split": "train"}),
        ("json", None),
    ):
        assert local_files(*other) is None
