"""Documents to lanes: the rows of a batch read document after document, and a model's memory goes on from step to step.

    dataset = LaneDataset(documents, num_lanes=8, chunk_size=512, chunks_per_step=4)
    print(dataset.stats)
    loader = DataLoader(dataset, batch_size=8)  # in order: row i of a batch goes on where row i of the last one ended

A lane is a row of the batch. Where one of its documents ends, the next begins at the following chunk boundary, inside
the same step, so all rows stay in step, which is the model's fast path. `LaneDataset` knows all documents beforehand
and balances the lanes; `StreamingLanes` takes them as they come. Both yield one lane's share of one step, L =
`chunks_per_step` · `chunk_size` positions, as a dict of int64 tensors, [L] but for the last:

    input_ids       the tokens. Padding fills up a document's last chunk and nothing else
    position_ids    counted from 0 at a document's first token, also from row to row. A row that begins with 0 begins a
                    document, and the state of its lane starts anew there
    labels          `input_ids`, -100 where there is no document
    shift_labels    the next token of the same document, which may lie in the lane's next row; -100 where there is none
    document        [2] where the lane stands when the row ends: the index of its last document, and how many tokens of
                    that were read, all of them if it is finished; (-1, 0) before the first

A lane without documents idles: each chunk of it is a document of padding without labels, so that every process reads
as much as every other. There is no attention mask, because nothing ever sees the padding: it comes after all tokens of
its document, is never a target, and the state starts anew right after it.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase
from transformers.utils import is_datasets_available, logging

from .configuration_baka import check_integers
from .functions_baka import as_tensor
from .loss_baka import IGNORED

if is_datasets_available():
    import datasets  # type: ignore[import-untyped]
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.compute as pc  # type: ignore[import-untyped]

logger = logging.get_logger(__name__)

Row = dict[str, torch.Tensor]

# A progress bar that is gone before it can be read is only noise.
SECONDS_UNTIL_PROGRESS = 2.0


@dataclass(frozen=True)
class LaneStats:
    """What lanes read, in positions of the batch unless it says otherwise. Several passes count several times."""

    num_documents: int
    num_tokens: int  # of all documents; none is left out
    num_targets: int  # tokens that are predicted: all but the first of each document
    num_padding: int  # fills up the documents' last chunks
    num_idle: int  # in lanes that have no document left
    num_lanes: int
    num_idle_lanes: int  # lanes that never get a document
    num_steps: int

    @property
    def padding_share(self) -> float:
        """Of the positions where documents are read, how many are padding."""
        return self.num_padding / max(self.num_tokens + self.num_padding, 1)

    @property
    def idle_share(self) -> float:
        """Of all positions, how many are in idle lanes."""
        return self.num_idle / max(self.num_tokens + self.num_padding + self.num_idle, 1)

    def __str__(self) -> str:
        idle_lanes = f" ({self.num_idle_lanes} without a document)" if self.num_idle_lanes else ""
        return (
            f"{self.num_documents:,} documents with {self.num_tokens:,} tokens in {self.num_lanes} lanes{idle_lanes} × "
            f"{self.num_steps:,} steps; padding {self.padding_share:.1%}, idle {self.idle_share:.1%}"
        )


class _Lanes:
    """What both kinds of lanes have in common: the form of their rows."""

    def __init__(
        self, num_lanes: int, chunk_size: int, chunks_per_step: int, pad_token_id: int, vocab_size: int | None
    ):
        check_integers(num_lanes=num_lanes, chunk_size=chunk_size, chunks_per_step=chunks_per_step)
        self.num_lanes, self.chunk_size, self.chunks_per_step = num_lanes, chunk_size, chunks_per_step
        self.pad_token_id, self.vocab_size = pad_token_id, vocab_size
        self.row_length = chunks_per_step * chunk_size
        # In shared memory, so that `set_epoch` reaches persistent DataLoader workers too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Accelerate calls it at the beginning of every epoch."""
        self._epoch.fill_(epoch)

    def __repr__(self) -> str:
        names = ("num_lanes", "chunk_size", "chunks_per_step", "epoch")
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)}' for name in names)})"

    def _idle_row(self) -> Row:
        """A row that reads nothing: each chunk of it is a document of padding."""
        return {
            "input_ids": torch.full((self.row_length,), self.pad_token_id),
            "position_ids": torch.arange(self.row_length) % self.chunk_size,
            "labels": torch.full((self.row_length,), IGNORED),
            "shift_labels": torch.full((self.row_length,), IGNORED),
            "document": torch.tensor([-1, 0]),
        }

    def _write(self, row: Row, offset: int, tokens: torch.Tensor, position: int) -> int:
        """Write a document's tokens from `position` on into what is left of an idle row from `offset` on.

        Args:
            tokens: as many as there is room for and one more, the last one's target; fewer if the document ends.

        Returns:
            The offset that follows: where a chunk begins, after the padding.
        """
        read = tokens[: self.row_length - offset]
        targets = tokens[1:]
        following = offset - (-len(read) // self.chunk_size) * self.chunk_size
        row["input_ids"][offset : offset + len(read)] = read
        row["labels"][offset : offset + len(read)] = read
        row["shift_labels"][offset : offset + len(targets)] = targets
        row["position_ids"][offset:following] = torch.arange(position, position + following - offset)
        return following


class LaneDataset(_Lanes, Dataset[Row]):
    """Documents dealt to lanes that are equally long, up to the last document of each.

    Time-major: row `index` is that of lane `index % num_lanes` in step `index // num_lanes`. Read in order with
    `num_lanes` rows per batch over all processes, every row of the batch is a lane, and always the same process's.
    Rows are independent of what was read before, so any number of DataLoader workers can build them, and to resume is
    to begin at a later index.

    With `shuffle` the longest documents are dealt first, each to the lane that has least to read (the longest-
    processing-time rule of Graham, 1969); which of the documents of equally many chunks goes where, and the order
    within each lane, are drawn anew in every epoch. How many steps there are depends on the lengths alone. Without
    `shuffle` the documents are dealt in their own order, each to the lane that is free first, and lanes keep the order.

    Args:
        documents: a sequence of documents, each a sequence of token ids (list, array, 1-D tensor), or a
            `datasets.Dataset` (itself, not its column) with a column "input_ids", which is read in place and never
            decoded as a whole.
        num_lanes: rows of a step over all processes: the batch size of each times their number.
        chunk_size: the model's.
        chunks_per_step: chunks that one row holds.
        seed: of the shuffle, together with the epoch.
        num_epochs: passes over the documents, each dealt anew, laid one after another so that a lane goes on with the
            next pass while others still read the last one. `stats` and `len` cover them all.
        pad_token_id: what padding is written as; the model never sees it.
        vocab_size: if given, ids are checked against it.

    Raises:
        ValueError: no documents, an empty one, something that is no document (when it can be seen without reading it,
            else when a row is built); a size below 1. When a row is built: ids that are negative or, with `vocab_size`,
            out of the vocabulary.
    """

    def __init__(
        self,
        documents: "Sequence[Any] | datasets.Dataset",
        num_lanes: int,
        chunk_size: int,
        chunks_per_step: int = 1,
        *,
        seed: int = 0,
        shuffle: bool = True,
        num_epochs: int = 1,
        pad_token_id: int = 0,
        vocab_size: int | None = None,
    ):
        super().__init__(num_lanes, chunk_size, chunks_per_step, pad_token_id, vocab_size)
        check_integers(num_epochs=num_epochs)
        self.seed, self.shuffle, self.num_epochs = seed, shuffle, num_epochs

        if is_datasets_available() and isinstance(documents, datasets.Dataset):
            documents = _ArrowDocuments(documents)
            lengths = documents.lengths
        else:
            lengths = _lengths(documents)
        if not len(lengths):
            raise ValueError("expected at least one document, got none.")
        if not lengths.all():
            raise ValueError(f"document {lengths.argmin()} is empty: expected at least one token.")
        self.documents = documents

        # Slots are what is dealt: in an epoch each holds one of the documents with as many chunks as it has.
        self._num_chunks = -(-lengths // chunk_size)  # [documents]
        slots = np.sort(self._num_chunks)[::-1] if shuffle else self._num_chunks
        self._lanes = _deal(slots.tolist(), num_lanes)  # [slots]
        loads = num_epochs * np.bincount(self._lanes, slots, num_lanes).astype(np.int64)  # chunks of each lane
        self._bounds = np.append(0, loads.cumsum())  # lane i has chunks bounds[i] … bounds[i + 1] - 1 of all
        self.num_steps = int(-(-loads.max() // chunks_per_step))

        num_read, num_tokens = int(loads.sum()) * chunk_size, num_epochs * int(lengths.sum())
        self.stats = LaneStats(
            num_documents=num_epochs * len(lengths),
            num_tokens=num_tokens,
            num_targets=num_tokens - num_epochs * len(lengths),
            num_padding=num_read - num_tokens,
            num_idle=len(self) * self.row_length - num_read,
            num_lanes=num_lanes,
            num_idle_lanes=int((loads == 0).sum()),
            num_steps=self.num_steps,
        )
        if self.stats.num_idle_lanes:
            logger.warning_once(
                f"{self.stats.num_idle_lanes} of {num_lanes} lanes have nothing to read: there are {len(lengths)} "
                "documents."
            )

        self._plan: tuple[int, np.ndarray, np.ndarray] | None = None
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew. Accelerate calls it at the beginning of every epoch."""
        super().set_epoch(epoch)
        self._reading_order()  # here rather than in every DataLoader worker

    def _reading_order(self) -> tuple[np.ndarray, np.ndarray]:
        """Lane by lane, the documents it reads and the chunk, counted over all lanes, before which each ends."""
        if self._plan is None or self._plan[0] != self.epoch:
            shape = (self.num_epochs, len(self._lanes))
            passes = np.broadcast_to(np.arange(shape[0])[:, None], shape)
            lanes, num_chunks = (np.broadcast_to(values, shape) for values in (self._lanes, self._num_chunks))
            documents: np.ndarray = np.broadcast_to(np.arange(shape[1]), shape)  # one per slot
            ranks: np.ndarray = documents
            if self.shuffle:
                generator = np.random.default_rng((self.seed, self.epoch))
                documents, ranks = np.lexsort((generator.random(shape), -num_chunks)), generator.random(shape)
            documents = documents.ravel()[np.lexsort((ranks.ravel(), passes.ravel(), lanes.ravel()))]
            self._plan = self.epoch, documents, self._num_chunks[documents].cumsum()
        return self._plan[1:]

    def __len__(self) -> int:
        return self.num_steps * self.num_lanes

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"expected a row from 0 to {len(self) - 1}, got {index}.")
        step, lane = divmod(index, self.num_lanes)
        documents, ends = self._reading_order()
        row, offset = self._idle_row(), 0
        chunk, stop = self._bounds[lane] + step * self.chunks_per_step, self._bounds[lane + 1]
        slot = ends.searchsorted(chunk, side="right")
        if self._bounds[lane] < stop <= chunk:  # all is read
            document = int(documents[ends.searchsorted(stop - 1, side="right")])
            row["document"] = torch.tensor([document, len(self.documents[document])])
        while offset < self.row_length and chunk < stop:
            document = int(documents[slot])
            position = int(chunk - ends[slot] + self._num_chunks[document]) * self.chunk_size
            piece = self.documents[document][position : position + self.row_length - offset + 1]
            row["document"] = torch.tensor([document, position + min(len(piece), self.row_length - offset)])
            offset = self._write(row, offset, check_document(piece, document, self.vocab_size), position)
            chunk = ends[slot]
            slot += 1
        return row


class StreamingLanes(_Lanes, IterableDataset[Row]):
    """Documents read as they come: the lane that is free first takes the next one, like `LaneDataset` unshuffled.

    Only the documents in progress are held. Rows are in the same order, and end when all documents have been read. By
    their "document" a lane's place is saved, and `resume` goes on.

    Args:
        documents: sequences of token ids, or dicts with "input_ids". Iterated anew in every epoch; a
            `datasets.IterableDataset` is shuffled anew by `set_epoch`.
        tokenize: gives the token ids (or a dict with "input_ids") of what `documents` yields. A tokenizer will do, for
            texts and for dicts with "text".
        num_lanes, chunk_size, chunks_per_step, pad_token_id, vocab_size: as for `LaneDataset`.

    Raises:
        ValueError: a size below 1. While iterating: an empty document, ids that are none, negative or out of the
            vocabulary; several DataLoader workers; documents that end before those `resume` was told of.
    """

    def __init__(
        self,
        documents: Iterable[Any],
        num_lanes: int,
        chunk_size: int,
        chunks_per_step: int = 1,
        *,
        tokenize: Callable[[Any], Any] | None = None,
        pad_token_id: int = 0,
        vocab_size: int | None = None,
    ):
        super().__init__(num_lanes, chunk_size, chunks_per_step, pad_token_id, vocab_size)
        self.documents, self.tokenize = documents, tokenize
        # Where the next iteration begins. In shared memory, so that a DataLoader worker resumes once, not every epoch.
        self._positions = torch.tensor([[-1, 0]] * num_lanes).share_memory_()
        self._first_epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._counts: Counter[str] = Counter()
        self._lanes_read: set[int] = set()

    def set_epoch(self, epoch: int) -> None:
        """Tell the documents, if they want to know. Accelerate calls it at the beginning of every epoch."""
        super().set_epoch(int(self._first_epoch) + epoch)
        if hasattr(self.documents, "set_epoch"):
            self.documents.set_epoch(self.epoch)

    def resume(self, positions: torch.Tensor, epoch: int = 0) -> None:
        """Let the next iteration, and only that one, go on where the lanes stood; if at the end, with the next epoch.

        It runs through the documents again, but of those already taken it tokenizes only the last one of each lane.

        Args:
            positions: [num_lanes, 2] int64, "document" of the last row of each lane.
            epoch: the one that they were saved in, from which `set_epoch` counts on: Trainer does not know it.
        """
        positions = as_tensor(positions, "positions of lanes, [num_lanes, 2]")
        if positions.shape != self._positions.shape:
            raise ValueError(
                f"expected positions of {self.num_lanes} lanes, of shape {list(self._positions.shape)}, got "
                f"{list(positions.shape)}: resume with the number of lanes that they were saved with."
            )
        taken = positions[:, 0][positions[:, 0] >= 0]
        if len(taken.unique()) < len(taken):
            raise ValueError(f"expected a document of its own for every lane, got documents {taken.tolist()}.")
        self._positions.copy_(positions)
        self._first_epoch.fill_(epoch)
        self.set_epoch(0)

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"expected at most one DataLoader worker, got {worker.num_workers}: lanes go on from batch to batch. "
                "To work in parallel, tokenize before (`datasets.map` with `num_proc`) or use `LaneDataset`."
            )
        resumed, ended = bool((self._positions[:, 0] >= 0).any()), True
        for row in self._rows():
            ended = False
            yield row
        if resumed and ended:  # the lanes stood at the end of an epoch
            epoch = self.epoch - int(self._first_epoch)
            self._first_epoch += 1
            self.set_epoch(epoch)
            yield from self._rows()

    def _rows(self) -> Iterator[Row]:
        source = enumerate(self.documents)
        lanes = self._resumed_lanes(source)
        while True:
            rows = [self._idle_row() for _ in lanes]
            free = [(0, number) for number in range(self.num_lanes)]  # a heap: the offset at which each lane is free
            idle = True
            while free:
                offset, number = heapq.heappop(free)
                if lanes[number].finished:
                    following = next(source, None)
                    if following is None:
                        continue
                    lanes[number] = self._take(*following)
                lane, idle = lanes[number], False
                stop = lane.consumed + self.row_length - offset
                offset = self._write(rows[number], offset, lane.tokens[lane.consumed : stop + 1], lane.consumed)
                lane.consumed = min(stop, len(lane.tokens))
                if offset < self.row_length:
                    heapq.heappush(free, (offset, number))
            if idle:
                return
            for number, (row, lane) in enumerate(zip(rows, lanes, strict=True)):
                row["document"] = torch.tensor([lane.document, lane.consumed])
                self._count(row, number)
                yield row

    def _take(self, document: int, item: Any, consumed: int = 0) -> "_Lane":
        """A lane that has read `consumed` tokens of a document."""
        if isinstance(self.tokenize, PreTrainedTokenizerBase):
            item = _column(item, "text", document)  # a function may want another one, and gets all of them
        if self.tokenize is not None:
            item = self.tokenize(item)
        item = _column(item, "input_ids", document)
        tokens = check_document(item, document, self.vocab_size)
        if consumed > len(tokens):
            raise ValueError(
                f"document {document} has {len(tokens)} tokens, {consumed} of which were read before: resume with the "
                "documents that the positions were saved with, in the same order."
            )
        return _Lane(tokens, document, consumed)

    def _resumed_lanes(self, source: Iterator[tuple[int, Any]]) -> list["_Lane"]:
        """The lanes as `resume` was told, `source` having run past the last document that was taken."""
        positions = self._positions.tolist()
        self._positions.copy_(torch.tensor([-1, 0]))
        lanes = [_Lane() for _ in positions]
        numbers = {document: number for number, (document, _) in enumerate(positions) if document >= 0}
        read_before = range(max(numbers, default=-1) + 1)
        for last in logging.tqdm(read_before, desc="Skipping documents", unit="doc", delay=SECONDS_UNTIL_PROGRESS):
            index, item = next(source, (None, None))
            if index is None:
                raise ValueError(f"the documents end after {last}, but document {max(numbers)} was read before.")
            if index in numbers:
                lanes[numbers[index]] = self._take(index, item, positions[numbers[index]][1])
        return lanes

    @property
    def stats(self) -> LaneStats:
        """Of the rows that this process has been given so far; those of a DataLoader worker are not among them."""
        names = ("num_documents", "num_tokens", "num_targets", "num_padding", "num_idle")
        return LaneStats(
            **{name: self._counts[name] for name in names},
            num_lanes=self.num_lanes,
            num_idle_lanes=self.num_lanes - len(self._lanes_read),
            num_steps=self._counts["num_rows"] // self.num_lanes,
        )

    def _count(self, row: Row, number: int) -> None:
        real = row["labels"] >= 0
        num_tokens, num_idle = int(real.sum()), int((~real[:: self.chunk_size]).sum()) * self.chunk_size
        self._counts.update(
            num_rows=1,
            num_documents=int((real & (row["position_ids"] == 0)).sum()),
            num_tokens=num_tokens,
            num_targets=int((row["shift_labels"] >= 0).sum()),
            num_padding=len(real) - num_tokens - num_idle,
            num_idle=num_idle,
        )
        if num_tokens:
            self._lanes_read.add(number)


def pack_documents(documents: Iterable[Any], num_tokens: int) -> list[np.ndarray]:
    """Documents put together in their order, one behind the other, until each piece has `num_tokens` tokens or more.

    Lanes fill up the last chunk of a document with padding, which is most of what they read if documents are shorter
    than a chunk. A piece is one document to them: what comes after may look at what stands before, as in windows cut
    from documents end to end. So each should begin with a token that says so, such as the end of text.

    Args:
        documents: sequences of token ids, or dicts with "input_ids".
        num_tokens: of a piece. The last one may have fewer.

    Returns:
        The pieces, int32.

    Raises:
        ValueError: a size below 1, an empty document, or what is no sequence of token ids.
    """
    check_integers(num_tokens=num_tokens)
    pieces: list[list[np.ndarray]] = []
    length = num_tokens  # of the last piece
    for number, item in enumerate(documents):
        document = check_document(_column(item, "input_ids", number), number, None).numpy().astype(np.int32)
        if length >= num_tokens:
            pieces.append([])
            length = 0
        pieces[-1].append(document)
        length += len(document)
    return [np.concatenate(piece) for piece in pieces]


@dataclass
class _Lane:
    """A row of the batch, as it stands in the document that it has taken last."""

    tokens: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    document: int = -1
    consumed: int = 0

    @property
    def finished(self) -> bool:
        return self.consumed == len(self.tokens)


class _ArrowDocuments:
    """Column "input_ids" of a `datasets.Dataset`; each document is a view of its Arrow table."""

    def __init__(self, dataset: "datasets.Dataset"):
        if "input_ids" not in dataset.column_names:
            raise ValueError(f'expected a dataset with a column "input_ids", got columns {dataset.column_names}.')
        column = dataset.data.column("input_ids")
        value_type = getattr(column.type, "value_type", None)
        if value_type is None or not pa.types.is_integer(value_type):
            raise ValueError(f'expected lists of integers in column "input_ids", got {column.type}.')
        lengths = pc.list_value_length(column).fill_null(0).to_numpy()
        # What `select` and `shuffle` leave behind; asking the dataset for its rows would copy all tokens.
        indices = dataset._indices
        self.lengths = (lengths if indices is None else lengths[indices.column(0).to_numpy()]).astype(np.int64)
        self.dataset = dataset.select_columns("input_ids").with_format("arrow")

    def __getitem__(self, index: int) -> np.ndarray:
        return self.dataset[index]["input_ids"].chunk(0).flatten().to_numpy(zero_copy_only=False)


def _column(item: Any, name: str, document: int) -> Any:
    """What a document is, alone or among the columns of a data set."""
    if isinstance(item, Mapping):
        if name not in item:
            raise ValueError(f'document {document}: expected a dict with "{name}", got {list(item)}.')
        return item[name]
    return item


def _lengths(documents: Any) -> np.ndarray:
    """[documents] int64"""
    if isinstance(documents, Mapping) or not hasattr(documents, "__len__"):
        raise ValueError(
            f"expected a sequence of documents, got {type(documents).__name__}. `StreamingLanes` takes any iterable."
        )
    lengths = np.empty(len(documents), np.int64)
    for index, document in enumerate(documents):
        try:
            if isinstance(document, Mapping | str | bytes):
                raise TypeError(f"got {type(document).__name__}.")
            lengths[index] = len(document)
        except TypeError as error:
            raise ValueError(f"document {index}: expected a sequence of token ids: {error}") from error
    return lengths


def _deal(slots: list[int], num_lanes: int) -> np.ndarray:
    """[slots] the lanes that `slots`, chunks per document, go to: each to the one with least to read, or the lowest."""
    loads = [(0, lane) for lane in range(num_lanes)]  # a heap
    lanes = []
    for num_chunks in slots:
        load, lane = loads[0]
        heapq.heapreplace(loads, (load + num_chunks, lane))
        lanes.append(lane)
    return np.array(lanes)


def check_document(piece: Any, number: int, vocab_size: int | None) -> torch.Tensor:
    """(A piece of) document `number` as [T] int64 on the CPU.

    Raises:
        ValueError: it is empty, no sequence of integers, or one of them is negative or out of the vocabulary.
    """
    name = f"document {number}"
    try:
        tokens = piece if isinstance(piece, torch.Tensor) else torch.tensor(piece)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected a sequence of token ids: {error}") from error
    if tokens.shape == (0,):
        raise ValueError(f"{name} is empty: expected at least one token.")
    if tokens.ndim != 1 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(
            f"{name}: expected a sequence of token ids, got {tokens.dtype} of shape {tuple(tokens.shape)}."
        )
    tokens = tokens.to("cpu", torch.int64)
    least, most = (int(value) for value in tokens.aminmax())
    if least < 0 or (vocab_size is not None and most >= vocab_size):
        expected = "of at least 0" if vocab_size is None else f"from 0 to {vocab_size - 1}"
        raise ValueError(f"{name}: expected token ids {expected}, got {least if least < 0 else most}.")
    return tokens


__all__ = ["LaneDataset", "LaneStats", "StreamingLanes", "pack_documents"]
