"""What an export's report says of the distance from its base, against both as they lie on the disk."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from k2quant import qat
from k2quant.checking.comparison import compare
from k2quant.checkpoint.reader import REPORT, open_checkpoint
from k2quant.conversion.convert import convert
from k2quant.errors import BadValue
from k2quant.ground import names
from k2quant.qat import QATConfig, prepare
from k2quant.qat.exporting.trained import Trained
from tiny import DEEPSEEK

TRANSFORMERS: Any = import_module("transformers")  # its types are not for us

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeepSeek-V3 in BF16. Not to be changed by a test."""
    torch.manual_seed(0)
    model = TRANSFORMERS.DeepseekV3ForCausalLM(TRANSFORMERS.DeepseekV3Config(**DEEPSEEK))
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.08)
    folder = tmp_path_factory.mktemp("bases") / "bf16"
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def trained(base: Path, config: QATConfig, spread: float = 0.01) -> Any:
    """Return a prepared model in which everything that trains has moved."""
    model = prepare(qat.load(base), config)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=spread)
    return model


def tensors(folder: Path) -> dict[str, Any]:
    """Return what a report says of its tensors."""
    found: dict[str, Any] = json.loads((folder / REPORT).read_text())["tensors"]
    return found


@pytest.mark.parametrize(
    ("to", "bits", "source"), [("int4", 2, "bf16"), ("int4", 4, "fp8"), ("int4", 3, "int4"), ("fp8", 4, "bf16")]
)
def test_the_figures_are_those_of_both_checkpoints(to: Any, bits: int, source: Any, base: Path, ram: Path) -> None:
    """For every weight, whatever the base's format, they are what comparing base and export afterwards finds."""
    origin = base if source == "bf16" else convert(base, ram / "base", to=source).folder
    qat.export(trained(origin, QATConfig(to=to, bits=bits, scope="projections")), ram / "out")
    noted = {names.split(name)[0]: facts for name, facts in tensors(ram / "out").items()}
    compared = [finding for finding in compare(origin, ram / "out", workers=1) if finding.figures is not None]
    assert sum(finding.figures.changed > 0 for finding in compared if finding.figures) > 20
    for finding in compared:
        facts = noted[names.split(finding.name)[0]]
        assert facts["substituted"] is True
        assert finding.figures is not None
        assert facts["figures"]["changed"] == finding.figures.changed
        assert facts["figures"]["error"] == pytest.approx(finding.figures.error, rel=1e-12)
        assert facts["figures"]["energy"] == pytest.approx(finding.figures.energy, rel=1e-12)


def test_what_did_not_train_has_not_moved(base: Path, ram: Path) -> None:
    """Where experts alone train, every other tensor of the model is written with figures of no change."""
    qat.export(trained(base, QATConfig(train="experts")), ram / "out")
    for facts in tensors(ram / "out").values():
        assert (facts["figures"]["changed"] > 0) == (facts["class"] == "routed experts")


def test_a_bias_is_measured_as_it_is_stored(base: Path, ram: Path) -> None:
    """What is no weight, such as a router's bias in float32, has figures too."""
    model = trained(base, QATConfig())
    model.get_buffer(BIAS).add_(torch.tensor([0.5, 0.0, -2.0, 0.0]))
    qat.export(model, ram / "out")
    figures = tensors(ram / "out")[BIAS]["figures"]
    assert (figures["count"], figures["changed"], figures["error"], figures["worst"]) == (4, 2, 4.25, 2.0)


def test_threads_change_no_figure(base: Path, ram: Path) -> None:
    """One thread and three note the same figures, to the last bit."""
    model = trained(base, QATConfig(bits=2))
    for workers in (1, 3):
        qat.export(model, ram / str(workers), workers=workers)
    assert tensors(ram / "1") == tensors(ram / "3")


def test_an_interrupted_export_keeps_its_figures(base: Path, ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of one that went on is that of one that was not interrupted, whose values and figures alike."""
    model, original = trained(base, QATConfig(bits=2)), Trained.panel

    def panel(self: Any, job: Any, start: int, stop: int) -> Any:
        if "experts.3.down_proj" in job.weight.base:
            raise KeyboardInterrupt
        return original(self, job, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Trained, "panel", panel)
        with pytest.raises(KeyboardInterrupt):
            qat.export(model, ram / "out", shard_size=20_000, workers=1)
    assert qat.export(model, ram / "out", shard_size=20_000).resumed > 0
    qat.export(model, ram / "whole", shard_size=20_000)
    assert tensors(ram / "out") == tensors(ram / "whole")


def test_a_bias_of_the_base_that_is_not_finite_is_named(base: Path, ram: Path) -> None:
    """Figures are numbers: where the base holds an infinity that the model does not, nothing is finished."""
    model = trained(base, QATConfig())
    broken = ram / "broken"
    broken.mkdir()
    for path in base.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    entry = open_checkpoint(broken).tensors[BIAS]
    with (broken / entry.file).open("r+b") as file:
        file.seek(entry.start)
        file.write(b"\x00\x00\x80\x7f" if entry.dtype == "F32" else b"\x80\x7f")
    with pytest.raises(BadValue, match=BIAS):
        qat.export(model, ram / "out", base=broken)
    assert not (ram / "out" / REPORT).exists()
