"""Tasks that only memory solves: copy, reverse, associative recall, and facts hidden in books.

    train = TaskDataset("copy", num_segments=9, segment_length=8, num_samples=100_000)
    test = TaskDataset("copy", num_segments=9, segment_length=8, num_samples=1000, seed=1)
    config = BakaConfig(vocab_size=train.vocab_size, chunk_size=8, num_memory_tokens=8, use_xl_cache=False, ...)
    Trainer(
        BakaForCausalLM(config), args, train_dataset=train, eval_dataset=test,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=lambda evaluation: answer_accuracy(*evaluation),
    )

`TaskDataset` has the algorithmic tasks of the Recurrent Memory Transformer (arXiv 2207.06881), `RecallDataset` many
questions about many pairs (multi-query associative recall, arXiv 2312.04927), over any distance. `BabiInBooksDataset`
does as BABILong (arXiv 2406.10149): facts of a bAbI question, scattered over text that has nothing to do with them.

Samples are dicts of `input_ids` and `labels`, [T] int64, all of one length; labels are -100 but for answers, and not
shifted: models do that. Sample i depends on the seed and i alone, so workers, processes and runs that are resumed draw
the same samples, and sets with different seeds are as good as disjoint. A curriculum is one set after another, a
`ConcatDataset` read in order.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers.utils import logging

from .configuration_baka import check_integers
from .data import SECONDS_UNTIL_PROGRESS
from .evaluation import in_eval_mode
from .loss_baka import IGNORED
from .texts import encode, keep_arrays, read_documents

SENTENCES_AT_A_TIME = 100_000  # are tokenized

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
        check_integers(num_segments=num_segments, segment_length=segment_length, num_samples=num_samples)
        check_integers(0, seed=seed)
        check_integers(2, num_symbols=num_symbols)
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
        input_ids = torch.from_numpy(np.concatenate([source, [self.start_token], answer]).astype(np.int64))
        labels = input_ids.clone()
        labels[: -self.answer_length] = IGNORED
        return {"input_ids": input_ids, "labels": labels}


class RecallDataset(Dataset[dict[str, torch.Tensor]]):
    """Pairs of a key and a value, told once and asked once, in samples of `num_segments` · `segment_length` tokens.

        k₁ v₁ k₂ v₂ … k_n v_n · · · k₂ v₂ · · k_n v_n · · · · k₁ v₁ · ·

    A question is a key that was told before, its answer the value, which stands behind it and is labelled. All n pairs
    are asked, in random order at random places, with blanks (·) between them: how many are recalled is the capacity of
    a memory, and more segments are longer distances.

    Values are drawn uniformly from the ids 0 … `num_symbols` - 1. Keys are the next `num_keys`, and differ within a
    sample. The blank is the last id.

    Args:
        num_pairs: n.
        num_segments: segments, chunks of the model, that a sample takes.
        segment_length: tokens in a segment, the model's `chunk_size`. If even, no segment ends within a pair.
        num_samples: length of the data set. Samples are made when asked for.
        told: "first": all pairs stand at the beginning, and questions in the segments after those they take, so that
            memory alone can answer. "anywhere": a pair is told anywhere and asked anywhere later, so that the first
            questions are asked of few pairs, and some within a segment.
        cut: begin half of the samples with a blank: of an even `segment_length` segments then end within a pair.
        retold: share of the samples that ask nothing. In the place of questions all pairs are told again in their
            order, and keys are labelled too. It is for training: a memory that has to tell all again holds keys beside
            values, and to find a value by its key is learned soon; questions alone may teach but the bag of values.
        seed: another seed, other samples.
        num_symbols: values to draw from.
        num_keys: keys to draw from.

    Attributes:
        vocab_size: token ids of the task.
        blank: the id of what is neither key nor value.

    Raises:
        ValueError: `told` is another word, a number is too small, there are fewer keys than pairs, the segments do not
            hold all questions, or `retold` is no share, or not 0 where pairs are told anywhere.
    """

    def __init__(
        self,
        num_pairs: int,
        num_segments: int,
        segment_length: int,
        num_samples: int,
        *,
        told: str = "first",
        cut: bool = False,
        retold: float = 0.0,
        seed: int = 0,
        num_symbols: int = 10,
        num_keys: int = NUM_KEYS,
    ):
        check_integers(num_pairs=num_pairs, num_segments=num_segments)
        check_integers(segment_length=segment_length, num_samples=num_samples)
        check_integers(0, seed=seed)
        check_integers(2, num_symbols=num_symbols)
        check_integers(num_pairs, num_keys=num_keys)
        if told not in ("first", "anywhere"):
            raise ValueError(f"`told` must be 'first' or 'anywhere', got {told!r}.")
        if not 0 <= retold <= (told == "first"):
            raise ValueError(f"`retold` must be from 0 to 1, and 0 where told='anywhere', got {retold!r}.")
        self.num_pairs, self.num_samples, self.seed = num_pairs, num_samples, seed
        self.told, self.cut, self.retold = told, cut, retold
        self.num_symbols, self.num_keys, self.length = num_symbols, num_keys, num_segments * segment_length
        self.vocab_size = num_symbols + num_keys + 1
        self.blank = self.vocab_size - 1

        # Where questions may begin: behind the segments that the pairs take.
        self.told_length = -(-(2 * num_pairs + cut) // segment_length) * segment_length
        if told == "first":
            room = min(len(self._places(first)) for first in range(1 + cut))
        else:
            room = (self.length - cut) // 2 - num_pairs
        if room < num_pairs:
            raise ValueError(
                f"`num_segments` · `segment_length` must have room for {num_pairs} pairs and the questions about them, "
                f"got {num_segments} · {segment_length} = {self.length} tokens, which have it for {max(room, 0)}."
            )

    def _places(self, first: int) -> np.ndarray:
        """Where questions can stand behind the segments of pairs, of which the first begins at token `first`."""
        begin = self.told_length + (self.told_length - first) % 2
        return np.arange(begin, self.length - 1, 2)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = _generator(self.seed, index, len(self))
        first, n = int(generator.integers(1 + self.cut)), self.num_pairs
        keys = self.num_symbols + generator.permutation(self.num_keys)[:n]
        values = generator.integers(self.num_symbols, size=n)
        is_retold = generator.random() < self.retold
        if self.told == "first":
            told, places = first + 2 * np.arange(n), self._places(first)
            if is_retold:
                asked = places[generator.integers(len(places) - n + 1) :][:n]
            else:
                asked = generator.choice(places, n, replace=False)
        else:
            both = generator.choice(np.arange(first, self.length - 1, 2), (n, 2), replace=False)
            told, asked = both.min(1), both.max(1)
        tokens = np.full(self.length, self.blank)
        labels = np.full(self.length, IGNORED)
        for places in (told, asked):
            tokens[places], tokens[places + 1] = keys, values
        labels[asked + 1] = values
        if is_retold:
            labels[asked] = keys
        return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}


def guessing_accuracy(dataset: TaskDataset | RecallDataset, num_samples: int = 1000) -> float:
    """The share of answers' tokens that are right for a model that knows what was told, but not where or of which key.

    At every answer it knows which symbols were told and which of them were answered already, and says the one that is
    left most often. A model that is as good as this has learned the bag of symbols and no order, no binding.

    Args:
        dataset: what is asked.
        num_samples: the first so many samples are taken.
    """
    expected, count = 0.0, 0
    for index in range(min(num_samples, len(dataset))):
        sample = dataset[index]
        told, left = Counter[int](), Counter[int]()
        for token, label in zip(sample["input_ids"].tolist(), sample["labels"].tolist(), strict=True):
            if label != IGNORED:
                left = left if left.total() else told.copy()  # a source that is copied twice is told once
                expected += max(left.values()) / left.total()
                count += 1
                left[token] -= 1
            elif token < dataset.num_symbols:
                told[token] += 1
                left[token] += 1
    return expected / count


class BabiQuestion(NamedTuple):
    """A question of a bAbI story, the facts told before it, its answer, and the story's questions before it."""

    facts: tuple[str, ...]
    question: str
    answer: str
    earlier: tuple["BabiQuestion", ...] = ()


def read_babi(path: str | PathLike[str]) -> list[BabiQuestion]:
    """The questions of a bAbI file, in its usual format: numbered lines, from 1 again where a story begins.

        1 Mary moved to the bathroom.
        2 Where is Mary? <tab>bathroom<tab>1

    Raises:
        ValueError: a line is in another format, or there is no question.
    """
    questions: list[BabiQuestion] = []
    facts: list[str] = []
    earlier: list[BabiQuestion] = []
    for row, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        number, _, text = line.strip().partition(" ")
        question, *answers = (part.strip() for part in text.split("\t"))
        if not number.isdecimal() or not question or (answers and not answers[0]):
            raise ValueError(
                f"{path}, line {row}: expected '1 A fact.' or '2 A question?<tab>answer<tab>1', got {line!r}."
            )
        if number == "1":
            facts, earlier = [], []
        if answers:
            questions.append(BabiQuestion(tuple(facts), question, answers[0], tuple(earlier)))
            earlier.append(questions[-1]._replace(earlier=()))
        else:
            facts.append(question)
    if not questions:
        raise ValueError(f"{path}: expected a bAbI file, found no question in it.")
    return questions


@dataclass(frozen=True)
class Books:
    """Books as tokens, end to end."""

    tokens: np.ndarray  # [N] int32
    breaks: np.ndarray  # where sentences begin in them, ascending, and where the last one ends, int64


def tokenize_books(
    tokenizer: Any, books: str | PathLike[str] | Iterable[str], path: str | PathLike[str] | None = None
) -> Books:
    """Books sentence by sentence, each tokenized as in the midst of a text.

    Args:
        tokenizer: a fast tokenizer. No special tokens are added.
        books: path of a file as `texts.read_documents` takes it, or texts.
        path: a file (.npz) that keeps the tokens. If there is one, it is read, and `books` are not; if not, the first
            process that comes makes it, and others wait. It does not know of which books and tokenizer it was made.
    """
    if path is not None:
        return Books(**keep_arrays(path, lambda: vars(tokenize_books(tokenizer, books))))
    texts = read_documents(os.fspath(books)) if isinstance(books, str | PathLike) else books
    arrays, lengths = [np.array([], np.int32)], [0]
    for text in logging.tqdm(texts, desc="Tokenizing", unit="book", delay=SECONDS_UNTIL_PROGRESS):
        encoded = _encode(tokenizer, _sentences(text))
        arrays.append(np.fromiter(chain.from_iterable(encoded), np.int32))
        lengths += map(len, encoded)
    return Books(np.concatenate(arrays), np.cumsum(lengths))


class BabiInBooksDataset(Dataset[dict[str, torch.Tensor]]):
    """bAbI questions whose facts are hidden in books: sentences of a book, facts in order between them, the question.

    Sample i asks question i of the list, from the first again after the last. Its background is an excerpt that is cut
    at its beginning to make the sample `length` tokens long, and each fact stands before or after any sentence of it
    with equal probability. The answer follows the question, and it alone is labelled, or with `ask_all` those of the
    story's earlier questions too, which then stand between sentences like facts: many targets a sample, some of them
    near to their facts.

    Args:
        tokenizer: a fast tokenizer. No special tokens are added.
        questions: path of a file as `read_babi` takes it, or what it has read. Those that are longer with their facts
            than `length` are left out.
        books: a `Books`, or what `tokenize_books` makes one of. An excerpt may reach from one book into the next.
        length: T, the tokens of a sample; 0: no book, samples of as many tokens as their pieces have.
        num_samples: length of the data set, by default the number of questions.
        ask_all: also ask the earlier questions of a story.
        seed: another seed, other excerpts and places of the facts.

    Attributes:
        questions: what is asked, a list of `BabiQuestion`.

    Raises:
        ValueError: every question with its facts is longer than `length`, the books are shorter than what is needed
            beside one, a number is too small, or a file is not in its format.
    """

    def __init__(
        self,
        tokenizer: Any,
        questions: str | PathLike[str] | Sequence[BabiQuestion],
        books: Books | str | PathLike[str] | Iterable[str],
        length: int,
        *,
        num_samples: int | None = None,
        ask_all: bool = False,
        seed: int = 0,
    ):
        check_integers(0, length=length, seed=seed)
        known = read_babi(questions) if isinstance(questions, str | PathLike) else questions
        self.length, self.seed, self.ask_all = length, seed, ask_all

        sentences = sorted({sentence for question in known for sentence, _ in self._sequence(question)})
        self.tokens_of = dict(zip(sentences, map(np.array, _encode(tokenizer, sentences)), strict=True))
        sizes = [sum(len(self.tokens_of[text]) for text, _ in self._sequence(question)) for question in known]
        self.questions = [asked for asked, size in zip(known, sizes, strict=True) if size <= length or not length]
        if not self.questions:
            raise ValueError(
                f"`length` must be at least {min(sizes)}, as the shortest question with facts, got {length}."
            )
        self.num_samples = len(self.questions) if num_samples is None else num_samples
        check_integers(num_samples=self.num_samples)

        self.books = books if isinstance(books, Books) else tokenize_books(tokenizer, books)
        if len(self.books.tokens) < length - min(sizes):
            raise ValueError(
                f"`books` must have at least {length - min(sizes)} tokens for samples of {length}, "
                f"got {len(self.books.tokens)}."
            )

    def _sequence(self, asked: BabiQuestion) -> list[tuple[str, bool]]:
        """What is told and asked, in order, and which of it are answers."""
        questions = (*(asked.earlier if self.ask_all else ()), asked)
        begins = (0, *(len(question.facts) for question in questions))
        sequence = []
        for begin, (facts, question, answer, _) in zip(begins, questions, strict=False):
            sequence += [(fact, False) for fact in facts[begin:]] + [(question, False), (answer, True)]
        return sequence

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = _generator(self.seed, index, len(self))
        pieces: list[tuple[np.ndarray, int]] = []  # what is not torn apart, and how many of its last tokens are asked
        for text, is_answer in self._sequence(self.questions[index % len(self.questions)]):
            tokens = self.tokens_of[text]
            if is_answer:
                pieces.append((np.concatenate([pieces.pop()[0], tokens]), len(tokens)))
            else:
                pieces.append((tokens, 0))
        count = max(self.length - sum(len(tokens) for tokens, _ in pieces), 0)

        breaks = self.books.breaks
        stop = generator.choice(breaks[np.searchsorted(breaks, count) :])
        start = stop - count
        first, last = np.searchsorted(breaks, [start, stop], side="right")
        places = np.sort(generator.choice([start, *breaks[first:last]], size=len(pieces) - 1))
        excerpts = [(excerpt, 0) for excerpt in np.split(self.books.tokens[start:stop], places - start)]
        parts = [*chain.from_iterable(zip(excerpts, pieces, strict=True))]
        input_ids = torch.from_numpy(np.concatenate([tokens for tokens, _ in parts]).astype(np.int64))
        labels = [np.where(np.arange(len(tokens)) < len(tokens) - asked, IGNORED, tokens) for tokens, asked in parts]
        return {"input_ids": input_ids, "labels": torch.from_numpy(np.concatenate(labels).astype(np.int64))}


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


@torch.no_grad()
def streamed_accuracy(
    model: Any, dataset: Dataset[dict[str, torch.Tensor]], batch_size: int = 8, *, chunks_per_call: int = 16
) -> dict[str, float]:
    """What `answer_accuracy` gives for a data set whose samples may be of any length.

    Samples are read once, in pieces, with the state carried from piece to piece, and logits are computed only where
    something is asked: device memory does not depend on the length. An answer of several tokens is right when greedy
    search would have given it.

    Args:
        model: a `BakaForCausalLM`. It is read in eval mode; then each of its modules is back in the mode it was in.
        dataset: samples, of whatever lengths.
        batch_size: samples read side by side. Shorter ones end in tokens that nothing depends on.
        chunks_per_call: chunks of a piece.

    Raises:
        ValueError: a size is below 1, or there is a sample without an answer.
    """
    check_integers(batch_size=batch_size, chunks_per_call=chunks_per_call)
    size, count = chunks_per_call * model.config.chunk_size, len(dataset)  # type: ignore[arg-type]
    num_asked, num_right, num_solved = 0, 0, 0
    with in_eval_mode(model):
        for start in range(0, count, batch_size):
            samples = [dataset[index] for index in range(start, min(start + batch_size, count))]
            input_ids = pad_sequence([sample["input_ids"][:-1] for sample in samples], batch_first=True)
            targets = [sample["labels"][1:] for sample in samples]
            asked = pad_sequence(targets, batch_first=True, padding_value=IGNORED)
            is_right = torch.zeros_like(asked, dtype=torch.bool)
            state = model.new_cache(len(samples), static=model.device.type == "cuda")
            pieces = zip(input_ids.split(size, 1), asked.split(size, 1), is_right.split(size, 1), strict=True)
            for ids, labels, is_right_here in pieces:
                hidden = model.base_model(ids.to(model.device), past_key_values=state, use_cache=True)[0]
                where = (labels != IGNORED).nonzero(as_tuple=True)
                if len(where[0]):
                    said = model.lm_head(hidden[where]).argmax(-1)
                    is_right_here[where] = said.cpu() == labels[where]
            is_asked = asked != IGNORED
            for row in (~is_asked.any(1)).nonzero()[:1, 0].tolist():
                raise ValueError(f"expected labels in every sample, got none in sample {start + row}.")
            num_asked += int(is_asked.sum())
            num_right += int(is_right.sum())
            num_solved += int((is_right | ~is_asked).all(1).sum())
    return {"token_accuracy": num_right / num_asked, "sequence_accuracy": num_solved / count}


def _generator(seed: int, index: int, num_samples: int) -> np.random.Generator:
    """The random numbers of one sample."""
    if not 0 <= index < num_samples:
        raise IndexError(f"sample {index} of {num_samples}")
    return np.random.default_rng([seed, index])


def _encode(tokenizer: Any, sentences: Sequence[str]) -> list[list[int]]:
    """Every sentence begins with a space: it is tokenized as in the midst of a text."""
    spaced = [f" {sentence}" for sentence in sentences]
    return [encoding.ids for encoding in encode(tokenizer.backend_tokenizer, spaced, SENTENCES_AT_A_TIME)]


def _sentences(text: str) -> list[str]:
    """Cut after full stops, question and exclamation marks; white space becomes single spaces."""
    return [sentence for sentence in re.split(r"(?<=[.!?]) ", " ".join(text.split())) if sentence]


__all__ = [
    "BabiInBooksDataset",
    "BabiQuestion",
    "Books",
    "RecallDataset",
    "TaskDataset",
    "answer_accuracy",
    "guessing_accuracy",
    "read_babi",
    "streamed_accuracy",
    "tokenize_books",
]
