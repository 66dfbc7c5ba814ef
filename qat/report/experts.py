"""Pictures and lists of the routers and their experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from k2quant.qat.run.summary import RouterSummary, Summary
from k2quant.report.drawing import WIDE, Canvas, colour, figure, legend
from k2quant.report.words import DASH, code, count, table, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROUTERS = 128  # in pictures and tables; K2 has 60
_STARVED = 20  # experts named


class _Level(NamedTuple):
    """Experts of a like load; the load is in multiples of an even share."""

    words: str
    paint: str
    holds: Callable[[float], bool]


_LEVELS = (
    _Level("no token", "bad", lambda load: load == 0),
    _Level("below half an even share", "unsure", lambda load: 0 < load < 0.5),
    _Level("half to twice", "base", lambda load: 0.5 <= load <= 2),
    _Level("twice to four times", "class-4", lambda load: 2 < load <= 4),
    _Level("above four times", "candidate", lambda load: load > 4),
)


def expert_load(routers: Sequence[RouterSummary]) -> str:
    """Draw for each router which part of its experts had how much of the training's tokens."""
    shown = routers[:_ROUTERS]
    if not shown:
        return ""
    places, label = _places(shown)
    loads = [_relative(router.load) for router in shown]
    levels = [[100 * sum(map(level.holds, load)) / len(load) for load in loads] for level in _LEVELS]
    seen = [number for number, shares in enumerate(levels) if any(shares)]
    wide = 0.84 * min(1, max(len(shown), 3) / 12)  # three columns as wide as the page would be a poster

    def draw(axes: Axes, canvas: Canvas) -> None:
        bottom = [0.0] * len(shown)
        for number in seen:
            axes.bar(places, levels[number], width=wide, bottom=bottom, color=colour(_LEVELS[number].paint))
            bottom = [below + share for below, share in zip(bottom, levels[number], strict=True)]
        axes.set_ylim(0, 100)
        _scale(axes, canvas, places, label, "experts (%)")

    return figure(
        "Load of the experts in training",
        f"Each column is a router, its experts sorted from idle to busy. An even share is the router's tokens over "
        f"its experts. {_busiest(shown, loads)}{_left_out(routers)}",
        draw,
        (320, 280),
        legend=legend(("\u25a0", _LEVELS[number].paint, _LEVELS[number].words) for number in seen),
        table=_load_table(shown, loads),
    )


def _relative(load: Sequence[int]) -> list[float]:
    """Return loads in multiples of an even share."""
    even = sum(load) / len(load)
    return [tokens / even if even else 0.0 for tokens in load]


def _busiest(routers: Sequence[RouterSummary], loads: list[list[float]]) -> str:
    idle = sum(load.count(0.0) for load in loads)
    every = sum(map(len, loads))
    said = f"{idle:,} of {every:,} experts had no token." if idle else f"Each of {every:,} experts had a token."
    most, router = max((max(load), number) for number, load in enumerate(loads))
    if most == 0:
        return said
    expert = loads[router].index(most)
    return f"{said} Busiest: expert {expert:,} of {code(routers[router].name)}, {most:.1f} times an even share."


def _load_table(routers: Sequence[RouterSummary], loads: list[list[float]]) -> str:
    spread = ["least", "median", "most", "most at the start, held out"]
    heads = ["router", "experts", "tokens &times; slots", "no token", *spread]
    rows = [
        [
            code(router.name),
            f"{router.experts:,}",
            count(sum(router.load)),
            f"{load.count(0.0):,}",
            *(f"{value:.2f}" for value in (min(load), median(load), max(load))),
            DASH if router.start_load is None else f"{max(_relative(router.start_load)):.2f}",
        ]
        for router, load in zip(routers, loads, strict=True)
    ]
    return table(heads, rows, label="load of the experts")


def router_agreement(routers: Sequence[RouterSummary]) -> str:
    """Draw how far each router still chooses what the start model's does."""
    shown = [(router, router.agreement) for router in routers[:_ROUTERS] if router.agreement is not None]
    if not shown:
        return ""
    places, label = _places([router for router, _ in shown])
    shares = [100 * share for _, share in shown]
    lowest = min(range(len(shares)), key=shares.__getitem__)

    def draw(axes: Axes, canvas: Canvas) -> None:
        line = "-" if len(shares) > 2 else "none"  # two values are two dots
        axes.plot(
            places,
            shares,
            linestyle=line,
            color=colour("candidate"),
            marker="o",
            markersize=canvas.font / 2.6,
            linewidth=1.6,
        )
        low, high = axes.get_ylim()
        axes.set_ylim(max(min(low, 99), -2), min(max(high, low + 1), 100.5))
        _scale(axes, canvas, places, label, "agreement (%)")

    rows = [[code(router.name), f"{share:.2f}%"] for (router, _), share in zip(shown, shares, strict=True)]
    return figure(
        "Router agreement with the start point",
        "Share of the choices of experts that the start model makes too, for the same tokens. Lowest: "
        f"{shares[lowest]:.1f}%, {code(shown[lowest][0].name)}.{_left_out(routers)}",
        draw,
        (260, 230),
        table=table(["router", "agreement"], rows, css="compact", label="router agreement"),
    )


def starved(summary: Summary) -> str:
    """List the experts that saw too few tokens to learn from."""
    found = summary.starved
    if not found:
        if not (summary.routers and summary.least_tokens):
            return ""
        return (
            f"<p class='card good'>Every routed expert learnt from at least {summary.least_tokens:,} tokens: none is "
            "starved.</p>"
        )
    rows = [[code(name), f"{tokens:,}"] for name, tokens in found[:_STARVED]]
    more = f"<p class=note>and {len(found) - _STARVED:,} more; <code>summary.json</code> has all.</p>"
    return (
        f"<section class=card><h2>Starved experts: {len(found):,}</h2><p class=note>"
        f"They saw fewer than {summary.least_tokens:,} tokens and keep post-training rounding.</p>"
        f"{table(['expert', 'tokens'], rows, css='compact', label='starved experts')}"
        f"{more if len(found) > _STARVED else ''}</section>"
    )


def oscillation(summary: Summary) -> str:
    """Tell how restless the codes of each class were."""
    if not summary.oscillation:
        return ""
    rows = [
        [text(found.kind), count(found.weights), _percent(found.flipped, found.weights),
         _percent(found.oscillating, found.weights)]
        for found in summary.oscillation[:_ROUTERS]
    ]  # fmt: skip
    return (
        "<section class=card><h2>Oscillation of the codes</h2><p class=note>Of a fixed sample of weights: whose code "
        "ever changed, and whose code changed back soon after. A weight that goes back and forth has not settled."
        "</p>"
        f"{table(['class', 'sampled', 'flipped', 'back and forth'], rows, css='compact', label='oscillation')}"
        "</section>"
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}%" if whole else DASH


def _places(routers: Sequence[RouterSummary]) -> tuple[list[int], str]:
    """Return where each router stands, and what the axis counts: layers, or routers where layers are not told."""
    layers = [router.layer for router in routers if router.layer is not None]
    if len(set(layers)) == len(routers) and max(layers) - min(layers) < 4 * _ROUTERS:
        return layers, "decoder layer"
    return list(range(1, len(routers) + 1)), "router"


def _left_out(routers: Sequence[RouterSummary]) -> str:
    return f" The first {_ROUTERS} of {len(routers):,} routers." if len(routers) > _ROUTERS else ""


def _scale(axes: Axes, canvas: Canvas, places: list[int], label: str, unit: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(min(places) - 0.7, max(places) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=15 if canvas is WIDE else 6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y", linewidth=0.8)
    axes.set_xlabel(label)
    axes.set_ylabel(unit)
