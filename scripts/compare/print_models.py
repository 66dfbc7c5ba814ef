"""Write what the functions on models make of nano-K2 into `python/`; runs with the package of either checkout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import k2quant
import k2quant.qat

_IDS = torch.tensor([[1, 5, 9, 12, 7, 7, 3, 20], [1, 30, 31, 2, 8, 4, 40, 11]])
_OUT = Path("python")


class Watch(k2quant.LayerHooks):
    """Prints what each layer makes of its inputs."""

    def batch(self, layer: int, number: int, inputs: Tensor, outputs: Tensor) -> None:
        """Print the digests of a layer's inputs and outputs."""
        print(f"  layer {layer}, batch {number}: {digest(inputs)} -> {digest(outputs)}")


def digest(tensor: Tensor) -> str:
    """Return a tensor's dtype, shape and a hash of its bytes."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()[:16]}"


def run(name: str) -> None:
    """Load a checkpoint, run it whole and layer by layer, and save it again."""
    for dtype, backend in ((torch.bfloat16, "auto"), (torch.float32, "auto"), (torch.float32, "reference")):
        model = k2quant.load_model(f"nano/{name}", dtype=dtype, backend=backend)  # type: ignore[arg-type]  # a choice
        with torch.no_grad():
            print(f"{name} {dtype} {backend}: {digest(model(_IDS, use_cache=False).logits)}")
    for key, tensor in model.state_dict().items():
        print(f"  {key}: {digest(tensor)}")
    k2quant.save_model(model, _OUT / f"saved-{name}")
    for logits in k2quant.stream_forward(f"nano/{name}", [_IDS, _IDS[:1, :5]], Watch(), dtype=torch.float32):
        print(f"{name} streamed: {digest(logits)}")


def configs() -> Iterator[tuple[str, Any]]:
    """Yield what a training can be told of rounding."""
    made = k2quant.qat.QATConfig
    yield "int4", made()
    yield "grid", made(grid="compressed-tensors", estimator="clipped", ignore=("layers.2",))
    yield "learned", made(bits=2, scope="linear", estimator="learned")
    yield "adapters", made(to="fp8", train="adapters", adapter=k2quant.qat.Adapter(rank=4, alpha=8))


def train(name: str, config: Any) -> None:
    """Take one step with a prepared model, and export it."""
    torch.manual_seed(6)
    model: nn.Module = k2quant.qat.load("nano/k2", dtype=torch.float32)
    k2quant.qat.prepare(model, config)
    print(f"trained-{name}: {len(k2quant.qat.prepared(model).targets)} targets")
    loss = model(_IDS, labels=_IDS, use_cache=False).loss
    loss.backward()
    print(f"  loss {loss.item()!r}")
    for key, parameter in model.named_parameters():
        print(f"  {key}: {digest(parameter)}, gradient {None if parameter.grad is None else digest(parameter.grad)}")
    torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 1.0).step()
    k2quant.qat.export(model, _OUT / f"trained-{name}")


def main() -> None:
    """Print digests of all that is computed; folders hold what is saved."""
    for name in ("k2", "k2-int4", "k2-fp8"):
        run(name)
    for name, config in configs():
        train(name, config)


if __name__ == "__main__":
    main()
