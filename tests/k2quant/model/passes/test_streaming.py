"""A pass with one layer in memory at a time gives what the loaded model gives, and goes on after a kill."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k2quant.errors import (
    CheckpointError,
    DestinationForeign,
    DestinationInUse,
    DestinationStale,
    MalformedFile,
    OutputError,
    UsageError,
)
from k2quant.model import LayerHooks, load_model, stream_forward
from k2quant.model.assembly import Assembly, own_tensors
from k2quant.model.loading import assemble
from k2quant.model.matrices import Dense
from k2quant.model.passes import activations, streaming
from k2quant.nano.demo import K2_CONFIG

IDS = torch.randint(0, 2048, (3, 10), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0  # padded on the left
BATCHES: list[Any] = [IDS, {"input_ids": IDS, "attention_mask": MASK}, IDS[:1, :3]]


def loaded_logits(path: Path) -> list[Tensor]:
    """Return what the loaded model makes of the batches."""
    model: Any = load_model(path)
    with torch.no_grad():
        return [model(**(batch if isinstance(batch, dict) else {"input_ids": batch})).logits for batch in BATCHES]


@pytest.mark.parametrize("layout", ["k2_source", "k2_thinking", "k25", "k2_mixed", "k2_bf16"])
@pytest.mark.parametrize("budget", [0, 10**9])
def test_logits_equal_those_of_the_loaded_model(layout: str, budget: int, request: pytest.FixtureRequest) -> None:
    """Bit for bit, with padding, batches of several sizes, and activations in memory or in files."""
    path = request.getfixturevalue(layout)
    found = list(stream_forward(path, BATCHES, budget=budget))
    assert all(torch.equal(a, b) for a, b in zip(found, loaded_logits(path), strict=True))


class Files(LayerHooks):
    """Counts the files of activations below a folder after each layer."""

    def __init__(self, folder: Path) -> None:
        """Look below a folder."""
        self.folder = folder
        self.counts: list[int] = []

    def after(self, layer: int, module: nn.Module) -> bool:
        """Count them."""
        del layer, module
        self.counts.append(len(list(self.folder.rglob("*.bin"))))
        return False


def test_memory_has_to_hold_the_activations_of_two_stages(
    k2_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for what goes into a layer and what comes out of it there are no files; with a byte less there are."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    hidden = IDS.numel() * K2_CONFIG["hidden_size"] * 2  # bytes of a stage in BF16
    for budget, counts in ((2 * hidden, [0, 0, 0]), (2 * hidden - 1, [1, 1, 1])):
        files = Files(tmp_path)
        list(stream_forward(k2_bf16, [IDS], files, budget=budget))
        assert files.counts == counts


class Watch(LayerHooks):
    """Notes what happens, and how much of the model is in memory."""

    def __init__(self, stop_before: int | None = None) -> None:
        """Stop, as a kill would, before a layer."""
        self.seen: list[tuple[str, int]] = []
        self.resident: list[int] = []
        self.stop_before = stop_before

    def before(self, layer: int, module: nn.Module) -> None:
        """Note it."""
        if layer == self.stop_before:
            raise KeyboardInterrupt
        self.seen.append(("before", layer))
        owner: Any = module
        self.resident.append(sum(t.nbytes for t in [*owner.parameters(), *owner.buffers()] if not t.is_meta))

    def batch(self, layer: int, number: int, inputs: Tensor, outputs: Tensor) -> None:
        """Note it."""
        assert inputs.shape == outputs.shape
        self.seen.append((f"batch {number}", layer))

    def after(self, layer: int, module: nn.Module) -> bool:
        """Note it."""
        del module
        self.seen.append(("after", layer))
        return False


def test_hooks_see_every_layer_and_batch_in_order(k2_thinking: Path) -> None:
    """Each layer is begun once, sees every batch, and is ended once."""
    watch = Watch()
    list(stream_forward(k2_thinking, BATCHES, watch))
    one = ["before", "batch 0", "batch 1", "batch 2", "after"]
    assert watch.seen == [(step, layer) for layer in range(3) for step in one]


def test_one_layer_is_in_memory_at_a_time(k2_thinking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a layer runs, no other part of the model has memory."""
    modules: dict[str, nn.Module] = {}

    def remembered(*args: Any, **kwargs: Any) -> Assembly:
        assembly = assemble(*args, **kwargs)
        modules.update(assembly.model.named_modules())
        return assembly

    class Look(LayerHooks):
        def batch(self, layer: int, number: int, inputs: Tensor, outputs: Tensor) -> None:
            del number, inputs, outputs
            held = {name for name, module in modules.items() if any(not t.is_meta for _, t in own_tensors(module))}
            held |= {name for name, module in modules.items() if any(not t.is_meta for t in module.buffers(False))}
            inside = {name for name in held if name.startswith(f"model.layers.{layer}.")}
            assert inside
            assert held - inside <= {"model.rotary_emb"}

    monkeypatch.setattr(streaming, "assemble", remembered)
    list(stream_forward(k2_thinking, BATCHES, Look()))


def test_a_changed_layer_is_run_again(k2_bf16: Path) -> None:
    """A hook may change a layer after its batches and have them run through it once more, as calibration does."""

    class Halve(LayerHooks):
        def __init__(self) -> None:
            self.runs = 0

        def after(self, layer: int, module: nn.Module) -> bool:
            if layer != 0 or self.runs:
                return False
            self.runs += 1
            owner: Any = module
            with torch.no_grad():
                owner.mlp.down_proj.weight *= 0.5
            return True

    found = list(stream_forward(k2_bf16, BATCHES, Halve()))
    model: Any = load_model(k2_bf16)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 0.5
        assert torch.equal(found[0], model(IDS).logits)


def test_a_killed_pass_goes_on_after_the_last_whole_layer(k2_thinking: Path, tmp_path: Path) -> None:
    """Layers that were done are not run again, the logits are the same, and the folder is gone afterwards."""
    folder = tmp_path / "pass"
    with pytest.raises(KeyboardInterrupt):
        list(stream_forward(k2_thinking, BATCHES, Watch(stop_before=2), folder=folder))
    watch = Watch()
    found = list(stream_forward(k2_thinking, BATCHES, watch, folder=folder, budget=0))
    assert {layer for _, layer in watch.seen} == {2}
    assert all(torch.equal(a, b) for a, b in zip(found, loaded_logits(k2_thinking), strict=True))
    assert not folder.exists()


def test_a_folder_of_another_pass_is_refused(k2_thinking: Path, k2_source: Path, tmp_path: Path) -> None:
    """Other batches, another checkpoint, other options, or files of somebody else: nothing is mixed up or deleted."""
    folder = tmp_path / "pass"
    with pytest.raises(KeyboardInterrupt):
        list(stream_forward(k2_thinking, BATCHES, Watch(stop_before=1), folder=folder))
    with pytest.raises(DestinationStale):
        list(stream_forward(k2_thinking, BATCHES[:1], folder=folder))
    with pytest.raises(DestinationStale):
        list(stream_forward(k2_source, BATCHES, folder=folder))
    with pytest.raises(DestinationStale):
        list(stream_forward(k2_thinking, BATCHES, folder=folder, dtype="float32"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(DestinationForeign):
        list(stream_forward(k2_thinking, BATCHES, folder=tmp_path / "mine"))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def stopped(path: Path, folder: Path) -> None:
    """Leave a pass behind that was killed before its second layer."""
    with pytest.raises(KeyboardInterrupt):
        list(stream_forward(path, BATCHES, Watch(stop_before=1), folder=folder))


def cut(file: Path) -> None:
    """Cut a file short."""
    file.write_bytes(file.read_bytes()[:40])


def flip(file: Path) -> None:
    """Change one bit."""
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.write_bytes(data)


def outside(file: Path) -> None:
    """Put a link in its place that leaves the folder."""
    other = file.parent.parent / "other"
    file.rename(other)
    file.symlink_to(other)


def pipe(file: Path) -> None:
    """Put a pipe in its place."""
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("harm", [cut, flip, outside, pipe, Path.unlink])
def test_a_damaged_activation_is_named(harm: Callable[[Path], object], k2_thinking: Path, tmp_path: Path) -> None:
    """A file that is not what was written, or lies elsewhere, is an error with its name, and never a wrong result."""
    folder = tmp_path / "pass"
    stopped(k2_thinking, folder)
    victim = min(folder.glob("*.bin"))
    harm(victim)
    with pytest.raises(CheckpointError, match=victim.name):
        list(stream_forward(k2_thinking, BATCHES, folder=folder))


@pytest.mark.parametrize("note", [{"finished": 7}, {"finished": 1, "crc32": [1]}, {"finished": "x"}, {"crc32": "x"}])
def test_a_damaged_note_is_refused(note: dict[str, Any], k2_thinking: Path, tmp_path: Path) -> None:
    """What no pass leaves behind is not gone on from."""
    folder = tmp_path / "pass"
    stopped(k2_thinking, folder)
    state = folder / "k2quant_stream.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | note))
    with pytest.raises(MalformedFile):
        list(stream_forward(k2_thinking, BATCHES, folder=folder))


def test_files_of_others_in_the_folder_stay(k2_thinking: Path, tmp_path: Path) -> None:
    """What a hook or a user put into the folder is there when the pass is through."""
    folder = tmp_path / "pass"
    stopped(k2_thinking, folder)
    mine = {"statistics.npy", "thesis.partial"}
    for name in mine:
        (folder / name).write_text("mine")
    list(stream_forward(k2_thinking, BATCHES, folder=folder))
    assert {path.name for path in folder.iterdir()} == mine


def test_two_passes_do_not_share_a_folder(k2_thinking: Path, tmp_path: Path) -> None:
    """The second one is refused while the first is at work, and the first ends well."""
    folder = tmp_path / "pass"
    first = stream_forward(k2_thinking, BATCHES, folder=folder)
    found = [next(first)]
    with pytest.raises(DestinationInUse):
        list(stream_forward(k2_thinking, BATCHES, folder=folder))
    found += list(first)
    assert all(torch.equal(a, b) for a, b in zip(found, loaded_logits(k2_thinking), strict=True))


def test_odd_folders_are_errors_of_ours(k2_thinking: Path, tmp_path: Path) -> None:
    """A file, a place below a file and a link to nowhere cannot be a folder."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "link"):
        with pytest.raises(OutputError):
            list(stream_forward(k2_thinking, BATCHES, folder=place))


def test_a_full_disk_is_an_error_of_ours(k2_thinking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running out of space while activations are written says so, and the pass can go on later."""
    folder = tmp_path / "pass"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(activations, "write_all", full)
        with pytest.raises(OutputError, match="No space left"):
            list(stream_forward(k2_thinking, BATCHES, folder=folder))
    found = list(stream_forward(k2_thinking, BATCHES, folder=folder))
    assert all(torch.equal(a, b) for a, b in zip(found, loaded_logits(k2_thinking), strict=True))


def test_hooks_may_say_what_they_are(k2_thinking: Path, tmp_path: Path) -> None:
    """A pass does not go on under hooks that call themselves something else."""
    folder = tmp_path / "pass"
    stopped(k2_thinking, folder)
    other = Watch()
    other.identity = "something else"
    with pytest.raises(DestinationStale):
        list(stream_forward(k2_thinking, BATCHES, other, folder=folder))


def test_a_pass_that_is_never_begun_leaves_nothing(k2_thinking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a folder, the temporary one exists only while the pass runs."""

    def refuse(*_: object, **__: object) -> str:
        pytest.fail("a folder was made")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    stream_forward(k2_thinking, BATCHES)


@pytest.mark.parametrize(
    "batches",
    [
        [],
        [torch.zeros(3, dtype=torch.int64)],
        [torch.zeros(1, 3)],
        [torch.full((1, 3), 2048)],
        [torch.full((1, 3), -1)],
        [{"ids": IDS}],
        [5],
        [None],
        ["x"],
        [[5]],
        5,
        IDS,
        [{"input_ids": [[1]]}],
        [{"input_ids": IDS, "attention_mask": MASK.float()}],
        [{"input_ids": IDS, "attention_mask": MASK[:1]}],
    ],
)
def test_batches_that_make_no_sense_are_refused(batches: Any, k2_thinking: Path) -> None:
    """Wrong shapes, dtypes, names and tokens beyond the vocabulary are usage errors, found before a layer is read."""
    with pytest.raises(UsageError):
        stream_forward(k2_thinking, batches)


def test_matrices_report_what_they_hold() -> None:
    """A dense matrix refuses a tensor of another shape."""
    with pytest.raises(UsageError, match="expected"):
        Dense(torch.zeros(2, 3)).put({"weight": torch.zeros(3, 2)})
