"""The model equals the naive reading, however its text is cut, padded, packed, batched and carried on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CONFIGS, every_config, naive_read, random_tokens, tiny_config, tiny_model
from naive import read
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from baka_hf import BakaCache, BakaForCausalLM

EXACT = dict(rtol=1e-9, atol=1e-9)
# One call or many, float32 adds in another order.
SPLIT = {torch.float64: dict(rtol=0, atol=1e-10), torch.float32: dict(rtol=0, atol=1e-4)}
# The configs that differ in what a row's state is made of.
STATES = ["pristine", "xl", "pause_without_xl", "rmt_tokens", "rmt_alone", "layer_separate", "chunk_of_one"]
STATES += ["block_of_qwen3"]

state_configs = pytest.mark.parametrize("overrides", [CONFIGS[name] for name in STATES], ids=STATES)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def texts(model: BakaForCausalLM, *lengths: int) -> list[Tensor]:
    """One text [T] per length, all different."""
    return [random_tokens(model.config, length, seed=row) for row, length in enumerate(lengths)]


def naive_logits(model: BakaForCausalLM, tokens: Tensor, **options: Any) -> Tensor:
    return naive_read(model, tokens, **options).logits


def scatter(rows: list[Tensor], mask: Tensor, fill: int = 1) -> Tensor:
    """input_ids [B, L] with each row's tokens where its mask is 1 and `fill` elsewhere."""
    input_ids = torch.full(mask.shape, fill)
    for ids, real, tokens in zip(input_ids, mask.bool(), rows, strict=True):
        ids[real] = tokens
    return input_ids


def prefill(model: BakaForCausalLM, rows: list[Tensor]) -> BakaCache:
    """The state after rows of any length, left-padded."""
    longest = max(map(len, rows))
    mask = torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
    return model(scatter(rows, mask), attention_mask=mask, use_cache=True).past_key_values


# The reading itself


def test_naive_first_chunk_is_a_plain_transformer() -> None:
    """Without memory and pauses, the naive reading of one chunk is a causal parallel-residual transformer."""
    model = tiny_model(tiny_config(chunk_size=9, **CONFIGS["pristine"] | dict(num_attention_heads=3)))
    config, tokens = model.config, random_tokens(model.config, 9)
    weights = {name.removeprefix("model."): weight for name, weight in model.state_dict().items()}

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], config.layer_norm_eps)

    def turn(x: Tensor) -> Tensor:  # RoPE as complex numbers, theta 10000 and head_dim 4
        angles = torch.outer(torch.arange(9).double(), torch.tensor([1, 0.01], dtype=torch.float64))
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.exp(1j * angles)
        return torch.cat([turned.real, turned.imag], dim=-1)

    x = weights["embed_tokens.weight"][tokens]
    for layer in ("layers.0", "layers.1"):
        h = norm(f"{layer}.input_layernorm", x)
        q, k, v = ((h @ weights[f"{layer}.self_attn.{p}_proj.weight"].T).view(9, 3, 4).transpose(0, 1) for p in "qkv")
        a = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True).transpose(0, 1).flatten(1)
        gate, up, down = (weights[f"{layer}.mlp.{p}_proj.weight"].T for p in ("gate", "up", "down"))
        x = x + a @ weights[f"{layer}.self_attn.o_proj.weight"].T + (F.silu(h @ gate) * (h @ up)) @ down
    assert_close(naive_logits(model, tokens), norm("norm", x) @ weights["lm_head.weight"].T, **EXACT)


@state_configs
def test_naive_is_causal_and_remembers(overrides: dict[str, Any]) -> None:
    """A changed token changes no logits before it, and those after the next chunk only where something is carried."""
    model = tiny_model(tiny_config(**overrides))
    n, tokens = model.config.chunk_size, random_tokens(model.config, 3 * model.config.chunk_size)
    changed = tokens.clone()
    changed[n - 1] = (tokens[n - 1] + 1) % model.config.vocab_size
    difference = (naive_logits(model, changed) - naive_logits(model, tokens)).abs().amax(dim=-1)
    assert difference[: n - 1].eq(0).all()
    assert difference[n - 1] > 1e-3
    carries = model.config.num_memory_tokens or model.config.use_xl_cache
    assert difference[n:].gt(1e-9).all() if carries else difference[n:].eq(0).all()


# One row, one call


@pytest.mark.smoke
@every_config
def test_logits_and_memory(overrides: dict[str, Any]) -> None:
    """Logits, memory and counters of a text of several chunks and a remainder are the naive ones."""
    model = tiny_model(tiny_config(**overrides))
    n = model.config.chunk_size
    (tokens,) = texts(model, 4 * n + n // 2)
    out, naive = model(tokens[None], use_cache=True), naive_read(model, tokens)
    assert_close(out.logits[0], naive.logits, **EXACT)
    assert_close(out.past_key_values.memory[0], naive.memories[-1], **EXACT)
    assert out.past_key_values.num_tokens.tolist() == [len(tokens)]
    assert out.past_key_values.get_seq_length() == len(tokens)
    assert_close(model(tokens[None]).logits, out.logits, **EXACT)  # use_cache left to the config
    assert_close(model(tokens[None], use_cache=False).logits, out.logits, **EXACT)


@pytest.mark.smoke
@every_config
def test_memory_after_every_token(overrides: dict[str, Any]) -> None:
    """Token by token, logits are the naive ones and the memory moves on exactly when a chunk is full."""
    model = tiny_model(tiny_config(**overrides))
    n = model.config.chunk_size
    (tokens,) = texts(model, 3 * n + 1)
    naive, cache = naive_read(model, tokens), model.new_cache(1)
    assert cache.memory.shape == (1, model.config.num_memory_tokens, model.config.hidden_size)
    assert cache.memory.eq(0).all()
    for t, token in enumerate(tokens):
        assert cache.num_tokens.tolist() == [t] and cache.get_seq_length() == t
        logits = model(token.view(1, 1), cache=cache).logits
        assert_close(logits[0, 0], naive.logits[t], **EXACT)
        assert_close(cache.memory[0], naive.memories[(t + 1) // n], **EXACT)


@every_config
def test_text_ending_with_its_chunk(overrides: dict[str, Any]) -> None:
    """A text that fills its last chunk has already written its memory, and the next call reads it."""
    model = tiny_model(tiny_config(**overrides))
    n = model.config.chunk_size
    (tokens,) = texts(model, 4 * n)
    naive, cache = naive_read(model, tokens), model.new_cache(1)
    for half, memory in zip(tokens.chunk(2), (naive.memories[2], naive.memories[4]), strict=True):
        out = model(half[None], cache=cache)
        assert out.past_key_values is cache
        assert_close(cache.memory[0], memory, **EXACT)
    assert_close(out.logits[0], naive.logits[2 * n :], **EXACT)


@pytest.mark.parametrize("write", ["carry", "tokens"])
@pytest.mark.parametrize("solidifier", ["none", "glu", "layer"])
@pytest.mark.parametrize("batched", [False, True], ids=["one_seed", "seed_per_row"])
def test_seeded_memory(write: str, solidifier: str, batched: bool) -> None:
    """A stream that starts from another stream's memory solidifies and reads it, and has no previous keys."""
    model = tiny_model(tiny_config(memory_write=write, memory_solidifier=solidifier))
    rows = texts(model, 12, 12)
    memory = prefill(model, texts(model, 7, 11)).memory
    seeds = memory if batched else memory[0].expand_as(memory)
    cache = model.new_cache(2, memory=memory if batched else memory[0])
    assert_close(cache.memory, seeds, rtol=0, atol=0)
    logits = model(torch.stack(rows), cache=cache).logits
    for row, tokens in enumerate(rows):
        naive = naive_read(model, tokens, memory=seeds[row])
        assert_close(logits[row], naive.logits, **EXACT)
        assert_close(cache.memory[row], naive.memories[-1], **EXACT)
        assert not torch.allclose(logits[row], naive_logits(model, tokens), atol=1e-3)


def test_seeded_rows_move_reset_and_restart(tmp_path: Path) -> None:
    """A seed goes where its row goes, through files and clones, and ends with the document that it began."""
    model = tiny_model(tiny_config(memory_solidifier="glu"))
    seeds, rows = prefill(model, texts(model, 6, 7, 8)).memory, torch.stack(texts(model, 13, 13, 13))
    cache = model.new_cache(3, memory=seeds)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.save_pretrained(tmp_path)
    cache = BakaCache.from_pretrained(tmp_path).clone()
    cache.reset_rows(torch.tensor([False, True, False]))
    positions = torch.arange(13).repeat(3, 1)
    positions[2, 4:] -= 4
    logits = model(rows, position_ids=positions, cache=cache).logits
    assert_close(logits[0], naive_logits(model, rows[0], memory=seeds[2]), **EXACT)
    assert_close(logits[1], naive_logits(model, rows[1]), **EXACT)
    assert_close(logits[2, :4], naive_logits(model, rows[2, :4], memory=seeds[1]), **EXACT)
    assert_close(logits[2, 4:], naive_logits(model, rows[2, 4:]), **EXACT)


@state_configs
def test_inputs_embeds(overrides: dict[str, Any]) -> None:
    """Embeddings say what their tokens say, in one call and in two."""
    model = tiny_model(tiny_config(**overrides))
    (tokens,) = texts(model, 13)
    embeds, naive = model.get_input_embeddings()(tokens)[None], naive_logits(model, tokens)
    assert_close(read(model.config, model.state_dict(), embeds=embeds[0]).logits, naive, **EXACT)
    assert_close(model(inputs_embeds=embeds).logits[0], naive, **EXACT)
    cache = model(inputs_embeds=embeds[:, :4], use_cache=True).past_key_values
    assert_close(model(inputs_embeds=embeds[:, 4:], cache=cache).logits[0], naive[4:], **EXACT)


@pytest.mark.parametrize("keep", [1, 6, torch.tensor([0, 4, 5, 12]), torch.tensor([3])], ids=str)
def test_logits_to_keep(keep: int | Tensor) -> None:
    """The last k logits, or those at the given columns, and a state that does not care."""
    model = tiny_model(tiny_config())
    rows = torch.stack(texts(model, 13, 13))
    every, kept = model(rows, use_cache=True), model(rows, use_cache=True, logits_to_keep=keep)
    assert_close(kept.logits, every.logits[:, slice(-keep, None) if isinstance(keep, int) else keep], **EXACT)
    assert_close(kept.past_key_values.memory, every.past_key_values.memory, **EXACT)


# Hidden states and attentions


@every_config
def test_hidden_states(overrides: dict[str, Any]) -> None:
    """L + 1 states over text alone: embeddings, blocks, and the last block after the final norm; zeros at padding."""
    model = tiny_model(tiny_config(**overrides))
    rows = texts(model, 13, 9)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, [0, 1, 5, 12]] = 0
    out = model(scatter(rows, mask), attention_mask=mask, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    last = model.model(scatter(rows, mask), attention_mask=mask).last_hidden_state
    assert_close(out.hidden_states[-1], last, **EXACT)
    for row, (tokens, real) in enumerate(zip(rows, mask.bool(), strict=True)):
        for states, naive in zip(out.hidden_states, naive_read(model, tokens).hidden, strict=True):
            assert_close(states[row, real], naive, **EXACT)
            assert states[row, ~real].eq(0).all()


@pytest.mark.parametrize("asked", [[0, 2], -1, [1], (-2, 0, 3)])
def test_hidden_states_that_are_asked_for(asked: Any) -> None:
    """Those that an index or several name, as transformers 5.24 takes them, and None in the place of the others."""
    model = tiny_model(tiny_config(num_hidden_layers=3))
    mask = torch.ones(2, 13)
    mask[1, :4] = 0
    tokens = scatter(texts(model, 13, 9), mask)
    every = model(tokens, attention_mask=mask, output_hidden_states=True)
    found = model(tokens, attention_mask=mask, output_hidden_states=asked)
    kept = {index % 4 for index in (asked if isinstance(asked, list | tuple) else [asked])}
    assert [index for index, state in enumerate(found.hidden_states) if state is not None] == sorted(kept)
    for index in kept:
        assert torch.equal(found.hidden_states[index], every.hidden_states[index])
    assert torch.equal(found.logits, every.logits)


@pytest.mark.parametrize("asked", [0, [], False, True, 1, -1, [0], (0, 2)], ids=repr)
def test_hidden_states_as_llama_gives_them(asked: Any) -> None:
    """0 alone is no index there, but False."""
    sizes = dict(vocab_size=19, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    found = []
    for model in (LlamaForCausalLM(LlamaConfig(**sizes)), tiny_model(tiny_config(num_hidden_layers=2))):
        states = model(torch.tensor([[1, 2]]), output_hidden_states=asked).hidden_states
        found.append(states and [state is not None for state in states])
    assert found[0] == found[1]


@pytest.mark.parametrize(("asked", "wrong"), [([0, 4], 4), (-5, -5), ("12", "'1'")])
def test_hidden_states_that_there_are_not(asked: Any, wrong: Any) -> None:
    model = tiny_model(tiny_config(num_hidden_layers=3))
    cache = model.new_cache()
    with pytest.raises(ValueError, match=f"a bool, or indices from -4 to 3, got {wrong}"):
        model(torch.tensor([[1, 2]]), cache=cache, output_hidden_states=asked)
    assert cache.get_seq_length() == 0


@every_config
def test_attentions(overrides: dict[str, Any]) -> None:
    """Eager attention weights over the two streams' slots are the naive ones, in one call and over two."""
    model = tiny_model(tiny_config(**overrides))
    model.set_attn_implementation("eager")
    config, (tokens,) = model.config, texts(model, 13)
    num_slots = 2 * config.num_memory_tokens + config.chunk_size + config.num_pause_tokens
    cache = model.new_cache(1)
    calls = [model(part[None], cache=cache, output_attentions=True).attentions for part in tokens.split(8)]
    assert len(calls[0]) == config.num_hidden_layers
    for layer, naive in enumerate(naive_read(model, tokens).attentions):
        weights = torch.cat([attentions[layer][0] for attentions in calls], dim=1)
        assert weights.shape == (config.num_attention_heads, len(tokens), 2 * num_slots)
        assert_close(weights, naive, **EXACT)


def test_attentions_see_what_text_may_see() -> None:
    """Text sees its whole previous stream and its own up to itself: rows sum to 1, the rest is exactly 0."""
    model = tiny_model(tiny_config())  # R = 2, n = 5, P = 2 (before tokens 0 and 2), S = 11
    model.set_attn_implementation("eager")
    (tokens,) = texts(model, 10)
    weights = model(tokens[None], output_attentions=True).attentions[1][0]
    assert_close(weights.sum(-1), torch.ones(2, 10).double(), **EXACT)
    own_slot = [3, 4, 6, 7, 8]
    for t in range(10):
        slot = own_slot[t % 5]
        assert weights[:, t, 11 : 11 + slot + 1].gt(0).all()
        assert weights[:, t, 11 + slot + 1 :].eq(0).all()  # later text, later pauses, the write slots 9 and 10
        assert weights[:, t, :11].eq(0).all() if t < 5 else weights[:, t, :11].gt(0).all()


# Attention implementations


def ragged_logits(model: BakaForCausalLM, attn_implementation: str) -> Tensor:
    """Logits of a batch with holes and of its continuation, zeros at padding."""
    model.set_attn_implementation(attn_implementation)
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[1, :3] = mask[2, 6:8] = mask[2, 14:] = 0
    input_ids, cache = random_tokens(model.config, 3, 16), model.new_cache(3)
    calls = [
        model(ids, attention_mask=real, cache=cache).logits
        for ids, real in zip(input_ids.split(9, dim=1), mask.split(9, dim=1), strict=True)
    ]
    return torch.cat(calls, dim=1) * mask[..., None]


@every_config
def test_eager_equals_sdpa(overrides: dict[str, Any]) -> None:
    """Eager and SDPA attention agree on rows in and out of step."""
    model = tiny_model(tiny_config(**overrides))
    assert_close(ragged_logits(model, "eager"), ragged_logits(model, "sdpa"), **EXACT)


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")  # transformers sets it
def test_eager_equals_flex() -> None:
    """Eager and FlexAttention agree on rows in and out of step."""
    model = tiny_model(tiny_config(**CONFIGS["block_of_qwen3"] | dict(head_dim=16, num_hidden_layers=1)), torch.float32)
    assert_close(ragged_logits(model, "flex_attention"), ragged_logits(model, "eager"), **SPLIT[torch.float32])


# Contract 1: splits


def cuts(length: int, seed: int) -> list[int]:
    """Sizes of the calls that a text is cut into at random."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randperm(length - 1, generator=generator)[: 1 + seed % 4].add(1).sort().values.tolist()
    return [end - start for start, end in zip([0, *ends], [*ends, length], strict=True)]


@every_config
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_split_invariance(overrides: dict[str, Any], dtype: torch.dtype) -> None:
    """One call, token by token and random splits give the same logits."""
    model = tiny_model(tiny_config(**overrides), dtype)
    length = 3 * model.config.chunk_size + 2
    rows = torch.stack(texts(model, length, length))
    whole = model(rows).logits
    for sizes in ([1] * length, *(cuts(length, seed) for seed in range(4))):
        cache = model.new_cache(2)
        parts = [model(part, cache=cache).logits for part in rows.split(sizes, dim=1)]
        assert_close(torch.cat(parts, dim=1), whole, **SPLIT[dtype])


@state_configs
def test_use_cache_returns_the_state_to_go_on_from(overrides: dict[str, Any]) -> None:
    """A state made by use_cache=True goes on like one made by new_cache."""
    model = tiny_model(tiny_config(**overrides))
    (tokens,) = texts(model, 13)
    cache = model(tokens[None, :6], use_cache=True).past_key_values
    assert isinstance(cache, BakaCache)
    assert_close(model(tokens[None, 6:], cache=cache).logits[0], naive_logits(model, tokens)[6:], **EXACT)


@state_configs
def test_state_is_constant(overrides: dict[str, Any]) -> None:
    """The state's size is the same before the first token, within a chunk, and after many."""
    model = tiny_model(tiny_config(**overrides))
    cache = model.new_cache(2)
    sizes = [cache.nbytes]
    for part in random_tokens(model.config, 2, 40).split([1, 2, 30, 7], dim=1):
        model(part, cache=cache)
        sizes.append(cache.nbytes)
    assert set(sizes) == {model.new_cache(2).nbytes}
    assert model.new_cache(4).nbytes > sizes[0]


# Contract 2: rows and padding

MASKS = {
    "left": ["0000011111111", "0011111111111", "1111111111111"],
    "right": ["1111111100000", "1110000000000", "1111111111111"],
    "holes": ["1101110011011", "0110101010101", "1111100000011"],
    "an_empty_row": ["0000000000000", "1111111111111", "0000001000000"],
    "a_padded_column": ["1111011111111", "0111011111111", "1111011110000"],
}


def bits(pattern: list[str]) -> Tensor:
    return torch.tensor([[int(bit) for bit in row] for row in pattern])


def assert_padding_is_not_read(model: BakaForCausalLM, mask: Tensor) -> None:
    """Every row says what it says alone, under the mask and in the next call, and holds the state it holds alone."""
    rows = texts(model, *(int(real) + 4 for real in mask.sum(1)))
    out = model(scatter([row[:-4] for row in rows], mask), attention_mask=mask, use_cache=True)
    cache = out.past_key_values
    assert cache.num_tokens.tolist() == mask.sum(1).tolist()
    assert cache.get_seq_length() == mask.shape[1]
    more = model(torch.stack([row[-4:] for row in rows]), cache=cache)
    for row, tokens in enumerate(rows):
        naive = naive_read(model, tokens)
        assert_close(out.logits[row, mask[row].bool()], naive.logits[:-4], **EXACT)
        assert_close(more.logits[row], naive.logits[-4:], **EXACT)
        assert_close(cache.memory[row], naive.memories[-1], **EXACT)


@pytest.mark.smoke
@every_config
def test_padding_of_every_kind_in_one_batch(overrides: dict[str, Any]) -> None:
    """Rows padded left, right, in the middle or entirely are no concern of each other."""
    mask = torch.cat([bits(pattern) for pattern in MASKS.values()])
    assert_padding_is_not_read(tiny_model(tiny_config(**overrides)), mask)


@state_configs
@pytest.mark.parametrize("pattern", MASKS.values(), ids=MASKS)
def test_padding(overrides: dict[str, Any], pattern: list[str]) -> None:
    """Padding of one kind is no part of the stream."""
    assert_padding_is_not_read(tiny_model(tiny_config(**overrides)), bits(pattern))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("pattern", [*MASKS.values(), ["1111111111111", "0011111111111"]], ids=[*MASKS, "one"])
def test_padding_where_gradients_are_enabled(pattern: list[str], rows: int, packed: bool) -> None:
    """The same logits and state as without, whoever has asked for gradients."""
    model = tiny_model(tiny_config())
    mask = bits(pattern)[:rows]
    tokens = random_tokens(model.config, *mask.shape)
    options = dict(position_ids=(torch.arange(mask.shape[1]) % 7)[None]) if packed else {}
    found = []
    for enabled in (False, True):
        state = model.new_cache(len(mask))
        with torch.set_grad_enabled(enabled):
            logits = model(tokens, attention_mask=mask, cache=state, **options).logits
        found.append([logits, state.memory])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, **EXACT)


@state_configs
def test_an_empty_call(overrides: dict[str, Any]) -> None:
    """A call of nothing but padding leaves every row where it was."""
    model = tiny_model(tiny_config(**overrides))
    rows, padding = texts(model, 13, 10), torch.zeros(2, 3, dtype=torch.long)
    cache = prefill(model, [row[:-4] for row in rows])
    before = cache.memory.clone()
    model(padding, attention_mask=padding, cache=cache)
    assert_close(cache.memory, before, rtol=0, atol=0)
    logits = model(torch.stack([row[-4:] for row in rows]), cache=cache).logits
    assert_close(logits, torch.stack([naive_logits(model, row)[-4:] for row in rows]), **EXACT)


@state_configs
def test_mask_of_the_whole_history(overrides: dict[str, Any]) -> None:
    """A mask over history and new tokens means what the new tokens' own mask means."""
    model = tiny_model(tiny_config(**overrides))
    rows, mask = texts(model, 10, 14), torch.ones(2, 14, dtype=torch.long)
    mask[0, :3] = mask[0, 11] = 0
    input_ids = scatter(rows, mask)
    for start in (0, 9):
        cache = model(input_ids[:, :9], attention_mask=mask[:, :9], use_cache=True).past_key_values
        logits = model(input_ids[:, 9:], attention_mask=mask[:, start:], cache=cache).logits
        for row, tokens in enumerate(rows):
            real = mask[row].bool()
            assert_close(logits[row, real[9:]], naive_logits(model, tokens)[-int(real[9:].sum()) :], **EXACT)


@state_configs
def test_what_stands_under_padding_does_not_matter(overrides: dict[str, Any]) -> None:
    """Other tokens at padded columns change nothing at all."""
    model = tiny_model(tiny_config(**overrides))
    mask = bits(MASKS["holes"])
    rows = texts(model, *mask.sum(1).tolist())
    one, other = (model(scatter(rows, mask, fill), attention_mask=mask).logits for fill in (0, 7))
    assert_close(one[mask.bool()], other[mask.bool()], rtol=0, atol=0)


@state_configs
@pytest.mark.parametrize("chunks", [(0, 1), (1, 2), (0, 2)], ids=["in_the_first_chunk", "in_the_second", "in_both"])
def test_rows_out_of_phase(overrides: dict[str, Any], chunks: tuple[int, int]) -> None:
    """Rows at every phase of their chunks, read on together by one token and by many, are naive each."""
    model = tiny_model(tiny_config(**overrides))
    n, (first, last) = model.config.chunk_size, chunks
    rows = texts(model, *(10 + phase for phase in range(first * n + 1, last * n + (n == 1))))
    cache = prefill(model, [row[:-10] for row in rows])
    for start, end in ((-10, -9), (-9, -8), (-8, -1)):
        logits = model(torch.stack([row[start:end] for row in rows]), cache=cache).logits
        for tokens, row_logits in zip(rows, logits, strict=True):
            assert_close(row_logits, naive_logits(model, tokens)[start:end], **EXACT)


# Contract 6: packed documents

# Documents' lengths in a row of 20 with chunks of 5.
PACKED = {
    "at_chunk_boundaries": [10, 5, 5],
    "mid_chunk": [7, 13],
    "several": [1, 3, 6, 2, 8],
    "single_tokens": [1] * 20,
    "one": [20],
}


def restarted_positions(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


@pytest.mark.smoke
@every_config
def test_packed_documents(overrides: dict[str, Any]) -> None:
    """Where position_ids restart a document starts as if alone, whatever the other rows do there."""
    model = tiny_model(tiny_config(**overrides))
    rows = torch.stack(texts(model, *[20] * len(PACKED)))
    positions = torch.stack([restarted_positions(lengths) for lengths in PACKED.values()])
    out = model(rows, position_ids=positions, use_cache=True)
    for row, lengths in enumerate(PACKED.values()):
        readings = [naive_read(model, document) for document in rows[row].split(lengths)]
        assert_close(out.logits[row], torch.cat([reading.logits for reading in readings]), **EXACT)
        assert_close(out.past_key_values.memory[row], readings[-1].memories[-1], **EXACT)
        assert out.past_key_values.num_tokens[row] == lengths[-1]


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_padded_rows_are_packed_ones(attn_implementation: str) -> None:
    """As transformers' shared tests have it: rows padded on the left, and the same rows as one without padding."""
    model = tiny_model(tiny_config())
    model.set_attn_implementation(attn_implementation)
    rows = texts(model, 13, 5, 9)
    mask = torch.stack([F.pad(torch.ones_like(row), (13 - len(row), 0)) for row in rows])
    padded = model(scatter(rows, mask), attention_mask=mask).logits[mask == 1]
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    assert_close(model(torch.cat(rows)[None], position_ids=positions[None]).logits[0], padded, **EXACT)


@state_configs
@pytest.mark.parametrize("lengths", PACKED.values(), ids=PACKED)
def test_packed_row_alone(overrides: dict[str, Any], lengths: list[int]) -> None:
    """A packed row without neighbours, all rows in step, is its documents each alone."""
    model = tiny_model(tiny_config(**overrides))
    (tokens,) = texts(model, 20)
    logits = model(tokens[None], position_ids=restarted_positions(lengths)[None]).logits[0]
    naive = [naive_logits(model, document) for document in tokens.split(lengths)]
    assert_close(logits, torch.cat(naive), **EXACT)


@state_configs
@pytest.mark.parametrize("restart", [1, 3, 4, 5, 9], ids="restart_after_{}".format)
def test_restart_in_a_continued_call(overrides: dict[str, Any], restart: int) -> None:
    """A document that starts within a later call leaves the state of the row's old one behind."""
    model = tiny_model(tiny_config(**overrides))
    rows = texts(model, 17, 17)
    cache = model.new_cache(2)
    model(torch.stack([row[:7] for row in rows]), cache=cache)
    positions = torch.arange(7, 17).repeat(2, 1)
    positions[1, restart:] = torch.arange(10 - restart)
    logits = model(torch.stack([row[7:] for row in rows]), position_ids=positions, cache=cache).logits
    assert_close(logits[0], naive_logits(model, rows[0])[7:], **EXACT)
    old, new = rows[1][: 7 + restart], rows[1][7 + restart :]
    assert_close(logits[1], torch.cat([naive_logits(model, old)[7:], naive_logits(model, new)]), **EXACT)


@state_configs
def test_positions_of_a_calls_first_token_restart_nothing(overrides: dict[str, Any]) -> None:
    """Position 0 at a row's first real token of a call, or at padding, is no new document: `generate` numbers so."""
    model = tiny_model(tiny_config(**overrides))
    (tokens,) = texts(model, 14)
    cache = model(tokens[None, :7], use_cache=True).past_key_values
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1, 2, 0, 3, 4, 5, 6]])
    logits = model(scatter([tokens[7:]], mask), attention_mask=mask, position_ids=positions, cache=cache).logits
    assert_close(logits[0, mask[0].bool()], naive_logits(model, tokens)[7:], **EXACT)


@pytest.mark.parametrize("ids", [True, False], ids=["ids", "embeddings"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("start", [0, 2])
def test_positions_that_do_not_go_on(start: int, masked: bool, ids: bool) -> None:
    """They begin texts: numbered from 2, falling, standing still or jumping ahead; of one token, many in a row."""
    model = tiny_model(tiny_config())
    documents = [[8, 1, 1, 1, 7], [3, 9, 1, 1, 1, 1, 2]]
    tokens, rows = random_tokens(model.config, 2, 24), []
    for lengths in documents:
        lengths = [*lengths, 24 - 1 - sum(lengths) if masked else 24 - sum(lengths)]
        # Each from the last one's own first position on, and the fourth one from far ahead.
        rows.append(
            [start + step + 50 * (number == 3) for number, length in enumerate(lengths) for step in range(length)]
        )
    mask = torch.ones(2, 24, dtype=torch.long)
    if masked:
        mask[:, 5] = 0
        rows = [[*row[:5], 7, *row[5:]] for row in rows]
    given = dict(input_ids=tokens)
    if not ids:
        embeds = model.model.embed_tokens(tokens).detach()
        given = dict(inputs_embeds=embeds.masked_fill(mask[:, :, None] == 0, float("nan")))
    out = model(**given, position_ids=torch.tensor(rows), attention_mask=mask if masked else None, use_cache=True)
    for row, lengths in enumerate(documents):
        columns = mask[row].nonzero()[:, 0]
        for part in columns.tensor_split(torch.tensor(lengths).cumsum(0)):
            naive = naive_read(model, tokens[row, part])
            assert_close(out.logits[row, part], naive.logits, **EXACT)
        assert_close(out.past_key_values.memory[row], naive.memories[-1], **EXACT)
        assert out.past_key_values.num_tokens[row] == len(part)


def test_positions_that_count_what_is_not_there() -> None:
    """Over a hole positions may go on by one, or by the columns passed."""
    model = tiny_model(tiny_config())
    mask = bits(["0011101101111"])
    tokens = random_tokens(model.config, *mask.shape)
    expected = model(tokens, attention_mask=mask).logits
    for positions in (torch.arange(13)[None], mask.cumsum(1) - 1, (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)):
        assert torch.equal(model(tokens, attention_mask=mask, position_ids=positions).logits, expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pattern", MASKS.values(), ids=MASKS)
def test_what_is_not_a_number_is_not_seen_behind_a_mask(pattern: list[str], packed: bool) -> None:
    """In embeddings, whatever stands where there is no token; nor does it get a gradient."""
    model, mask = tiny_model(tiny_config()), bits(pattern)
    tokens = random_tokens(model.config, *mask.shape)
    options: dict[str, Any] = dict(attention_mask=mask)
    if packed:
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) % 4
    embeds = model.model.embed_tokens(tokens).detach().masked_fill(mask[:, :, None] == 0, float("nan"))
    embeds.requires_grad_()
    states = model.new_cache(len(mask)), model.new_cache(len(mask))
    with torch.enable_grad():
        logits = model(inputs_embeds=embeds, cache=states[0], **options).logits
    assert_close(logits, model(tokens, cache=states[1], **options).logits, **EXACT)
    (gradient,) = torch.autograd.grad(logits, embeds, torch.ones_like(logits))
    assert gradient.isfinite().all()
    more = random_tokens(model.config, len(mask), 7, seed=1)
    assert_close(model(more, cache=states[0]).logits, model(more, cache=states[1]).logits, **EXACT)


@state_configs
def test_packed_and_padded(overrides: dict[str, Any]) -> None:
    """Documents packed into rows with left padding, right padding and holes are each alone."""
    model = tiny_model(tiny_config(**overrides))
    mask = bits(MASKS["holes"])
    rows = texts(model, *mask.sum(1).tolist())
    positions = torch.full(mask.shape, 1)
    for row, tokens in enumerate(rows):
        positions[row, mask[row].bool()] = restarted_positions([3, len(tokens) - 3])
    logits = model(scatter(rows, mask), attention_mask=mask, position_ids=positions).logits
    for row, tokens in enumerate(rows):
        naive = torch.cat([naive_logits(model, document) for document in (tokens[:3], tokens[3:])])
        assert_close(logits[row, mask[row].bool()], naive, **EXACT)


# The state's rows


@state_configs
def test_reset_rows(overrides: dict[str, Any]) -> None:
    """Rows that are reset start anew in any phase; their neighbours do not notice."""
    model = tiny_model(tiny_config(**overrides))
    rows = texts(model, 15, 18, 12, 17)
    cache = prefill(model, [row[:-8] for row in rows])
    fed = cache.get_seq_length()
    cache.reset_rows(torch.tensor([True, False, True, False]))
    assert cache.num_tokens.tolist() == [0, 10, 0, 9]
    assert cache.get_seq_length() == fed
    logits = model(torch.stack([row[-8:] for row in rows]), cache=cache).logits
    for row, document in enumerate((rows[0][-8:], rows[1], rows[2][-8:], rows[3])):
        naive = naive_read(model, document)
        assert_close(logits[row], naive.logits[-8:], **EXACT)
        assert_close(cache.memory[row], naive.memories[-1], **EXACT)


@state_configs
def test_reset(overrides: dict[str, Any]) -> None:
    """A state that is reset is an empty one."""
    model = tiny_model(tiny_config(**overrides))
    first, second = texts(model, 13, 12)
    cache = prefill(model, [first, second])
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.num_tokens.tolist() == [0, 0]
    logits = model(torch.stack([second, first[:12]]), cache=cache).logits
    assert_close(logits, torch.stack([naive_logits(model, second), naive_logits(model, first[:12])]), **EXACT)


@state_configs
@pytest.mark.parametrize("operation", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
def test_rows_move_with_all_their_state(overrides: dict[str, Any], operation: str) -> None:
    """Rows reordered, selected or repeated in any phase read on as the rows they came from."""
    model = tiny_model(tiny_config(**overrides))
    for seen in ((1, 6, 10), (4, 5, 8), (2, 2, 7)):
        rows, tails = texts(model, *seen), random_tokens(model.config, 6, 9, seed=9)
        cache = prefill(model, rows)
        if operation == "batch_repeat_interleave":
            cache.batch_repeat_interleave(2)
            order = [0, 0, 1, 1, 2, 2]
        else:
            order = [2, 0, 0] if operation == "reorder_cache" else [2, 1]
            getattr(cache, operation)(torch.tensor(order))
        assert cache.num_tokens.tolist() == [seen[row] for row in order]
        tails = tails[: len(order)]
        logits = torch.cat([model(part, cache=cache).logits for part in tails.split([1, 8], dim=1)], dim=1)
        for new, old in enumerate(order):
            naive = naive_read(model, torch.cat([rows[old], tails[new]]))
            assert_close(logits[new], naive.logits[-9:], **EXACT)
            assert_close(cache.memory[new], naive.memories[-1], **EXACT)


@state_configs
def test_clone_is_independent(overrides: dict[str, Any]) -> None:
    """What is read into a state leaves its clone where it was."""
    model = tiny_model(tiny_config(**overrides))
    one, other = texts(model, 20, 20)
    cache = model(one[None, :8], use_cache=True).past_key_values
    clone = cache.clone()
    model(other[None], cache=cache)
    assert_close(model(one[None, 8:], cache=clone).logits[0], naive_logits(model, one)[8:], **EXACT)
