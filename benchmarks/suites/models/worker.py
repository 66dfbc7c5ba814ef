"""Load one checkpoint by one tool in a fresh process, run it, and write down what that took.

Usage: worker.py JOB.json

The job names the tool, the folder, what to run and the file for the results; see `models.run`. Standard output is a
log. A tool that fails is a result; its error stands in the file.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

SHARE = 0.9
"""Of the memory that is free when the process starts: asking for more is an error, instead of the end of others."""


def main() -> None:
    """Do the job."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    found: dict[str, Any] = {"variants": {}}
    _limit_memory()
    with _remarks() as remarks:
        try:
            model = _load(job, found)
            _run(model, job, found)
        except Exception as error:  # noqa: BLE001 - whatever a tool raises is a result
            found["failed"] = reason(error)
            found["remarks"] = [line for line in remarks if re.match(r"\w*Error: ", line)][:2]
    (Path(job["folder_out"]) / "found.json").write_text(json.dumps(found, indent=1))


def reason(error: Exception) -> str:
    """Return an error's name and first line, without folders of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return without_folders(f"{type(error).__name__}: {lines[0]}")[:300]


def without_folders(text: str) -> str:
    """Return a text with paths cut down to their last parts."""
    return re.sub(r"(?:/[\w.@+-]+)+/([\w.@+-]+)", r"\1", text)


def memory() -> dict[str, int]:
    """Return the bytes that a process holds: its own, mapped from files, and the most of both since `forget_peak`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    sizes = {name: int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem", "RssFile", "VmHWM")}
    own = sizes["RssAnon"] + sizes["RssShmem"]
    return {"own": own, "mapped": sizes["RssFile"], "peak": sizes["VmHWM"]}


def forget_peak() -> None:
    """Start the high-water mark anew; where the system does not let us, it stays what it was."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def weight_bytes(model: Any) -> int:
    """Return the bytes of a model's parameters and buffers, each piece of memory once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _limit_memory() -> None:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(int(lines["MemAvailable"].split()[0]) * 1024 * SHARE)
    resource.setrlimit(resource.RLIMIT_DATA, (free, free))


@contextmanager
def _remarks() -> Iterator[list[str]]:
    """Collect what transformers logs: its errors name a report that it logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.extend(_plain(record.getMessage()))  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def _plain(text: str) -> list[str]:
    coloured = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return [without_folders(line.strip())[:300] for line in coloured.splitlines() if line.strip()]


def _load(job: dict[str, Any], found: dict[str, Any]) -> Any:
    """Import the tool, load the checkpoint, and note seconds and memory."""
    begin = time.perf_counter()
    load = {"k2quant": _k2quant, "transformers": _transformers}[job["tool"]](job)
    found["import_s"] = time.perf_counter() - begin
    found["before"] = memory()
    forget_peak()
    begin = time.perf_counter()
    model = load()
    found["load_s"] = time.perf_counter() - begin
    gc.collect()
    found["loaded"] = memory()
    found["weight_bytes"] = weight_bytes(model)
    return model


def _k2quant(job: dict[str, Any]) -> Callable[[], Any]:
    from k2quant.model import load_model

    return lambda: load_model(job["folder"])


def _transformers(job: dict[str, Any]) -> Callable[[], Any]:
    import torch
    from transformers import CompressedTensorsConfig, DeepseekV3ForCausalLM, FineGrainedFP8Config
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    configs: dict[str, Callable[[], Any]] = {
        "fp8": lambda: FineGrainedFP8Config(dequantize=True),
        "int4": lambda: CompressedTensorsConfig(dequantize=True),
    }
    options = {"quantization_config": configs[job["format"]]()} if job["format"] in configs else {}
    return lambda: DeepseekV3ForCausalLM.from_pretrained(job["folder"], dtype=torch.bfloat16, **options).eval()


def _run(model: Any, job: dict[str, Any], found: dict[str, Any]) -> None:
    """Note the logits of a prompt, then tokens a second, for each way to run the experts."""
    import torch

    found["threads"] = torch.get_num_threads()
    if job["tool"] == "transformers":
        found["default_experts"] = model.config._experts_implementation  # noqa: SLF001 - there is no other way to ask
    for variant, experts in job["variants"].items():
        if experts:
            model.set_experts_implementation(experts)
        elif job["tool"] == "transformers":
            model.set_experts_implementation(found["default_experts"])
        with torch.inference_mode():
            found["variants"][variant] = _measure(model, job, variant)


def _measure(model: Any, job: dict[str, Any], variant: str) -> dict[str, Any]:
    """Run a loaded model and return seconds, rates and memory."""
    import numpy as np

    forget_peak()
    begin = time.perf_counter()
    logits = model(input_ids=_prompt(model, 1, job["prompt"])).logits
    found: dict[str, Any] = {"first_s": time.perf_counter() - begin}  # what is compiled or imported late is in it
    np.save(Path(job["folder_out"]) / f"{variant}.npy", logits.float().numpy())
    if not job["only_logits"]:
        found |= _rates(model, job)
    return found | {"ran": memory()}


def _prompt(model: Any, rows: int, tokens: int) -> Any:
    """Return tokens `[rows, tokens]`, the same ones in every process; the first few ids may be special."""
    import torch

    random = torch.Generator().manual_seed(rows * 1000 + tokens)
    return torch.randint(8, model.config.vocab_size, (rows, tokens), generator=random)


def _rates(model: Any, job: dict[str, Any]) -> dict[str, list[float]]:
    """Return samples of tokens a second: prefill, and decoding at each batch size."""
    found = {"prefill": _samples(partial(_prefill, model, job["prefill"]), job)}
    for rows in job["batches"]:
        decode = partial(_decode, model, _prompt(model, rows, job["prompt"]), job["new_tokens"])
        found[f"decode_{rows}"] = _samples(decode, job)
    return found


def _prefill(model: Any, tokens: int) -> float:
    """Return the tokens a second that a prompt takes until its last logits."""
    prompt = _prompt(model, 1, tokens)
    begin = time.perf_counter()
    model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    return tokens / (time.perf_counter() - begin)


def _samples(work: Callable[[], float], job: dict[str, Any]) -> list[float]:
    """Run once to warm up, then as often as the job says, or until its time is over."""
    until = time.perf_counter() + job["seconds"]
    rates = [work()]
    while len(rates) <= job["samples"] and time.perf_counter() < until:
        rates.append(work())
    return rates[1:] or rates  # one that takes all the time needs no warming up


def _decode(model: Any, prompt: Any, new_tokens: int) -> float:
    """Return the tokens a second that `generate` adds greedily after its first ones."""
    import torch
    from transformers import GenerationConfig
    from transformers.generation.streamers import BaseStreamer

    times: list[float] = []

    class Clock(BaseStreamer):
        def put(self, value: Any) -> None:
            del value
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # nothing ends it early
    settings = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, use_cache=True)
    ones = torch.ones_like(prompt)
    model.generate(input_ids=prompt, attention_mask=ones, generation_config=settings, streamer=Clock())
    _, first, *rest = times  # the prompt is put, too
    return float(prompt.shape[0] * len(rest) / (rest[-1] - first))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
