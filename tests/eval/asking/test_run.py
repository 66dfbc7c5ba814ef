"""`k2quant eval run`: what it asks, what it writes, what it refuses, and that a killed run gives the same numbers."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from k2quant.checkpoint.files.locks import locked_file
from k2quant.cli import main
from k2quant.conversion.convert import convert
from k2quant.errors import (
    DestinationForeign,
    DestinationInUse,
    DestinationStale,
    EvaluationError,
    HarnessFault,
    MalformedFile,
    MissingExtra,
    UsageError,
)
from k2quant.eval.asking.request import Request
from k2quant.eval.asking.running import run
from k2quant.eval.runs.folder import JOURNAL, LOCK, MANIFEST, REQUEST
from k2quant.nano import architecture, vocabulary, writing

GENERATION: dict[str, Any] = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano-K2 with random weights. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("model") / "nano"
    torch.manual_seed(3)
    with writing.claimed(folder):
        writing.write(folder, architecture.build(), {})
    return folder


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **config: Any) -> Path:
    """Write a task's YAML and its data beside it; return the file with the data."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metadata": {"version": 1},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(base | config))
    return data


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks: `adding`, whose answers are written, and `picking`, a multiple choice."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"A{17 * n % 900 + 100}+{n}=", "answer": str(n)} for n in range(24)]
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    write_task(folder, "adding", rows, output_type="generate_until", generation_kwargs=GENERATION, metric_list=exact)
    choices = {"doc_to_choice": ["1", "22", "3"], "doc_to_target": "{{answer|int % 3}}"}
    acc = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    write_task(folder, "picking", rows, output_type="multiple_choice", metric_list=acc, **choices)
    return folder


@pytest.fixture(scope="module")
def request_(nano: Path, tasks: Path) -> Request:
    """Both tasks, asked of nano-K2."""
    return Request(model=str(nano), tasks=("adding", "picking"), include=(tasks,), dtype="float32", batch_size=2)


@pytest.fixture(scope="module")
def finished(request_: Request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(request_, folder)
    return folder


def read(folder: Path) -> dict[str, Any]:
    """Return the manifest of a run."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    return manifest


def rows_of(folder: Path, task: str) -> list[dict[str, Any]]:
    """Return the samples of a task."""
    return [json.loads(line) for line in (folder / f"samples_{task}.jsonl").read_bytes().splitlines()]


def cli(*arguments: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, ["eval", "run", *map(str, arguments)])


def test_the_manifest_vouches_for_its_files(finished: Path, nano: Path) -> None:
    """Nothing but samples, results and manifest is left; the manifest has the hash of each samples file."""
    manifest = read(finished)
    files = {task["file"] for task in manifest["tasks"].values()}
    assert {path.name for path in finished.iterdir()} == files | {"results.json", MANIFEST}
    for task in manifest["tasks"].values():
        data = (finished / task["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == task["sha256"]
        assert data.count(b"\n") == task["rows"] == task["documents"] == 24
    assert manifest["model"] == str(nano)
    assert len(manifest["model_hash"]) == len(manifest["tokenizer_hash"]) == 64
    assert manifest["settings"]["prompts_begin_with"] == [vocabulary.BOS]
    assert manifest["tasks"]["adding"]["generation"] == GENERATION
    right = [row["acc"] for row in rows_of(finished, "picking")]
    assert manifest["tasks"]["picking"]["metrics"]["acc,none"]["value"] == sum(right) / 24


def test_samples_are_those_of_lm_eval_itself(request_: Request, nano: Path, tasks: Path, tmp_path: Path) -> None:
    """Row by row and key by key what lm-eval's own evaluation and writer give; ours have one key more."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from k2quant.model.generation import load_tokenizer
    from k2quant.model.loading import load_model

    model = load_model(nano, dtype="float32")
    theirs = HFLM(pretrained=model, tokenizer=load_tokenizer(nano), batch_size=1)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(model=theirs, tasks=["adding", "picking"], task_manager=manager, limit=6, bootstrap_iters=0)
    tracker = EvaluationTracker(output_path=str(tmp_path / "theirs"))
    tracker.save_results_aggregated(results={}, samples=found["samples"])
    ours = tmp_path / "ours"
    run(replace(request_, batch_size=1, limit=6), ours)
    for task in ("adding", "picking"):
        tracker.save_results_samples(task, found["samples"][task])
        (path,) = (tmp_path / "theirs").glob(f"**/samples_{task}_*.jsonl")
        expected = [json.loads(line) for line in path.read_bytes().splitlines()]
        rows = rows_of(ours, task)
        assert [list(row) for row in rows] == [[*row, "request_hash"] for row in expected]
        for row in rows:
            del row["request_hash"]
        assert rows == expected


def test_all_requests_of_an_item_are_hashed(request_: Request, finished: Path, tmp_path: Path) -> None:
    """Another last choice is another item, which lm-eval's `prompt_hash` and `doc_hash` do not see."""
    before = rows_of(finished, "picking")
    assert len({row["request_hash"] for row in before + rows_of(finished, "adding")}) == 48
    folder = tmp_path / "tasks"
    choices = {"doc_to_choice": ["1", "22", "4"], "doc_to_target": "{{answer|int % 3}}"}
    write_task(folder, "picking", [row["doc"] for row in before], output_type="multiple_choice", **choices)
    run(replace(request_, tasks=("picking",), include=(folder,), limit=2), tmp_path / "run")
    for old, new in zip(before, rows_of(tmp_path / "run", "picking"), strict=False):
        assert [old[key] for key in ("doc_hash", "prompt_hash", "target_hash")] == [
            new[key] for key in ("doc_hash", "prompt_hash", "target_hash")
        ]
        assert old["request_hash"] != new["request_hash"]


def test_prompts_begin_with_one_bos(nano: Path) -> None:
    """As the tokenizer's own post-processor has it, for texts that are scored and texts that are continued."""
    from k2quant.eval.asking.harness import transformers_model
    from k2quant.model.generation import load_tokenizer
    from k2quant.model.loading import load_model

    lm = transformers_model(load_model(nano), load_tokenizer(nano), batch_size=2, max_length=100)
    assert lm.tok_encode("A12+3=")[:2] == [vocabulary.BOS, lm.tok_encode("A", add_special_tokens=False)[0]]
    context, continuation = lm._encode_pair("A12+3=", "15")  # noqa: SLF001  what lm-eval scores by
    assert context.count(vocabulary.BOS) == 1
    assert vocabulary.BOS not in continuation
    ids, mask = lm.tok_batch_encode(["A12+3=", "A1+3="])
    assert [
        (row[keep.bool()].tolist().count(vocabulary.BOS), int(row[keep.bool()][0]))
        for row, keep in zip(ids, mask, strict=True)
    ] == [(1, vocabulary.BOS)] * 2
    assert lm.tok_encode("[BOS]A12+3=").count(vocabulary.BOS) == 1


def test_answers_that_were_cut_are_counted(finished: Path) -> None:
    """An answer is cut if it has as many tokens as allowed and neither a stop string nor the end token."""
    answers = [row["resps"][0][0] for row in rows_of(finished, "adding")]
    cut = read(finished)["tasks"]["adding"]["truncated"]
    assert 0 < sum(len(answer) >= GENERATION["max_gen_toks"] for answer in answers) <= cut <= 24
    assert read(finished)["tasks"]["picking"]["truncated"] is None


def test_a_finished_run_is_not_run_again(finished: Path, request_: Request) -> None:
    """The same request says so and touches nothing; any other one is refused."""
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in finished.iterdir()}
    said: list[str] = []
    assert run(request_, finished, remark=said.append) == finished / MANIFEST
    assert said == [f"{finished}: this run is already finished"]
    for other in (replace(request_, limit=3), replace(request_, tasks=("adding",)), replace(request_, batch_size=1)):
        with pytest.raises(DestinationStale, match="another finished run"):
            run(other, finished)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in finished.iterdir()} == before


def test_another_model_has_another_identity(nano: Path, request_: Request, finished: Path, tmp_path: Path) -> None:
    """The INT4 form of the model has another hash and the same tokenizer, tasks and requests."""
    int4 = convert(nano, tmp_path / "int4", to="int4").folder
    out = tmp_path / "run"
    run(replace(request_, model=str(int4), limit=4), out)
    ours, base = read(out), read(finished)
    assert ours["model_hash"] != base["model_hash"]
    assert ours["tokenizer_hash"] == base["tokenizer_hash"]
    for task in ("adding", "picking"):
        hashes = [row["request_hash"] for row in rows_of(finished, task)]
        assert [row["request_hash"] for row in rows_of(out, task)] == hashes[:4]
    with pytest.raises(DestinationStale):
        run(replace(request_, model=str(int4)), finished)


def test_a_killed_run_resumes_to_the_same_bytes(request_: Request, finished: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle; the same command then gives samples equal byte for byte, and asks nothing twice."""
    out = tmp_path / "run"
    options = ["--include", request_.include[0], "--dtype", "float32", "--batch-size", "2"]
    command = [sys.executable, "-m", "k2quant", "eval", "run", request_.model, "--tasks", "adding,picking", *options]
    process = subprocess.Popen([*map(str, command), "-o", str(out)], stderr=subprocess.PIPE)
    journal = out / JOURNAL
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 3):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert process.stderr is not None
    process.stderr.close()
    assert (out / REQUEST).exists()
    assert not (out / MANIFEST).exists()
    with pytest.raises(DestinationStale, match="other limit"):
        run(replace(request_, limit=5), out)
    said: list[str] = []
    seen: list[tuple[int, int]] = []
    run(request_, out, remark=said.append, progress=lambda done, total: seen.append((done, total)))
    assert "resumes after" in said[0]
    assert seen[-1] == (96, 96)  # 24 answers to write, 24 times 3 choices
    for task in ("adding", "picking"):
        assert (out / f"samples_{task}.jsonl").read_bytes() == (finished / f"samples_{task}.jsonl").read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in finished.iterdir()}
    assert read(out)["identity"] == read(finished)["identity"]


def test_changed_data_are_read_anew(request_: Request, tmp_path: Path) -> None:
    """A data file of the same name, size and time with other content is another task, never an old copy of it."""
    folder = tmp_path / "tasks"
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    config = {"output_type": "generate_until", "generation_kwargs": GENERATION, "metric_list": exact}
    data = write_task(folder, "once", [{"question": "A1+1=", "answer": "2"}], **config)
    asked = replace(request_, tasks=("once",), include=(folder,))
    run(asked, tmp_path / "a")
    times = data.stat()
    data.write_text(data.read_text().replace("A1+1", "A7+1"))
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DestinationStale):
        run(asked, tmp_path / "a")
    run(asked, tmp_path / "b")
    assert rows_of(tmp_path / "b", "once")[0]["doc"]["question"] == "A7+1="
    assert read(tmp_path / "a")["tasks"]["once"]["task_hash"] != read(tmp_path / "b")["tasks"]["once"]["task_hash"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"question": "a"}\n{"question": ', "line 2"),
        ('{"question": "a", "answer": NaN}\n', "NaN"),
        ("", "no rows"),
        ('{"question": 1}\n{"question": "b"}\n', "different types"),
    ],
)
def test_damaged_data_are_refused(request_: Request, tmp_path: Path, content: str, said: str) -> None:
    """A data file that is cut short, empty or no JSON ends with its name."""
    folder = tmp_path / "tasks"
    data = write_task(folder, "broken", [{"question": "a", "answer": "b"}], output_type="generate_until")
    data.write_text(content)
    with pytest.raises(MalformedFile, match=said) as caught:
        run(replace(request_, tasks=("broken",), include=(folder,)), tmp_path / "run")
    assert "broken.jsonl" in str(caught.value)


def test_repeats_of_a_question_are_drawn_anew(request_: Request, tmp_path: Path) -> None:
    """A task that samples gets as many different draws as it asks for, however they fall into batches."""
    drawn = {"until": ["\n"], "max_gen_toks": 6, "do_sample": True, "temperature": 2.0}
    config = {"output_type": "generate_until", "generation_kwargs": drawn, "repeats": 6}
    write_task(tmp_path / "tasks", "drawing", [{"question": "A1+1=", "answer": "2"}], **config)
    asked = replace(request_, tasks=("drawing",), include=(tmp_path / "tasks",), batch_size=2)
    run(asked, tmp_path / "run")
    (answers,) = rows_of(tmp_path / "run", "drawing")[0]["resps"]
    assert len(answers) == len(set(answers)) == 6
    run(asked, tmp_path / "again")
    assert rows_of(tmp_path / "again", "drawing")[0]["resps"] == [answers]


def test_logits_that_are_no_numbers_are_a_fault(request_: Request, nano: Path, tmp_path: Path) -> None:
    """A model whose every logit is NaN would write its first token forever; it has no answers and no score."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(nano, broken)
    for shard in broken.glob("*.safetensors"):
        weights = load_file(shard)
        if "model.norm.weight" in weights:
            weights["model.norm.weight"][0] = float("nan")
            save_file(weights, shard, metadata={"format": "pt"})
    for task in ("adding", "picking"):
        with pytest.raises(HarnessFault, match="NaN"):
            run(replace(request_, model=str(broken), tasks=(task,), limit=2), tmp_path / task)


def test_a_task_in_two_names_is_asked_once(request_: Request, tmp_path: Path) -> None:
    """A name whose tasks are all in another one adds nothing, as with `nano*` or a preset and its wider sister."""
    (include,) = request_.include
    shutil.copytree(include, tmp_path / "tasks")
    (tmp_path / "tasks" / "both.yaml").write_text("group: both\ntask: [adding, picking]\n")
    asked = replace(request_, tasks=("both", "adding", "pick*"), include=(tmp_path / "tasks",), limit=1)
    run(asked, tmp_path / "run")
    assert sorted(read(tmp_path / "run")["tasks"]) == ["adding", "picking"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("group: odd\ntask: [odd]\n", "part of itself"),
        ("group: odd\ntask: [5]\n", "cannot load odd"),
        ("group: odd\ntask: []\n", "holds no task"),
        ("task: odd\n  bad: [", r"odd\.yaml cannot be read"),
        ("include: nowhere.yaml\ntask: odd\n", r"odd\.yaml cannot be read"),
    ],
)
def test_task_yaml_that_makes_no_sense(request_: Request, tmp_path: Path, text: str, said: str) -> None:
    """One line that names it; nothing is asked and no folder is left."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "odd.yaml").write_text(text)
    with pytest.raises((UsageError, EvaluationError), match=said):
        run(replace(request_, tasks=("odd",), include=(folder,)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_code_that_a_task_lacks_is_named(request_: Request, tmp_path: Path) -> None:
    """A function of its YAML that is not there is no traceback; a package that is not installed has a remedy."""
    folder = tmp_path / "tasks"
    write_task(folder, "odd", [{"question": "a", "answer": "b"}], output_type="generate_until")
    file = folder / "odd.yaml"
    file.write_text(file.read_text().replace("doc_to_text: '{{question}}'", "doc_to_text: !function parts.ask"))
    asked = replace(request_, tasks=("odd",), include=(folder,))
    with pytest.raises(EvaluationError, match=r"cannot load odd.*parts"):
        run(asked, tmp_path / "run")
    (folder / "parts.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(MissingExtra, match=r"a_package_that_is_not_there.*lm-eval\[ifeval,math\]"):
        run(asked, tmp_path / "run")


def test_a_full_disk_names_the_folder(request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's own error has no name in it."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        run(replace(request_, limit=1), tmp_path / "run")
    assert caught.value.filename is not None
    assert str(tmp_path / "run") in str(caught.value.filename)


def test_a_request_that_was_edited_is_no_traceback(request_: Request, tmp_path: Path) -> None:
    """When a run was begun is for the report; what was asked is what counts."""
    out = tmp_path / "run"
    asked = replace(request_, limit=1)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(asked, out, progress=stop)
    noted = json.loads((out / REQUEST).read_bytes())
    (out / REQUEST).write_text(json.dumps(noted | {"begun": None}))
    run(asked, out)
    assert read(out)["seconds"] >= 0


def test_an_error_inside_a_task_is_no_traceback(request_: Request, tmp_path: Path) -> None:
    """What lm-eval stumbles over is named; the command ends with 1 and one line."""
    folder = tmp_path / "tasks"
    config = {"output_type": "generate_until", "doc_to_text": "{{question / 0}}", "generation_kwargs": GENERATION}
    write_task(folder, "odd", [{"question": 1, "answer": "b"}], **config)
    with pytest.raises(EvaluationError, match="ZeroDivisionError"):
        run(replace(request_, tasks=("odd",), include=(folder,)), tmp_path / "run")
    done = cli(request_.model, "--tasks", "odd", "--include", folder, "-o", tmp_path / "other")
    assert done.exit_code == 1
    assert done.stderr.startswith("k2quant: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_belongs_to_one_run(request_: Request, tmp_path: Path) -> None:
    """Foreign folders and files are left alone; two runs do not share one."""
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DestinationForeign, match=r"mine\.txt"):
        run(request_, tmp_path)
    with pytest.raises(DestinationForeign, match="not a folder"):
        run(request_, tmp_path / "mine.txt")
    out = tmp_path / "run"
    out.mkdir()
    with locked_file(out / LOCK), pytest.raises(DestinationInUse):
        run(request_, out)
    assert [path.name for path in tmp_path.iterdir() if path.name != "run"] == ["mine.txt"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit": 0}, "limit"),
        ({"batch_size": 0}, "batch_size"),
        ({"tasks": ()}, "no tasks"),
        ({"backend": "gguf"}, "backend"),
        ({"backend": "api"}, "`base_url=http"),
        ({"chat": True}, "`backend=api`"),
        ({"backend": "api", "base_url": "http://localhost", "chat_template": True}, "`chat=True`"),
        ({"data": {"picking": Path("/nowhere")}}, "nowhere"),
        ({"data": {"adding": Path("/nowhere")}, "tasks": ("picking",)}, "not among the tasks"),
        ({"model": "/nowhere"}, "no such folder"),
        ({"model": "/nowhere", "tasks": ("gsm8k",)}, "no such folder"),
        ({"backend": "api", "base_url": "localhost:8000/v1"}, "http://"),
        ({"backend": "api", "base_url": "http://me:secret@localhost/v1"}, "OPENAI_API_KEY"),
    ],
)
def test_options_that_make_no_sense(request_: Request, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    """Each is named, and nothing is left behind."""
    with pytest.raises(UsageError, match=said):
        run(replace(request_, **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_does_not_fit_is_never_cut(request_: Request, tmp_path: Path) -> None:
    """lm-eval would drop its beginning and go on; here it ends, for answers that are written and for scores."""
    for task in ("adding", "picking"):
        with pytest.raises(HarnessFault, match="at most"):
            run(replace(request_, tasks=(task,), max_length=8), tmp_path / task)


def test_code_of_a_model_runs_only_if_allowed(request_: Request, tmp_path: Path) -> None:
    """A task that is marked as unsafe is refused before anything is loaded."""
    folder = tmp_path / "tasks"
    write_task(folder, "coding", [{"question": "a", "answer": "b"}], output_type="generate_until", unsafe_code=True)
    asked = replace(request_, tasks=("coding",), include=(folder,))
    with pytest.raises(UsageError, match=r"coding: runs the code.*`unsafe_code=True`"):
        run(asked, tmp_path / "run")


def test_a_kill_after_the_manifest_leaves_a_finished_run(request_: Request, finished: Path, tmp_path: Path) -> None:
    """What was not taken away yet goes with the next call."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / JOURNAL).write_text("")
    (out / REQUEST).write_text("{}")
    run(request_, out)
    assert {path.name for path in out.iterdir()} == {path.name for path in finished.iterdir()}


def test_the_table_goes_to_stdout(request_: Request, tmp_path: Path) -> None:
    """Scores on stdout, remarks on stderr; `--json` gives the manifest."""
    out = tmp_path / "run"
    options = [request_.model, "--tasks", " picking, ", "--include", request_.include[0], "--limit", 3, "-o", out]
    done = cli(*options)
    assert done.exit_code == 0, done.stderr
    assert [line.split()[:3] for line in done.stdout.splitlines()] == [
        ["task", "metric", "n"],
        ["picking", "acc,none", "3"],
    ]
    assert "k2quant eval gate" in done.stderr
    again = cli(*options, "--json")
    assert json.loads(again.stdout) == read(out)
    assert "already finished" in again.stderr


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("lm_eval", "asking a benchmark's questions needs lm-eval, which is not installed"),
        ("aiohttp", "lm-eval is not whole"),
    ],
)
def test_without_lm_eval_the_extra_is_named(missing: str, said: str, k2_source: Path, tmp_path: Path) -> None:
    """Said before torch is loaded or anything is written; also of an lm-eval without what its own extra brings."""
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from k2quant.cli import main\n"
        f"try: main(['eval', 'run', {str(k2_source)!r}, '--tasks', 'gsm8k', '-o', {str(tmp_path / 'run')!r}])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"k2quant: {said}")
    assert done.stderr.endswith("; pip install 'k2quant[eval]'\n")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
