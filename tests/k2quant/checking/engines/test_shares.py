"""Shares of devices, and the memory that a device needs, by arithmetic of the released sizes."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from k2quant.checking.engines import EngineCheck, check_engine
from k2quant.errors import UsageError
from k2quant.ground.release import INSTRUCT_CONFIG, attention_shapes, dense_shapes
from rewritten import Hollow

LAYERS, HIDDEN, INNER = 61, 7168, 2048
EXPERTS = 384


def k2(kind: str) -> Hollow:
    """Return the real K2 with one layer of experts of eight in place of 384: shapes are what counts."""
    config: dict[str, Any] = INSTRUCT_CONFIG | {"num_hidden_layers": 2, "n_routed_experts": 8}
    config["quantization_config"] = None
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"model.embed_tokens.weight": ("BF16", (163840, HIDDEN))}
    for layer in range(2):
        base = f"model.layers.{layer}"
        matrices = {f"{base}.self_attn.{name}": shape for name, shape in attention_shapes(config).items()}
        mlps = {"mlp": 18432} if layer == 0 else {"mlp.shared_experts": INNER}
        mlps |= {f"mlp.experts.{number}": INNER for number in range(8)} if layer else {}
        for mlp, wide in mlps.items():
            matrices |= {f"{base}.{mlp}.{name}_proj": (wide, HIDDEN) for name in ("gate", "up")}
            matrices[f"{base}.{mlp}.down_proj"] = (HIDDEN, wide)
        for name, shape in matrices.items():
            tensors |= stored(kind if ".experts." in name or kind == "blocks" else "", name, shape)
        if layer:
            tensors[f"{base}.mlp.gate.weight"] = ("BF16", (8, HIDDEN))
    tensors["lm_head.weight"] = ("BF16", (163840, HIDDEN))
    return Hollow(tensors, config, {})


def stored(kind: str, base: str, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the tensors of a matrix."""
    rows, columns = shape
    if kind == "blocks":
        scales = (ceil(rows / 128), ceil(columns / 128))
        return {f"{base}.weight": ("F8_E4M3", shape), f"{base}.weight_scale_inv": ("F32", scales)}
    if kind == "int4":
        return {
            f"{base}.weight_packed": ("I32", (rows, columns // 8)),
            f"{base}.weight_scale": ("BF16", (rows, columns // 32)),
            f"{base}.weight_shape": ("I32", (2,)),
        }
    return {f"{base}.weight": ("BF16", shape)}


def devices(found: Hollow, engine: str, ranks: int, folder: Path) -> tuple[str, str]:
    """Return what the rule of devices comes to."""
    folder.mkdir(exist_ok=True)
    done = check_engine(found.write(folder / f"{engine}-{ranks}"), engine, tensor_parallel=ranks)
    return next((each.result, each.text) for each in done.findings if each.rule == "devices")


@pytest.mark.parametrize(
    ("kind", "engine", "even", "uneven"),
    [
        ("int4", "vllm", (1, 8, 16, 32, 64), {3: "num_attention_heads", 128: "num_attention_heads"}),
        ("int4", "sglang", (1, 8, 16, 32, 64), {6: "num_attention_heads"}),
        ("blocks", "sglang", (1, 2, 4, 8, 16), {32: "rows that 32 x 128 divides", 64: "rows that 64 x 128 divides"}),
        ("", "vllm", (1, 8, 64), {3: "num_attention_heads"}),
    ],
)
def test_shares_come_out_even(
    kind: str, engine: str, even: tuple[int, ...], uneven: dict[int, str], tmp_path: Path
) -> None:
    """INT4 experts of 2048 rows in groups of 32 go over 64 devices, and FP8 in blocks of 128 over 16."""
    for ranks in even:
        assert devices(k2(kind), engine, ranks, tmp_path)[0] == "pass", ranks
    for ranks, says in uneven.items():
        result, text = devices(k2(kind), engine, ranks, tmp_path)
        assert (result, says in text) == ("fail", True), text


def test_what_comes_out_even_is_said(tmp_path: Path) -> None:
    """A failure names the numbers of devices that would do."""
    _, text = devices(k2("blocks"), "sglang", 32, tmp_path)
    assert "tensor parallelism of 1, 2, 4, 8, 16 comes out even" in text


def test_vllm_may_cut_blocks_of_experts_finer(tmp_path: Path) -> None:
    """Where experts alone do not come out even, it depends on the kernel; a dense matrix that does not is refused."""
    found = k2("blocks")
    found.tensors = {name: spec for name, spec in found.tensors.items() if ".layers.0." not in name}
    found.remove("shared_experts")
    found.remove("self_attn")
    result, text = devices(found, "vllm", 32, tmp_path)
    assert (result, "Triton's kernels" in text) == ("cannot tell", True)
    assert devices(k2("blocks"), "vllm", 32, tmp_path / "more")[0] == "fail"


def whole(found: Hollow, folder: Path, **options: Any) -> EngineCheck:
    """Check a checkpoint for vLLM."""
    return check_engine(found.write(folder), options.pop("engine", "vllm"), **options)


def test_memory_is_the_share_of_each_device(tmp_path: Path) -> None:
    """Rows and columns are shared, q_a and kv_a and the router are not; kv_b's halves stand beside it in BF16."""
    done = whole(k2("int4"), tmp_path / "out", tensor_parallel=8)
    attention = attention_shapes(INSTRUCT_CONFIG)
    size = {name: rows * columns * 2 for name, (rows, columns) in attention.items()}
    shared = 2 * (size["q_b_proj"] + size["kv_b_proj"] + size["o_proj"]) + 3 * HIDDEN * (18432 + INNER) * 2
    experts = 8 * 3 * (HIDDEN * INNER // 2 + HIDDEN * INNER // 32 * 2 + 8)
    words = 2 * 163840 * HIDDEN * 2
    alone = 2 * (size["q_a_proj"] + size["kv_a_proj_with_mqa"]) + 8 * HIDDEN * 2
    assert done.memory.weights == (shared + experts + words) // 8 + alone
    assert done.memory.absorbed == 2 * size["kv_b_proj"] // 8
    assert done.memory.cache == 131072 * 2 * 576 * 2


def test_the_released_k2_has_70_kb_a_token(made: Callable[[str], Hollow], tmp_path: Path) -> None:
    """61 layers of 512 + 64 numbers in BF16 are 70,272 bytes: 9.2 GB for 131,072 tokens, 18.4 GB for 262,144."""
    found = made("int4")
    found.config |= {"num_hidden_layers": LAYERS, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    for context, expected in ((131072, 9_210_691_584), (262144, 18_421_383_168)):
        done = whole(found, tmp_path / str(context), context=context, tensor_parallel=8)
        assert done.memory.cache == expected


def test_engines_hold_other_things(tmp_path: Path) -> None:
    """KTransformers leaves experts on the host; transformers decodes INT4 and caches the keys of every head."""
    folder = k2("int4").write(tmp_path / "k2")
    by_engine = {engine: check_engine(folder, engine, context=1000).memory for engine in ("vllm", "ktransformers")}
    experts = 8 * 3 * (HIDDEN * INNER // 2 + HIDDEN * INNER // 32 * 2 + 8)
    assert by_engine["ktransformers"].host == experts
    assert by_engine["ktransformers"].weights == by_engine["vllm"].weights - experts
    decoded = check_engine(folder, "transformers", context=1000).memory
    assert decoded.weights == by_engine["vllm"].weights - experts + 8 * 3 * HIDDEN * INNER * 2
    assert decoded.cache == 1000 * 2 * 64 * (128 + 64 + 128) * 2
    assert decoded.absorbed == 0


def test_room_is_that_of_the_engine(made: Callable[[str], Hollow], tmp_path: Path) -> None:
    """By vLLM 92% of a device; engines that lay out whole layers have the memory of all devices together."""
    folder = made("int4").write(tmp_path / "out")
    need = check_engine(folder, "vllm", context=1000).memory.needed
    for memory, passes in ((int(need / 0.92) + 2, True), (need, False)):
        done = check_engine(folder, "vllm", context=1000, memory=memory)
        assert any(each.rule == "memory" for each in done.failures) is not passes
    need = check_engine(folder, "llama.cpp", context=1000).memory.needed
    done = check_engine(folder, "llama.cpp", context=1000, memory=ceil(need / 2), tensor_parallel=2)
    assert not any(each.rule == "memory" for each in done.failures)


def test_dense_shapes_are_those_of_the_release() -> None:
    """The layout above is K2's own."""
    assert set(dense_shapes()) >= {(18432, HIDDEN), (HIDDEN, 18432), (576, HIDDEN)}


@pytest.mark.parametrize("wrong", [{"tensor_parallel": 0}, {"memory": -1}, {"context": 0}])
def test_numbers_that_are_none_are_refused(wrong: dict[str, Any], k2_source: Path) -> None:
    """The request makes no sense, whatever the files hold."""
    with pytest.raises(UsageError, match="must be positive"):
        check_engine(k2_source, "vllm", **wrong)


def test_another_engine_is_refused(k2_source: Path) -> None:
    """With those that are known."""
    with pytest.raises(UsageError, match=r"expected vllm, sglang"):
        check_engine(k2_source, "ollama")
