"""One arm of the side-by-side with torchao, in a process of its own: suites.qat.peer_worker WORKDIR SEED TOOL BITS."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from suites.common import machine
from suites.qat import peers as qat_peers


def main(workdir: Path, seed: int, tool: str, bits: int) -> None:
    """Train and score one arm."""
    torch.set_num_threads(1)
    base, data = workdir / f"base-{seed}", workdir / "tasks" / "train.jsonl"
    found, seconds = qat_peers.train(tool, base, data, bits=bits, seed=seed)
    result = {
        "commit": machine.git("rev-parse", "--short", "HEAD"),
        "seed": seed,
        "tool": tool,
        "bits": bits,
        "losses": list(found.losses),
        "right": sum(found.right),
        "count": len(found.right),
        "seconds": seconds,
    }
    results = workdir / "peers"
    results.mkdir(exist_ok=True)
    partial = results / f"{seed}-{tool}-{bits}.partial"
    partial.write_text(json.dumps(result))
    partial.rename(results / f"{seed}-{tool}-{bits}.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
