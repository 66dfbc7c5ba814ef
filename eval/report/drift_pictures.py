"""Pictures and words of what fidelity and blame found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from k2quant.eval.drift.findings import Blame, Fidelity, LayerFidelity, Suspect
from k2quant.eval.report.chart_rows import Row, draw_interval, heights, lay_rows, room
from k2quant.eval.report.wording import percent, perplexity
from k2quant.ground.intervals import Estimate
from k2quant.report.drawing import WIDE, Canvas, colour, figure, legend
from k2quant.report.words import DASH, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LISTED = 12  # experts named in a row
_SUSPECTS = 40
_WIDE_RANGE = 30  # from the smallest value to the largest; then a logarithmic scale


class _Line(NamedTuple):
    name: str
    paint: str
    marker: str
    mark: str
    """The marker as text."""
    points: list[tuple[int, float]]


def drift_pictures(fidelity: Fidelity) -> Iterator[str]:
    """Yield the pictures by layer: divergence, hidden error, router agreement; and which experts nobody visits."""
    layers = fidelity.layers
    if not layers:
        return
    worst = max(layers, key=lambda layer: layer.kl)
    yield _by_layer(
        "KL divergence by layer",
        "What each model's norm and head would predict from a layer's output, in nats a token. Lower is better. "
        f"Largest: {worst.kl:.3g} at layer {worst.layer}.",
        [_Line("KL divergence", "candidate", "o", "\u25cf", [(layer.layer, layer.kl) for layer in layers])],
        "KL (nats a token)",
        _layers_table(layers),
    )
    yield _by_layer(
        "Error of the hidden states by layer",
        "Squared error over the energy of the baseline's hidden states, errors of earlier layers included. "
        "Lower is better.",
        [_Line("error", "candidate", "o", "\u25cf", [(layer.layer, layer.relative_mse) for layer in layers])],
        "relative squared error",
    )
    routed = [layer for layer in layers if layer.overlap is not None and layer.same_experts is not None]
    if routed:
        yield _router(routed)
        yield _experts(routed)


def _router(routed: list[LayerFidelity]) -> str:
    same = [(layer.layer, 100 * (layer.same_experts or 0)) for layer in routed]
    overlap = [(layer.layer, 100 * (layer.overlap or 0)) for layer in routed]
    return _by_layer(
        "Router agreement by layer",
        "How far both models send a token to the same experts. Higher is better.",
        [
            _Line("experts in common, of a token's", "base", "s", "\u25a0", overlap),
            _Line("tokens whose experts are all the same", "candidate", "o", "\u25cf", same),
        ],
        "agreement (%)",
    )


def _by_layer(title: str, note: str, lines: Sequence[_Line], label: str, numbers: str = "") -> str:
    def draw(axes: Axes, canvas: Canvas) -> None:
        for line in lines:
            layers, values = zip(*line.points, strict=True)
            size = canvas.font / 2.6
            axes.plot(layers, values, color=colour(line.paint), marker=line.marker, markersize=size, linewidth=1.6)
        _scale(axes, canvas, [value for line in lines for _, value in line.points], label)

    marks = legend((line.mark, line.paint, line.name) for line in lines) if len(lines) > 1 else ""
    return figure(title, note, draw, (280, 240), legend=marks, table=numbers)


def _scale(axes: Axes, canvas: Canvas, values: list[float], label: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    if min(values) > 0 and max(values) > _WIDE_RANGE * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        if max(values) - min(values) < 1e-12:  # one layer, or all the same: a scale needs a length
            axes.set_ylim(min(values) - 1e-3, max(values) + 1e-3)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    left, right = axes.get_xlim()
    if right - left < 1:  # a single layer
        axes.set_xlim((left + right) / 2 - 0.6, (left + right) / 2 + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=15 if canvas is WIDE else 6, integer=True, min_n_ticks=1))
    axes.grid(axis="y", linewidth=0.8)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel(label)


def _layers_table(layers: Sequence[LayerFidelity]) -> str:
    heads = ["layer", "KL", "hidden error", "cosine", "same experts", "in common", "load shift", "starved"]
    rows = [
        [
            str(layer.layer),
            f"{layer.kl:.3g}",
            f"{layer.relative_mse:.3g}",
            f"{layer.cosine:.5f}",
            *(DASH if share is None else percent(share) for share in (layer.same_experts, layer.overlap)),
            DASH if layer.load_shift is None else percent(layer.load_shift),
            DASH if layer.overlap is None else f"{len(layer.starved):,}",
        ]
        for layer in layers
    ]
    return table(heads, rows, css="compact", label="fidelity by layer")


def _experts(routed: list[LayerFidelity]) -> str:
    """Name the experts that no token visits."""
    rows = [
        [str(layer.layer), _named(layer.starved), _named(layer.never)]
        for layer in routed
        if layer.starved or layer.never
    ]
    if not rows:
        return "<p class=card>Every expert of every layer was visited by both models.</p>"
    heads = ["layer", "starved: only the baseline visits them", "never visited by the baseline"]
    return (
        "<section class=card><h2>Experts that no token visited</h2><p class=note>A starved expert has lost all its "
        "tokens. One that the baseline never visits was not tested by this text at all.</p>"
        f"{table(heads, rows, css='prose', label='experts without visits')}</section>"
    )


def _named(experts: tuple[int, ...]) -> str:
    if not experts:
        return DASH
    listed = ", ".join(f"{expert:,}" for expert in experts[:_LISTED])
    more = f" and {len(experts) - _LISTED:,} more" if len(experts) > _LISTED else ""
    return f"{len(experts):,}: {listed}{more}"


def fidelity_facts(fidelity: Fidelity) -> Iterator[tuple[str, str, str]]:
    """Yield tiles: label, value, note, as HTML."""
    kl, same, ratio = fidelity.kl, fidelity.same_top, fidelity.log_ratio
    spread = f"median {fidelity.kl_median:.3g}, 99% {fidelity.kl_99:.3g}, max {fidelity.kl_max:.3g}"
    yield (
        "KL divergence",
        f"{kl.value:.3g}",
        f"{_error(kl)} nats a token; {spread}",
    )
    yield "Reverse KL", f"{fidelity.reverse_kl.value:.3g}", f"{_error(fidelity.reverse_kl)} nats a token"
    yield "Same likeliest token", percent(same.value), f"{_error(Estimate(value=0, error=100 * same.error))} points"
    yield (
        "Perplexity",
        " &rarr; ".join(map(perplexity, (fidelity.base_perplexity, fidelity.candidate_perplexity))),
        f"ln of the ratio {ratio.value:+.3g} {_error(ratio)}".replace("-", "&minus;"),
    )


def _error(estimate: Estimate) -> str:
    return f"&plusmn; {estimate.error:.2g}"


def _blame_picture(title: str, groups: Sequence[Suspect], note: str) -> str:
    """Draw the share of the damage that each group explains, in its interval."""
    shown = groups[:_SUSPECTS]
    spans = [(100 * group.interval[0], 100 * group.share, 100 * group.interval[1]) for group in shown]
    words = [Row(group.name, f"{percent(group.share)} [{_range(group)}]") for group in shown]

    def draw(axes: Axes, canvas: Canvas) -> None:
        for place, span in enumerate(spans):
            axes.barh(place, span[1], height=0.5, color=colour("candidate"), alpha=0.25)
            draw_interval(axes, canvas, place, span, "candidate", "o")
        low, high = room([0.0, 100.0, *(edge for span in spans for edge in span)], 100)
        lay_rows(axes, canvas, words, (low, high), "share of the damage (%)")

    more = f" {len(groups) - _SUSPECTS:,} more are left out." if len(groups) > _SUSPECTS else ""
    return figure(title, f"{note} Lines are 95% intervals.{more}", draw, heights(len(shown)))


def _range(group: Suspect) -> str:
    return ", ".join(percent(edge) for edge in group.interval)


def blame_facts(blame: Blame) -> Iterator[tuple[str, str, str]]:
    """Yield tiles: label, value, note, as HTML."""
    yield "Damage", f"{blame.damage.value:.3g}", f"{_error(blame.damage)} nats a token, KL divergence"
    yield "Noise", f"{blame.noise.value:.3g}", f"{_error(blame.noise)}: of the baseline, when it rounds otherwise"
    yield "Weights changed", f"{blame.changed:,}", f"found in {blame.passes:,} forward passes"


def blame_pictures(blame: Blame) -> Iterator[str]:
    """Yield what blame found, as HTML."""
    if blame.classes:
        note = "What goes when all tensors of a class are put back to the baseline. Classes may overlap in effect."
        yield _blame_picture("Damage by tensor class", blame.classes, note)
    if blame.suspects:
        yield _blame_picture("Suspects", blame.suspects, f"The finest groups of tensors found. {_together(blame)}")
    if not blame.classes and not blame.suspects:
        yield "<p class=card>No group of tensors could be told to do damage.</p>"


def _together(blame: Blame) -> str:
    if blame.together is None:
        return ""
    share = f"{percent(blame.together.share)} [{_range(blame.together)}]"
    return f"All of them put back together take away {share} of the damage."
