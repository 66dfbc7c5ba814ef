"""Fidelity of one checkpoint to another: every figure against loaded models and plain sums, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from k2quant.checkpoint.reader import open_checkpoint
from k2quant.cli import main
from k2quant.errors import CheckpointError, HarnessFault, Incomparable, MalformedFile, OutputError, UsageError
from k2quant.eval.drift import comparing, layerwise
from k2quant.eval.drift.fidelity import measure_fidelity
from k2quant.eval.drift.findings import Fidelity
from k2quant.eval.runs.identity import tokenizer_hash
from k2quant.model import load_model, stream_forward
from k2quant.model.modules import Backend
from k2quant.model.passes.texts import read_text
from k2quant.nano import vocabulary
from terminal import but_progress

LETTERS = "In the beginning 17 + 25 = 42; then (x, y) -> y! " * 40
OPTIONS: dict[str, Any] = {"context": 61, "tokens": 120, "dtype": "float32"}
"""Two chunks of [BOS] and 60 characters: 120 predictions, so that every one of them is read out early too."""


def _readable(source: Path, folder: Path) -> Path:
    """Copy a checkpoint and give it nano-K2's tokenizer, whose tokens are the first of the vocabulary."""
    shutil.copytree(source, folder)
    for name, data in vocabulary.files().items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="session")
def bf16(k2_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The baseline."""
    return _readable(k2_bf16, tmp_path_factory.mktemp("base") / "K2-BF16")


@pytest.fixture(scope="session")
def int4(k2_thinking: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A candidate with INT4 experts."""
    return _readable(k2_thinking, tmp_path_factory.mktemp("candidate") / "K2-INT4")


@pytest.fixture(scope="session")
def fp8(k2_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A candidate in block FP8."""
    return _readable(k2_source, tmp_path_factory.mktemp("candidate") / "K2-FP8")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text in ASCII, which nano-K2's tokenizer reads character by character."""
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text(LETTERS)
    return path


@pytest.fixture
def damaged(bf16: Path, tmp_path: Path) -> Path:
    """A copy of the baseline that a test may damage."""
    return Path(shutil.copytree(bf16, tmp_path / "Damaged"))


def _write(folder: Path, name: str, place: int, value: bytes) -> None:
    """Overwrite one value of a tensor in its file."""
    entry = open_checkpoint(folder).tensors[name]
    with (folder / entry.file).open("r+b") as file:
        file.seek(entry.start + place * len(value))
        file.write(value)


class Loaded:
    """What a loaded model makes of the two chunks, taken by hooks on its layers and on its routers' inputs."""

    def __init__(self, folder: Path, backend: Backend = "decoded") -> None:
        """Run it."""
        self.model: Any = load_model(folder, dtype="float32", backend=backend)
        self.hidden: list[Tensor] = []
        self.experts: dict[int, list[set[int]]] = {}
        for number, layer in enumerate(self.model.model.layers):
            layer.register_forward_hook(lambda _m, _i, output: self.hidden.append(output))
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_pre_hook(lambda gate, x, number=number: self._choose(number, gate, x))
        self.ids = torch.tensor([[0, *vocabulary.encode(LETTERS[at : at + 60])] for at in (0, 60)])
        with torch.no_grad():
            self.logits: Tensor = self.model(self.ids).logits
            self.early = [self.model.lm_head(self.model.model.norm(hidden)) for hidden in self.hidden]

    def _choose(self, number: int, gate: Any, x: tuple[Tensor]) -> None:
        """Find the best experts by sorting scores, without torch's topk and without groups, of which K2 has one."""
        scores = torch.sigmoid(x[0].reshape(-1, x[0].shape[-1]).float() @ gate.weight.float().T)
        order = (scores + gate.e_score_correction_bias).argsort(-1, descending=True)
        self.experts[number] = [set(row) for row in order[:, : gate.top_k].tolist()]

    def surprise(self) -> Tensor:
        """Return -ln of what the model gave each token that came, `[2, 60]`."""
        logs = self.logits[:, :-1].double().log_softmax(-1)
        return -torch.stack([logs[:, at][range(2), self.ids[:, at + 1]] for at in range(60)], 1)


def _kl(base: Tensor, candidate: Tensor) -> Tensor:
    """Return the divergence of every prediction, `[2, 60]`, by another formula than the one under test."""
    p, q = (logits[:, :-1].double().softmax(-1) for logits in (base, candidate))
    return torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1)


@pytest.mark.parametrize(("candidate", "backend"), [("int4", "decoded"), ("fp8", "auto")])
def test_figures_are_those_of_loaded_models(
    candidate: str, backend: Backend, bf16: Path, text: Path, request: pytest.FixtureRequest
) -> None:
    """Perplexities, divergences and agreement over all predictions; errors from the means of the two chunks."""
    folder = request.getfixturevalue(candidate)
    found = measure_fidelity(bf16, folder, text=text, backend=backend, **OPTIONS)
    base, other = Loaded(bf16, backend), Loaded(folder, backend)
    assert found.backend == backend
    divergence, reverse = _kl(base.logits, other.logits), _kl(other.logits, base.logits)
    ratio = other.surprise() - base.surprise()
    assert (found.tokens, found.chunks, found.text) == (120, 2, "letters.txt")
    assert found.kl.value == pytest.approx(float(divergence.mean()), rel=1e-9)
    assert found.kl.error == pytest.approx(float((divergence[0].mean() - divergence[1].mean()).abs() / 2), rel=1e-7)
    assert found.kl_max == pytest.approx(float(divergence.max()), rel=1e-9)
    assert found.kl_median == pytest.approx(float(np.median(divergence.numpy())), rel=1e-9)
    assert found.kl_99 == pytest.approx(float(np.percentile(divergence.numpy(), 99)), rel=1e-9)
    assert found.reverse_kl.value == pytest.approx(float(reverse.mean()), rel=1e-9)
    assert found.log_ratio.value == pytest.approx(float(ratio.mean()), rel=1e-9)
    assert found.base_perplexity == pytest.approx(math.exp(base.surprise().mean()), rel=1e-9)
    assert found.candidate_perplexity == pytest.approx(math.exp(other.surprise().mean()), rel=1e-9)
    same = base.logits[:, :-1].argmax(-1) == other.logits[:, :-1].argmax(-1)
    assert found.same_top.value == pytest.approx(float(same.double().mean()), rel=1e-12)
    assert found.kl.value > 0
    assert found.kl.value != pytest.approx(found.reverse_kl.value, rel=1e-6)


def test_completions_are_scored_behind_their_prompts(bf16: Path, int4: Path, text: Path, tmp_path: Path) -> None:
    """Of rows with prompts every figure is that of the completions' tokens; layers count prompts too."""
    rows = [(LETTERS[:20], LETTERS[20:60]), (LETTERS[60:110], LETTERS[110:120])]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": one, "completion": two}) + "\n" for one, two in rows))
    found = measure_fidelity(bf16, int4, text=path, **OPTIONS)
    base, other = Loaded(bf16), Loaded(int4)
    kept = torch.stack([torch.arange(60) >= len(prompt) for prompt, _ in rows])
    assert (found.tokens, found.chunks, found.completions) == (50, 2, True)
    divergence = _kl(base.logits, other.logits)[kept]
    assert found.kl.value == pytest.approx(float(divergence.mean()), rel=1e-9)
    assert found.kl_max == pytest.approx(float(divergence.max()), rel=1e-9)
    assert found.base_perplexity == pytest.approx(math.exp(base.surprise()[kept].mean()), rel=1e-9)
    assert found.candidate_perplexity == pytest.approx(math.exp(other.surprise()[kept].mean()), rel=1e-9)
    early = _kl(base.early[-1], other.early[-1])[kept]
    assert found.layers[-1].kl == pytest.approx(float(early.mean()), rel=1e-4)
    whole = measure_fidelity(bf16, int4, text=text, **OPTIONS)
    assert (whole.tokens, whole.completions) == (120, False)
    assert [layer.relative_mse for layer in found.layers] == [layer.relative_mse for layer in whole.layers]
    assert found.base_perplexity != whole.base_perplexity


def test_layers_are_those_of_loaded_models(bf16: Path, int4: Path, text: Path) -> None:
    """Error, cosine and early readout of every layer, the dense ones too."""
    found = measure_fidelity(bf16, int4, text=text, **OPTIONS)
    base, other = Loaded(bf16), Loaded(int4)
    assert [layer.layer for layer in found.layers] == list(range(len(base.hidden)))
    for layer in found.layers:
        x, y = base.hidden[layer.layer].double(), other.hidden[layer.layer].double()
        energy = float((x**2).sum())
        assert layer.relative_mse == pytest.approx(float(((x - y) ** 2).sum()) / energy, rel=1e-9, abs=1e-15)
        cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1).mean()
        assert layer.cosine == pytest.approx(float(cosine), rel=1e-12)
        early = _kl(base.early[layer.layer], other.early[layer.layer])
        assert layer.kl == pytest.approx(float(early.mean()), rel=1e-4, abs=1e-12)  # a product of another shape
    assert found.layers[-1].kl == pytest.approx(found.kl.value, rel=1e-4)
    assert found.layers[-1].relative_mse > 0


def test_routes_are_those_of_loaded_models(bf16: Path, int4: Path, text: Path) -> None:
    """Same sets, overlap, load and experts never visited, by sets of Python; nothing for a dense layer."""
    found = measure_fidelity(bf16, int4, text=text, **OPTIONS)
    base, other = Loaded(bf16), Loaded(int4)
    experts = base.model.config.n_routed_experts
    assert base.experts
    for layer in found.layers:
        if layer.layer not in base.experts:
            assert (layer.same_experts, layer.overlap, layer.load_shift, layer.never) == (None, None, None, ())
            continue
        pairs = list(zip(base.experts[layer.layer], other.experts[layer.layer], strict=True))
        assert layer.same_experts == pytest.approx(sum(a == b for a, b in pairs) / 122)
        assert layer.overlap == pytest.approx(sum(len(a & b) / len(a) for a, b in pairs) / 122)
        loads = [[sum(expert in pair[side] for pair in pairs) for expert in range(experts)] for side in (0, 1)]
        total = sum(loads[0])
        assert layer.load_shift == pytest.approx(sum(abs(a - b) for a, b in zip(*loads, strict=True)) / total / 2)
        assert layer.never == tuple(expert for expert in range(experts) if not loads[0][expert])
        assert layer.starved == tuple(expert for expert in range(experts) if loads[0][expert] and not loads[1][expert])
    assert any(layer.same_experts is not None and layer.same_experts < 1 for layer in found.layers)


def test_a_starved_expert_is_named(bf16: Path, damaged: Path, text: Path) -> None:
    """An expert that the router can no longer choose, in one layer: that layer names it, and those before are whole."""
    layers = measure_fidelity(bf16, bf16, text=text, **OPTIONS).layers
    last = layers[-1]
    expert = next(number for number in range(1000) if number not in last.never)
    name = f"model.layers.{last.layer}.mlp.gate.e_score_correction_bias"
    _write(damaged, name, expert, np.float32(-100).tobytes())
    found = measure_fidelity(bf16, damaged, text=text, **OPTIONS).layers
    assert found[-1].starved == (expert,)
    assert found[-1].never == last.never
    assert found[-1].overlap is not None
    assert found[-1].overlap < 1
    assert found[:-1] == layers[:-1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_against_itself_gives_nothing_at_all(dtype: str, int4: Path, text: Path) -> None:
    """Every figure is exactly that of no difference."""
    found = measure_fidelity(int4, int4, text=text, **(OPTIONS | {"dtype": dtype}))
    for estimate in (found.kl, found.reverse_kl, found.log_ratio):
        assert (estimate.value, estimate.error) == (0, 0)
    assert (found.kl_median, found.kl_99, found.kl_max) == (0, 0, 0)
    assert (found.same_top.value, found.same_top.error) == (1, 0)
    assert found.base_perplexity == found.candidate_perplexity
    for layer in found.layers:
        assert (layer.relative_mse, layer.cosine, layer.kl, layer.starved) == (0, 1, 0, ())
        assert layer.same_experts in {None, 1}
        assert layer.overlap in {None, 1}
        assert layer.load_shift in {None, 0}


def test_both_sides_are_named(bf16: Path, int4: Path, text: Path) -> None:
    """Folder, model and tokenizer; all of it goes into JSON without a NaN."""
    found = measure_fidelity(bf16, int4, text=text, **OPTIONS)
    assert (found.base.model, found.candidate.model) == ("K2-BF16", "K2-INT4")
    assert (found.base.folder, found.candidate.folder) == (str(bf16), str(int4))
    assert found.base.tokenizer_hash == found.candidate.tokenizer_hash == tokenizer_hash(bf16) is not None
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["layers"][1]["layer"] == 1


def test_early_readouts_are_spread_over_a_long_text(bf16: Path, int4: Path, text: Path) -> None:
    """Of 900 predictions 128 are read out at each layer; the last layer's mean is near that of all."""
    found = measure_fidelity(bf16, int4, text=text, context=101, tokens=900, dtype="float32")
    assert found.tokens == 900
    assert found.layers[-1].kl == pytest.approx(found.kl.value, rel=0.3)
    batches = read_text(text, _Characters(), context=101, limit_tokens=900)
    places = comparing._places(batches)  # noqa: SLF001  their spread is seen nowhere else
    assert [len(some) for some in places] == [128]
    assert int((places[0] % 101).max()) < 100  # the last token of a chunk predicts nothing that is compared
    assert set((places[0] // 101).tolist()) == set(range(9))


class _Characters:
    """A tokenizer of one token a character, as nano-K2's."""

    bos_token_id = 0

    def __call__(self, text: str | list[str], *, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        """Return ids as transformers does."""
        del verbose
        first = [0] if add_special_tokens else []
        ids: Any = [vocabulary.encode(one) for one in text] if isinstance(text, list) else vocabulary.encode(text)
        return type("Encoding", (), {"input_ids": [*first, *ids]})


def test_files_in_place_of_memory_change_nothing(
    bf16: Path, int4: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no memory for hidden states they go to files, one more with each layer; each goes when it was compared."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    wanted = measure_fidelity(bf16, int4, text=text, **OPTIONS)
    files: list[int] = []
    monkeypatch.setattr(comparing, "_BUDGET", 0)
    found = measure_fidelity(
        bf16, int4, text=text, progress=lambda *_: files.append(len(list(tmp_path.glob("*/*.bin")))), **OPTIONS
    )
    assert found == wanted
    layers = len(wanted.layers)
    assert files == [*range(layers + 1), *range(layers - 1, -1, -1)]
    assert not list(tmp_path.iterdir())


def test_no_batch_of_logits_outlives_its_comparison(
    bf16: Path, int4: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a model is asked for logits, no more than one batch of each is there: torch.no_grad holds on to the last."""
    monkeypatch.setattr("k2quant.model.passes.texts._AT_ONCE", 61)
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    stream = stream_forward

    def watched(*args: Any, **options: Any) -> Iterator[Tensor]:
        run = stream(*args, **options)

        def following() -> Tensor:
            logits = next(run)
            seen.append(weakref.ref(logits))
            return logits

        while True:
            alive.append(sum(one() is not None for one in seen))
            yield following()

    monkeypatch.setattr(comparing, "stream_forward", watched)
    assert measure_fidelity(bf16, int4, text=text, context=61, tokens=300).chunks == 5
    assert len(alive) == 10
    assert max(alive) == 2


def test_equal_vectors_have_a_cosine_of_exactly_one() -> None:
    """Whatever their length: no rounding of roots shows; nothing against nothing is no difference either."""
    for hidden in [*torch.randn(300, 1, 1, 16), torch.zeros(1, 1, 16)]:
        sums = layerwise.compared(hidden, hidden)
        assert layerwise.hidden([sums], 1) == (0, 1)


def test_batches_make_no_difference_to_what_is_compared(
    bf16: Path, int4: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunk by chunk the figures are the same, but for the rounding of products of another shape."""
    together = measure_fidelity(bf16, int4, text=text, **OPTIONS)
    monkeypatch.setattr("k2quant.model.passes.texts._AT_ONCE", 1)
    alone = measure_fidelity(bf16, int4, text=text, **OPTIONS)
    assert (alone.tokens, alone.chunks, alone.text_hash) == (together.tokens, together.chunks, together.text_hash)
    assert alone.kl.value == pytest.approx(together.kl.value, rel=1e-3)
    assert alone.kl.error == pytest.approx(together.kl.error, rel=1e-2)


def test_progress_counts_the_layers_of_both(bf16: Path, int4: Path, text: Path) -> None:
    """From none to all, one by one."""
    calls: list[tuple[int, int]] = []
    found = measure_fidelity(bf16, int4, text=text, progress=lambda done, total: calls.append((done, total)), **OPTIONS)
    total = 2 * len(found.layers)
    assert calls == [(done, total) for done in range(total + 1)]


@pytest.mark.parametrize("guilty", [0, 1])
@pytest.mark.parametrize(
    ("tensor", "where"),
    [("model.norm.weight", "the logits"), ("model.layers.1.input_layernorm.weight", "the output of layer 1")],
)
def test_a_model_that_gives_no_numbers_is_named(
    guilty: int,
    tensor: str,
    where: str,
    bf16: Path,
    damaged: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Be it baseline or candidate; temporary files are gone."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setattr(comparing, "_BUDGET", 0)
    _write(damaged, tensor, 3, np.uint16(0x7FC0).tobytes())  # NaN in BF16
    folders = (damaged, bf16) if guilty == 0 else (bf16, damaged)
    with pytest.raises(HarnessFault, match=where) as caught:
        measure_fidelity(*folders, text=text, **OPTIONS)
    assert str(damaged) in str(caught.value)
    assert not list(place.iterdir())


def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when a pass begins."""
    monkeypatch.setattr(comparing, "stream_forward", lambda *_args, **_options: pytest.fail("weights were read"))


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "num_hidden_layers", "n_routed_experts", "num_experts_per_tok"]
)
def test_models_of_another_shape_are_incomparable(
    key: str, bf16: Path, damaged: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names what differs, both values and both folders; no weight is read."""
    _no_weights(monkeypatch)
    config = json.loads((damaged / "config.json").read_text())
    config[key] += 1
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(Incomparable, match=key) as caught:
        measure_fidelity(bf16, damaged, text=text)
    message = str(caught.value)
    assert all(str(part) in message for part in (bf16, damaged, config[key], config[key] - 1))


@pytest.mark.parametrize("change", ["other", "none"])
def test_another_tokenizer_is_incomparable(
    change: str, bf16: Path, damaged: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would read another text; one that is not there cannot be told to be the same."""
    _no_weights(monkeypatch)
    path = damaged / "tokenizer.json"
    if change == "other":
        path.write_text(path.read_text().replace('"a"', '"ä"'))
    else:
        path.unlink()
        (damaged / "tokenizer_config.json").unlink()
    with pytest.raises(Incomparable, match="another tokenizer") as caught:
        measure_fidelity(bf16, damaged, text=text)
    assert str(bf16) in str(caught.value)
    assert str(damaged) in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(damaged: Path, tmp_path: Path, text: Path) -> None:
    """Tokens beyond the vocabulary would have no embedding."""
    path = damaged / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["e"] = 5000
    path.write_text(json.dumps(content))
    again = Path(shutil.copytree(damaged, tmp_path / "again"))
    with pytest.raises(CheckpointError, match="another model, expected tokens below 2048, found 5000"):
        measure_fidelity(damaged, again, text=text)


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"context": 1}, UsageError, "context: expected at least 2"),
        ({"tokens": 0}, UsageError, "tokens: expected at least 3"),
        ({"dtype": "int8"}, UsageError, "dtype"),
        ({"device": "tpu"}, UsageError, "device"),
        ({"backend": "magic"}, UsageError, "backend"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: dict[str, Any], error: type[Exception], reason: str, bf16: Path, text: Path
) -> None:
    """Each by its name."""
    with pytest.raises(error, match=reason):
        measure_fidelity(bf16, bf16, text=text, **options)


def test_texts_that_are_none_are_refused(bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty, binary, or not there; no weight is read."""
    _no_weights(monkeypatch)
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(b"\x80\x03abc")
    for name, error in (("empty", UsageError), ("binary", MalformedFile), ("missing", MalformedFile)):
        with pytest.raises(error, match=name):
            measure_fidelity(bf16, bf16, text=tmp_path / name)


def test_a_full_disk_is_an_output_error(
    bf16: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states that find no room end the run with a message, not with a signal."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(comparing, "_BUDGET", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("k2quant.model.passes.activations.write_all", full)
    with pytest.raises(OutputError, match="No space left"):
        measure_fidelity(bf16, bf16, text=text, **OPTIONS)
    assert not list(tmp_path.iterdir())


def _run(*words: object) -> Any:
    return CliRunner().invoke(main, ["eval", "fidelity", *map(str, words)])


def test_the_command_prints_a_table_and_writes_json(bf16: Path, int4: Path, text: Path, tmp_path: Path) -> None:
    """What is printed, what is written and what Python returns is the same; nothing goes to stderr behind a pipe."""
    options = ("--text", text, "--tokens", 120, "--context", 61, "--dtype", "float32")
    done = _run(bf16, int4, *options, "-o", tmp_path / "found.json")
    found: Fidelity = measure_fidelity(bf16, int4, text=text, **OPTIONS)
    assert (done.exit_code, but_progress(done.stderr)) == (0, "")
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(json.dumps(found.as_dict()))
    assert f"{found.base_perplexity:.5g}" in done.stdout
    assert f"{found.kl.value:.4g} +- {found.kl.error:.2g}" in done.stdout
    assert "tripwire and no verdict" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.strip() and line.split()[0].isdigit()]
    assert [row[0] for row in rows] == [str(layer.layer) for layer in found.layers]
    assert rows[-1][4] == f"{found.layers[-1].same_experts:.2%}"
    assert json.loads(_run(bf16, int4, *options, "--json").stdout) == json.loads(json.dumps(found.as_dict()))


def test_lines_may_be_texts_of_their_own(bf16: Path, int4: Path, tmp_path: Path) -> None:
    """Then the order of lines plays no part: nothing looks back from one to another."""
    found = []
    for lines in (["M12=3", "S9=9", "Rabcdef"], ["Rabcdef", "M12=3", "S9=9"]):
        (tmp_path / "items").write_text("\n".join(lines))
        options = ("--text", tmp_path / "items", "--lines", "--dtype", "float32", "--json")
        found.append(json.loads(_run(bf16, int4, *options).stdout))
    assert [(one["tokens"], one["chunks"]) for one in found] == [(16, 3), (16, 3)]
    assert found[0]["kl"]["value"] == pytest.approx(found[1]["kl"]["value"], rel=1e-6)


def test_the_command_names_starved_experts(bf16: Path, damaged: Path, text: Path) -> None:
    """By layer and number."""
    never = measure_fidelity(bf16, bf16, text=text, **OPTIONS).layers[-1].never
    expert = next(number for number in range(1000) if number not in never)
    last = len(json.loads(_run(bf16, bf16, "--text", text, "--tokens", 99, "--json").stdout)["layers"]) - 1
    _write(damaged, f"model.layers.{last}.mlp.gate.e_score_correction_bias", expert, np.float32(-100).tobytes())
    done = _run(bf16, damaged, "--text", text, "--tokens", 120, "--context", 61, "--dtype", "float32")
    assert f"layer {last}: experts that only the baseline visits: {expert}\n" in done.stdout


def test_the_command_reads_the_sample_and_says_what_went_unread(bf16: Path) -> None:
    """Without --text; nano-K2's tokenizer knows no Chinese, and that is said."""
    done = _run(bf16, bf16, "--context", 256)
    assert done.exit_code == 0
    assert "sample_text.txt" in done.stdout
    assert "passes over" in done.stderr


def test_the_command_ends_with_one_line_and_a_code(bf16: Path, text: Path, tmp_path: Path) -> None:
    """A folder that is not there, and a text that is not."""
    for words in ((bf16, tmp_path / "none", "--text", text), (bf16, bf16, "--text", tmp_path / "none")):
        done = _run(*words)
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith("k2quant: ")
        assert "none" in done.stderr
        assert done.stderr.count("\n") == 1


def worked(process: int) -> float:
    """Return the seconds of processors that a process has used, which grow no faster on a machine that is busy."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_job_that_is_told_to_end_leaves_no_temporary_files(bf16: Path, tmp_path: Path) -> None:
    """SIGTERM, as a cancelled CI job gets it, removes what Ctrl-C removes: at K2's size these are gigabytes."""
    text, place = tmp_path / "long.txt", tmp_path / "temporary"
    text.write_text(LETTERS * 100)
    place.mkdir()
    command = [sys.executable, "-m", "k2quant", "eval", "fidelity", bf16, bf16, "--text", text, "--tokens", 100_000]
    process = subprocess.Popen([*map(str, command)], env=os.environ | {"TMPDIR": str(place)}, stderr=subprocess.DEVNULL)
    seen = None
    while seen is None or worked(process.pid) < seen + 0.5:  # a signal within `mkdtemp` itself leaves what it made
        assert process.poll() is None, "it ended before it could be stopped"
        if seen is None and list(place.glob("k2quant-*")):
            seen = worked(process.pid)
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert not list(place.glob("k2quant-*"))
