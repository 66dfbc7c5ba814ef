"""The modules whose rules carry the promises, each with the tests that answer for it."""

from __future__ import annotations

_CODECS = "tests/arithmetic/codecs"
_FP4 = f"{_CODECS}/fp4"
_FORMATS = "tests/k2quant/formats"
_CHECKPOINT = "tests/k2quant/checkpoint"
_CONVERSION = "tests/k2quant/conversion"
_METADATA = f"{_CONVERSION}/metadata"
_ROUNDING = ("tests/qat/rounding", "tests/qat/test_prepare.py")
_MADE_UP = f"{_FORMATS}/test_made_up_format.py"
_ENGINES = "tests/k2quant/checking/engines"
_CONVERTED = (f"{_CONVERSION}/test_convert.py", "tests/k2quant/checking/test_verify.py")

TARGETS: dict[str, tuple[str, ...]] = {
    "k2quant/formats/bf16.py": (f"{_FORMATS}/test_bf16.py", _MADE_UP),
    "k2quant/formats/fp8.py": (
        _FORMATS,
        *_CONVERTED,
        f"{_METADATA}/test_carrying.py",
        f"{_CHECKPOINT}/test_hostile.py",
    ),
    "k2quant/formats/int4.py": (f"{_FORMATS}/test_int4.py", f"{_FORMATS}/test_budgets.py", _MADE_UP),
    "k2quant/formats/configs/compressed_tensors.py": (f"{_FORMATS}/test_compressed_tensors.py", _MADE_UP),
    "k2quant/formats/nvfp4.py": (f"{_FORMATS}/fp4", f"{_CONVERSION}/rounding/fp4", _MADE_UP),
    "k2quant/formats/mxfp4.py": (f"{_FORMATS}/fp4", f"{_CONVERSION}/rounding/fp4"),
    "k2quant/formats/configs/modelopt.py": (f"{_FORMATS}/fp4", f"{_CONVERSION}/rounding/fp4"),
    "k2quant/conversion/searching/surveys.py": (f"{_CONVERSION}/rounding/fp4", "tests/k2quant/merge/test_fp4.py"),
    "k2quant/formats/dtypes.py": (f"{_FORMATS}/test_fp8.py", f"{_FORMATS}/test_int4.py"),
    "k2quant/formats/configs/keys.py": (f"{_FORMATS}/test_keys.py", f"{_METADATA}/test_carrying.py"),
    "k2quant/ground/engines.py": ("tests/k2quant/ground/test_engines.py", f"{_CONVERSION}/recipes/test_fused.py"),
    "k2quant/ground/patterns.py": ("tests/k2quant/ground/test_patterns.py",),
    "k2quant/conversion/recipes/recipe.py": (
        *(f"{_CONVERSION}/{name}.py" for name in ("recipes/test_fused", "recipes/test_recipes", "test_convert")),
        f"{_FORMATS}/test_fp8.py",
    ),
    "k2quant/conversion/recipes/rules.py": (
        f"{_CONVERSION}/recipes/test_rules.py",
        f"{_CONVERSION}/recipes/test_recipes.py",
    ),
    "k2quant/conversion/metadata/config.py": (
        *_CONVERTED,
        f"{_METADATA}/test_carrying.py",
        f"{_CHECKPOINT}/test_hostile.py",
    ),
    "k2quant/conversion/metadata/carrying.py": (f"{_METADATA}/test_carrying.py", f"{_FORMATS}/test_keys.py"),
    "k2quant/conversion/metadata/promises.py": (
        f"{_METADATA}/test_promises.py",
        "tests/k2quant/model/test_promises.py",
    ),
    **{f"k2quant/checking/engines/asking/{name}.py": (_ENGINES,) for name in ("blocks", "files", "formats", "tensors")},
    "k2quant/checking/engines/asking/matching.py": (f"{_ENGINES}/test_lists.py", f"{_ENGINES}/test_rules.py"),
    "k2quant/checking/engines/asking/shapes.py": (f"{_ENGINES}/test_shares.py", f"{_ENGINES}/test_rules.py"),
    "k2quant/checking/engines/memory.py": (f"{_ENGINES}/test_shares.py",),
    "k2quant/conversion/metadata/relatives.py": (f"{_METADATA}/test_relatives.py", f"{_METADATA}/test_k3.py"),
    "k2quant/conversion/resume.py": (f"{_CONVERSION}/test_resume.py", f"{_CONVERSION}/test_safety.py"),
    "k2quant/conversion/placing.py": (f"{_CONVERSION}/test_placing.py", f"{_CONVERSION}/test_convert.py"),
    "k2quant/checkpoint/header.py": (f"{_CHECKPOINT}/test_header.py", f"{_CHECKPOINT}/test_hostile.py"),
    "k2quant/checkpoint/reader.py": tuple(f"{_CHECKPOINT}/test_{name}.py" for name in ("reader", "hostile", "files")),
    "k2quant/checkpoint/weights.py": (f"{_CHECKPOINT}/test_weights.py", f"{_CHECKPOINT}/test_hostile.py"),
    "kernels/codecs/reference/bf16.py": tuple(f"{_CODECS}/test_{name}.py" for name in ("bf16", "devices")),
    "kernels/codecs/reference/fp8.py": tuple(
        f"{_CODECS}/test_{name}.py" for name in ("devices", "powers_of_two", "choose_store")
    ),
    "kernels/codecs/reference/int4.py": tuple(
        f"{_CODECS}/test_{name}.py" for name in ("int4", "devices", "choose_store")
    ),
    "kernels/codecs/reference/search.py": (f"{_CODECS}/searching",),
    "kernels/codecs/fp4.py": (_FP4,),
    "kernels/codecs/reference/e2m1.py": (_FP4,),
    "kernels/codecs/reference/nvfp4.py": (_FP4,),
    "kernels/codecs/reference/mxfp4.py": (_FP4,),
    "kernels/codecs/reference/fp4_search.py": (_FP4,),
    "kernels/codecs/scales/fp4.py": (_FP4,),
    "kernels/codecs/scales/tensor_forms.py": (_FP4, f"{_FORMATS}/fp4"),
    "kernels/codecs/scales/search.py": (f"{_CODECS}/searching",),
    "qat/rounding/rules.py": _ROUNDING,
    "qat/rounding/scales.py": _ROUNDING,
    "qat/rounding/estimators.py": _ROUNDING,
    "qat/exporting/gate.py": ("tests/qat/exporting",),
    "k2quant/merge/arithmetic.py": ("tests/k2quant/merge",),
    "k2quant/merge/update.py": ("tests/k2quant/merge",),
    "eval/gating/gate.py": ("tests/eval/gating",),
    "eval/gating/pairing.py": ("tests/eval/gating",),
    "eval/gating/verdict.py": ("tests/eval/gating",),
    "eval/statistics/exact.py": ("tests/eval/statistics/test_exact.py", "tests/eval/statistics/test_paired.py"),
    "eval/statistics/paired.py": ("tests/eval/statistics/test_exact.py", "tests/eval/statistics/test_paired.py"),
    "eval/statistics/restricted.py": (
        "tests/eval/statistics/test_restricted.py",
        "tests/eval/statistics/test_paired.py",
    ),
}
"""Module by its path, and test files or folders by theirs."""
