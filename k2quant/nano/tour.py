"""nano-K2 in every format: converted, run on packed weights, and what that costs and saves."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from k2quant.conversion.convert import convert
from k2quant.formats.known import FORMATS, FormatName
from k2quant.model import load_model
from k2quant.nano import tasks, vocabulary
from k2quant.nano.scoring import Accuracy, Score, mean, score
from k2quant.nano.tasks import Item

_PROMPTS, _NEW_TOKENS = 8, 48  # decoded at once, and how far: a second or less


class Stop(NamedTuple):
    """nano-K2 in one format."""

    format: FormatName
    folder: Path
    nbytes: int
    """Of its shards."""
    score: Score
    gap: tuple[float, float]
    """How much more its answers cost than those of BF16, item by item: mean and standard error, in nats."""
    tokens_per_second: float
    """Greedy decoding of eight prompts at once, with the KV cache."""

    @property
    def accuracy(self) -> Accuracy:
        """Of all items."""
        return self.score.accuracy()


def tour(folder: Path, items: Iterable[Item] | None = None) -> Iterator[Stop]:
    """Convert a nano-K2 to every other format, beside it, and run it in each on the same items.

    Args:
        folder: what `k2quant nano` wrote; `-fp8` and `-int4` are put behind its name for the others.
        items: to score; None for `tasks.exam(100)`.

    Raises:
        DestinationForeign: a folder beside it holds something else.
    """
    items = list(tasks.exam(100) if items is None else items)
    plain: Score | None = None
    for form in get_args(FormatName):
        place = folder
        if FORMATS[form].quantised:
            place = folder.with_name(f"{folder.name}-{form}")
            convert(folder, place, to=form, restart=True)
        model = load_model(place)
        found = score(model, items)
        plain = plain or found
        gaps = [after - before for after, before in zip(found.losses, plain.losses, strict=True)]
        size = sum(path.stat().st_size for path in place.glob("*.safetensors"))
        yield Stop(form, place, size, found, mean(gaps), decoding_rate(model, items))


def decoding_rate(model: Any, items: list[Item]) -> float:
    """Return tokens a second of greedy decoding, eight prompts at once."""
    length = min(len(item.question) for item in items)
    rows = [[vocabulary.BOS, *vocabulary.encode(item.question[:length])] for item in items[:_PROMPTS]]
    ids = torch.tensor(rows, device=model.device)
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": vocabulary.PAD,
    }
    model.generate(ids, max_new_tokens=2, **options)
    begun = time.perf_counter()
    model.generate(ids, max_new_tokens=_NEW_TOKENS, **options)
    return len(rows) * _NEW_TOKENS / (time.perf_counter() - begun)
