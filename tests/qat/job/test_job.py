"""The job file of QAT: nothing in it is passed over, and what a run keeps of it is the same job."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from k2quant.errors import MalformedFile, UsageError
from k2quant.qat import Adapter, QATConfig, fake_quantize
from k2quant.qat.job import Distillation, Job, Optimizer, Saving, job_from, read_job
from k2quant.qat.run.folder import MANIFEST, Run

LEAST: dict[str, Any] = {"model": "m", "output": "o", "data": {"path": "d.jsonl"}, "training": {"steps": 40}}
WHOLE: dict[str, Any] = {
    "model": "models/k2",
    "output": "runs/one",
    "data": {"path": "d", "split": "test", "config": "c", "length": 8, "held_out": 0},
    "training": {
        "steps": 40,
        "batch": 8,
        "micro_batch": 2,
        "seed": 3,
        "precision": "bfloat16",
        "masters": "bfloat16",
        "gradient_checkpointing": True,
        "experts": "eager",
        "clip": 0.5,
        "evaluate_every": 7,
        "least_tokens": 0,
        "fallback": "rtn",
        "fallback_stats": None,
        "fake_quantize": True,
        "shard": False,
    },
    "quantize": {
        "to": "int4",
        "bits": {0: 8, 20: 4},
        "grid": "moonshot",
        "scope": "experts",
        "ignore": [r"layers\.1\."],
        "allow_split": False,
        "estimator": "plain",
        "train": "adapters",
        "adapter": {"rank": 4, "alpha": 8.0},
        "train_router": False,
    },
    "optimizer": {
        "method": "adamw",
        "rate": 1e-4,
        "scale_rate": None,
        "beta1": 0.8,
        "beta2": 0.9,
        "weight_decay": 0.1,
        "warmup": 2,
        "decay": "linear",
        "floor": 0.0,
    },
    "distill": {"teacher": "t", "weight": 1.0, "temperature": 2.0, "top_k": 16},
    "saving": {"every": 5, "keep": 3, "tensorboard": True},
}
HUGE = 16**5000  # Python does not write so many digits


def with_(place: str, value: Any, base: dict[str, Any] = LEAST) -> dict[str, Any]:
    """Return a job's content with a value at a dotted place."""
    content = copy.deepcopy(base)
    inner = content
    *parents, last = place.split(".") if place else [""]
    for name in parents:
        inner = inner.setdefault(name, {})
    inner[last] = value
    return content


def read(tmp_path: Path, text: str) -> Job:
    """Read a job file of this text."""
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return read_job(path)


class TestKeys:
    """What a file may hold."""

    def test_every_key_there_is(self, tmp_path: Path) -> None:
        """A file with every key is read, and each value arrives where it belongs."""
        job = read(tmp_path, yaml.safe_dump(WHOLE))
        assert (job.bits, job.quantize.bits, job.final_bits) == (((0, 8), (20, 4)), 4, 4)
        assert job.quantize.ignore == (r"layers\.1\.",)
        assert (job.data.split, job.training.micro_batch, job.optimizer.decay, job.saving.keep) == (
            "test",
            2,
            "linear",
            3,
        )
        assert job.distill is not None
        assert (job.distill.top_k, job.quantize.low_rank.rank if job.quantize.low_rank else None) == (16, 4)

    @pytest.mark.parametrize("level", ["", "data", "training", "quantize", "quantize.adapter", "optimizer", "distill"])
    def test_unknown_key(self, level: str) -> None:
        """A key that nobody knows is an error at every level, which names the level and what is known."""
        place = f"{level}.stepz" if level else "stepz"
        with pytest.raises(UsageError, match="unknown key 'stepz'; known are") as caught:
            job_from(with_(place, 1, WHOLE))
        assert all(part in str(caught.value) for part in level.split("."))

    @pytest.mark.parametrize("key", [1, None, True, 2.5])
    def test_key_that_is_no_text(self, key: object) -> None:
        """A key that is a number or nothing is an unknown one."""
        with pytest.raises(UsageError, match="unknown key"):
            job_from({**LEAST, key: 1})

    @pytest.mark.parametrize("place", ["model", "output", "data", "training", "data.path", "training.steps"])
    def test_missing_key(self, place: str) -> None:
        """A key that a job cannot do without is asked for by name."""
        whole = copy.deepcopy(LEAST)
        inner = whole
        *parents, last = place.split(".")
        for name in parents:
            inner = inner[name]
        del inner[last]
        with pytest.raises(UsageError, match=f"'{last}' is missing"):
            job_from(whole)

    def test_twice(self, tmp_path: Path) -> None:
        """A key that stands twice is an error: one of the two would be passed over."""
        with pytest.raises(UsageError, match=r"job\.yaml: .*twice"):
            read(tmp_path, "model: a\nmodel: b\n")
        with pytest.raises(UsageError, match="twice"):
            read(tmp_path, "training: {steps: 1, steps: 2}\n")

    def test_alias(self, tmp_path: Path) -> None:
        """An alias has no place in a job: it can stand for a billion values."""
        with pytest.raises(UsageError, match="aliases"):
            read(tmp_path, "model: &x a\noutput: *x\n")

    @pytest.mark.parametrize("text", ["", "[]", "a", "\t", "model: [", "!!python/object/apply:os.system [x]", "\x00"])
    def test_no_mapping(self, tmp_path: Path, text: str) -> None:
        """What is no mapping of plain data is refused with the file's name."""
        with pytest.raises(UsageError, match=r"job\.yaml"):
            read(tmp_path, text)

    @pytest.mark.parametrize("switch", ["trust_remote_code", "follow_links"])
    def test_trust_is_not_given_by_file(self, switch: str) -> None:
        """Whether code may run and links be followed is said on the command line, never in a file."""
        with pytest.raises(UsageError, match=f"{switch} is no key of a file; it is an option of the command line"):
            job_from({**LEAST, switch: True})

    def test_links_that_are_followed_make_no_other_training(self, tmp_path: Path) -> None:
        """A run that was begun with `--follow-links` is the same training without it, where the files lie in place."""
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(LEAST))
        followed = read_job(tmp_path / "job.yaml", follow_links=True)
        assert followed.follow_links
        assert followed.identity() == read_job(tmp_path / "job.yaml").identity()

    def test_empty_section(self, tmp_path: Path) -> None:
        """A section with nothing under it is there, with its defaults: `distill:` alone distils."""
        text = yaml.safe_dump({name: value for name, value in LEAST.items() if name != "quantize"})
        job = read(tmp_path, text + "distill:\noptimizer:\nsaving:\nquantize:\n  train: adapters\n  adapter:\n")
        assert (job.distill, job.optimizer, job.saving) == (Distillation(), Optimizer(), Saving())
        assert job.quantize == QATConfig(train="adapters", adapter=Adapter())
        assert read(tmp_path, text + "quantize:\n").quantize == QATConfig()

    def test_empty_section_that_cannot_be(self, tmp_path: Path) -> None:
        """An empty section is refused where a key of it is needed, or where what it stands for has no meaning."""
        with pytest.raises(UsageError, match="training: expected keys and values, found nothing"):
            read(tmp_path, yaml.safe_dump({**LEAST, "training": None}))
        with pytest.raises(UsageError, match="adapter: has a meaning with `train: adapters` alone"):
            read(tmp_path, yaml.safe_dump({**LEAST, "quantize": {"adapter": None}}))

    def test_null_in_a_manifest(self, tmp_path: Path) -> None:
        """What a run keeps says null where there is no distillation, and no adapter; it goes on without."""
        job = read(tmp_path, yaml.safe_dump(LEAST))
        Run(tmp_path).begin(job, {})
        assert '"distill": null' in (tmp_path / MANIFEST).read_text()
        assert job.distill is None
        assert Run(tmp_path).job() == job

    def test_bits_beside_quantize(self, tmp_path: Path) -> None:
        """`bits` at the top is refused, although a run's manifest keeps them there: it would beat `quantize.bits`."""
        with pytest.raises(UsageError, match="belongs under `quantize`"):
            read(tmp_path, yaml.safe_dump({**LEAST, "bits": [[0, 8], [20, 4]]}))


WRONG: list[tuple[str, Any]] = [
    ("model", 1),
    ("model", None),
    ("data", None),
    ("data", []),
    ("data.length", 1),
    ("data.length", 2.0),
    ("data.length", True),
    ("data.held_out", -1),
    ("data.split", None),
    ("training", "fast"),
    ("training.steps", 0),
    ("training.steps", "10"),
    ("training.steps", 10**8),  # the name of its checkpoint would not be found again
    ("training.batch", 0),
    ("training.micro_batch", 0),
    ("training.micro_batch", 3),  # 16 rows in threes
    ("training.seed", -1),
    ("training.precision", "float16"),
    ("training.precision", ["float32"]),
    ("training.masters", "float64"),
    ("training.gradient_checkpointing", 1),
    ("training.gradient_checkpointing", "yes"),
    ("training.experts", "fast"),
    ("training.clip", 0),
    ("training.clip", ".nan"),
    ("training.shard", None),
    ("optimizer.method", "sgd"),
    ("optimizer.rate", 0),
    ("optimizer.rate", -1e-4),
    ("optimizer.rate", "nan"),
    ("optimizer.rate", "inf"),
    ("optimizer.rate", "fast"),
    ("optimizer.rate", 10**400),
    ("optimizer.rate", True),
    ("optimizer.scale_rate", 0),
    ("optimizer.beta1", 1),  # torch refuses it with a traceback
    ("optimizer.beta2", 1.0),
    ("optimizer.beta2", -0.1),
    ("optimizer.floor", 1.1),
    ("optimizer.weight_decay", -1),
    ("optimizer.warmup", -1),
    ("optimizer.decay", "never"),
    ("distill.weight", 0),
    ("distill.weight", 1.01),
    ("distill.temperature", 0),
    ("distill.top_k", 0),
    ("saving.every", 0),
    ("saving.keep", 0),
    ("quantize", None),
    ("quantize.to", "int8"),
    ("quantize.bits", 5),
    ("quantize.bits", 4.0),
    ("quantize.bits", None),
    ("quantize.bits", {}),
    ("quantize.bits", {0: 8, 20: 5}),
    ("quantize.bits", {0: 8.0, 20: 4}),
    ("quantize.bits", {0: True, 20: 4}),
    ("quantize.bits", {10: 4}),
    ("quantize.bits", {-1: 8, 0: 4}),
    ("quantize.bits", {"0": 4}),
    ("quantize.bits", {0: 4, 20: None}),
    ("quantize.bits", {0: 8, 40: 4}),  # there are 40 steps: 4 bits would never come
    ("quantize.bits", {0: None, 41: 4}),
    ("quantize.bits", [[0, 4]]),
    ("quantize.bits", [4]),
    ("quantize.ignore", "experts"),
    ("quantize.ignore", ["("]),
    ("quantize.ignore", [1]),
    ("quantize.adapter", {"rank": 0}),
    ("quantize.adapter", {"rank": 2}),  # without `train: adapters`
]


class TestValues:
    """What a key may be."""

    @pytest.mark.parametrize(("place", "value"), WRONG, ids=[f"{place}={value!r:.30}" for place, value in WRONG])
    def test_impossible(self, place: str, value: object) -> None:
        """A value of another type, or one that makes no sense, is an error that names its key."""
        with pytest.raises(UsageError) as caught:
            job_from(with_(place, value))
        assert place.rpartition(".")[2] in str(caught.value)

    @pytest.mark.parametrize(
        ("place", "value", "said"),
        [
            ("optimizer.beta1", 1, "a number from 0 to 0.9999999, found 1.0"),
            ("optimizer.rate", 0, "a number above 0, at most 1000000, found 0.0"),
            ("optimizer.floor", 1.5, "a number from 0 to 1, found 1.5"),
            ("quantize.adapter.alpha", 1e6, "a number above 0, below 1000000, found 1000000.0"),
            ("quantize.adapter.rank", HUGE, "a whole number from 1 to 65536, found a number of thousands of digits"),
            ("quantize.bits", HUGE, "8 or 4 or 3 or 2, found a number of thousands of digits"),
        ],
        ids=["beta1", "rate", "floor", "alpha", "rank", "bits"],
    )
    def test_what_was_expected(self, place: str, value: object, said: str) -> None:
        """The message gives the very limits that hold: the value at a limit that it names is taken."""
        with pytest.raises(UsageError) as caught:
            job_from(with_(place, value))
        assert str(caught.value) == f"{place.replace('.', ': ')}: expected {said}"
        assert job_from(with_("optimizer", {"beta1": 0.9999999, "rate": 1e6, "floor": 1})).optimizer.floor == 1.0

    def test_a_ramp_that_ends_with_nothing(self) -> None:
        """`{0: null}` has no width to export; the message speaks of the last one."""
        with pytest.raises(UsageError, match=r"quantize: bits: the last width must be a number, .* found null"):
            job_from(with_("quantize.bits", {0: None}))

    def test_a_key_of_thousands_of_digits(self) -> None:
        """Python does not write such a number; the error is still one of ours."""
        with pytest.raises(UsageError, match="unknown key a number of thousands of digits"):
            job_from({**LEAST, HUGE: 1})

    @pytest.mark.parametrize("to", ["int4", "fp8"])
    @pytest.mark.parametrize("bits", [4.0, True, "4", None])
    def test_bits_from_python(self, bits: Any, to: Any) -> None:
        """A width that is no whole number is refused by the config and by `fake_quantize`, even if it equals one."""
        with pytest.raises(UsageError, match="bits"):
            QATConfig(to=to, bits=bits)
        with pytest.raises(UsageError, match="bits"):
            fake_quantize(torch.ones(128, 128), to=to, bits=bits)

    @pytest.mark.parametrize(("text", "rate"), [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("1", 1.0), ("5E-6", 5e-6)])
    def test_rate_as_people_write_it(self, tmp_path: Path, text: str, rate: float) -> None:
        """1e-4 is a number although YAML 1.1 reads it as text."""
        content = f"model: m\noutput: o\ndata: {{path: d}}\ntraining: {{steps: 4}}\noptimizer: {{rate: {text}}}\n"
        assert read(tmp_path, content).optimizer.rate == rate

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"quantize": {"to": "fp8", "bits": {0: 8, 2: 4}}}, "for int4"),
            ({"training": {"steps": 4, "shard": True}, "optimizer": {"method": "muon"}}, "muon works on whole"),
            (
                {
                    "training": {"steps": 4, "shard": True, "masters": "bfloat16"},
                    "quantize": {"estimator": "learned"},
                },
                "one dtype of all that trains",
            ),
            (
                {
                    "training": {"steps": 4, "shard": True},
                    "quantize": {"estimator": "learned", "bits": {0: 4, 2: 3}},
                },
                "learned scales begin anew",
            ),
        ],
    )
    def test_impossible_together(self, changes: dict[str, Any], message: str) -> None:
        """Settings that exclude one another are refused before anything is loaded."""
        with pytest.raises(UsageError, match=message):
            job_from({**LEAST, **changes})

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner),
            max_leaves=6,
        ),
        st.sampled_from(
            ["", "bits", "model", "data", "training", "quantize", "quantize.bits", "quantize.adapter", "optimizer.rate"]
        ),
    )
    def test_anything(self, value: Any, place: str) -> None:
        """Whatever stands at a key, a job is made of it or a usage error says why not."""
        try:
            job = job_from(with_(place, value) if place else value if isinstance(value, dict) else {})
        except UsageError:
            return
        assert isinstance(job, Job)


class TestEffect:
    """What would change nothing."""

    def test_warmup_beyond_the_last_step(self, tmp_path: Path) -> None:
        """A warm-up longer than the training is refused; one as long reaches the highest rate in the last step."""
        job = read(tmp_path, yaml.safe_dump(with_("optimizer.warmup", 40)))
        assert job.optimizer.share(39, 40) == 1.0
        with pytest.raises(UsageError, match=r"job\.yaml: optimizer: warmup: expected at most the 40 steps.* found 41"):
            read(tmp_path, yaml.safe_dump(with_("optimizer.warmup", 41)))

    @pytest.mark.parametrize("key", ["split", "config"])
    def test_keys_of_a_dataset_beside_a_file(self, tmp_path: Path, key: str) -> None:
        """`split` and `config` are refused where the path is a file or a folder, and taken for a dataset's name."""
        for place in (tmp_path, tmp_path / "job.yaml"):
            content = with_("data", {"path": str(place), key: "test"})
            with pytest.raises(UsageError, match=f"data: {key}: has a meaning for a dataset of a hub alone"):
                read(tmp_path, yaml.safe_dump(content))
        assert read(tmp_path, yaml.safe_dump(with_("data", {"path": "org/name", key: "test"}))).data.path == "org/name"

    def test_a_run_that_has_begun_goes_on(self, tmp_path: Path) -> None:
        """A run of a job that would be refused today is read back as it is."""
        job = job_from({**with_("optimizer.warmup", 41), "data": {"path": str(tmp_path), "split": "test"}})
        Run(tmp_path).begin(job, {})
        assert Run(tmp_path).job() == job


class TestBits:
    """Widths that change with the steps."""

    def test_ramp(self) -> None:
        """`{0: 8, 20: 4}` has 8 bits in the first twenty steps and 4 from then on, in whatever order it is written."""
        for ramp in ({0: 8, 20: 4}, {20: 4, 0: 8}):
            job = job_from(with_("quantize.bits", ramp))
            assert [job.bits_at(step) for step in (0, 19, 20, 39)] == [8, 8, 4, 4]
            assert job.final_bits == 4

    def test_begins_later(self) -> None:
        """`{0: null, 10: 4}` trains ten steps without fake quantisation."""
        job = job_from(with_("quantize.bits", {0: None, 10: 4}))
        assert [job.bits_at(step) for step in (0, 9, 10)] == [None, None, 4]

    def test_no_ramp(self) -> None:
        """Without one, the width is that of the config in every step."""
        job = job_from(with_("quantize.bits", 3))
        assert ({job.bits_at(step) for step in range(40)}, job.final_bits, job.bits) == ({3}, 3, ())


class TestRates:
    """The learning rate's course."""

    def test_course(self) -> None:
        """The rate grows over the warm-up, begins its fall at 1 and ends near the floor."""
        content = with_("optimizer", {"warmup": 4, "decay": "cosine", "floor": 0.1})
        shares = [job_from(content).optimizer.share(step, 40) for step in range(40)]
        assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
        assert shares[4] == 1.0
        assert sorted(shares[4:], reverse=True) == shares[4:]
        assert 0.1 < shares[-1] < 0.11


class TestIdentity:
    """Which jobs are the same training."""

    @pytest.mark.parametrize(
        "change",
        [
            {"output": "elsewhere"},
            {"model": "elsewhere"},
            {"data": {"path": "elsewhere"}},
            {"saving": {"every": 1}},
            {"training": {"steps": 40, "shard": True}},
            {"quantize": {"allow_split": True}},
        ],
        ids=["output", "model", "data", "saving", "shard", "permission"],
    )
    def test_same(self, change: dict[str, Any]) -> None:
        """Where files lie, how often it is saved, over how many it is shared, what is allowed: the same training."""
        assert job_from({**LEAST, **change}).identity() == job_from(LEAST).identity()

    @pytest.mark.parametrize(
        "change",
        [
            {"data": {**LEAST["data"], "held_out": 1}},
            {"data": {**LEAST["data"], "turns": "last"}},
            {"data": {**LEAST["data"], "reasoning": "split"}},
            {"training": {"steps": 41}},
            {"quantize": {"bits": 3}},
            {"quantize": {"bits": {0: 8, 3: 4}}},
            {"optimizer": {"rate": 2e-5}},
            {"distill": {}},
        ],
    )
    def test_other(self, change: dict[str, Any]) -> None:
        """Whatever moves a weight does."""
        assert job_from({**LEAST, **change}).identity() != job_from(LEAST).identity()

    def test_a_run_of_before_goes_on(self) -> None:
        """Keys that its version did not have are not in its manifest, and mean there what they mean by default."""
        assert not {"turns", "reasoning"} & job_from(LEAST).identity()["data"].keys()

    @pytest.mark.parametrize("content", [LEAST, WHOLE, with_("quantize.bits", {0: None, 5: 3, 6: 4})])
    def test_manifest_round_trip(self, tmp_path: Path, content: dict[str, Any]) -> None:
        """A run gives the very job back that it was begun with."""
        job = job_from(content)
        Run(tmp_path).begin(job, {"data": "d"})
        assert Run(tmp_path).job() == job

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text[: len(text) // 2],
            lambda text: text.replace('"steps": 40', '"steps": -1'),
            lambda text: text.replace('"bits": [', '"bits": [7, '),
            lambda text: text.replace('"bits": [', '"bits": [[{}, 4], '),
            lambda text: text.replace('"job"', '"jab"'),
        ],
        ids=["torn", "steps", "no pair", "a step that is a mapping", "no job"],
    )
    def test_damaged_manifest(self, tmp_path: Path, damage: Any) -> None:
        """A damaged manifest is an error that names the file."""
        Run(tmp_path).begin(job_from(with_("quantize.bits", {0: 8, 20: 4})), {})
        path = tmp_path / MANIFEST
        text = path.read_text()
        assert damage(text) != text
        path.write_text(damage(text))
        with pytest.raises(MalformedFile, match=MANIFEST):
            Run(tmp_path).job()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantize": {"bits": 8}}, "8-bit codes have no place"),
        ({"quantize": {"bits": {0: 4, 2: 8}}}, "8-bit codes have no place"),
        ({"quantize": {"bits": {0: 4, 2: 3, 4: 4}, "grid": "compressed-tensors"}}, "only moonshot has other widths"),
        ({"quantize": {"estimator": "learned"}, "training": {"steps": 10, "fake_quantize": False}}, "learns no scales"),
        ({"optimizer": {"scale_rate": 1e-3}}, "scale_rate has a meaning"),
        ({"quantize": {"ignore": ["(a+)+$"]}}, "take for ever"),
        ({"training": {"steps": HUGE}}, "thousands of digits"),
        ({"output": ""}, "output: expected a path"),
    ],
)
def test_what_makes_no_sense_together_is_refused(change: dict[str, Any], said: str) -> None:
    """Settings that could only be found wanting in the middle of a training are refused when the job is read."""
    with pytest.raises(UsageError, match=said):
        job_from({**LEAST, "training": {"steps": 10}, **change})
