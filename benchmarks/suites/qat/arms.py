"""The arms of the experiment: what is trained, from which base, with what; fixed before any was run to the end.

All arms of a width share base, steps, learning rate and order of the data. The control trains as long without fake
quantisation and is rounded afterwards: without it, what training alone gains would look like recovery.
"""

from __future__ import annotations

from typing import Any

STEPS = 300
ROWS = 16
LENGTH = 64
WARMUP = 20
RATES = {2: 1e-3, 3: 3e-4, 4: 1e-4}
"""Highest learning rate by width: the larger the damage, the farther weights have to go. The better of two for the
plain arm, tried for 200 steps on seed 0 and judged by rows of the training file that are not trained on."""
BITS = (2, 3, 4)
SEEDS = (0, 1, 2, 3, 4)

KINDS: dict[str, dict[str, Any]] = {
    "control": {},
    "plain": {"estimator": "plain"},
    "learned": {"estimator": "learned"},
    "distilled": {"estimator": "plain", "distill": {"weight": 0.5, "temperature": 1.0}},
}
"""`control`: no fake quantisation; `plain`: identity STE; `learned`: LSQ; `distilled`: plain, half of the loss is the
divergence from the base in BF16."""

WIDTHS: dict[str, tuple[int, ...]] = {"control": BITS, "plain": BITS, "learned": (2,), "distilled": (2,)}
"""At which widths each kind is trained."""

PEER_BITS = 4
"""The width of the side-by-side with torchao, the one that both ship."""

PEER_SEEDS = (0, 1, 2)
"""Seeds of the side-by-side."""


def job(base: str, output: str, data: str, *, kind: str, bits: int, seed: int) -> dict[str, Any]:
    """Return the job of one arm, as a job file holds it."""
    how = KINDS[kind]
    whole: dict[str, Any] = {
        "model": base,
        "output": output,
        "data": {"path": data, "length": LENGTH, "held_out": 64},
        "quantize": {
            "to": "int4",
            "scope": "projections",
            "bits": bits,
            "estimator": how.get("estimator", "plain"),
        },
        "training": {
            "steps": STEPS,
            "batch": ROWS,
            "seed": seed,
            "evaluate_every": STEPS,
            "fake_quantize": kind != "control",
        },
        "optimizer": {"rate": RATES[bits], "warmup": WARMUP},
        "saving": {"every": STEPS},
    }
    return whole | ({"distill": how["distill"]} if "distill" in how else {})
