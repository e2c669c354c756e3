"""Reading on from a static state, `model.new_cache(batch_size, static=True)`, by CUDA graphs.

A step of one token is some hundred kernels of a few microseconds each, and so is a chunk read at batch size 1: asked
for one by one from Python they keep a GPU waiting. Here the tensors of a state stay where they are, so the kernels of a
step are recorded once and then launched all together. There are few kinds of steps, since what a token needs depends on
its position in the chunk alone: it may have a pause before it, begin or end a chunk, or none of these. Which one comes
next is known on the host without waiting for the device. Rows out of step share a step too, of the kind that one of
them needs most; in a large batch the few that begin or end a chunk are read apart, since that takes many positions and
moves all of a row. What is less than a chunk and more than a token is read as a chunk of which the rest does not count.

The blocks are those of the model in another order of work: what multiplies the same input is one product, and what lies
between products is compiled. All else (memory, layout, masks) is `reading_baka`'s own code, recorded.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .cache_baka import BakaCache
from .compile_baka import allow_programs
from .configuration_baka import BakaConfig
from .decoding_attention_baka import LARGEST_SHARE, attend_seen, can_attend_seen
from .functions_baka import put_on, rotary_table_of
from .graphs_baka import PlainWeights, recording
from .history_baka import hash_of_nothing, hash_tokens
from .memory_baka import Memory
from .reading_baka import ChunkPass, backwards, rolled_over
from .stream_baka import (
    Associated,
    Layout,
    Placement,
    Span,
    Stream,
    View,
    compare_slots,
    fixed_pauses,
    lay_out,
    writers_of,
)

# Where states are read this way. Without a graph it is right everywhere, but no faster.
DEVICES = ("cuda",)

PLAIN, PAUSE, EDGE = range(3)  # kinds of steps, by what the token at a position brings with it

# From this batch size on keys and values are most of what a step reads, and only those written so far are worth it.
LARGE_BATCH = 16
NUM_WINDOWS = 4

# In such a batch rows that begin or end a chunk are read apart, so many at a time, if they are no more than a part.
NUM_APART = 8
LARGEST_PART_APART = 1 / 8

_idle: "weakref.WeakKeyDictionary[nn.Module, StaticReader]" = weakref.WeakKeyDictionary()
_weights: "weakref.WeakKeyDictionary[nn.Module, DecodingWeights]" = weakref.WeakKeyDictionary()


def reader_of(model: Any, cache: BakaCache) -> "StaticReader | None":
    """The reader of `cache` by `model`, a `BakaModel`, with the state in its tensors; None if it cannot be read so."""
    weight, config = model.norm.weight, model.config
    if weight.device.type not in DEVICES or config._attn_implementation != "sdpa" or cache._is_recording:
        return None
    if torch.is_autocast_enabled(weight.device.type):
        return None
    reader = cache._reader
    if reader is None or not reader.fits(cache, model):
        if cache.device != weight.device:
            cache.to(weight.device)
        if cache.layers[0].keys.dtype != weight.dtype:
            return None  # the plain path brings it to the model's
        # A state that is gone leaves its tensors and their graphs to the next of its shape.
        reader = _idle.pop(model, None)
        if reader is None or not reader.fits(cache, model):
            weights = _weights_of(model)
            if weights is None:
                cache.is_static = False
                return None
            reader = StaticReader(model, cache, weights)
        cache._release()
        reader.serve(cache)
    reader.take_in(cache)
    reader.weights.refresh(model)
    return reader


def _weights_of(model: Any) -> "DecodingWeights | None":
    """The weights of `model` for all that reads by it; None if they are not those of plain modules."""
    weights = _weights.get(model)
    if weights is None or not weights.plain.are_as_they_were():
        plain = PlainWeights(model)
        joined = (linear for layer in model.layers for linear in layer.input_projections)
        if not plain.are_plain or any(type(linear) is not nn.Linear for linear in joined):
            return None
        weights = _weights[model] = DecodingWeights(model, plain)
    return weights


def _leave(model: Any, reader: "StaticReader") -> None:
    """What becomes of the reader of a state that is gone."""
    reader.owner = None
    if not reader.is_shared and model() is not None:
        _idle[model()] = reader


class StaticReader:
    """Tensors of a state that stay where they are, and the graphs recorded over them.

    `is_shared` says that an autograd graph may hold on to them: nobody may write into them any more.
    """

    def __init__(self, model: Any, cache: BakaCache, weights: "DecodingWeights"):
        config: BakaConfig = model.config
        self.config, self.weights, self.model = config, weights, weakref.ref(model)
        self.chunk_size, self.stream_length = config.chunk_size, config.stream_length  # a config is slow to ask
        self.device, self.batch_size = cache.layers[0].keys.device, cache.batch_size
        self.is_shared = False
        self.owner: Any = None  # a weak reference to the state whose tensors these are
        self.end_of_owner: Any = None  # what happens when that is gone
        self.apart: StaticReader | None = None  # of a few rows, for those at the edge of a chunk
        self.graphs: dict[Any, Any] = {}
        self.views: dict[Any, View] = {}
        S = config.stream_length
        with torch.inference_mode(False):
            slots = cache.layers[0].keys
            shape = (config.num_hidden_layers, *slots.shape)
            self.keys, self.values = (slots.new_zeros(shape) for _ in range(2))
            self.num_slots = slots.shape[2]
            self.memory = {name: torch.zeros_like(x) for name, x in cache.carried.items()}
            self.num_tokens = torch.zeros(self.batch_size, dtype=torch.int64, device=self.device)
            self.seeded = torch.zeros(self.batch_size, dtype=torch.bool, device=self.device)
            self.counts = torch.ones_like(self.num_tokens)  # tokens that each row reads next
            self.history = hash_of_nothing(self.batch_size, self.device)
            self.ids: dict[int, torch.Tensor] = {}
            self.states: dict[int, torch.Tensor] = {}
            for length in (1, config.chunk_size):
                self.ids[length] = self.num_tokens.new_zeros(self.batch_size, length)
                self.states[length] = slots.new_zeros(self.batch_size, length, config.hidden_size)
            compiled: Callable = torch.compile(dynamic=False) if self.device.type == "cuda" else _as_it_is
            self.slots: list[dict[str, torch.Tensor]] = []  # of each block
            for layer, *both in zip(cache.layers, self.keys, self.values, strict=True):
                self.slots.append(dict(zip(("keys", "values"), both, strict=True)))
                if layer.inputs is not None:
                    self.slots[-1]["inputs"] = torch.zeros_like(layer.inputs)
            programs = compiled(enter), compiled(leave), compiled(write)
            self.blocks = [
                DecodingBlock(joined, slots, *programs)
                for joined, slots in zip(weights.blocks, self.slots, strict=True)
            ]
            self.locate, self.roll = compiled(locate), compiled(roll_over)
            self.pauses = torch.tensor(fixed_pauses(config), dtype=torch.int64, device=self.device)[None]
            self.angles = rotary_table_of(config, self.device, slots.dtype)
        # What the host knows of the tensors above: what a token brings, and where the slots seen by it end.
        self.known: list[Any] = [self.num_tokens.cpu(), self.seeded.cpu(), self.counts.cpu()]
        self.kinds, self.widths, self.ends = kinds_of_steps(config)
        self.is_edge = torch.tensor(self.kinds) == EDGE
        self.may_skip = can_attend_seen(self.keys.dtype, self.device, self.batch_size)
        self.num_windows = NUM_WINDOWS if self.batch_size >= LARGE_BATCH else 1
        self.window = -(-S // (8 * self.num_windows)) * 8
        on_gpu = self.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self.stream = torch.cuda.Stream(self.device) if on_gpu else None

    @property
    def reads_pieces(self) -> bool:
        """Whether it reads pieces of a chunk, each by a pass over a whole one: for many rows that takes longer than to
        ask for the kernels of a shorter one."""
        return self.batch_size < LARGE_BATCH and not self.config.uses_random_pauses

    def serve(self, cache: BakaCache) -> None:
        """Be the reader of `cache` from now on."""
        cache._reader, self.owner = self, weakref.ref(cache)
        self.end_of_owner = weakref.finalize(cache, _leave, self.model, self)
        self.end_of_owner.atexit = False

    def give_up(self) -> None:
        """Be nobody's reader any more: an autograd graph may hold on to these tensors."""
        self.is_shared = True
        if self.end_of_owner is not None:
            self.end_of_owner.detach()

    def fits(self, cache: BakaCache, model: Any) -> bool:
        """Whether this is, or may become, the reader of `cache` by `model`."""
        keys = cache.layers[0].keys
        same = (keys.shape, keys.dtype, keys.device) == (self.keys.shape[1:], self.keys.dtype, self.keys.device)
        is_free = self.owner is None or self.owner() is cache
        is_usable = self.model() is model and is_free and not self.is_shared
        return same and is_usable and self.weights.plain.are_as_they_were()

    def take_in(self, cache: BakaCache) -> None:
        """Make these tensors those of `cache`. Whatever has replaced them there since is copied."""
        for layer, slots in zip(cache.layers, self.slots, strict=True):
            for name, own in slots.items():
                if getattr(layer, name) is not own:
                    setattr(layer, name, own.copy_(getattr(layer, name)))
                    layer.is_shared = False
        carried = cache.carried
        if any(carried[name] is not own for name, own in self.memory.items()):
            self._remember(carried)
            cache.carried = self.memory
        if cache._history is not None and cache._history is not self.history:
            cache._history = self.history.copy_(cache._history)

    def _remember(self, memory: Memory) -> None:
        """Make this what the memory holds. A tensor of it may be one of these, under another name."""
        copies = {name: memory[name].clone() for name, own in self.memory.items() if memory[name] is not own}
        for name, copy in copies.items():
            self.memory[name].copy_(copy)

    def read_token(self, cache: BakaCache, input_ids: torch.Tensor, reads: torch.Tensor) -> torch.Tensor:
        """Read one token [B, 1] in each row where `reads` [B], on the CPU, is True: its normed state [B, 1, D]."""
        few = self._few_at_edges(cache, reads) if self.batch_size >= LARGE_BATCH else []
        rest = reads if len(few) == 0 else reads.index_fill(0, torch.cat([*few]), False)
        if len(few) == 0 or bool(rest.any()):
            self._read_together(cache._num_tokens, cache._seeded, input_ids, rest)
        else:
            self.states[1].zero_()
        for rows in few:
            self._read_apart(cache._num_tokens, cache._seeded, input_ids, rows)
        return self.states[1].clone()

    def _few_at_edges(self, cache: BakaCache, reads: torch.Tensor) -> Sequence[torch.Tensor]:
        """Those of the rows `reads` [B] whose token begins or ends a chunk, so many together, if they are so few that
        it pays to read them apart."""
        edges = (reads & self.is_edge[cache._num_tokens % self.chunk_size]).nonzero()[:, 0]
        return edges.split(NUM_APART) if 0 < len(edges) <= LARGEST_PART_APART * self.batch_size else []

    def _read_together(
        self, num_tokens: torch.Tensor, seeded: torch.Tensor, input_ids: torch.Tensor, reads: torch.Tensor
    ) -> None:
        counts = num_tokens[reads].tolist()
        positions = {count % self.chunk_size for count in counts}
        kind = max(map(self.kinds.__getitem__, positions))
        stop, skips = self.num_slots, False
        if kind != EDGE:
            half, end = stop - self.stream_length, max(map(self.ends.__getitem__, positions))
            up_to = min(stop, half + -(-end // self.window) * self.window)
            if self.may_skip:
                n = self.chunk_size
                num_seen = sum(self.ends[count % n] + half * (count >= n) for count in counts)
                skips = num_seen <= LARGEST_SHARE * up_to * len(counts)
            if not skips:
                stop = up_to
        self._tell(num_tokens, seeded, reads.long())
        self.ids[1].copy_(input_ids)
        self.known[0] = self.known[0].new_empty(0)  # unknown, should the step be interrupted
        self._run(("token", kind, stop, skips), lambda: self._token(kind, stop, skips))
        self.known[0] = num_tokens + reads

    def _read_apart(
        self, num_tokens: torch.Tensor, seeded: torch.Tensor, input_ids: torch.Tensor, rows: torch.Tensor
    ) -> None:
        """Read a token in these few rows, at the edge of a chunk, in tensors of their own."""
        if self.apart is None:
            model: Any = self.model()
            self.apart = StaticReader(model, model.new_cache(NUM_APART), self.weights)
        apart, count = self.apart, len(rows)
        rows = nn.functional.pad(rows, (0, NUM_APART - count))  # it has more, which read nothing
        padded = put_on(self.device, rows)
        index = padded[:count]
        pairs = list(zip(self._held(), apart._held(), strict=True))
        stacked = (self.keys, apart.keys), (self.values, apart.values)
        for own, other in pairs:
            torch.index_select(own, 0, padded, out=other)
        for own, other in stacked:
            torch.index_select(own, 1, padded, out=other)
        reads = torch.arange(NUM_APART) < count
        apart._read_together(num_tokens[rows], seeded[rows], input_ids[padded], reads)
        for own, other in pairs:
            own.index_copy_(0, index, other[:count])
        for own, other in stacked:
            own.index_copy_(1, index, other[:, :count])
        self.states[1].index_copy_(0, index, apart.states[1][:count])

    def _held(self) -> list[torch.Tensor]:
        """All of a state that is recurrent, [B, …] each, but for keys and values, which are stacked."""
        inputs = [slots["inputs"] for slots in self.slots if "inputs" in slots]
        return [*self.memory.values(), *inputs, self.history]

    def _tell(self, *rows: torch.Tensor) -> None:
        """Have the device know of each row how many tokens it has read, whether it was seeded, how many it reads."""
        for index, (own, now) in enumerate(zip((self.num_tokens, self.seeded, self.counts), rows, strict=True)):
            if not torch.equal(self.known[index], now):
                self.known[index] = now.new_empty(0)  # unknown, should this be interrupted
                own.copy_(now, non_blocking=True)  # see `put_on`
                self.known[index] = now

    def read_piece(self, span: Span, seeded: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Read `text` [B, T], of each row a piece of a chunk, `seeded` [B] or not: its normed states [B, T, D], to be
        used before the next piece or chunk."""
        counts, num_tokens = (torch.as_tensor(x).expand(self.batch_size) for x in (span.count, span.num_tokens))
        self._tell(num_tokens - counts, seeded, counts)
        self.ids[self.chunk_size][:, : span.length].copy_(text)
        self.known[0] = self.known[0].new_empty(0)  # unknown, should this be interrupted
        self._run(("piece",), self._piece)
        self.known[0] = num_tokens
        return self.states[self.chunk_size][:, : span.length]

    def read_chunk(self, span: Span, text: torch.Tensor) -> torch.Tensor:
        """Read `text` [B, n], a whole chunk in step: its normed states [B, n, D], to be used before the next chunk."""
        self.ids[span.length].copy_(text)
        self._run(("chunk", span.first, span.has_previous), lambda: self._chunk(span))
        return self.states[span.length]

    def _run(self, key: Any, program: Callable[[], None]) -> None:
        """Run a program: the first time as it is, which also compiles its parts, then as a graph."""
        graph = self.graphs.get(key)
        if graph is not None:
            graph.replay()
            return
        # Programs are compiled for a mode: whoever comes back in inference mode must not need another while recording.
        with recording, torch.inference_mode(False), torch.no_grad(), allow_programs():
            if self.pool is not None and key in self.graphs:
                graph = torch.cuda.CUDAGraph()
                options: dict[str, Any] = dict(pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
                with torch.cuda.device(self.device), torch.cuda.graph(graph, **options):
                    program()
                graph.replay()
            else:
                program()
            self.graphs[key] = graph

    # What is recorded. Everything that differs from one replay to the next is in this object's tensors.

    def _token(self, kind: int, stop: int, skips: bool) -> None:
        states = self._read_rows(1, self.widths[kind], stop, kind == EDGE, skips)
        reads = self.counts[:, None] > 0
        self.states[1].copy_(states.masked_fill(~reads[:, :, None], 0))
        hashed = hash_tokens(self.ids[1], start=self.history)
        self.history.copy_(torch.where(reads, hashed, self.history))

    def _piece(self) -> None:
        n = self.chunk_size
        self.states[n].copy_(self._read_rows(n, self.stream_length, self.num_slots, True))

    def _read_rows(self, length: int, width: int, stop: int, has_edge: bool, skips: bool = False) -> torch.Tensor:
        """Read the next `counts` tokens of each row, `length` at most, in `width` positions that see the slots up to
        `stop`; `has_edge` says whether a chunk may begin or end there, `skips` that slots which a row does not see are
        not read."""
        rows = self.num_tokens, self.seeded, self.counts
        span, layout, view = self.locate(self.config, self.angles, self.pauses, *rows, length, width, self.keys.dtype)
        mask, placement = view.mask[..., :stop].contiguous(), view.placement._replace(stop=stop)
        view = view._replace(mask=mask, placement=placement, skips_hidden=skips)
        if not has_edge:
            layout.begins = layout.completes = False
            if view.writers is not None:
                view = view._replace(writers=view.writers._replace(completes=False))
        states = self._read(span, layout, view)
        self.num_tokens.copy_(span.num_tokens)
        return states

    def _chunk(self, span: Span) -> None:
        key = span.first, span.has_previous
        layout = lay_out(span, self.config, fixed_pauses(self.config), True)
        if key not in self.views:
            S, total = self.config.stream_length, self.keys.shape[3]
            placement = Placement(0 if span.has_previous else total - S, total - S, total)
            numbers, horizons = compare_slots(self.config, span, layout, placement, self.device)
            cos, sin = self.angles
            own = slice(S, 2 * S)
            writers = writers_of(self.config, span, layout, False, self.device)
            mask = _bias(numbers, horizons, self.keys.dtype)
            self.views[key] = View((cos[own], sin[own]), mask, placement, writers=writers)
        self.states[span.length].copy_(self._read(span, layout, self.views[key]))

    def _read(self, span: Span, layout: Layout, view: View) -> torch.Tensor:
        chunk_pass = ChunkPass(self.model(), self.batch_size, self.blocks, in_place=True)
        nothing = [None] * len(self.blocks)
        passed = chunk_pass.run(span.first, layout, view, self.ids[span.length], Stream(self.memory, nothing, nothing))
        if layout.completes is not False:
            assert passed.after.memory is not None
            self._remember(passed.after.memory)
            if self.config.use_xl_cache:
                self.roll(self.keys, self.values, *backwards(self.config, self.keys), layout.completes)
        return passed.states[-1]


class DecodingWeights:
    """What all readers of a model share: copies of its blocks' weights, those that multiply the same input joined."""

    def __init__(self, model: Any, plain: PlainWeights):
        self.plain = plain
        self.num_plans = model.num_plans  # when the copies were last made
        with torch.inference_mode(False):
            self.blocks = [BlockWeights(layer) for layer in model.layers]

    def refresh(self, model: Any) -> None:
        """Copy them again after other calls than tokens: not every optimizer leaves a trace of having changed them."""
        if self.num_plans == model.num_plans:
            return
        with torch.no_grad(), torch.inference_mode(False):
            for block in self.blocks:
                block.refresh()
        self.num_plans = model.num_plans


class BlockWeights:
    """Those of one block."""

    def __init__(self, layer: Any):
        self.layer = layer
        self.of_input = Joined.of(layer.input_projections)
        self.of_mlp = None if layer.is_parallel else Joined.of(layer.mlp_projections)
        beside = layer.projections_beside
        self.of_attended = _side_by_side(beside) if len(beside) > 1 else None

    def refresh(self) -> None:
        self.of_input.copy_(self.layer.input_projections)
        if self.of_mlp is not None:
            self.of_mlp.copy_(self.layer.mlp_projections)
        if self.of_attended is not None:
            self.of_attended.copy_(_side_by_side(self.layer.projections_beside))


class DecodingBlock:
    """A `BakaDecoderLayer` in another order of work, for callers that take it for one: what multiplies the same input
    is one product, and keys and values are written in place."""

    def __init__(
        self,
        weights: BlockWeights,
        slots: dict[str, torch.Tensor],
        enter: Callable,
        leave: Callable,
        write: Callable,
    ):
        self.layer, self.weights, self.slots = weights.layer, weights, slots
        self.enter, self.leave, self.write = enter, leave, write

    def __call__(
        self,
        hidden_states: torch.Tensor,
        past_key: None,
        past_value: None,
        view: View,
        slots: None,
        associated: Associated | None,
        first_value: torch.Tensor | None,
    ) -> tuple[torch.Tensor, None, torch.Tensor | None, None, Associated | None]:
        held = None if associated is None else associated.held
        view_of_keys = view._replace(mask=None, skips_hidden=False)
        of_input, of_mlp, of_attended = self.weights.of_input, self.weights.of_mlp, self.weights.of_attended
        entered = self.enter(self.layer, hidden_states, of_input, view_of_keys, held, self.slots, first_value)
        attention = self.layer.self_attn
        visible = slice(view.placement.first, view.placement.stop)
        keys, values = (self.slots[name][:, :, visible] for name in ("keys", "values"))
        if view.skips_hidden:
            assert view.mask is not None
            attended = attend_seen(entered.query, keys, values, view.mask, attention.scaling)
        else:
            attended = nn.functional.scaled_dot_product_attention(
                entered.query,
                keys,
                values,
                attn_mask=view.mask,
                scale=attention.scaling,
                enable_gqa=attention.num_key_value_groups > 1,
            )
        output = self.leave(self.layer, entered, attended, of_attended, of_mlp, held)
        if associated is not None and view.writers is not None and view.writers.completes:
            inputs = view.writers.take(output) if entered.inputs is None else entered.inputs
            associated = associated._replace(held=self.write(self.layer, held, inputs))
        return output, None, entered.value, None, associated


class Joined(NamedTuple):
    """Copies of linear layers that multiply the same input, joined to one."""

    weight: torch.Tensor  # [sum of `sizes`, ·]
    bias: torch.Tensor | None  # [sum of `sizes`]; None if none of them has one
    sizes: list[int]  # rows of each

    @staticmethod
    def of(linears: list[nn.Linear]) -> "Joined":
        sizes = [linear.weight.shape[0] for linear in linears]
        weight = linears[0].weight.new_empty(sum(sizes), linears[0].weight.shape[1])
        has_bias = any(linear.bias is not None for linear in linears)
        joined = Joined(weight, weight.new_zeros(sum(sizes)) if has_bias else None, sizes)
        joined.copy_(linears)
        return joined

    @torch.no_grad()
    def copy_(self, linears: list[nn.Linear]) -> None:
        """Take the weights of these layers, the same or others of their sizes."""
        torch.cat([linear.weight for linear in linears], out=self.weight)
        if self.bias is not None:
            for part, linear in zip(self.bias.split(self.sizes), linears, strict=True):
                if linear.bias is not None:
                    part.copy_(linear.bias)


class Entered(NamedTuple):
    """What is known of a block before attention."""

    hidden_states: torch.Tensor  # [B, Q, D]
    query: torch.Tensor  # [B, H, Q, head_dim]
    gated: torch.Tensor | None  # act(gate) ⊙ up [B, Q, ·], if their input is there already
    association_query: torch.Tensor | None  # [B, Q, ·], if associations are read beside attention
    inputs: torch.Tensor | None  # what the text of the chunk will write to them, if it does
    value: torch.Tensor | None  # [B, Q, H_kv, head_dim], if other blocks need it


def enter(
    layer: Any,
    hidden_states: torch.Tensor,
    of_input: Joined,
    view: View,
    held: tuple[torch.Tensor, ...] | None,
    own: dict[str, torch.Tensor],
    first_value: torch.Tensor | None,
) -> Entered:
    """What a block does before attention.

    New keys and values are left in their slots of `own`, [B, H_kv, slots, head_dim], and so are inputs that will be
    written to associations. Of these the block finds `held`, and of the first block's values `first_value`.
    """
    keys, values, inputs, association_query = own["keys"], own["values"], None, None
    if held is not None:
        hidden_states = layer.read_before(hidden_states, held)
    normed = layer.input_layernorm(hidden_states)
    products = list(one_product(of_input, normed))
    if held is not None and layer.is_read_beside:
        association_query = products.pop()
        assert view.writers is not None
        inputs = view.writers.place_(own["inputs"], view.writers.take(normed))
    query, key, value, _ = layer.self_attn.arrange(*products[:3], view, first_value)
    for_others = value if layer.self_attn.config.value_residual and first_value is None else None
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    _, start, _, slots, valid = view.placement
    if slots is None or valid is None:
        stop = start + key.shape[2]
        keys[:, :, start:stop] = key
        values[:, :, start:stop] = value
    else:
        # By index_put: compiled, a scatter would copy all slots to change a few.
        rows, heads = (torch.arange(size, device=key.device) for size in key.shape[:2])
        index = rows[:, None, None], heads[:, None], slots[:, :, :, 0]
        keys.index_put_(index, torch.where(valid, key, keys[index]))
        values.index_put_(index, torch.where(valid, value, values[index]))
    gated = layer.mlp.activate(*products[3:]) if layer.is_parallel else None
    return Entered(hidden_states, query, gated, association_query, inputs, for_others)


@torch.no_grad()
def _side_by_side(linears: list[nn.Linear]) -> torch.Tensor:
    """The weights of layers whose products are added, as one that multiplies their inputs side by side."""
    return torch.cat([linear.weight for linear in linears], dim=1)


def one_product(joined: Joined, normed: torch.Tensor) -> Sequence[torch.Tensor]:
    """What the layers that are joined make of `normed`, by all their rows in one matrix."""
    return nn.functional.linear(normed, joined.weight, joined.bias).split(joined.sizes, dim=-1)


def leave(
    layer: Any,
    entered: Entered,
    attended: torch.Tensor,
    of_attended: torch.Tensor | None,
    of_mlp: Joined | None,
    held: tuple[torch.Tensor, ...] | None,
) -> torch.Tensor:
    """What a block does after attention, [B, H, Q, head_dim]: its output [B, Q, D].

    `of_attended` are the weights of attention and of what is read beside it, if anything is, side by side.
    """
    attended, o_proj = attended.transpose(1, 2).flatten(2), layer.self_attn.o_proj
    query = entered.association_query
    if of_attended is not None:
        found = layer.association.look_up(query, held)
        attended = nn.functional.linear(torch.cat([attended, found], dim=-1), of_attended, o_proj.bias)
    else:
        attended = o_proj(attended)
        if query is not None:
            attended = attended + layer.association.read(query, held)
    mlp = layer.mlp.down_proj if of_mlp is None else partial(_mlp, layer, of_mlp)
    return layer.combine(entered.hidden_states, attended, mlp, entered.gated)


def _mlp(layer: Any, of_mlp: Joined, normed: torch.Tensor) -> torch.Tensor:
    return layer.mlp.down_proj(layer.mlp.activate(*one_product(of_mlp, normed)))


def write(layer: Any, held: tuple[torch.Tensor, ...], inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a block holds of associations after a chunk."""
    return layer.association.write(held, inputs)


def roll_over(keys: torch.Tensor, values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, completes: Any) -> None:
    """In the rows that `completes`, True or a tensor [B], says, the second half of all [L, B, H, 2S, head_dim] becomes
    the first, see `rolled_over`."""
    rows = completes if completes is True else completes[:, None, None, None]
    for own, rolled in zip((keys, values), rolled_over(keys, values, cos, sin), strict=True):
        past = own.chunk(2, dim=3)[0]
        past.copy_(rolled if rows is True else torch.where(rows, rolled, past))


def locate(
    config: BakaConfig,
    table: tuple[torch.Tensor, torch.Tensor],
    pauses: torch.Tensor,
    num_tokens: torch.Tensor,
    seeded: torch.Tensor,
    counts: torch.Tensor,
    length: int,
    width: int,
    dtype: torch.dtype,
) -> tuple[Span, Layout, View]:
    """Span, layout and view of the next tokens of each row, which are of one chunk, all on the device.

    Args:
        config: the model's configuration.
        table: cos and sin [2S, 1, head_dim].
        pauses: [1, P], the text positions of pauses.
        num_tokens: [B] int64, tokens each row has read.
        seeded: [B] bool, rows whose text began with another stream's memory.
        counts: [B] int64, tokens that each row reads, which may be none.
        length: the most that any does.
        width: Q, positions that a row takes at most.
        dtype: the model's.
    """
    n, S, half = config.chunk_size, config.stream_length, config.stream_length if config.use_xl_cache else 0
    has_previous = num_tokens >= n
    span = Span(0, num_tokens % n, counts, length, ~(has_previous | seeded), has_previous, num_tokens + counts)
    layout = lay_out(span, config, pauses, True, width)
    placement = Placement(slots=(half + layout.slots)[:, None, :, None], valid=layout.valid[:, None, :, None])
    numbers, horizons = compare_slots(config, span, layout, placement, num_tokens.device)
    cos, sin = table
    angles = cos[S + layout.slots], sin[S + layout.slots]
    writers = writers_of(config, span, layout, False, num_tokens.device)
    return span, layout, View(angles, _bias(numbers, horizons, dtype), placement, writers=writers)


def _bias(numbers: torch.Tensor, horizons: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B or 1, 1, Q, K], what is added to a weight: nothing where a query sees the key."""
    sees = numbers[:, None, None, :] <= horizons[:, None, :, None]
    return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, float("-inf"))


def kinds_of_steps(config: BakaConfig) -> tuple[list[int], list[int], list[int]]:
    """For a token at each position of a chunk its kind, n of them; how many positions a step of each kind takes at
    most; and where the slots of the token at each position end, n again."""
    n, R, pauses = config.chunk_size, config.num_memory_tokens, set(fixed_pauses(config))
    kinds, ends, widths = [], [], [1, 2, 1]
    for position in range(n):
        is_edge, has_pause = position in (0, n - 1), position in pauses
        kinds.append(EDGE if is_edge else PAUSE if has_pause else PLAIN)
        ends.append(R + position + 1 + sum(pause <= position for pause in pauses))
        if is_edge:
            width = 1 + has_pause + R * ((position == 0) + (position == n - 1))
            widths[EDGE] = max(widths[EDGE], width)
    return kinds, widths, ends


def _as_it_is(function: Callable) -> Callable:
    return function
