"""Blame: mixtures are what a checkpoint of the same tensors is, planted damage is found, and nothing else is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.cli import main
from k2quant.conversion.convert import convert
from k2quant.errors import BadValue, Incomparable, MissingTensor, UsageError
from k2quant.eval import find_blame, measure_fidelity
from k2quant.eval.drift import blame, measuring
from k2quant.eval.drift.reading import read_blame
from k2quant.eval.statistics.group_testing import Findings, Found
from k2quant.formats.dtypes import TensorSpec, as_array
from k2quant.ground import names
from k2quant.model import load_model, stream_forward
from k2quant.model.passes.mixture import Mixer
from k2quant.nano import vocabulary

OPTIONS: dict[str, Any] = {"context": 17, "tokens": 512}
IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def int4(base: Path) -> Path:
    """The same, every projection in INT4."""
    folder = convert(base, base.parent / "int4", to="int4", scope="projections").folder
    for name, data in vocabulary.files().items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def text(base: Path) -> Path:
    """Random characters, 36 chunks of them."""
    path = base.parent / "text.txt"
    path.write_text("".join(np.random.default_rng(0).choice(list(vocabulary.CHARACTERS[:-1]), 36 * 16)))
    return path


def tensors_of(folder: Path) -> Shard:
    """Return a checkpoint's tensors, the experts one by one."""
    source = open_checkpoint(folder)
    return {
        name: (
            entry.dtype,
            as_array(np.frombuffer(read_tensor(source, entry), np.uint8), TensorSpec(entry.dtype, entry.shape)).copy(),
        )
        for name, entry in source.tensors.items()
    }


def changed(folder: Path, target: Path, change: Callable[[Shard, dict[str, Any]], None]) -> Path:
    """Write a copy of a checkpoint with changed tensors or config, in one shard."""
    tensors, config = tensors_of(folder), dict(open_checkpoint(folder).config or {})
    change(tensors, config)
    write_checkpoint(target, {"model.safetensors": tensors}, config)
    for name, data in vocabulary.files().items():
        (target / name).write_bytes(data)
    return target


def base_of(name: str) -> str:
    """Return the weight that a tensor belongs to, as the language model names it."""
    name = names.in_language_model(name) or name
    return name if name.endswith("bias") else name.rpartition(".")[0]


def check_mixture(ours: Path, theirs: Path, chosen: Callable[[str], bool], target: Path) -> None:
    """Hold a mixture against a checkpoint that was written with the same tensors."""
    mixer = Mixer(open_checkpoint(ours), open_checkpoint(theirs))
    restored = [part.name for part in mixer.parts if chosen(part.name)]
    assert 0 < len(restored) < len(mixer.parts)
    tensors = {name: t for name, t in tensors_of(ours).items() if base_of(name) in restored}
    tensors |= {name: t for name, t in tensors_of(theirs).items() if base_of(name) not in restored}
    config = dict(open_checkpoint(ours).config or {})
    config.pop("quantization_config", None)
    write_checkpoint(target, {"model.safetensors": tensors}, config)
    mixed = mixer.mixed(restored)
    written, loaded, plain = load_model(target), load_model(mixed), load_model(theirs)
    with torch.no_grad():
        wanted, found, other = (model(input_ids=IDS).logits for model in (written, loaded, plain))
    assert torch.equal(found, wanted)
    assert torch.equal(next(iter(stream_forward(mixed, [IDS]))), wanted)
    assert not torch.equal(found, other)


@pytest.mark.parametrize("part", ["self_attn", "experts.3.", "layers.1.", "shared_experts"])
def test_a_mixture_is_the_checkpoint_that_it_describes(part: str, base: Path, int4: Path, tmp_path: Path) -> None:
    """Bit for bit the logits of a written checkpoint with the same tensors, loaded and streamed, both ways round."""
    check_mixture(base, int4, lambda name: part in name or name == "model.norm", tmp_path / "one")
    check_mixture(int4, base, lambda name: part in name or "layers.0." in name, tmp_path / "other")


def test_other_names_are_the_same_weights(k2_thinking: Path, k25: Path, k2_bf16: Path, tmp_path: Path) -> None:
    """K2.5 puts its language model below another name and has a vision tower: what it shares with K2 is unchanged."""
    assert Mixer(open_checkpoint(k2_thinking), open_checkpoint(k25)).changed() == []
    check_mixture(k2_bf16, k25, lambda name: ".experts.1." in name, tmp_path / "mixed")


def test_fused_experts_are_the_same_weights(base: Path, tmp_path: Path) -> None:
    """One tensor for all experts of a layer or one for each: nothing has changed, and one expert can be put back."""

    def fuse(tensors: Shard, config: dict[str, Any]) -> None:
        for layer in range(1, config["num_hidden_layers"]):
            place = f"model.layers.{layer}.mlp.experts"
            experts = range(config["n_routed_experts"])
            gate, up, down = (
                np.stack([tensors.pop(f"{place}.{expert}.{part}.weight")[1] for expert in experts])
                for part in ("gate_proj", "up_proj", "down_proj")
            )
            tensors[f"{place}.gate_up_proj"] = ("BF16", np.concatenate([gate, up], 1))
            tensors[f"{place}.down_proj"] = ("BF16", down)

    fused = changed(base, tmp_path / "fused", fuse)
    mixer = Mixer(open_checkpoint(base), open_checkpoint(fused))
    assert mixer.changed() == []
    some = mixer.mixed(["model.layers.1.mlp.experts.3.up_proj"])
    assert torch.equal(next(iter(stream_forward(some, [IDS]))), next(iter(stream_forward(base, [IDS]))))


def test_a_planted_damage_is_found(int4: Path, text: Path, tmp_path: Path) -> None:
    """A shared expert of zeros in an INT4 that is stored as BF16: every matrix differs, and the one is named."""
    wanted = "model.layers.1.mlp.shared_experts.down_proj"

    def harm(tensors: Shard, config: dict[str, Any]) -> None:
        del config
        tensors[f"{wanted}.weight"][1][:] = 0

    expanded = convert(int4, tmp_path / "expanded", to="bf16").folder
    steps: list[tuple[int, int]] = []
    options = OPTIONS | {"dtype": "float32", "progress": lambda *step: steps.append(step)}
    found = find_blame(int4, changed(expanded, tmp_path / "harmed", harm), text=text, **options)
    assert found.changed > 100
    assert found.classes[0].name == "shared experts"
    assert found.suspects[0].name == wanted
    assert found.suspects[0].share > 0.9
    assert found.together is not None
    assert found.together.share > 0.9
    assert steps == [(done + 1, 100) for done in range(found.passes)]


def test_nothing_is_blamed_where_nothing_is_wrong(base: Path, text: Path, tmp_path: Path) -> None:
    """The same bytes need no pass at all; the same values in other bytes are run, and their damage is 0."""

    def widen(tensors: Shard, config: dict[str, Any]) -> None:
        del config
        for name, (dtype, array) in tensors.items():
            if dtype == "BF16":
                tensors[name] = ("F32", (array.astype(np.uint32) << 16).view(np.float32))

    same = find_blame(base, changed(base, tmp_path / "same", lambda *_: None), text=text, **OPTIONS)
    assert (same.changed, same.passes, same.classes, same.together) == (0, 0, (), None)
    wide = find_blame(base, changed(base, tmp_path / "wide", widen), text=text, **OPTIONS)
    assert wide.changed > 100
    assert (wide.damage.value, wide.passes, wide.classes, wide.suspects) == (0, 3, (), ())
    assert wide.noise.value > 0


def nudge(tensors: Shard, config: dict[str, Any]) -> None:
    """Flip the last bit of every weight of the head."""
    del config
    tensors["lm_head.weight"][1][:] ^= 1


def test_damage_is_that_of_completions(base: Path, tmp_path: Path) -> None:
    """Of rows with prompts only what follows these is held against the baseline, as fidelity does it."""
    rows = tmp_path / "rows.jsonl"
    draw = np.random.default_rng(1)
    letters = ["".join(draw.choice(list(vocabulary.CHARACTERS[:-1]), 16)) for _ in range(20)]
    rows.write_text(
        "".join(
            json.dumps({"prompt": line[: 4 + number % 9], "completion": line[4 + number % 9 :]}) + "\n"
            for number, line in enumerate(letters)
        )
    )
    candidate = changed(base, tmp_path / "nudged", nudge)
    found = find_blame(base, candidate, text=rows, **OPTIONS)
    fidelity = measure_fidelity(base, candidate, text=rows, **OPTIONS, dtype="float32")
    assert found.completions
    assert found.text_hash == fidelity.text_hash
    assert (found.damage.value, found.damage.error) == pytest.approx((fidelity.kl.value, fidelity.kl.error), rel=1e-4)


def test_damage_below_the_noise_is_left_alone(base: Path, text: Path, tmp_path: Path) -> None:
    """In bfloat16, rounding alone moves the predictions more than that; in float32, the default, it is found."""
    candidate = changed(base, tmp_path / "nudged", nudge)
    blurred = find_blame(base, candidate, text=text, **OPTIONS, dtype="bfloat16")
    assert blurred.damage.value > 0
    assert (blurred.classes, blurred.passes) == ((), 3)
    sharp = find_blame(base, candidate, text=text, **OPTIONS)
    assert [suspect.name for suspect in sharp.suspects] == ["lm_head"]
    assert sharp.suspects[0].interval == (1, 1)


def test_logits_beyond_the_budget_go_to_files(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else changes."""
    candidate = changed(base, tmp_path / "nudged", nudge)
    kept = find_blame(base, candidate, text=text, **OPTIONS, dtype="float32")
    monkeypatch.setattr(measuring, "_BUDGET", 0)
    assert find_blame(base, candidate, text=text, **OPTIONS, dtype="float32") == kept


def test_what_cannot_be_compared_is_refused(base: Path, int4: Path, text: Path, tmp_path: Path) -> None:
    """Other architectures, tensors that are missing, other tokenizers, weights that are no numbers."""

    def lose(tensors: Shard, config: dict[str, Any]) -> None:
        del config, tensors["model.layers.1.mlp.experts.3.up_proj.weight"]

    def break_norm(tensors: Shard, config: dict[str, Any]) -> None:
        del config
        tensors["model.norm.weight"][1][:] = 0x7FC0

    other = changed(base, tmp_path / "other", lambda _, config: config.update(routed_scaling_factor=1.5))
    with pytest.raises(Incomparable, match="routed_scaling_factor"):
        find_blame(base, other, text=text, **OPTIONS)
    with pytest.raises(MissingTensor, match=r"experts\.3\.up_proj"):
        find_blame(base, changed(base, tmp_path / "less", lose), text=text, **OPTIONS)
    with pytest.raises(BadValue, match="no number"):
        find_blame(base, changed(base, tmp_path / "nan", break_norm), text=text, **OPTIONS)
    shutil.copytree(int4, tmp_path / "foreign")
    (tmp_path / "foreign" / "tokenizer.json").write_text("{}")
    with pytest.raises(Incomparable, match="tokenizer"):
        find_blame(base, tmp_path / "foreign", text=text, **OPTIONS)


def test_options_that_make_no_sense_are_refused(base: Path, int4: Path, text: Path) -> None:
    """Too few chunks for an interval, and fewer passes than the classes need."""
    with pytest.raises(UsageError, match="at least 16"):
        find_blame(base, int4, text=text, context=17, tokens=17 * 10)
    with pytest.raises(UsageError, match="passes: expected at least 8"):
        find_blame(base, int4, text=text, **OPTIONS, passes=7)


def test_too_short_a_text_is_not_taken_for_innocence(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage that no class could be shown to carry is there all the same: the advice is to read more."""
    candidate = changed(base, tmp_path / "nudged", nudge)
    monkeypatch.setattr(blame, "search", lambda *_, **__: Findings(classes=(), suspects=(), together=None))
    monkeypatch.setattr("k2quant.cli.eval.blame._BEFORE_SEARCH", 2)
    options = ["--text", str(text), "--context", "17", "--tokens", "512", "--dtype", "float32"]
    shown = CliRunner().invoke(main, ["eval", "blame", str(base), str(candidate), *options])
    assert shown.exit_code == 0
    assert "Nothing to blame" not in shown.stdout
    assert "Nothing named: there is damage" in shown.stdout
    assert "A longer text" in shown.stdout


def test_suspects_are_shown_without_their_class(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class may hold what harms and what heals, so that only its parts stand out: they are named all the same."""
    candidate = changed(base, tmp_path / "nudged", nudge)
    one = Found(parts=frozenset({0}), share=0.5, interval=(0.4, 0.6))
    monkeypatch.setattr(blame, "search", lambda *_, **__: Findings(classes=(), suspects=(one,), together=one))
    options = ["--text", str(text), "--context", "17", "--tokens", "512", "--dtype", "float32"]
    shown = CliRunner().invoke(main, ["eval", "blame", str(base), str(candidate), *options])
    assert "lm_head" in shown.stdout
    assert "40.0 to 60.0%" in shown.stdout
    assert "Nothing" not in shown.stdout


def test_the_command_shows_and_writes(base: Path, text: Path, tmp_path: Path) -> None:
    """A table for people, JSON for machines that reads back, and a plain sentence where there is nothing."""
    candidate = changed(base, tmp_path / "nudged", nudge)
    options = ["--text", str(text), "--context", "17", "--tokens", "512"]
    command = ["eval", "blame", str(base), str(candidate), *options]
    shown = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "out.json")])
    assert shown.exit_code == 0
    assert "lm_head" in shown.stdout
    assert "100.0 to 100.0%" in shown.stdout
    read = read_blame(tmp_path / "out.json")
    printed = CliRunner().invoke(main, [*command, "--json"])
    assert json.loads(printed.stdout) == json.loads(json.dumps(read.as_dict()))
    below = CliRunner().invoke(main, [*command, "--dtype", "bfloat16"])
    assert (below.exit_code, "--dtype float32" in below.stdout) == (0, True)
    same = CliRunner().invoke(main, ["eval", "blame", str(base), str(base), *options])
    assert (same.exit_code, "byte for byte" in same.stdout) == (0, True)
