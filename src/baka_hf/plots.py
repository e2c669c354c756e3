"""Plots as one puts them on a slide: 16:9, large letters, nothing that is no data. They take matplotlib."""

from collections.abc import Mapping, Sequence
from typing import Any

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B5B5B")


def slide(*labels: str) -> tuple[Any, Sequence[Any]]:
    """A figure, and side by side in it axes with these labels of what is drawn upwards.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install matplotlib") from error

    figure = Figure(figsize=(10, 5.625), dpi=192, layout="constrained")
    all_axes = figure.subplots(1, len(labels), squeeze=False)[0]
    for axes, label in zip(all_axes, labels, strict=True):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8 // len(labels), integer=True))
        axes.set_ylabel(label, fontsize=15)
    return figure, all_axes


def finish(figure: Any) -> None:
    """Sizes of letters, a grid, and a legend of the first axes, once all is drawn."""
    for axes in figure.axes:
        axes.title.set_fontsize(18)
        axes.xaxis.label.set_fontsize(15)
        axes.tick_params(labelsize=13, length=0)
        axes.grid(axis="y", color="#DDDDDD")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    widest = max(map(len, labels))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(labels), max(1, 100 // (widest + 9))),  # 100 characters are as wide as the figure
        frameon=False,
        fontsize=13,
    )


def draw_gains(axes: Any, lines: Mapping[str, Sequence[tuple[int, float, float | None]]]) -> None:
    """Gains by depth, with their standard errors: evenly spaced ranges of chunks, and lines a little beside each other,
    so that their bars can be told apart.

    Args:
        axes: to draw in.
        lines: by name, the first chunk of each range, the gain in nats per token, and its error, if known.
    """
    depths = sorted({first for points in lines.values() for first, _, _ in points})
    for index, (name, points) in enumerate(lines.items()):
        shift = 0.3 * (index - (len(lines) - 1) / 2) / max(len(lines) - 1, 1)
        places, gains, errors = zip(*points, strict=True)
        axes.errorbar(
            [depths.index(first) + shift for first in places],
            gains,
            [error or 0.0 for error in errors],
            color=COLOURS[index % len(COLOURS)],
            label=name,
            linewidth=2.4,
            elinewidth=1.4,
            marker="o",
            markersize=5,
        )
    axes.axhline(0, color="#5B5B5B", linewidth=1.0)
    ends = [following - 1 for following in depths[1:]]
    names = [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(depths, ends, strict=False)]
    axes.set_xticks(range(len(depths)), [*names, f"{depths[-1]} and on"])
    axes.set_xlabel("chunks read before")


def draw_runs(axes: Any, runs: Mapping[str, tuple[Sequence[float], float | None, float | None, str]]) -> None:
    """Losses of runs, one below the other: a small dot for each seed, a larger one for the mean, a bar for the spread.

    Args:
        axes: to draw in.
        runs: by name, the losses of the seeds, their mean, their spread, if known, and what stands at the right.
    """
    places = range(len(runs))
    margin = max(0.5, len(runs) / 50)  # of many runs a mark is higher than its line
    by_seed, means, spreads, texts = zip(*runs.values(), strict=True)
    bars = axes.errorbar(
        means,
        places,
        xerr=[spread or 0.0 for spread in spreads],
        color=COLOURS[0],
        label="mean and standard deviation over seeds",
        linestyle="",
        elinewidth=2.4,
        marker="o",
        markersize=8,
    )
    axes.plot(
        [loss for losses in by_seed for loss in losses],
        [place for place, losses in zip(places, by_seed, strict=True) for _ in losses],
        color=COLOURS[1],
        label="one seed",
        linestyle="",
        marker="o",
        markersize=4,
        zorder=bars.lines[0].get_zorder() + 1,
    )
    for x, align, names in ((-0.01, "right", runs), (1.01, "left", texts)):
        for place, name in zip(places, names, strict=True):
            axes.text(
                x,
                place,
                name,
                horizontalalignment=align,
                verticalalignment="center_baseline",
                fontsize=min(13, 280 / (len(runs) - 1 + 2 * margin)),  # as many points high as the axes are
                transform=axes.get_yaxis_transform(),
            )
    axes.set_yticks(places, [""] * len(runs))
    axes.set_ylim(len(runs) - 1 + margin, -margin)
    axes.locator_params(axis="x", integer=False)
    axes.grid(axis="x", color="#EEEEEE")
    axes.set(xlabel="loss (nats per token)", ylabel="")


__all__ = ["COLOURS", "draw_gains", "draw_runs", "finish", "slide"]
