"""Lanes read back: what stands in the rows is every document, once, in the lane that a naive simulation says."""

import itertools
import math
import tracemalloc
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from helpers import random_tokens, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import PreTrainedTokenizerFast
from transformers.testing_utils import CaptureLogger

from baka_hf import data
from baka_hf.data import LaneDataset, LaneStats, StreamingLanes, pack_documents
from baka_hf.evaluation import evaluate_documents

Row = dict[str, Tensor]
PAD = 3

# Chunks of 5: one token, full chunks, a token more and less, and one that is longer than several steps.
LENGTHS = [1, 5, 6, 10, 4, 33, 1, 11, 15, 2, 8, 20, 7]


def documents_of(lengths: Sequence[int]) -> list[list[int]]:
    """No token occurs twice, so that a token tells where it is from."""
    ids = itertools.count()
    return [[next(ids) for _ in range(length)] for length in lengths]


def read_back(rows: Sequence[Row], num_lanes: int, chunk_size: int) -> tuple[list[list[list[int]]], dict[str, int]]:
    """The documents of each lane, in order, all promises about the rows checked; and positions counted."""
    counts = dict(num_documents=0, num_tokens=0, num_targets=0, num_padding=0, num_idle=0, num_idle_lanes=0)
    lanes: list[list[list[int]]] = []
    for lane in range(num_lanes):
        ids, positions, labels, targets = (
            torch.cat([row[name] for row in rows[lane::num_lanes]]).tolist()
            for name in ("input_ids", "position_ids", "labels", "shift_labels")
        )
        assert len(ids) % chunk_size == 0
        starts = [i for i, position in enumerate(positions) if position == 0]
        assert starts[0] == 0
        lanes.append([])
        for start, stop in itertools.pairwise([*starts, len(ids)]):
            assert start % chunk_size == 0
            assert positions[start:stop] == list(range(stop - start))
            document = [token for token, label in zip(ids[start:stop], labels[start:stop], strict=True) if label >= 0]
            padding = stop - start - len(document)
            if document:
                assert padding < chunk_size
                lanes[lane].append(document)
                counts["num_padding"] += padding
            else:
                assert padding == chunk_size
                counts["num_idle"] += padding
            assert ids[start:stop] == document + [PAD] * padding
            assert labels[start:stop] == document + [-100] * padding
            assert targets[start:stop] == document[1:] + [-100] * (padding + bool(document))
            counts["num_tokens"] += len(document)
            counts["num_targets"] += max(len(document) - 1, 0)
        real = [bool(label >= 0) for label in labels[::chunk_size]]
        assert real == sorted(real, reverse=True)  # idle only when nothing is left
        counts["num_documents"] += len(lanes[lane])
        counts["num_idle_lanes"] += not lanes[lane]
    return lanes, counts


def naive_lanes(lengths: Sequence[int], num_lanes: int, chunk_size: int) -> list[list[int]]:
    """Chunk by chunk, every lane that is free takes the next document: the documents' indices."""
    left, waiting = [0] * num_lanes, list(range(len(lengths)))
    lanes: list[list[int]] = [[] for _ in left]
    while waiting or any(left):
        for lane in range(num_lanes):
            if not left[lane] and waiting:
                lanes[lane].append(waiting.pop(0))
                left[lane] = math.ceil(lengths[lanes[lane][-1]] / chunk_size)
            left[lane] = max(left[lane] - 1, 0)
    return lanes


def assert_same_rows(actual: Sequence[Row], expected: Sequence[Row]) -> None:
    assert len(actual) == len(expected)
    for row, expected_row in zip(actual, expected, strict=True):
        assert row.keys() == expected_row.keys()
        for name, tensor in row.items():
            assert tensor.dtype == torch.int64 and torch.equal(tensor, expected_row[name]), name


def assert_places(rows: Sequence[Row], documents: Sequence[list[int]], num_lanes: int) -> None:
    """Where a lane stands: by the tokens that its rows have held until then."""
    for lane in range(num_lanes):
        read: list[int] = []
        for row in rows[lane::num_lanes]:
            read += row["labels"][row["labels"] >= 0].tolist()
            document, consumed = row["document"].tolist()
            if not read:
                assert (document, consumed) == (-1, 0)
            else:
                assert documents[document][consumed - 1] == read[-1]


def rows_of(lanes: LaneDataset | StreamingLanes) -> list[Row]:
    if isinstance(lanes, LaneDataset):
        return [lanes[index] for index in range(len(lanes))]
    return list(lanes)


def sizes(max_length: int = 30) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        dict(
            lengths=st.lists(st.integers(1, max_length), min_size=1, max_size=12),
            num_lanes=st.integers(1, 5),
            chunk_size=st.integers(1, 7),
            chunks_per_step=st.integers(1, 4),
        )
    )


@pytest.mark.smoke
@given(sizes(), st.booleans(), st.integers(1, 3), st.integers(0, 3))
def test_every_document_is_read_once_per_pass(size: dict[str, Any], shuffle: bool, num_epochs: int, epoch: int) -> None:
    documents, num_lanes, n = documents_of(size.pop("lengths")), size["num_lanes"], size["chunk_size"]
    dataset = LaneDataset(documents, **size, shuffle=shuffle, num_epochs=num_epochs, pad_token_id=PAD)
    dataset.set_epoch(epoch)
    rows = rows_of(dataset)
    length = size["chunks_per_step"] * n
    assert {tuple(tensor.shape) for row in rows for name, tensor in row.items() if name != "document"} == {(length,)}
    assert_places(rows, documents, num_lanes)
    lanes, counts = read_back(rows, num_lanes, n)
    assert dataset.stats == LaneStats(**counts, num_lanes=num_lanes, num_steps=dataset.num_steps)
    assert len(dataset) == len(rows) == dataset.num_steps * num_lanes

    # A lane has the same number of documents in every pass, and goes on with the next pass by itself.
    loads = [0] * num_lanes
    for index in range(num_epochs):
        part = [lane[index * len(lane) // num_epochs :][: len(lane) // num_epochs] for lane in lanes]
        assert sorted(itertools.chain(*part)) == documents
        pass_loads = [sum(math.ceil(len(document) / n) for document in lane) for lane in part]
        longest = max(math.ceil(len(document) / n) for document in documents)
        assert max(pass_loads) <= sum(pass_loads) / num_lanes + longest
        loads = [load + more for load, more in zip(loads, pass_loads, strict=True)]
        if not shuffle:
            naive = naive_lanes([len(document) for document in documents], num_lanes, n)
            assert part == [[documents[document] for document in lane] for lane in naive]
    assert dataset.num_steps == math.ceil(max(loads) / size["chunks_per_step"])


def test_the_longest_documents_are_dealt_first() -> None:
    """8 | 5, 3 and not 5, 3 | 8, as the greedy rule would have it."""
    documents = documents_of([5, 3, 8])
    assert LaneDataset(documents, 2, 1).num_steps == 8
    assert LaneDataset(documents, 2, 1, shuffle=False).num_steps == 11


def test_epochs_differ_and_come_again() -> None:
    documents = documents_of(LENGTHS)

    def order(epoch: int, **options: Any) -> list[list[list[int]]]:
        dataset = LaneDataset(documents, 3, 5, 2, pad_token_id=PAD, **options)
        length, stats = len(dataset), dataset.stats
        dataset.set_epoch(epoch)
        assert (dataset.epoch, len(dataset), dataset.stats) == (epoch, length, stats)
        return read_back(rows_of(dataset), 3, 5)[0]

    orders = [order(epoch, seed=seed) for epoch in range(3) for seed in range(3)]
    assert all(one != another for one, another in itertools.combinations(orders, 2))
    assert order(2, seed=1) == orders[7]
    assert order(0, shuffle=False) == order(1, shuffle=False)

    # Not only the order within a lane: among documents of as many chunks, another lane gets them.
    lanes = {tuple(tuple(sorted(document[0] for document in lane)) for lane in order) for order in orders}
    assert len(lanes) > 1

    passes = order(0, num_epochs=2)
    assert any(lane[: len(lane) // 2] != lane[len(lane) // 2 :] for lane in passes)


def test_an_epoch_can_be_set_back() -> None:
    dataset = LaneDataset(documents_of(LENGTHS), 3, 5)
    first = rows_of(dataset)
    dataset.set_epoch(5)
    list(rows_of(dataset))
    dataset.set_epoch(0)
    assert_same_rows(rows_of(dataset), first)


def test_rows_are_random_access() -> None:
    dataset = LaneDataset(documents_of(LENGTHS), 3, 5, 2, num_epochs=2)
    rows = rows_of(dataset)
    order = torch.randperm(len(rows)).tolist()
    assert_same_rows([dataset[index] for index in order], [rows[index] for index in order])
    assert_same_rows(list(dataset), rows)  # an IndexError ends it


@pytest.mark.parametrize("persistent", [False, True])
def test_data_loader_workers(persistent: bool) -> None:
    """Persistent workers keep their copy of the dataset, and the new epoch reaches it nevertheless."""
    dataset = LaneDataset(documents_of(LENGTHS), 3, 5, 2)
    loader = DataLoader(dataset, batch_size=3, num_workers=2, persistent_workers=persistent)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        expected = list(DataLoader(dataset, batch_size=3))
        assert len(expected) == dataset.num_steps
        assert_same_rows(list(loader), expected)


def test_documents_may_be_arrays_and_tensors() -> None:
    kinds: list[Any] = [
        list,
        tuple,
        torch.tensor,
        lambda document: np.array(document, np.uint16),
        lambda document: torch.tensor(document, dtype=torch.int32),
    ]
    documents = documents_of(LENGTHS)
    mixed = tuple(kinds[index % len(kinds)](document) for index, document in enumerate(documents))
    assert_same_rows(rows_of(LaneDataset(mixed, 3, 5)), rows_of(LaneDataset(documents, 3, 5)))
    assert_same_rows(rows_of(StreamingLanes(mixed, 3, 5)), rows_of(StreamingLanes(documents, 3, 5)))


def dataset_of(documents: list[list[int]], value: str = "int64", kind: Any = datasets.List) -> datasets.Dataset:
    columns = {"title": [str(document[0]) for document in documents], "input_ids": documents}
    features = {"title": datasets.Value("string"), "input_ids": kind(datasets.Value(value))}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.mark.parametrize(
    "change",
    [
        lambda dataset: dataset,
        lambda dataset: dataset.shuffle(seed=1),
        lambda dataset: dataset.select([4, 2, 11, 11, 0]),
        lambda dataset: dataset.shuffle(seed=1).select(range(3, 9)),
        lambda dataset: dataset.select(range(3, 9)),
        lambda dataset: dataset.shard(2, 1, contiguous=True).flatten_indices(),
        lambda dataset: datasets.concatenate_datasets([dataset.select(range(2, 5)), dataset]),
        lambda dataset: dataset.with_format("torch"),
        lambda dataset: dataset.with_format("numpy", columns=["title"]),
        lambda dataset: dataset.cast_column("input_ids", datasets.List(datasets.Value("uint16"))),
        lambda dataset: dataset.cast_column("input_ids", datasets.LargeList(datasets.Value("int32"))),
    ],
)
def test_a_dataset_is_read_as_a_list(change: Any, tmp_path: Any) -> None:
    dataset_of(documents_of(LENGTHS)).save_to_disk(tmp_path, num_shards=3)
    dataset = change(datasets.load_from_disk(tmp_path))
    documents = [row["input_ids"] for row in dataset.with_format(None)]
    for options in ({}, dict(shuffle=False)):
        lanes, expected = (LaneDataset(source, 3, 5, 2, **options) for source in (dataset, documents))
        assert lanes.stats == expected.stats
        assert_same_rows(rows_of(lanes), rows_of(expected))


def test_a_dataset_in_workers() -> None:
    dataset = LaneDataset(dataset_of(documents_of(LENGTHS)).shuffle(seed=0), 3, 5)
    assert_same_rows(list(DataLoader(dataset, batch_size=3, num_workers=2)), list(DataLoader(dataset, batch_size=3)))


@pytest.mark.parametrize(
    "source",
    [lambda ids: [ids], lambda ids: [ids.tolist()], lambda ids: datasets.Dataset.from_dict({"input_ids": [ids]})],
)
def test_a_row_of_a_book_costs_a_row(source: Any) -> None:
    dataset = LaneDataset(source(np.arange(1_000_000)), 1, 50)
    dataset[0]
    tracemalloc.start()
    try:
        row = dataset[15_000]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert row["input_ids"].tolist() == row["position_ids"].tolist() == list(range(750_000, 750_050))
    assert peak < 100_000


def test_more_lanes_than_documents() -> None:
    with CaptureLogger(data.logger) as captured:
        dataset = LaneDataset(documents_of([7, 2]), 5, 3, 2, pad_token_id=PAD)
    assert "3 of 5 lanes have nothing to read: there are 2 documents." in captured.out
    lanes, _ = read_back(rows_of(dataset), 5, 3)
    assert [len(lane) for lane in lanes] == [1, 1, 0, 0, 0]
    assert dataset.stats.num_idle_lanes == 3
    idle = dataset[len(dataset) - 1]
    assert idle["position_ids"].tolist() == [0, 1, 2, 0, 1, 2]
    assert idle["input_ids"].tolist() == [PAD] * 6
    assert idle["labels"].tolist() == idle["shift_labels"].tolist() == [-100] * 6


def test_stats_as_text() -> None:
    stats = LaneDataset(documents_of([1234, 4]), 3, 10).stats
    assert str(stats) == (
        "2 documents with 1,238 tokens in 3 lanes (1 without a document) × 124 steps; padding 1.0%, idle 66.4%"
    )
    assert stats.padding_share == pytest.approx(12 / 1250) and stats.idle_share == pytest.approx(2470 / 3720)
    assert repr(LaneDataset([[1]] * 3, 3, 4, 2)) == "LaneDataset(num_lanes=3, chunk_size=4, chunks_per_step=2, epoch=0)"


def test_processes_keep_their_lanes() -> None:
    """4 lanes on 2 processes with 2 rows each, as Accelerate shards the batches of either kind."""
    documents = documents_of(LENGTHS)
    dataset, stream = LaneDataset(documents, 4, 5, 2), StreamingLanes(documents, 4, 5, 2)
    for process in range(2):
        batches = BatchSampler(SequentialSampler(dataset), batch_size=2, drop_last=False)
        indices = list(BatchSamplerShard(batches, num_processes=2, process_index=process))
        assert indices == [[4 * step + 2 * process, 4 * step + 2 * process + 1] for step in range(dataset.num_steps)]
        rows = list(IterableDatasetShard(stream, batch_size=2, num_processes=2, process_index=process))
        assert_same_rows(rows, [row for index, row in enumerate(stream) if index % 4 // 2 == process])


@pytest.mark.parametrize("lanes_class", [LaneDataset, StreamingLanes])
def test_a_model_reads_lanes_as_it_reads_documents(lanes_class: Any) -> None:
    """State goes on from row to row and starts anew at position 0, within a row and at its beginning."""
    model = tiny_model(tiny_config())
    n, vocab_size = model.config.chunk_size, model.config.vocab_size
    documents = [random_tokens(model.config, length, seed=seed) for seed, length in enumerate(LENGTHS)]
    expected = evaluate_documents(model, documents, progress=False)
    nats, cache = 0.0, model.new_cache(3)
    for batch in DataLoader(lanes_class(documents, 3, n, 2, vocab_size=vocab_size), batch_size=3):
        cache.reset_rows(batch["position_ids"][:, 0] == 0)
        with torch.no_grad():
            logits = model(batch["input_ids"], position_ids=batch["position_ids"], cache=cache).logits
        nats += float(F.cross_entropy(logits.mT, batch["shift_labels"], ignore_index=-100, reduction="sum"))
    assert nats / expected["num_tokens"] == pytest.approx(expected["loss"], rel=1e-10)


@pytest.mark.smoke
@given(sizes())
def test_a_stream_goes_to_the_lane_that_is_free_first(size: dict[str, Any]) -> None:
    lengths, num_lanes, n = size.pop("lengths"), size["num_lanes"], size["chunk_size"]
    documents = documents_of(lengths)
    stream = StreamingLanes(documents, **size, pad_token_id=PAD)
    rows = rows_of(stream)
    lanes, counts = read_back(rows, num_lanes, n)
    naive = naive_lanes(lengths, num_lanes, n)
    assert lanes == [[documents[document] for document in lane] for lane in naive]
    loads = [sum(math.ceil(lengths[document] / n) for document in lane) for lane in naive]
    assert len(rows) == num_lanes * math.ceil(max(loads) / size["chunks_per_step"])
    assert stream.stats == LaneStats(**counts, num_lanes=num_lanes, num_steps=len(rows) // num_lanes)

    assert_places(rows, documents, num_lanes)
    assert_same_rows(rows, rows_of(LaneDataset(documents, **size, shuffle=False, pad_token_id=PAD)))


def positions_after(rows: Sequence[Row], num_lanes: int, step: int) -> Tensor:
    """What a trainer saves after `step` steps."""
    if step == 0:
        return torch.tensor([[-1, 0]] * num_lanes)
    return torch.stack([row["document"] for row in rows[(step - 1) * num_lanes : step * num_lanes]])


@settings(max_examples=settings.default.max_examples // 3)  # each resumes after every step
@given(sizes())
def test_a_stream_resumes_anywhere(size: dict[str, Any]) -> None:
    documents, num_lanes = documents_of(size.pop("lengths")), size["num_lanes"]
    tokenized: list[int] = []

    def tokenize(index: int) -> list[int]:
        tokenized.append(index)
        return documents[index]

    rows = rows_of(StreamingLanes(range(len(documents)), **size, tokenize=tokenize))
    assert tokenized == list(range(len(documents)))
    for step in range(len(rows) // num_lanes + 1):
        stream = StreamingLanes(range(len(documents)), **size, tokenize=tokenize)
        positions = positions_after(rows, num_lanes, step)
        stream.resume(positions)
        tokenized.clear()
        following = rows[step * num_lanes :]
        assert_same_rows(rows_of(stream), following or rows)  # after the last row, the next epoch
        assert stream.epoch == (not following)
        last = sorted(index for index in positions[:, 0].tolist() if index >= 0)
        rest = range(max(last, default=-1) + 1 if following else 0, len(documents))
        assert tokenized == last + list(rest)  # what was read is not replayed
    assert_same_rows(rows_of(stream), rows)  # only the first iteration resumes


def test_resuming_with_a_worker_is_done_once() -> None:
    rows = rows_of(StreamingLanes(documents_of(LENGTHS), 3, 5))
    stream = StreamingLanes(documents_of(LENGTHS), 3, 5)
    stream.resume(positions_after(rows, 3, 2))
    loader = DataLoader(stream, batch_size=None, num_workers=1)
    assert_same_rows(list(loader), rows[6:])
    assert_same_rows(list(loader), rows)


def test_a_stream_holds_documents_in_progress_only() -> None:
    taken: list[int] = []

    def generate() -> Iterator[list[int]]:
        for index, length in enumerate([6, 16, 6, 6, 4]):
            taken.append(index)
            yield [index] * length

    taken_by_row = [len(taken) for _ in StreamingLanes(generate(), 2, 5)]
    assert taken_by_row[::2] == [2, 2, 3, 3, 5, 5]


def numbers_tokenizer() -> PreTrainedTokenizerFast:
    """A number, written out, is the token."""
    words = Tokenizer(models.WordLevel({str(number): number for number in range(sum(LENGTHS))}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def test_a_stream_of_dicts_texts_and_a_tokenizer_that_gives_dicts() -> None:
    documents = documents_of(LENGTHS)
    expected = rows_of(StreamingLanes(documents, 3, 5))
    texts = [" ".join(map(str, document)) for document in documents]
    sources: list[tuple[Any, Any]] = [
        ([{"input_ids": document, "title": "x"} for document in documents], None),
        (dataset_of(documents), None),
        (dataset_of(documents).to_iterable_dataset(num_shards=2), None),
        (texts, lambda text: [int(token) for token in text.split()]),
        (texts, lambda text: {"input_ids": np.array(text.split(), int)}),
        ([{"text": text} for text in texts], lambda example: torch.tensor([*map(int, example["text"].split())])),
        (texts, numbers_tokenizer()),
        (datasets.Dataset.from_dict({"title": texts, "text": texts}).to_iterable_dataset(), numbers_tokenizer()),
    ]
    for source, tokenize in sources:
        assert_same_rows(rows_of(StreamingLanes(source, 3, 5, tokenize=tokenize)), expected)


def test_a_stream_tells_its_source_the_epoch() -> None:
    source = dataset_of(documents_of(LENGTHS)).to_iterable_dataset().shuffle(seed=0, buffer_size=100)
    stream = StreamingLanes(source, 3, 5, pad_token_id=PAD)
    epochs = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        assert stream.epoch == epoch
        lanes, _ = read_back(rows_of(stream), 3, 5)
        assert sorted(itertools.chain(*lanes)) == documents_of(LENGTHS)
        epochs.append(lanes)
    assert epochs[0] == epochs[2] != epochs[1]
    StreamingLanes([[1]], 1, 1).set_epoch(1)  # which the source need not care about


def test_a_stream_has_one_worker_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = StreamingLanes(documents_of(LENGTHS), 3, 5, 2)
    expected = list(DataLoader(stream, batch_size=3))
    assert_same_rows(list(DataLoader(stream, batch_size=3, num_workers=1)), expected)
    # Not in real workers, for which PyTorch waits 10 seconds when a stream has raised.
    monkeypatch.setattr(data, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
    with pytest.raises(ValueError, match="expected at most one DataLoader worker, got 2: lanes go on from batch to"):
        next(iter(stream))


def test_a_stream_counts_what_it_has_yielded() -> None:
    stream = StreamingLanes([[1] * 4, [2] * 3], 3, 2, 2)
    rows = iter(stream)
    assert stream.stats == LaneStats(0, 0, 0, 0, 0, 3, 3, 0)
    assert stream.stats.padding_share == stream.stats.idle_share == 0
    next(rows)
    assert stream.stats == LaneStats(1, 4, 3, 0, 0, 3, 2, 0)
    assert list(rows) and stream.stats == LaneStats(2, 7, 5, 1, 4, 3, 1, 1)
    assert repr(stream) == "StreamingLanes(num_lanes=3, chunk_size=2, chunks_per_step=2, epoch=0)"


@pytest.mark.parametrize("name", ["num_lanes", "chunk_size", "chunks_per_step", "num_epochs"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, None, "2"])
def test_sizes_are_positive_integers(name: str, value: Any) -> None:
    options = dict(num_lanes=1, chunk_size=1, chunks_per_step=1) | {name: value}
    with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1, got {value!r}"):
        LaneDataset([[1]], **options)
    if name != "num_epochs":
        with pytest.raises(ValueError, match=f"`{name}`"):
            StreamingLanes([[1]], **options)


BAD_DOCUMENTS: list[tuple[Any, str]] = [
    ([[1, 2], []], "document 1 is empty"),
    ([[1, 2], [3], [4, 19]], "document 2: expected token ids from 0 to 18, got 19"),
    ([[1, 2], [-1, 3]], "document 1: expected token ids from 0 to 18, got -1"),
    ([[1, 2], [0.5, 1.0]], "document 1: expected a sequence of token ids, got torch.float32"),
    ([np.ones(3)], "document 0: expected a sequence of token ids, got torch.float64"),
    ([[True, False]], "document 0: expected a sequence of token ids, got torch.bool"),
    ([[[1, 2]]], r"document 0: expected a sequence of token ids, got torch.int64 of shape \(1, 2\)"),
    (["text"], "document 0: expected a sequence of token ids"),
    ([[1], 2], "document 1: expected a sequence of token ids"),
    (torch.tensor([1, 2, 3]), "document 0: expected a sequence of token ids"),
]


@pytest.mark.parametrize("lanes_class", [LaneDataset, StreamingLanes])
@pytest.mark.parametrize(("documents", "message"), BAD_DOCUMENTS)
def test_bad_documents(lanes_class: Any, documents: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of(lanes_class(documents, 2, 5, vocab_size=19))


@pytest.mark.smoke
@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 20), st.sampled_from([list, np.array, torch.tensor]))
def test_packed_documents(lengths: list[int], num_tokens: int, kind: Any) -> None:
    """All tokens in order; a piece would be too short without its last document, and only the last piece is."""
    documents = documents_of(lengths)
    given_ids = [kind(document) for document in documents]
    pieces = pack_documents(({"input_ids": ids} for ids in given_ids) if num_tokens % 2 else given_ids, num_tokens)
    assert list(itertools.chain(*pieces)) == list(itertools.chain(*documents))
    ends = {0, *itertools.accumulate(lengths)}
    for piece, end in zip(pieces, itertools.accumulate(map(len, pieces)), strict=True):
        assert end in ends and (len(piece) >= num_tokens or end == sum(lengths))
        last_document = end - max(ends - {*range(end, sum(lengths) + 1)})
        assert len(piece) - last_document < num_tokens


def test_packed_documents_leave_little_padding() -> None:
    """Short ones of 100 tokens in chunks of 512: a lane reads a fifth of what it would."""
    documents = [np.full(100, number, np.uint16) for number in range(400)]
    pieces = pack_documents(documents, 5120)
    assert {piece.dtype for piece in pieces} == {np.dtype(np.int32)}
    assert LaneDataset(documents, 1, 512).num_steps == 400
    assert LaneDataset(pieces, 1, 512).num_steps == 7 * 11 + 8


@pytest.mark.parametrize(
    ("documents", "num_tokens", "message"),
    [
        ([[1]], 0, "`num_tokens` must be an integer of at least 1, got 0"),
        ([[1], []], 2, "document 1 is empty: expected at least one token"),
        ([[1.5]], 2, "document 0: expected a sequence of token ids, got torch.float32"),
        (["text"], 2, "document 0: expected a sequence of token ids"),
        ([[1, -1]], 2, "document 0: expected token ids of at least 0, got -1"),
        ([{"text": [1]}], 2, 'document 0: expected a dict with "input_ids"'),
    ],
)
def test_what_cannot_be_packed(documents: Any, num_tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_documents(documents, num_tokens)


def test_ids_are_never_negative() -> None:
    for lanes_class in (LaneDataset, StreamingLanes):
        with pytest.raises(ValueError, match="document 0: expected token ids of at least 0, got -1"):
            rows_of(lanes_class([[1, -1]], 1, 5))


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "expected at least one document, got none"),
        (iter([[1]]), "expected a sequence of documents, got list_iterator. `StreamingLanes` takes any iterable"),
        ({"train": [[1]]}, "expected a sequence of documents, got dict"),
        ([{"input_ids": [1]}], "document 0: expected a sequence of token ids: got dict"),
        (dataset_of([[1]]).rename_column("input_ids", "ids"), r"\"input_ids\", got columns \['title', 'ids'\]"),
        (dataset_of([[1]], "float32"), 'expected lists of integers in column "input_ids", got list<.*float>'),
        (datasets.Dataset.from_dict({"input_ids": [1, 2]}), 'lists of integers in column "input_ids", got int32'),
        (datasets.Dataset.from_dict({"input_ids": [[1], []]}), "document 1 is empty"),
        (datasets.Dataset.from_dict({"input_ids": [[1], [], None]}).select([2, 0]), "document 0 is empty"),
        (dataset_of([[1]]).select([]), "expected at least one document, got none"),
    ],
)
def test_bad_documents_of_a_dataset(documents: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LaneDataset(documents, 2, 5)


def test_a_stream_may_be_empty_and_its_dicts_may_not() -> None:
    assert rows_of(StreamingLanes([], 2, 5)) == []
    with pytest.raises(ValueError, match=r"document 1: expected a dict with \"input_ids\", got \['text'\]"):
        rows_of(StreamingLanes([{"input_ids": [1]}, {"text": "x"}], 2, 5))
    with pytest.raises(ValueError, match=r"document 0: expected a dict with \"text\", got \['title'\]"):
        rows_of(StreamingLanes([{"title": "x"}], 2, 5, tokenize=numbers_tokenizer()))


def test_rows_out_of_range() -> None:
    dataset = LaneDataset([[1, 2]], 2, 5)
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"expected a row from 0 to 1, got {index}"):
            dataset[index]


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[0, 5]] * 3, r"expected positions of 2 lanes, of shape \[2, 2\], got \[3, 2\]"),
        ([[0, None], [1, 7]], r"expected positions of lanes, \[num_lanes, 2\], got "),
        ([0, 5], r"expected positions of 2 lanes, of shape \[2, 2\], got \[2\]"),
        ([[1, 5], [1, 5]], r"a document of its own for every lane, got documents \[1, 1\]"),
        ([[0, 5], [1, 7]], "document 1 has 6 tokens, 7 of which were read before"),
        ([[0, 5], [3, 1]], "the documents end after 3, but document 3 was read before"),
    ],
)
def test_positions_of_other_lanes_or_documents(positions: Any, message: str) -> None:
    stream = StreamingLanes([[1] * 10, [2] * 6, [3]], 2, 5)
    with pytest.raises(ValueError, match=message):
        stream.resume(np.array(positions))
        list(stream)
