"""Texts in files to documents of tokens: made once, kept in a file, and cut into windows."""

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from helpers import byte_tokenizer

from baka_hf.texts import WindowDataset, load_tokens, read_documents

LINES = ["one", "naïve 🐘", "", "a longer line of text"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(LINES))
    (tmp_path / "lines.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (tmp_path / "whole.txt").write_text("first\nsecond\n", encoding="utf-8")
    tokenizer = byte_tokenizer(bos_token="<|endoftext|>").backend_tokenizer.to_str()
    (tmp_path / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    (tmp_path / "tokenizer.json.xz").write_bytes(lzma.compress(tokenizer.encode()))
    return tmp_path


def test_lines_and_files_are_documents(folder: Path) -> None:
    assert read_documents(str(folder / "lines.jsonl.xz")) == LINES
    assert read_documents(str(folder / "whole.txt")) == ["first\nsecond\n"]
    for line, message in (
        ('{"txt": "a"}', 'line 2: expected an object with a "text", got .*txt'),
        ("[1]", 'line 2: expected an object with a "text"'),
        ("{", 'line 2: expected an object with a "text"'),
        ('{"text": 3}', 'line 2: expected "text" to be a string, got 3'),
    ):
        (folder / "wrong.jsonl").write_text(f'{{"text": "a"}}\n{line}\n')
        with pytest.raises(ValueError, match=message):
            read_documents(str(folder / "wrong.jsonl"))


@pytest.mark.parametrize("tokenizer", ["tokenizer.json", "tokenizer.json.xz"])
def test_tokens_are_made_once(folder: Path, tokenizer: str) -> None:
    """A token is a byte; the file is all that is needed later; other texts are not taken for these."""
    lines, whole = (str(folder / name) for name in ("lines.jsonl.xz", "whole.txt"))
    given = folder / "tokens.npz", {"train": [lines, whole], "valid": [lines]}, str(folder / tokenizer)
    made = load_tokens(*given, num_chars={"valid": 7})
    encode = byte_tokenizer(bos_token="<|endoftext|>")
    end = encode.bos_token_id
    texts = {"train": [*LINES, "first\nsecond\n"], "valid": [text[:7] for text in LINES]}
    for name, documents in texts.items():
        expected = [[end, *encode(text, add_special_tokens=False).input_ids] for text in documents]
        assert [document.tolist() for document in made.documents[name]] == expected
        assert made.num_bytes[name] == sum(len(text.encode()) for text in documents)
    assert made.vocab_size == len(encode) and made.end_of_text_id == end
    assert made.documents["train"][0].dtype == np.uint16

    for file in (lines, whole, folder / tokenizer):
        Path(file).unlink()
    again = load_tokens(*given, num_chars={"valid": 7})
    assert [d.tolist() for d in again.documents["train"]] == [d.tolist() for d in made.documents["train"]]
    with pytest.raises(ValueError, match=r"expected tokens made of .*\"characters\": {}.* found .*{\"valid\": 7}"):
        load_tokens(*given)


def test_a_tokenizer_without_the_token(folder: Path) -> None:
    texts = {"train": [str(folder / "whole.txt")]}
    with pytest.raises(ValueError, match="token `end_of_text`='<none>', got "):
        load_tokens(folder / "tokens.npz", texts, str(folder / "tokenizer.json"), end_of_text="<none>")
    assert not (folder / "tokens.npz").exists()


def test_windows_are_the_documents_end_to_end() -> None:
    """Each once in a pass, in another order in every one and with another seed; what is left at the end is dropped."""
    documents = [np.arange(10 * i, 10 * i + length, dtype=np.uint16) for i, length in enumerate((3, 7, 1, 10, 9))]
    windows = WindowDataset(documents, context=4, seed=1, num_epochs=2)
    read = [int(token) for window in windows for token in window["input_ids"]]
    assert len(windows) == 60 // 4 and all((window["labels"] == window["input_ids"]).all() for window in windows)
    orders = []
    for part in (read[:30], read[30:]):
        assert sorted(part) == sorted(token for document in documents for token in document.tolist())
        starts = [token // 10 for token in part if token % 10 == 0]
        assert part == [token for start in starts for token in documents[start].tolist()]
        orders.append(starts)
    assert orders[0] != orders[1]
    other = WindowDataset(documents, context=4, seed=2)
    assert len(other) == 30 // 4 and other[0]["input_ids"].tolist() != read[:4]
    with pytest.raises(ValueError, match="`context` must be an integer of at least 1, got 0"):
        WindowDataset(documents, 0)
