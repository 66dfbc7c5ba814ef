"""Measure exports of INT4 against a copy of the same files, and that to GGUF against llama.cpp's own tools.

Usage:
    python benchmarks/suites/exports/speed.py FOLDER RESULT.json [--size 3GB] [--llama PYTHON --sources FOLDER]

FOLDER gets a slice of K2's shapes with native INT4 experts, and what is made of it. A copy (`cp`, then `sync` of the
files) and the exports take turns from a warm cache, six times, each time in another order.
llama.cpp's own way is its converter to BF16, of its SOURCES, and then `llama_model_quantize` to Q4_0, by PYTHON, an
interpreter with llama-cpp-python, as `make gguf-oracle` makes one. Both are timed, once each, for they take long; the
error is that of an expert, against the values of INT4.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice, permutations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script

from suites.common.machine import facts, versions
from suites.common.measure import Run, remove, run, warm

RUNS = 6

CONVERT = """
import sys
home, source, out = sys.argv[1:]
sys.path[:0] = [f"{home}/gguf-py", home]
from conversion.deepseek import DeepseekV2Model
DeepseekV2Model.set_vocab = lambda self: None  # it does not know the words of nano-K2, which the slice has
import convert_hf_to_gguf
sys.argv = ["convert_hf_to_gguf.py", source, "--outfile", out, "--outtype", "bf16"]
convert_hf_to_gguf.main()
"""

QUANTISE = """
import ctypes, sys, llama_cpp
given = llama_cpp.llama_model_quantize_default_params()
given.ftype, given.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(given)))
"""

SIZES = {
    "first_k_dense_replace": 0,
    "kv_lora_rank": 512,
    "num_attention_heads": 8,
    "num_hidden_layers": 1,
    "num_key_value_heads": 8,
    "q_lora_rank": 256,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
"""Of a layer that is little but experts."""


def matrices(config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield name, dtype and shape of each tensor of the slice."""
    hidden, inner, heads, layer = config["hidden_size"], config["moe_intermediate_size"], 8, "model.layers.0."
    q_rank, rank = config["q_lora_rank"], config["kv_lora_rank"]
    yield "model.embed_tokens.weight", "BF16", (config["vocab_size"], hidden)
    for name, shape in {
        "input_layernorm": (hidden,),
        "self_attn.q_a_proj": (q_rank, hidden),
        "self_attn.q_a_layernorm": (q_rank,),
        "self_attn.q_b_proj": (heads * 192, q_rank),
        "self_attn.kv_a_proj_with_mqa": (rank + 64, hidden),
        "self_attn.kv_a_layernorm": (rank,),
        "self_attn.kv_b_proj": (heads * 256, rank),
        "self_attn.o_proj": (hidden, heads * 128),
        "post_attention_layernorm": (hidden,),
        "mlp.gate": (config["n_routed_experts"], hidden),
    }.items():
        yield f"{layer}{name}.weight", "BF16", shape
    yield f"{layer}mlp.gate.e_score_correction_bias", "F32", (config["n_routed_experts"],)
    for where in ("shared_experts", *(f"experts.{number}" for number in range(config["n_routed_experts"]))):
        for part, (rows, width) in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
            base = f"{layer}mlp.{where}.{part}_proj"
            if where == "shared_experts":
                yield f"{base}.weight", "BF16", (rows, width)
                continue
            yield f"{base}.weight_packed", "I32", (rows, width // 8)
            yield f"{base}.weight_scale", "BF16", (rows, width // 32)
            yield f"{base}.weight_shape", "I32", (2,)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (config["vocab_size"], hidden)


def make_slice(folder: Path, *, size: int, hidden: int, inner: int) -> None:
    """Write a layer with about so many bytes of INT4 experts, random codes, scales about 0.002."""
    import numpy as np

    from k2quant.checkpoint.writing.in_memory import write_checkpoint
    from k2quant.formats.int4 import Int4
    from k2quant.ground.release import INSTRUCT_CONFIG
    from k2quant.nano import vocabulary

    experts = max(size // (3 * hidden * inner * 18 // 32), 8)
    more = {"hidden_size": hidden, "moe_intermediate_size": inner, "n_routed_experts": experts}
    own = {key: value for key, value in INSTRUCT_CONFIG.items() if key != "quantization_config"}
    words = {"bos_token_id": vocabulary.BOS, "eos_token_id": vocabulary.EOS, "vocab_size": vocabulary.SIZE}
    config = own | SIZES | more | words | {"intermediate_size": inner}
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, int]] = {}
    tensors: dict[str, tuple[str, Any]] = {}
    for name, dtype, shape in matrices(config):
        if dtype == "F32":
            made: Any = np.zeros(shape, np.float32)
        elif name.endswith("weight_packed"):
            shapes[name.rpartition(".")[0]] = shape[0], shape[1] * 8
            made = random.integers(-(2**31), 2**31 - 1, shape, np.int32)
        elif name.endswith("weight_shape"):
            made = np.array(shapes[name.rpartition(".")[0]], np.int32)
        else:
            made = random.integers(0x3AC0, 0x3B40, shape, np.uint16)
        tensors[name] = dtype, made
    kept = [name.removesuffix(".weight") for name, (_, made) in tensors.items() if name.endswith("_proj.weight")]
    block = Int4().config(shapes, ["lm_head", *kept])
    write_checkpoint(folder, {"model.safetensors": tensors}, {**config, "quantization_config": block})
    for name, content in vocabulary.files().items():
        (folder / name).write_bytes(content)


def error_of(source: Path, file: Path) -> dict[str, float]:
    """Return how far an expert's `up_proj` in a GGUF file is from what INT4 means, in units of its groups' amax."""
    import gguf
    import numpy as np

    from k2quant.checkpoint.reader import open_checkpoint
    from k2quant.checkpoint.reading import read_tensor

    opened, base = open_checkpoint(source), "model.layers.0.mlp.experts.0.up_proj."
    packed, scale = (opened.tensors[base + suffix] for suffix in ("weight_packed", "weight_scale"))
    pairs = np.frombuffer(read_tensor(opened, packed), np.uint8)
    bits = np.frombuffer(read_tensor(opened, scale), np.uint16).astype(np.uint32) << 16
    codes = (np.stack([pairs & 15, pairs >> 4], -1).astype(np.float32) - 8).reshape(-1, 32)
    wanted = codes * bits.view(np.float32).reshape(-1, 1)
    tensor = next(each for each in gguf.GGUFReader(file).tensors if each.name == "blk.0.ffn_up_exps.weight")
    found = gguf.quants.dequantize(np.asarray(tensor.data)[0], tensor.tensor_type).reshape(wanted.shape)
    off = np.abs(found - wanted) / np.abs(wanted).max(-1, keepdims=True)
    return {"worst": float(off.max()), "rms": float(np.sqrt(np.square(off).mean()))}


def summary(found: Sequence[Run]) -> dict[str, float]:
    """Return the median of what runs of a command took, their ends, and the memory."""
    seconds = [each.wall_s for each in found]
    return {
        "seconds": statistics.median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "cpu_seconds": statistics.median(each.cpu_s for each in found),
        "peak_bytes": max(each.peak_rss for each in found),
    }


def measure(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each way."""
    home: Path = given.folder
    source, copy, mlx, out, log = (home / name for name in ("slice", "copy", "mlx", "slice.gguf", "log"))

    def fresh() -> None:
        remove(copy)
        remove(mlx)
        for path in home.glob("slice.gguf*"):
            remove(path) if path.is_dir() else path.unlink()
        warm(source)

    export = [sys.executable, "-m", "k2quant", "-q", "export"]
    ways = {
        "copy": ["sh", "-c", f"cp -r '{source}' '{copy}' && sync '{copy}'/*"],
        "export mlx": [*export, "mlx", str(source), str(mlx)],
        "export gguf": [*export, "gguf", str(source), str(out)],
    }

    def once(way: str) -> Run:
        fresh()
        return run(ways[way], log=log)

    for way in ways:  # not timed: the slice was just made, and a virtual machine's new pages are dear
        once(way)
    rounds: dict[str, list[Run]] = {way: [] for way in ways}
    for order in islice(cycle(permutations(ways)), given.runs):  # what comes before may matter
        for way in order:
            rounds[way].append(once(way))
    once("export gguf")  # for its file, which another way has cleared
    of_file = {"disk_bytes": out.stat().st_size, "error": error_of(source, out)}
    for way, found in rounds.items():
        yield {"way": way, **summary(found), **(of_file if way == "export gguf" else {})}
    if given.llama:
        yield from theirs(given, source, log)


def theirs(given: argparse.Namespace, source: Path, log: Path) -> Iterator[dict[str, Any]]:
    """Yield what llama.cpp's own way takes and loses: its converter to BF16, then its quantiser."""
    home: Path = given.folder
    whole, small = home / "theirs-bf16.gguf", home / "theirs-q4_0.gguf"
    convert = [sys.executable, "-c", CONVERT, str(given.sources), str(source), str(whole)]
    quantise = [given.llama, "-c", QUANTISE, str(whole), str(small), str(given.threads)]
    for name, command, file in ("converter", convert, whole), ("quantiser", quantise, small):
        file.unlink(missing_ok=True)
        found = summary([run(command, log=log)])
        yield {
            "way": f"llama.cpp's {name}",
            **found,
            "disk_bytes": file.stat().st_size,
            "error": error_of(source, file),
        }


def page(found: Mapping[str, Any]) -> str:
    """Return the results as a page."""
    software = ", ".join(f"{name} {each}" for name, each in found["versions"].items())
    machine = f"{found['cpu']}, {found['cores']} cores, load {found['load']:.1f} at the end; {software}; commit "
    how = (
        f"A layer of K2's widths with {found['size'] / 1e9:.1f} GB of INT4 experts, from a warm cache. The copy and "
        f"the exports took turns {found['runs']} times: median, least and most. llama.cpp's converter to BF16 and its "
        "quantiser to Q4_0 ran once, one after the other. The error is that of an expert, in units of the largest of "
        "each group."
    )
    lines = [
        "# Native INT4 for other engines: exports, a copy, and llama.cpp's own way",
        "",
        "Written by `benchmarks/suites/exports/speed.py`; do not edit.",
        "",
        f"{machine}{found['commit']}. `{found['command']}`",
        "",
        how,
        "",
        "| | seconds | processor | memory | on the disk | worst | rms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *map(_line, found["rows"]),
        "",
        *(f"`{way}` takes {ratio:.2f} times as long as a copy." for way, ratio in found["ratios"].items()),
    ]
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    seconds, peak = f"{row['seconds']:.2f}", row["peak_bytes"] / 1e9
    if row["least"] < row["most"]:
        seconds += f" ({row['least']:.2f} to {row['most']:.2f})"
    disk = f"{row['disk_bytes'] / 1e9:.2f} GB" if "disk_bytes" in row else ""
    worst, rms = (f"{row['error'][each]:.2%}" if "error" in row else "" for each in ("worst", "rms"))
    return f"| {row['way']} | {seconds} | {row['cpu_seconds']:.1f} s | {peak:.2f} GB | {disk} | {worst} | {rms} |"


def main() -> None:
    """Measure, print, and write down, as JSON and as a page beside it."""
    from k2quant.ground.units import parse_size

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--size", type=parse_size, default=10**9, help="bytes of INT4 experts")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--inner", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp's quantiser")
    parser.add_argument("--llama", help="an interpreter with llama-cpp-python")
    parser.add_argument("--sources", type=Path, help="llama.cpp's, with its converter")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(given.folder / "slice", ignore_errors=True)
    sizes = {"size": given.size, "hidden": given.hidden, "inner": given.inner}
    maker = get_context("spawn").Process(target=make_slice, args=(given.folder / "slice",), kwargs=sizes)
    maker.start()  # by itself: no child's memory is told to be less than this process's
    maker.join()
    rows = []
    for row in measure(given):
        print(row)
        rows.append(row)
    command = "python benchmarks/suites/exports/speed.py FOLDER RESULT.json --size SIZE --llama PYTHON --sources FOLDER"
    found = facts(command, "exports", "k2quant", "kernels")
    copied, *others = rows
    ratios = {row["way"]: row["seconds"] / copied["seconds"] for row in others if row["way"].startswith("export")}
    found["versions"] = versions(sys.executable, ["numpy", "numba"])
    if given.llama:
        found["versions"] |= versions(given.llama, ["llama_cpp_python"])
    found |= {"size": given.size, "runs": given.runs, "ratios": ratios, "rows": rows}
    given.result.write_text(json.dumps(found, indent=1) + "\n")
    given.result.with_suffix(".md").write_text(page(found))


if __name__ == "__main__":
    main()
