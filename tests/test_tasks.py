"""The tasks of `baka_hf.tasks` against their definitions, and the example that shows what memory is for."""

import csv
import json
import random
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from baka_hf import BakaConfig, BakaForCausalLM
from baka_hf.tasks import (
    BabiInBooksDataset,
    BabiQuestion,
    RecallDataset,
    TaskDataset,
    answer_accuracy,
    guessing_accuracy,
    read_babi,
    streamed_accuracy,
    tokenize_books,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import memory_tasks

# How a sample of L symbols or pairs is long, less its last token, from which nothing is predicted.
LENGTHS = {
    "copy": lambda L: L + 1 + 2 * L - 1,
    "reverse": lambda L: L + 1 + L - 1,
    "associative_retrieval": lambda L: 2 * L + 1 + 1 + 1 - 1,
}
MOST = {"copy": 1000, "reverse": 1000, "associative_retrieval": 26}


@st.composite
def task_datasets(draw: st.DrawFn) -> TaskDataset:
    task = draw(st.sampled_from(sorted(LENGTHS)))
    total = LENGTHS[task](draw(st.integers(1, 26)))
    num_segments = draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
    seed, num_symbols = draw(st.integers(0, 2**70)), draw(st.integers(2, 40))
    return TaskDataset(task, num_segments, total // num_segments, 1000, seed=seed, num_symbols=num_symbols)


# ---- copy, reverse, associative retrieval ----


@given(task_datasets(), st.integers(0, 999))
def test_samples_are_as_defined(dataset: TaskDataset, index: int) -> None:
    sample = dataset[index]
    assert {name: column.dtype for name, column in sample.items()} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
    }
    tokens, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
    assert len(tokens) == len(labels) == LENGTHS[dataset.task](dataset.source_length) + 1
    where = tokens.index(dataset.start_token)
    source, answer = tokens[:where], tokens[where + 1 :]
    assert labels == [-100] * (where + 1) + answer
    assert len(answer) == dataset.answer_length

    n = dataset.num_symbols
    if dataset.task == "associative_retrieval":
        *pairs, query = source
        keys, values = pairs[::2], pairs[1::2]
        assert len(keys) == len({*keys}) == len(values) == dataset.source_length
        assert all(n <= key < n + 26 for key in keys)
        assert answer == [value for key, value in zip(keys, values, strict=True) if key == query]
        assert dataset.vocab_size == n + 26 + 1
    else:
        values = source
        assert len(source) == dataset.source_length
        expected = {"copy": source + source, "reverse": [source[-i] for i in range(1, len(source) + 1)]}
        assert answer == expected[dataset.task]
        assert dataset.vocab_size == n + 1
    assert all(0 <= value < n for value in values)
    assert dataset.start_token == dataset.vocab_size - 1


@pytest.mark.parametrize("task", sorted(LENGTHS))
@pytest.mark.parametrize("segment_length", range(1, 9))
def test_the_source_fills_the_segments_or_is_refused(task: str, segment_length: int) -> None:
    for num_segments in range(1, 10):
        total = num_segments * segment_length
        fitting = [L for L in range(1, MOST[task] + 1) if LENGTHS[task](L) == total]
        if fitting:
            dataset = TaskDataset(task, num_segments, segment_length, 1)
            assert [dataset.source_length] == fitting
            assert len(dataset[0]["input_ids"]) == total + 1
        else:
            with pytest.raises(ValueError, match=rf"{task}: .* got {num_segments} · {segment_length} = {total}\."):
                TaskDataset(task, num_segments, segment_length, 1)


def test_the_sizes_of_the_paper() -> None:
    sizes = {"copy": (9, 8), "reverse": (6, 8), "associative_retrieval": (5, 2)}
    datasets = {task: TaskDataset(task, *size, 1) for task, size in sizes.items()}
    lengths = {task: (dataset.source_length, dataset.answer_length) for task, dataset in datasets.items()}
    assert lengths == {"copy": (24, 48), "reverse": (24, 24), "associative_retrieval": (4, 1)}


@given(task_datasets(), st.integers(0, 999))
def test_a_sample_depends_on_seed_and_index_alone(dataset: TaskDataset, index: int) -> None:
    expected = dataset[index]
    random.seed(index)
    np.random.seed(index)
    torch.manual_seed(index)
    dataset[0]
    again = TaskDataset(
        dataset.task,
        len(expected["input_ids"]) - 1,
        1,
        num_samples=index + 1,
        seed=dataset.seed,
        num_symbols=dataset.num_symbols,
    )
    assert_close(again[index], expected, rtol=0, atol=0)
    assert_close(dataset[index], expected, rtol=0, atol=0)


def test_workers_draw_the_same_samples() -> None:
    dataset = TaskDataset("copy", 3, 4, 20, seed=5)
    alone, shared = (list(DataLoader(dataset, 8, num_workers=workers)) for workers in (0, 2))
    assert_close(shared, alone, rtol=0, atol=0)
    assert_close(torch.cat([batch["input_ids"] for batch in alone]), torch.stack([s["input_ids"] for s in dataset]))


def test_samples_differ_by_index_and_seed() -> None:
    sources = {
        tuple(sample["input_ids"].tolist()) for seed in range(3) for sample in TaskDataset("copy", 9, 8, 50, seed=seed)
    }
    assert len(sources) == 150


def test_draws_are_uniform() -> None:
    symbols = torch.cat([sample["input_ids"][:24] for sample in TaskDataset("copy", 9, 8, 500)])
    assert_close(symbols.bincount() / len(symbols), torch.full((10,), 0.1), rtol=0, atol=0.01)
    pairs = torch.stack([sample["input_ids"] for sample in TaskDataset("associative_retrieval", 5, 2, 2000)])
    keys, values, query = pairs[:, 0:8:2], pairs[:, 1:8:2], pairs[:, 8:9]
    assert_close((keys == query).float().mean(0), torch.full((4,), 0.25), rtol=0, atol=0.04)
    assert_close(values.flatten().bincount() / 8000, torch.full((10,), 0.1), rtol=0, atol=0.01)
    assert_close((keys - 10).flatten().bincount() / 8000, torch.full((26,), 1 / 26), rtol=0, atol=0.01)


def test_a_data_set_ends() -> None:
    dataset = TaskDataset("reverse", 2, 4, 7)
    assert len(dataset) == len(list(dataset)) == 7
    for index in (-1, 7):
        with pytest.raises(IndexError, match=f"sample {index} of 7"):
            dataset[index]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "sort"}, "`task` must be one of copy, reverse, associative_retrieval, got 'sort'"),
        ({"num_segments": 0}, "`num_segments` must be an integer of at least 1, got 0"),
        ({"segment_length": 8.0}, "`segment_length` must be an integer of at least 1, got 8.0"),
        ({"num_samples": True}, "`num_samples`"),
        ({"seed": -1}, "`seed` must be an integer of at least 0, got -1"),
        ({"num_symbols": 1}, "`num_symbols` must be an integer of at least 2, got 1"),
        ({"segment_length": 7, "num_segments": 2}, r"copy: .* must be 3L: L source symbols.*; got 2 · 7 = 14\."),
    ],
)
def test_bad_sizes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskDataset(**{"task": "copy", "num_segments": 9, "segment_length": 8, "num_samples": 1} | change)


# ---- recall ----


@given(st.integers(1, 9), st.integers(1, 8), st.integers(1, 7), st.booleans(), st.booleans(), st.integers(0, 99))
def test_every_pair_is_told_and_asked_once(
    num_pairs: int, more: int, segment_length: int, anywhere: bool, cut: bool, index: int
) -> None:
    told = "anywhere" if anywhere else "first"
    num_segments = 2 * (-(-(2 * num_pairs + 1) // segment_length) + 1) + more
    dataset = RecallDataset(num_pairs, num_segments, segment_length, 100, told=told, cut=cut, num_keys=11)
    sample = dataset[index]
    tokens, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
    assert len(tokens) == num_segments * segment_length and sample["labels"].dtype == torch.int64
    keys = [t for t, token in enumerate(tokens) if 10 <= token < 21]
    asked = [t for t in keys if labels[t + 1] != -100]
    facts = {tokens[t]: (t, tokens[t + 1]) for t in keys if t not in asked}
    assert len(facts) == len(asked) == num_pairs == len({tokens[t] for t in asked})
    assert all(facts[tokens[t]][0] < t and facts[tokens[t]][1] == tokens[t + 1] == labels[t + 1] < 10 for t in asked)
    elsewhere = {*range(len(tokens))} - {t + i for t in keys for i in (0, 1)}
    assert {tokens[t] for t in elsewhere} <= {dataset.blank} == {21}
    assert sum(label != -100 for label in labels) == num_pairs
    if not anywhere:  # a whole number of segments has all that is told
        assert max(t + 1 for t, _ in facts.values()) // segment_length < min(asked) // segment_length
        assert min(t for t, _ in facts.values()) <= cut
    if not cut and segment_length % 2 == 0:
        assert all(t % 2 == 0 for t in keys)


@pytest.mark.parametrize("cut", [False, True])
def test_pairs_are_told_again_in_their_order(cut: bool) -> None:
    samples = [*RecallDataset(3, 5, 4, 200, cut=cut, retold=0.3)]
    counts = [int((sample["labels"] != -100).sum()) for sample in samples]
    retold = [sample for sample, count in zip(samples, counts, strict=True) if count == 6]
    assert {*counts} == {3, 6} and 30 < len(retold) < 90
    begins = set()
    for sample in retold:
        [again] = (sample["labels"] != -100).nonzero().T
        begins.add(int(again[0]))
        first = int(sample["input_ids"][0] == 36)
        assert (again.diff() == 1).all() and again[0] >= 8
        assert_close(sample["labels"][again], sample["input_ids"][first : first + 6])
        assert_close(sample["labels"][again], sample["input_ids"][again])
    assert begins == ({8, 10, 12, 14} if not cut else {8, 9, 10, 11, 12, 13, 14})


def test_questions_and_cuts_are_anywhere() -> None:
    samples = [*RecallDataset(2, 4, 4, 600, cut=True)]  # two segments are for pairs, of which two tokens may be left
    beginnings = torch.stack([sample["input_ids"][0] == 36 for sample in samples])
    assert 0.4 < beginnings.float().mean() < 0.6
    samples = [*RecallDataset(2, 9, 4, 600)]
    places = torch.stack([sample["labels"] != -100 for sample in samples]).float().mean(0)
    assert_close(places[4:], torch.tensor([0, 2 / 16] * 16), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"told": "last"}, "`told` must be 'first' or 'anywhere', got 'last'"),
        ({"retold": 1.5}, "`retold` must be from 0 to 1, .*got 1.5"),
        ({"retold": 0.5, "told": "anywhere"}, "and 0 where told='anywhere', got 0.5"),
        ({"num_pairs": 27}, "`num_keys` must be an integer of at least 27, got 26"),
        ({"num_pairs": 0}, "`num_pairs` must be an integer of at least 1, got 0"),
        ({"num_segments": 3}, "room for 4 pairs .*, got 3 · 4 = 12 tokens, which have it for 2"),
        ({"num_segments": 3, "told": "anywhere", "cut": True}, "which have it for 1"),
    ],
)
def test_bad_recall(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecallDataset(**{"num_pairs": 4, "num_segments": 4, "segment_length": 4, "num_samples": 1} | change)


def test_guessing_knows_the_bag_alone() -> None:
    # Of four values the most frequent one: by all 10^4 cases.
    counts = np.stack([np.bincount(values, minlength=10) for values in np.ndindex(10, 10, 10, 10)])
    expected = counts.max(1).mean() / 4
    assert guessing_accuracy(TaskDataset("associative_retrieval", 5, 2, 4000), 4000) == pytest.approx(
        expected, abs=0.01
    )
    assert guessing_accuracy(TaskDataset("associative_retrieval", 2, 2, 9)) == 1  # one pair
    # Of two symbols, drawn from two: the first is right in 3 of 4 cases, the second is what is left.
    assert guessing_accuracy(TaskDataset("copy", 3, 2, 2000, num_symbols=2), 2000) == pytest.approx(7 / 8, abs=0.02)
    assert guessing_accuracy(RecallDataset(2, 8, 2, 2000, num_symbols=2), 2000) == pytest.approx(7 / 8, abs=0.02)


# ---- accuracy ----


@given(st.integers(1, 6), st.integers(2, 8), st.randoms())
def test_accuracy_equals_a_naive_count(num_samples: int, length: int, draw: random.Random) -> None:
    labels = [[draw.choice([-100, 0, 1]) for _ in range(length - 1)] + [draw.randrange(2)] for _ in range(num_samples)]
    predictions = [[draw.choice([0, 1, 1]) for _ in range(length)] for _ in range(num_samples)]
    right = [
        [predictions[i][t - 1] == labels[i][t] for t in range(1, length) if labels[i][t] != -100]
        for i in range(num_samples)
    ]
    expected = {
        "token_accuracy": sum(map(sum, right)) / sum(map(len, right)),
        "sequence_accuracy": sum(map(all, right)) / num_samples,
    }
    assert answer_accuracy(torch.tensor(predictions), np.array(labels)) == pytest.approx(expected)


def test_accuracy_of_one_wrong_token() -> None:
    labels = torch.stack([sample["labels"] for sample in TaskDataset("reverse", 2, 4, 8)])
    predictions = labels.roll(-1, dims=1)  # what a model that knows the answers says
    assert answer_accuracy(predictions, labels) == {"token_accuracy": 1.0, "sequence_accuracy": 1.0}
    predictions[3, -2] += 1
    assert answer_accuracy(predictions, labels) == {"token_accuracy": 1 - 1 / 32, "sequence_accuracy": 1 - 1 / 8}


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        (np.zeros((2, 3, 5)), np.zeros((2, 3)), r"one shape \[N, T\], got \(2, 3, 5\) and labels \(2, 3\)"),
        (np.zeros(3), np.zeros(3), r"one shape \[N, T\]"),
        (np.zeros((2, 2)), [[0, 1], [0, -100]], "got none in sample 1"),
    ],
)
def test_accuracy_of_what_has_none(predictions: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        answer_accuracy(predictions, labels)


@pytest.mark.parametrize("chunks_per_call", [1, 3, 100])
def test_streamed_accuracy_equals_that_of_whole_samples(chunks_per_call: int) -> None:
    config = BakaConfig(
        vocab_size=37,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        chunk_size=5,
        num_memory_tokens=2,
        num_pause_tokens=1,
        residual_initializer_range=0.5,
    )
    torch.manual_seed(0)
    model = BakaForCausalLM(config).train()
    samples = [sample for length in (4, 7) for sample in RecallDataset(2, length, 5, 6, num_symbols=10)]
    model.eval()
    for number, sample in enumerate(samples):  # of which none, some or all are right
        with torch.no_grad():
            said = model(sample["input_ids"][None]).logits.argmax(-1)[0].roll(1)
        agrees = (sample["labels"] != -100) & (torch.arange(len(said)) % 3 < number % 4)
        sample["labels"] = torch.where(agrees, said, sample["labels"])
    whole = [
        answer_accuracy(model(sample["input_ids"][None]).logits.argmax(-1), sample["labels"][None])
        for sample in samples
    ]
    expected = {
        name: np.mean([accuracy[name] for accuracy in whole]) for name in ("token_accuracy", "sequence_accuracy")
    }
    assert 0 < expected["sequence_accuracy"] < expected["token_accuracy"] < 1
    model.train()
    found = streamed_accuracy(model, samples, batch_size=5, chunks_per_call=chunks_per_call)
    assert found == pytest.approx(expected) and model.training


def test_streamed_accuracy_of_what_has_none() -> None:
    model = BakaForCausalLM(BakaConfig.rung("xl", vocab_size=9, hidden_size=8, num_attention_heads=2))
    sample = {"input_ids": torch.zeros(3, dtype=torch.int64), "labels": torch.full((3,), -100)}
    with pytest.raises(ValueError, match="got none in sample 0"):
        streamed_accuracy(model, [sample])
    with pytest.raises(ValueError, match="chunks_per_call"):
        streamed_accuracy(model, [sample], chunks_per_call=0)


# ---- facts in books ----

BABI = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Where is Daniel? \thallway\t4
1 The office is east of the hallway.
2 How do you go from the office to the hallway?\tw\t1
"""
BOOKS = [
    "Call me  Ishmael. Some years ago,\nnever mind how long! Having little\n\nor no money? I thought I would sail.",
    "\n",
    "It was the best of times. It was the worst of times. " * 3,
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def babi_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("babi") / "qa1_train.txt"
    path.write_text(BABI)
    return path


def test_questions_know_the_facts_before_them(babi_file: Path) -> None:
    told = ("Mary moved to the bathroom.", "John went to the hallway.", "Daniel went back to the hallway.")
    office = ("The office is east of the hallway.",)
    mary = BabiQuestion(told[:2], "Where is Mary?", "bathroom")
    assert read_babi(babi_file) == [
        mary,
        BabiQuestion(told, "Where is Daniel?", "hallway", (mary,)),
        BabiQuestion(office, "How do you go from the office to the hallway?", "w"),
    ]


@pytest.mark.parametrize("length", [112, 113, 150, 342])
@pytest.mark.parametrize("seed", [0, 1])
def test_facts_stand_between_sentences_of_books(
    tokenizer: PreTrainedTokenizerFast, babi_file: Path, length: int, seed: int
) -> None:
    dataset = BabiInBooksDataset(tokenizer, babi_file, BOOKS, length, num_samples=60, seed=seed)
    library = " " + " ".join(" ".join(BOOKS).split())
    for index, sample in enumerate(dataset):
        facts, question, answer, _ = dataset.questions[index % 3]
        assert sample["input_ids"].shape == sample["labels"].shape == (length,)
        text = tokenizer.decode(sample["input_ids"])
        asked = f" {question} {answer}"
        assert text.endswith(asked)
        assert sample["labels"].tolist() == [-100] * (length - len(answer) - 1) + tokenizer(" " + answer).input_ids

        text = text.removesuffix(asked)
        places = [text.index(f" {fact}") for fact in facts]
        assert places == sorted(places)
        assert all(place == 0 or text[place - 1] in ".?!" for place in places)
        for fact in facts:
            text = text.replace(f" {fact}", "", 1)
        assert text in library and text[-1:] in ("", ".", "?", "!")


@pytest.mark.parametrize("length", [0, 136, 200])
def test_earlier_questions_are_asked_in_their_places(
    tokenizer: PreTrainedTokenizerFast, babi_file: Path, length: int
) -> None:
    dataset = BabiInBooksDataset(tokenizer, babi_file, BOOKS, length, num_samples=30, ask_all=True)
    for index in range(1, 30, 3):
        sample = dataset[index]
        text = tokenizer.decode(sample["input_ids"])
        assert len(text) == (length or 136)
        ask_mary, ask_daniel = " Where is Mary? bathroom", " Where is Daniel? hallway"
        told = ("Mary moved to", "John went to", "Where is Mary? bathroom", "Daniel went back")
        places = [text.index(f" {piece}") for piece in told]
        assert places == sorted(places) and text.endswith(ask_daniel)
        asked = [t for t, label in enumerate(sample["labels"].tolist()) if label != -100]
        end = places[2] + len(ask_mary)
        assert asked == [*range(end - len(" bathroom"), end), *range(len(text) - len(" hallway"), len(text))]
        assert (sample["labels"][asked] == sample["input_ids"][asked]).all()


def test_questions_that_do_not_fit_are_left_out(tokenizer: PreTrainedTokenizerFast, babi_file: Path) -> None:
    dataset = BabiInBooksDataset(tokenizer, babi_file, BOOKS, 111)
    assert [asked.answer for asked in dataset.questions] == ["bathroom", "w"]
    alone = BabiInBooksDataset(tokenizer, dataset.questions[1:], (), 0)
    assert [tokenizer.decode(sample["input_ids"]) for sample in alone] == [
        " The office is east of the hallway. How do you go from the office to the hallway? w"
    ]


def test_books_are_tokenized_once(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    made = tokenize_books(tokenizer, BOOKS, tmp_path / "books.npz")
    assert tokenizer.decode(made.tokens) == " " + " ".join(" ".join(BOOKS).split())
    assert made.breaks[[0, -1]].tolist() == [0, len(made.tokens)] and len(made.breaks) == 1 + 4 + 6
    kept = tokenize_books(tokenizer, "is not read again", tmp_path / "books.npz")
    assert (kept.tokens == made.tokens).all() and (kept.breaks == made.breaks).all()


def test_facts_and_excerpts_are_anywhere(tokenizer: PreTrainedTokenizerFast, babi_file: Path) -> None:
    dataset = BabiInBooksDataset(tokenizer, babi_file, BOOKS, 150, num_samples=900)
    texts = [tokenizer.decode(dataset[index]["input_ids"]) for index in range(2, 900, 3)]
    endings = {text.removesuffix(" How do you go from the office to the hallway? w")[-8:] for text in texts}
    assert endings == {"o money?", "ld sail.", "f times.", "hallway."}
    # Three to five places in 72 bytes of background: the first and the last of them have their share.
    at_beginning = sum(text.startswith(" The office is") for text in texts)
    at_end = sum("hallway. How do" in text for text in texts)
    assert all(300 / 6 < count < 300 / 2.5 for count in (at_beginning, at_end))


def test_questions_with_books_depend_on_seed_and_index_alone(
    tokenizer: PreTrainedTokenizerFast, babi_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "books.jsonl").write_text("".join(json.dumps({"id": 1, "text": book}) + "\n" for book in BOOKS))
    (tmp_path / "book.txt").write_text("\n".join(BOOKS))
    expected = list(BabiInBooksDataset(tokenizer, babi_file, BOOKS, 150))
    assert len(expected) == 3
    for books in (tmp_path / "books.jsonl", str(tmp_path / "book.txt"), iter(BOOKS)):
        dataset = BabiInBooksDataset(tokenizer, str(babi_file), books, 150, num_samples=6)
        assert_close([dataset[index] for index in (2, 0, 1)], [expected[index] for index in (2, 0, 1)])
        assert all((a["input_ids"] != b["input_ids"]).any() for a, b in pairwise(dataset))
    other = BabiInBooksDataset(tokenizer, babi_file, BOOKS, 150, seed=1)
    assert all((a["input_ids"] != b["input_ids"]).any() for a, b in zip(other, expected, strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1 Mary moved.\nWhere is Mary?\tbathroom\t1\n", r"line 2: expected '1 A fact\.' .* got 'Where is Mary"),
        ("1 Mary moved.\n2 Where is Mary?\t\t1\n", "line 2: expected"),
        ("1\n", "line 1: expected"),
        ("1 Mary moved.\n\n", "line 2: expected"),
        ("1 Mary moved.\n", "found no question"),
        ("", "found no question"),
    ],
)
def test_what_is_no_babi_file(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "qa.txt").write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}/qa.txt.*{message}"):
        read_babi(tmp_path / "qa.txt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # The second question with its three facts has 112 bytes, the third with its one has 78, the books have 264.
        ({"length": 77}, "`length` must be at least 78, .* got 77"),
        ({"length": 343}, r"`books` must have at least 265 tokens for samples of 343, got 264\."),
        ({"books": []}, "`books` must have .*, got 0"),
        ({"num_samples": 0}, "`num_samples` must be an integer of at least 1, got 0"),
        ({"seed": -1}, "`seed`"),
        ({"length": None}, "`length` must be an integer of at least 0, got None"),
    ],
)
def test_bad_books(tokenizer: PreTrainedTokenizerFast, babi_file: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BabiInBooksDataset(tokenizer, babi_file, **{"books": BOOKS, "length": 200} | change)


# ---- examples/memory_tasks.py ----


def run_example(arguments: str, output: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> list[dict[str, str]]:
    """The rows of the table it prints."""
    tiny = "--hidden_size 32 --intermediate_size 64 --num_hidden_layers 1 --num_memory_tokens 4 --segment_length 4"
    command = f"memory_tasks.py {tiny} --use_cpu true --output_dir {output} {arguments}"
    monkeypatch.setattr(sys, "argv", command.split())
    memory_tasks.main()
    title, header, *rows = capsys.readouterr().out.strip().split("\n\n")[-1].splitlines()
    assert title.endswith(" symbols")
    names = re.split(r" {2,}", header.strip())
    return [dict(zip(names, re.split(r" {2,}", row.strip()), strict=True)) for row in rows]


@pytest.mark.smoke
def test_memory_solves_what_cannot_be_solved_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = (
        "--num_segments 3 --num_symbols 6 --eval_samples 200 --max_steps 200 --eval_steps 25 "
        "--per_device_train_batch_size 64 --learning_rate 4e-3 --warmup_steps 20"
    )
    [memory] = run_example(arguments, tmp_path, monkeypatch, capsys)
    [nothing] = run_example(f"{arguments} --num_memory_tokens 0", tmp_path, monkeypatch, capsys)
    assert (memory["model"], nothing["model"]) == ("4 memory tokens", "no memory")
    assert memory["segments"] == "3" and memory["source"] == "4"
    assert memory["guessing"] == nothing["guessing"]
    assert float(memory["answers right"]) == 1.0 and int(memory["steps"]) < 200
    # The last symbol to be copied stands in the last segment for the first time too: 1/8 + 7/8 · 1/6 can be right.
    assert float(nothing["answers right"]) < 0.02 and 0.2 < float(nothing["tokens right"]) < 0.35
    assert nothing["steps"] == "200"


def test_memories_are_compared_over_distances_and_pairs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = (
        f"--task recall --compare --num_pairs 2 --num_segments 4 --test_longer 3 --told anywhere --cut true "
        f"--curriculum 1 --curriculum_steps 1 --max_steps 2 --eval_samples 20 --csv {tmp_path}/rows.csv"
    )
    rows = run_example(arguments, tmp_path, monkeypatch, capsys)
    kinds = ["4 memory tokens", "associative 16", "4 memory tokens, associative 16", "no memory, XL cache", "no memory"]
    assert [row["model"] for row in rows] == [kind for kind in kinds for _ in range(2)]
    assert [row["tested"] for row in rows] == ["4", "12"] * 5
    assert all(row["source"] == row["steps"] == "2" for row in rows)
    sizes = [int(row["state bytes"]) for row in rows[::2]]
    assert sizes[0] + sizes[1] - sizes[2] == sizes[4] < sizes[0]
    with open(tmp_path / "rows.csv", newline="") as file:
        written = [*csv.DictReader(file)]
    assert [row["model"] for row in written] == [row["model"] for row in rows]
    assert all((row["task"], row["segment_length"], row["retold"]) == ("recall", "4", "0.5") for row in written)


def test_the_capacity_is_the_most_pairs_that_are_recalled() -> None:
    def row(model: str, source: int, accuracy: float, tested: int = 4) -> dict[str, Any]:
        about = {"model": model, "state bytes": 64, "seed": 0, "segments": 4, "tested": tested}
        return about | {"source": source, "token_accuracy": accuracy}

    rows = [row("a", 8, 0.96), row("a", 4, 1.0), row("a", 16, 0.94), row("a", 16, 1.0, 8), row("b", 4, 0.5)]
    found = {capacity["model"]: capacity["pairs"] for capacity in memory_tasks.capacities(rows)}
    assert found == {"a": 8, "b": 0}


def test_a_curriculum_comes_first_and_the_task_last() -> None:
    task = memory_tasks.TaskArguments(
        task="recall", segment_length=4, retold=0.0, curriculum=[1, 2], curriculum_steps=3
    )
    samples = task.training_samples((6, 4), max_steps=10, step_samples=5, seed=1)
    counts = [int((sample["labels"] != -100).sum()) for sample in samples]
    assert counts == [1] * 15 + [2] * 15 + [4] * 20
    with pytest.raises(ValueError, match="max_steps: expected more than the 6 of the curriculum, got 6"):
        task.training_samples((6, 4), max_steps=6, step_samples=5, seed=1)


def test_the_example_resumes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = (
        "--task reverse --num_segments 2 3 --eval_samples 40 --max_steps 6 --save_strategy steps --save_steps 3 "
        "--per_device_train_batch_size 4"
    )
    whole = run_example(arguments, tmp_path, monkeypatch, capsys)
    for last in tmp_path.glob("*/*/checkpoint-6"):
        last.rename(last.with_name("done"))
    weights = {folder: torch.load(folder / "done" / "optimizer.pt") for folder in tmp_path.glob("*/*")}
    assert len(weights) == 2
    again = run_example(f"{arguments} --resume_from_checkpoint last", tmp_path, monkeypatch, capsys)
    for folder, expected in weights.items():
        assert_close(torch.load(folder / "checkpoint-6" / "optimizer.pt")["state"], expected["state"])
    for row, row_again in zip(whole, again, strict=True):
        assert row | {"time": ""} == row_again | {"time": ""}
