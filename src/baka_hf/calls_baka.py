"""One call of a model: checked and cut into spans before anything is read, and closed when all is read.

What happens in between, reading, is in `reading_baka` and in the graphs. Nothing in here depends on weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from .cache_baka import BakaCache
from .compile_baka import on_host
from .functions_baka import from_host, gather_positions, put_on
from .inputs_baka import check_cache, check_mask, check_text, find_alone, find_restarts
from .stream_baka import Memory, Span, columns_of, in_columns, plan_aligned, plan_spans

logger = logging.get_logger(__name__)

# What transformers calls the state in its own calls and outputs, since 5.24 and before. Ours take both names.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


Memories = tuple[tuple[torch.Tensor, torch.Tensor], ...]  # see `BakaModelOutput`


@dataclass
class BakaModelOutput(BaseModelOutputWithPast):
    """What a decoder gives. `memories` are there if asked for by `output_memories`: two tensors [B, R, D] for each time
    that chunks became full, the memory that these have read, before the solidifier, and the one that they have left. In
    rows whose chunk did not become full then both are the same. `write_strength`, a scalar, is there in
    training with an `associative_write_cost` if a chunk became full: the mean strength of what full chunks have
    written, over tokens (or vectors), heads, blocks, chunks and rows."""

    memories: Memories | None = None
    write_strength: torch.Tensor | None = None


@dataclass
class BakaCausalLMOutput(CausalLMOutputWithPast):
    """What a language model gives; `memories` and `write_strength` as in `BakaModelOutput`."""

    memories: Memories | None = None
    write_strength: torch.Tensor | None = None


@dataclass(frozen=True)
class Call:
    """What is asked for, and how it is to be read."""

    batch_size: int
    length: int
    text: torch.Tensor  # ids [B, L], or embeddings [B, L, D]; tokens that are not in the stream stand behind the others
    real: torch.Tensor | None  # [B, L] bool, which are in it; None: all
    spans: list[Span]
    state: BakaCache | None
    cache: BakaCache | None  # that state; while it is read, a draft of it, which the state becomes when all is read
    with_states: tuple[int, ...]  # which hidden states are asked for: 0 is what goes into the first block
    with_weights: bool
    with_memories: bool
    num_last_states: int | None  # how many columns' states are asked for, from the last one back; None: all
    # What a state will know of itself:
    input_ids: torch.Tensor | None  # as they came
    heard: torch.Tensor | None  # [B, L] bool, which of them are in the stream; None: all
    seeded: torch.Tensor  # [B] bool, rows whose text began with another stream's memory
    num_aligned: int  # the last positions in which no row had padding
    restarts: bool  # a text has begun within a row
    within_beam_search: bool
    beside: "Beside | None" = None

    def on_draft(self) -> "Call":
        """The same call, to be read into a draft of its state."""
        if self.state is None:
            return self
        draft = self.state.draft()
        if self.restarts:
            for layer in draft.layers:
                layer.is_shared = True  # a text that begins writes over what the state has of the one before
        return replace(self, cache=draft)


class Beside(NamedTuple):
    """Texts of one token, which leave nothing behind: all are read at once, in rows of their own.

    A row may end in a thousand of them, if a collator has padded its positions with 0.
    """

    tokens: torch.Tensor  # [B, L] bool, where they stand
    rows: torch.Tensor  # [K] int64, which row of `call` has each
    call: Call


class Results(NamedTuple):
    """What reading a call gives."""

    states: list[list[torch.Tensor]]  # of each span, those that were asked for and the last one, [B, T, D]
    weights: list[list[torch.Tensor]]  # likewise, [B, T, H · 2S]
    memory: Memory | None  # what is left to the next call
    keys_values: list[tuple[torch.Tensor, torch.Tensor]]  # likewise, of each block; none if they were written in place
    pauses: torch.Tensor  # [P] or [B, P] int64, where those of the chunk in progress stand
    memories: Memories = ()  # that chunks have read and left, if asked for
    strength: torch.Tensor | None = None  # see `write_strength` of `BakaModelOutput`


@on_host
def plan(
    model: Any,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: Any,
    cache: BakaCache | None,
    inputs_embeds: torch.Tensor | None,
    use_cache: bool | None,
    output_hidden_states: bool | int | Sequence[int] | None,
    output_attentions: bool | None,
    embeds: bool,
    within_beam_search: bool = False,
    num_last_states: int | None = None,
    output_memories: bool = False,
    **kwargs: Any,
) -> Call:
    """Check a call of `model`, a `BakaModel`, and cut it into spans.

    With `embeds` its ids are looked up here, all at once: the embedding has one gradient then, not one for every span.
    """
    config = model.config
    asked = config.output_hidden_states if output_hidden_states is None else output_hidden_states
    with_states = _states_among(asked, config.num_hidden_layers + 1)
    with_weights = config.output_attentions if output_attentions is None else output_attentions
    if with_weights and config._attn_implementation != "eager":
        logger.warning_once(
            f"`output_attentions` needs attn_implementation='eager', {config._attn_implementation!r} gives none."
        )
        with_weights = False
    if output_memories and not config.num_memory_tokens:
        raise ValueError("`output_memories` must be False when `num_memory_tokens` is 0, got True.")
    batch_size, length = check_text(config, input_ids, inputs_embeds)
    check_cache(model, cache, batch_size, within_beam_search)
    fed = 0 if cache is None else cache.get_seq_length()
    if input_ids is not None and cache is not None:
        input_ids = from_host(cache.device, input_ids)
    text = input_ids if inputs_embeds is None else inputs_embeds
    assert text is not None
    given = check_mask(attention_mask, batch_size, length, fed)
    real = None if given is None else put_on(text.device, given)
    restarts = find_restarts(position_ids, batch_size, length, real)
    if use_cache is None:
        use_cache = config.use_cache and not model.training
    if use_cache and cache is None:
        cache = model.new_cache(batch_size)

    input_ids = None if input_ids is None else input_ids.long()
    if inputs_embeds is not None:
        inputs_embeds = inputs_embeds.to(model.embed_tokens.weight.dtype)
        if real is not None:  # whatever stands where there is no token: NaN would be seen through any mask
            inputs_embeds = inputs_embeds.masked_fill(~real[:, :, None], 0)

    beside, heard = None, real
    alone = None if restarts is None else find_alone(restarts, real)
    if alone is not None and restarts is not None:
        restarts, alone = restarts & ~alone, put_on(text.device, alone)
        beside = _plan_beside(model, alone, input_ids, inputs_embeds, with_states, with_weights, embeds)
        real = ~alone if real is None else real & ~alone

    # Without a state every row begins here and nothing needs to be known on the host. With one, count.
    begins_here = cache is None and restarts is None
    on_cpu, num_aligned = None, length
    if real is not None and not begins_here:
        on_cpu = (real if alone is not None or given is None else given).cpu()
        whole_columns = on_cpu.all(0)
        num_aligned = int(whole_columns.flip(0).cumprod(0).sum())
        real = None if bool(whole_columns.all()) else real
    text = input_ids if inputs_embeds is None else inputs_embeds
    assert text is not None
    if real is not None:
        # Tokens that are not in the stream go behind those that are, where nothing sees them.
        order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
        text = text.gather(1, order) if text.ndim == 2 else gather_positions(text, order)
        restarts = None if restarts is None else put_on(order.device, restarts).gather(1, order)
    seeded = torch.zeros(batch_size, dtype=torch.bool) if cache is None else cache._seeded
    before = {(0, False)} if cache is None else {*zip(cache._num_tokens.tolist(), seeded.tolist(), strict=True)}
    if begins_here or (len(before) == 1 and real is None and restarts is None):
        spans = plan_aligned(length, config.chunk_size, *before.pop())
    else:
        restarts = None if restarts is None else restarts.cpu()
        lengths = torch.full((batch_size,), length) if on_cpu is None else on_cpu.sum(1)
        num_tokens = torch.zeros_like(lengths) if cache is None else cache._num_tokens
        keeps = cache is not None
        spans, seeded = plan_spans(lengths, num_tokens, seeded, restarts, config.chunk_size, keeps)
    if embeds and inputs_embeds is None:
        text = model.embed_tokens(text)
    if with_states or real is not None or not all(span.is_aligned for span in spans):
        num_last_states = None
    return Call(
        batch_size=batch_size,
        length=length,
        text=text,
        real=real,
        spans=spans,
        state=cache,
        cache=cache,
        with_states=with_states,
        with_weights=with_weights,
        with_memories=bool(output_memories),
        num_last_states=num_last_states,
        input_ids=input_ids,
        heard=heard,
        seeded=seeded,
        num_aligned=num_aligned,
        restarts=restarts is not None,
        within_beam_search=within_beam_search,
        beside=beside,
    )


def _states_among(asked: bool | int | Sequence[int], count: int) -> tuple[int, ...]:
    """Which of the `count` hidden states are asked for: all, none, or those whose indices are named."""
    if not asked or isinstance(asked, bool):
        return tuple(range(count)) if asked else ()
    indices = [asked] if isinstance(asked, int) else list(asked)
    wrong = [index for index in indices if not isinstance(index, int) or not -count <= index < count]
    if wrong:
        raise ValueError(
            f"expected `output_hidden_states` to be a bool, or indices from {-count} to {count - 1}, got {wrong[0]!r}."
        )
    return tuple(sorted({index % count for index in indices}))


def _plan_beside(
    model: Any,
    alone: torch.Tensor,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    with_states: tuple[int, ...],
    with_weights: bool,
    embeds: bool,
) -> Beside:
    """Of a call whose tokens `alone` [B, L] are texts of one token."""
    if input_ids is not None:
        # What a token gives depends on its id alone, so each is read once.
        ids, rows = input_ids[alone].unique(return_inverse=True)
        input_ids = ids[:, None]
    else:
        assert inputs_embeds is not None
        inputs_embeds = inputs_embeds[alone][:, None]
        rows = torch.arange(len(inputs_embeds), device=inputs_embeds.device)
    text = input_ids, None, None, None, inputs_embeds
    return Beside(alone, rows, plan(model, *text, False, with_states, with_weights, embeds=embeds))


@on_host
def close(model: Any, call: Call, results: Results, beside: Results | None = None) -> BakaModelOutput:
    """Put together what was read, `beside` of `call.beside`, and have the state become what is left behind."""
    states, weights = _outputs(model, call, results)
    if call.beside is not None and beside is not None:
        tokens, rows, _ = call.beside
        others, other_weights = _outputs(model, call.beside.call, beside)
        states = [into.index_put((tokens,), x[rows, 0].to(into)) for into, x in zip(states, others, strict=True)]
        if weights is not None and other_weights is not None:
            weights = tuple(
                into.transpose(1, 2).index_put((tokens,), x[rows, :, 0].to(into)).transpose(1, 2)
                for into, x in zip(weights, other_weights, strict=True)
            )
    if call.state is not None and call.cache is not None:
        _leave_state(call.cache, call, results)
        call.state.go_on(call.cache)
    return BakaModelOutput(
        last_hidden_state=states[-1],
        **{CACHE_NAME: call.state},
        hidden_states=_hidden_states(model, call, states) if call.with_states else None,
        attentions=weights,
        memories=results.memories if call.with_memories else None,
        write_strength=results.strength,
    )


def _hidden_states(model: Any, call: Call, states: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    """What goes into the first block and what comes out of each; None in the place of what was not asked for."""
    last = model.config.num_hidden_layers
    found = dict(zip((index for index in call.with_states if index < last), states, strict=False))
    found |= {last: states[-1]} if last in call.with_states else {}
    return tuple(found.get(index) for index in range(last + 1))


def _leave_state(cache: BakaCache, call: Call, results: Results) -> None:
    if results.memory is not None:
        cache.carried = results.memory
    for layer, both in zip(cache.layers, results.keys_values, strict=False):  # none in place
        (layer.keys, layer.values), layer.is_shared = both, True
    num_tokens = cache._num_tokens
    if call.spans:
        num_tokens = torch.zeros(call.batch_size, dtype=torch.int64) + call.spans[-1].num_tokens
    pauses = results.pauses.expand(call.batch_size, -1).clone()
    counts = call.num_aligned, call.restarts, call.within_beam_search
    cache._advance(call.length, num_tokens, call.seeded, pauses, *counts)
    if call.input_ids is None:
        cache._history = cache._opening = None
    else:
        cache._remember_ids(call.input_ids, call.heard)


def _outputs(model: Any, call: Call, results: Results) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...] | None]:
    """Hidden states [B, L, D] and weights [B, H, L, 2S] of the call's tokens, each in its own column."""
    config, batch_size, length = model.config, call.batch_size, call.length
    heads, num_slots = config.num_attention_heads, 2 * config.stream_length
    if not call.spans:
        like = model.norm.weight
        empty = like.new_zeros(batch_size, length, config.hidden_size)
        blank = like.new_zeros(batch_size, heads, length, num_slots)
        count = len({*call.with_states, config.num_hidden_layers})
        return [empty] * count, (blank,) * config.num_hidden_layers if call.with_weights else None

    columns = columns_of(call.spans, batch_size, length)
    states = [in_columns(parts, columns, call.real) for parts in zip(*results.states, strict=True)]
    weights = None
    if call.with_weights:
        weights = tuple(
            in_columns(parts, columns, call.real).view(batch_size, length, heads, num_slots).transpose(1, 2)
            for parts in zip(*results.weights, strict=True)
        )
    return states, weights
