"""Results in a file: what was measured, of which model, made by which code, as rows of a SQLite database.

A result is one row, known by its run, seed, data set, split and optimizer steps. Written again, by a job that was
resumed or ran twice, it takes the place of what was there. Losses and gains by depth belong to the result, curves to
the run with this seed.

Any number of processes may write. A write is one transaction under SQLite's plain rollback journal: between writes the
file is all there is and can be copied, and it needs no memory shared by its writers, as write-ahead logging does. What
a writer left that was killed, the next process that opens the file undoes, also if it comes to read.
"""

import json
import math
import os
import platform
import sqlite3
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import __version__

SCHEMA_VERSION = 3
APPLICATION_ID = 0x62616B61  # "baka": tells a file of results from other SQLite files
SECONDS_TO_WAIT = 60.0  # for other writers
SIDES = ("loss_by_chunk", "gains", "curves")  # fields of a result that have tables of their own
JSON_FIELDS = ("model", "versions", "training")
GAIN_FIELDS = ("first_chunk", "last_chunk", "gain", "standard_error", "num_documents", "num_tokens")
GAINS = """
    CREATE TABLE gains (
        result_id INTEGER NOT NULL REFERENCES results (id),
        past TEXT NOT NULL,
        first_chunk INTEGER NOT NULL,
        last_chunk INTEGER,         -- NULL for a range without end
        gain REAL,                  -- nats per token
        standard_error REAL,        -- over documents, NULL for a single one
        num_documents INTEGER NOT NULL,
        num_tokens INTEGER NOT NULL
    )
    """
SCHEMA = (
    """
    CREATE TABLE results (
        id INTEGER PRIMARY KEY,
        run_id TEXT NOT NULL,
        dataset TEXT NOT NULL,
        split TEXT NOT NULL,
        steps INTEGER NOT NULL,
        loss REAL,                  -- nats per token, NULL for NaN
        perplexity REAL,
        bits_per_byte REAL,
        num_tokens INTEGER NOT NULL,
        model TEXT NOT NULL,        -- JSON
        num_parameters INTEGER,
        num_parameters_without_embeddings INTEGER,
        seed INTEGER,
        tokens_seen INTEGER,
        wall_time REAL,             -- seconds
        device TEXT,
        versions TEXT NOT NULL,     -- JSON
        git_revision TEXT,
        note TEXT NOT NULL,
        written TEXT NOT NULL,      -- UTC
        training TEXT NOT NULL DEFAULT '{}' -- JSON
    )
    """,
    # In an index NULLs are all different. No seed is negative.
    "CREATE UNIQUE INDEX one_result ON results (run_id, coalesce(seed, -1), dataset, split, steps)",
    """
    CREATE TABLE losses_by_chunk (
        result_id INTEGER NOT NULL REFERENCES results (id),
        chunk INTEGER NOT NULL,
        loss REAL,
        num_tokens INTEGER NOT NULL,
        PRIMARY KEY (result_id, chunk)
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE curves (
        run_id TEXT NOT NULL,
        seed INTEGER,
        split TEXT NOT NULL,
        step INTEGER NOT NULL,
        loss REAL
    )
    """,
    "CREATE UNIQUE INDEX one_point ON curves (run_id, coalesce(seed, -1), split, step)",
    GAINS,
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
# Version 1 had one result and one set of curves for all seeds of a run.
FROM_VERSION_1 = (
    "CREATE TEMP TABLE old_results AS SELECT * FROM results",
    "CREATE TEMP TABLE old_losses AS SELECT * FROM losses_by_chunk",
    "CREATE TEMP TABLE old_curves AS SELECT * FROM curves",
    "DROP TABLE results",
    "DROP TABLE losses_by_chunk",
    "DROP TABLE curves",
    *SCHEMA,
    "INSERT INTO results SELECT *, '{}' FROM old_results",
    "INSERT INTO losses_by_chunk SELECT * FROM old_losses",
    """
    INSERT INTO curves SELECT run_id, seed, split, step, loss
    FROM old_curves LEFT JOIN (SELECT DISTINCT run_id, seed FROM old_results) USING (run_id)
    """,
)
# Version 2 knew nothing of how a model was trained, nor of what its past is worth.
FROM_VERSION_2 = (
    "ALTER TABLE results ADD COLUMN training TEXT NOT NULL DEFAULT '{}'",
    GAINS,
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
TO_TODAY = (SCHEMA, FROM_VERSION_1, FROM_VERSION_2)  # from an empty file and from each version


@dataclass(frozen=True, kw_only=True)
class Result:
    """The loss of a model on a split of a data set after so many optimizer steps, and how it came about.

    A loss may be NaN or ∞: that a run diverged is a result as well.

    Raises:
        ValueError: a field is not what it should be; the message names it and its value.
    """

    run_id: str
    dataset: str
    split: str
    steps: int = 0  # of the optimizer
    loss: float  # nats per token
    bits_per_byte: float | None = None
    num_tokens: int  # scored
    model: Mapping[str, Any] = field(default_factory=dict)  # the fields of its configuration
    num_parameters: int | None = None
    num_parameters_without_embeddings: int | None = None  # without the token embeddings and the head
    seed: int | None = None
    tokens_seen: int | None = None  # in training
    wall_time: float | None = None  # of training, in seconds
    device: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    git_revision: str | None = None
    note: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)  # its options, and figures such as the time of a step
    # Dicts of chunk, loss and num_tokens, as `evaluate_documents` returns them.
    loss_by_chunk: Sequence[Mapping[str, Any]] = ()
    # What the past is worth: for each other one that was read in its place, what `gain_by_depth` returned.
    gains: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    # Of the run's training: for each split pairs of step and loss, as `curves_of` returns them.
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    written: str | None = field(default=None, compare=False)  # when, in UTC; known once it is read from a file

    def __post_init__(self) -> None:
        for name in ("run_id", "dataset", "split"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"`{name}` must be a name, got {value!r}.")
            _check_text(name, value)
        _check_text("note", self.note)
        for name in ("device", "git_revision", "written"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        for name in JSON_FIELDS:
            _check_json(name, getattr(self, name))
        for name, version in self.versions.items():
            _check_text(f"versions: {name}", version)
        _check("loss", self.loss, float)
        for name in ("num_tokens", "steps"):
            _check(name, getattr(self, name), int)
        for name, kind in (
            ("num_parameters", int),
            ("num_parameters_without_embeddings", int),
            ("seed", int),
            ("tokens_seen", int),
            ("bits_per_byte", float),
            ("wall_time", float),
        ):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), kind)
        for entry in self.loss_by_chunk:
            if set(entry) != {"chunk", "loss", "num_tokens"}:
                raise ValueError(f"`loss_by_chunk` must hold dicts of chunk, loss and num_tokens, got {entry!r}.")
            for name, kind in (("chunk", int), ("loss", float), ("num_tokens", int)):
                _check(f"loss_by_chunk: {name}", entry[name], kind)
            if not entry["num_tokens"]:
                raise ValueError(f"`loss_by_chunk` must hold chunks with tokens, got {entry!r}.")
        chunks = [entry["chunk"] for entry in self.loss_by_chunk]
        if len(set(chunks)) < len(chunks):
            raise ValueError(f"`loss_by_chunk` must hold each chunk once, got {chunks!r}.")
        for past, ranges in self.gains.items():
            _check_text("gains: past", past)
            for entry in ranges:
                if set(entry) != set(GAIN_FIELDS):
                    raise ValueError(f"`gains` must hold dicts of {', '.join(GAIN_FIELDS)}, got {entry!r}.")
                for name in ("first_chunk", "num_documents", "num_tokens"):
                    _check(f"gains: {name}", entry[name], int)
                for name, kind in (("last_chunk", int), ("standard_error", float)):
                    if entry[name] is not None:
                        _check(f"gains: {name}", entry[name], kind)
                if isinstance(entry["gain"], bool) or not isinstance(entry["gain"], int | float):
                    raise ValueError(f"`gains: gain` must be a number, got {entry['gain']!r}.")
        for split, points in self.curves.items():
            _check_text("curves: split", split)
            for point in points:
                if len(point) != 2:
                    raise ValueError(f"`curves` must hold pairs of step and loss, got {point!r} for {split!r}.")
                _check(f"curves, {split}: step", point[0], int)
                _check(f"curves, {split}: loss", point[1], float)

    @property
    def key(self) -> tuple[str, int | None, str, str, int]:
        """What a file holds one of."""
        return self.run_id, self.seed, self.dataset, self.split, self.steps

    @property
    def perplexity(self) -> float:
        return math.inf if self.loss > 709 else math.exp(self.loss)  # beyond it is no float

    @classmethod
    def of(cls, model: Any, scores: Mapping[str, Any], **values: Any) -> "Result":
        """What `evaluate_documents` returned, with what can be found out of the model, the code and the machine.

        Args:
            model: the model, or its configuration alone.
            scores: the dict of `evaluate_documents`.
            values: the other fields, `run_id`, `dataset` and `split` at least; they win over what is found out.
        """
        measured = ("loss", "bits_per_byte", "num_tokens", "loss_by_chunk")
        return cls(**({name: scores[name] for name in measured if name in scores} | facts_about(model) | values))


def _check(name: str, value: object, kind: type) -> None:
    """A number that SQLite can hold: NumPy's integers, for one, would be written as bytes."""
    allowed = int if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or value < 0 or (kind is int and value >= 2**63):
        what = "an integer" if kind is int else "a number"
        raise ValueError(f"`{name}` must be {what} of at least 0, got {value!r}.")


def _check_text(name: str, value: object) -> None:
    """A text that SQLite can hold: half a surrogate pair is none, and bytes would come back as bytes."""
    if not isinstance(value, str):
        raise ValueError(f"`{name}` must be a text, got {value!r}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`{name}` must be a text that UTF-8 can hold, got {value!r}.") from error


def _check_json(name: str, value: object) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"`{name}` must be a dict with names as keys, got {value!r}.")
    try:
        json.dumps(dict(value), ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must hold what JSON can hold: {error}.") from error


# What can be found out


def facts_about(model: Any) -> dict[str, Any]:
    """The fields of a `Result` that a model, or its configuration alone, the machine and the working directory tell.

    `model` holds the fields that its type of configuration adds to those of every other, and the dtype of the weights.
    Without embeddings means without the input embeddings and the output layer, be they tied or not; memory and pause
    vectors count.
    """
    import torch
    import transformers

    config = getattr(model, "config", model)
    inherited = {field.name for field in fields(transformers.PreTrainedConfig)}
    described = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in inherited}
    facts: dict[str, Any] = {
        "model": {"model_type": config.model_type} | described,
        "versions": {
            "baka-hf": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "git_revision": git_revision(),
    }
    if model is not config:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        embeddings = {id(end.weight) for end in ends if end is not None}
        parameters = list(model.parameters())
        facts["model"]["dtype"] = str(model.dtype).removeprefix("torch.")
        facts["num_parameters"] = sum(p.numel() for p in parameters)
        facts["num_parameters_without_embeddings"] = sum(p.numel() for p in parameters if id(p) not in embeddings)
        device = model.device
        facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return facts


def git_revision(directory: str | os.PathLike = ".") -> str | None:
    """The commit checked out in a directory, "-dirty" behind it if tracked files were changed; None without git."""
    command = ["git", "-C", os.fspath(directory), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def curves_of(log_history: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The curves in a Trainer's `state.log_history`: "train", "eval", and "eval_NAME" for data sets with names."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for log in log_history:
        for name, value in log.items():
            if name == "loss" or (name.startswith("eval_") and name.endswith("_loss")):
                split = "train" if name == "loss" else name.removesuffix("_loss")
                curves.setdefault(split, []).append((log["step"], value))
    return curves


# The file


def write_result(path: str | os.PathLike, result: Result) -> None:
    """Write a result, its losses and gains by depth and its run's curves; the file is made if there is none.

    A result with the same run, seed, data set, split and steps is replaced, and so are points of the curves of the same
    run, seed, split and step; its other points stay. One that was read from a file stays as old as it is.

    Raises:
        ValueError: the file is something else, damaged, or of a newer version of this package.
        sqlite3.OperationalError: another process kept the file locked for a minute.
    """
    row = {f.name: getattr(result, f.name) for f in fields(result) if f.name not in SIDES}
    row |= {name: json.dumps(dict(row[name]), sort_keys=True) for name in JSON_FIELDS}
    row["perplexity"] = result.perplexity
    row["written"] = result.written or datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
    key = ("run_id", "seed", "dataset", "split", "steps")
    columns, values = ", ".join(row), ", ".join(f":{name}" for name in row)
    changes = ", ".join(f"{name} = excluded.{name}" for name in row if name not in key)
    unique = "run_id, coalesce(seed, -1), dataset, split, steps"

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with _opened(path, to_write=True) as file:
        file.execute(
            f"INSERT INTO results ({columns}) VALUES ({values}) ON CONFLICT ({unique}) DO UPDATE SET {changes}", row
        )
        ((result_id,),) = file.execute(
            f"SELECT id FROM results WHERE {' AND '.join(f'{name} IS :{name}' for name in key)}", row
        )
        for table in ("losses_by_chunk", "gains"):
            file.execute(f"DELETE FROM {table} WHERE result_id = ?", (result_id,))
        file.executemany(
            "INSERT INTO losses_by_chunk VALUES (?, ?, ?, ?)",
            [(result_id, entry["chunk"], entry["loss"], entry["num_tokens"]) for entry in result.loss_by_chunk],
        )
        file.executemany(
            "INSERT INTO gains VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (result_id, past, *(entry[name] for name in GAIN_FIELDS))
                for past, ranges in result.gains.items()
                for entry in ranges
            ],
        )
        file.executemany(
            "INSERT OR REPLACE INTO curves VALUES (?, ?, ?, ?, ?)",
            [
                (result.run_id, result.seed, split, *point)
                for split, points in result.curves.items()
                for point in points
            ],
        )


def read_results(path: str | os.PathLike) -> list[Result]:
    """All results of a file in the order in which they first came, each with all curves of its run and seed.

    Raises:
        ValueError: there is no such file, it is something else, damaged, or of a newer version of this package.
    """
    if not Path(path).is_file():
        raise ValueError(f"expected a file of results at {path}, found none.")
    results = []
    with _opened(path, to_write=False) as file:
        curves: dict[tuple[str, int | None], dict[str, list[tuple[int, float]]]] = {}
        for run_id, seed, split, step, loss in file.execute("SELECT * FROM curves ORDER BY run_id, seed, split, step"):
            curves.setdefault((run_id, seed), {}).setdefault(split, []).append((step, _number(loss)))
        chunks: dict[int, list[dict[str, Any]]] = {}
        for result_id, chunk, loss, num_tokens in file.execute("SELECT * FROM losses_by_chunk ORDER BY chunk"):
            entry = {"chunk": chunk, "loss": _number(loss), "num_tokens": num_tokens}
            chunks.setdefault(result_id, []).append(entry)
        gains: dict[int, dict[str, list[dict[str, Any]]]] = {}
        for result_id, past, *values in file.execute("SELECT * FROM gains ORDER BY rowid"):
            entry = dict(zip(GAIN_FIELDS, values, strict=True))
            entry["gain"] = _number(entry["gain"])
            gains.setdefault(result_id, {}).setdefault(past, []).append(entry)
        rows = file.execute("SELECT * FROM results ORDER BY id")
        names = [column[0] for column in rows.description]
        for values in rows:
            row: dict[str, Any] = dict(zip(names, values, strict=True))
            result_id = row.pop("id")
            del row["perplexity"]  # follows from the loss
            row |= {"loss_by_chunk": chunks.get(result_id, ()), "gains": gains.get(result_id, {})}
            row["curves"] = curves.get((row["run_id"], row["seed"]), {})
            try:
                row |= {"loss": _number(row["loss"])} | {name: json.loads(row[name]) for name in JSON_FIELDS}
                results.append(Result(**row))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path} is damaged, its result with id {result_id}: {error}") from error
    return results


def merge_results(path: str | os.PathLike, others: Iterable[str | os.PathLike]) -> None:
    """Write the results of other files into this one; of two with the same key the later stays, by when it was written.

    Raises:
        ValueError: as `read_results`, and before anything is written.
    """
    own = read_results(path) if Path(path).exists() else []
    results = {result.key: result for result in own}
    for other in others:
        for result in read_results(other):
            if result.key not in results or (result.written or "") > (results[result.key].written or ""):
                results[result.key] = result
    for result in results.values():
        if result not in own:
            write_result(path, result)


def _number(loss: float | None) -> float:
    """SQLite has no NaN, it makes it NULL."""
    return math.nan if loss is None else loss


@contextmanager
def _opened(path: str | os.PathLike, to_write: bool) -> Iterator[sqlite3.Connection]:
    """One transaction on a file of results, in today's schema."""
    # A reader may have to undo what a writer left that was killed, and changes nothing else.
    uri = f"{Path(path).resolve().as_uri()}?mode={'rwc' if to_write else 'rw'}"
    connection = sqlite3.connect(uri, uri=True, timeout=SECONDS_TO_WAIT, isolation_level=None)
    copy = sqlite3.connect(":memory:", isolation_level=None)
    try:
        # A writer takes its turn before it looks at anything, so that two never make the tables of one file.
        connection.execute("BEGIN IMMEDIATE" if to_write else "BEGIN")
        version = _check_schema(connection, path, to_write)
        if version == SCHEMA_VERSION or to_write:
            file = connection
        else:
            connection.backup(copy)
            file = copy
        if version < SCHEMA_VERSION:
            for statement in TO_TODAY[version]:
                file.execute(statement)
        yield file
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", None)
        if name == "SQLITE_READONLY_ROLLBACK":
            raise ValueError(
                f"a process that wrote {path} was killed, and what it left can only be undone by one that may write to "
                "the file and its folder: read it once as somebody who may."
            ) from error
        if name in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
            raise ValueError(f"{path} is no SQLite file, or a damaged one: {error}.") from error
        if name is None:  # not SQLite's, but of its module: a text that is not UTF-8
            raise ValueError(f"{path} is damaged: {error}.") from error
        raise
    finally:
        copy.close()
        connection.close()  # undoes what was not committed


def _check_schema(connection: sqlite3.Connection, path: str | os.PathLike, to_write: bool) -> int:
    """The version of the schema, 0 of an empty file that is to be written. All others must be files of results."""
    ((application,),) = connection.execute("PRAGMA application_id")
    ((version,),) = connection.execute("PRAGMA user_version")
    columns = _columns(connection)
    if not application and not version and not columns and to_write:
        return 0
    if application != APPLICATION_ID:
        raise ValueError(f"{path} is an SQLite file, but not one of results.")
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {version}, this code reads up to {SCHEMA_VERSION}: upgrade baka-hf."
        )
    with closing(sqlite3.connect(":memory:")) as model:
        for statement in SCHEMA:
            model.execute(statement)
        expected = _columns(model)
    if version < 3:
        expected["results"].remove("training")
        del expected["gains"]
    if version == 1:
        expected["curves"].remove("seed")
    for table, names in expected.items():
        if columns.get(table) != names:
            found = ", ".join(columns.get(table, ())) or "none"
            raise ValueError(
                f"{path} was changed: expected columns {', '.join(names)} in its table {table}, found {found}. What is "
                "to be kept beside results has its place in another table."
            )
    return version


def _columns(connection: sqlite3.Connection) -> dict[str, list[str]]:
    """The names of all columns of all tables."""
    tables = [table for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return {
        table: [name for (name,) in connection.execute("SELECT name FROM pragma_table_info(?)", (table,))]
        for table in tables
    }
