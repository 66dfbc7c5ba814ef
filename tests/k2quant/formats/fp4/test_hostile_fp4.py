"""FP4 that lies: each lie ends in one named error, and in no model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import k2quant
from k2quant.checkpoint.reader import CONFIG, open_checkpoint
from k2quant.checkpoint.writing.in_memory import Shard
from k2quant.conversion.plan import Options, make_plan
from k2quant.errors import (
    BadValue,
    CheckpointError,
    DtypeMismatch,
    MalformedFile,
    MissingTensor,
    ShapeMismatch,
    UnsupportedFormat,
)

BASE = "model.layers.1.mlp.experts.0.up_proj"
KINDS = ("modelopt", "packed", "mxfp4")
MAIN = {"modelopt": "weight", "packed": "weight_packed", "mxfp4": "weight_packed"}
TENSOR = {"modelopt": "weight_scale_2", "packed": "weight_global_scale"}

Refused = Callable[..., None]


@pytest.fixture
def refused(written: Any, tmp_path: Path) -> Refused:
    """Check that converting these tensors is refused, in one line that has these words, and leaves no model."""

    def check(tensors: Shard, error: type[CheckpointError], *words: str, **options: Any) -> None:
        folder, asked = written(tensors), {"to": "bf16"} | options
        with pytest.raises(error) as caught:
            converted(folder, tmp_path / "out", asked)
        message = str(caught.value)
        assert message.isprintable()
        assert all(word in message for word in words), message
        assert not (tmp_path / "out" / CONFIG).exists()
        assert not list((tmp_path / "out").glob("*.safetensors"))

    return check


def converted(folder: Path, out: Path, asked: dict[str, Any]) -> None:
    """Convert; most are refused for what headers say, without the cost of a conversion."""
    make_plan(open_checkpoint(folder), Options(**asked))
    k2quant.convert(folder, out, workers=1, **asked)


def spoilt(tensors: Shard, suffix: str, value: Any, dtype: str | None = None) -> Shard:
    """Return tensors with another array under a suffix, or with its first element replaced by a number."""
    old_dtype, array = tensors[f"{BASE}.{suffix}"]
    if not isinstance(value, np.ndarray):
        array = array.copy()
        array.reshape(-1)[0], value = value, array
    return tensors | {f"{BASE}.{suffix}": (dtype or old_dtype, value)}


@pytest.mark.parametrize(
    ("kind", "suffix"), [(kind, suffix) for kind in KINDS for suffix in ("weight_scale", TENSOR.get(kind)) if suffix]
)
def test_a_missing_scale(sound: Any, refused: Refused, kind: str, suffix: str) -> None:
    """Block scales or a tensor scale that the index lacks are named; without them nothing says what codes mean."""
    tensors = sound(kind)
    del tensors[f"{BASE}.{suffix}"]
    refused(tensors, CheckpointError, f"{BASE}.{'weight_scale' if suffix == 'weight_scale' else suffix}")


@pytest.mark.parametrize("suffix", ["weight_scale_2", "weight_global_scale"])
def test_a_tensor_scale_alone(refused: Refused, suffix: str) -> None:
    """A tensor scale without its weight is a part of something that is missing."""
    refused({f"{BASE}.{suffix}": ("F32", np.ones(1, np.float32))}, MissingTensor, suffix, "without its weight")


@pytest.mark.parametrize("kind", ["modelopt", "packed"])
def test_both_forms_of_the_tensor_scale(sound: Any, refused: Refused, kind: str) -> None:
    """One multiplies, the other divides: of two, only one can be meant."""
    (other,) = set(TENSOR.values()) - {TENSOR[kind]}
    tensors = sound(kind) | {f"{BASE}.{other}": ("F32", np.ones(1, np.float32))}
    refused(tensors, CheckpointError, BASE, "weight_scale_2", "weight_global_scale")


@pytest.mark.parametrize("kind", ["modelopt", "packed"])
def test_a_weight_stored_twice(sound: Any, refused: Refused, kind: str) -> None:
    """Under the names of both layouts, a weight could mean two things."""
    (other,) = {"weight", "weight_packed"} - {MAIN[kind]}
    tensors = sound(kind) | {f"{BASE}.{other}": sound(kind)[f"{BASE}.{MAIN[kind]}"]}
    refused(tensors, MalformedFile, "stored twice")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [31, 33, 16, 8])
def test_a_wrong_number_of_codes(sound: Any, refused: Refused, kind: str, columns: int) -> None:
    """Codes that scales do not fit, a byte more or less, half as many: the scales are named with both shapes."""
    tensors = spoilt(sound(kind), MAIN[kind], np.zeros((64, columns), np.uint8))
    refused(tensors, ShapeMismatch, f"{BASE}.weight_scale", str((64, columns * 2)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (64,), (64, 3), (63, 4), (1, 1), (64, 4, 1)])
def test_block_scales_of_a_wrong_shape(sound: Any, refused: Refused, kind: str, shape: tuple[int, ...]) -> None:
    """One scale for each block of a row, no other number of them."""
    refused(spoilt(sound(kind), "weight_scale", np.ones(shape, np.uint8)), ShapeMismatch, f"{BASE}.weight_scale")


@pytest.mark.parametrize(("kind", "dtype"), [(k, d) for k in ("modelopt", "packed") for d in ("U8", "F32", "F8_E5M2")])
def test_nvfp4_scales_of_a_wrong_dtype(sound: Any, refused: Refused, kind: str, dtype: str) -> None:
    """Block scales of NVFP4 are E4M3."""
    array = np.ones((64, 4), np.float32 if dtype == "F32" else np.uint8)
    refused(spoilt(sound(kind), "weight_scale", array, dtype), DtypeMismatch, f"{BASE}.weight_scale", "F8_E4M3", dtype)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "I8"])
def test_mxfp4_scales_of_a_wrong_dtype(sound: Any, refused: Refused, dtype: str) -> None:
    """Scales of MXFP4 are bytes, whether U8 or F8_E8M0."""
    array = np.ones((64, 2), {"F32": np.float32, "BF16": np.uint16, "I8": np.int8}[dtype])
    refused(spoilt(sound("mxfp4"), "weight_scale", array, dtype), DtypeMismatch, f"{BASE}.weight_scale", dtype)


@pytest.mark.parametrize("kind", ["modelopt", "packed"])
@pytest.mark.parametrize(
    ("array", "dtype", "error"),
    [
        (np.ones(1, np.float64), "F64", DtypeMismatch),
        (np.ones(1, np.uint16), "BF16", DtypeMismatch),
        (np.ones(2, np.float32), "F32", ShapeMismatch),
        (np.ones(0, np.float32), "F32", ShapeMismatch),
        (np.ones((1, 1), np.float32), "F32", ShapeMismatch),
    ],
)
def test_a_tensor_scale_that_is_no_number(
    sound: Any, refused: Refused, kind: str, array: Any, dtype: str, error: type[CheckpointError]
) -> None:
    """The tensor scale is one float32."""
    refused(spoilt(sound(kind), TENSOR[kind], array, dtype), error, f"{BASE}.{TENSOR[kind]}")


@pytest.mark.parametrize(
    ("kind", "to", "value"),
    [
        *((kind, "bf16", value) for kind in TENSOR for value in (np.nan, 0.0, -0.0, -1.0, np.inf)),
        ("modelopt", "mxfp4", np.nan),
        ("packed", "int4", 0.0),
        ("packed", "nvfp4", -np.inf),
    ],
)
def test_a_tensor_scale_that_means_nothing(sound: Any, refused: Refused, kind: str, to: str, value: float) -> None:
    """NaN, zero, a negative or an infinite tensor scale is named, whatever is written."""
    refused(spoilt(sound(kind), TENSOR[kind], value), BadValue, f"{BASE}.{TENSOR[kind]}", "tensor scale", to=to)


@pytest.mark.parametrize("kind", ["modelopt", "packed"])
@pytest.mark.parametrize(("bits", "words"), [(0x7F, "NaN"), (0xFF, "NaN"), (0x80, "negative"), (0xB8, "negative")])
def test_a_block_scale_that_means_nothing(sound: Any, refused: Refused, kind: str, bits: int, words: str) -> None:
    """NaN and all that has a sign, -0 included, is named with its place."""
    refused(spoilt(sound(kind), "weight_scale", bits), BadValue, f"{BASE}.weight_scale", words, "row 0, column 0")


@pytest.mark.parametrize("dtype", ["U8", "F8_E8M0"])
def test_an_mxfp4_scale_that_is_nan(sound: Any, refused: Refused, dtype: str) -> None:
    """The byte 255 is NaN, also where no code but zero stands beside it."""
    tensors = spoilt(sound("mxfp4"), "weight_scale", 255, dtype)
    tensors = spoilt(tensors, "weight_packed", np.zeros((64, 32), np.uint8))
    refused(tensors, BadValue, f"{BASE}.weight_scale", "NaN scale", "row 0, column 0")


@pytest.mark.parametrize("to", ["bf16", "nvfp4"])
def test_mxfp4_beyond_bf16(sound: Any, refused: Refused, to: str) -> None:
    """6 * 2^127 is no BF16 value: it is named, not made infinite."""
    refused(spoilt(sound("mxfp4"), "weight_scale", np.full((64, 2), 254, np.uint8)), BadValue, BASE, "exceeds", to=to)


@pytest.mark.parametrize("value", [np.nan, 0.0, -1.0, np.inf])
def test_a_scale_of_inputs_that_has_no_inverse(sound: Any, refused: Refused, value: float) -> None:
    """Where the other layout's form is written, a scale of inputs that has none is named."""
    tensors = sound("modelopt", inputs=value)
    refused(tensors, BadValue, f"{BASE}.input_scale", to="nvfp4", layout="compressed-tensors")


@pytest.mark.parametrize(("array", "dtype"), [(np.ones(1, np.uint16), "BF16"), (np.ones(2, np.float32), "F32")])
def test_a_scale_of_inputs_that_is_no_number(sound: Any, refused: Refused, array: Any, dtype: str) -> None:
    """One float32, or nothing that an engine could read."""
    tensors = sound("modelopt") | {f"{BASE}.input_scale": (dtype, array)}
    refused(tensors, CheckpointError, f"{BASE}.input_scale")


@pytest.mark.parametrize("order", [1, -1])
def test_quark(refused: Refused, order: int) -> None:
    """MXFP4 of Quark has other names than compressed-tensors': no header of it was read, so it is not guessed."""
    tensors: Shard = {
        f"{BASE}.weight": ("U8", np.zeros((64, 32), np.uint8)),
        f"{BASE}.weight_scale": ("U8", np.full((64, 2), 127, np.uint8)),
    }
    refused(dict(list(tensors.items())[::order]), UnsupportedFormat, f"{BASE}.weight", "Quark")


@pytest.mark.parametrize("suffix", ["gate_up_proj_blocks", "down_proj_scales"])
def test_gpt_oss(refused: Refused, suffix: str) -> None:
    """MXFP4 of gpt-oss holds all experts in one tensor of another order."""
    name = f"model.layers.1.mlp.experts.{suffix}"
    refused({name: ("U8", np.zeros((2, 64, 2, 16), np.uint8))}, UnsupportedFormat, name, "gpt-oss")


@pytest.mark.parametrize(
    ("suffix", "words"),
    [("pre_quant_scale", "pre_quant_scale"), ("weight_shape", "weight_shape"), ("weight_zero_point", "asymmetric")],
)
@pytest.mark.parametrize("kind", ["modelopt", "packed"])
def test_a_partner_that_would_change_the_meaning(
    sound: Any, refused: Refused, kind: str, suffix: str, words: str
) -> None:
    """Inputs scaled first, or zero points: a weight with such a partner means something else. A shape is astray."""
    refused(sound(kind) | {f"{BASE}.{suffix}": ("F32", np.ones(2, np.float32))}, CheckpointError, BASE, words)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_scale_in_a_later_panel(sound: Any, refused: Refused, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are counted from the beginning of the tensor, not of a panel."""
    monkeypatch.setattr("k2quant.checkpoint.panels.PANEL_WEIGHTS", 1)
    monkeypatch.setattr("k2quant.checkpoint.panels.ROW_STEP", 16)
    scales = sound(kind)[f"{BASE}.weight_scale"][1].copy()
    scales[35, 1] = 255
    refused(spoilt(sound(kind), "weight_scale", scales), BadValue, f"{BASE}.weight_scale", "row 35, column 1")
