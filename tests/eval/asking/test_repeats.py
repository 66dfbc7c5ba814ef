"""`eval run` of models that reason, draw and are asked repeatedly: what is scored, what is kept, what a kill leaves."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from lm_eval.api.instance import Instance
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from k2quant.cli import main
from k2quant.cli.eval.run import _show
from k2quant.errors import HarnessFault, UsageError
from k2quant.eval.asking.harness import transformers_model
from k2quant.eval.asking.request import Request
from k2quant.eval.asking.running import run
from k2quant.eval.runs.folder import JOURNAL, MANIFEST
from k2quant.eval.runs.journal import Journal
from k2quant.eval.runs.resuming import Resuming
from tiny import write_model

TEMPLATE = (
    "{%- for m in messages -%}{{ m.role }}:{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}|"
    "{%- endfor -%}{%- if add_generation_prompt -%}assistant:{%- endif -%}"
)


def tokenizer(*, special: bool) -> Any:
    """Return a tokenizer of printable characters, with K2's tags as tokens of their own."""
    words = ["[PAD]", "[EOS]", *map(chr, range(32, 127)), "\n"]
    ids = {word: place for place, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(ids, unk_token=" "))  # noqa: S106  no password
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    names = {"eos_token": "[EOS]", "pad_token": "[PAD]"}
    found = PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, **names)
    found.add_tokens(["<think>", "</think>"], special_tokens=special)
    return found


class Scripted(PreTrainedModel, GenerationMixin):
    """A model that writes what it is told to, whatever is drawn."""

    config_class = PretrainedConfig

    def __init__(self, tokens: Any, answer: Callable[[str], str]) -> None:
        """Answer prompts.

        Args:
            tokens: the tokenizer.
            answer: given the prompt, what is written, without the end token; "..." at its end repeats for ever.
        """
        sizes = {"vocab_size": len(tokens), "num_hidden_layers": 1, "hidden_size": 1, "num_attention_heads": 1}
        options: dict[str, Any] = {**sizes, "eos_token_id": 1, "pad_token_id": 0}
        config = PretrainedConfig(**options)
        super().__init__(config)
        self.tokens, self.answer = tokens, answer
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.generation_config.eos_token_id = 1
        self.scripts: dict[int, list[int]] = {}

    def prepare_inputs_for_generation(self, input_ids: Any, *_: Any, **kwargs: Any) -> dict[str, Any]:
        """Give the whole text each time."""
        del kwargs  # transformers looks for the name
        return {"input_ids": input_ids}

    def forward(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> CausalLMOutput:
        """Return logits `[B, T, V]` whose last ones are sure of what comes next."""
        del attention_mask  # transformers looks for the name
        if not self.scripts:
            self.begin = input_ids.shape[1]
            for place, row in enumerate(input_ids.tolist()):
                text = self.answer(self.tokens.decode([token for token in row if token]))
                endless = text.endswith("...")
                script = self.tokens.encode(text.removesuffix("..."), add_special_tokens=False)
                self.scripts[place] = script + ([self.tokens.encode(".")[0]] * 500 if endless else [1])
        written = input_ids.shape[1] - self.begin
        logits = torch.zeros(len(input_ids), input_ids.shape[1], len(self.tokens))
        for place, script in self.scripts.items():
            logits[place, -1, script[min(written, len(script) - 1)]] = 1e4
        return CausalLMOutput(logits=logits)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Forget the scripts of the batch before."""
        self.scripts = {}
        return super().generate(*args, **kwargs)  # type: ignore[misc]  # it asks for a model of its own kinds


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny K2 with random weights. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("model") / "nano"
    folder.mkdir()
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks: `adding` is written, `silent` rewards an empty answer, `picking` is scored; `all` has them all."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"A{n}+{n}=", "answer": str(2 * n)} for n in range(6)]
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    generation = {"until": ["\n", "Question:"], "max_gen_toks": 60, "do_sample": False}
    base: dict[str, Any] = {
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1},
        "target_delimiter": "",
    }
    written = base | {"output_type": "generate_until", "generation_kwargs": generation, "metric_list": exact}
    acc = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    found: dict[str, dict[str, Any]] = {
        "adding": written | {"doc_to_target": "{{answer}}"},
        "silent": written | {"doc_to_target": "{{''}}"},
        "picking": base
        | {"output_type": "multiple_choice", "doc_to_choice": ["1", "22"], "doc_to_target": 0, "metric_list": acc},
    }
    for name, config in found.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **config}))
    weighing = {"aggregate_metric_list": [{"metric": "exact_match", "weight_by_size": True}]}
    (folder / "all.yaml").write_text(yaml.safe_dump({"group": "all", "task": ["adding", "silent"], **weighing}))
    return folder


@pytest.fixture
def scripted(nano: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Request]:
    """Give a request whose model writes what it is told to."""

    def make(answer: Callable[[str], str], *, special: bool = False, **options: Any) -> Request:
        def load(*_: Any) -> Any:
            tokens = tokenizer(special=special)
            lm = transformers_model(Scripted(tokens, answer), tokens, batch_size=3, max_length=400)
            lm.settings = {}
            return lm

        monkeypatch.setattr("k2quant.eval.asking.models.load", load)
        asked = {"tasks": ("adding",), "include": (tasks,), "batch_size": 3} | options
        return Request(model=str(nano), **asked)  # type: ignore[arg-type]

    return make


def read(folder: Path) -> dict[str, Any]:
    """Return the manifest of a run."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    return manifest


def rows_of(folder: Path, task: str = "adding") -> list[dict[str, Any]]:
    """Return the samples of a task."""
    return [json.loads(line) for line in (folder / f"samples_{task}.jsonl").read_bytes().splitlines()]


def double(prompt: str) -> str:
    """Return the right answer to a prompt of `adding`."""
    return str(2 * int(prompt.rpartition("+")[2].partition("=")[0]))


@pytest.mark.parametrize("special", [False, True])
def test_a_stop_string_inside_the_reasoning_stops_nothing(
    scripted: Callable[..., Request], tmp_path: Path, *, special: bool
) -> None:
    """Through lm-eval's own model: the answer behind the marker is scored, whatever was thought before it."""
    request = scripted(
        lambda prompt: f"<think>\nQuestion: 12\n</think> \n\n{double(prompt)}\n\nQuestion: ...",
        special=special,
        think_end="</think>",
    )
    run(request, tmp_path / "run")
    for row in rows_of(tmp_path / "run"):
        assert row["resps"] == [[row["doc"]["answer"]]]
        assert row["exact_match"] == 1.0
        assert row["cut_in_thought"] is False
        assert row["reasoning"] == "Question: 12"
        assert "repeat" not in row
    task = read(tmp_path / "run")["tasks"]["adding"]
    assert (task["truncated"], task["cut_in_thought"], task["think_end"]) == (0, 0, "</think>")
    assert "repeats" not in task
    run(replace(request, think_end=""), tmp_path / "without")
    assert {row["resps"][0][0] for row in rows_of(tmp_path / "without")} == {"" if special else "<think>"}
    assert "cut_in_thought" not in read(tmp_path / "without")["tasks"]["adding"]


def test_an_answer_that_never_leaves_its_reasoning_is_wrong(scripted: Callable[..., Request], tmp_path: Path) -> None:
    """Whether the limit or the model ended it, even where a metric likes an empty text; and it is counted apart."""

    def answer(prompt: str) -> str:
        number = int(double(prompt)) // 2
        return ["hm\nhm...", "hm", f"hm</think>{2 * number}", "hm</think>", "hm</think>a long answer...", "</think>x"][
            number
        ]

    request = scripted(answer, tasks=("all",), think_end="</think>")
    run(request, tmp_path / "run")
    for task, right in (("adding", [0, 0, 1, 0, 0, 0]), ("silent", [0, 0, 0, 0, 0, 0])):
        rows = rows_of(tmp_path / "run", task)
        assert [row["exact_match"] for row in rows] == right
        assert [row["cut_in_thought"] for row in rows] == [True, True, False, True, False, False]
        assert [row["resps"][0][0] for row in rows[:4]] == ["", "", "4", ""]
        entry = read(tmp_path / "run")["tasks"][task]
        assert (entry["cut_in_thought"], entry["truncated"]) == (3, 2)
        assert entry["metrics"]["exact_match,none"]["value"] == sum(right) / 6
    assert read(tmp_path / "run")["groups"]["all"]["exact_match,none"]["value"] == 1 / 12
    results = json.loads((tmp_path / "run" / "results.json").read_bytes())["results"]
    assert results["adding"]["exact_match,none"] == 1 / 6


def test_a_prompt_that_closed_the_reasoning_is_answered(scripted: Callable[..., Request], tmp_path: Path) -> None:
    """A chat template with an empty block of reasoning: stop strings act at once, and nothing is lost."""
    request = scripted(lambda prompt: f"{double(prompt)}\nand more...", think_end="</think>")
    (include,) = request.include
    own = tmp_path / "tasks"
    own.mkdir()
    text = (include / "adding.yaml").read_text().replace("{{question}}", "{{question}} <think></think>")
    (own / "adding.yaml").write_text(text)
    run(replace(request, include=(own,)), tmp_path / "run")
    task = read(tmp_path / "run")["tasks"]["adding"]
    assert task["metrics"]["exact_match,none"]["value"] == 1
    assert (task["cut_in_thought"], task["truncated"]) == (0, 0)


def test_the_marker_is_known_from_the_checkpoint(scripted: Callable[..., Request], nano: Path, tmp_path: Path) -> None:
    """Its chat template tells; what is worth knowing of such a model is said, and all of it is in the manifest."""
    import shutil

    thinker = tmp_path / "thinker"
    shutil.copytree(nano, thinker)
    (thinker / "chat_template.jinja").write_text(TEMPLATE)
    said: list[str] = []
    request = scripted(lambda prompt: f"hm\n</think>{double(prompt)}", tasks=("adding", "silent"))
    request = replace(request, model=str(thinker), chat_template=True)
    run(request, tmp_path / "run", remark=said.append)
    manifest = read(tmp_path / "run")
    assert manifest["settings"]["think_end"] == "</think>"
    assert manifest["settings"]["think_always"] is True
    assert manifest["tasks"]["adding"]["metrics"]["exact_match,none"]["value"] == 1
    assert any("60 tokens, reasoning included" in line for line in said)
    assert any("`temperature=1.0`" in line for line in said)
    said.clear()
    run(replace(request, chat_template=False, limit=1), tmp_path / "plain", remark=said.append)
    assert "`chat_template=True`" in said[0]
    assert {row["resps"][0][0] for row in rows_of(tmp_path / "plain")} == {"hm"}  # the stop string acts at once


SAMPLED: dict[str, Any] = {"temperature": 1.5, "top_p": 0.95, "seed": 5, "repeats": 3, "max_new_tokens": 5}


@pytest.fixture(scope="module")
def repeated(nano: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Request, Path]:
    """An undisturbed run of three repeats, of real weights. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    names = ("all", "picking")
    request = Request(model=str(nano), tasks=names, include=(tasks,), dtype="float32", batch_size=4, **SAMPLED)
    seen: list[tuple[int, int]] = []
    run(request, folder, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2 * 6 * 3 + 6 * 2, 2 * 6 * 3 + 6 * 2)
    return request, folder


def test_each_repeat_is_a_row_and_a_draw_of_its_own(repeated: tuple[Request, Path]) -> None:
    """One behind another for each document, in its own words; what is scored and not written is asked once."""
    _, folder = repeated
    rows = rows_of(folder)
    assert [(row["doc_id"], row["repeat"]) for row in rows] == [
        (doc, repeat) for doc in range(6) for repeat in range(3)
    ]
    for place in range(0, 18, 3):
        assert len({row["resps"][0][0] for row in rows[place : place + 3]}) > 1
        assert len({row["request_hash"] for row in rows[place : place + 3]}) == 1
    assert len(rows_of(folder, "picking")) == 6
    assert "repeat" not in rows_of(folder, "picking")[0]
    manifest = read(folder)
    assert (manifest["tasks"]["adding"]["repeats"], manifest["tasks"]["adding"]["documents"]) == (3, 6)
    assert "repeats" not in manifest["tasks"]["picking"]
    assert [manifest["settings"][key] for key in ("temperature", "top_p", "seed", "repeats")] == [1.5, 0.95, 5, 3]
    drawn = {"do_sample": True, "temperature": 1.5, "top_p": 0.95}
    assert drawn.items() <= manifest["tasks"]["adding"]["generation"].items()


def test_a_sample_follows_from_its_seed_alone(repeated: tuple[Request, Path], tmp_path: Path) -> None:
    """Fewer repeats, other batches and one task alone draw the same; another seed draws otherwise."""
    request, folder = repeated
    first = [row["resps"] for row in rows_of(folder) if row["repeat"] == 0]
    run(replace(request, tasks=("adding",), repeats=1, batch_size=2), tmp_path / "once")
    assert [row["resps"] for row in rows_of(tmp_path / "once")] == first
    run(replace(request, tasks=("adding",), repeats=1, seed=6), tmp_path / "other")
    assert [row["resps"] for row in rows_of(tmp_path / "other")] != first


def test_a_killed_run_with_repeats_resumes_to_the_same_bytes(repeated: tuple[Request, Path], tmp_path: Path) -> None:
    """SIGKILL in the middle; the same command then gives samples equal byte for byte."""
    request, whole = repeated
    out = tmp_path / "run"
    options = ["--include", request.include[0], "--dtype", "float32", "--batch-size", "4", "--temperature", "1.5"]
    options += ["--top-p", "0.95", "--seed", "5", "--repeats", "3", "--max-new-tokens", "5"]
    command = [sys.executable, "-m", "k2quant", "eval", "run", request.model, "--tasks", "all,picking", *options]
    process = subprocess.Popen([*map(str, command), "-o", str(out)], stderr=subprocess.DEVNULL)
    journal = out / JOURNAL
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 4):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    run(request, out)
    for task in ("adding", "silent", "picking"):
        assert (out / f"samples_{task}.jsonl").read_bytes() == (whole / f"samples_{task}.jsonl").read_bytes()
    assert read(out)["identity"] == read(whole)["identity"]


def test_metrics_are_means_over_repeats(scripted: Callable[..., Request], tmp_path: Path) -> None:
    """With the standard error of the items' means, for an item's repeats are no items; groups as lm-eval has them."""
    asked: list[str] = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        number = int(double(prompt)) // 2
        return double(prompt) if asked.count(prompt) <= number else "x"  # `number` of the first repeats are right

    request = scripted(answer, tasks=("adding",), temperature=1.0, repeats=4)
    run(request, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert len(asked) == 24
    by_item = [[row["exact_match"] for row in rows if row["doc_id"] == number] for number in range(6)]
    assert [sum(values) for values in by_item] == [0, 1, 2, 3, 4, 4]
    found = read(tmp_path / "run")["tasks"]["adding"]["metrics"]["exact_match,none"]
    assert found["value"] == pytest.approx(14 / 24, abs=1e-12)
    assert found["stderr"] == pytest.approx(statistics.stdev([0, 0.25, 0.5, 0.75, 1, 1]) / math.sqrt(6), abs=1e-12)
    results = json.loads((tmp_path / "run" / "results.json").read_bytes())
    assert results["results"]["adding"]["exact_match,none"] == found["value"]


def test_a_group_of_repeats_is_the_mean_of_its_tasks(repeated: tuple[Request, Path]) -> None:
    """By lm-eval's own rule, over the tasks' means."""
    _, folder = repeated
    manifest = read(folder)
    parts = [manifest["tasks"][name]["metrics"]["exact_match,none"]["value"] for name in ("adding", "silent")]
    assert manifest["groups"]["all"]["exact_match,none"]["value"] == pytest.approx(sum(parts) / 2, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"repeats": 2}, "`repeats=` needs a `temperature=`"),
        ({"repeats": 2, "temperature": 0}, "`repeats=` needs a `temperature=`"),
        ({"repeats": 0}, "repeats: expected 1 to 10,000"),
        ({"repeats": 10**9, "temperature": 1.0}, "repeats: expected 1 to 10,000"),
        ({"top_p": 0.5}, "`top_p=` draws"),
        ({"top_p": 0, "temperature": 1}, "top_p: expected"),
        ({"temperature": float("nan")}, "temperature: expected"),
        ({"temperature": -1}, "temperature: expected"),
        ({"temperature": True}, "temperature: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"seed": 1.5}, "seed: expected"),
    ],
)
def test_sampling_that_makes_no_sense(
    nano: Path, tasks: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    """Each is named, and nothing is left behind."""
    with pytest.raises(UsageError, match=said):
        run(Request(model=str(nano), tasks=("adding",), include=(tasks,), **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_line_tells_what_was_lost(
    scripted: Callable[..., Request], nano: Path, tasks: Path, tmp_path: Path
) -> None:
    """A line for each task; where nothing was left at all it asks whether the model reasons."""
    scripted(lambda prompt: f"hm</think>{double(prompt)}" if "A1+" in prompt else "hm")
    options = ["--include", tasks, "--think-end", "</think>", "--tasks", "adding", "--temperature", "1"]
    begin = ["eval", "run", nano, *options, "-o"]
    done = CliRunner().invoke(main, [*map(str, begin), str(tmp_path / "run"), "--repeats", "2"])
    assert done.exit_code == 0, done.stderr
    assert "adding: 10 of 12 answers never left their reasoning and count as wrong; see --max-new-tokens" in done.stderr
    scripted(lambda _: "hm")
    done = CliRunner().invoke(main, [*map(str, begin), str(tmp_path / "lost")])
    assert "6 of 6 answers never left their reasoning and count as wrong; does this model reason" in done.stderr
    done = CliRunner().invoke(main, [*map(str, begin[:-1]), "--top-p", "2", "-o", str(tmp_path / "x")])
    assert done.exit_code == 2


def test_a_job_that_is_told_to_end_is_no_fault_of_lm_eval(
    scripted: Callable[..., Request], nano: Path, tasks: Path, tmp_path: Path
) -> None:
    """SIGTERM, as a cancelled CI job gets it, ends as Ctrl-C does, with a code of its own; the command resumes."""

    def answer(prompt: str) -> str:
        if told:
            os.kill(os.getpid(), told.pop())
        return double(prompt)

    told = [signal.SIGTERM]
    scripted(answer)
    command = ["eval", "run", nano, "--include", tasks, "--tasks", "adding", "-o", tmp_path / "run"]
    before = signal.getsignal(signal.SIGTERM)
    try:
        done = CliRunner().invoke(main, list(map(str, command)))
        assert done.exit_code == 128 + signal.SIGTERM
        assert "run: the same command resumes" in done.stderr
        assert done.stderr.endswith("k2quant: stopped\n")
        assert CliRunner().invoke(main, list(map(str, command))).exit_code == 0
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("truncated", "lost", "said"), [(4, 4, [4]), (5, 4, [5, 4]), (4, 0, [4]), (0, 4, [4])])
def test_what_was_cut_in_thought_at_the_limit_is_told_once(
    truncated: int, lost: int, said: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """One line where the limit cut answers in their reasoning and no others; each says of how many."""
    task = {"documents": 20, "repeats": 3, "metrics": {}, "truncated": truncated, "cut_in_thought": lost}
    _show({"tasks": {"t": task}, "groups": {}, "seconds": 1.0}, Path("run"))
    lines = [line for line in capsys.readouterr().err.splitlines() if "answers" in line]
    assert [line.split(" answers ")[0] for line in lines] == [f"t: {count} of 60" for count in said]
    assert ("never left their reasoning" in lines[-1]) is (lost > 0)


class Served:
    """A model that answers in any order, and may be killed."""

    def __init__(self, left: int = 10**9) -> None:
        """Give so many answers, then be killed."""
        self.left = left
        self.asked: list[tuple[str, int]] = []

    def stream_until(self, requests: list[Any], each: Callable[[int, str, bool], None]) -> None:
        """Tell the answers, shuffled; each depends on its seed."""
        places = list(range(len(requests)))
        random.Random(3).shuffle(places)  # noqa: S311  no secret
        for place in places:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            context, settings = requests[place].args
            self.asked.append((context, settings.get("seed", 0)))
            each(place, f"{context} {settings.get('seed', 0)}", len(context) % 2 == 1)


def questions(count: int, **settings: Any) -> list[Instance]:
    """Return requests of lm-eval, each text twice."""
    kwargs = {"until": ["\n"], "max_gen_toks": 4, **settings}
    return [
        Instance("generate_until", {}, ("a" * (1 + place // 2), dict(kwargs)), 0, ("t", place, 1))
        for place in range(count)
    ]


def test_a_server_that_is_killed_loses_only_what_was_under_way(tmp_path: Path) -> None:
    """Answers are kept one by one, as they come; each is asked once, and the whole is that of an undisturbed run."""
    requests = questions(10, do_sample=True, temperature=1.0)
    options: dict[str, Any] = {"batch_size": 4, "repeats": 3, "seed": 1}
    whole = Served()
    undisturbed = Resuming(whole, Journal(tmp_path / "a"), **options)
    expected = [undisturbed.generate_until(requests) for _ in range(3)]
    assert len({text for texts in expected for text in texts}) == 30  # twice the same text is two draws
    asked: list[tuple[str, int]] = []
    for left in (1, 7, 0, 10**9):
        model = Served(left)
        lm = Resuming(model, Journal(tmp_path / "b"), **options)
        try:
            found = [lm.generate_until(requests) for _ in range(3)]
        except KeyboardInterrupt:
            assert len(model.asked) == left
        asked += model.asked
    assert found == expected
    assert sorted(asked) == sorted(whole.asked)
    assert lm.cut == undisturbed.cut == {"t": 18}


def test_a_server_that_leaves_an_answer_out_is_a_fault(tmp_path: Path) -> None:
    """Nothing is scored; what came is kept."""

    class Short(Served):
        def stream_until(self, requests: list[Any], each: Callable[[int, str, bool], None]) -> None:
            """Leave the last one out."""
            super().stream_until(requests[:-1], each)

    with pytest.raises(HarnessFault, match="answers are missing"):
        Resuming(Short(), Journal(tmp_path / "a"), batch_size=1).generate_until(questions(4))
    again = Served()
    Resuming(again, Journal(tmp_path / "a"), batch_size=1).generate_until(questions(4))
    assert len(again.asked) == 1


def test_other_questions_are_no_repeat(tmp_path: Path) -> None:
    """A task that asks otherwise the second time would mix the answers of two prompts."""
    lm = Resuming(Served(), Journal(tmp_path / "a"), batch_size=1, repeats=2)
    lm.generate_until(questions(4))
    with pytest.raises(HarnessFault, match="other questions"):
        lm.generate_until(questions(6)[2:])


def test_greedy_requests_have_no_seed(tmp_path: Path) -> None:
    """They are asked in the words of the task; what is drawn has a seed that every server takes."""
    for settings, drawn in (
        ({"do_sample": False, "temperature": 1.0}, False),
        ({"temperature": 0.0}, False),
        ({}, False),
        ({"temperature": 0.5}, True),
        ({"do_sample": True}, True),
    ):
        model = Served()
        Resuming(model, Journal(tmp_path / str(len(settings)) / "x"), batch_size=1)
        lm = Resuming(model, Journal(tmp_path / f"{settings}".replace("/", "")), batch_size=1, seed=2**62)
        lm.generate_until(questions(2, **settings))
        assert all((0 < seed < 2**31) is drawn for _, seed in model.asked)
