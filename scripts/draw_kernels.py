"""Draw the pictures of docs/kernels.md: the layout of INT4 weights on a GPU, and the roofline of a product.

    python scripts/draw_kernels.py

The layout is read off `prepare_int4` itself, so the picture cannot tell another story than the code.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from k2quant.kernels.codecs.reference import pack_int4
from k2quant.kernels.ops import prepare_int4

DOCS = Path(__file__).parent.parent / "docs"
COLORS = ("#4477aa", "#66ccee", "#228833", "#ccbb44")
"""One for each run of four columns: a colour-blind-safe palette."""

BANDWIDTH, RATE = 4.8e12, 989e12
"""Bytes and BF16 operations a second of an H200 SXM by the vendor's datasheet: upper bounds, not measurements."""

N, K = 18432, 7168
"""K2's dense gate and up projections."""


def main() -> None:
    """Draw both."""
    mpl.rcParams["svg.hashsalt"] = "k2quant"
    mpl.rcParams["svg.fonttype"] = "none"
    save(draw_layout(), "kernels-layout.svg")
    save(draw_roofline(), "kernels-roofline.svg")


def column_of(word: int, nibble: int) -> int:
    """Return which of a group's 32 columns stands in a nibble of one of its four words."""
    for column in range(32):
        codes = torch.full((1, 32), -8)
        codes[0, column] = 7
        words = prepare_int4(pack_int4(codes), torch.ones(1, 1).bfloat16(), layout="groups").codes
        if (int(words[0, 0, word]) >> (4 * nibble)) & 15:
            return column
    raise AssertionError("every nibble holds a column")


def draw_layout() -> Figure:
    """Draw where groups lie in memory, and where columns lie in two words."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 6), height_ratios=(1, 1.4))
    rows, groups = 6, 3
    for group in range(groups):
        for row in range(rows):
            place = group * rows + row
            top.add_patch(Rectangle((place, 0), 1, 1, facecolor=plt.cm.Blues(0.25 + 0.25 * group), edgecolor="white"))
            top.text(place + 0.5, 0.5, f"row {row}\ngroup {group}", ha="center", va="center", fontsize=7)
    top.annotate("", (rows, 1.25), (0, 1.25), arrowprops={"arrowstyle": "<->"})
    top.text(rows / 2, 1.32, "columns 0-31 of all rows: a tile of any height is one run", ha="center", fontsize=9)
    top.annotate("", (1, -0.25), (0, -0.25), arrowprops={"arrowstyle": "<->"})
    top.text(1.15, -0.33, "16 bytes = 4 words = 32 codes: what one thread loads", fontsize=9, va="center")
    top.set(xlim=(0, rows * groups), ylim=(-0.6, 1.7), title="codes [K/32, N, 4] in memory; scales [K/32, N] likewise")
    top.axis("off")
    for word in range(4):
        for nibble in range(8):
            column = column_of(word, nibble)
            left, down = 9 * (word % 2) + 7 - nibble, -1.5 * (word // 2)
            color = COLORS[column // 4 % 4]
            bottom.add_patch(Rectangle((left, down), 1, 1, facecolor=color, edgecolor="white"))
            bottom.text(left + 0.5, down + 0.5, str(column), ha="center", va="center", color="white", fontsize=11)
            if word > 1:
                bottom.text(left + 0.5, down - 0.3, f"{4 * nibble + 3}-{4 * nibble}", ha="center", fontsize=7)
        bottom.text(9 * (word % 2) + 4, down + 1.12, f"word {word}", ha="center", fontsize=9)
    text = (
        "one lop3 unpacks the lowest nibble of both halves of a word: columns 0 and 1 of word 0; shifts bring the next"
    )
    bottom.text(8.5, -2.3, text, ha="center", fontsize=9)
    bottom.set(xlim=(0, 17), ylim=(-2.5, 1.6), title="columns of a group in its four words (bits below)")
    bottom.axis("off")
    figure.tight_layout()
    return figure


def draw_roofline() -> Figure:
    """Draw the least time that a product can take, by format and number of rows of x."""
    heights = [2**power for power in range(14)]
    figure, axes = plt.subplots(figsize=(7.5, 4.2))
    for label, per_weight, color in (("BF16", 2.0, COLORS[3]), ("FP8", 1.0, COLORS[1]), ("INT4", 0.5625, COLORS[0])):
        seconds = [least_seconds(rows, per_weight) for rows in heights]
        axes.plot(heights, [1e6 * second for second in seconds], label=f"{label} weights", color=color, linewidth=2)
    axes.plot(heights, [1e6 * 2 * rows * N * K / RATE for rows in heights], "k:", linewidth=1, label="arithmetic alone")
    axes.set(xscale="log", yscale="log", xlabel="M, rows of x", ylabel="least time, microseconds")
    axes.set_xticks(heights[::2], [str(rows) for rows in heights[::2]])
    axes.set_title(f"x [M, {K}] times a weight [{N}, {K}]: what memory and arithmetic allow", fontsize=10)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def least_seconds(rows: int, bytes_per_weight: float) -> float:
    """Return the larger of the time for the bytes and the time for the arithmetic."""
    traffic = N * K * bytes_per_weight + 2 * rows * (N + K)
    return max(traffic / BANDWIDTH, 2 * rows * N * K / RATE)


def save(figure: Figure, name: str) -> None:
    """Write an SVG that is the same each time."""
    figure.savefig(DOCS / name, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
