"""`load_model`: a checkpoint in any format as a transformers model whose weights stay packed."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Mapping
from typing import cast, get_args

import torch
from transformers import GenerationConfig

from k2quant.checkpoint.files.paths import read_limited
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.remote.address import spot
from k2quant.errors import CheckpointWarning, UsageError
from k2quant.ground.saying.arguments import hinting
from k2quant.ground.saying.progress import Asked, barred, told
from k2quant.ground.units import one_of
from k2quant.model.architecture import TOKEN_IDS, checked_ids
from k2quant.model.assembly import Assembly
from k2quant.model.causal_lm import K2ForCausalLM
from k2quant.model.filling import fill
from k2quant.model.modules import Backend
from k2quant.model.placement import execution_device, place, resident, spread

_log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_SETTINGS_LIMIT = 2**20  # bytes of generation_config.json


_HINTS = {
    "torch_dtype": "it is `dtype` here",
    "device_map": "it is `device` here, and takes the same: one device, auto, or a map",
    "load_in_4bit": "the checkpoint says how its weights are stored, and they stay so; `k2quant.convert` makes INT4",
    "load_in_8bit": "the checkpoint says how its weights are stored, and they stay so; `k2quant.convert` makes FP8",
    "quantization_config": "the checkpoint says how its weights are stored, and they stay so",
    "trust_remote_code": "no code of the checkpoint is run, so there is nothing to trust",
    "attn_implementation": "it is in the model's config: `model.set_attn_implementation`",
    "low_cpu_mem_usage": "leave it out: weights go from the file to where they stay",
}
"""What transformers' `from_pretrained` has."""


@hinting(_HINTS)
@barred("load")
def load_model(
    path: str | os.PathLike[str] | Checkpoint,
    *,
    device: str | torch.device | Mapping[str, str | int] = "cpu",
    dtype: torch.dtype | str = torch.bfloat16,
    backend: Backend = "auto",
    max_memory: Mapping[int | str, int | str] | None = None,
    follow_links: bool = False,
    progress: Asked = None,
) -> K2ForCausalLM:
    """Load a K2 checkpoint as a transformers causal LM, its quantised weights packed as they are on disk.

    The suffixes of the tensors decide what is BF16, block-FP8 or INT4; formats may be mixed. Of K2.5 and later, the
    language model is loaded. No code of the checkpoint is run. Layers that only predict further tokens (MTP) are left
    out; if the config does not promise them, a `CheckpointWarning` says so. A head that is tied to the embedding and
    not there is the embedding; one that is there is used, with a warning.

    Args:
        path: folder of the checkpoint; or the checkpoint, opened.
        device: one device; `auto` to spread the model over the GPUs, then the CPU, then the disk; or a map from names
            of modules to devices, `cpu` or `disk`, as accelerate has them. What lies on the CPU or the disk beside a
            GPU is brought there when its turn comes; the disk is the checkpoint itself, nothing is copied.
        dtype: of activations and of what is not quantised: bfloat16, float16 or float32.
        backend: `auto` for the fused kernels of the device, `reference` for plain torch, `decoded` for plain torch on
            the BF16 values that weights mean, which is slow and gives equal bits for equal values in any format.
        max_memory: with `auto`, the most that each device may take, such as `{0: "70GiB", "cpu": "100GiB"}`.
        follow_links: whether links of the folder may lead out of it.
        progress: called with the bytes read and all bytes; True for a bar.

    Returns:
        a `DeepseekV3ForCausalLM` in evaluation mode. `state_dict` has the checkpoint's names, expert by expert;
        `save_pretrained` gives the checkpoint back byte for byte.

    Raises:
        CheckpointError: the checkpoint is incomplete, contradicts its config, or is no model of this family; all that
            names and shapes can tell is checked before weights are read.
        UsageError: an option makes no sense.
    """
    begun = time.monotonic()
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(spot(path), follow_links=follow_links)
    assembly = assemble(checkpoint, device=execution_device(device), dtype=dtype, backend=backend)
    mapping = spread(assembly, device, max_memory)
    fill(assembly, resident(assembly, mapping), progress=told(progress))
    _log.info("%s: loaded in %.2f s", checkpoint.folder, time.monotonic() - begun)
    _tie(assembly)
    place(assembly, mapping)
    _take_generation_config(assembly)
    return cast("K2ForCausalLM", assembly.model)


def _tie(assembly: Assembly) -> None:
    """Have head and embedding share their memory, where the checkpoint has one tensor for both and one device has both.

    Elsewhere each has a copy; a model whose copies were changed apart is not saved.
    """
    head, embedding = assembly.model.lm_head, assembly.model.model.embed_tokens
    if assembly.tied and not head.weight.is_meta and head.weight.device == embedding.weight.device:
        head.weight = embedding.weight


def _take_generation_config(assembly: Assembly) -> None:
    """Have the model end where its checkpoint says that it ends; without such a file, config.json decides."""
    path = assembly.checkpoint.path("generation_config.json")
    if not path.exists():
        return
    settings = parse_object(read_limited(path, _SETTINGS_LIMIT), file=path)
    vocabulary = assembly.config.vocab_size
    ids = {key: checked_ids(settings[key], vocabulary, key, path) for key in TOKEN_IDS if key in settings}
    assembly.model.generation_config = GenerationConfig(**ids)


def assemble(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype | str, backend: Backend) -> Assembly:
    """Check the options and build the model without its weights.

    Warns with `CheckpointWarning` of what the config says in vain and the model does without.

    Raises:
        UsageError: an option makes no sense.
        CheckpointError: see `Assembly`.
    """
    one_of("backend", backend, get_args(Backend))
    if isinstance(dtype, str):
        one_of("dtype", dtype, tuple(DTYPES))
        dtype = DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise UsageError(f"dtype: expected {', '.join(DTYPES)}, found {dtype}")
    assembly = Assembly(checkpoint, skeleton=K2ForCausalLM, dtype=dtype, backend=backend, device=device)
    for text in assembly.remarks:  # said where it is found, so that a process says each but once
        warnings.warn(f"{checkpoint.folder}: {text}", CheckpointWarning, stacklevel=1)
    return assembly
