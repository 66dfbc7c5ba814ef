"""A dry run: CPU tensors take the way of GPU tensors, through Triton's interpreter, with an H200's configurations."""

from __future__ import annotations

import torch
from torch import Tensor

from k2quant.kernels.codecs.seam import Codecs
from k2quant.kernels.products import dispatch, prepare
from k2quant.kernels.products.packed.int4 import Int4Weight
from k2quant.kernels.products.packed.weight import Layout, PackedWeight
from k2quant.kernels.products.tables.configs import TABLES, Table, read_table

CAPABILITY = (9, 0)
"""Of an H200."""


def begin() -> None:
    """Send everything in this process there."""
    table = read_table(TABLES / f"sm_{CAPABILITY[0]}{CAPABILITY[1]}.json")

    def table_of(device: torch.device) -> Table:
        del device
        return table

    def best_layout(device: torch.device, rows: int, kind: type[PackedWeight] = Int4Weight) -> Layout:
        del device, rows
        return kind.gpu_layout

    def on_triton(tensor: Tensor) -> bool:
        del tensor
        return True

    def capability(tensor: Tensor) -> tuple[int, int]:
        del tensor
        return CAPABILITY

    dispatch.on_triton = on_triton
    dispatch.table_of = table_of  # type: ignore[assignment]  # it remembers nothing
    dispatch._capability = capability  # noqa: SLF001 - nobody else asks it
    prepare.best_layout = best_layout
    torch.set_num_threads(1)  # tiny tensors would wait for the other threads


def codecs(device: str) -> Codecs:
    """Return the codecs that a conversion on a GPU uses, interpreted."""
    from k2quant.kernels.codecs.gpu.seam import cuda_codecs  # only here: it loads Triton

    del device
    return cuda_codecs("cpu")
