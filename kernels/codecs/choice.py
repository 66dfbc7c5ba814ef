"""Which codecs a device has: `seam` says what they are, the folders beside this file have them."""

from __future__ import annotations

from k2quant.ground.extras import need
from k2quant.kernels.codecs.seam import Codecs
from k2quant.kernels.devices.driver import gpu_number


def codecs(device: str) -> Codecs:
    """Return the codecs of "cpu", or of "cuda" or "cuda:N".

    Raises:
        UsageError: there is no such device here.
        MissingExtra: torch is not installed, and it is another than the CPU.
    """
    if device == "cpu":
        from k2quant.kernels.codecs.cpu import CODECS

        return CODECS
    known = "cpu, cuda or cuda:N"
    gpu_number(device, known=known)  # before torch is loaded
    need("run", f"device `{device}`")
    from k2quant.kernels.devices.gpus import check_cuda, has_triton

    check_cuda(device, known=known, remedy="; use `device=cpu`")
    if has_triton():
        from k2quant.kernels.codecs.gpu.seam import cuda_codecs

        return cuda_codecs(device)
    from k2quant.kernels.codecs.reference.seam import torch_codecs

    return torch_codecs(device)  # the reference: torch alone, the same bits, more slowly
