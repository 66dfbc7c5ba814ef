"""nano-K2 on the disk: a K2 checkpoint in BF16, a shard a layer, with everything transformers wants beside it.

Whose a folder is, is told without torch.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2quant.checkpoint.files.locks import locked_file
from k2quant.checkpoint.files.paths import refuse_foreign, write_whole
from k2quant.checkpoint.reader import CONFIG as CONFIG_FILE
from k2quant.checkpoint.reader import INDEX, open_checkpoint
from k2quant.checkpoint.weights import group_tensors
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.errors import CheckpointError, DestinationForeign
from k2quant.ground import names
from k2quant.nano import vocabulary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import DeepseekV3ForCausalLM

    from k2quant.model.causal_lm import K2ForCausalLM

MARK = "k2quant_nano.json"
"""The file that says whose folder this is, and how its model is trained; config.json says that it is done."""


_LOCK = "k2quant_nano.lock"


@contextlib.contextmanager
def claimed(folder: Path, *, soft_lock: bool = False) -> Iterator[None]:
    """Make the folder if need be and hold it; what an earlier run left there stays until `write`.

    Args:
        folder: the folder.
        soft_lock: whether a file may be the lock where the file system has no others.

    Raises:
        DestinationForeign: it holds something that no `k2quant nano` wrote, or is no folder.
        DestinationInUse: another run trains for it.
        OSError: it cannot be made.
    """
    refuse_others(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked_file(folder / _LOCK, soft=soft_lock):
        yield
        (folder / _LOCK).unlink(missing_ok=True)


def refuse_others(folder: Path) -> None:
    """Refuse a folder that is no nano's; one that is empty or not there is nobody's.

    Raises:
        DestinationForeign: it holds something that no `k2quant nano` wrote, or is no folder.
    """
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise DestinationForeign("not a folder", file=folder, remedy="name a new folder")
    refuse_foreign(folder, (MARK, _LOCK), "not empty, and no nano-K2", remedy="name a new folder")


def write(folder: Path, model: DeepseekV3ForCausalLM, note: Mapping[str, Any]) -> None:
    """Write a model, rounded to BF16, into a folder that is claimed, in the place of an earlier one.

    Args:
        folder: where.
        model: of `architecture.CONFIG`, float32.
        note: what `MARK` shall hold: how the model was trained.
    """
    from k2quant.nano import architecture

    shards = _shards(model)
    # The config goes first, as it comes last: in between nothing takes the folder for a checkpoint.
    for name in (CONFIG_FILE, INDEX, *shards):
        (folder / name).unlink(missing_ok=True)
    write_whole(folder / MARK, _json(note))
    for name, content in vocabulary.files().items():
        write_whole(folder / name, content)
    generation = {"bos_token_id": vocabulary.BOS, "eos_token_id": vocabulary.EOS, "pad_token_id": vocabulary.PAD}
    write_whole(folder / "generation_config.json", _json(generation))
    write_checkpoint(folder, shards, architecture.CONFIG)


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
    import torch

    return tensor.bfloat16().contiguous().view(torch.uint16).numpy()


def load(folder: Path) -> K2ForCausalLM:
    """Read a nano-K2 that `k2quant nano` wrote, as a float32 model: BF16 values, exact sums.

    Raises:
        CheckpointError: the folder holds no such checkpoint.
    """
    import torch

    from k2quant.model import load_model

    checkpoint = open_checkpoint(folder)
    if checkpoint.config is None or checkpoint.config.get("vocab_size") != vocabulary.SIZE:
        raise CheckpointError("no nano-K2", file=folder / CONFIG_FILE, remedy="write one with `k2quant nano`")
    weights, _ = group_tensors(checkpoint.tensors)
    rounded = next((weight for weight in weights if weight.format and weight.format.quantised), None)
    if rounded is not None:
        raise CheckpointError("is rounded already", tensor=rounded.main.name, file=folder, expected="a nano-K2 in BF16")
    return load_model(folder, dtype=torch.float32)
