"""examples/babilong.py: its samples, and a run from end to end on a few lines of text; the picture of its results."""

import csv
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import byte_tokenizer
from PIL import Image

from baka_hf import BakaConfig
from baka_hf.tasks import BabiQuestion, tokenize_books

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

import babilong
import recall

ROOT = Path(__file__).parents[1]

STORY = """1 Mary moved to the {0}.
2 Where is Mary?\t{0}\t1
3 John went to the {1}.
4 Where is John?\t{1}\t3
"""
SIZES = "--hidden_size 8 --intermediate_size 8 --num_hidden_layers 1 --num_attention_heads 2 --chunk_size 64"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("babi")
    for split in ("train", "test"):
        (path / f"qa1_one_{split}.txt").write_text(STORY.format("hall", "park") + STORY.format("park", "hall"))
        (path / f"qa2_two_{split}.txt").write_text(STORY.format("attic", "attic"))
    (path / "books.jsonl").write_text(json.dumps({"text": "It was the best of times. " * 40}) + "\n")
    byte_tokenizer().save_pretrained(path)
    return path


def run(folder: Path, output: Path, flags: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    texts = f"--babi {folder} --books {folder}/books.jsonl --test_books {folder}/books.jsonl"
    command = f"babilong.py {texts} --use_cpu true --output_dir {output} --lengths 0 300 700 --test_samples 3 {flags}"
    monkeypatch.setattr(sys, "argv", command.split())
    babilong.main()
    with open(output / "babilong.csv", newline="") as file:
        return [*csv.DictReader(file)]


def test_trained_tested_and_tested_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"--tokenizer {folder}/tokenizer.json {SIZES} --tasks qa1 qa2 --curriculum 2 3 --max_steps 2"
    rows = run(folder, tmp_path / "trained", f"{flags} --per_device_train_batch_size 2", monkeypatch)
    assert [(row["length"], row["task"]) for row in rows] == [
        (length, task) for length in ("0", "300", "700") for task in ("qa1", "qa2")
    ]
    assert len({row["state bytes"] for row in rows}) == 1
    # Of qa1's answers half are the same word, all four were told last; there is one answer in qa2.
    assert all(row["guessing"] == "1.0" for row in rows)
    out = capsys.readouterr().out
    assert "ARMT" in out and "qa2 at 0 k: " in out and (tmp_path / "trained" / "babilong.png").exists()
    again = run(
        folder,
        tmp_path / "again",
        f"--model {tmp_path}/trained --tasks qa1 qa2 --max_steps 0 --bf16 false",
        monkeypatch,
    )
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in rows]


def test_stages_have_the_chunks_of_the_curriculum(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    books = tokenize_books(tokenizer, ["Once. " * 90])
    task = babilong.TaskArguments(str(folder), "", "", tasks=["qa1", "qa2"], curriculum=[2, 3, 5])
    samples = babilong.training_samples(task, tokenizer, books, 64, max_steps=5, step_samples=2, seed=3)
    assert [len(sample["input_ids"]) // 64 for sample in samples] == [2] * 2 + [3] * 4 + [5] * 4
    answers = {tokenizer.decode(sample["labels"][sample["labels"] != -100]) for sample in samples}
    # Second questions come with the first ones, and both tasks are there.
    assert {" attic", " attic attic"} <= answers and answers - {" attic", " attic attic"}


def test_writes_cost_nothing_at_first(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While samples have no more than --free_chunks; and a checkpoint is as it was asked for."""
    costs = []

    class Seen(babilong.FreeAtFirst):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            super().on_step_begin(*args, **kwargs)
            costs.append(self.config.associative_write_cost)

    monkeypatch.setattr(babilong, "FreeAtFirst", Seen)
    memory = "--num_memory_tokens 0 --associative_dim 4 --associative_write tokens --associative_gate hard_sigmoid"
    flags = f"--tokenizer {folder}/tokenizer.json {SIZES} {memory} --per_device_train_batch_size 2 --free_chunks 2"
    flags += " --save_strategy steps --save_steps 1"
    run(folder, tmp_path, f"{flags} --associative_write_cost 0.5 --curriculum 1 2 3 --max_steps 5", monkeypatch)
    assert costs == [0, 0, 0, 0.5, 0.5]
    for saved in (tmp_path, *tmp_path.glob("checkpoint-*")):
        assert BakaConfig.from_pretrained(saved).associative_write_cost == 0.5
    flags = f"--model {tmp_path} --associative_write_cost 0 --curriculum 3 --max_steps 1"
    run(folder, tmp_path / "again", flags, monkeypatch)
    assert costs[5:] == [0]


def test_a_guess_knows_the_last_place_or_the_most_frequent_answer() -> None:
    facts = ("Mary moved to the hall.", "John went to the park.")
    asked = [BabiQuestion(facts, "?", answer) for answer in ("park", "park", "hall")]
    assert babilong.guess_places(asked) == 2 / 3
    assert babilong.guess_places([question._replace(facts=facts[:1]) for question in asked]) == 2 / 3
    assert babilong.guess_places([*asked, BabiQuestion(facts[:1], "?", "hall")]) == 3 / 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "error: tokenizer: expected one for a model from scratch, got none."),
        ("--tokenizer {0}/tokenizer.json --tasks qa7", "error: babi: expected one file qa7_…_train.txt in .*, found 0"),
        ("--tokenizer {0}/tokenizer.json --curriculum 1 --max_steps 1 --chunk_size 16", "error: `length` .*, got 16"),
    ],
)
def test_what_is_not_there_is_told_by_a_message_alone(
    flags: str, message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=message):
        run(folder, tmp_path, f"{SIZES} --tasks qa2 {flags.format(folder)} --ask_all true", monkeypatch)


def test_the_picture_has_the_figures_of_the_file_and_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, guessing = recall.lines()
    with open(ROOT / "results" / "babilong.csv", newline="") as file:
        for row in csv.DictReader(file):
            if name := recall.OURS.get(row["model"]):
                assert found[name][int(row["length"])] == 100 * float(row["accuracy"])
                assert guessing == 100 * float(row["guessing"])
    header, *rows = re.findall(r"^\| (tokens|BakaLLM|\*A?RMT)(.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    lengths = [int(cell.replace(",", "")) for cell in header[1].split(" | ")[1:]]
    handles, names = recall.draw().axes[0].get_legend_handles_labels()
    assert names == [*found]
    for (first, rest), (name, line), handle in zip(rows, found.items(), handles, strict=True):
        label, *cells = (first + rest).split(" | ")
        assert label == name or (name.startswith(first.strip("*") + ",") and "published" in name)
        assert [line[length] for length in lengths] == [float(cell) for cell in cells]
        assert {0: line[0]} | dict(zip(*handle.get_data(), strict=True)) == line

    monkeypatch.setattr(sys, "argv", ["recall.py", "-o", str(tmp_path / "recall.png")])
    runpy.run_path(recall.__file__, run_name="__main__")
    with Image.open(tmp_path / "recall.png") as picture, Image.open(ROOT / "docs" / "recall.png") as kept:
        assert picture.size == kept.size == (1920, 1080)
