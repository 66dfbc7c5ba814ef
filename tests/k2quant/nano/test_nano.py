"""nano-K2: its tasks, its training, what it writes and how it is scored."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

from k2quant.checkpoint.reader import open_checkpoint
from k2quant.cli import main
from k2quant.conversion.convert import convert
from k2quant.errors import CheckpointError, DestinationForeign, DestinationInUse, UsageError
from k2quant.formats.known import FORMATS, FormatName
from k2quant.nano import architecture, batches, rounding, scoring, tasks, training, vocabulary, writing
from k2quant.nano.demo import K2_CONFIG
from k2quant.nano.run import run
from k2quant.nano.tour import tour
from terminal import but_progress

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = st.integers(0, 2**32)
KINDS = [(family, level) for family in tasks.FAMILIES for level in tasks.LEVELS]


def k2quant(*arguments: object) -> Result:
    """Run the command line."""
    return CliRunner().invoke(main, [*map(str, arguments)], env={"COLUMNS": "100"})


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano-K2 of three steps. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("nano") / "k2"
    run(folder, steps=3, seed=5, exam=2)
    return folder


def solve(question: str) -> str:
    """Answer a question in another way than the tasks do."""
    body = question[1:-1]
    if question[0] == "R":
        return "".join(reversed(body))
    if question[0] == "S":
        return "".join(str(digit) * body.count(str(digit)) for digit in range(10))
    if question[0] == "B":
        while (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", body)) != body:
            body = shorter
        return body[::-1].translate(str.maketrans("([{<", ")]}>"))
    if question[0] == "M":
        return "".join(sorted(set("0123456789") - set(body)))
    if question[0] == "D":
        return "".join(chr((ord(letter) - 97 + int(body[0])) % 26 + 97) for letter in body[1:])
    number, more = body.split("+")
    return str(sum(map(int, (number, more)))).rjust(len(number), "0")


@pytest.mark.parametrize(("family", "level"), KINDS)
def test_answers_are_right(family: str, level: int) -> None:
    """Every answer is what another way of solving the question gives."""
    for item in tasks.items(family, level, 200):
        assert item.answer == solve(item.question)
        assert item.question.endswith("=")


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_each_family_holds_out_a_hundred_thousand_items(family: str) -> None:
    """The hard level alone has so many questions: counted, and supported by draws that hardly ever repeat."""
    size = tasks.FAMILIES[family].sizes[-1]
    questions = {
        "reverse": 26**size,
        "sort": 10**size,
        "brackets": _bracket_questions(size),
        "missing": 10**size,
        "shift": 3 * 26**size,
        "add": 3 * (10**size - 3),
    }[family]
    assert questions * tasks.HELD_OUT_SHARE >= 100_000
    drawn = {item.question for item in islice(tasks.stream(family, 3, seed=1, split="heldout"), 1000)}
    assert len(drawn) > 980


def _bracket_questions(size: int) -> int:
    """Count texts that open `size` more than they close, reach that depth last, and close at most `size`."""
    ways = {(0, 0): 1}  # (open, closed) to the number of texts
    total = 0
    for _ in range(3 * size):
        after: dict[tuple[int, int], int] = {}
        for (depth, closed), count in ways.items():
            after[depth + 1, closed] = after.get((depth + 1, closed), 0) + 4 * count
            if depth and closed < size:
                after[depth - 1, closed + 1] = after.get((depth - 1, closed + 1), 0) + count
        total += sum(count for (depth, _), count in after.items() if depth == size)
        ways = {key: count for key, count in after.items() if key[0] < size}
    return total


def test_one_question_in_eight_is_held_out() -> None:
    """The hash holds out the share that it promises, within four standard deviations."""
    questions = [f"S{number:06}=" for number in range(20_000)]
    held = sum(tasks.split_of(question) == "heldout" for question in questions)
    assert abs(held - 2500) < 4 * (20_000 * 7 / 64) ** 0.5


@settings(deadline=None)
@given(SEEDS)
def test_no_held_out_item_is_trained_on(seed: int) -> None:
    """Whatever the seed, what training draws is no exam's."""
    assert {tasks.split_of(item.question) for item in islice(batches.mixture(seed), 40)} == {"train"}
    assert {tasks.split_of(item.question) for item in tasks.exam(2, seed=seed)} == {"heldout"}


def test_items_are_those_of_their_seed_and_all_different() -> None:
    """The same arguments give the same items, in this process and in another; a seed gives others."""
    drawn = tasks.items("sort", 2, 50, seed=3)
    assert drawn == tasks.items("sort", 2, 50, seed=3) != tasks.items("sort", 2, 50, seed=4)
    assert len({item.question for item in drawn}) == 50
    assert drawn[:10] == tasks.items("sort", 2, 10, seed=3)
    assert hashlib.sha256(repr(tasks.exam(5)).encode()).hexdigest()[:16] == EXAM_OF_FIVE


EXAM_OF_FIVE = "7747b5cfd4477f3b"
"""Written down once: whoever changes the tasks changes every accuracy that was ever reported."""


@pytest.mark.parametrize(("family", "level"), [("poetry", 1), ("sort", 4)])
def test_unknown_tasks_are_refused(family: str, level: int) -> None:
    """A family or level that there is not is an error of usage that names those there are."""
    with pytest.raises(UsageError, match="expected"):
        tasks.items(family, level, 1)


@settings(deadline=None)
@given(st.text(alphabet=vocabulary.CHARACTERS))
def test_characters_are_tokens(text: str) -> None:
    """Every text of printable ASCII has one token a character and comes back from them."""
    ids = vocabulary.encode(text)
    assert len(ids) == len(text)
    assert vocabulary.decode([vocabulary.BOS, *ids, vocabulary.EOS, vocabulary.SIZE - 1]) == text


def test_transformers_reads_the_tokenizer(nano: Path) -> None:
    """`AutoTokenizer` takes the folder without code of ours, and gives the ids that training used, BOS first."""
    tokenizer = AutoTokenizer.from_pretrained(nano)
    for text in (vocabulary.CHARACTERS, "  two  spaces ", "S4827=2478", "don't , stop .", ""):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == vocabulary.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer(text)["input_ids"] == [vocabulary.BOS, *ids]
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (vocabulary.BOS, vocabulary.EOS, vocabulary.PAD)


def test_a_row_keeps_its_items_apart() -> None:
    """Items side by side in a row get the logits that they get alone: no token sees another item's."""
    model = architecture.build().eval()
    items = list(islice(batches.mixture(0), 4))
    batch = next(batches.batches(iter(items * 3), 2))
    with torch.no_grad():
        together = model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits[0]
        begin = 0
        for item in items[:3]:
            tokens, _ = batches.tokens_of(item)
            alone = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
            torch.testing.assert_close(together[begin : begin + len(tokens)], alone, rtol=1e-3, atol=1e-4)
            begin += len(tokens)


def test_sorted_experts_equal_those_of_transformers() -> None:
    """Our forward pass of the experts has the values and gradients of the loop that transformers runs."""
    torch.manual_seed(0)
    model = architecture.build()
    experts = model.model.layers[-1].mlp.experts
    hidden, weights = torch.randn(50, 256, requires_grad=True), torch.rand(50, 4)
    chosen = torch.rand(50, 16).topk(4).indices.clamp(max=13)  # two experts have nothing to do
    results = []
    for implementation in (architecture.EXPERTS, "eager"):
        model.set_experts_implementation(implementation)
        output = experts(hidden, chosen, weights)
        results.append([output, *torch.autograd.grad(output.square().sum(), [hidden, *experts.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_bias_helps_experts_that_had_too_little_to_do() -> None:
    """The bias of an expert with too many tokens falls by the rate; with too few it grows; else it stays."""
    gate, bias = nn.Identity(), torch.zeros(4)
    gate.register_buffer("e_score_correction_bias", bias)
    balance = training.Balance(nn.ModuleDict({"gate": gate}), rate=0.5)
    gate((None, None, torch.tensor([[0, 0], [0, 0], [1, 1], [2, 2]])))
    balance.step()
    assert bias.tolist() == [-0.5, 0.0, 0.0, 0.5]


def test_a_short_training_lowers_the_loss_far_below_chance() -> None:
    """Forty steps on small batches bring the loss of an answer's token well below log(11), that of guessing digits."""
    losses: list[float] = []
    model = training.train(training.Recipe(steps=40, rows=8), progress=lambda *state: losses.append(state[2]))
    assert sum(losses[-5:]) / 5 < 2.3 < losses[0]
    balance = training.Balance(model, 0.0)
    training.answer_loss(model, next(batches.batches(batches.mixture(1), 8)))
    assert all(float(load.max() / load.mean()) < 3 for load in balance.loads.values())


def test_rates_rise_then_fall() -> None:
    """The rate grows to its highest over the warm-up and ends near nothing."""
    recipe = training.Recipe(steps=100)
    rates = [training.rate_at(step, recipe) for step in range(100)]
    assert rates.index(max(rates)) in {4, 5}
    assert max(rates) == 1.0
    assert 0 < rates[-1] < 0.02
    assert training.rate_at(0, training.Recipe(steps=1)) == 1.0


def test_the_same_seed_gives_the_same_bytes(nano: Path, tmp_path: Path) -> None:
    """Two runs of one recipe write the same folder, byte for byte; another seed writes other weights."""
    run(tmp_path / "again", steps=3, seed=5, exam=1)
    run(tmp_path / "other", steps=3, seed=6, exam=1)
    names = sorted(path.name for path in nano.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((nano / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    weights = "model-1-of-3.safetensors"
    assert (nano / weights).read_bytes() != (tmp_path / "other" / weights).read_bytes()


def test_the_layout_is_that_of_k2(nano: Path) -> None:
    """Names, dtypes, the odd rows of kv_a and the keys of the config are those of the release, in BF16."""
    source = open_checkpoint(nano)
    layers = architecture.CONFIG["num_hidden_layers"]
    assert list(source.shards) == [f"model-{number + 1}-of-{layers}.safetensors" for number in range(layers)]
    shapes = {name: entry.shape for name, entry in source.tensors.items()}
    assert shapes["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"] == (160, 256)
    assert shapes["model.layers.1.mlp.experts.15.down_proj.weight"] == (256, 128)
    assert shapes["model.layers.1.mlp.experts.0.gate_proj.weight"] == (128, 256)
    assert shapes["model.layers.0.mlp.up_proj.weight"] == (512, 256)
    dtypes = {name: entry.dtype for name, entry in source.tensors.items()}
    assert all((dtype == "F32") == name.endswith("mlp.gate.e_score_correction_bias") for name, dtype in dtypes.items())
    assert source.config is not None
    assert source.config.keys() ^ K2_CONFIG.keys() == {"pad_token_id", "quantization_config", "rope_theta"}
    assert json.loads((nano / "generation_config.json").read_text())["eos_token_id"] == vocabulary.EOS


def test_what_is_written_is_the_model_rounded_to_bf16(tmp_path: Path) -> None:
    """Read back by transformers itself, every weight is the trained one rounded once."""
    model = training.train(training.Recipe(steps=1, rows=2))
    with writing.claimed(tmp_path / "k2"):
        writing.write(tmp_path / "k2", model, {})
    settings = architecture.settings(architecture.CONFIG)
    read = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "k2", config=settings, dtype=torch.float32)
    found = read.state_dict()
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        exact = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16().float()
        assert torch.equal(found[name], exact), name


@pytest.mark.parametrize("to", ["fp8", "int4"])
def test_conversions_take_it(nano: Path, tmp_path: Path, to: str) -> None:
    """`inspect` finds no fault, and `convert` makes of it what `verify` accepts."""
    assert k2quant("inspect", nano).exit_code == 0
    assert k2quant("convert", "--to", to, nano, tmp_path / to).exit_code == 0
    done = k2quant("verify", nano, tmp_path / to)
    assert done.exit_code == 0, done.output


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    """A folder with anything in it that no nano wrote stays as it is."""
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DestinationForeign, match="no nano-K2"):
        run(tmp_path, steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder but a lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def test_a_run_that_dies_while_it_trains_leaves_the_older_model(nano: Path, tmp_path: Path) -> None:
    """Nothing of an older result is touched before the new one is there; a new folder does not look finished."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    shutil.copytree(nano, tmp_path / "k2")
    for place in (tmp_path / "k2", tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            run(place, steps=3, seed=6, exam=2, progress=die)
    assert contents(tmp_path / "k2") == contents(nano)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "new")
    run(tmp_path / "new", steps=3, seed=5, exam=2)
    assert contents(tmp_path / "new") == contents(nano)


def test_a_run_that_dies_while_it_writes_leaves_nothing_that_looks_finished(
    nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old shards never stand beside new ones under a config; the next run writes all of it."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    shutil.copytree(nano, tmp_path / "k2")
    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_checkpoint", die)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "k2", steps=3, seed=6, exam=2)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "k2")
    run(tmp_path / "k2", steps=3, seed=5, exam=2)
    assert contents(tmp_path / "k2") == contents(nano)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    """While one trains for a folder, another is refused."""
    with writing.claimed(tmp_path / "k2"), pytest.raises(DestinationInUse):
        run(tmp_path / "k2", steps=3)


@pytest.mark.parametrize("to", ["fp8", "int4"])
def test_a_conversion_of_a_nano_is_no_nano(nano: Path, tmp_path: Path, to: FormatName) -> None:
    """Training does not take its folder over, and the table of rounding does not round what is rounded."""
    convert(nano, tmp_path / "other", to=to)
    before = contents(tmp_path / "other")
    with pytest.raises(DestinationForeign):
        run(tmp_path / "other", steps=3)
    assert contents(tmp_path / "other") == before
    with pytest.raises(CheckpointError, match="rounded already"):
        rounding.rounding_table(tmp_path / "other", tasks.exam(1))
    with pytest.raises(UsageError):
        rounding.rounded(writing.load(nano), 4, "everything")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"seed": -1}, {"seed": 2**64}, {"rows": 1}, {"workers": 0}])
def test_recipes_out_of_range_are_refused_before_anything_is_touched(wrong: dict[str, int]) -> None:
    """What torch would stumble over later is a usage error now."""
    with pytest.raises(UsageError):
        training.Recipe(**wrong)


def test_more_items_than_there_are() -> None:
    """A family's level runs out with an error, not never; fewer than one make no sense."""
    with pytest.raises(UsageError, match="hardly"):
        tasks.items("add", 1, 5000)
    for count in (0, -1):
        with pytest.raises(UsageError):
            tasks.items("add", 1, count)


def test_another_checkpoint_is_no_nano(k2_source: Path) -> None:
    """A table of a model with other tokens is refused by name of its config."""
    with pytest.raises(CheckpointError, match="no nano-K2"):
        rounding.rounding_table(k2_source, tasks.exam(1))


class Parrot(nn.Module):
    """A model that knows the answers to some items and is sure of them."""

    device = torch.device("cpu")

    def __init__(self, known: list[tasks.Item], *, stops: bool = True) -> None:
        """Remember items; without `stops`, go on after their last character."""
        super().__init__()
        self.known = [[*batches.tokens_of(item)[0], vocabulary.EOS if stops else 5] for item in known]

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        """Return logits that are 50 for the next token of a known item, else 0: all tokens are as likely."""
        logits = torch.zeros(*input_ids.shape, vocabulary.SIZE)
        for row, tokens in enumerate(input_ids.tolist()):
            for known in self.known:
                if tokens[: len(known) - 1] == known[:-1]:
                    logits[row, range(len(known) - 1), known[1:]] = 50.0
        return SimpleNamespace(logits=logits)


def test_scores_are_those_of_the_answers_known() -> None:
    """A model that knows half of the items has half of them right, at no loss; the others cost a guess each."""
    items = tasks.exam(4)
    score = scoring.score(Parrot(items[::2]), items)
    assert list(score.right) == [place % 2 == 0 for place in range(len(items))]
    assert score.accuracy("sort", 2) == scoring.Accuracy(right=2, count=4)
    expected = [0.0, torch.tensor(128.0).log().item()] * (len(items) // 2)
    assert list(score.losses) == pytest.approx(expected, abs=1e-4)
    assert score.loss[0] == pytest.approx(expected[1] / 2, abs=1e-4)


def test_an_answer_without_its_stop_is_wrong() -> None:
    """Who gives every character and then goes on has nothing right."""
    items = tasks.exam(2)
    assert scoring.score(Parrot(items, stops=False), items).accuracy().right == 0


def test_one_forward_pass_finds_what_greedy_decoding_finds() -> None:
    """Whatever transformers' own greedy generation gives before it stops is right, and any other answer is wrong."""
    model: Any = training.train(training.Recipe(steps=60, rows=8))
    items = []
    for item in tasks.items("brackets", 1, 8) + tasks.items("missing", 1, 8):
        prompt = torch.tensor([[vocabulary.BOS, *vocabulary.encode(item.question)]])
        text = model.generate(prompt, do_sample=False, max_new_tokens=16, pad_token_id=vocabulary.PAD)[0].tolist()
        if text[-1] == vocabulary.EOS:
            items.append(item._replace(answer=vocabulary.decode(text[prompt.shape[1] :])))
    assert len(items) >= 8
    assert all(scoring.score(model, items).right)
    assert not any(scoring.score(model, [item._replace(answer=item.answer + "0") for item in items]).right)


def test_wilson_intervals_are_those_of_the_tables() -> None:
    """0 of 10, 5 of 10 and 81 of 263 have the 95% intervals that the literature prints."""
    intervals = [scoring.Accuracy(right=right, count=count).interval for right, count in ((0, 10), (5, 10), (81, 263))]
    for found, expected in zip(intervals, [(0.0, 0.2775), (0.2366, 0.7634), (0.2553, 0.3662)], strict=True):
        assert found == pytest.approx(expected, abs=1e-4)


def test_rounding_touches_what_it_names_and_leaves_the_model_alone(nano: Path) -> None:
    """`routed` rounds the experts, `all` every projection, and nothing else; fewer bits, larger errors."""
    model = writing.load(nano)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    touched: dict[rounding.Which, tuple[str, ...]] = {"routed": (".experts.",), "all": ("experts.", "_proj")}
    for which, parts in touched.items():
        errors = []
        for bits in rounding.BITS:
            after = rounding.rounded(model, bits, which).state_dict()
            changed = {name for name in before if not torch.equal(after[name], before[name])}
            assert changed == {name for name in before if any(part in name for part in parts)}
            errors.append(sum(float((after[name] - before[name]).square().sum()) for name in before))
        assert errors == sorted(errors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_table_compares_on_the_same_items(nano: Path) -> None:
    """The table has the model itself, then each way and width; gaps are item by item."""
    rows = rounding.rounding_table(nano, tasks.exam(1)[::3])  # six questions, one of each family
    assert [(row.which, row.bits) for row in rows] == [
        (None, 16),
        *[("routed", bits) for bits in rounding.BITS],
        *[("all", bits) for bits in rounding.BITS],
    ]
    for row in rows[1:]:
        gaps = [after - before for after, before in zip(row.score.losses, rows[0].score.losses, strict=True)]
        assert row.gap == pytest.approx(scoring.mean(gaps))


def test_a_tour_goes_over_an_earlier_one(tmp_path: Path) -> None:
    """Conversions of another nano-K2 of the same name are replaced, and each format is that of the model at hand."""
    items, kept = tasks.exam(1)[:2], []
    for seed in (1, 2):
        run(tmp_path / "k2", steps=1, seed=seed, exam=1)
        stops = list(tour(tmp_path / "k2", items))
        assert [stop.format for stop in stops] == list(FORMATS)
        assert stops[0].gap == (0.0, 0.0)
        kept.append([float(stop.score.loss[0]) for stop in stops])
    assert all(first != second for first, second in zip(*kept, strict=True))


def test_the_command_prints_its_table_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Piped, stderr is silent; stdout has a line for each family, or one JSON object."""
    command = [sys.executable, "-m", "k2quant", "nano", "--steps", "1", str(tmp_path / "k2")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "100"})
    assert (done.returncode, but_progress(done.stderr)) == (0, "")
    assert all(f"\n{family} " in done.stdout for family in tasks.FAMILIES)
    exam = tasks.exam
    monkeypatch.setattr(tasks, "exam", lambda count: exam(count // 20))
    result = json.loads(k2quant("nano", "--steps", 1, "--seed", 2, "--json", tmp_path / "k2").stdout)
    assert result["seed"] == 2
    assert result["accuracy"].keys() == tasks.FAMILIES.keys()


@pytest.mark.parametrize("wrong", [("--steps", 0), ("--steps", "many"), ("--seed", -1)])
def test_options_out_of_range_are_errors_of_usage(tmp_path: Path, wrong: tuple[object, ...]) -> None:
    """They exit 2 and touch nothing."""
    done = k2quant("nano", *wrong, tmp_path / "k2")
    assert done.exit_code == 2
    assert not (tmp_path / "k2").exists()
