"""nano-K2 on the disk: a K2 checkpoint in BF16, a shard a layer, with everything transformers wants beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from k2quant import names
from k2quant.checkpoint.in_memory import Shard, write_checkpoint
from k2quant.checkpoint.paths import write_whole
from k2quant.checkpoint.reader import CONFIG as CONFIG_FILE
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.errors import CheckpointError, DestinationForeign
from k2quant.model import load_model
from k2quant.model.assembly import K2ForCausalLM
from k2quant.nano import architecture, vocabulary

MARK = "k2quant_nano.json"
"""The file that says whose folder this is, and how its model is trained; config.json says that it is done."""


def claim(folder: Path, note: Mapping[str, Any]) -> None:
    """Make the folder and mark it as a nano's; take out of it what an earlier run finished.

    Args:
        folder: where.
        note: what `MARK` shall hold: how the model is going to be trained.

    Raises:
        DestinationForeign: it holds something that no `k2quant nano` wrote.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise DestinationForeign("not empty, and no nano-K2", file=folder, remedy="name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / MARK, _json(note))
    # The config goes first, as it comes last: from here on nothing takes the folder for a checkpoint.
    for path in (folder / CONFIG_FILE, *sorted(folder.glob("model*.safetensors*"))):
        path.unlink(missing_ok=True)


def write(folder: Path, model: DeepseekV3ForCausalLM) -> None:
    """Write a model, rounded to BF16, into a folder that was claimed.

    Args:
        folder: where.
        model: of `architecture.CONFIG`, float32.
    """
    for name, content in vocabulary.files().items():
        write_whole(folder / name, content)
    generation = {"bos_token_id": vocabulary.BOS, "eos_token_id": vocabulary.EOS, "pad_token_id": vocabulary.PAD}
    write_whole(folder / "generation_config.json", _json(generation))
    write_checkpoint(folder, _shards(model), architecture.CONFIG)


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _shards(model: DeepseekV3ForCausalLM) -> dict[str, Shard]:
    """Return the tensors of each shard: a layer's own, the embedding with the first, norm and head with the last."""
    layers = model.config.num_hidden_layers
    shards: list[Shard] = [{} for _ in range(layers)]
    for name, tensor in _tensors(model):
        layer = names.layer(name)
        home = layer if layer is not None else 0 if "embed_tokens" in name else layers - 1
        is_bias = name.endswith("e_score_correction_bias")
        shards[home][name] = ("F32", tensor.numpy()) if is_bias else ("BF16", _bits(tensor))
    return {f"model-{place + 1}-of-{layers}.safetensors": shard for place, shard in enumerate(shards)}


def _tensors(model: DeepseekV3ForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors under their names on the disk, where the experts of a layer stand one by one."""
    for name, tensor in model.state_dict().items():
        fused = names.fused_experts(name)
        if fused is None:
            yield name, tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = matrix.chunk(len(fused.projections))
            for projection, part in zip(fused.projections, parts, strict=True):
                yield f"{fused.prefix}{expert}.{projection}.weight", part


def _bits(tensor: Tensor) -> NDArray[np.uint16]:
    """Round to BF16 and return the bits."""
    return tensor.bfloat16().contiguous().view(torch.uint16).numpy()


def load(folder: Path) -> K2ForCausalLM:
    """Read a nano-K2 that `k2quant nano` wrote, as a float32 model: BF16 values, exact sums.

    Raises:
        CheckpointError: the folder holds no such checkpoint.
    """
    config = open_checkpoint(folder).config
    if config is None or config.get("vocab_size") != vocabulary.SIZE:
        raise CheckpointError("no nano-K2", file=folder / CONFIG_FILE, remedy="write one with `k2quant nano`")
    return load_model(folder, dtype=torch.float32)
