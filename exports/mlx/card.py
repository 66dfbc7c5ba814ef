"""The model card of an export for mlx-lm. The same export of the same source writes the same card."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from k2quant.checkpoint.cards import CARD, placed, sealed
from k2quant.checkpoint.reader import REPORT
from k2quant.conversion.finishing.metadata import Home, front, home_of, of_source, said
from k2quant.errors import printable
from k2quant.ground.units import size

if TYPE_CHECKING:
    from k2quant.exports.mlx.plan import MlxPlan

LIBRARY = "mlx"
"""What hubs call the library (huggingface.js, model-libraries.ts)."""

_LOADING = """from mlx_lm import load

model, tokenizer = load("OUTPUT", tokenizer_config={"trust_remote_code": True})
"""


def card_of(plan: MlxPlan) -> bytes:
    """Return the card of an output."""
    source = plan.export.source
    home = home_of(source.folder)
    name = source.folder.resolve().name if source.supply is None else str(source.place)
    told = of_source(home, said(source.folder) if CARD in plan.copies else {})
    told |= {"library_name": LIBRARY, "tags": [*told.get("tags", []), LIBRARY]}
    own = placed(plan.copies).get(CARD)
    parts = [
        front(told),
        f"# {printable(name)}-MLX\n",
        f"{_linked(home, name)}, written for mlx-lm by k2quant: codes and scales as they were.\n",
        *([f"What the source's own card says of the model: [{own}]({own}).\n"] if own else []),
        "## Weights\n",
        "\n".join(_table(plan)) + "\n",
        f"{size(plan.export.bytes_written)}; `{REPORT}` has each tensor, with checksums.\n",
        "## Made with\n",
        f"```sh\n{_plain(shlex.join(['k2quant', 'export', 'mlx', name, 'OUTPUT']))}\n```\n",
        "## For\n",
        f"```python\n{_LOADING}```\n",
    ]
    return sealed("\n".join(parts))


def _linked(home: Home | None, name: str) -> str:
    return _plain(name) if home is None else f"[{home.name}](https://huggingface.co/{home.name})"


def _plain(text: str) -> str:
    return printable(text).replace("`", "'")


def _table(plan: MlxPlan) -> Iterator[str]:
    yield from ("| tensors | is | becomes | number | bytes |", "|---|---|---|---:|---:|")
    for row in plan.rows:
        yield f"| {row.kind} | {row.source or 'other'} | {row.mode} | {row.tensors:,} | {size(row.nbytes)} |"
