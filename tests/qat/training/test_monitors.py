"""What watches a training run: routers, oscillating codes, and TensorBoard."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from k2quant.errors import MissingExtra, MissingTensor, ShapeMismatch, UnsupportedFormat
from k2quant.nano import architecture
from k2quant.qat.run.history import Evaluation, StepRecord
from k2quant.qat.run.tensorboard import Board
from k2quant.qat.training.oscillation import WINDOW, Counts, Oscillation
from k2quant.qat.training.routers import RouterWatch, agreement
from tiny import NANO

TOKENS = torch.randint(0, 90, (2, 12), generator=torch.Generator().manual_seed(3))
GATES = ("model.layers.1.mlp.gate", "model.layers.2.mlp.gate")


@pytest.fixture
def model() -> nn.Module:
    """A DeepSeek-V3 of three layers, the first dense, with 8 experts of which each token takes 2."""
    torch.manual_seed(0)
    return architecture.build(NANO)


@pytest.fixture
def watch(model: nn.Module) -> Iterator[RouterWatch]:
    """A watch that counts."""
    watch = RouterWatch(model)
    watch.counting = True
    yield watch
    watch.close()


def run(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    """Return the logits of some tokens."""
    return cast("Tensor", model(input_ids=tokens, use_cache=False).logits)


def chosen(model: nn.Module, tokens: Tensor = TOKENS) -> dict[str, Tensor]:
    """Return what each router chooses, noted by a hook that has nothing to do with the watch."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, outputs: found.update({name: outputs[2]})

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name in GATES]
    with torch.no_grad():
        run(model, tokens)
    for hook in hooks:
        hook.remove()
    return found


def test_loads_are_the_tokens_that_each_expert_was_sent(model: nn.Module, watch: RouterWatch) -> None:
    """Counts of two passes are those of a direct count, for every router and no other module."""
    watch.counting = False
    passes = [chosen(model), chosen(model, TOKENS[:1])]
    watch.counting = True
    run(model)
    run(model, TOKENS[:1])
    assert watch.names == GATES
    for name, load in watch.load().items():
        direct = torch.cat([found[name].flatten() for found in passes]).bincount(minlength=8)
        assert load.dtype == torch.int64
        assert torch.equal(load, direct)


def test_only_real_tokens_count(model: nn.Module, watch: RouterWatch) -> None:
    """Padding is left out by the mask, in loads and in choices."""
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 5:] = False
    watch.mask = mask.flatten()
    run(model)
    noted = watch.choices(lambda: run(model))
    watch.close()
    for name, experts in chosen(model).items():
        real = experts[mask.flatten()]
        assert torch.equal(watch.load()[name], real.flatten().bincount(minlength=8))
        assert torch.equal(noted[name], real.to(torch.int32))


def test_a_mask_of_other_tokens_is_refused(model: nn.Module, watch: RouterWatch) -> None:
    """A mask that does not fit the pass is the trainer's mistake, and is named."""
    watch.mask = torch.ones(5, dtype=torch.bool)
    with pytest.raises(ShapeMismatch, match=r"model\.layers\.1\.mlp\.gate.*mask.*\(24,\).*\(5,\)"):
        run(model)


def test_nothing_counts_while_counting_is_off(model: nn.Module, watch: RouterWatch) -> None:
    """Evaluation passes leave the loads alone."""
    watch.counting = False
    run(model)
    assert not any(int(load.sum()) for load in watch.load().values())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")  # its new name is newer than our oldest version
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_passes_count_once(model: nn.Module, watch: RouterWatch, *, reentrant: bool) -> None:
    """The backward pass of gradient checkpointing runs the routers again; the loads stay those of one pass."""
    watch.counting = False
    experts = chosen(model)
    watch.counting = True
    runs = []
    gate = model.get_submodule(GATES[0])
    gate.register_forward_hook(lambda *_: runs.append(1))
    cast("Any", model).gradient_checkpointing_enable({"use_reentrant": reentrant})
    cast("Any", model).enable_input_require_grads()
    model.train()
    run(model).square().mean().backward()
    assert len(runs) == 2, "the routers were not recomputed, so this test proves nothing"
    for name, load in watch.load().items():
        assert torch.equal(load, experts[name].flatten().bincount(minlength=8))


@pytest.mark.parametrize("reentrant", [True, False])
def test_nested_checkpoints_count_once(watch: RouterWatch, model: nn.Module, *, reentrant: bool) -> None:
    """Checkpoints within checkpoints recompute more than once, and still count once."""
    gate = model.get_submodule(GATES[0])
    hidden = torch.randn(7, 64, requires_grad=True)

    def inner(values: Tensor) -> Tensor:
        return cast("Tensor", gate(values)[1].sum() * values)

    def outer(values: Tensor) -> Tensor:
        return cast("Tensor", checkpoint(inner, values, use_reentrant=reentrant)) * 2

    cast("Tensor", checkpoint(outer, hidden, use_reentrant=reentrant)).sum().backward()
    assert int(watch.load()[GATES[0]].sum()) == 7 * 2


def test_counting_goes_on_after_a_resume(model: nn.Module, watch: RouterWatch) -> None:
    """Half a run, its state in another watch, and the other half give the loads of the whole run."""
    run(model)
    state = watch.state()
    run(model)
    whole = watch.load()
    resumed = RouterWatch(model)
    resumed.restore(state)
    watch.close()
    resumed.counting = True
    run(model)
    assert all(torch.equal(whole[name], load) for name, load in resumed.load().items())
    state[GATES[0]].zero_()
    assert int(resumed.load()[GATES[0]].sum()) == 2 * TOKENS.numel() * 2, "a state is a copy"


def test_states_of_other_routers_are_refused(watch: RouterWatch) -> None:
    """A state of another model names what does not fit, and changes nothing."""
    state = watch.state()
    with pytest.raises(MissingTensor, match=r"expected 2 routers, found model\.layers\.2"):
        watch.restore({GATES[0]: state[GATES[0]]})
    with pytest.raises(ShapeMismatch, match=r"model\.layers\.2\.mlp\.gate.*\(8,\).*\(9,\)"):
        watch.restore({GATES[0]: state[GATES[0]] + 5, GATES[1]: torch.zeros(9, dtype=torch.int64)})
    assert not any(int(load.sum()) for load in watch.load().values())


def test_closed_watches_see_nothing(model: nn.Module, watch: RouterWatch) -> None:
    """A closed watch leaves no hook behind."""
    watch.close()
    run(model)
    assert not any(int(load.sum()) for load in watch.load().values())
    assert not any(module._forward_hooks for module in model.modules())  # noqa: SLF001  # there is no public list


def test_choices_are_the_experts_of_each_token(model: nn.Module, watch: RouterWatch) -> None:
    """Passes follow one another; they are not counted, and counting goes on as before, errors or not."""
    found = watch.choices(lambda: (run(model), run(model, TOKENS[:1])))
    assert not any(int(load.sum()) for load in watch.load().values())
    assert watch.counting
    with pytest.raises(ZeroDivisionError):
        watch.choices(lambda: 1 // 0)
    assert watch.counting
    first, second = chosen(model), chosen(model, TOKENS[:1])
    for name in GATES:
        assert torch.equal(found[name], torch.cat([first[name], second[name]]).to(torch.int32))


def test_agreement_is_the_share_of_choices_in_common() -> None:
    """The order of a token's experts does not matter: 3 of 4 choices are shared here."""
    ours = {"gate": torch.tensor([[1, 2], [3, 4]]), "only here": torch.tensor([[1, 2]])}
    theirs = {"gate": torch.tensor([[2, 1], [4, 5]])}
    assert agreement(ours, theirs) == {"gate": 0.75}
    assert agreement(theirs, theirs) == {"gate": 1.0}
    with pytest.raises(ShapeMismatch, match="same tokens"):
        agreement(ours, {"gate": torch.tensor([[2, 1]])})


def test_agreement_of_moved_routers_falls(model: nn.Module, watch: RouterWatch) -> None:
    """A model agrees with itself wholly, and less with one whose router was turned around."""
    before = watch.choices(lambda: run(model))
    assert agreement(before, watch.choices(lambda: run(model))) == dict.fromkeys(GATES, 1.0)
    with torch.no_grad():
        cast("Tensor", model.get_submodule(GATES[1]).weight).neg_()
    after = agreement(before, watch.choices(lambda: run(model)))
    assert after[GATES[0]] == 1.0
    assert after[GATES[1]] < 1.0


class Router(nn.Module):
    """A router as Moonshot's own code has it: two results, experts first; or one that returns none."""

    def __init__(self, *, silent: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))
        self.e_score_correction_bias = nn.Parameter(torch.zeros(4))
        self.silent = silent

    def forward(self, hidden: Tensor) -> Any:
        """Return the likeliest expert of each token."""
        scores, experts = (hidden @ self.weight.T).topk(1)
        return (scores,) if self.silent else (experts, scores)


def test_routers_are_known_by_structure() -> None:
    """Any module with a bias of scores is a router, whatever its class and the order of its results."""
    model = nn.ModuleDict({"gate": Router(), "linear": nn.Linear(4, 4)})
    watch = RouterWatch(model)
    watch.counting = True
    model["gate"](torch.eye(4)[[2, 2, 0]])
    assert {name: load.tolist() for name, load in watch.load().items()} == {"gate": [1, 0, 2, 0]}


def test_routers_without_choices_are_named() -> None:
    """A router whose results hold no experts ends in an error, not in loads of nothing."""
    model = nn.ModuleDict({"gate": Router(silent=True)})
    watch = RouterWatch(model)
    watch.counting = True
    with pytest.raises(UnsupportedFormat, match=r"`gate`.*no chosen experts"):
        model["gate"](torch.eye(4))


def oscillation_of(rows: list[list[int]]) -> Oscillation:
    """Return what was seen of one tensor whose codes were these, one observation after another."""
    codes = iter([torch.tensor(row, dtype=torch.int8) for row in rows])
    watched = Oscillation({"w": lambda: next(codes)})
    for _ in rows:
        watched.observe()
    return watched


def test_back_and_forth_is_told_from_one_way() -> None:
    """Weight 0 rests, 1 climbs, 2 jumps there and back, 3 climbs twice and then falls."""
    watched = oscillation_of([[3, 0, 1, 0], [3, 1, 2, 1], [3, 2, 1, 2], [3, 3, 1, 1]])
    assert watched.counts() == {"w": Counts(weights=4, flipped=3, oscillating=2)}


@pytest.mark.parametrize(("rest", "oscillating"), [(WINDOW, 1), (WINDOW + 1, 0)])
def test_late_returns_are_no_oscillation(rest: int, oscillating: int) -> None:
    """A code that comes back within the window oscillates; one observation later it does not."""
    watched = oscillation_of([[0], *([[1]] * rest), [0]])
    assert watched.counts()["w"] == Counts(weights=1, flipped=1, oscillating=oscillating)


def test_widest_jumps_keep_their_direction() -> None:
    """From -128 to 127 and back is up and down, although int8 cannot hold the difference."""
    assert oscillation_of([[-128], [127], [-128]]).counts()["w"].oscillating == 1
    assert oscillation_of([[-128], [0], [127]]).counts()["w"].oscillating == 0


def test_codes_of_another_width_are_not_compared() -> None:
    """Between 8 and 4 bits every code changes, and none flips; what was counted before stays."""
    codes = torch.tensor([100, -100, 50], dtype=torch.int8)
    watched = Oscillation({"w": lambda: codes})
    watched.observe()
    codes[2] = 51
    watched.observe()
    watched.rebase()
    codes.copy_(torch.tensor([7, -7, 3]))
    watched.observe()
    assert watched.counts()["w"] == Counts(weights=3, flipped=1, oscillating=0)
    codes[2] = 2  # a fall, but the climb before it was of another width
    watched.observe()
    assert watched.counts()["w"] == Counts(weights=3, flipped=1, oscillating=0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=2, max_size=40), st.data())
def test_oscillation_is_what_a_plain_loop_counts(rows: list[list[int]], data: st.DataObject) -> None:
    """Weight by weight, in plain Python, with a resume at any place: the same counts."""
    flipped, oscillating = 0, 0
    for column in zip(*rows, strict=True):
        changes = [
            (now, 1 if after > before else -1)
            for now, (before, after) in enumerate(pairwise(column), 1)
            if before != after
        ]
        flipped += bool(changes)
        oscillating += any(a[1] != b[1] and b[0] - a[0] <= WINDOW for a, b in pairwise(changes))
    assert oscillation_of(rows).counts()["w"] == Counts(3, flipped, oscillating)

    stop = data.draw(st.integers(1, len(rows) - 1))
    state = oscillation_of(rows[:stop]).state()
    place = [stop - 1]
    resumed = Oscillation({"w": lambda: torch.tensor(rows[place[0]], dtype=torch.int8)})
    resumed.restore(state)
    for number in range(stop, len(rows)):
        place[0] = number
        resumed.observe()
    assert resumed.counts()["w"] == Counts(3, flipped, oscillating)


def test_nothing_seen_is_nothing_said() -> None:
    """Without an observation nothing is counted, and a state that says so can be restored."""
    watched = Oscillation({"w": lambda: torch.zeros(2, dtype=torch.int8)})
    assert watched.counts() == {}
    watched.restore(watched.state())
    assert watched.counts() == {}


def test_states_of_other_codes_are_refused() -> None:
    """A state of another sample or shape is named, and changes nothing."""
    watched = oscillation_of([[1, 2], [1, 3]])
    state = watched.state()
    other = Oscillation({"v": lambda: torch.zeros(2, dtype=torch.int8)})
    with pytest.raises(MissingTensor, match=r"v\.codes"):
        other.restore(state)
    assert other.counts() == {}
    longer = Oscillation({"w": lambda: torch.zeros(3, dtype=torch.int8)})
    with pytest.raises(ShapeMismatch, match=r"w\.codes.*\(3,\).*\(2,\)"):
        longer.restore(state)
    with pytest.raises(MissingTensor, match="observations"):
        longer.restore({})


STEP = StepRecord(
    step=3, loss=2.5, cross_entropy=2.25, divergence=None, rate=1e-3, norm=0.5, bits=4, tokens=100, seconds=0.5
)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder))
    board.Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_tensorboard_shows_what_was_recorded(tmp_path: Path) -> None:
    """Each number that was measured is a scalar at its step; what was not is left out."""
    pytest.importorskip("tensorboard")
    board = Board(tmp_path)
    board.add(STEP)
    board.add(Evaluation(step=3, loss=2.0, start=1.5))
    board.close()
    found = scalars(tmp_path)
    assert found["train/loss"] == [(3, 2.5)]
    assert found["train/tokens_per_second"] == [(3, 200.0)]
    assert found["train/bits"] == [(3, 4.0)]
    assert found["held_out/fake_quantised"] == [(3, 2.0)]
    assert found["held_out/start"] == [(3, 1.5)]
    assert not {"train/divergence", "held_out/unrounded", "held_out/start_rounded"} & found.keys()


def test_resumed_boards_hide_what_is_done_again(tmp_path: Path) -> None:
    """Steps behind the checkpoint that were written before the kill do not stand twice."""
    pytest.importorskip("tensorboard")
    first = Board(tmp_path)
    for step in (1, 2, 3):
        first.add(Evaluation(step=step, loss=float(step)))
    first.close()
    second = Board(tmp_path, after=2)
    second.add(Evaluation(step=3, loss=30.0))
    second.close()
    assert scalars(tmp_path)["held_out/fake_quantised"] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_boards_that_begin_anew_show_nothing_of_before(tmp_path: Path) -> None:
    """What a run wrote that was killed before its first checkpoint is hidden, the evaluation of step 0 too."""
    pytest.importorskip("tensorboard")
    for loss, steps in ((1.0, (0, 1, 2)), (30.0, (0, 1))):
        board = Board(tmp_path)
        for step in steps:
            board.add(Evaluation(step=step, loss=loss))
        board.close()
    assert scalars(tmp_path)["held_out/fake_quantised"] == [(0, 30.0), (1, 30.0)]


def test_missing_tensorboard_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package, an error names what to install, and nothing is written."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtra, match=r"pip install .k2quant\[qat\]"):
        Board(tmp_path / "board")
    assert not (tmp_path / "board").exists()
