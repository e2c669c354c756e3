"""What tables say is what results/ says: figures are looked up in the files that the paragraph before a table names.

A row of a table is a run, so its figures must all be of one: of the run whose name the row has, as its label or there
in backticks, and of any where it has none. What is in italics is in no file.
"""

import csv
import re
from functools import cache
from itertools import compress, groupby, pairwise, permutations
from operator import itemgetter
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
TEXTS = {path.relative_to(ROOT).as_posix(): FENCE.sub("", path.read_text(encoding="utf-8")) for path in PAGES}
FILE = re.compile(r"`(results/\w+\.csv)`")
FIGURE = re.compile(r"(-?\d+(?:,\d{3})*(\.\d+)?)(?: (k|M|MB)\b)?")
UNITS = {"": 1, "k": 1e3, "M": 1e6, "MB": 1e6}

# Columns of the files that say what was asked; all others are answers, and guessing, which tells tests apart, is both.
NUMBERED = {"segment_length", "retold", "segments", "source", "tested", "length", "first chunk", "last chunk"}
WITHIN_A_RUN = {"data", "split", "past", "first chunk", "last chunk", "minus"}
ASKED = {"run", "model", "task", "guessing"} | NUMBERED | WITHIN_A_RUN


# Figures


class Figure(NamedTuple):
    value: float
    unit: float  # of its last place

    def rounds(self, value: float) -> bool:
        return abs(self.value - value) <= self.unit / 2 + 1e-9


def figures(text: str) -> list[Figure]:
    found = ((m[1].replace(",", ""), len(m[2] or ".") - 1, UNITS[m[3] or ""]) for m in FIGURE.finditer(text))
    return [Figure(float(number) * unit, unit / 10**places) for number, places, unit in found]


# Files


class Series(NamedTuple):
    """Lines of a file that differ by their seed alone: what was asked, and each answer by seed."""

    asked: dict[str, str]
    answers: dict[str, list[float]]
    counts: set[str]  # columns of whole numbers: bytes, steps, seeds


@cache
def read(file: str) -> list[Series]:
    """A file's series, with accuracy in percent, losses over all depths, and the differences of any two runs."""
    with open(ROOT / file, newline="", encoding="utf-8") as text:
        lines = list(csv.DictReader(text))
    counts = {name for name in lines[0] if all(re.fullmatch(r"\d*", line[name]) for line in lines)}
    carried = [line for line in lines if line.get("past") == "carried"]
    for place, depths in groupby(carried, itemgetter("run", "seed", "data")):
        pairs = [(float(line["value"]), int(line["tokens"])) for line in depths]
        loss = sum(value * tokens for value, tokens in pairs) / sum(tokens for _, tokens in pairs)
        lines.append(dict(zip(("run", "seed", "data", "loss"), (*place, repr(loss)), strict=True)))

    groups: dict[tuple[tuple[str, str], ...], list[dict[str, str]]] = {}
    for line in lines:
        line |= dict(zip(("data", "split"), line.get("data", "").split("/"), strict=False))
        groups.setdefault(tuple((name, line[name]) for name in sorted(ASKED) if line.get(name)), []).append(line)
    series = []
    for asked, group in groups.items():
        group.sort(key=lambda line: int(line.get("seed", 0)))
        names = [name for name in group[0] if name not in ASKED - {"guessing"} and all(line[name] for line in group)]
        answers = {name: [float(line[name]) * (100 if name == "accuracy" else 1) for line in group] for name in names}
        series.append(Series(dict(asked), answers, counts))
    return series + differences(series)


def differences(series: list[Series]) -> list[Series]:
    """What a run has more than another one, seed by seed, where both were asked the same."""
    peers: dict[tuple[str, ...], list[Series]] = {}
    for one in series:
        peers.setdefault(tuple(value for name, value in one.asked.items() if name != "run"), []).append(one)
    found = []
    for one, other in (pair for group in peers.values() for pair in permutations(group, 2)):
        pairs = {name: (one.answers[name], other.answers[name]) for name in one.answers.keys() & other.answers.keys()}
        answers = {
            name: [a - b for a, b in zip(*pair, strict=True)]
            for name, pair in pairs.items()
            if name not in one.counts and "±" not in name and len({*map(len, pair)}) == 1
        }
        found.append(Series(one.asked | {"minus": other.asked.get("run", "")}, answers, one.counts))
    return found


def says(text: str, one: Series, name: str) -> bool:
    """Whether figures are that answer by seed, or its mean over seeds, with their spread or its error after a "±"."""
    told, answers, errors = figures(text), one.answers[name], one.answers.get(f"{name} ±", [])
    if "±" in text:
        options = [(fmean(answers), stdev(answers))] if len(answers) > 1 else []
        options += [(fmean(answers), fmean(errors))] if errors else []
    elif errors and one.answers.get("seeds") == [len(told)] != [1]:  # the file has the mean and the spread of these
        told = [Figure(fmean(f.value for f in told), told[0].unit), Figure(stdev(f.value for f in told), told[0].unit)]
        options = [(answers[0], errors[0])]
    else:
        options = [(fmean(answers),), tuple(answers)]
    return any(len(told) == len(option) and all(map(Figure.rounds, told, option)) for option in options)


def of_seeds(one: Series, seeds: list[float]) -> Series:
    """The same of some seeds, where the file tells them apart."""
    kept = [seed in seeds for seed in one.answers.get("seed", seeds)]
    answers = {name: list(compress(values, kept)) for name, values in one.answers.items()}
    return one._replace(answers=answers if any(kept) else {})


# Pages


class Table(NamedTuple):
    name: str
    files: list[str]
    header: list[str]
    rows: list[list[str]]


def blocks(text: str) -> list[str]:
    return [block.strip() for block in re.split(r"\n\s*\n|\n(?=- |#)", text)]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("**", "").strip()[1:-1].split("|")]


def tables() -> list[Table]:
    """Those that stand right behind a paragraph that names files."""
    found = []
    for page, text in TEXTS.items():
        for before, block in pairwise(blocks(text)):
            if (files := FILE.findall(before)) and block.startswith("|"):
                header, _, *rows = block.splitlines()
                found.append(Table(f"{page} {header}", files, cells(header), [cells(row) for row in rows]))
    return found


def is_in(run: list[Series], header: str, cell: str) -> bool:
    """Whether a cell's figures are in the column that its header names, or in lines with that setting, or anywhere.

    Counts have a header of their name, and are the same in all lines of a run, or are in brackets.
    """
    names = [(one, name) for one in run for name in one.answers if "±" not in name]
    fitting = [(one, name) for one, name in names if name == header or name.endswith(f": {header}")]
    names = [(one, name) for one, name in names if name != "guessing"]
    answers = [(one, name) for one, name in names if name not in one.counts]
    fitting = fitting + [(one, name) for one, name in answers if header in one.asked.values()] or answers
    for part in filter(figures, re.findall(r"[^()]+", cell)):
        places = fitting + names if f"({part})" in cell else fitting
        places = [(one, name) for one, name in places if "±" in part or "minus" not in one.asked]
        enough = all if all(name in one.counts for one, name in places) else any
        if not places or not enough(says(part, one, name) for one, name in places):
            return False
    return True


@pytest.mark.parametrize("table", tables(), ids=lambda table: table.name)
def test_figures_of_a_table_are_those_of_its_files(table: Table) -> None:
    """Each row has a run, and seeds if it names some, that have all of its figures.

    If numbers in the headers are all settings of one kind, such as a length, a cell's figures are those of its own.
    """
    series = [one for file in table.files for one in read(file)]
    numbers = [figures(name)[0].value if figures(name) else None for name in table.header]
    values = {name: {float(one.asked[name]) for one in series if name in one.asked} for name in NUMBERED}
    named = {*numbers[1:]} - {None}
    varied = {name for name in NUMBERED if named and named <= values[name]}
    within = WITHIN_A_RUN | varied | ({"guessing"} if "source" in varied else set())  # it depends on the source
    runs: dict[tuple[str, ...], list[Series]] = {}
    for one in series:
        if "last chunk" not in one.asked or "first chunk" in varied:
            key = tuple(value for name, value in one.asked.items() if name not in within)
            runs.setdefault(key, []).append(one)

    def fits(run: list[Series], label: str, row: list[str]) -> bool:
        for header, number, cell in zip(table.header[1:], numbers[1:], row, strict=True):
            settings = set() if number is None else varied
            lines = [one for one in run if all(float(one.asked.get(name, number)) == number for name in settings)]
            column = label if any(label in one.answers for one in run) else header
            if header != "seed" and not is_in(lines, column, cell):
                return False
        return True

    rows = [row for row in table.rows if not row[0].startswith("*")]
    assert rows, "all of it is in italics"
    for label, *row in rows:
        row = [re.sub(r"\*[^*]*\*", "", cell) for cell in row]
        names = {label, *re.findall(r"`([^`]+)`", label)}
        own = [run for key, run in runs.items() if names & {*key}] or list(runs.values())
        about = "".join(cell for header, cell in zip(table.header[1:], row, strict=True) if header == "seed")
        seeds = [figure.value for figure in figures(about or (re.findall(r"seeds? (.*)", label) or [""])[0])]
        own = [[of_seeds(one, seeds) for one in run] for run in own] if seeds else own
        assert any(fits(run, label, row) for run in own), f"{label}: {row}"


@pytest.mark.parametrize("page", TEXTS)
def test_figures_in_the_text_are_those_of_the_files_it_names(page: str) -> None:
    """Those with three decimals or more, in paragraphs that name files: a run's, or the difference of two."""
    for block in blocks(TEXTS[page]):
        series = [one for file in FILE.findall(block) for one in read(file)]
        each = series + [of_seeds(one, [seed]) for one in series for seed in one.answers.get("seed", [])]
        if not series or block.startswith("|"):
            continue
        for figure in re.findall(r"-?\d\.\d{3,}(?: ± [\d.]*\d)?", re.sub(r"`[^`]*`|\]\([^)]*\)|\*[^*]*\*", "", block)):
            assert any(says(figure, one, name) for one in each for name in one.answers), figure


# results/


def test_every_file_of_results_is_named() -> None:
    """And every name of one is that of a file."""
    named = {file for text in TEXTS.values() for file in FILE.findall(text)}
    assert named == {path.relative_to(ROOT).as_posix() for path in ROOT.glob("results/*.csv")}


@pytest.mark.parametrize("name", [path.stem for path in sorted(ROOT.glob("results/*_by_depth.csv"))])
def test_means_and_spreads_are_those_of_the_seeds(name: str) -> None:
    """A summary's losses and gains, from the seeds' by depth in the file beside it."""
    expected = {}
    for asked, answers, _ in (one for one in read(f"results/{name}.csv") if "minus" not in one.asked):
        if "loss" in answers:
            column, values = asked["data"], answers["loss"]
            spread = stdev(values) if len(values) > 1 else None
        elif "last chunk" not in asked:
            column, values = f"{asked['data']} from {asked['first chunk']} on: {asked['past']}", answers["value"]
            spread = fmean(answers["value ±"])
        else:
            continue
        place = (asked["run"], asked["split"])
        expected |= {(*place, column): fmean(values), (*place, f"{column} ±"): spread, (*place, "seeds"): len(values)}
    assert expected
    for one in read(f"results/{name.removesuffix('_by_depth')}.csv"):
        if "minus" not in one.asked:
            for column, (value,) in one.answers.items():
                if column not in ("parameters", "tokens/s", "peak GiB"):
                    assert expected[one.asked["run"], one.asked["split"], column] == pytest.approx(value), column
