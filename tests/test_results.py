"""The file of results: what is written is read back, once, whoever writes; and what people see of it."""

import csv
import dataclasses
import io
import json
import math
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import random_tokens, tiny_config, tiny_model
from PIL import Image

from baka_hf import BakaModel, results, results_db
from baka_hf.evaluation import evaluate_documents
from baka_hf.plots import finish, slide
from baka_hf.results import Result, curves_of, facts_about, git_revision, main, read_results, write_result

PROGRAM = ("-m", "baka_hf.results")


def a_gain(first: int, last: int | None, gain: float, error: float | None = 0.0625) -> dict[str, Any]:
    values = dict(first_chunk=first, last_chunk=last, gain=gain, standard_error=error)
    return values | dict(num_documents=3, num_tokens=100)


def a_result(**changes: Any) -> Result:
    values: dict[str, Any] = dict(
        run_id="carry",
        dataset="wiki",
        split="test",
        steps=1000,
        loss=2.5,
        bits_per_byte=1.25,
        num_tokens=300,
        model={"model_type": "baka", "chunk_size": 128, "num_memory_tokens": 4, "rope_parameters": {"rope_theta": 1e4}},
        num_parameters=1_234_567,
        num_parameters_without_embeddings=234_567,
        seed=0,
        tokens_seen=5_000_000_000,
        wall_time=3723.5,
        device="cpu",
        versions={"torch": "2.9.0"},
        git_revision="0123abc-dirty",
        note="first try",
        training={"learning_rate": 0.003, "tokens_per_second": 41_800.25, "peak_memory": 3 << 29},
        loss_by_chunk=[{"chunk": 0, "loss": 2.75, "num_tokens": 200}, {"chunk": 1, "loss": 2.0, "num_tokens": 100}],
        gains={"memory": [a_gain(0, 0, 0.0, 0.0), a_gain(1, None, 0.25)]},
        curves={"train": [(500, 3.5), (1000, 2.25)], "eval": [(1000, 2.5)]},
    )
    return Result(**values | changes)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two runs, the second with memory, each on two splits."""
    path = tmp_path / "results.db"
    plain = {**a_result().model, "num_memory_tokens": 0}
    write_result(path, a_result(run_id="plain", loss=2.75, model=plain, note="", curves={"train": [(500, 3.75)]}))
    write_result(path, a_result(run_id="plain", loss=2.875, model=plain, note="", split="val", loss_by_chunk=[]))
    write_result(path, a_result())
    write_result(path, a_result(split="val", loss=2.625, bits_per_byte=None, loss_by_chunk=[]))
    return path


# ---- the file ----


@pytest.mark.smoke
def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "results.db"
    everything, little = a_result(), Result(run_id="a", dataset="b", split="c", loss=1.5, num_tokens=1)
    write_result(path, everything)
    write_result(path, little)
    assert read_results(path) == [everything, little]
    assert [path.name] == [p.name for p in path.parent.iterdir()]  # nothing beside the one file
    assert all(result.written for result in read_results(path))


def test_every_field_has_a_column(tmp_path: Path) -> None:
    write_result(tmp_path / "results.db", a_result())
    connection = sqlite3.connect(tmp_path / "results.db")
    columns = {row[1] for row in connection.execute("PRAGMA table_info (results)")}
    names = {field.name for field in dataclasses.fields(Result)} - set(results_db.SIDES)
    assert columns == names | {"id", "perplexity"}
    assert connection.execute("SELECT perplexity FROM results").fetchall() == [(math.exp(2.5),)]
    connection.close()


def test_the_same_result_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    write_result(path, a_result())
    write_result(path, a_result())
    assert read_results(path) == [a_result()]
    # Resumed: other times, curves that go on, and losses by depth that take the place of the others.
    again = a_result(
        wall_time=10.0, loss_by_chunk=a_result().loss_by_chunk[:1], curves={"train": [(1000, 2.0), (1500, 1.75)]}
    )
    write_result(path, again)
    curves = {"train": [(500, 3.5), (1000, 2.0), (1500, 1.75)], "eval": [(1000, 2.5)]}
    assert read_results(path) == [dataclasses.replace(again, curves=curves)]


@pytest.mark.parametrize(
    "change", [{"run_id": "b"}, {"seed": 1}, {"seed": None}, {"dataset": "b"}, {"split": "b"}, {"steps": 0}]
)
def test_another_run_seed_data_set_split_or_step_is_another_row(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "results.db"
    write_result(path, a_result())
    write_result(path, a_result(**change))
    assert read_results(path) == [a_result(), a_result(**change)]


def test_every_seed_has_curves_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    seeds = {seed: a_result(seed=seed, curves={"train": [(1, float(seed or 9))]}) for seed in (1, 0, None)}
    for seed in (*seeds, *seeds):  # each of them twice
        write_result(path, seeds[seed])
    assert read_results(path) == list(seeds.values())


# As version 0.1.0 wrote it: one result and one set of curves, whatever the seed.
VERSION_1 = """
CREATE TABLE results (
    id INTEGER PRIMARY KEY, run_id TEXT NOT NULL, dataset TEXT NOT NULL, split TEXT NOT NULL, steps INTEGER NOT NULL,
    loss REAL, perplexity REAL, bits_per_byte REAL, num_tokens INTEGER NOT NULL, model TEXT NOT NULL,
    num_parameters INTEGER, num_parameters_without_embeddings INTEGER, seed INTEGER, tokens_seen INTEGER,
    wall_time REAL, device TEXT, versions TEXT NOT NULL, git_revision TEXT, note TEXT NOT NULL, written TEXT NOT NULL,
    UNIQUE (run_id, dataset, split, steps)
);
CREATE TABLE losses_by_chunk (
    result_id INTEGER NOT NULL REFERENCES results (id), chunk INTEGER NOT NULL, loss REAL, num_tokens INTEGER NOT NULL,
    PRIMARY KEY (result_id, chunk)
) WITHOUT ROWID;
CREATE TABLE curves (
    run_id TEXT NOT NULL, split TEXT NOT NULL, step INTEGER NOT NULL, loss REAL, PRIMARY KEY (run_id, split, step)
) WITHOUT ROWID;
PRAGMA application_id = 0x62616B61;
PRAGMA user_version = 1;
INSERT INTO results (id, run_id, dataset, split, steps, loss, num_tokens, model, seed, versions, note, written) VALUES
    (3, 'a', 'd', 's', 5, 1.5, 10, '{}', 0, '{}', '', ''), (4, 'b', 'd', 's', 5, 2.5, 10, '{}', NULL, '{}', '', '');
INSERT INTO losses_by_chunk VALUES (4, 0, 2.5, 10);
INSERT INTO curves VALUES ('a', 'train', 1, 3.0), ('b', 'train', 1, 4.0);
"""


def test_files_of_the_first_schema_are_read_and_brought_up_to_date(tmp_path: Path) -> None:
    """A reader leaves the file as it is."""
    path = tmp_path / "results.db"
    connection = sqlite3.connect(path)
    connection.executescript(VERSION_1)
    connection.close()
    before = path.read_bytes()
    about = dict(dataset="d", split="s", steps=5, num_tokens=10)
    a = Result(run_id="a", loss=1.5, seed=0, curves={"train": [(1, 3.0)]}, **about)
    chunks = [{"chunk": 0, "loss": 2.5, "num_tokens": 10}]
    b = Result(run_id="b", loss=2.5, curves={"train": [(1, 4.0)]}, loss_by_chunk=chunks, **about)
    assert read_results(path) == [a, b] and path.read_bytes() == before
    other = dataclasses.replace(a, seed=1, curves={"train": [(1, 2.0)]})
    write_result(path, other)
    again = dataclasses.replace(a, loss=1.0)
    write_result(path, again)
    assert read_results(path) == [again, b, other]


def test_files_of_the_second_schema_are_read_and_brought_up_to_date(tmp_path: Path) -> None:
    """It knew neither gains nor training."""
    path = tmp_path / "results.db"
    old = a_result(training={}, gains={})
    write_result(path, old)
    for statement in ("DROP TABLE gains", "ALTER TABLE results DROP COLUMN training", "PRAGMA user_version = 2"):
        change(path, statement)
    before = path.read_bytes()
    assert read_results(path) == [old] and path.read_bytes() == before
    write_result(path, a_result(seed=1))
    assert read_results(path) == [old, a_result(seed=1)]


def test_files_are_merged(file: Path, tmp_path: Path) -> None:
    """Of two results with one key the later stays, however often they are merged; both keep the time they are from."""
    other, merged = tmp_path / "other.db", tmp_path / "merged.db"
    earlier, later = (
        a_result(loss=3.5, written="2000-01-01 00:00:00"),
        a_result(loss=3.0, written="2999-01-01 00:00:00"),
    )
    write_result(other, earlier)
    write_result(other, a_result(run_id="new"))
    main([str(merged), "merge", str(file), str(other), str(file)])
    assert read_results(merged) == [*read_results(file), a_result(run_id="new")]
    assert [r.written for r in read_results(merged)][:4] == [r.written for r in read_results(file)]
    write_result(other, later)
    main([str(merged), "merge", str(other)])
    assert [r.loss for r in read_results(merged)] == [2.75, 2.875, 3.0, 2.625, 2.5]
    before = merged.read_bytes()
    with pytest.raises(SystemExit, match=r"error: expected a file of results at .*none\.db, found none"):
        main([str(merged), "merge", str(file), str(tmp_path / "none.db")])
    assert merged.read_bytes() == before


def test_a_run_that_diverged_is_a_result(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    chunks = [{"chunk": 0, "loss": math.nan, "num_tokens": 1}]
    write_result(path, a_result(loss=math.nan, loss_by_chunk=chunks, curves={"train": [(1, 2.0), (2, math.nan)]}))
    write_result(path, a_result(run_id="other", loss=1e4))
    diverged, hopeless = read_results(path)
    assert math.isnan(diverged.loss) and math.isnan(diverged.perplexity) and math.isnan(diverged.curves["train"][1][1])
    assert math.isnan(diverged.loss_by_chunk[0]["loss"])
    assert hopeless.perplexity == math.inf
    main([str(path), "plot", "--kind", "curves", "-o", str(tmp_path / "curves.png")])
    main([str(path), "plot", "--kind", "runs", "-o", str(tmp_path / "runs.png")])


WRITER = """
import sys
from baka_hf.results import Result, write_result
print("ready", flush=True)
sys.stdin.readline()
for i in range(30):
    chunks = [{"chunk": c, "loss": 1.0, "num_tokens": 1} for c in range(20)]
    curves = {"train": [(s, 1.0) for s in range(50)]}
    for run in ("both", sys.argv[2]):
        values = dict(run_id=run, dataset="d", split="s", steps=i, loss=1.0, num_tokens=1)
        write_result(sys.argv[1], Result(**values, loss_by_chunk=chunks, curves=curves))
"""


def test_processes_may_write_at_once(tmp_path: Path) -> None:
    """From the creation of the file on, which both of them try."""
    path = tmp_path / "results.db"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, path, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert (writer.returncode, errors) == (0, "")
    found = read_results(path)
    assert sorted((r.run_id, r.steps) for r in found) == [(run, i) for run in ("a", "b", "both") for i in range(30)]
    assert all(len(r.loss_by_chunk) == 20 and len(r.curves["train"]) == 50 for r in found)


def test_a_writer_waits_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.db"
    write_result(path, a_result())
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(results_db, "SECONDS_TO_WAIT", 0.1)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        write_result(path, a_result(run_id="b"))
    assert len(read_results(path)) == 1  # readers need not wait
    other.close()
    write_result(path, a_result(run_id="b"))
    assert len(read_results(path)) == 2


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    write_result(path, a_result())
    change(path, "CREATE TRIGGER full BEFORE INSERT ON losses_by_chunk BEGIN SELECT RAISE(FAIL, 'disk is full'); END")
    with pytest.raises(sqlite3.IntegrityError, match="disk is full"):
        write_result(path, a_result(loss=9.0))
    assert read_results(path) == [a_result()]


def change(path: Path, statement: str, *values: object) -> None:
    """What another program does to a file."""
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement, values)
    connection.close()


@pytest.mark.parametrize("use", [read_results, lambda path: write_result(path, a_result())])
def test_what_a_killed_writer_left_is_undone(tmp_path: Path, use: Callable[[Path], object]) -> None:
    """Also by a reader: half of a transaction is in the file, and what was there before is in its journal."""
    path, killed = tmp_path / "results.db", tmp_path / "killed.db"
    write_result(path, a_result())
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("PRAGMA cache_size = 1")
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("UPDATE results SET loss = 9")
    writer.executemany("INSERT INTO curves VALUES ('other', 0, 'train', ?, 9.0)", [(step,) for step in range(9999)])
    shutil.copy(path, killed)
    shutil.copy(f"{path}-journal", f"{killed}-journal")
    writer.close()
    assert killed.read_bytes() != path.read_bytes()
    use(killed)
    assert read_results(killed) == [a_result()]
    assert not Path(f"{killed}-journal").exists()


@pytest.mark.parametrize(
    ("statement", "values", "message"),
    [
        ("UPDATE results SET note = ?", [b"note"], r"with id 1: `note` must be a text, got b'note'"),
        ("UPDATE results SET run_id = ?", [b"carry"], r"with id 1: `run_id` must be a name, got b'carry'"),
        ("UPDATE results SET loss = ?", [b"12345678"], r"with id 1: `loss` must be a number"),
        ("UPDATE results SET written = ?", [b"today"], r"`written` must be a text"),
        ("UPDATE results SET device = 7.5, git_revision = ?", [b"0"], r"`git_revision` must be a text"),
        ("UPDATE results SET model = '[1]'", [], r"`model` must be a dict with names as keys, got \[1\]"),
        ("UPDATE results SET model = '{'", [], r"with id 1: Expecting property name"),
        ("UPDATE results SET versions = '{\"torch\": 2}'", [], r"`versions: torch` must be a text, got 2"),
        ("UPDATE curves SET loss = ?", [b"1"], r"`curves, eval: loss` must be a number"),
        ("UPDATE losses_by_chunk SET loss = ?", [b"1"], r"`loss_by_chunk: loss` must be a number"),
        ("UPDATE results SET note = CAST(? AS TEXT)", [b"\xff"], r"Could not decode to UTF-8 column 'note'"),
        ("ALTER TABLE results ADD COLUMN mine TEXT", [], r"in its table results, found .*, mine\."),
        (
            "ALTER TABLE curves DROP COLUMN loss",
            [],
            r"in its table curves, found run_id, seed, split, s",
        ),
        ("DROP TABLE losses_by_chunk", [], r"in its table losses_by_chunk, found none"),
    ],
)
def test_files_that_another_program_changed(
    file: Path, capsys: pytest.CaptureFixture[str], statement: str, values: list[object], message: str
) -> None:
    change(file, "DELETE FROM results WHERE id > 1")
    change(file, statement, *values)
    with pytest.raises(ValueError, match=rf"results\.db (is damaged|was changed).*{message}"):
        read_results(file)
    with pytest.raises(SystemExit, match="error: "):
        main([str(file), "list"])


def test_a_table_of_somebody_else_is_left_alone(file: Path) -> None:
    before = read_results(file)
    change(file, "CREATE TABLE mine (result_id, opinion)")
    write_result(file, before[0])
    assert read_results(file) == before


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    with pytest.raises(ValueError, match=r"expected a file of results at .*results\.db, found none"):
        read_results(path)
    assert not path.exists()

    write_result(path, a_result())
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    for use in (read_results, lambda path: write_result(path, a_result())):
        with pytest.raises(ValueError, match="has schema version 7, this code reads up to 3: upgrade baka-hf"):
            use(path)

    foreign = tmp_path / "foreign.db"
    connection = sqlite3.connect(foreign)
    connection.execute("CREATE TABLE results (id)")
    connection.close()
    text = tmp_path / "text.db"
    text.write_text("this is no database, " * 100)
    for other, message in ((foreign, "is an SQLite file, but not one of results"), (text, "is no SQLite file")):
        before = other.read_bytes()
        for use in (read_results, lambda path: write_result(path, a_result())):
            with pytest.raises(ValueError, match=message):
                use(other)
        assert other.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run_id": ""}, "`run_id` must be a name, got ''"),
        ({"split": None}, "`split` must be a name, got None"),
        ({"loss": None}, "`loss` must be a number of at least 0, got None"),
        ({"loss": torch.tensor(1.0)}, "`loss` must be a number"),
        ({"loss": -1.0}, "`loss` must be a number of at least 0, got -1.0"),
        ({"steps": 1.5}, "`steps` must be an integer of at least 0, got 1.5"),
        ({"steps": True}, "`steps`"),
        ({"seed": 2**64}, "`seed`"),
        ({"tokens_seen": -1}, "`tokens_seen`"),
        ({"wall_time": "an hour"}, "`wall_time` must be a number of at least 0, got 'an hour'"),
        (
            {"loss_by_chunk": [{"chunk": 0, "loss": 1.0}]},
            "`loss_by_chunk` must hold dicts of chunk, loss and num_tokens",
        ),
        ({"loss_by_chunk": [{"chunk": 0, "loss": "1", "num_tokens": 1}]}, "`loss_by_chunk: loss` must be a number"),
        ({"loss_by_chunk": [{"chunk": 0, "loss": 1.0, "num_tokens": 0}]}, "must hold chunks with tokens"),
        ({"loss_by_chunk": [{"chunk": 0, "loss": 1.0, "num_tokens": 1}] * 2}, "each chunk once, got \\[0, 0\\]"),
        ({"note": None}, "`note` must be a text, got None"),
        ({"device": b"cpu"}, "`device` must be a text, got b'cpu'"),
        ({"git_revision": 7}, "`git_revision` must be a text, got 7"),
        ({"run_id": "a\ud800"}, "`run_id` must be a text that UTF-8 can hold"),
        ({"model": None}, "`model` must be a dict with names as keys, got None"),
        ({"model": {1: 2}}, "`model` must be a dict with names as keys"),
        (
            {"model": {"dtype": torch.float32}},
            "`model` must hold what JSON can hold: .* dtype is not JSON serializable",
        ),
        ({"model": {"name": "a\ud800"}}, "`model` must hold what JSON can hold: .* surrogates not allowed"),
        ({"versions": {"torch": 2}}, "`versions: torch` must be a text, got 2"),
        ({"training": [1]}, "`training` must be a dict with names as keys, got \\[1\\]"),
        ({"gains": {"memory": [{"gain": 1.0}]}}, "`gains` must hold dicts of first_chunk, last_chunk, gain, "),
        ({"gains": {"memory": [a_gain(0, -1, 0.0)]}}, "`gains: last_chunk` must be an integer of at least 0, got -1"),
        ({"gains": {"memory": [a_gain(0, None, "much")]}}, "`gains: gain` must be a number, got 'much'"),
        ({"gains": {"memory": [a_gain(0, None, 0.0, -1.0)]}}, "`gains: standard_error` must be a number of at least"),
        ({"curves": {None: [(1, 2.0)]}}, "`curves: split` must be a text, got None"),
        ({"curves": {"train": [(1, 2, 3)]}}, "`curves` must hold pairs of step and loss"),
        ({"curves": {"train": [(1.5, 2.0)]}}, "`curves, train: step` must be an integer"),
    ],
)
def test_fields_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        a_result(**change)


# ---- what is found out ----


@pytest.mark.smoke
@pytest.mark.parametrize("tied", [False, True])
def test_facts_about_a_model(tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied, eos_token_id=[1, 2])
    model = tiny_model(config)
    facts = facts_about(model)
    total = sum(p.numel() for p in model.parameters())
    assert facts["num_parameters"] == total
    assert facts["num_parameters_without_embeddings"] == total - 19 * 12 * (1 if tied else 2)
    assert facts["device"] == "cpu"
    assert facts["model"] == json.loads(json.dumps(facts["model"]))
    expected = {"model_type": "baka", "chunk_size": 5, "head_dim": 6, "eos_token_id": [1, 2], "dtype": "float64"}
    assert expected.items() <= facts["model"].items() and "id2label" not in facts["model"]
    assert facts["versions"]["transformers"] == transformers.__version__

    of_config = facts_about(config)
    assert of_config["model"] == {name: value for name, value in facts["model"].items() if name != "dtype"}
    assert "num_parameters" not in of_config
    assert facts_about(BakaModel(config))["num_parameters_without_embeddings"] == total - 19 * 12 * (1 if tied else 2)


def test_from_a_model_to_the_file(tmp_path: Path) -> None:
    model = tiny_model(tiny_config())
    scores = evaluate_documents(model, [random_tokens(model.config, 17)], num_bytes=40)
    result = Result.of(model, scores, run_id="r", dataset="d", split="s", seed=3, device="a machine")
    write_result(tmp_path / "results.db", result)
    (found,) = read_results(tmp_path / "results.db")
    assert found == result
    for name in ("loss", "perplexity", "bits_per_byte", "num_tokens", "loss_by_chunk"):
        assert getattr(found, name) == scores[name]
    assert (found.seed, found.device, found.model["num_memory_tokens"]) == (3, "a machine", 2)


def test_git_revision(tmp_path: Path) -> None:
    def git(*command: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    assert git_revision(tmp_path) is None
    assert git_revision(tmp_path / "missing") is None
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    git("tag", "v1")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD").strip()
    (tmp_path / "a").write_text("2")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD").strip() + "-dirty"


def test_curves_of_a_trainer() -> None:
    history = [
        {"loss": 3.0, "grad_norm": 1.0, "learning_rate": 1e-3, "epoch": 0.1, "step": 10},
        {"eval_loss": 2.5, "eval_runtime": 1.0, "epoch": 0.2, "step": 20},
        {"eval_wiki_loss": 2.25, "step": 20},
        {"loss": 2.0, "step": 20},
        {"train_loss": 2.5, "train_runtime": 9.0, "step": 20},  # the mean over the run, at its end
    ]
    assert curves_of(history) == {"train": [(10, 3.0), (20, 2.0)], "eval": [(20, 2.5)], "eval_wiki": [(20, 2.25)]}


# ---- the command line ----


def run(
    *arguments: object,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *PROGRAM, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.smoke
def test_the_module_is_a_program(file: Path) -> None:
    done = run(file, "list")
    assert (done.returncode, done.stderr) == (0, "")
    header, rule, *rows = done.stdout.splitlines()
    names = "run seed data steps loss perplexity bits/byte parameters w/o emb. trained on time written note"
    assert " ".join(header.split()) == names
    assert set(rule) == {"-", " "}
    assert [row.split()[:5] for row in rows] == [
        ["plain", "0", "wiki/test", "1000", "2.7500"],
        ["plain", "0", "wiki/val", "1000", "2.8750"],
        ["carry", "0", "wiki/test", "1000", "2.5000"],
        ["carry", "0", "wiki/val", "1000", "2.6250"],
    ]
    assert {"12.18", "1.2500", "1.23M", "235k", "5.00B", "1:02:04"} <= set(rows[2].split())
    assert rows[2].endswith("first try")
    assert [row.index("wiki/") for row in rows] == [header.index("data")] * 4


def test_compare(file: Path) -> None:
    write_result(file, a_result(run_id="plain", steps=500, loss=9.0))  # an earlier checkpoint is not what is compared
    done = run(file, "compare", "plain", "carry")
    assert (done.returncode, done.stderr) == (0, "")
    header, _, *rows = (line.split() for line in done.stdout.splitlines())
    assert header == ["plain", "carry", "difference"]
    assert rows == [
        ["wiki/test", "loss", "2.7500", "2.5000", "-0.2500"],
        ["wiki/test", "perplexity", "15.64", "12.18", "-3.46"],
        ["wiki/test", "bits", "per", "byte", "1.2500", "1.2500", "+0.0000"],
        ["wiki/val", "loss", "2.8750", "2.6250", "-0.2500"],
        ["wiki/val", "perplexity", "17.73", "13.80", "-3.92"],
        ["wiki/val", "bits", "per", "byte", "1.2500"],
        ["note", "first", "try"],
        ["model.num_memory_tokens", "0", "4"],
    ]


def test_seeds_of_a_run_are_told_apart(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_result(file, a_result(seed=1, loss=2.25, curves={"eval": [(1000, 2.25)]}))
    write_result(file, a_result(seed=None, loss=2.0))
    main([str(file), "compare", "plain", "carry, seed 1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["plain", "carry,", "seed", "1", "difference"]
    assert lines[2].split() == ["wiki/test", "loss", "2.7500", "2.2500", "-0.5000"]
    assert ["seed", "0", "1"] in [line.split() for line in lines]
    message = "run 'carry' has several seeds, name one of: carry, no seed; carry, seed 0; carry, seed 1."
    with pytest.raises(SystemExit, match=message):
        main([str(file), "compare", "carry", "plain"])
    for kind, labels in (
        ("depth", ["carry, seed 0: 2.500", "carry, seed 1: 2.250", "carry, no seed: 2.000"]),
        ("curves", ["carry, seed 1, eval: 2.250"]),
    ):
        picture = tmp_path / f"{kind}.svg"
        main([str(file), "plot", "--kind", kind, "--runs", "carry", "-o", str(picture)])
        main([str(file), "plot", "--kind", kind, "--runs", "carry, seed 1", "-o", str(tmp_path / "one.svg")])
        for label in labels:
            assert f"<!-- {label}" in picture.read_text()


def test_export(file: Path, tmp_path: Path) -> None:
    write_result(file, a_result(run_id="a|b", note="of two\nlines"))
    done = run(file, "export", "--format", "markdown")
    header, rule, *rows = done.stdout.splitlines()
    assert header.startswith("| run | seed | data | steps | loss |") and rule.startswith(
        "| :-- | --: | :-- | --: | --: |"
    )
    assert len(rows) == 5 and all(row.replace("\\|", "").count("|") == header.count("|") for row in rows)
    assert rows[4].startswith(r"| a\|b | 0 | wiki/test | 1000 | 2.5000 |") and rows[4].endswith("| of two lines |")

    assert run(file, "export", "--format", "csv", "-o", tmp_path / "all.csv").stdout == ""
    table = list(csv.DictReader(io.StringIO((tmp_path / "all.csv").read_text())))
    assert len(table) == 5
    assert float(table[2]["perplexity"]) == math.exp(2.5) and table[2]["num_parameters"] == "1234567"
    assert table[3]["bits_per_byte"] == "" and table[4]["note"] == "of two\nlines"
    assert (
        json.loads(table[2]["model.rope_parameters"]) == {"rope_theta": 1e4} and table[2]["versions.torch"] == "2.9.0"
    )


def test_names_of_several_lines_stay_in_their_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.db"
    write_result(path, a_result(run_id="first\n\n# second | third\r\x85last", note=""))
    for command in (["list"], ["export", "--format", "markdown"], ["compare", a_result().run_id, "plain"]):
        if command[0] == "compare":
            write_result(path, a_result())
            write_result(path, a_result(run_id="plain", note="two\nlines"))
        main([str(path), *command])
        text = capsys.readouterr().out
        assert not text.startswith("#") and "\n#" not in text
        if command[0] != "compare":
            assert len(text.splitlines()) == 3
    assert "two lines" in text


def test_no_cell_of_a_spreadsheet_is_a_formula(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.db"
    formulas = ["=1+1", "+1", "-1", "@SUM(A1)", " \t=1"]
    for index, formula in enumerate(formulas):
        values = dict(device=formula, model={"name": formula, "shift": -1.5}, versions={"x": formula}, loss=1e-7)
        write_result(path, a_result(run_id=f"{formula}{index}", note=formula, **values))
    main([str(path), "export", "--format", "csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    for formula, row in zip(formulas, rows, strict=True):
        assert row["run_id"].startswith(f"'{formula}")
        assert row["device"] == row["note"] == row["model.name"] == row["versions.x"] == f"'{formula}"
        assert row["model.shift"] == "-1.5" and float(row["loss"]) == 1e-7 and row["split"] == "test"


def test_an_empty_file_has_no_results(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    connection = sqlite3.connect(file)
    connection.execute("DELETE FROM results")
    connection.commit()
    connection.close()
    main([str(file), "list"])
    assert capsys.readouterr().out == "no results\n"


# ---- means over seeds, and differences ----


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    """A run without memory and one with it, two seeds each, on two data sets, of other chunks."""
    path = tmp_path / "seeds.db"
    for seed in (0, 1):
        for run_id, size, shift in (("plain", 256, 0.0), ("carry", 128, 0.5)):
            # Two chunks of 128 tokens are one of 256: 0-1 are chunk 0, 2-3 chunk 1, 4-7 chunks 2-3.
            count = 4 * 256 // size
            chunks = [
                {
                    "chunk": i,
                    "loss": 3.0 - shift * (i * size >= 256) + seed / 4 * (run_id == "carry"),
                    "num_tokens": size,
                }
                for i in range(count)
            ]
            model = a_result().model | {"chunk_size": size}
            gains = {"memory": [a_gain(0, 0, 0.0, 0.0), a_gain(1, 1, -0.5), a_gain(2, None, 0.25 + seed)]}
            gains["memory"] += [a_gain(1, None, 0.125 + seed / 4)]  # of all but the first
            values = dict(run_id=run_id, seed=seed, model=model, loss_by_chunk=chunks, loss=3.0 - shift + seed / 4)
            write_result(path, a_result(**values, gains=gains if run_id == "carry" else {}, curves={}))
            write_result(path, a_result(**values, dataset="books", gains={}, curves={}))
    return path


def test_summary_has_means_and_spread(seeds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, carry = results.summarize(read_results(seeds))
    spread = 0.25 / math.sqrt(2)  # the standard deviation of two values a quarter apart
    about = {"split": "test", "seeds": 2, "parameters": 1_234_567, "tokens/s": 41_800, "peak GiB": "1.5"}
    assert carry == about | {
        "run": "carry",
        "wiki": 2.625,
        "wiki ±": pytest.approx(spread),
        "wiki from 1 on: memory": 0.25,
        "wiki from 1 on: memory ±": 0.0625,
        "books": 2.625,
        "books ±": pytest.approx(spread),
    }
    assert plain["wiki"] == 3.125 and plain["wiki from 1 on: memory"] is None
    main([str(seeds), "summary"])
    *head, _, first, second = capsys.readouterr().out.splitlines()
    assert len(head) == 2 and head[1].split()[:4] == ["run", "split", "seeds", "wiki"]
    assert second.split()[:9] == ["carry", "test", "2", "2.6250", "±", "0.1768", "2.6250", "±", "0.1768"]
    assert first.split()[-3:] == ["1.23M", "41.8k", "1.5"]
    (row,) = results.summarize(read_results(seeds)[:1])
    assert "wiki ±" not in row and row["seeds"] == 1


def test_differences_by_depth(seeds: Path) -> None:
    """Nothing at chunk 0; ranges that hold others are no points; over a baseline it is seeds that give the error."""
    found = read_results(seeds)
    wiki = [result for result in found if result.dataset == "wiki"]
    points = [(0, 0.0, 0.0), (1, -0.5, 0.0625), (2, 0.75, 0.0625)]
    assert results.differences(found) == {"carry, wiki/test, memory": points}
    assert results.differences(wiki) == {"carry, memory": points}
    error = 0.25 / math.sqrt(2) / math.sqrt(2)
    points = [(0, -0.125, pytest.approx(error)), (1, 0.375, pytest.approx(error)), (2, 0.375, pytest.approx(error))]
    assert results.differences(wiki, "plain") == {"carry": points}
    alone = results.differences([result for result in wiki if result.seed == 0], "plain")
    assert alone == {"carry": [(0, 0.0, None), (1, 0.5, None), (2, 0.5, None)]}
    with pytest.raises(ValueError, match="no run 'other'"):
        results.differences(wiki, "other")
    with pytest.raises(ValueError, match="no gains to draw"):
        results.differences([result for result in wiki if result.run_id == "plain"])
    with pytest.raises(ValueError, match="no losses by depth to compare with those of 'plain'"):
        results.differences([result for result in wiki if result.run_id == "plain"], "plain")


def test_figures_by_depth_are_exported(seeds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(seeds), "export", "--format", "csv", "--table", "depth"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    carry = [row for row in rows if (row["run"], row["seed"], row["data"]) == ("carry", "1", "wiki/test")]
    columns = ("past", "first chunk", "last chunk", "value", "value ±", "tokens")
    assert [tuple(row[name] for name in columns) for row in carry] == [
        ("carried", "0", "0", "3.25", "", "128"),
        ("carried", "1", "1", "3.25", "", "128"),
        ("carried", "2", "3", "2.75", "", "256"),
        ("carried", "4", "7", "2.75", "", "512"),
        ("memory", "0", "0", "0.0", "0.0", "100"),
        ("memory", "1", "1", "-0.5", "0.0625", "100"),
        ("memory", "2", "", "1.25", "0.0625", "100"),
        ("memory", "1", "", "0.375", "0.0625", "100"),
    ]
    main([str(seeds), "export", "--format", "markdown", "--table", "summary"])
    assert (
        capsys.readouterr().out.splitlines()[3].startswith("| carry | test | 2 | 2.6250 ± 0.1768 | 2.6250 ± 0.1768 |")
    )


@pytest.mark.parametrize("baseline", [[], ["--baseline", "plain"]])
def test_gains_are_drawn(seeds: Path, tmp_path: Path, baseline: list[str]) -> None:
    picture = tmp_path / "gain.svg"
    main(
        [str(seeds), "plot", "--kind", "gain", "--runs", "carry", "--data", "wiki/test", *baseline, "-o", str(picture)]
    )
    text = picture.read_text()
    assert "<!-- gain (nats per token) -->" in text and "<!-- 2 and on -->" in text
    assert f"<!-- {'carry' if baseline else 'carry, memory'} -->" in text


def test_runs_are_drawn(seeds: Path, tmp_path: Path) -> None:
    """In the order in which they are named, with the figure that the summary has."""
    write_result(seeds, a_result(run_id="alone", loss=2.25))
    picture = tmp_path / "runs.svg"
    choice = ["--data", "wiki/test", "--runs", "carry", "alone", "plain"]
    main([str(seeds), "plot", "--kind", "runs", *choice, "-o", str(picture)])
    labels = [line.strip()[5:-4] for line in picture.read_text().splitlines() if line.strip().startswith("<!-- ")]
    figures = ["carry", "alone", "plain", "2.6250 ± 0.1768", "2.2500", "3.1250 ± 0.1768"]
    assert [label for label in labels if label in figures] == figures and "Loss on wiki/test" in labels


def test_dots_are_seeds_and_means_and_bars_are_spreads(seeds: Path) -> None:
    write_result(seeds, a_result(run_id="alone", loss=2.25))
    _, (axes,) = slide("")
    results._draw_runs(axes, [result for result in read_results(seeds) if result.dataset == "wiki"])
    ((means, _, (bars,)),) = axes.containers
    dots = axes.lines[-1]
    assert [*zip(*means.get_data(), strict=True)] == [(3.125, 0), (2.625, 1), (2.25, 2)]
    assert [*zip(*dots.get_data(), strict=True)] == [(3.0, 0), (3.25, 0), (2.5, 1), (2.75, 1), (2.25, 2)]
    assert dots.get_markersize() < means.get_markersize()
    spread = 0.25 / math.sqrt(2)
    ends = [(3.125 - spread, 3.125 + spread), (2.625 - spread, 2.625 + spread), (2.25, 2.25)]
    assert [tuple(bar[:, 0]) for bar in bars.get_segments()] == [pytest.approx(each) for each in ends]


@pytest.mark.parametrize("count", [1, 3, 60, 200])
def test_no_mark_of_many_runs_is_cut(count: int) -> None:
    """All of each mark lies within the axes, and no name is higher than its line."""
    figure, (axes,) = slide("")
    results._draw_runs(
        axes, [a_result(run_id=f"run {i}", seed=s, loss=2 + i / 9 + s) for i in range(count) for s in (0, 1)]
    )
    finish(figure)
    figure.draw_without_rendering()
    pixels = figure.dpi / 72  # of a point
    (left, bottom), (right, top) = axes.get_window_extent().get_points()
    marked = [line for line in axes.lines if line.get_marker() == "o"]
    assert [len(line.get_xydata()) for line in marked] == [count, 2 * count]
    for line in marked:
        radius = (line.get_markersize() + line.get_markeredgewidth()) / 2 * pixels
        for x, y in axes.transData.transform(line.get_xydata()):
            assert left < x - radius and x + radius < right and bottom < y - radius and y + radius < top
    height = (top - bottom) / abs(axes.get_ylim()[1] - axes.get_ylim()[0])
    assert all(text.get_fontsize() * pixels < height for text in axes.texts)


@pytest.mark.parametrize("kind", ["curves", "depth"])
def test_plots(file: Path, tmp_path: Path, kind: str) -> None:
    """Of two runs, and of one alone: pictures of a slide's shape that are not blank and not the same."""
    pictures = []
    for name, runs in (("both.png", []), ("one.png", ["--runs", "carry"])):
        main([str(file), "plot", "--kind", kind, *runs, "-o", str(tmp_path / name)])
        assert (tmp_path / name).stat().st_size > 10_000
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG" and picture.size == (1920, 1080)
            colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or ()}
            assert (0, 114, 178) in colours  # the first run's
            assert ((213, 94, 0) in colours) == (name == "both.png")  # the second one's
            pictures.append(picture.tobytes())
    assert pictures[0] != pictures[1]


def test_deep_chunks_are_put_together() -> None:
    """A point stands for a fortieth of the tokens or more, and no token is left out."""
    chunks = [{"chunk": i, "loss": float(i), "num_tokens": 4000 if i < 10 else 100} for i in range(110)]
    points = results._merged(chunks)
    assert points[:10] == [(i, i) for i in range(10)]
    assert points[10:] == [(depth, depth) for depth in (16, 29, 42, 55, 68, 81, 98.5)]  # 13 each, the last one 22
    assert results._merged(chunks[:1]) == [(0, 0)]
    assert [depth for depth, _ in results._merged([chunks[0], chunks[10]])] == [1000 / 4100]


def test_a_noisy_curve_is_thinned() -> None:
    points = [(step, float(step % 2)) for step in range(1000)]
    assert results._thinned(points, 100) == [(10 * i + 4.5, 0.5) for i in range(100)]
    assert results._thinned(points[:7], 100) == points[:7]


def test_runs_with_other_chunks_are_drawn_over_tokens(tmp_path: Path) -> None:
    for run_id, chunk_size in (("a", 128), ("b", 512)):
        write_result(tmp_path / "r.db", a_result(run_id=run_id, model={"chunk_size": chunk_size}))
    main([str(tmp_path / "r.db"), "plot", "--kind", "depth", "-o", str(tmp_path / "depth.svg")])
    assert "tokens in the chunks read before" in (tmp_path / "depth.svg").read_text()


def test_too_many_lines(tmp_path: Path) -> None:
    """More than can be told apart are refused, and nothing is left."""
    for number in range(15):
        write_result(tmp_path / "r.db", a_result(run_id=f"run {number}"))
    for runs, is_drawn in ((range(15), False), (range(14), True)):
        named = ["--runs", *(f"run {number}" for number in runs)]
        with nullcontext() if is_drawn else pytest.raises(SystemExit, match="at most 14 lines to draw, got 15"):
            main([str(tmp_path / "r.db"), "plot", "--kind", "depth", *named, "-o", str(tmp_path / "many.png")])
        assert (tmp_path / "many.png").exists() is is_drawn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.db", "list"], "error: expected a file of results at missing.db, found none"),
        (["FILE", "compare", "plain", "none"], "error: no run 'none'; there are: plain; carry."),
        (["FILE", "plot", "--kind", "depth", "--runs", "none", "-o", "x.png"], "error: no run 'none'"),
        (["FILE", "plot", "--kind", "depth", "-o", "missing/x.png"], "error: .*No such file or directory"),
        (["EMPTY", "plot", "--kind", "depth", "-o", "x.png"], "error: no losses by depth to draw"),
        (["EMPTY", "plot", "--kind", "curves", "-o", "x.png"], "error: no loss curves to draw"),
        (["FILE", "plot", "--kind", "runs", "-o", "x.png"], "error: expected .*one data set.* wiki/test; wiki/val"),
        (["FILE", "plot", "--kind", "runs", "--data", "books/val", "-o", "x.png"], "error: expected .*, got none"),
        (["FILE", "plot", "--kind", "depth"], "required: -o"),
        (["FILE", "export"], "required: --format"),
        (["FILE"], "required: command"),
    ],
)
def test_bad_arguments(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_result("empty.db", a_result(loss_by_chunk=[], curves={}))
    names = {"FILE": str(file), "EMPTY": "empty.db"}
    with pytest.raises(SystemExit, match=message if message.startswith("error") else "2"):
        main([names.get(argument, argument) for argument in arguments])
    if not message.startswith("error"):
        assert message in capsys.readouterr().err


def test_matplotlib_is_asked_for_when_it_is_missing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    main([str(file), "list"])
    with pytest.raises(SystemExit, match="error: plots need matplotlib: pip install matplotlib"):
        main([str(file), "plot", "--kind", "depth", "-o", str(tmp_path / "x.png")])
