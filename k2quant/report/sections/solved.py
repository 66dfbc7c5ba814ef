"""What solving did: errors of layers' outputs, codes at the end of the range, and what it was solved by."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import TYPE_CHECKING, Any

from k2quant.report.choices.searches import Scales, Solving
from k2quant.report.content import Report
from k2quant.report.drawing import Canvas, colour, figure
from k2quant.report.pictures import lay_layers
from k2quant.report.words import code, share, table, text, tile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COUNTED = "class-0"


def facts(method: str, solving: Solving) -> Iterator[tuple[str, str]]:
    """Yield how codes were solved as pairs of HTML."""
    seen = "quantised" if solving.propagate else "original"
    how = f"{code(method)} at scales by {code(solving.scales)}, damping {solving.damping:g}"
    yield "method", f"{how}; each layer sees what {seen} layers before it give"
    for name, (documents, tokens) in solving.data.items():
        yield f"data: {text(name)}", f"{tokens:,} tokens of {documents:,} document{'' if documents == 1 else 's'}"


def tiles(report: Report) -> Iterator[str]:
    """Yield the error of the layers' outputs."""
    solving = report.search and report.search.solving
    if solving and solving.layers:
        middle = median(relative for _, relative, _ in solving.layers)
        worst = max(solving.layers, key=lambda layer: layer[1])
        note = f"of an MLP&rsquo;s output, median layer; {_percent(worst[1])} in layer {worst[0]}, the furthest"
        yield tile("Error of outputs", _percent(middle), note)


def section(report: Report) -> str:
    """Return the picture of the layers and what became of codes; nothing where none were solved."""
    solving = report.search and report.search.solving
    return f"{_by_layer(solving)}\n{_codes(report)}" if solving else ""


def as_json(report: Report) -> dict[str, Any] | None:
    """Return it as JSON holds it; None where nothing was solved."""
    solving = report.search and report.search.solving
    if not solving:
        return None
    layers = [{"layer": layer, "relative": relative, "tokens": tokens} for layer, relative, tokens in solving.layers]
    return {**solving._asdict(), "data": _data(solving), "layers": layers, "codes": _shares(report)}


def _data(solving: Solving) -> dict[str, dict[str, int]]:
    return {name: {"documents": documents, "tokens": tokens} for name, (documents, tokens) in solving.data.items()}


def _by_layer(solving: Solving) -> str:
    """Draw how far each layer's MLP is from what it was, under the same input."""
    if not solving.layers:
        return ""
    layers, errors, tokens = zip(*solving.layers, strict=True)

    def draw(axes: Axes, canvas: Canvas) -> None:
        size = canvas.font / 2.6
        axes.plot(
            layers, [100 * error for error in errors], "o-", color=colour(_COUNTED), markersize=size, linewidth=1.6
        )
        axes.set_ylim(0, 115 * max(*errors, 1e-9))
        lay_layers(axes, canvas, "error in % of output")

    rows = [
        [str(layer), _percent(error), f"{count:,}"] for layer, error, count in zip(layers, errors, tokens, strict=True)
    ]
    return figure(
        "Error of each layer&rsquo;s MLP, on held-out tokens",
        "The squared difference of what it gives before and after, over the square of what it gives, under the same "
        "input and routing. Lower is better; no layer shows what those before it lost.",
        draw,
        (240, 200),
        table=table(["layer", "error", "held-out tokens"], rows, css="compact", label="error of outputs by layer"),
    )


def _percent(error: float) -> str:
    return f"{100 * error:.3g}%"


def _shares(report: Report) -> dict[str, dict[str, float]]:
    """Return by what weights ship with how many there are, and the mean shares of what went to the end of the range."""
    found: dict[str, list[Scales]] = {}
    for tensor in report.tensors:
        if (scales := tensor.scales) is not None and scales.saturated is not None and scales.short is not None:
            found.setdefault(scales.method, []).append(scales)
    return {
        method: {
            "matrices": len(every),
            "saturated": sum(scales.saturated or 0 for scales in every) / len(every),
            "short": sum(scales.short or 0 for scales in every) / len(every),
        }
        for method, every in sorted(found.items())[:_METHODS]
    }


_METHODS = 10


def _codes(report: Report) -> str:
    """List what became of codes, by what matrices ship with."""
    rows = [
        [code(method), f"{facts['matrices']:,}", share(facts["saturated"], 1), share(facts["short"], 1)]
        for method, facts in _shares(report).items()
    ]
    if not rows:
        return ""
    note = (
        "Scales are chosen before the first column is rounded, so what later columns make up for may leave the range: "
        "such weights saturate. A group is short whose largest code is none of the grid&rsquo;s largest: its scale is "
        "not its largest weight over that code, and a tool that derives scales anew would take another."
    )
    heads = ["ships with", "matrices", "saturated weights", "short groups"]
    return (
        f"<section class=card><h2>Codes at the ends of the range</h2><p class=note>{note}</p>"
        f"{table(heads, rows, css='compact', label='codes at the ends of the range')}</section>"
    )
