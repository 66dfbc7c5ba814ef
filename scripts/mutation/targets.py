"""The modules whose rules carry the promises, each with the tests that answer for it."""

from __future__ import annotations

_CODECS = "tests/arithmetic/codecs"
_CONVERSION = (
    "tests/k2quant/conversion/test_convert.py",
    "tests/k2quant/conversion/test_safety.py",
    "tests/k2quant/conversion/test_placing.py",
)
_FORMATS = (
    "tests/k2quant/formats",
    "tests/k2quant/conversion/test_convert.py",
    "tests/k2quant/checking/test_verify.py",
)
_CHECKPOINT = ("tests/k2quant/checkpoint/test_hostile.py", "tests/k2quant/checkpoint/test_header.py")

TARGETS: dict[str, tuple[str, ...]] = {
    "k2quant/formats/bf16.py": (*_FORMATS, *_CHECKPOINT),
    "k2quant/formats/fp8.py": (*_FORMATS, *_CHECKPOINT),
    "k2quant/formats/int4.py": (*_FORMATS, *_CHECKPOINT),
    "k2quant/formats/compressed_tensors.py": (*_FORMATS, *_CHECKPOINT),
    "k2quant/conversion/recipe.py": (*_CONVERSION, "tests/k2quant/formats"),
    "k2quant/conversion/config.py": (*_CONVERSION, *_CHECKPOINT),
    "k2quant/conversion/resume.py": _CONVERSION,
    "k2quant/conversion/placing.py": _CONVERSION,
    "k2quant/checkpoint/header.py": _CHECKPOINT,
    "k2quant/checkpoint/reader.py": _CHECKPOINT,
    "k2quant/checkpoint/weights.py": (*_CHECKPOINT, "tests/k2quant/formats"),
    "kernels/codecs/reference/bf16.py": (
        f"{_CODECS}/test_bf16.py",
        f"{_CODECS}/test_fp8.py",
        f"{_CODECS}/test_int4.py",
    ),
    "kernels/codecs/reference/fp8.py": (f"{_CODECS}/test_fp8.py", f"{_CODECS}/test_choose_store.py"),
    "kernels/codecs/reference/int4.py": (f"{_CODECS}/test_int4.py", f"{_CODECS}/test_choose_store.py"),
    "qat/rounding/rules.py": ("tests/qat/rounding", "tests/qat/test_prepare.py"),
    "qat/rounding/scales.py": ("tests/qat/rounding", "tests/qat/test_prepare.py"),
    "qat/rounding/estimators.py": ("tests/qat/rounding", "tests/qat/test_prepare.py"),
    "qat/exporting/gate.py": ("tests/qat/exporting",),
    "k2quant/merge/arithmetic.py": ("tests/k2quant/merge",),
    "k2quant/merge/update.py": ("tests/k2quant/merge",),
    "eval/gating/gate.py": ("tests/eval/gating",),
    "eval/gating/pairing.py": ("tests/eval/gating",),
    "eval/gating/verdict.py": ("tests/eval/gating",),
    "eval/statistics/exact.py": ("tests/eval/statistics/test_paired.py",),
    "eval/statistics/paired.py": ("tests/eval/statistics/test_paired.py",),
}
"""Module by its path, and test files or folders by theirs."""
