"""Results that last: tables, comparisons and plots of what `results_db` keeps.

    scores = evaluate_documents(model, documents, num_bytes=num_bytes)
    result = Result.of(model, scores, run_id="carry-16", dataset="enwiki2014", split="test", steps=20_000, seed=0)
    write_result("results.db", result)

    python -m baka_hf.results results.db list
    python -m baka_hf.results results.db compare no-memory carry-16
    python -m baka_hf.results results.db compare "carry-16, seed 0" "carry-16, seed 1"
    python -m baka_hf.results results.db export --format markdown
    python -m baka_hf.results results.db plot --kind depth -o depth.png

Files are read and written with the standard library alone, plots take matplotlib.
"""

import argparse
import csv
import io
import json
import math
import os
import sqlite3
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from .results_db import SIDES, Result, curves_of, facts_about, git_revision, read_results, write_result

# Tables


class Column(NamedTuple):
    """A column of the tables for people."""

    name: str
    text: Callable[[Result], str]


def _count(value: int | None) -> str:
    """Three digits and a unit: 1.23M."""
    if value is None:
        return ""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size * 0.9995:
            digits = value / size
            return f"{digits:.{2 if digits < 9.995 else 1 if digits < 99.95 else 0}f}{unit}"
    return str(value)


def _decimals(value: float | None, places: int) -> str:
    return "" if value is None else f"{value:.{places}f}" if value < 1e6 else f"{value:.1e}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


COLUMNS = (
    Column("run", lambda r: r.run_id),
    Column("seed", lambda r: "" if r.seed is None else str(r.seed)),
    Column("data", lambda r: f"{r.dataset}/{r.split}"),
    Column("steps", lambda r: str(r.steps)),
    Column("loss", lambda r: _decimals(r.loss, 4)),
    Column("perplexity", lambda r: _decimals(r.perplexity, 2)),
    Column("bits/byte", lambda r: _decimals(r.bits_per_byte, 4)),
    Column("parameters", lambda r: _count(r.num_parameters)),
    Column("w/o emb.", lambda r: _count(r.num_parameters_without_embeddings)),
    Column("trained on", lambda r: _count(r.tokens_seen)),
    Column("time", lambda r: _duration(r.wall_time)),
    Column("written", lambda r: (r.written or "")[:10]),
    Column("note", lambda r: r.note),
)
TEXTS = {"", "run", "data", "written", "note"}  # columns aligned to the left


def results_table(results: Sequence[Result]) -> list[list[str]]:
    """The header and a row for each result; columns in which there is nothing are left out."""
    columns = [column for column in COLUMNS if any(column.text(result) for result in results)]
    return [[c.name for c in columns], *([c.text(result) for c in columns] for result in results)]


def compare(results: Sequence[Result], a: str, b: str) -> list[list[str]]:
    """The header and rows of two runs side by side: the last score on each split, and all in which they differ.

    Raises:
        ValueError: there is no such run, or there are several seeds of it and none is named.
    """
    for run in (a, b):
        seeds = sorted({_name(result, results) for result in _of_runs(results, [run])})
        if len(seeds) > 1:
            raise ValueError(f"run {run!r} has several seeds, name one of: {'; '.join(seeds)}.")
    first, second = ({(r.dataset, r.split): r for r in _last(_of_runs(results, [run]))} for run in (a, b))
    table = [["", a, b, "difference"]]
    for place in dict.fromkeys([*first, *second]):
        pair = first.get(place), second.get(place)
        for name, places in (("loss", 4), ("perplexity", 2), ("bits_per_byte", 4)):
            left, right = (None if result is None else getattr(result, name) for result in pair)
            if left is None and right is None:
                continue
            difference = "" if left is None or right is None else f"{right - left:+.{places}f}"
            label = f"{'/'.join(place)} {name.replace('_', ' ')}"
            table.append([label, _decimals(left, places), _decimals(right, places), difference])
    facts = [_facts(max(scores.values(), key=lambda result: result.steps)) for scores in (first, second)]
    for name in dict.fromkeys([*facts[0], *facts[1]]):
        left, right = (each.get(name, "") for each in facts)
        if left != right:
            table.append([name, left, right, ""])
    return table


def _facts(result: Result) -> dict[str, str]:
    """How a result came about, as text."""
    names = ("num_parameters", "num_parameters_without_embeddings", "seed", "steps", "tokens_seen")
    facts = {name: "" if getattr(result, name) is None else f"{getattr(result, name):,}" for name in names}
    facts["wall_time"] = _duration(result.wall_time)
    facts |= {name: getattr(result, name) or "" for name in ("device", "git_revision", "note")}
    facts |= {f"model.{name}": str(value) for name, value in result.model.items()}
    return facts | {f"versions.{name}": version for name, version in result.versions.items()}


def _name(result: Result, results: Iterable[Result]) -> str:
    """What a run is called among these results: its seed belongs to the name if there is another one."""
    seeds = {other.seed for other in results if other.run_id == result.run_id}
    if len(seeds) == 1:
        return result.run_id
    return f"{result.run_id}, {'no seed' if result.seed is None else f'seed {result.seed}'}"


def _of_runs(results: Sequence[Result], runs: Sequence[str] | None) -> list[Result]:
    """The results of runs, each named with its seed or, for all of its seeds, without."""
    names = [{result.run_id, _name(result, results)} for result in results]
    for run in runs or ():
        if not any(run in each for each in names):
            known = dict.fromkeys(_name(result, results) for result in results)
            raise ValueError(f"no run {run!r}; there are: {'; '.join(known) or 'none'}.")
    return [result for result, each in zip(results, names, strict=True) if runs is None or each & {*runs}]


def _last(results: Iterable[Result]) -> list[Result]:
    """Of each run and seed the result with the most steps on each split of each data set."""
    last: dict[tuple[str, int | None, str, str], Result] = {}
    for result in results:
        place = (result.run_id, result.seed, result.dataset, result.split)
        if place not in last or result.steps >= last[place].steps:
            last[place] = result
    return list(last.values())


def one_line(text: str) -> str:
    """A text as a cell of a table or a heading can hold it."""
    return " ".join(text.split())


def to_text(table: Sequence[Sequence[str]]) -> str:
    """A table for a terminal."""
    table = [[one_line(cell) for cell in row] for row in table]
    header = table[0]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rule = ["-" * width for width in widths]
    lines = [
        "  ".join(
            cell.ljust(width) if name in TEXTS else cell.rjust(width)
            for cell, width, name in zip(row, widths, header, strict=True)
        ).rstrip()
        for row in (header, rule, *table[1:])
    ]
    return "\n".join(lines) + "\n"


def to_markdown(table: Sequence[Sequence[str]]) -> str:
    header = table[0]
    rule = [":--" if name in TEXTS else "--:" for name in header]
    rows = [[one_line(cell).replace("\\", "\\\\").replace("|", "\\|") for cell in row] for row in table]
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], rule, *rows[1:]))


def to_csv(results: Iterable[Result]) -> str:
    """Everything but curves and losses by depth, in full; fields of the model in columns of their own.

    A text that a spreadsheet would take for a formula has an apostrophe before it, by which it takes it for a text.
    """
    rows = []
    for result in results:
        row = {f.name: getattr(result, f.name) for f in fields(result) if f.name not in SIDES}
        row["perplexity"] = result.perplexity
        for name in ("model", "versions"):
            row |= {f"{name}.{key}": value for key, value in row.pop(name).items()}
        rows.append({_as_text(name): _as_text(value) for name, value in row.items()})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _as_text(value: Any) -> Any:
    """Numbers stay numbers."""
    if isinstance(value, dict | list):
        return json.dumps(value)
    return f"'{value}" if isinstance(value, str) and value.lstrip()[:1] in tuple("=+-@") else value


# Plots

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B5B5B")
POINTS_BY_DEPTH = 40  # about as many as a line with dots can show
POINTS_OF_TRAINING = 150


def plot(results: Sequence[Result], kind: str, path: str | os.PathLike) -> None:
    """Draw the runs' training curves (`kind="curves"`) or their last losses by depth ("depth"), 16:9.

    Raises:
        ValueError: there is nothing to draw.
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install matplotlib") from error

    figure = Figure(figsize=(10, 5.625), dpi=192, layout="constrained")
    axes = figure.add_subplot()
    if kind == "curves":
        _draw_curves(axes, results)
    else:
        _draw_depth(axes, results)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_ylabel("loss (nats per token)", fontsize=15)
    axes.title.set_fontsize(18)
    axes.xaxis.label.set_fontsize(15)
    axes.tick_params(labelsize=13, length=0)
    axes.grid(axis="y", color="#DDDDDD")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    lines = axes.get_lines()
    widest = max(len(str(line.get_label())) for line in lines)
    figure.legend(
        handles=lines,
        loc="outside lower center",
        ncols=min(len(lines), max(1, 100 // (widest + 9))),  # 100 characters are as wide as the figure
        frameon=False,
        fontsize=13,
    )
    figure.savefig(path)


def _draw_curves(axes: Any, results: Sequence[Result]) -> None:
    """A colour for each run; its training thin and pale, every other split with a dot at each point."""
    runs = {_name(result, results): result.curves for result in results if result.curves}
    if not runs:
        raise ValueError("no loss curves to draw: a `Result` takes them as `curves`.")
    shown = []
    for index, (run, curves) in enumerate(runs.items()):
        for split, points in curves.items():
            is_training = split == "train"
            drawn = _thinned(points, POINTS_OF_TRAINING if is_training else len(points))
            steps, losses = zip(*drawn, strict=True)
            axes.plot(
                steps,
                losses,
                color=COLOURS[index % len(COLOURS)],
                label=f"{run}, {split}: {losses[-1]:.3f}",
                linewidth=1.4 if is_training else 2.4,
                alpha=0.5 if is_training and len(curves) > 1 else 1.0,
                marker="" if is_training else "o",
                markersize=5,
            )
            # The fall of the first steps would press everything after it flat.
            shown += [loss for step, loss in drawn if 10 * step >= steps[-1] and math.isfinite(loss)]
    if shown:
        margin = 0.06 * (max(shown) - min(shown)) or 0.1
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set(title="Loss in training", xlabel="optimizer steps")


def _thinned(points: Sequence[tuple[int, float]], most: int) -> list[tuple[float, float]]:
    """At most so many points, each the mean of its neighbours: what is left of a noisy curve is its course."""
    size = math.ceil(len(points) / most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(step for step, _ in g) / len(g), sum(loss for _, loss in g) / len(g)) for g in groups]


def _draw_depth(axes: Any, results: Sequence[Result]) -> None:
    results = [result for result in _last(results) if result.loss_by_chunk]
    if not results:
        raise ValueError("no losses by depth to draw: a `Result` takes them as `loss_by_chunk`.")
    places = {(result.dataset, result.split) for result in results}
    sizes = {result.model.get("chunk_size") for result in results}
    for index, result in enumerate(results):
        scale = result.model.get("chunk_size") or 1 if len(sizes) > 1 else 1
        depths, losses = zip(*_merged(result.loss_by_chunk), strict=True)
        name = _name(result, results) + ("" if len(places) == 1 else f", {result.dataset}/{result.split}")
        axes.plot(
            [depth * scale for depth in depths],
            losses,
            color=COLOURS[index % len(COLOURS)],
            label=f"{name}: {result.loss:.3f}",
            linewidth=2.4,
            marker="o",
            markersize=5,
        )
    title = "Loss by depth in the document"
    axes.set_title(f"{title}, {'/'.join(*places)}" if len(places) == 1 else title)
    if len(sizes) > 1:
        axes.set_xlabel("tokens in the chunks read before")
    else:
        (size,) = sizes
        axes.set_xlabel("chunks read before" + (f" (of {size} tokens)" if size else ""))


def _merged(chunks: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Depth and loss, chunks put together until each point stands for a fair share of the tokens.

    Few documents are long: chunk by chunk, the deep end of the line would be noise.
    """
    least = sum(chunk["num_tokens"] for chunk in chunks) / POINTS_BY_DEPTH
    groups: list[list[Mapping[str, Any]]] = [[]]
    for chunk in chunks:
        if sum(c["num_tokens"] for c in groups[-1]) >= least:
            groups.append([])
        groups[-1].append(chunk)
    if len(groups) > 1 and sum(c["num_tokens"] for c in groups[-1]) < least:
        rest = groups.pop()
        groups[-1] += rest

    def mean(group: list[Mapping[str, Any]], name: str) -> float:
        return sum(c[name] * c["num_tokens"] for c in group) / sum(c["num_tokens"] for c in group)

    return [(mean(group, "chunk"), mean(group, "loss")) for group in groups]


# python -m baka_hf.results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m baka_hf.results", description="Look at a file of results, export it, and plot from it."
    )
    parser.add_argument("file", type=Path, help="the SQLite file that `write_result` wrote")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="all results, one a line")
    command = commands.add_parser("compare", help="two runs side by side: scores, and what else differs")
    command.add_argument("runs", nargs=2, metavar="RUN")
    command = commands.add_parser("export", help="all results as a table of Markdown, or in full as CSV")
    command.add_argument("--format", choices=("markdown", "csv"), required=True)
    command.add_argument("-o", "--output", type=Path, help="file to write instead of standard output")
    command = commands.add_parser("plot", help="loss curves, or losses by depth in the document, as a picture")
    command.add_argument("--kind", choices=("curves", "depth"), required=True)
    command.add_argument("--runs", nargs="+", metavar="RUN", help="only these runs")
    command.add_argument("-o", "--output", type=Path, required=True, help="PNG (or SVG, PDF) to write")
    args = parser.parse_args(arguments)
    try:
        results = read_results(args.file)
        if args.command == "plot":
            plot(_of_runs(results, args.runs), args.kind, args.output)
            return
        if args.command == "list":
            text = to_text(results_table(results)) if results else "no results\n"
        elif args.command == "compare":
            text = to_text(compare(results, *args.runs))
        else:
            text = to_markdown(results_table(results)) if args.format == "markdown" else to_csv(results)
        if getattr(args, "output", None) is None:
            sys.stdout.write(text)
        else:
            args.output.write_text(text, encoding="utf-8")
    except (ValueError, OSError, ModuleNotFoundError, sqlite3.Error) as error:
        sys.exit(f"error: {error}")


__all__ = [
    "Result",
    "compare",
    "curves_of",
    "facts_about",
    "git_revision",
    "main",
    "one_line",
    "plot",
    "read_results",
    "results_table",
    "to_csv",
    "to_markdown",
    "to_text",
    "write_result",
]

if __name__ == "__main__":
    main()
