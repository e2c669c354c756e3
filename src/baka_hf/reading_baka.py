"""One call of a model: its spans read one after another, and what they leave behind.

`ChunkPass` says what a pass of the blocks over one span is. `Reading` runs it span by span: as it is, compiled block by
block, recomputed in the backward pass, or by the graphs of a static state. Kernels are never in here, nor is what a
block computes.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .associative_baka import associations_held, associative_layers
from .attention_baka import any_length, can_attend_in_parts, place
from .cache_baka import BakaCache
from .cache_layer_baka import BakaCacheLayer
from .calls_baka import Call, Results
from .compile_baka import allow_programs, on_host, runs_compiled_parts, static_shapes
from .functions_baka import (
    and_rows,
    any_rows,
    apply_rotary,
    dtype_of_products,
    gather_positions,
    pad_slots,
    put_on,
    rotary_table_of,
    where_rows,
)
from .memory_baka import Memory, memory_held
from .stream_baka import (
    Angles,
    Associated,
    Layout,
    Parts,
    Placement,
    Span,
    Stream,
    View,
    compare_slots,
    fixed_pauses,
    is_chunk,
    is_whole,
    lay_out,
    writers_of,
)


class Passed(NamedTuple):
    """What a pass over one span gives."""

    memory: Memory | None  # that its chunk has read
    after: Stream  # the state after it
    states: list[torch.Tensor]  # its text's that were asked for, [B, T, D] each, and the last one, normed
    weights: list[torch.Tensor]  # its text's, [B, T, H · 2S] each
    strength: torch.Tensor | None = None  # [B], of what its chunk has written, see `Associated`; 0 if that is not full


class ChunkPass:
    """A pass of a model's blocks over one span: what goes in, the blocks, and what they leave to the next."""

    def __init__(
        self,
        model: Any,  # a BakaModel
        batch_size: int,
        blocks: Any = None,
        slots: list[BakaCacheLayer] | None = None,
        in_place: bool = False,
        with_states: tuple[int, ...] = (),
        with_weights: bool = False,
    ):
        """
        Args:
            model: a `BakaModel`.
            batch_size: B.
            blocks: callables like its layers, by default these.
            slots: what each block writes keys and values into, where that is done in place.
            in_place: whether it is, there or by the blocks themselves: then the state after a span has no keys and
                values of its own.
            with_states: which hidden states to give beside the last one, 0 for what goes into the first block.
            with_weights: give attention's weights.
        """
        self.model, self.config, self.batch_size = model, model.config, batch_size
        self.blocks = model.layers if blocks is None else blocks
        self.slots: list[Any] = slots or [None] * len(self.blocks)
        self.in_place, self.with_states, self.with_weights = in_place, with_states, with_weights
        self.half = self.config.stream_length if self.config.use_xl_cache else 0  # slots of the previous stream
        self.associative_layers = associative_layers(self.config)

    def run(self, first: Any, layout: Layout, view: View, text: torch.Tensor, stream: Stream) -> Passed:
        """Read one span.

        Args:
            first: rows whose chunk has no memory to read but the learned one.
            layout, view: of the span.
            text: ids [B, T] or embeddings [B, T, D].
            stream: the state before it.
        """
        memory, hidden_states, pasts, associated = self.enter(first, layout, view, text, stream)
        states, news, weights, first_value = [], [], [], None
        for index, (layer, past, slots) in enumerate(zip(self.blocks, pasts, self.slots, strict=True)):
            states += [hidden_states] if index in self.with_states else []
            hidden_states, key, value, weight, associated[index] = layer(
                hidden_states, *past, view, slots, associated[index], first_value
            )
            first_value = value if index == 0 and self.config.value_residual else first_value
            is_kept = layout.followed and not self.in_place
            news.append((key.transpose(1, 2), value.transpose(1, 2)) if is_kept else None)
            weights.append(weight if self.with_weights else None)
        return self.leave(layout, view.placement, memory, pasts, news, [*states, hidden_states], weights, associated)

    def enter(
        self, first: Any, layout: Layout, view: View, text: torch.Tensor, stream: Stream
    ) -> tuple[Memory | None, torch.Tensor, list[tuple[Any, Any]], list[Associated | None]]:
        """What is ready before the blocks run: the memory that the chunk reads, what the first block reads [B, Q, D],
        and of each block the keys and values from before and the associations."""
        model, R, placement = self.model, self.config.num_memory_tokens, view.placement
        text = model.embed_tokens(text) if text.ndim == 2 else text
        memory, read, write = stream.memory, None, None
        begins_text = and_rows(layout.begins, first)
        if (R or self.associative_layers) and (any_rows(layout.begins) or any_rows(layout.completes)):
            empty = model.empty_memory(text, self.batch_size)
            memory = empty if memory is None else memory
            memory = memory | {name: where_rows(begins_text, x, memory[name].to(x)) for name, x in empty.items()}
        if R and memory is not None and (any_rows(layout.begins) or any_rows(layout.completes)):
            learned = model.learned_memory(text).expand(self.batch_size, -1, -1)
            memory["memory"] = where_rows(begins_text, learned.to(memory["memory"]), memory["memory"])
            read = write = learned
            vectors = memory["memory"].to(text)  # it may be kept in more than the model's dtype
            if any_rows(layout.begins) and first is not True:
                read = where_rows(first, learned, model.solidify(vectors, "read"))
            if any_rows(layout.completes) and first is not True and self.config.memory_write == "carry":
                write = where_rows(first, learned, model.solidify(vectors, "write"))
        stop = placement.start if placement.slots is None else self.half + self.config.stream_length
        pasts: list[tuple[Any, Any]] = [(None, None)] * len(self.blocks)
        if not self.in_place:
            pasts = [stream.kept(index, placement.first, stop) for index in range(len(self.blocks))]
        return memory, self._assemble(layout, text, read, write), pasts, self._associated(memory)

    def _associated(self, memory: Memory | None) -> list[Associated | None]:
        """What each block finds of its associations."""
        associated: list[Associated | None] = [None] * len(self.blocks)
        if self.associative_layers:
            assert memory is not None
            held = zip(*(memory[name].unbind(1) for name in associations_held(self.config)), strict=True)
            for layer, part in zip(self.associative_layers, held, strict=True):
                associated[layer] = Associated(part, memory.get(f"layers.{layer}.inputs"))
        return associated

    def _after(self, layout: Layout, memory: Memory, associated: list[Any]) -> Memory:
        """The memory after a span, with what the blocks leave of associations."""
        left = [associated[layer] for layer in self.associative_layers]
        if any_rows(layout.completes):
            parts = zip(*(part.held for part in left), strict=True)
            for name, new in zip(associations_held(self.config), parts, strict=True):
                stacked = torch.stack([x.to(memory[name]) for x in new], dim=1)
                memory = memory | {name: where_rows(layout.completes, stacked, memory[name])}
        if self.config.num_associative_heads and not self.in_place and layout.completes is not True:
            names = [f"layers.{layer}.inputs" for layer in self.associative_layers]
            memory = memory | dict(zip(names, (part.inputs for part in left), strict=True))
        return memory

    def leave(
        self,
        layout: Layout,
        placement: Placement,
        memory: Memory | None,
        pasts: list[tuple[Any, Any]],
        news: list[Any],
        states: list[torch.Tensor],
        weights: list[Any],
        associated: list[Associated | None],
    ) -> Passed:
        """What a span gives, of what the blocks gave."""
        read, R = memory, self.config.num_memory_tokens
        kept = [
            self._keep(layout, placement, past, *new) if new else (None, None)
            for past, new in zip(pasts, news, strict=True)
        ]
        begin = placement.first if layout.completes is False and not self.in_place else 0
        if R and memory is not None and any_rows(layout.completes):
            written = states[-1][:, -R:] if layout.in_step else gather_positions(states[-1], layout.write)
            vectors = {name: memory[name] for name in memory_held(self.config)}
            updated = self.model.update_memory(vectors, written)
            memory = memory | {name: where_rows(layout.completes, x, memory[name]) for name, x in updated.items()}
        if self.associative_layers and memory is not None:
            memory = self._after(layout, memory, associated)
        after = Stream(memory, [keys for keys, _ in kept], [values for _, values in kept], begin)
        *states, last = (self._text(layout, state) for state in states)
        weights = [self._text_weights(layout, placement, weight) for weight in weights if weight is not None]
        return Passed(read, after, [*states, self.model.norm(last)], weights, self._strength(layout, associated))

    def _strength(self, layout: Layout, associated: list[Any]) -> torch.Tensor | None:
        """The mean over blocks, for rows whose chunk is full."""
        strengths = [each.strength for each in associated if each is not None and each.strength is not None]
        if not strengths:
            return None
        strength = torch.stack([each.to(strengths[0].device) for each in strengths]).mean(0)
        return where_rows(layout.completes, strength, torch.zeros_like(strength))

    def _assemble(
        self, layout: Layout, text: torch.Tensor, read: torch.Tensor | None, write: torch.Tensor | None
    ) -> torch.Tensor:
        """The stream of a span, [B, Q, D]."""
        R, P = self.config.num_memory_tokens, self.config.num_pause_tokens
        has_pause = P > 0 and (not layout.in_step or ("pause", 1) in layout.pieces)
        pause = self.model.learned_pause(text).expand(self.batch_size, 1, -1) if has_pause else None
        if layout.in_step:
            texts = iter(text.split([length for kind, length in layout.pieces if kind == "text"], dim=1))
            others = {"read": read, "pause": pause, "write": write}
            parts: list[Any] = [next(texts) if kind == "text" else others[kind] for kind, _ in layout.pieces]
            return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0].contiguous()
        absent = text.new_zeros(self.batch_size, max(R, 1), text.shape[2])
        sources = [absent[:, :R] if read is None else read, absent[:, :1] if pause is None else pause, text]
        if write is not None:
            sources.append(write)
        stream = torch.cat(sources, dim=1)
        return gather_positions(stream, layout.sources.clamp(max=stream.shape[1] - 1))

    def _text(self, layout: Layout, hidden_states: torch.Tensor) -> torch.Tensor:
        """The positions of the text alone, [B, T, D]."""
        if not layout.in_step:
            return gather_positions(hidden_states, layout.text)
        parts = hidden_states.split([length for _, length in layout.pieces], dim=1)
        parts = [part for (kind, _), part in zip(layout.pieces, parts, strict=True) if kind == "text"]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _text_weights(self, layout: Layout, placement: Placement, weights: torch.Tensor) -> torch.Tensor:
        """The weights [B, H, Q, K] of the text's queries over all 2S slots, as [B, T, H · 2S]."""
        S = self.config.stream_length
        left = S - self.half + placement.first
        weights = nn.functional.pad(weights, (left, 2 * S - left - weights.shape[3]))
        return self._text(layout, weights.transpose(1, 2).flatten(2))

    def _keep(
        self, layout: Layout, placement: Placement, past: tuple[Any, Any], key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Keys and values of a block after a span, for a `Stream`."""
        S, half = self.config.stream_length, self.half
        if layout.completes is True and not half:
            return None, None
        if is_chunk(layout):
            return key, value  # as those of a previous stream already, see `View.previous_angles`
        keys, values = (place(kept, new, placement, half + S) for kept, new in zip(past, (key, value), strict=True))
        if layout.completes is False or not half:
            return keys, values
        if layout.in_step:
            keys, values = (pad_slots(x, placement.first, half + S - placement.stop) for x in (keys, values))
        angles = backwards(self.config, keys)
        if layout.completes is True:
            return rolled_over(keys, values, *angles)
        return with_previous(keys, values, angles, layout.completes)


def backwards(config: Any, like: torch.Tensor) -> Angles:
    """cos and sin [1, head_dim] that turn keys of the own stream into those of a previous one: S slots earlier."""
    cos, sin = rotary_table_of(config, like.device, like.dtype)
    return cos[config.stream_length], -sin[config.stream_length]


def rolled_over(
    keys: torch.Tensor, values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The own half of keys and values [..., 2S, head_dim] as a previous stream's: keys turned back, see `backwards`."""
    own_keys, own_values = keys.chunk(2, dim=-2)[1], values.chunk(2, dim=-2)[1]
    return apply_rotary(own_keys, cos, sin), own_values


def with_previous(
    keys: torch.Tensor, values: torch.Tensor, angles: Angles, completes: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, H, 2S, head_dim] whose own half is their previous one too, in the rows that `completes`."""
    rolled, S = rolled_over(keys, values, *angles), keys.shape[2] // 2
    keys, values = (
        torch.cat([where_rows(completes, new, x[:, :, :S]), x[:, :, S:]], dim=2)
        for new, x in zip(rolled, (keys, values), strict=True)
    )
    return keys, values


class BlockwisePass(ChunkPass):
    """A pass of which torch.compile compiles the blocks alone: one program for all of them, not one that has them all.

    A block's own work is what it can speed up, and a program of many takes many times as long to compile. Only where a
    chunk is computed again in the backward pass, which happens outside, must it be compiled as a whole.
    """

    run = runs_compiled_parts(ChunkPass.run)
    enter, leave = on_host(ChunkPass.enter), on_host(ChunkPass.leave)


def _borrow(cache: BakaCache) -> Stream:
    """The cache's tensors for a pass whose autograd graph may hold on to them."""

    def readable(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor

    for layer in cache.layers:
        layer.is_shared = True
    cache._release()
    # In the dtype that attention will have, as later calls find them: programs are compiled for one.
    dtype = dtype_of_products(cache.layers[0].keys.dtype, cache.device)
    keys = [readable(layer.keys).to(dtype) for layer in cache.layers]
    values = [readable(layer.values).to(dtype) for layer in cache.layers]
    inputs = {name: x for name, x in cache.tensors().items() if name.endswith(".inputs")}
    memory = {name: readable(x) for name, x in (cache.carried | inputs).items()}
    return Stream(memory, keys, values)


class Reading:
    """Reads the spans of a call, one after another, and collects what they give."""

    @on_host
    def __init__(self, model: Any, call: Call, reader: Any = None, recomputes: bool = False, keeps_casts: bool = True):
        """
        Args:
            model: a `BakaModel`.
            call: what is to be read.
            reader: reads whole chunks by graphs, from a static state; None for none.
            recomputes: whether each span is computed again in the backward pass.
            keeps_casts: whether autocast may keep what it has cast.
        """
        config = model.config
        self.model, self.config, self.call, self.reader = model, config, call, reader
        self.recomputes, self.keeps_casts = recomputes, keeps_casts
        cache, layers = call.cache, config.num_hidden_layers
        self.in_place = cache is not None and not torch.is_grad_enabled()
        self.half = config.stream_length if config.use_xl_cache else 0  # slots of the previous stream that are kept
        slots = cache.layers if cache is not None and self.in_place else None
        kind = ChunkPass if recomputes else BlockwisePass
        self.chunk_pass = kind(model, call.batch_size, None, slots, self.in_place, call.with_states, call.with_weights)
        self.bptt_chunks = config.bptt_chunks if torch.is_grad_enabled() else None
        nothing: list[Any] = [None] * layers
        if cache is None:
            stream = Stream(None, nothing, nothing, self.half)
        elif self.in_place:
            stream = Stream(cache.carried, nothing, nothing)
        else:
            stream = _borrow(cache)
        # By how many chunks their gradients reach back: one stream, unless `bptt_chunks` asks for a sliding window.
        self.streams: dict[int, Stream] = {0: stream if self.bptt_chunks is None else stream.detach()}
        self.last = stream
        self.fixed_pauses = fixed_pauses(config)
        self.pauses: Any = self.fixed_pauses if cache is None or not config.uses_random_pauses else cache._pauses
        self.masks: dict[Any, torch.Tensor | None] = {}
        self.pieces: Any = None  # each span's part of the text, if all rows read the same columns
        if all(span.is_aligned for span in call.spans):
            length = sum(span.count for span in call.spans)
            self.pieces = call.text[:, :length].split([span.count for span in call.spans], dim=1)
        self.states: list[list[torch.Tensor]] = []
        self.weights: list[list[torch.Tensor]] = []
        self.strengths: list[torch.Tensor] = []  # of each span that writes, [B]
        self.num_written = 0  # chunks, over all rows
        self.memories: list[tuple[torch.Tensor, torch.Tensor]] = []

    @on_host
    def context(self) -> Any:
        """What the spans are to be read in."""
        device = self.model.norm.weight.device.type
        if device == "cpu" and self.config._attn_implementation == "flex_attention":
            return static_shapes()  # PyTorch 2.13 cannot compile it for dynamic ones there
        if self.keeps_casts or not torch.is_autocast_enabled(device):
            return nullcontext()
        return torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=False)

    @runs_compiled_parts
    def read(self) -> None:
        """Read all spans."""
        with self.context():
            for index in range(len(self.call.spans)):
                self.read_span(index)

    @runs_compiled_parts
    def read_span(self, index: int) -> None:
        """Read span number `index`."""
        if self.reader is not None:
            is_chunk = self._is_chunk_in_step(self.call.spans[index])
            if is_chunk or (self.reader.reads_pieces and not self.call.restarts):
                return self._read_by_graph(self.call.spans[index], is_chunk)
        span, layout, view, text = self._prepare(index)
        num_spans = len(self.call.spans)

        # `bptt_chunks=k`: the loss of chunk i may reach back k chunks, that of chunk i+1 as well, but one less of the
        # same. So the chunk is read from copies of its state that differ in the reach of their gradients alone: reach
        # d leads to d + 1. Copies nobody will read are dropped.
        k = self.bptt_chunks
        reach = 0 if k is None else min(index, k)
        following: dict[int, Stream] = {}

        def is_read(reach: int) -> bool:
            return k is not None and (reach == min(index + 1, k) or (reach <= k and index + 1 + k - reach < num_spans))

        for depth, stream in self.streams.items():
            if self.in_place:
                with any_length if self._is_piece(layout) else nullcontext():
                    passed = self._run_in_place(span, layout, view, text, stream)
            else:
                with allow_programs():
                    passed = self._run(span.first, layout, view, text, stream)
            if depth == reach:
                self._collect(span, layout, passed)
                if self.call.with_memories and any_rows(layout.completes):
                    assert passed.memory is not None and passed.after.memory is not None
                    # Copies: a static state's tensors change where they are.
                    self.memories.append((passed.memory["memory"].clone(), passed.after.memory["memory"].clone()))
                if k is None:
                    following[0] = passed.after
                elif is_read(0):
                    following[0] = passed.after.detach(layout.completes)
            if is_read(depth + 1):
                following[depth + 1] = passed.after
        self.streams = following

    def _run(self, *arguments: Any) -> Passed:
        if self.recomputes:
            return self.model._gradient_checkpointing_func(self.chunk_pass.run, *arguments)
        return self.chunk_pass.run(*arguments)

    # Not compiled: what a state is given in place stands elsewhere in every call, with a program for each.
    @on_host
    def _run_in_place(self, span: Span, layout: Layout, view: View, text: torch.Tensor, stream: Stream) -> Passed:
        passed = self._run(span.first, layout, view, text, stream)
        if any_rows(layout.completes):
            assert self.call.cache is not None
            self.call.cache.carried = passed.memory or self.call.cache.carried
            self._roll_over(self.call.cache, span, layout)
        return passed

    @on_host
    def _collect(self, span: Span, layout: Layout | None, passed: Passed) -> None:
        states = passed.states
        if passed.strength is not None and layout is not None:
            self.strengths.append(passed.strength)
            self.num_written += int(torch.as_tensor(layout.completes).expand(self.call.batch_size).sum())
        if self._is_skipped(span):
            states = [state[:, :0].clone() for state in states]  # a copy, lest an empty part keep the whole
        self.states.append(states)
        self.weights.append(passed.weights)
        self.last = passed.after

    def _is_skipped(self, span: Span) -> bool:
        """Whether nobody asks for the states of a span's text."""
        last = self.call.num_last_states
        return last is not None and span.column + span.count <= self.call.length - last

    @on_host
    def _is_chunk_in_step(self, span: Span) -> bool:
        flags = isinstance(span.first, bool) and isinstance(span.has_previous, bool)
        return span.is_aligned and flags and (span.start, span.count) == (0, self.config.chunk_size)

    @on_host
    def _is_piece(self, layout: Layout) -> bool:
        """Whether a span is less than a chunk, on a CUDA device."""
        return self.model.norm.weight.is_cuda and not is_whole(layout, self.config)

    @on_host
    def _read_by_graph(self, span: Span, is_chunk: bool) -> None:
        """Read a whole chunk, or of each row a piece of one, from a static state."""
        cache, state, memory = self.call.cache, self.call.state, self.streams[0].memory
        assert cache is not None and state is not None and memory is not None
        state._is_torn = True  # its tensors change where they are
        cache.carried = memory
        self.reader.take_in(cache)
        text = self._text_of(span)
        if is_chunk:
            states = self.reader.read_chunk(span, text)
        else:
            states = self.reader.read_piece(span, self.call.seeded, text)
        nothing: list[Any] = [None] * self.config.num_hidden_layers
        after = Stream(cache.carried, nothing, nothing)
        states = states if self._is_skipped(span) else states.clone()
        self._collect(span, None, Passed(cache.carried, after, [states], []))
        self.pauses, self.streams = self.fixed_pauses, {0: after}

    @on_host
    def _prepare(self, index: int) -> tuple[Span, Layout, View, torch.Tensor]:
        """Span number `index`, its layout, its view and its tokens: ids [B, T] or embeddings [B, T, D]."""
        call = self.call
        span, pauses = self._place_pauses(call.spans[index])
        followed = call.cache is not None or index + 1 < len(call.spans)
        layout = lay_out(span, self.config, pauses, followed)
        text = self._text_of(span) if self.pieces is None else self.pieces[index]
        dtype = text.dtype if text.ndim == 3 else self.model.embed_tokens.weight.dtype
        return span, layout, self._view(span, layout, text.device, dtype), text

    def _text_of(self, span: Span) -> torch.Tensor:
        """Its tokens: ids [B, T] or embeddings [B, T, D]."""
        text = self.call.text
        if isinstance(span.column, int):
            return text[:, span.column : span.column + span.length]
        columns = (span.column[:, None] + torch.arange(span.length)).clamp(max=text.shape[1] - 1)
        columns = put_on(text.device, columns)
        return text.gather(1, columns) if text.ndim == 2 else gather_positions(text, columns)

    def _place_pauses(self, span: Span) -> tuple[Span, Any]:
        """The text positions of each row's pauses, as `lay_out` takes them; and the span, spread out if they differ."""
        config = self.config
        pauses = self.pauses
        if config.uses_random_pauses:
            kept = torch.as_tensor(pauses).expand(self.call.batch_size, -1)
            drawn = torch.tensor(self.fixed_pauses)
            if self.model.pause_dropout.acts:
                others = torch.randperm(config.chunk_size - 1)[: config.num_pause_tokens - 1].sort().values + 1
                drawn = torch.cat([torch.zeros(1, dtype=torch.int64), others])
            begins = torch.as_tensor((span.start == 0) & (span.count > 0)).expand(self.call.batch_size)
            kept = self.pauses = torch.where(begins[:, None], drawn, kept)
            pauses = kept[0].tolist() if bool((kept == kept[0]).all()) else kept
        if span.in_step and isinstance(pauses, torch.Tensor):
            start, count = (torch.as_tensor(value).expand(self.call.batch_size) for value in (span.start, span.count))
            span = span._replace(start=start, count=count)
        if not span.in_step and not isinstance(pauses, torch.Tensor):
            pauses = torch.tensor(pauses, dtype=torch.int64).reshape(1, -1)
        return span, pauses

    def _view(self, span: Span, layout: Layout, device: torch.device, dtype: torch.dtype) -> View:
        """What all blocks share for a span."""
        config, half, S = self.config, self.half, self.config.stream_length
        cos, sin = rotary_table_of(config, device, dtype)
        writers = writers_of(config, span, layout, self.in_place, device)
        costs = config.associative_write_cost > 0
        if not layout.in_step:
            slots = layout.slots.to(device)
            index = (half + slots)[:, None, :, None]
            placement = Placement(slots=index, valid=layout.valid.to(device)[:, None, :, None])
            mask = self._mask(span, layout, placement, device, dtype)
            angles = cos[S + slots], sin[S + slots]
            return View(angles, mask, placement, writers=writers, writing_costs=costs)
        own, previous = slice(S + layout.lo, S + layout.hi), slice(layout.lo, layout.hi)
        angles = cos[own], sin[own]
        previous_angles = (cos[previous], sin[previous]) if is_chunk(layout) and half and not self.in_place else None
        has_previous = span.has_previous if isinstance(span.has_previous, bool) else True
        first = 0 if has_previous and half else half
        placement = Placement(first, half + layout.lo, half + layout.hi)
        key = (layout.lo, layout.hi, first) if isinstance(span.has_previous, bool) else None
        if key is None or key not in self.masks:
            self.masks[key] = self._mask(span, layout, placement, device, dtype)
        mask = self.masks[key]
        parts = self._parts(span, layout, dtype, device)
        return View(angles, mask, placement, parts, previous_angles, writers, writing_costs=costs)

    def _parts(self, span: Span, layout: Layout, dtype: torch.dtype, device: torch.device) -> Parts | None:
        """What compiled attention needs to know of a span in step to do without a mask; None if it cannot."""
        S, R, width = self.config.stream_length, self.config.num_memory_tokens, layout.hi - layout.lo
        has_past = None
        if isinstance(span.has_previous, torch.Tensor):
            has_past = span.has_previous.to(device)[:, None, None, None]
        # In the middle of a chunk all rows see what they have read of it, if not all a previous one.
        if self.in_place or (has_past is not None and layout.lo > 0):
            return None
        if not can_attend_in_parts(self.config, dtype_of_products(dtype, device), device):
            return None
        ends = [slice(0, R)] if layout.lo == 0 else []
        if layout.hi == S:
            ends.append(slice(width - R, width))
        return Parts(tuple(ends) if R > 1 else (), has_past)

    def _mask(
        self, span: Span, layout: Layout, placement: Placement, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Which keys each query of a span sees, as the attention implementation wants it; None if all."""
        config = self.config
        if layout.in_step and layout.hi - layout.lo == 1 and isinstance(span.has_previous, bool):
            return None  # a single query, and every key before it is in its past
        numbers, horizons = compare_slots(config, span, layout, placement, device)
        batch_size = max(numbers.shape[0], horizons.shape[0])
        if batch_size == 1:
            numbers, horizons = numbers[0], horizons[0]

            def allowed(b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
                return numbers[k] <= horizons[q]
        else:
            numbers, horizons = (rows.expand(batch_size, -1).contiguous() for rows in (numbers, horizons))

            def allowed(b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
                return numbers[b, k] <= horizons[b, q]

        mask = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
            batch_size=batch_size,
            q_length=horizons.shape[-1],
            kv_length=numbers.shape[-1],
            q_offset=0,
            kv_offset=0,
            mask_function=allowed,
            attention_mask=None,
            allow_is_causal_skip=False,
            use_vmap=False,
            dtype=dtype,
            config=config,
            device=device,
        )
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            return mask
        # Each block would make this of it again.
        return torch.zeros_like(mask, dtype=dtype_of_products(dtype, device)).masked_fill_(~mask, float("-inf"))

    @on_host
    def _roll_over(self, cache: BakaCache, span: Span, layout: Layout) -> None:
        """The own stream of the rows whose chunk is full becomes their previous one, in tensors of its own."""
        batch_size = self.call.batch_size
        if cache._is_recording:
            num_tokens = torch.zeros(batch_size, dtype=torch.int64) + span.num_tokens
            completes = torch.as_tensor(layout.completes).expand(batch_size)
            pauses = torch.as_tensor(self.pauses, dtype=torch.int64).expand(batch_size, -1)
            cache._record_boundary(num_tokens, completes, pauses)
        for layer in cache.layers:
            # Without the XL cache: to be copied before the next chunk is written over this one.
            layer.is_shared = not self.half
            if self.half:
                angles = backwards(self.config, layer.keys)
                layer.keys, layer.values = with_previous(layer.keys, layer.values, angles, layout.completes)
                if layer.inputs is not None:
                    layer.inputs = layer.inputs.clone()

    @on_host
    def results(self) -> Results:
        """What all spans have given."""
        if self.states and self.model.training and torch.is_grad_enabled():
            first = self.states[0]
            first[-1] = first[-1] + self.model.anchor(first[-1])
        pauses = torch.as_tensor(self.pauses, dtype=torch.int64)
        left = self.last.memory, self._keys_and_values(), pauses
        strength = torch.cat(self.strengths).sum() / max(self.num_written, 1) if self.strengths else None
        return Results(self.states, self.weights, *left, tuple(self.memories), strength)

    def _keys_and_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each block's keys and values, [B, H_kv, slots, head_dim], that the cache is left with; none if in place."""
        cache, slots = self.call.cache, self.half + self.config.stream_length
        if cache is None or self.in_place or not self.call.spans:
            return []
        kept: list[Any] = [self.last.kept(index, 0, slots) for index in range(self.config.num_hidden_layers)]
        if kept[0][0] is None:  # nothing of a full chunk is kept without the XL cache
            kept = [(torch.zeros_like(layer.keys), torch.zeros_like(layer.values)) for layer in cache.layers]
        return kept
