"""Draws docs/recall.png: right answers on BABILong by the length of the text, beside published ones and guessing.

    python docs/recall.py

Ours are in results/babilong.csv. What is published, and its source, is in examples/babilong.py.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from babilong import LENGTHS, PUBLISHED, short

from baka_hf.plots import COLOURS, finish, slide

ROOT = Path(__file__).parents[1]
OURS = {  # the name in the file, and that of README's table
    "SmolLM2-135M, writes cost": "BakaLLM from SmolLM2, 148 M, qa1",
    "from scratch, writes cost": "BakaLLM from scratch, 34 M, qa1",
}
ZERO = 2000  # where no tokens stand: a logarithmic axis has no place for them


def lines() -> tuple[dict[str, dict[int, float]], float]:
    """Percent of right answers by name and length of the text, and by guessing."""
    with open(ROOT / "results" / "babilong.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] in OURS]
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(OURS[row["model"]], {})[int(row["length"])] = 100 * float(row["accuracy"])
    published = {f"{name}, 137 M, mean of qa1-5, published": line for name, line in PUBLISHED.items()}
    (guessing,) = {100 * float(row["guessing"]) for row in rows}
    return found | published, guessing


def draw() -> Any:
    """A figure; the point of no tokens stands apart at the left."""
    figure, (axes,) = slide("right answers (%)")
    found, guessing = lines()
    styles: list[dict[str, Any]] = [  # what is drawn later is smaller, so that equal points are both seen
        dict(color=COLOURS[0], marker="o", markersize=10, linewidth=4),
        dict(color=COLOURS[1], marker="o", markersize=6, linewidth=2),
        dict(color="#8A8A8A", marker="s", markersize=6, linewidth=1.6, linestyle=":", zorder=1.5),
        dict(color="#8A8A8A", marker="^", markersize=6, linewidth=1.6, linestyle="--", zorder=1.5),
    ]
    for (name, line), style in zip(found.items(), styles, strict=True):
        axes.plot([ZERO], [line[0]], **style)
        axes.plot(*zip(*sorted(line.items())[1:], strict=True), **style, label=name)
    axes.axhline(guessing, color=COLOURS[-1], linewidth=1.0)
    axes.text(ZERO, guessing, f"guessing on qa1: {guessing:.1f}", verticalalignment="bottom", fontsize=13)
    axes.set_xscale("log")
    axes.set_xticks([ZERO, *LENGTHS[1:]], ["0", *map(short, LENGTHS[1:])])
    axes.set_xticks([], minor=True)
    axes.set(title="A fact among books: BABILong", xlabel="tokens of text", ylim=(40, 102))
    finish(figure)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "recall.png", help="PNG to write")
    args = parser.parse_args()
    draw().savefig(args.output)
