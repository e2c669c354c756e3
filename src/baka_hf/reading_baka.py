"""One call of a model: its spans read one after another, and what they leave behind."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .attention_baka import any_length, as_previous, can_attend_in_parts, place
from .cache_baka import BakaCache
from .compile_baka import allow_programs, on_host, runs_compiled_parts
from .functions_baka import (
    and_rows,
    any_rows,
    apply_rotary,
    dtype_of_products,
    gather_positions,
    pad_slots,
    rotary_table_of,
    where_rows,
)
from .stream_baka import (
    Layout,
    Parts,
    Placement,
    Span,
    Stream,
    columns_of,
    compare_slots,
    fixed_pauses,
    in_columns,
    is_whole,
    lay_out,
)

# What transformers calls the state in its own calls and outputs, since 5.24 and before. Ours take both names.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class Reading:
    """One call of `BakaModel`: reads its spans one after another and collects what they give."""

    text: Any  # the call's ids [B, L], or its embeddings [B, L, D]
    embeddings: Any = None  # of all spans, one after another [·, D], if all rows read the same columns
    pieces: Any = None  # each span's part of them [B, T, D]
    following: Any = None  # what `close` tells the cache
    reader: Any = None  # reads whole chunks by graphs, from a static state
    is_recordable: bool = False  # as a graph, to train on it
    graph: Any = None  # reads all of the call at once
    turn: Any = None  # of that graph, which no other call can have until the backward pass
    num_last_states: int | None = None  # how many columns' states are asked for, from the last one back; None: all

    def __init__(
        self,
        model: Any,  # a BakaModel
        cache: BakaCache | None,
        spans: list[Span],
        batch_size: int,
        length: int,
        real: torch.Tensor | None,
        with_states: bool,
        with_weights: bool,
        recomputes: bool = False,
    ):
        config = model.config
        self.model, self.config, self.cache, self.spans = model, config, cache, spans
        self.batch_size, self.length, self.real = batch_size, length, real
        self.with_states, self.with_weights = with_states, with_weights
        self.blocks: Any = model.layers
        self.half = config.stream_length if config.use_xl_cache else 0  # slots of the previous stream that are kept
        self.in_place = cache is not None and not torch.is_grad_enabled()
        self.bptt_chunks = config.bptt_chunks if torch.is_grad_enabled() else None
        self.recomputes = recomputes
        layers = config.num_hidden_layers
        if cache is None:
            stream = Stream(None, [None] * layers, [None] * layers, self.half)
        elif self.in_place:
            stream = Stream(cache.memory, [None] * layers, [None] * layers)
        else:
            stream = self._borrow(cache)
        # By how many chunks their gradients reach back: one stream, unless `bptt_chunks` asks for a sliding window.
        self.streams: dict[int, Stream] = {0: stream if self.bptt_chunks is None else stream.detach()}
        self.last = stream
        self.fixed_pauses = fixed_pauses(config)
        self.pauses: Any = self.fixed_pauses if cache is None or not config.uses_random_pauses else cache._pauses
        self.masks: dict[Any, torch.Tensor | None] = {}
        self.states: list[list[torch.Tensor]] = []
        self.weights: list[list[torch.Tensor]] = []

    @on_host
    def context(self) -> Any:
        """What the spans are to be read in."""
        device = self.model.norm.weight.device.type
        if not self.is_recordable or not torch.is_autocast_enabled(device):
            return nullcontext()
        # What autocast keeps while recording would be found, and be stale, when all else is read. Programs are compiled
        # for the one or the other, so the first call of a kind does without as well.
        return torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=False)

    def embed(self, embed_tokens: nn.Module) -> None:
        """Look all ids up in one call: the embedding has one gradient to add up, not one for every span."""
        if self.real is not None or not all(span.is_aligned for span in self.spans):
            self.text = embed_tokens(self.text)
            return
        # Span by span, so that each part lies in memory as it would alone: programs are compiled for a memory layout.
        ids = self.text.split([span.count for span in self.spans], dim=1)
        self.take_embeddings(embed_tokens(torch.cat([piece.flatten() for piece in ids])))

    def take_embeddings(self, embeddings: torch.Tensor) -> None:
        self.embeddings = embeddings
        parts = embeddings.split([self.batch_size * span.count for span in self.spans])
        self.pieces = [part.unflatten(0, (self.batch_size, -1)) for part in parts]

    def _borrow(self, cache: BakaCache) -> Stream:
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
        return Stream(readable(cache.memory), keys, values)

    @runs_compiled_parts
    def read(self, index: int) -> None:
        """Read span number `index`."""
        if self.reader is not None and self._is_whole_chunk(self.spans[index]):
            return self._read_chunk(self.spans[index])
        span, layout, *arguments = self._prepare(index)
        num_spans = len(self.spans)

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
                    memory, after, states, weights = self._run_on_host(span.first, layout, *arguments, stream)
            else:
                with allow_programs():
                    memory, after, states, weights = self._run(span.first, layout, *arguments, stream)
            if self.in_place and self.cache is not None:
                self.cache.memory = self.cache.memory if memory is None else memory
                if any_rows(layout.completes):
                    self._roll_over(self.cache, span, layout)
            if depth == reach:
                self.states.append([state[:, :0] for state in states] if self._is_skipped(span) else states)
                self.weights.append(weights)
                self.last = after
                if k is None:
                    following[0] = after
                elif is_read(0):
                    following[0] = after.detach(layout.completes)
            if is_read(depth + 1):
                following[depth + 1] = after
        self.streams = following

    def _is_whole_chunk(self, span: Span) -> bool:
        flags = isinstance(span.first, bool) and isinstance(span.has_previous, bool)
        return span.is_aligned and flags and (span.start, span.count) == (0, self.config.chunk_size)

    @on_host
    def _is_piece(self, layout: Layout) -> bool:
        """Whether a span is less than a chunk, on a CUDA device."""
        return self.model.norm.weight.is_cuda and not is_whole(layout, self.config)

    def _is_skipped(self, span: Span) -> bool:
        """Whether nobody asks for the states of a span's text."""
        return self.num_last_states is not None and span.column + span.count <= self.length - self.num_last_states

    @on_host
    def _read_chunk(self, span: Span) -> None:
        """Read a whole chunk from a static state."""
        assert self.cache is not None
        self.cache.memory = self.streams[0].memory
        self.reader.take_in(self.cache)
        states = self.reader.read_chunk(self.model, self.cache, span, self.text[:, span.column :][:, : span.count])
        self.states.append([states[:, :0] if self._is_skipped(span) else states.clone()])
        self.weights.append([])
        self.pauses = self.fixed_pauses
        nothing: list[Any] = [None] * len(self.blocks)
        self.last = Stream(self.cache.memory, nothing, nothing)
        self.streams = {0: self.last}

    @on_host
    def _prepare(self, index: int) -> tuple[Span, Layout, Any, torch.Tensor]:
        """Span number `index`, its layout, its view and its tokens: ids [B, T] or embeddings [B, T, D]."""
        span, pauses = self._place_pauses(self.spans[index])
        followed = self.cache is not None or index + 1 < len(self.spans)
        layout = lay_out(span, self.config, pauses, followed)
        if self.pieces is not None:
            text = self.pieces[index]
        elif isinstance(span.column, int):
            text = self.text[:, span.column : span.column + span.length]
        else:
            columns = span.column[:, None] + torch.arange(span.length)
            columns = columns.clamp(max=self.text.shape[1] - 1).to(self.text.device)
            text = self.text.gather(1, columns) if self.text.ndim == 2 else gather_positions(self.text, columns)
        dtype = text.dtype if text.ndim == 3 else self.model.embed_tokens.weight.dtype
        return span, layout, self._view(span, layout, text.device, dtype), text

    def _place_pauses(self, span: Span) -> tuple[Span, Any]:
        """The text positions of each row's pauses, as `lay_out` takes them; and the span, spread out if they differ."""
        config = self.config
        pauses = self.pauses
        if config.uses_random_pauses:
            kept = torch.as_tensor(pauses).expand(self.batch_size, -1)
            drawn = torch.tensor(self.fixed_pauses)
            if self.model.training:
                others = torch.randperm(config.chunk_size - 1)[: config.num_pause_tokens - 1].sort().values + 1
                drawn = torch.cat([torch.zeros(1, dtype=torch.int64), others])
            begins = torch.as_tensor((span.start == 0) & (span.count > 0)).expand(self.batch_size)
            kept = self.pauses = torch.where(begins[:, None], drawn, kept)
            pauses = kept[0].tolist() if bool((kept == kept[0]).all()) else kept
        if span.in_step and isinstance(pauses, torch.Tensor):
            start, count = (torch.as_tensor(value).expand(self.batch_size) for value in (span.start, span.count))
            span = span._replace(start=start, count=count)
        if not span.in_step and not isinstance(pauses, torch.Tensor):
            pauses = torch.tensor(pauses, dtype=torch.int64).reshape(1, -1)
        return span, pauses

    def _view(
        self, span: Span, layout: Layout, device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, torch.Tensor | None, Placement]:
        """What all blocks share for a span: angles, mask, and the place of its keys and values."""
        config, half, S = self.config, self.half, self.config.stream_length
        cos, sin = rotary_table_of(config, device, dtype)
        if layout.in_step:
            own = slice(S + layout.lo, S + layout.hi)
            angles = cos[own], sin[own]
            has_previous = span.has_previous if isinstance(span.has_previous, bool) else True
            first = 0 if has_previous and half else half
            placement = Placement(first, half + layout.lo, half + layout.hi, parts=self._parts(span, layout, cos, sin))
            key = (layout.lo, layout.hi, first) if isinstance(span.has_previous, bool) else None
            if key is None or key not in self.masks:
                self.masks[key] = self._mask(span, layout, placement, device, dtype)
            mask = self.masks[key]
        else:
            slots = layout.slots.to(device)
            angles = cos[S + slots], sin[S + slots]
            index = (half + slots)[:, None, :, None]
            placement = Placement(slots=index, valid=layout.valid.to(device)[:, None, :, None])
            mask = self._mask(span, layout, placement, device, dtype)
        return angles, mask, placement

    def _parts(self, span: Span, layout: Layout, cos: torch.Tensor, sin: torch.Tensor) -> Parts | None:
        """What compiled attention needs to know of a span in step to do without a mask; None if it cannot."""
        S, R, width = self.config.stream_length, self.config.num_memory_tokens, layout.hi - layout.lo
        has_past = None
        if isinstance(span.has_previous, torch.Tensor):
            has_past = span.has_previous.to(cos.device)[:, None, None, None]
        # In the middle of a chunk all rows see what they have read of it, if not all a previous one.
        if self.in_place or (has_past is not None and layout.lo > 0):
            return None
        if not can_attend_in_parts(self.config, cos.dtype, cos.device):
            return None
        ends = [slice(0, R)] if layout.lo == 0 else []
        if layout.hi == S:
            ends.append(slice(width - R, width))
        turned = slice(2 * S + layout.lo, 2 * S + layout.hi)
        return Parts(tuple(ends) if R > 1 else (), has_past, (cos[turned], sin[turned]))

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

    def _run(self, *arguments: Any) -> Any:
        if self.recomputes:
            return self.model._gradient_checkpointing_func(self._read_stream, *arguments)
        return self._read_stream(*arguments)

    # What a state is given in place stands elsewhere in every call: there would be a compiled program for each.
    _run_on_host = on_host(_run)

    def _read_stream(
        self,
        first: Any,
        layout: Layout,
        view: tuple[Any, torch.Tensor | None, Placement],
        text: torch.Tensor,
        stream: Stream,
    ) -> tuple[torch.Tensor | None, Stream, list[torch.Tensor], list[torch.Tensor]]:
        """Run the blocks over one span.

        Returns:
            The memory that its chunk has read, the state after it, hidden states [B, T, D] and weights of its text.
        """
        angles, mask, placement = view
        memory, hidden_states, placement, pasts = self._enter(first, layout, placement, text, stream)
        states, news, weights = [hidden_states], [], []
        for layer, past in zip(self.blocks, pasts, strict=True):
            # By position: checkpointing keeps positional arguments for each call of a layer.
            hidden_states, key, value, weight = layer(hidden_states, *past[:2], angles, mask, placement, *past[2:])
            states = [*states, hidden_states] if self.with_states else [hidden_states]
            is_kept = layout.followed and not self.in_place
            news.append((key.transpose(1, 2), value.transpose(1, 2)) if is_kept else None)
            weights.append(weight if self.with_weights else None)
        return memory, *self._leave(layout, placement, memory, pasts, news, states, weights)

    def _enter(
        self, first: Any, layout: Layout, placement: Placement, text: torch.Tensor, stream: Stream
    ) -> tuple[torch.Tensor | None, torch.Tensor, Placement, list[tuple[Any, Any, Any]]]:
        """What is ready before the blocks run: the memory that a span's chunk reads, what the first block reads
        [B, Q, D], the span's place, and for each block the keys and values from before it or the layer of the cache
        that has them."""
        model, R = self.model, self.config.num_memory_tokens
        text = model.embed_tokens(text) if text.ndim == 2 else text
        memory, read, write = stream.memory, None, None
        if R and (any_rows(layout.begins) or any_rows(layout.completes)):
            learned = model.learned_memory(text).expand(self.batch_size, -1, -1)
            memory = learned if memory is None else memory.to(text)
            memory = where_rows(and_rows(layout.begins, first), learned, memory)
            if any_rows(layout.begins):
                read = learned if first is True else where_rows(first, learned, model.solidify(memory, "read"))
            if any_rows(layout.completes):
                write = learned
                if self.config.memory_write == "carry" and first is not True:
                    write = where_rows(first, learned, model.solidify(memory, "write"))
        if stream.turns:
            placement = placement._replace(turn=self._backwards(text))
        stop = placement.start if placement.slots is None else self.half + self.config.stream_length
        pasts: list[tuple[Any, Any, Any]] = []
        for index in range(len(self.blocks)):
            if self.cache is not None and self.in_place:
                pasts.append((None, None, self.cache.layers[index]))
            else:
                pasts.append((*stream.kept(index, placement.first, stop), None))
        return memory, self._assemble(layout, text, read, write), placement, pasts

    def _leave(
        self,
        layout: Layout,
        placement: Placement,
        memory: Any,
        pasts: list[tuple[Any, Any, Any]],
        news: list[Any],
        states: list[torch.Tensor],
        weights: list[Any],
    ) -> tuple[Stream, list[torch.Tensor], list[torch.Tensor]]:
        """The state after a span, and the states and weights of its text, from what the blocks gave."""
        model, config, R = self.model, self.config, self.config.num_memory_tokens
        kept = [
            self._keep(layout, placement, past[:2], *new) if new else (None, None)
            for past, new in zip(pasts, news, strict=True)
        ]
        begin = placement.first if layout.completes is False and not self.in_place else 0
        turns = layout.completes is True and self.half > 0 and not self.in_place
        if R and any_rows(layout.completes):
            written = states[-1][:, -R:] if layout.in_step else gather_positions(states[-1], layout.write)
            written = model.memory_norm(written) if config.memory_norm else written
            memory = where_rows(layout.completes, written, memory)
        after = Stream(memory, [keys for keys, _ in kept], [values for _, values in kept], begin, turns)
        *states, last = (self._text(layout, state) for state in states)
        weights = [self._text_weights(layout, placement, weight) for weight in weights if weight is not None]
        return after, [*states, model.norm(last)], weights

    def _assemble(
        self, layout: Layout, text: torch.Tensor, read: torch.Tensor | None, write: torch.Tensor | None
    ) -> torch.Tensor:
        """The stream of a span, [B, Q, D]."""
        R, P = self.config.num_memory_tokens, self.config.num_pause_tokens
        pause = self.model.learned_pause(text).expand(self.batch_size, 1, -1) if P else None
        if layout.in_step:
            texts = iter(text.split([length for kind, length in layout.pieces if kind == "text"], dim=1))
            others = {"read": read, "pause": pause, "write": write}
            parts: list[Any] = [next(texts) if kind == "text" else others[kind] for kind, _ in layout.pieces]
            return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
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
        self, layout: Layout, placement: Placement, past: Any, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Keys and values of a block after a span, for a `Stream`."""
        S, half = self.config.stream_length, self.half
        if layout.completes is True:
            if not half:
                return None, None
            if not layout.begins:
                key, value = (
                    place(kept, new, placement, half + S)[:, :, half - placement.first :]
                    for kept, new in zip(past, (key, value), strict=True)
                )
            return key, value
        keys = place(past[0], key, placement, half + S)
        values = place(past[1], value, placement._replace(turn=None), half + S)
        if layout.completes is False or not half:
            return keys, values
        if layout.in_step:
            keys, values = (pad_slots(tensor, placement.first, 0) for tensor in (keys, values))
        rolled = torch.cat([apply_rotary(keys[:, :, S:], *self._backwards(keys)), keys[:, :, S:]], dim=2)
        keys = where_rows(layout.completes, rolled, keys)
        values = where_rows(layout.completes, torch.cat([values[:, :, S:], values[:, :, S:]], dim=2), values)
        return keys, values

    def _backwards(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [1, head_dim] that turn keys of the own stream into those of a previous one: S slots earlier."""
        S = self.config.stream_length
        cos, sin = rotary_table_of(self.config, like.device, like.dtype)
        return cos[S], -sin[S]

    @on_host
    def _roll_over(self, cache: BakaCache, span: Span, layout: Layout) -> None:
        """The own stream of the rows whose chunk is full becomes their previous one, in place."""
        S = self.config.stream_length
        if cache._is_recording:
            completes = torch.as_tensor(layout.completes).expand(self.batch_size)
            cache._record_boundary(span.num_tokens, completes, torch.as_tensor(self.pauses).expand(self.batch_size, -1))
        if not self.half:
            return
        for layer in cache.layers:
            for buffer, own in (
                (layer.keys, apply_rotary(layer.keys[:, :, S:], *self._backwards(layer.keys))),
                (layer.values, layer.values[:, :, S:]),
            ):
                buffer[:, :, :S] = where_rows(layout.completes, own, buffer[:, :, :S])

    @on_host
    def close(self, kept: list[tuple[torch.Tensor, torch.Tensor]]) -> BaseModelOutputWithPast:
        """Leave the state behind in the cache, `kept` for its keys and values, and put together what was read."""
        if self.spans and self.graph is None:
            self.anchor()
        if self.cache is not None:
            self._leave_state(self.cache, kept, *self.following)
        states, weights = self._outputs()
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            **{CACHE_NAME: self.cache},
            hidden_states=tuple(states) if self.with_states else None,
            attentions=weights,
        )

    def anchor(self) -> None:
        """In training, make every parameter one that the call depends on."""
        if self.model.training and torch.is_grad_enabled():
            first = self.states[0]
            first[-1] = first[-1] + self.model._anchor(first[-1])

    @runs_compiled_parts
    def kept_at_the_end(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each block's keys and values, [B, H_kv, slots, head_dim], that the cache is left with; none if in place."""
        kept, turn = self._find_kept()
        if turn is not None:
            with allow_programs():
                for index, (keys, values) in enumerate(kept):
                    kept[index] = as_previous(keys, values, turn)
        return kept

    @on_host
    def _find_kept(self) -> tuple[list[Any], Any]:
        """The same; or those of a stream that has just ended, and cos and sin that turn its keys back."""
        if self.cache is None or self.in_place or not self.spans:
            return [], None
        last, slots = self.last, self.half + self.config.stream_length
        if last.turns:
            return list(zip(last.keys, last.values, strict=True)), self._backwards(last.keys[0])
        kept = [last.kept(index, 0, slots) for index in range(len(self.blocks))]
        if kept[0][0] is None:  # nothing of a full chunk is kept without the XL cache
            kept = [(torch.zeros_like(layer.keys), torch.zeros_like(layer.values)) for layer in self.cache.layers]
        return kept, None

    def _leave_state(
        self,
        cache: BakaCache,
        kept: list[tuple[torch.Tensor, torch.Tensor]],
        input_ids: torch.Tensor | None,
        seeded: torch.Tensor,
        num_aligned: int,
        restarted: bool,
    ) -> None:
        """What the cache keeps of the call. In the last `num_aligned` positions no row had padding."""
        if self.spans:
            cache.memory = self.last.memory
        for layer, both in zip(cache.layers, kept, strict=False):  # none in place
            (layer.keys, layer.values), layer.is_shared = both, True
        num_tokens = self.spans[-1].num_tokens if self.spans else cache._num_tokens
        pauses = torch.as_tensor(self.pauses, dtype=torch.int64).expand(self.batch_size, -1).clone()
        cache._advance(self.length, num_tokens, seeded, pauses, num_aligned, restarted)
        if input_ids is None:
            cache._history = cache._opening = None
        else:
            cache._remember_ids(input_ids, self.real)

    def _outputs(self) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...] | None]:
        """Hidden states [B, L, D] and weights [B, H, L, 2S] of the call's tokens, each in its own column."""
        spans, batch_size, length, real = self.spans, self.batch_size, self.length, self.real
        config, S = self.config, self.config.stream_length
        if not spans:
            like = self.model.norm.weight
            empty = like.new_zeros(batch_size, length, config.hidden_size)
            blank = like.new_zeros(batch_size, config.num_attention_heads, length, 2 * S)
            count = config.num_hidden_layers + 1 if self.with_states else 1
            return [empty] * count, (blank,) * config.num_hidden_layers if self.with_weights else None

        columns = columns_of(spans, batch_size, length)
        states = [in_columns(parts, columns, real) for parts in zip(*self.states, strict=True)]
        weights = None
        if self.with_weights:
            shape = (batch_size, length, config.num_attention_heads, 2 * S)
            weights = tuple(
                in_columns(parts, columns, real).view(shape).transpose(1, 2)
                for parts in zip(*self.weights, strict=True)
            )
        return states, weights


class ReadingByBlocks(Reading):
    """A pass of which torch.compile compiles the blocks alone: one program for all of them, not one that has them all.

    A block's own work is what it can speed up, and a program of many takes many times as long to compile. Only where a
    chunk is computed again in the backward pass, which happens outside, must it be compiled as a whole.
    """

    _run = runs_compiled_parts(Reading._read_stream)
    _leave = on_host(Reading._leave)

    # Whole chunks are compiled for their own length. PyTorch would take the second that it sees, a last chunk that
    # nothing reads on from, for one of many, and write slower code for any.

    def _view(self, span: Span, layout: Layout, *arguments: Any) -> tuple[Any, torch.Tensor | None, Placement]:
        angles, mask, placement = super()._view(span, layout, *arguments)
        turned = placement.parts.angles if placement.parts else ()
        self._fix_length(layout, *angles, *turned)
        if isinstance(mask, torch.Tensor):
            self._fix_length(layout, mask, dims=(2, 3))
        return angles, mask, placement

    @on_host
    def _enter(self, first: Any, layout: Layout, *arguments: Any) -> Any:
        memory, hidden_states, placement, pasts = super()._enter(first, layout, *arguments)
        self._fix_length(layout, hidden_states, dims=(1,))
        return memory, hidden_states, placement, pasts

    def _fix_length(self, layout: Layout, *tensors: torch.Tensor, dims: tuple[int, ...] = (0,)) -> None:
        """Have programs for whole chunks take `dims` of `tensors`, whose size the span decides, for what they are."""
        if layout.in_step and is_whole(layout, self.config):
            for tensor in tensors:
                torch._dynamo.mark_static(tensor, list(dims))
