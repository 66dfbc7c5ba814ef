"""What rounding every projection does to a nano-K2: to its predictions, as `eval fidelity` has it, and its answers.

Models stay in memory and the base is run once: `eval fidelity` would run it anew for each. The first of a model's rows
is held against `eval fidelity` itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k2quant.calib.stats.reading import Stats
from k2quant.eval import measure_fidelity
from k2quant.model.passes.divergence import kl
from k2quant.nano import vocabulary, writing
from k2quant.nano.batches import NO_TARGET, tokens_of
from k2quant.nano.tasks import Item
from suites.calib import rounding, samples
from suites.calib.samples import WIDTHS

_AT_ONCE = 256  # items of a forward pass
_TOKENS = 1 << 17  # more than any test has


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a model makes of the test."""

    logits: list[Tensor]
    """Before each character of an answer, float32 `[tokens, V]`; not of the stop token, as `eval fidelity` has it."""
    right: str
    """For each item `1` if its answer is wholly right, stop token included, else `0`."""


@torch.no_grad()
def predicted(model: Any, items: Sequence[Item]) -> Predicted:
    """Run the test through a model."""
    logits, right = [], ""
    for first in range(0, len(items), _AT_ONCE):
        rows = [tokens_of(item) for item in items[first : first + _AT_ONCE]]
        tokens = _filled([row for row, _ in rows], vocabulary.PAD)
        targets = _filled([row for _, row in rows], NO_TARGET)
        found = model(input_ids=tokens, use_cache=False).logits.float()
        asked = targets != NO_TARGET
        logits.append(found[asked & (targets != vocabulary.EOS)])
        right += "".join("01"[int(good)] for good in ((found.argmax(-1) == targets) | ~asked).all(1))
    return Predicted(logits, right)


def _filled(rows: list[list[int]], filling: int) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filling)


def divergence(base: Predicted, other: Predicted) -> float:
    """Return the mean KL of a model's predictions from its base's, in nats a token of an answer."""
    return float(torch.cat([kl(*pair) for pair in zip(base.logits, other.logits, strict=True)]).mean())


def measure(
    workdir: Path,
    folder: Path,
    model: Any,
    base: Predicted,
    stats: Stats,
    methods: Sequence[str],
    items: Sequence[Item],
) -> Iterator[dict[str, Any]]:
    """Yield a row for each method and width: KL to the model as it was, and which answers are right."""
    yield {"method": "none", "bits": 16, "right": base.right}
    for bits in WIDTHS:
        for method in methods:
            rounded = rounding.rounded_model(model, stats, method, bits)
            found = predicted(rounded, items)
            row = {"method": method, "bits": bits, "kl": divergence(base, found), "right": found.right}
            if (method, bits) == ("rtn", WIDTHS[-1]):
                row["fidelity"] = by_fidelity(folder, rounded, samples.write_tested(workdir / "data" / "test.jsonl"))
            yield row


def by_fidelity(base: Path, rounded: Any, text: Path) -> float:
    """Return the mean KL as `k2quant eval fidelity` measures it, between checkpoints."""
    with tempfile.TemporaryDirectory() as place:
        writing.write(Path(place), rounded, {})
        found = measure_fidelity(base, place, text=text, context=samples.LONGEST, tokens=_TOKENS, dtype="float32")
        return found.kl.value
