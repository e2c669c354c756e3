"""Where tokens stand: spans of a call, slots of a chunk's stream, which slots a query sees. Arithmetic, no weights.

A text is read in chunks of n tokens. One chunk is a stream of S = R + n + P + R positions, called slots:

    slot     0 … R-1         R … S-R-1                  S-R … S-1
             read memory     text with its P pauses     write memory

Attention sees the slots of the previous chunk, 0 … S-1, and the own ones, S … 2S-1. A call is cut into spans, pieces
of one chunk that are read in one pass. Nothing in here waits for a device.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn

from .configuration_baka import BakaConfig
from .functions_baka import any_rows, gather_positions, pad_slots, where_rows
from .memory_baka import Memory


class Parts(NamedTuple):
    """What attention of a span in step needs to know to do without a mask, see `AttentionInParts`."""

    ends: tuple[slice, ...]  # the positions of its read slots, and of its write slots, as far as they are in it
    has_past: torch.Tensor | None  # [B, 1, 1, 1] bool, rows that see what was before the span; None: all


class Placement(NamedTuple):
    """Where a span's keys and values stand among a block's slots, and which slots its queries may look at.

    Rows in step share `start` and `stop`: the span takes slots start … stop-1 and sees slots first … stop-1.
    Rows out of step have their own `slots` [B, 1, Q, 1], of which those where `valid` [B, 1, Q, 1] is True count, and
    see all slots.
    """

    first: int = 0
    start: int = 0
    stop: int = 0
    slots: torch.Tensor | None = None
    valid: torch.Tensor | None = None


Angles = tuple[torch.Tensor, torch.Tensor]  # cos and sin, see `functions_baka.rotary_table`


class Writers(NamedTuple):
    """The positions of a span that write associations: its text, or its write memory."""

    where: Any  # slices of its positions, or their index [T] or [B, T]
    completes: bool  # whether a row's chunk may become full, which is when they are written
    chunk_size: int
    placement: Placement | None  # of its text in the chunk; None: a whole one, or of a kind of which nothing is kept

    def take(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """These positions of [B, Q, D], [B, T, D]."""
        if isinstance(self.where, torch.Tensor):
            return gather_positions(hidden_states, self.where.expand(len(hidden_states), -1))
        parts = [hidden_states[:, part] for part in self.where]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def place(self, past: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
        """`inputs` [B, T, D] of these positions and what is kept of the chunk from `past` [B, n, D], [B, n, D]; nothing
        is written in place."""
        if self.placement is None:
            return inputs
        if self.placement.slots is None:
            start, stop = self.placement.start, self.placement.stop
            if start:
                assert past is not None
                inputs = torch.cat([past[:, :start].to(inputs), inputs], dim=1)
            return nn.functional.pad(inputs, (0, 0, 0, self.chunk_size - stop))
        past = inputs.new_zeros(len(inputs), self.chunk_size, inputs.shape[2]) if past is None else past.to(inputs)
        return self.place_(past.clone(), inputs)

    def place_(self, kept: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """As `place`, in place of `kept` [B, n, D]."""
        if self.placement is None:
            return inputs
        _, start, stop, slots, valid = self.placement
        if slots is None or valid is None:
            kept[:, start:stop] = inputs
        else:
            index = torch.arange(len(kept), device=kept.device)[:, None], slots[:, 0, :, 0]
            kept.index_put_(index, torch.where(valid[:, 0], inputs, kept[index]))
        return kept


class Associated(NamedTuple):
    """What a block finds of its associations, and leaves of them."""

    held: tuple[torch.Tensor, ...]  # its part of what `associations_held` names, [B, …] each
    inputs: torch.Tensor | None  # what will be written, see the classes in `associative_baka`
    strength: torch.Tensor | None = None  # [B], the mean strength of what was written, where that has a cost


class View(NamedTuple):
    """What all blocks share for a span."""

    angles: Angles  # of its positions
    mask: torch.Tensor | None  # as the attention implementation wants it; None: its queries see all keys
    placement: Placement
    parts: Parts | None = None  # with it compiled attention does without a mask
    # A whole chunk's keys are left behind as those of a previous stream, S slots earlier: the angles of that.
    previous_angles: Angles | None = None
    writers: Writers | None = None  # None if there are no associations
    skips_hidden: bool = False  # what the mask hides is not even read, see `attend_seen`
    writing_costs: bool = False  # in training the strength of what is written is asked for


def fixed_pauses(config: BakaConfig) -> list[int]:
    """The text positions before which the pauses of a chunk stand, unless they are drawn."""
    count = config.num_pause_tokens
    return [index * (config.chunk_size // count) for index in range(count)]


def slot_names(config: BakaConfig) -> list[str]:
    """Names of the 2S slots that attention sees, in order, pauses at their fixed places.

    "previous read 0" … "previous write 15", then those of the own stream, "own read 0" … "own write 15": which stream,
    the kind ("read", "pause", "text" or "write") and the number within its kind.
    """
    memory = range(config.num_memory_tokens)
    text = []
    for position in range(config.chunk_size):
        if position in fixed_pauses(config):
            text.append(f"pause {fixed_pauses(config).index(position)}")
        text.append(f"text {position}")
    stream = [*(f"read {index}" for index in memory), *text, *(f"write {index}" for index in memory)]
    return [f"{which} {name}" for which in ("previous", "own") for name in stream]


class Span(NamedTuple):
    """For every row, a piece of one chunk, read in one pass.

    What all rows agree on is a number, the rest are CPU tensors [B]. Rows that agree on `start` are in step: they take
    the same slots, and a row that has fewer tokens than others reads on into what is not its text. Nothing sees that.
    """

    column: Any  # its first token among the call's tokens
    start: Any  # that token's position in the chunk
    count: Any  # how many tokens; 0 for a row that has none left
    length: int  # the most tokens of any row
    first: Any  # the chunk has no memory to read but the learned one
    has_previous: Any  # there is a previous chunk whose keys and values can be seen
    num_tokens: Any  # tokens the row has read after it

    @property
    def in_step(self) -> bool:
        return isinstance(self.start, int)

    @property
    def is_aligned(self) -> bool:
        """Whether all rows read the same columns."""
        return isinstance(self.column, int) and isinstance(self.count, int)


def plan_aligned(length: int, chunk_size: int, num_tokens: int = 0, seeded: bool = False) -> list[Span]:
    """Spans of a call in which every row has read `num_tokens` before, `seeded` or not, and reads `length` more."""
    spans = []
    column = 0
    while column < length:
        start, has_previous = num_tokens % chunk_size, num_tokens >= chunk_size
        count = min(chunk_size - start, length - column)
        num_tokens += count
        spans.append(Span(column, start, count, count, not (has_previous or seeded), has_previous, num_tokens))
        column += count
    return spans


def plan_spans(
    lengths: torch.Tensor,
    num_tokens: torch.Tensor,
    seeded: torch.Tensor,
    restarts: torch.Tensor | None,
    chunk_size: int,
    keeps: bool,
) -> tuple[list[Span], torch.Tensor]:
    """As `plan_aligned`, of a call in which rows may be anywhere in their chunks; all tensors on the CPU.

    Args:
        lengths: [B] int64, tokens each row reads in this call.
        num_tokens: [B] int64, tokens it has read before.
        seeded: [B] bool, rows whose text began with another stream's memory.
        restarts: [B, L] bool, tokens with which a new text begins, or None.
        chunk_size: n.
        keeps: whether the state outlasts the call, so that a row which has no more tokens must be left as it is.

    Returns:
        The spans, and `seeded` as it stands after them.
    """
    column = torch.zeros_like(lengths)
    if restarts is not None:
        length = restarts.shape[1]
        following = torch.where(restarts, torch.arange(length), length).flip(1).cummin(1).values.flip(1)
        following = nn.functional.pad(following, (0, 2), value=length)  # [b, c]: the first restart at or after c
    spans = []
    while bool((column < lengths).any()):
        stop = lengths
        if restarts is not None:
            anew = (following.gather(1, column[:, None])[:, 0] == column) & (column < lengths)
            num_tokens, seeded = num_tokens.masked_fill(anew, 0), seeded & ~anew
            stop = torch.minimum(lengths, following.gather(1, column[:, None] + 1)[:, 0])
        start = num_tokens % chunk_size
        count = torch.minimum(chunk_size - start, stop - column)
        has_previous = num_tokens >= chunk_size
        num_tokens = num_tokens + count
        where = start if keeps else start[count > 0]
        in_step = bool((where == where[0]).all())
        spans.append(
            Span(
                _agreed(column) if in_step else column,
                int(where[0]) if in_step else start,
                _agreed(count) if in_step else count,
                int(count.max()),
                _agreed(~(has_previous | seeded)),
                _agreed(has_previous),
                num_tokens,
            )
        )
        column = column + count
    return spans, seeded


def _agreed(rows: torch.Tensor) -> Any:
    """A tensor [B] as one number or bool, if its entries are all the same."""
    return rows[0].item() if bool((rows == rows[0]).all()) else rows


@dataclass
class Layout:
    """Where a span's tokens stand in the stream, and what the blocks need to know of it.

    In step, the span takes slots lo … hi-1 and `pieces` names them in order. Out of step, each row takes its own
    slots lo … hi-1, at the beginning of Q positions, and indices say which vector stands where.
    """

    begins: Any  # the chunk's read memory is in it
    completes: Any  # the chunk's write memory is in it
    followed: bool  # another span, or another call, reads what this one leaves behind
    lo: Any
    hi: Any
    pieces: list[tuple[str, int]] = field(default_factory=list)
    slots: Any = None  # [B, Q] slot of each position
    valid: Any = None  # [B, Q] positions that count
    sources: Any = None  # [B, Q] where each vector comes from: read | pause | text | write
    text: Any = None  # [B, T] position of each text token
    write: Any = None  # [B, R] position of each write slot

    @property
    def in_step(self) -> bool:
        return isinstance(self.lo, int)


def lay_out(span: Span, config: BakaConfig, pauses: Any, followed: bool, width: int | None = None) -> Layout:
    """The layout of a span.

    Args:
        span: the span.
        config: the model's configuration.
        pauses: the text positions before which the pauses stand, ascending: P numbers (in step) or [B, P].
        followed: whether another span, or another call, reads what this one leaves behind.
        width: Q out of step, if it is known; else it is looked up.
    """
    n, R, S = config.chunk_size, config.num_memory_tokens, config.stream_length
    if span.in_step:
        end = span.start + span.length
        begins, completes = span.start == 0, followed and end == n
        lo = 0 if begins else R + span.start + sum(p < span.start for p in pauses)
        hi = S if completes else R + end + sum(p < end for p in pauses)
        pieces: list[tuple[str, int]] = [("read", R)] if begins and R else []
        position = span.start
        for pause in pauses:
            if span.start <= pause < end:
                if pause > position:
                    pieces.append(("text", pause - position))
                pieces.append(("pause", 1))
                position = pause
        pieces.append(("text", end - position))
        if completes and R:
            pieces.append(("write", R))
        if completes and isinstance(span.count, torch.Tensor):
            completes = span.start + span.count == n
        return Layout(begins, completes, followed, lo, hi, pieces)

    end = span.start + span.count
    reads = span.count > 0
    begins, completes = (span.start == 0) & reads, (end == n) & reads & followed
    before = lambda position: (pauses < position[:, None]).sum(1)  # noqa: E731
    lo = torch.where(begins, 0, R + span.start + before(span.start))
    hi = torch.where(completes, S, torch.where(reads, R + end + before(end), lo))
    device = lo.device
    slots = lo[:, None] + torch.arange(int((hi - lo).max()) if width is None else width, device=device)
    valid = slots < hi[:, None]
    slots = slots % S

    pause_slots = R + pauses + torch.arange(pauses.shape[1], device=device)
    pauses_before = (pause_slots[:, None, :] < slots[:, :, None]).sum(2)
    is_pause = (pause_slots[:, None, :] == slots[:, :, None]).any(2)
    # The vectors of a span stand side by side as read [R] | pause [1] | text [T] | write [R].
    longest = span.length
    token = (slots - R - pauses_before - span.start[:, None]).clamp(0, longest - 1)
    sources = torch.where(is_pause, R, R + 1 + token)
    sources = torch.where(slots < R, slots, sources)
    sources = torch.where(slots >= S - R, R + 1 + longest + slots - (S - R), sources)

    positions = span.start[:, None] + torch.arange(longest, device=device)
    text = R + positions + (pauses[:, None, :] <= positions[:, :, None]).sum(2) - lo[:, None]
    text = text.clamp(0, slots.shape[1] - 1)
    write = (S - R - lo[:, None] + torch.arange(R, device=device)).clamp(0, slots.shape[1] - 1)
    return Layout(begins, completes, followed, lo, hi, [], slots, valid, sources, text, write)


def compare_slots(
    config: BakaConfig, span: Span, layout: Layout, placement: Placement, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """allowed(q, k) as one comparison: each key has a number, each query a horizon, and sees keys up to it.

    Keys are numbered by their slots, 0 … S-1 in the previous stream and S … 2S-1 in the own one. The horizon of a text
    query is its own slot, of a read query the last read slot, of a write query the last slot of all. Keys of a previous
    stream that a row does not have are numbered beyond every horizon.

    Returns:
        The numbers of the keys [B or 1, K] and the horizons of the queries [B or 1, Q].
    """
    S, R = config.stream_length, config.num_memory_tokens
    half = S if config.use_xl_cache else 0
    if layout.in_step:
        slots = torch.arange(layout.lo, layout.hi, device=device)[None]
        numbers = torch.arange(placement.first, placement.stop, device=device)[None]
    else:
        slots = layout.slots.to(device)
        numbers = torch.arange(half + S, device=device)[None]
    numbers = numbers + S - half
    horizons = torch.where(slots < R, S + R - 1, torch.where(slots >= S - R, 2 * S - 1, S + slots))
    if isinstance(span.has_previous, torch.Tensor):
        has_previous = span.has_previous.to(device)[:, None]
        numbers = numbers.masked_fill((numbers < S) & ~has_previous, 2 * S)
    elif not span.has_previous:
        numbers = numbers.masked_fill(numbers < S, 2 * S)
    return numbers, horizons


def writers_of(config: BakaConfig, span: Span, layout: Layout, keeps: bool, device: torch.device) -> Writers | None:
    """What of a span writes associations, now or when its chunk is full; None if nothing does.

    Args:
        config: the model's configuration.
        span: the span.
        layout: of the span.
        keeps: whether the text of a chunk is kept even if the span is a whole one.
        device: where an index is wanted.
    """
    n, completes = config.chunk_size, any_rows(layout.completes)
    if not config.associative_dim or not layout.followed:
        return None
    if config.associative_writers == "memory":
        if not completes:
            return None
        if layout.in_step:
            width = layout.hi - layout.lo
            return Writers((slice(width - config.num_memory_tokens, width),), completes, n, None)
        return Writers(layout.write.to(device), completes, n, None)
    if not layout.in_step:
        steps = torch.arange(span.length, device=device)
        slots = (span.start.to(device)[:, None] + steps) % n
        valid = steps < span.count.to(device)[:, None]
        placement = Placement(slots=slots[:, None, :, None], valid=valid[:, None, :, None])
        return Writers(layout.text.to(device), completes, n, placement)
    stops = accumulate(length for _, length in layout.pieces)
    pieces = zip(layout.pieces, stops, strict=True)
    texts = [slice(stop - length, stop) for (kind, length), stop in pieces if kind == "text"]
    placement = Placement(0, span.start, span.start + span.length)
    if is_chunk(layout):
        return Writers(tuple(texts), completes, n, placement if keeps else None)
    # An index, so that pieces of all lengths share a program.
    index = torch.cat([torch.arange(text.start, text.stop, device=device) for text in texts])
    return Writers(index, completes, n, placement)


def is_chunk(layout: Layout) -> bool:
    """Whether a span is a whole chunk in all rows, its write memory included."""
    return layout.begins is True and layout.completes is True


def is_whole(layout: Layout, config: BakaConfig) -> bool:
    """Whether a span is a whole chunk, or what is one if nothing is written after it."""
    width = layout.hi - layout.lo if layout.in_step else layout.slots.shape[1]
    return width >= config.stream_length - config.num_memory_tokens


class Stream(NamedTuple):
    """What a chunk finds when it begins or goes on, as tensors with gradients that nothing writes into.

    `memory` is what its memory holds, by name; None if nothing was read. Keys and values of each block stand for slots
    begin … begin + their length - 1 of the two halves.
    """

    memory: Memory | None
    keys: list[Any]
    values: list[Any]
    begin: int = 0

    def kept(self, layer: int, first: int, stop: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Keys and values of slots first … stop-1 of a block."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None or stop <= first:
            return None, None
        if first < self.begin or stop > self.begin + keys.shape[2]:
            left, right = self.begin - first, stop - self.begin - keys.shape[2]
            return pad_slots(keys, left, right), pad_slots(values, left, right)
        part = slice(first - self.begin, stop - self.begin)
        return keys[:, :, part], values[:, :, part]

    def detach(self, rows: Any = True) -> "Stream":
        """A copy without gradients in the rows that `rows`, a bool or a tensor [B], says."""

        def cut(tensor: Any) -> Any:
            return None if tensor is None else where_rows(rows, tensor.detach(), tensor)

        memory = None if self.memory is None else {name: cut(tensor) for name, tensor in self.memory.items()}
        return Stream(memory, [cut(k) for k in self.keys], [cut(v) for v in self.values], self.begin)


def columns_of(spans: list[Span], batch_size: int, length: int) -> torch.Tensor | None:
    """[B, L] index: where the token of each column stands among the outputs of all spans; None if in its place."""
    if all(span.is_aligned for span in spans):
        return None
    columns = torch.zeros(batch_size, length + 1, dtype=torch.int64)  # one more, for what is not a token
    offset = 0
    for span in spans:
        count = torch.as_tensor(span.count).expand(batch_size)
        steps = torch.arange(span.length)
        target = torch.as_tensor(span.column).expand(batch_size)[:, None] + steps
        target = torch.where(steps < count[:, None], target, length)
        columns.scatter_(1, target, (offset + steps).expand(batch_size, -1))
        offset += len(steps)
    return columns[:, :length]


def in_columns(
    parts: tuple[torch.Tensor, ...], columns: torch.Tensor | None, real: torch.Tensor | None
) -> torch.Tensor:
    """Put the outputs [B, T, ·] of all spans into the columns of the call; zeros where there is no real token."""
    joined = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    if columns is not None:
        joined = gather_positions(joined, columns)
    if real is None:
        return joined
    real = real.to(joined.device)
    rank = (real.cumsum(1) - 1).clamp(0, joined.shape[1] - 1)
    return gather_positions(joined, rank).masked_fill(~real[:, :, None], 0)
