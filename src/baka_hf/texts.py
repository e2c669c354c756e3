"""Texts in files to documents of tokens, once: a file keeps them for all processes and runs that read them.

tokens = load_tokens("tokens.npz", {"train": ["train.jsonl.xz"], "books": ["books.jsonl"]}, "tokenizer.json")
lanes = LaneDataset(tokens.documents["train"], num_lanes=8, chunk_size=512)
"""

import json
import lzma
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from tokenizers import Tokenizer
from torch.utils.data import Dataset
from transformers import AutoTokenizer

from .configuration_baka import check_integers

DOCUMENTS_AT_A_TIME = 1000  # are tokenized


@dataclass(frozen=True)
class Tokens:
    """Documents of several texts, each an array of token ids that begins with `end_of_text_id`."""

    vocab_size: int
    end_of_text_id: int
    documents: dict[str, list[np.ndarray]]  # of each text, uint16 or int32
    num_bytes: dict[str, int]  # of each text in UTF-8


def load_tokens(
    path: str | os.PathLike,
    texts: Mapping[str, Sequence[str]],
    tokenizer: str,
    *,
    end_of_text: str = "<|endoftext|>",
    num_chars: Mapping[str, int] | None = None,
) -> Tokens:
    """The tokens that a file keeps. If there is none, the first process that comes makes it, and others wait.

    Args:
        path: of the file.
        texts: for each text the files that it is in: .jsonl, a document a line, in "text"; or a document a file. All of
            them may be compressed, with .xz behind the name.
        tokenizer: a tokenizer.json, which may be compressed too, or the folder or the Hub's name of a fast tokenizer.
        end_of_text: the token that stands before every document.
        num_chars: for some texts, how many characters of each document are read.

    Raises:
        ValueError: the file has tokens of other texts, told by their names; there is no such token.
        OSError: a file cannot be read.
    """
    names = {name: [Path(file).name for file in files] for name, files in texts.items()}
    about = {"texts": names, "tokenizer": Path(tokenizer).name, "end": end_of_text, "characters": dict(num_chars or {})}
    made_of = json.dumps(about, sort_keys=True)
    tokenized = _tokenized(texts, tokenizer, end_of_text, num_chars or {})
    arrays = keep_arrays(path, lambda: dict(tokenized, made_of=made_of))
    if str(arrays["made_of"]) != made_of:
        raise ValueError(f"expected tokens made of {made_of} in {path}, found {arrays['made_of']}.")
    return Tokens(
        vocab_size=int(arrays["vocab_size"]),
        end_of_text_id=int(arrays["end_of_text_id"]),
        documents={name: np.split(arrays[f"{name}: tokens"], arrays[f"{name}: ends"][:-1]) for name in texts},
        num_bytes={name: int(arrays[f"{name}: bytes"]) for name in texts},
    )


def keep_arrays(path: str | os.PathLike, make: Callable[[], Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """What a file (.npz) keeps: what `make` gives to the first process that comes, while others wait."""
    with FileLock(f"{os.fspath(path)}.lock"):
        if not Path(path).exists():
            part, made = f"{os.fspath(path)}.part", make()
            with open(part, "wb") as file:
                np.savez(file, **made)
            os.replace(part, path)
    with np.load(path) as arrays:
        return dict(arrays)


def encode(tokenizer: Any, texts: Sequence[str], at_a_time: int) -> Iterator[Any]:
    """Encodings by a tokenizer of `tokenizers`, without special tokens; of so many `at_a_time` by all cores."""
    for start in range(0, len(texts), at_a_time):
        yield from tokenizer.encode_batch_fast(texts[start : start + at_a_time], add_special_tokens=False)


def read_documents(path: str) -> list[str]:
    """The documents in a file: the "text" of each line of a .jsonl, or else all of it; .xz is unpacked.

    Raises:
        ValueError: a line of a .jsonl is something else.
    """
    open_file: Any = lzma.open if path.endswith(".xz") else open
    with open_file(path, "rt", encoding="utf-8") as file:
        if path.removesuffix(".xz").endswith(".jsonl"):
            return [_text_in(line, f"{path}, line {number}") for number, line in enumerate(file, 1)]
        return [file.read()]


def _text_in(line: str, place: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f'{place}: expected an object with a "text", got {reprlib.repr(line)}.') from error
    if not isinstance(text, str):
        raise ValueError(f'{place}: expected "text" to be a string, got {reprlib.repr(text)}.')
    return text


def _tokenized(
    texts: Mapping[str, Sequence[str]], tokenizer: str, end_of_text: str, num_chars: Mapping[str, int]
) -> Iterator[tuple[str, Any]]:
    """The arrays of the file."""
    if tokenizer.removesuffix(".xz").endswith(".json"):
        fast = Tokenizer.from_str(*read_documents(tokenizer))
    else:
        fast = AutoTokenizer.from_pretrained(tokenizer).backend_tokenizer
    end, vocab_size = fast.token_to_id(end_of_text), fast.get_vocab_size()
    if end is None:
        raise ValueError(f"expected a tokenizer with the token `end_of_text`={end_of_text!r}, got {tokenizer!r}.")
    yield from (("end_of_text_id", end), ("vocab_size", vocab_size))
    for name, paths in texts.items():
        documents = [text[: num_chars.get(name)] for path in paths for text in read_documents(path)]
        pieces = [
            np.array([end, *encoding.ids], np.uint16 if vocab_size <= 2**16 else np.int32)
            for encoding in encode(fast, documents, DOCUMENTS_AT_A_TIME)
        ]
        yield f"{name}: tokens", np.concatenate(pieces)
        yield f"{name}: ends", np.cumsum([len(piece) for piece in pieces])
        yield f"{name}: bytes", sum(len(text.encode()) for text in documents)


class WindowDataset(Dataset[dict[str, torch.Tensor]]):
    """Samples for a model without a state: documents end to end, cut into windows; what is left at the end is dropped.

    Yields `input_ids` and `labels`, the same int64 [context].

    Args:
        documents: arrays of token ids.
        context: tokens of a window.
        seed: of the order of the documents, drawn anew in every pass.
        num_epochs: passes over the documents.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, documents: Sequence[np.ndarray], context: int, seed: int = 0, num_epochs: int = 1):
        check_integers(context=context, num_epochs=num_epochs)
        generator = np.random.default_rng(seed)
        order = [index for _ in range(num_epochs) for index in generator.permutation(len(documents))]
        tokens = np.concatenate([documents[index] for index in order])
        self.windows = tokens[: len(tokens) // context * context].reshape(-1, context)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.from_numpy(self.windows[index].astype(np.int64))
        return {"input_ids": tokens, "labels": tokens}


__all__ = ["Tokens", "WindowDataset", "load_tokens", "read_documents"]
