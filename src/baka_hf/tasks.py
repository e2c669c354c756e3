"""Tasks that only memory solves: copy, reverse, associative retrieval, and facts hidden in books.

    train = TaskDataset("copy", num_segments=9, segment_length=8, num_samples=100_000)
    test = TaskDataset("copy", num_segments=9, segment_length=8, num_samples=1000, seed=1)
    config = BakaConfig(vocab_size=train.vocab_size, chunk_size=8, num_memory_tokens=8, use_xl_cache=False, ...)
    Trainer(
        BakaForCausalLM(config), args, train_dataset=train, eval_dataset=test,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=lambda evaluation: answer_accuracy(*evaluation),
    )

The first three are the algorithmic tasks of the Recurrent Memory Transformer (arXiv 2207.06881). The fourth is after
BABILong (arXiv 2406.10149): the facts of a bAbI question, scattered over text that has nothing to do with them.

Samples are dicts of `input_ids` and `labels`, [T] int64, all of one length; labels are -100 but for the answer, which
stands last, and are not shifted: models do that. Sample i depends on the seed and i alone, so workers, processes and
runs that are resumed draw the same samples, and sets with different seeds are as good as disjoint.
"""

import json
import re
from collections.abc import Iterable
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from .data import SECONDS_UNTIL_PROGRESS
from .loss_baka import IGNORED

NUM_KEYS = 26  # the letters
# How many predictions a sample makes; L symbols or pairs are its source.
TASKS = {
    "copy": "3L: L source symbols, the start token, the source twice",
    "reverse": "2L: L source symbols, the start token, the source reversed",
    "associative_retrieval": f"2L + 2: 1 to {NUM_KEYS} pairs of a key and a value, a key, the start token, the value",
}


class TaskDataset(Dataset[dict[str, torch.Tensor]]):
    """Generated samples of an algorithmic task that fill `num_segments` segments of `segment_length` tokens.

    A sample is a source, the start token and the answer. Its T tokens make T - 1 predictions, and these are what fills
    the segments: L = 24 symbols to copy are 24 + 1 + 48 tokens, 72 predictions, 9 segments of 8. (A model whose
    `chunk_size` is 8 puts the 73rd token into a chunk of its own, from which nothing is predicted.)

        copy                    source s₁ … s_L              answer s₁ … s_L s₁ … s_L   L = segments · length / 3
        reverse                 source s₁ … s_L              answer s_L … s₁            L = segments · length / 2
        associative_retrieval   source k₁ v₁ … k_L v_L k_i   answer v_i                 L = segments · length / 2 - 1

    Symbols and values are drawn uniformly from the ids 0 … `num_symbols` - 1. Keys are 26 more, the letters where
    symbols are digits, and differ within a sample. The start token is the last id.

    Args:
        task: "copy", "reverse" or "associative_retrieval".
        num_segments: segments, chunks of the model, that a sample takes.
        segment_length: tokens in a segment, the model's `chunk_size`.
        num_samples: length of the data set. Samples are made when asked for, so it may be as large as it likes.
        seed: another seed, other samples.
        num_symbols: symbols to draw from.

    Attributes:
        source_length: L, in symbols or pairs.
        answer_length: tokens of the answer, the last ones of a sample.
        vocab_size: token ids of the task.
        start_token: the id after which the answer begins.

    Raises:
        ValueError: the task is unknown, a number is too small, or no L makes a sample of that many segments.
    """

    def __init__(
        self,
        task: str,
        num_segments: int,
        segment_length: int,
        num_samples: int,
        *,
        seed: int = 0,
        num_symbols: int = 10,
    ):
        if task not in TASKS:
            raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}.")
        _check_integer("num_segments", num_segments, 1)
        _check_integer("segment_length", segment_length, 1)
        _check_integer("num_samples", num_samples, 1)
        _check_integer("seed", seed, 0)
        _check_integer("num_symbols", num_symbols, 2)
        self.task, self.num_samples, self.seed, self.num_symbols = task, num_samples, seed, num_symbols

        total = num_segments * segment_length
        retrieves = task == "associative_retrieval"
        self.source_length, rest = divmod(total, 3) if task == "copy" else divmod(total - 2 * retrieves, 2)
        if rest or self.source_length < 1 or (retrieves and self.source_length > NUM_KEYS):
            raise ValueError(
                f"{task}: `num_segments` · `segment_length` must be {TASKS[task]}; "
                f"got {num_segments} · {segment_length} = {total}."
            )
        self.answer_length = {"copy": 2 * self.source_length, "reverse": self.source_length}.get(task, 1)
        self.vocab_size = num_symbols + NUM_KEYS * retrieves + 1
        self.start_token = self.vocab_size - 1

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = _generator(self.seed, index, len(self))
        symbols = generator.integers(self.num_symbols, size=self.source_length)
        if self.task == "copy":
            source, answer = symbols, np.tile(symbols, 2)
        elif self.task == "reverse":
            source, answer = symbols, symbols[::-1]
        else:
            keys = self.num_symbols + generator.permutation(NUM_KEYS)[: self.source_length]
            queried = generator.integers(self.source_length)
            source = np.append(np.stack([keys, symbols], axis=1), keys[queried])
            answer = symbols[queried : queried + 1]
        return _sample(np.concatenate([source, [self.start_token], answer]), len(answer))


class BabiQuestion(NamedTuple):
    """A question of a bAbI story, the facts that were told before it, and its answer."""

    facts: tuple[str, ...]
    question: str
    answer: str


def read_babi(path: str | PathLike[str]) -> list[BabiQuestion]:
    """The questions of a bAbI file, in its usual format: numbered lines, from 1 again where a story begins.

        1 Mary moved to the bathroom.
        2 Where is Mary? <tab>bathroom<tab>1

    Raises:
        ValueError: a line is in another format, or there is no question.
    """
    questions: list[BabiQuestion] = []
    facts: list[str] = []
    for row, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        number, _, text = line.strip().partition(" ")
        question, *answers = (part.strip() for part in text.split("\t"))
        if not number.isdecimal() or not question or (answers and not answers[0]):
            raise ValueError(
                f"{path}, line {row}: expected '1 A fact.' or '2 A question?<tab>answer<tab>1', got {line!r}."
            )
        if number == "1":
            facts = []
        if answers:
            questions.append(BabiQuestion(tuple(facts), question, answers[0]))
        else:
            facts.append(question)
    if not questions:
        raise ValueError(f"{path}: expected a bAbI file, found no question in it.")
    return questions


class BabiInBooksDataset(Dataset[dict[str, torch.Tensor]]):
    """bAbI questions whose facts are hidden in books: sentences of a book, facts in order between them, the question.

    Sample i asks question i of the file, from the first again after the last. Its background is an excerpt that is cut
    at its beginning to make the sample `length` tokens long, and each fact stands before or after any sentence of it
    with equal probability. The answer follows the question, and it alone is labelled.

    Args:
        tokenizer: a fast tokenizer. No special tokens are added.
        babi_file: path of a file as `read_babi` takes it.
        books: path of a text file, or of a .jsonl file with a "text" in each line, or texts. They are read and
            tokenized at once and kept as 4 bytes per token; an excerpt may reach from one into the next.
        length: T, the tokens of a sample.
        num_samples: length of the data set, by default the number of questions.
        seed: another seed, other excerpts and places of the facts.

    Attributes:
        questions: what the file asks, a list of `BabiQuestion`.

    Raises:
        ValueError: a question with its facts is longer than `length`, the books are shorter than what is needed beside
            one, a number is too small, or a file is not in its format.
    """

    def __init__(
        self,
        tokenizer: Any,
        babi_file: str | PathLike[str],
        books: str | PathLike[str] | Iterable[str],
        length: int,
        *,
        num_samples: int | None = None,
        seed: int = 0,
    ):
        _check_integer("length", length, 1)
        _check_integer("seed", seed, 0)
        self.questions = read_babi(babi_file)
        self.length, self.seed = length, seed
        self.num_samples = len(self.questions) if num_samples is None else num_samples
        _check_integer("num_samples", self.num_samples, 1)

        # Every piece of a sample but the text's first begins with a space: it is tokenized as in the midst of a text.
        def encode(sentences: Iterable[str]) -> list[list[int]]:
            return tokenizer([f" {sentence}" for sentence in sentences], add_special_tokens=False)["input_ids"]

        pieces = sorted({piece for facts, *asked in self.questions for piece in (*facts, *asked)})
        self.tokens_of = dict(zip(pieces, map(np.array, encode(pieces)), strict=True))
        sizes = [sum(len(self.tokens_of[piece]) for piece in (*facts, *asked)) for facts, *asked in self.questions]
        if max(sizes) > length:
            raise ValueError(
                f"`length` must be at least {max(sizes)}, as the longest question with facts, got {length}."
            )

        arrays, lengths = [np.array([], np.int32)], [0]
        for text in logging.tqdm(_texts(books), desc="Tokenizing", unit="book", delay=SECONDS_UNTIL_PROGRESS):
            if sentences := _sentences(text):
                encoded = encode(sentences)
                arrays.append(np.fromiter(chain.from_iterable(encoded), np.int32))
                lengths += map(len, encoded)
        self.background = np.concatenate(arrays)
        self.breaks = np.cumsum(lengths)  # where sentences begin in it, and where the last one ends
        if len(self.background) < length - min(sizes):
            raise ValueError(
                f"`books` must have at least {length - min(sizes)} tokens for samples of {length}, "
                f"got {len(self.background)}."
            )

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = _generator(self.seed, index, len(self))
        facts, question, answer = self.questions[index % len(self.questions)]
        asked = [self.tokens_of[question], self.tokens_of[answer]]
        told = [self.tokens_of[fact] for fact in facts]
        count = self.length - sum(map(len, told + asked))

        stop = generator.choice(self.breaks[np.searchsorted(self.breaks, count) :])
        start = stop - count
        first, last = np.searchsorted(self.breaks, [start, stop], side="right")
        places = np.sort(generator.choice([start, *self.breaks[first:last]], size=len(told)))
        parts = np.split(self.background[start:stop], places - start)
        text = [parts[0]]
        for fact, part in zip(told, parts[1:], strict=True):
            text += [fact, part]
        return _sample(np.concatenate(text + asked), len(asked[-1]))


def answer_accuracy(predictions: Any, labels: Any) -> dict[str, float]:
    """How much of the answers is right.

    Args:
        predictions: [N, T] token ids, the likeliest after each position (`logits.argmax(-1)`, not shifted); an array
            or a tensor on the CPU.
        labels: [N, T] token ids, -100 where nothing is asked.

    Returns:
        `token_accuracy`, the share of the answers' tokens, and `sequence_accuracy`, that of the samples whose answer is
        right in every token.

    Raises:
        ValueError: the shapes differ, or a sample has no answer.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if labels.ndim != 2 or predictions.shape != labels.shape:
        raise ValueError(f"expected token ids of one shape [N, T], got {predictions.shape} and labels {labels.shape}.")
    asked, right = labels[:, 1:] != IGNORED, predictions[:, :-1] == labels[:, 1:]
    if not asked.any(1).all():
        raise ValueError(f"expected labels in every sample, got none in sample {int(asked.any(1).argmin())}.")
    return {
        "token_accuracy": float(right[asked].mean()),
        "sequence_accuracy": float((right | ~asked).all(1).mean()),
    }


def _check_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")


def _generator(seed: int, index: int, num_samples: int) -> np.random.Generator:
    """The random numbers of one sample."""
    if not 0 <= index < num_samples:
        raise IndexError(f"sample {index} of {num_samples}")
    return np.random.default_rng([seed, index])


def _sample(tokens: np.ndarray, answer_length: int) -> dict[str, torch.Tensor]:
    input_ids = torch.from_numpy(tokens.astype(np.int64))
    labels = input_ids.clone()
    labels[:-answer_length] = IGNORED
    return {"input_ids": input_ids, "labels": labels}


def _texts(books: str | PathLike[str] | Iterable[str]) -> Iterable[str]:
    if not isinstance(books, str | PathLike):
        yield from books
    elif Path(books).suffix == ".jsonl":
        with open(books, encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)
    else:
        yield Path(books).read_text(encoding="utf-8")


def _sentences(text: str) -> list[str]:
    """Cut after full stops, question and exclamation marks; white space becomes single spaces."""
    return [sentence for sentence in re.split(r"(?<=[.!?]) ", " ".join(text.split())) if sentence]


__all__ = ["BabiInBooksDataset", "BabiQuestion", "TaskDataset", "answer_accuracy", "read_babi"]
