"""A peer quantises a whole model, in its own environment.

Usage: worker.py JOB

JOB is a JSON file: `tool` (`gptq`, `awq`, `rtn` or `auto-round`), `model` (a folder that transformers loads), `tokens`
(an .npz of documents: `ids`, one after the other, and their `lengths`), `bits`, `threads`, `output` (safetensors to
write: every weight of the model as it is after quantising, experts apart; and before rounding
as `NAME.folded` where it folds) and `pad`, the token that fills rows up.
Prints a line of JSON: the seconds that quantising took, without imports and loading, and how many linears it changed.
llm-compressor gets the documents in batches of one length, so that nothing is padded; auto-round wants rows of one
length, and leaves what is filled up out of its loss.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GROUP = 32
ROUTER = "re:.*mlp.gate$"
_AT_ONCE = 256  # documents of a batch of llm-compressor's
_ROWS = 8  # of auto-round's, its default
PINNING = "Cannot access accelerator device when none is available."
"""What llm-compressor 0.14.0.1 ends with in AWQ on a machine without a GPU, where it pins memory: that call is left out
here, which changes no result."""


def documents(path: str) -> list[Tensor]:
    """Return the documents, int64 each."""
    content = np.load(path)
    return list(torch.from_numpy(content["ids"]).split(content["lengths"].tolist()))


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield what is to be quantised: every projection of the layers."""
    for name, module in model.named_modules():
        if ".layers." in name and name.endswith(("_proj", "_with_mqa")) and isinstance(module, nn.Linear):
            yield name, module


def compressed(job: dict[str, Any]) -> tuple[dict[str, Tensor], float]:
    """Quantise with llm-compressor: `GPTQModifier`, `AWQModifier` or plain rounding, defaults but for the scheme."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, forward_quantize
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    model = linearize_moe(AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"]))
    args = QuantizationArgs(num_bits=job["bits"], type="int", symmetric=True, strategy="group", group_size=GROUP)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}
    ignore = ["lm_head", ROUTER]
    plain = QuantizationModifier(config_groups=groups, ignore=ignore)
    recipe: list[Any] = {
        "gptq": lambda: [GPTQModifier(config_groups=groups, ignore=ignore)],
        "awq": lambda: [AWQModifier(mappings=folds(model.config)), plain],
        "rtn": lambda: [plain],
    }[job["tool"]]()
    given: Any = list(batches(documents(job["tokens"])))
    loader: DataLoader[Any] = DataLoader(given, batch_size=None)
    IntermediatesCache._pin_intermediate = classmethod(lambda *_: None)  # noqa: SLF001  see `PINNING`
    begun = time.perf_counter()
    oneshot(model=model, dataset=loader, recipe=recipe, num_calibration_samples=len(loader), log_dir=None)
    seconds = time.perf_counter() - begun
    folded: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, module in linears(model):
            folded[f"{name}.folded"] = module.weight.clone()
            scheme: Any = module.quantization_scheme
            module.weight.copy_(forward_quantize(module, module.weight, "weight", scheme.weights))
    return dict(model.state_dict()) | folded, seconds


def folds(config: Any) -> list[Any]:
    """Return llm-compressor's own mappings for DeepSeek-V3, apart for each layer.

    Its defaults ask every layer for one, and are refused for a model whose first layer is dense.
    """
    from llmcompressor.modifiers.transform.awq import AWQMapping
    from llmcompressor.modifiers.transform.awq.mappings import AWQ_MAPPING_REGISTRY

    found = []
    for given in AWQ_MAPPING_REGISTRY["DeepseekV3ForCausalLM"]:
        for layer in range(config.num_hidden_layers):
            here = rf"re:.*layers\.{layer}\."
            routed = layer >= config.first_k_dense_replace
            consumers = [here + name.removeprefix("re:") for name in given.balance_layers if routed or name != ROUTER]
            found.append(AWQMapping(here + given.smooth_layer.removeprefix("re:"), consumers))
    return found


def batches(texts: list[Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield texts of one length together."""
    for length in sorted({len(text) for text in texts}):
        alike = torch.stack([text for text in texts if len(text) == length])
        for ids in alike.split(_AT_ONCE):
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def rounded(job: dict[str, Any]) -> tuple[dict[str, Tensor], float]:
    """Quantise with auto-round, defaults but for scheme and samples."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = documents(job["tokens"])
    rows = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=job["pad"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    begun = time.perf_counter()
    tool = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        bits=job["bits"],
        group_size=GROUP,
        sym=True,
        dataset=[{"input_ids": ids} for ids in rows.split(_ROWS)],
        nsamples=len(rows),
        seqlen=rows.shape[1],
        device_map="cpu",
    )
    found, _ = tool.quantize()
    return dict(found.state_dict()), time.perf_counter() - begun


def main(path: str) -> None:
    """Do a job."""
    from safetensors.torch import save_file

    answers, sys.stdout = sys.stdout, sys.stderr  # what peers print is no answer
    job = json.loads(Path(path).read_text())
    torch.set_num_threads(job["threads"])
    found, seconds = (rounded if job["tool"] == "auto-round" else compressed)(job)
    kept = (".weight", "_bias", ".folded")
    weights = {name: value.contiguous() for name, value in found.items() if name.endswith(kept)}
    save_file(weights, job["output"])
    print(json.dumps({"seconds": seconds}), file=answers)


if __name__ == "__main__":
    main(sys.argv[1])
