"""Load a checkpoint in any format as a model whose every weight can be trained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import torch

from k2quant.checkpoint.reader import CONFIG, Checkpoint, open_checkpoint
from k2quant.errors import UnsupportedFormat, UsageError
from k2quant.ground.saying.arguments import hinting
from k2quant.ground.saying.progress import Asked, barred, told
from k2quant.model.assembly import Assembly
from k2quant.model.causal_lm import K2ForCausalLM
from k2quant.model.filling import fill
from k2quant.model.loading import assemble
from k2quant.model.placement import checked_device

MASTERS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Dtypes of weights that are trained."""


@hinting({"torch_dtype": "it is `dtype` here", "device_map": "one `device` holds all of a model that trains"})
@barred("load")
def load(
    path: str | os.PathLike[str] | Checkpoint,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    follow_links: bool = False,
    progress: Asked = None,
) -> K2ForCausalLM:
    """Load a K2 checkpoint as a transformers causal LM with dense weights, to be trained.

    Quantised weights become what they stand for. Experts lie fused, as transformers has them; `state_dict` has the
    checkpoint's names, expert by expert.

    Args:
        path: folder of a checkpoint in any format, mixed too; or the checkpoint, opened.
        dtype: of the master weights, float32 or bfloat16. Every BF16 value is exact in both.
        device: one device.
        follow_links: whether links of the folder may lead out of it.
        progress: called with the bytes read and all bytes; True for a bar.

    Raises:
        CheckpointError: the checkpoint is incomplete, contradicts its config, or is no model of this family; or its
            config asks for dropout, which K2 has none of.
        UsageError: an option makes no sense.
    """
    if dtype not in MASTERS.values():
        raise UsageError(f"dtype: expected float32 or bfloat16 to train, found {dtype}")
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(Path(path), follow_links=follow_links)
    place = checked_device(device)
    assembly = _assembled(checkpoint, place, dtype)
    fill(assembly, [(name, module, place) for name, module in assembly.model.named_modules()], progress=told(progress))
    assembly.model.model.rotary_emb.to(place)
    assembly.model.train()
    return cast("K2ForCausalLM", assembly.model)


def skeleton(checkpoint: Checkpoint) -> K2ForCausalLM:
    """Return the model that `load` would, without its weights: all that names and shapes can tell is checked.

    Raises:
        CheckpointError: as in `load`.
    """
    return cast("K2ForCausalLM", _assembled(checkpoint, torch.device("cpu"), torch.float32).model)


def _assembled(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Assembly:
    """Return the model with dense modules, on the meta device.

    Raises:
        CheckpointError: as in `load`.
    """
    assembly = assemble(checkpoint, device=device, dtype=dtype, backend="auto")
    if assembly.config.attention_dropout:  # a step would be no pure function of its number
        raise UnsupportedFormat(
            "attention_dropout",
            file=checkpoint.folder / CONFIG,
            expected="0.0, as K2 has it",
            found=assembly.config.attention_dropout,
        )
    assembly.make_dense()
    return assembly
