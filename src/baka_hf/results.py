"""Results that last: tables, comparisons and plots of what `results_db` keeps.

    scores = evaluate_documents(model, documents, num_bytes=num_bytes)
    result = Result.of(model, scores, run_id="carry-16", dataset="enwiki2014", split="test", steps=20_000, seed=0)
    write_result("results.db", result)

    python -m baka_hf.results results.db list
    python -m baka_hf.results results.db summary
    python -m baka_hf.results results.db compare no-memory carry-16
    python -m baka_hf.results results.db compare "carry-16, seed 0" "carry-16, seed 1"
    python -m baka_hf.results results.db export --format markdown
    python -m baka_hf.results results.db export --format csv --table depth -o results/depth.csv
    python -m baka_hf.results results.db plot --kind runs --data enwiki2014/test -o runs.png
    python -m baka_hf.results results.db plot --kind depth -o depth.png
    python -m baka_hf.results results.db plot --kind gain --baseline no-memory -o gain.png
    python -m baka_hf.results all.db merge first.db second.db

Files are read and written with the standard library alone, plots take matplotlib.
"""

import argparse
import csv
import io
import json
import math
import os
import sqlite3
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from .plots import COLOURS, draw_gains, draw_runs, finish, slide
from .results_db import (
    JSON_FIELDS,
    SIDES,
    Result,
    curves_of,
    facts_about,
    git_revision,
    merge_results,
    read_results,
    write_result,
)

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
TEXTS = {"", "run", "data", "split", "written", "note"}  # columns aligned to the left
WIDEST_NAME = 16  # of a column; longer ones take several lines


def results_table(results: Sequence[Result]) -> list[list[str]]:
    """The header and a row for each result; columns in which there is nothing are left out."""
    columns = [column for column in COLUMNS if any(column.text(result) for result in results)]
    return [[c.name for c in columns], *([c.text(result) for c in columns] for result in results)]


def summarize(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each run and split: for each data set the last loss, its mean over seeds, and what the past is worth.

    "±" is the standard deviation of the seeds, None for a single one; beside a gain it is the standard error over
    documents. The gain is that of the longest range without end. Parameters, speed and memory are means as well.
    """
    last = _last(results)
    rows = []
    for run_id, split in dict.fromkeys((result.run_id, result.split) for result in last):
        group = [result for result in last if (result.run_id, result.split) == (run_id, split)]
        row: dict[str, Any] = {"run": run_id, "split": split, "seeds": len({result.seed for result in group})}
        for dataset in dict.fromkeys(result.dataset for result in last):
            of_data = [result for result in group if result.dataset == dataset]
            row[dataset], row[f"{dataset} ±"] = _mean_and_spread([result.loss for result in of_data])
            for past in dict.fromkeys(past for result in of_data for past in result.gains):
                found = [_without_end(result.gains[past]) for result in of_data if result.gains.get(past)]
                gains = [entry for entry in found if entry]
                for first in dict.fromkeys(entry["first_chunk"] for entry in gains):
                    name = f"{dataset} from {first} on: {past}"
                    of_range = [entry for entry in gains if entry["first_chunk"] == first]
                    row[name] = statistics.fmean(entry["gain"] for entry in of_range)
                    row[f"{name} ±"] = _mean(entry["standard_error"] for entry in of_range)
        row["parameters"] = group[0].num_parameters
        for name, key, unit in (("tokens/s", "tokens_per_second", 1), ("peak GiB", "peak_memory", 2**30)):
            value = _mean(result.training.get(key) for result in group)
            row[name] = None if value is None else round(value / unit) if unit == 1 else f"{value / unit:.1f}"
        rows.append(row)
    return _filled(rows)


def by_depth(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each last result and range of chunks, which ends before the next power of two: its loss; and its gains.

    `value` is in nats per token: the loss itself, or by how much it is lower than with the other `past` that is named.
    """
    rows = []
    for result in _last(results):
        about = {"run": result.run_id, "seed": result.seed, "data": f"{result.dataset}/{result.split}"}
        for first, (loss, num_tokens) in _by_range(result).items():
            ends = {"first chunk": first, "last chunk": max(2 * first - 1, 0)}
            rows.append(about | {"past": "carried"} | ends | {"value": loss, "tokens": num_tokens})
        for past, entries in result.gains.items():
            for entry in entries:
                ends = {"first chunk": entry["first_chunk"], "last chunk": entry["last_chunk"]}
                values = {"value": entry["gain"], "value ±": entry["standard_error"], "tokens": entry["num_tokens"]}
                rows.append(about | {"past": past} | ends | values)
    return _filled(rows)


def differences(
    results: Sequence[Result], baseline: str | None = None
) -> dict[str, list[tuple[int, float, float | None]]]:
    """By line of a plot, points of depth (the first chunk of a range), gain in nats per token, and its error.

    Without a baseline the gains are those of reading the own past and not another one, means over seeds with the mean
    standard error over documents; there is none at chunk 0. With a baseline it is by how much each run's loss is lower,
    means over seeds with the standard error over seeds, None where one of the two has a single seed. Depths are counted
    in chunks of the larger size if runs have chunks of other sizes.

    Raises:
        ValueError: there is no such run, or nothing to compare.
    """
    groups: dict[str, list[Result]] = {}
    last = _last(results)
    several = len({(result.dataset, result.split) for result in last if result.loss_by_chunk}) > 1
    for result in last:
        name = result.run_id + (f", {result.dataset}/{result.split}" if several else "")
        groups.setdefault(name, []).append(result)
    lines: dict[str, list[tuple[int, float, float | None]]] = {}
    if baseline is None:
        for name, group in groups.items():
            for past in dict.fromkeys(past for result in group for past in result.gains):
                points: dict[int, list[Mapping[str, Any]]] = {}
                for entries in (result.gains.get(past, ()) for result in group):
                    deepest = max((entry["first_chunk"] for entry in entries), default=0)
                    for entry in entries:
                        if entry["last_chunk"] is not None or entry["first_chunk"] == deepest:
                            points.setdefault(entry["first_chunk"], []).append(entry)
                lines[f"{name}, {past}"] = [
                    (first, statistics.fmean(e["gain"] for e in found), _mean(e["standard_error"] for e in found))
                    for first, found in sorted(points.items())
                ]
    else:
        _of_runs(results, [baseline])
        for name, group in groups.items():
            place = (group[0].dataset, group[0].split)
            others = [r for r in last if r.run_id == baseline and (r.dataset, r.split) == place and r.loss_by_chunk]
            group = [result for result in group if result.run_id != baseline and result.loss_by_chunk]
            if not group or not others:
                continue
            unit = max(result.model.get("chunk_size") or 1 for result in (*group, *others))
            own, base = ([_by_range(result, unit) for result in side] for side in (group, others))
            lines[name] = []
            for first in sorted(set(own[0]).intersection(*own, *base)):
                left, right = ([ranges[first][0] for ranges in side] for side in (base, own))
                error = None
                if len(left) > 1 and len(right) > 1:
                    error = math.sqrt(sum(statistics.variance(side) / len(side) for side in (left, right)))
                lines[name].append((first, statistics.fmean(left) - statistics.fmean(right), error))
    if not lines:
        raise ValueError(
            "no gains to draw: a `Result` takes them as `gains`."
            if baseline is None
            else f"no losses by depth to compare with those of {baseline!r}: a `Result` takes them as `loss_by_chunk`."
        )
    return lines


def _by_range(result: Result, unit: int | None = None) -> dict[int, tuple[float, int]]:
    """Loss and number of tokens by the first chunk of each range, which ends before the next power of two."""
    size = result.model.get("chunk_size") or unit or 1
    sums: dict[int, tuple[float, int]] = {}
    for chunk in result.loss_by_chunk:
        depth = chunk["chunk"] * size // (unit or size)
        first = (1 << depth.bit_length()) >> 1
        nats, num_tokens = sums.get(first, (0.0, 0))
        sums[first] = nats + chunk["loss"] * chunk["num_tokens"], num_tokens + chunk["num_tokens"]
    return {first: (nats / num_tokens, num_tokens) for first, (nats, num_tokens) in sorted(sums.items())}


def _without_end(entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The longest of the ranges that have no end."""
    ranges = [entry for entry in entries if entry["last_chunk"] is None]
    return min(ranges, key=lambda entry: entry["first_chunk"], default=None)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _mean_and_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    return _mean(values), statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def _with_spread(value: float | None, spread: float | None) -> str:
    return _decimals(value, 4) + ("" if spread is None else f" ± {_decimals(spread, 4)}")


def _filled(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with all columns but those in which there is nothing."""
    names = dict.fromkeys(name for row in rows for name in row)
    kept = [name for name in names if any(row.get(name) is not None for row in rows)]
    return [{name: row.get(name) for name in kept} for row in rows]


def to_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The header and rows of what `summarize` or `by_depth` found, as text: a figure and its ± in one cell."""

    def text(row: Mapping[str, Any], name: str) -> str:
        value, spread = row[name], row.get(f"{name} ±")
        if isinstance(value, float):
            return _with_spread(value, spread)
        return _count(value) if isinstance(value, int) and value > 9999 else "" if value is None else str(value)

    names = [name for name in (rows[0] if rows else ("run",)) if not name.endswith(" ±")]
    return [names, *([text(row, name) for name in names] for row in rows)]


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
    for part in ("model", "training"):
        facts |= {f"{part}.{name}": str(value) for name, value in getattr(result, part).items()}
    return facts | {f"versions.{name}": version for name, version in result.versions.items()}


def _name(result: Result, results: Iterable[Result]) -> str:
    """What a run is called among these results: its seed belongs to the name if there is another one."""
    seeds = {other.seed for other in results if other.run_id == result.run_id}
    if len(seeds) == 1:
        return result.run_id
    return f"{result.run_id}, {'no seed' if result.seed is None else f'seed {result.seed}'}"


def _of_runs(results: Sequence[Result], runs: Sequence[str] | None) -> list[Result]:
    """The results of runs in the order of `runs`, each named with its seed or, for all of its seeds, without."""
    names = [{result.run_id, _name(result, results)} for result in results]
    for run in runs or ():
        if not any(run in each for each in names):
            known = dict.fromkeys(_name(result, results) for result in results)
            raise ValueError(f"no run {run!r}; there are: {'; '.join(known) or 'none'}.")
    if runs is None:
        return [*results]
    places = [min(map(runs.index, each & {*runs}), default=None) for each in names]
    chosen = sorted((place, index) for index, place in enumerate(places) if place is not None)
    return [results[index] for _, index in chosen]


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
    header, *rows = [[one_line(cell) for cell in row] for row in table]
    broken = [textwrap.wrap(name, WIDEST_NAME) or [""] for name in header]
    height = max(map(len, broken))
    names = [list(line) for line in zip(*([""] * (height - len(name)) + name for name in broken), strict=True)]
    widths = [max(map(len, column)) for column in zip(*names, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if name in TEXTS else cell.rjust(width)
            for cell, width, name in zip(row, widths, header, strict=True)
        ).rstrip()
        for row in (*names, ["-" * width for width in widths], *rows)
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
        for name in JSON_FIELDS:
            row |= {f"{name}.{key}": value for key, value in row.pop(name).items()}
        rows.append(row)
    return rows_to_csv(rows)


def rows_to_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows by the names of their columns. Numbers stay as exact as they are."""
    rows = [{_as_text(name): _as_text(value) for name, value in row.items()} for row in rows]
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

POINTS_BY_DEPTH = 40  # about as many as a line with dots can show
POINTS_OF_TRAINING = 150
MOST_LINES = 14  # of a picture: each colour twice


def plot(results: Sequence[Result], kind: str, path: str | os.PathLike, baseline: str | None = None) -> None:
    """Draw the runs' last losses (`kind="runs"`), the same by depth ("depth"), their training curves ("curves") or
    `differences` ("gain"), 16:9.

    Raises:
        ValueError: there is nothing to draw, or more lines than can be told apart, or "runs" has results of
            several data sets or splits.
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure, (axes,) = slide(f"{'gain' if kind == 'gain' else 'loss'} (nats per token)")
    if kind == "curves":
        _draw_curves(axes, results)
    elif kind == "depth":
        _draw_depth(axes, results)
    elif kind == "runs":
        _draw_runs(axes, results)
    else:
        _draw_differences(axes, results, baseline)
    if (count := len(axes.get_legend_handles_labels()[1])) > MOST_LINES:
        raise ValueError(f"expected at most {MOST_LINES} lines to draw, got {count}: choose runs and a data set.")
    finish(figure)
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


def _draw_runs(axes: Any, results: Sequence[Result]) -> None:
    losses: dict[str, list[float]] = {}
    for result in _last(results):
        losses.setdefault(one_line(result.run_id), []).append(result.loss)
    data = [*dict.fromkeys(f"{result.dataset}/{result.split}" for result in results)]
    if len(data) != 1:
        raise ValueError(f"expected results on one split of one data set to draw, got {'; '.join(data) or 'none'}.")
    found = {run: (values, *_mean_and_spread(values)) for run, values in losses.items()}
    draw_runs(axes, {run: (*known, _with_spread(*known[1:])) for run, known in found.items()})
    axes.set_title(f"Loss on {data[0]}")


def _draw_differences(axes: Any, results: Sequence[Result], baseline: str | None) -> None:
    draw_gains(axes, differences(results, baseline))
    axes.set_title(f"Gain over {baseline}" if baseline else "Gain by the own past over another")


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
    commands.add_parser("summary", help="runs, one a line: means over seeds, their spread, and what the past is worth")
    command = commands.add_parser("merge", help="take in the results of other files; FILE is made if there is none")
    command.add_argument("others", nargs="+", type=Path, metavar="OTHER")
    command = commands.add_parser("compare", help="two runs side by side: scores, and what else differs")
    command.add_argument("runs", nargs=2, metavar="RUN")
    command = commands.add_parser("export", help="all results as a table of Markdown, or in full as CSV")
    command.add_argument("--format", choices=("markdown", "csv"), required=True)
    command.add_argument("--table", choices=("results", "summary", "depth"), default="results", help="what is in it")
    command.add_argument("-o", "--output", type=Path, help="file to write instead of standard output")
    command = commands.add_parser("plot", help="losses, their curves, or losses or gains by depth, as a picture")
    command.add_argument("--kind", choices=("runs", "curves", "depth", "gain"), required=True)
    command.add_argument("--runs", nargs="+", metavar="RUN", help="only these runs, in this order")
    command.add_argument("--data", metavar="DATA/SPLIT", help="only results on this")
    command.add_argument("--baseline", metavar="RUN", help="gain: over this run, and not over another past")
    command.add_argument("-o", "--output", type=Path, required=True, help="PNG (or SVG, PDF) to write")
    args = parser.parse_args(arguments)
    try:
        if args.command == "merge":
            merge_results(args.file, args.others)
            return
        results = read_results(args.file)
        if args.command == "plot":
            chosen = None if args.runs is None else [*args.runs, *([args.baseline] if args.baseline else [])]
            shown = [r for r in _of_runs(results, chosen) if args.data in (None, f"{r.dataset}/{r.split}")]
            plot(shown, args.kind, args.output, args.baseline)
            return
        rows = {"summary": summarize, "depth": by_depth}.get(getattr(args, "table", args.command))
        if not results and args.command in ("list", "summary"):
            text = "no results\n"
        elif args.command == "compare":
            text = to_text(compare(results, *args.runs))
        elif getattr(args, "format", None) == "csv":
            text = rows_to_csv(rows(results)) if rows else to_csv(results)
        else:
            table = to_table(rows(results)) if rows else results_table(results)
            text = to_markdown(table) if args.command == "export" else to_text(table)
        if getattr(args, "output", None) is None:
            sys.stdout.write(text)
        else:
            args.output.write_text(text, encoding="utf-8")
    except (ValueError, OSError, ModuleNotFoundError, sqlite3.Error) as error:
        sys.exit(f"error: {error}")


__all__ = [
    "Result",
    "by_depth",
    "compare",
    "curves_of",
    "differences",
    "facts_about",
    "git_revision",
    "main",
    "merge_results",
    "one_line",
    "plot",
    "read_results",
    "results_table",
    "rows_to_csv",
    "summarize",
    "to_csv",
    "to_markdown",
    "to_table",
    "to_text",
    "write_result",
]

if __name__ == "__main__":
    main()
