"""BakaCache: its size, its rows, going back, seeds, and what autograd modes may be mixed on one state."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    CLOSE,
    CONFIGS,
    STATES,
    contents,
    every_state,
    forget_and_go_on,
    logits_of,
    naive_read,
    random_tokens,
    rows_out_of_phase,
    state_at,
    tiny_config,
    tiny_model,
)
from torch import Tensor
from torch.testing import assert_close
from transformers import Cache

from baka_hf import BakaCache, BakaForCausalLM, calls_baka

# Size and counts


@every_state
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_size_is_the_formula_and_stays_so(overrides: dict[str, Any], dtype: torch.dtype) -> None:
    """B · (L · 2 · H_kv · d · 2S + R · D) numbers (S without XL), before, during and long after reading, R · D in
    float32 if they are normed; and each association, in float32: 6a · (D + 1), or H · a · d, and n · D of the model's.
    """
    model = tiny_model(tiny_config(**overrides), dtype)
    config, cache = model.config, model.new_cache(3)
    slots = 2 * config.num_memory_tokens + config.chunk_size + config.num_pause_tokens
    if config.use_xl_cache:
        slots *= 2
    numbers = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * slots
    vectors = config.num_memory_tokens * config.hidden_size
    associations = config.num_hidden_layers // config.associative_layer_interval
    in_float32 = associations * 6 * config.associative_dim * (config.hidden_size + 1)
    if config.associative_write == "tokens":
        in_float32 = associations * config.num_attention_heads * config.associative_dim * config.head_dim
        numbers += associations * config.chunk_size * config.hidden_size
    if config.memory_norm:
        in_float32 += vectors
    else:
        numbers += vectors
    expected = 3 * (numbers * dtype.itemsize + in_float32 * 4)
    assert cache.nbytes == expected
    for length in (1, 1, 3, 5, 60):
        logits_of(model, random_tokens(config, 3, length), cache)
        assert cache.nbytes == expected
    # No other tensor grows with the text either. The first 32 ids of each row's text are kept.
    kept = sum(t.numel() for t in cache.carried.values()) + 3 * 32 + 50
    assert sum(t.numel() for t in vars(cache).values() if isinstance(t, Tensor)) < kept


@pytest.mark.smoke
def test_counts() -> None:
    """`get_seq_length` counts positions, padding included; `num_tokens` what each row has taken in."""
    model = tiny_model(tiny_config())
    cache = model.new_cache(2)
    assert cache.get_seq_length() == 0 and cache.num_tokens.tolist() == [0, 0]
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 1, 1, 0]])
    logits_of(model, random_tokens(model.config, 2, 7), cache, attention_mask=mask)
    assert cache.get_seq_length() == 7 and cache.num_tokens.tolist() == [7, 3]
    logits_of(model, random_tokens(model.config, 2, 1), cache)
    assert cache.get_seq_length() == 8 and cache.num_tokens.tolist() == [8, 4]
    assert type(cache.get_seq_length()) is int and cache.num_tokens.dtype == torch.int64


def test_counts_are_copies() -> None:
    """What `num_tokens` returned earlier neither changes with the state nor changes it."""
    model = tiny_model(tiny_config())
    cache = model.new_cache(1)
    before = cache.num_tokens
    logits_of(model, random_tokens(model.config, 1, 3), cache)
    assert before.tolist() == [0]
    cache.num_tokens.zero_()
    assert cache.num_tokens.tolist() == [3]


def test_when_a_state_comes_back() -> None:
    """By default as the config says, and not while training; `use_cache` and a state of one's own decide otherwise."""
    tokens = torch.tensor([[1, 2, 3]])
    for use_cache in (True, False):
        model = tiny_model(tiny_config(use_cache=use_cache))
        assert (model(tokens).past_key_values is not None) is use_cache
        for mode in (True, False):
            model.train(mode)
            assert model(tokens, use_cache=True).past_key_values is not None
            assert model(tokens, use_cache=False).past_key_values is None
            cache = model.new_cache()
            assert model(tokens, cache=cache).past_key_values is cache
        model.train()
        assert model(tokens).past_key_values is None


def test_is_a_transformers_cache() -> None:
    """What `generate` and others ask of a cache."""
    model = tiny_model(tiny_config(num_hidden_layers=3), torch.float32)
    cache = model.new_cache(2)
    assert isinstance(cache, Cache) and type(cache) is BakaCache
    assert len(cache) == 3
    assert (cache.batch_size, cache.device, cache.memory.dtype) == (2, torch.device("cpu"), torch.float32)
    assert cache.is_croppable and not cache.is_compileable
    assert "num_tokens=[0, 0]" in repr(cache)


def test_dtype_of_a_new_state() -> None:
    """The model's own; for a state made by hand the one given, else the config's, else PyTorch's default."""
    assert tiny_model(tiny_config(), torch.bfloat16).new_cache().memory.dtype == torch.bfloat16
    assert BakaCache(tiny_config()).memory.dtype == torch.float32
    assert BakaCache(tiny_config(dtype="float16")).memory.dtype == torch.float16
    assert BakaCache(tiny_config(dtype="float16"), 1, "cpu", torch.float64).memory.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, "float32"], ids=str)
def test_refuses_a_dtype_that_is_not_floating(dtype: Any) -> None:
    """Truncated to integers a memory is none: neither made, nor changed into, nor read from a file."""
    cache = tiny_model(tiny_config()).new_cache(memory=torch.rand(2, 12))
    before = contents(cache)
    with pytest.raises(ValueError, match=f"expected a floating dtype for a state, got {dtype}"):
        cache.to(dtype=dtype)
    assert contents(cache) == before
    for make in (BakaCache, BakaCache.from_pretrained):
        with pytest.raises(ValueError, match="expected a floating dtype"):
            make(tiny_config() if make is BakaCache else "nowhere", dtype=dtype)


def test_memory_of_a_row_that_has_read_nothing() -> None:
    """Zeros, though others beside it have read, though it was read and taken back; a seed is kept."""
    for seed in (torch.zeros(2, 2, 12), torch.randn(2, 2, 12, dtype=torch.float64)):
        for mode in (torch.enable_grad, torch.no_grad):
            model = tiny_model(tiny_config())
            cache, other = (model.new_cache(2, memory=seed if seed.any() else None) for _ in range(2))
            with mode():
                for _ in range(2):
                    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
                    model(random_tokens(model.config, 2, 3), cache=cache, attention_mask=mask)
                model(random_tokens(model.config, 2, 4), cache=other)
                other.crop(-4)
            assert torch.equal(cache.memory[1], seed[1]) and cache.memory[0].abs().min() > 0
            assert torch.equal(other.memory, seed)


@pytest.mark.parametrize("batch_size", [0, -1, 1.0, "2", True, None])
def test_refuses_a_bad_batch_size(batch_size: Any) -> None:
    """A state has at least one row; the message says what came."""
    with pytest.raises(ValueError, match=f"`batch_size` must be an integer of at least 1, got {batch_size!r}"):
        BakaCache(tiny_config(), batch_size)


# Rows


@pytest.mark.smoke
@every_state
def test_rows_are_reordered_selected_repeated(overrides: dict[str, Any]) -> None:
    """After each operation a row goes on as the row it was taken from, whatever its phase."""
    model = tiny_model(tiny_config(**overrides))
    config = model.config
    texts, cache = rows_out_of_phase(model, 3, 5, 12)
    more = random_tokens(config, 7, seed=9)
    rows = [logits_of(model, torch.cat([text, more])[None])[0, -7:] for text in texts]

    def assert_rows(cache: BakaCache, expected: list[int]) -> None:
        assert cache.batch_size == len(expected)
        assert cache.num_tokens.tolist() == [len(texts[row]) for row in expected]
        found = logits_of(model, more.expand(len(expected), -1), cache)
        assert_close(found, torch.stack([rows[row] for row in expected]), **CLOSE)

    reordered, selected, repeated = cache.clone(), cache.clone(), cache.clone()
    reordered.reorder_cache(torch.tensor([2, 0, 0]))
    assert_rows(reordered, [2, 0, 0])
    selected.batch_select_indices(torch.tensor([1, -1]))
    assert_rows(selected, [1, 2])
    repeated.batch_repeat_interleave(2)
    assert_rows(repeated, [0, 0, 1, 1, 2, 2])
    assert_rows(cache, [0, 1, 2])


@pytest.mark.parametrize("indices", [[0, 2], [-3], [], [[0, 1]]], ids=str)
def test_refuses_rows_that_are_not_there(indices: list) -> None:
    """Indices outside the batch are a ValueError that names them, and the state stays as it was."""
    model = tiny_model(tiny_config())
    _, cache = rows_out_of_phase(model, 3, 7)
    before = contents(cache)
    for operation in (cache.reorder_cache, cache.batch_select_indices):
        with pytest.raises(ValueError, match="row indices below the batch size 2"):
            operation(torch.tensor(indices, dtype=torch.int64))
    assert contents(cache) == before


def test_rows_are_selected_by_a_mask() -> None:
    """As by the indices of the rows it names, the way tensors are indexed."""
    model = tiny_model(tiny_config())
    _, cache = rows_out_of_phase(model, 3, 7, 5)
    for mask in (torch.tensor([True, False, True]), torch.tensor([False, True, False])):
        by_mask, by_index = cache.clone(), cache.clone()
        by_mask.batch_select_indices(mask)
        by_index.batch_select_indices(mask.nonzero()[:, 0])
        assert contents(by_mask) == contents(by_index) and by_mask.batch_size == int(mask.sum())


@pytest.mark.parametrize("indices", [[True], [[True, False]], [False, False], [0.0, 1.0], [1.9]], ids=str)
def test_refuses_what_names_no_rows(indices: list) -> None:
    """Masks of another size, or of no row, and numbers that are not whole; and a mask is no order of rows."""
    _, cache = rows_out_of_phase(tiny_model(tiny_config()), 3, 7)
    before = contents(cache)
    for operation in (cache.reorder_cache, cache.batch_select_indices):
        with pytest.raises(ValueError, match="expected"):
            operation(torch.tensor(indices))
    with pytest.raises(ValueError, match="expected row indices"):
        cache.reorder_cache(torch.tensor([True, False]))
    assert contents(cache) == before


def test_refuses_arrays_of_objects() -> None:
    """PyTorch takes none, whatever stands in them."""
    _, cache = rows_out_of_phase(tiny_model(tiny_config()), 3, 7)
    before = contents(cache)
    for operation in (cache.reorder_cache, cache.batch_select_indices, cache.reset_rows):
        with pytest.raises(ValueError, match=r"expected (row indices|a boolean mask).*, got array\(\[True"):
            operation(np.array([True, False], object))
    assert contents(cache) == before


def test_an_interrupted_operation_on_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tensors are there before one is replaced: out of memory in between leaves the state as it was."""
    _, cache = rows_out_of_phase(tiny_model(tiny_config()), 3, 7)
    cache.layers[1].values = cache.layers[1].values.as_subclass(Unwilling)
    before = contents(cache.tensors()), cache.num_tokens.tolist()
    for operation in (
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.reset_rows(torch.tensor([True, False])),
        lambda: cache.to(dtype=torch.float32),
        cache.reset,
    ):
        with pytest.raises(MemoryError):
            operation()
        assert (contents(cache.tensors()), cache.num_tokens.tolist()) == before


class Unwilling(Tensor):
    """A tensor of which there is no room for another."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.index_select, Tensor.repeat_interleave, Tensor.masked_fill, Tensor.to, torch.zeros_like):
            raise MemoryError
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("repeats", [0, -1])
def test_refuses_to_repeat_rows_less_than_once(repeats: int) -> None:
    """A state without rows is of no use: a ValueError, and the state stays as it was."""
    cache = tiny_model(tiny_config()).new_cache(2)
    before = contents(cache)
    with pytest.raises(ValueError, match=str(repeats)):
        cache.batch_repeat_interleave(repeats)
    assert contents(cache) == before


@every_state
def test_reset(overrides: dict[str, Any]) -> None:
    """A reset state is a new one that still records, and what it had kept for going back is gone."""
    model = tiny_model(tiny_config(**overrides))
    _, cache = rows_out_of_phase(model, 4, 13)
    cache.activate_past_recording()
    logits_of(model, random_tokens(model.config, 2, 9), cache)
    cache.reset()
    new = model.new_cache(2)
    new.activate_past_recording()
    assert contents(cache) == contents(new)


def test_a_reset_state_still_records() -> None:
    """Who asked for it can go back over a boundary in the next text too."""
    model = tiny_model(tiny_config())
    cache = model.new_cache()
    cache.activate_past_recording()
    logits_of(model, random_tokens(model.config, 1, 9), cache)
    cache.reset()
    tokens = random_tokens(model.config, 1, 12, seed=1)
    logits_of(model, tokens, cache)
    forget_and_go_on(model, list(tokens), cache, 8)


def test_recording_ends() -> None:
    """What was kept is let go, and boundaries that come later are not kept."""
    model = tiny_model(tiny_config())
    cache, plain = model.new_cache(), model.new_cache()
    cache.activate_past_recording()
    tokens = random_tokens(model.config, 1, 13)
    for state in (cache, plain):
        logits_of(model, tokens, state)
    cache.deactivate_past_recording()
    assert contents(cache) == contents(plain)
    logits_of(model, tokens, cache)
    with pytest.raises(ValueError, match="that was not recorded"):
        cache.crop(-7)


@every_state
def test_reset_rows(overrides: dict[str, Any]) -> None:
    """The rows named begin anew, the others go on as if nothing had happened."""
    model = tiny_model(tiny_config(**overrides))
    texts, cache = rows_out_of_phase(model, 4, 13, 5)
    cache.reset_rows(torch.tensor([True, False, True]))
    assert cache.num_tokens.tolist() == [0, 13, 0] and cache.get_seq_length() == 13
    more = random_tokens(model.config, 3, 8, seed=9)
    found = logits_of(model, more, cache)
    assert_close(found[[0, 2]], logits_of(model, more[[0, 2]]), **CLOSE)
    assert_close(found[1], logits_of(model, torch.cat([texts[1], more[1]])[None])[0, 13:], **CLOSE)


def test_reset_rows_of_none() -> None:
    """An empty mask changes nothing."""
    _, cache = rows_out_of_phase(tiny_model(tiny_config()), 4, 13)
    before = contents(cache)
    cache.reset_rows(torch.tensor([False, False]))
    assert contents(cache) == before


@pytest.mark.parametrize(
    "mask", [torch.tensor([1, 0]), torch.tensor([True]), torch.tensor([[True, False]]), torch.tensor(True)], ids=str
)
def test_reset_rows_refuses(mask: Tensor) -> None:
    """Row numbers instead of a mask, or a mask of another size: a ValueError, and the state stays as it was."""
    _, cache = rows_out_of_phase(tiny_model(tiny_config()), 4, 13)
    before = contents(cache)
    with pytest.raises(ValueError, match=r"expected a boolean mask of shape \(2,\), got"):
        cache.reset_rows(mask)
    assert contents(cache) == before


# Copies


@every_state
@pytest.mark.parametrize("copied", [BakaCache.clone, copy.deepcopy], ids=["clone", "deepcopy"])
def test_copies_are_independent(overrides: dict[str, Any], copied: Callable) -> None:
    """Reading on, resetting rows and going back in either of two copies leaves the other as it was."""
    model = tiny_model(tiny_config(**overrides))
    _, cache = rows_out_of_phase(model, 3, 7)
    cache.activate_past_recording()
    logits_of(model, random_tokens(model.config, 2, 6), cache)
    twin = copied(cache)
    assert contents(twin) == contents(cache)
    for busy, idle in ((cache, twin), (twin, cache)):
        before = contents(idle)
        logits_of(model, random_tokens(model.config, 2, 9), busy)
        logits_of(model, random_tokens(model.config, 2, 1), busy)
        busy.crop(-7)
        busy.reset_rows(torch.tensor([True, False]))
        busy.reorder_cache(torch.tensor([1, 0]))
        assert contents(idle) == before


def test_deepcopy_of_a_state_with_a_graph() -> None:
    """`copy.deepcopy` refuses tensors inside a graph; of a state it makes a copy that is outside."""
    model = tiny_model(tiny_config())
    cache = model(random_tokens(model.config, 1, 8), use_cache=True).past_key_values
    assert cache.memory.requires_grad and cache.layers[0].keys.requires_grad
    twin = copy.deepcopy({"state": cache})["state"]
    assert not twin.memory.requires_grad and not twin.layers[0].keys.requires_grad
    assert contents(twin) == contents(cache)
    assert cache.memory.requires_grad


def test_detach() -> None:
    """`detach_` returns the state itself, outside the graph, values untouched."""
    model = tiny_model(tiny_config())
    cache = model(random_tokens(model.config, 1, 8), use_cache=True).past_key_values
    before = contents(cache)
    assert cache.detach_() is cache
    tensors = [cache.memory, *(t for layer in cache.layers for t in (layer.keys, layer.values))]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert contents(cache) == before


@every_state
def test_to_another_dtype(overrides: dict[str, Any]) -> None:
    """`to` changes the state in place, floating tensors only, and reading goes on in the new precision."""
    model = tiny_model(tiny_config(**overrides))
    tokens = random_tokens(model.config, 2, 20)
    expected = logits_of(model, tokens)[:, 12:]
    cache = model.new_cache(2)
    logits_of(model, tokens[:, :12], cache)
    nbytes = cache.nbytes
    assert cache.to(dtype=torch.float32) is cache
    assert cache.memory.dtype == cache.layers[1].values.dtype == torch.float32
    assert cache.nbytes == nbytes / 2
    assert cache.num_tokens.tolist() == [12, 12] and cache.num_tokens.dtype == torch.int64
    assert cache.to("cpu").memory.dtype == torch.float32
    assert_close(logits_of(model.to(torch.float32), tokens[:, 12:], cache).double(), expected, rtol=0, atol=1e-4)


def test_to_another_device() -> None:
    """All tensors that a forward call touches move; "meta" stands in for an accelerator."""
    cache = tiny_model(tiny_config()).new_cache(2)
    cache.to("meta", torch.bfloat16)
    assert cache.device.type == "meta" and cache.memory.dtype == torch.bfloat16
    assert all(t.device.type == "meta" for layer in cache.layers for t in (layer.keys, layer.values))
    assert cache.num_tokens.device.type == "cpu"


# Going back


@pytest.mark.parametrize("name", ["xl", "carry", "without_xl"])
@pytest.mark.parametrize("chunk_size", [1, 3, 7])
@pytest.mark.parametrize("piece", [1, 4, 100], ids=["token by token", "in fours", "one call"])
def test_crop_across_boundaries(name: str, chunk_size: int, piece: int) -> None:
    """With recording on, every number of positions can be taken back, and what follows never saw them."""
    model = tiny_model(tiny_config(**dict(num_pause_tokens=min(2, chunk_size)) | STATES[name], chunk_size=chunk_size))
    tokens = random_tokens(model.config, 1, 17)
    cache = model.new_cache()
    cache.activate_past_recording()
    for part in tokens.split(piece, dim=1):
        logits_of(model, part, cache)
    for count in range(1, 18):
        forget_and_go_on(model, list(tokens), cache.clone(), count)


@every_state
@pytest.mark.parametrize("piece", [1, 100], ids=["token by token", "one call"])
def test_crop_rows_out_of_phase(overrides: dict[str, Any], piece: int) -> None:
    """Rows that cross their boundaries at different positions go back together."""
    model = tiny_model(tiny_config(**overrides))
    texts, cache = rows_out_of_phase(model, 2, 5, 9)
    cache.activate_past_recording()
    tokens = random_tokens(model.config, 3, 13, seed=5)
    for part in tokens.split(piece, dim=1):
        logits_of(model, part, cache)
    texts = [torch.cat(pair) for pair in zip(texts, tokens, strict=True)]
    for count in range(1, 14):
        forget_and_go_on(model, texts, cache.clone(), count)


def test_crop_after_rows_have_moved() -> None:
    """What was recorded moves with its rows."""
    model = tiny_model(tiny_config())
    texts, cache = rows_out_of_phase(model, 2, 5, 9)
    cache.activate_past_recording()
    tokens = random_tokens(model.config, 3, 13, seed=5)
    logits_of(model, tokens, cache)
    texts = [torch.cat(pair) for pair in zip(texts, tokens, strict=True)]
    reordered, selected, repeated = cache.clone(), cache.clone(), cache.clone()
    reordered.reorder_cache(torch.tensor([2, 0, 0]))
    selected.batch_select_indices(torch.tensor([1]))
    repeated.batch_repeat_interleave(2)
    for moved, rows in ((reordered, [2, 0, 0]), (selected, [1]), (repeated, [0, 0, 1, 1, 2, 2])):
        for count in (1, 4, 9, 13):
            forget_and_go_on(model, [texts[row] for row in rows], moved.clone(), count)


@pytest.mark.parametrize("how", ["reset_rows", "position_ids"])
def test_crop_in_a_new_text(how: str) -> None:
    """What was recorded of the text before it does not come back."""
    model = tiny_model(tiny_config())
    old, new = random_tokens(model.config, 2, 14), random_tokens(model.config, 2, 12, seed=1)
    cache = model.new_cache(2)
    cache.activate_past_recording()
    logits_of(model, old, cache)
    if how == "reset_rows":
        cache.reset_rows(torch.tensor([True, False]))
        logits_of(model, new[:, :1], cache)
    else:
        more = torch.cat([old[:, :1], new[:, :1]], dim=1)
        logits_of(model, more, cache, position_ids=torch.tensor([[14, 0], [14, 15]]))
        old = torch.cat([old, old[:, :1]], dim=1)
    logits_of(model, new[:, 1:], cache)
    texts = [new[0], torch.cat([old[1], new[1]])]
    for count in range(1, 12):
        forget_and_go_on(model, texts, cache.clone(), count)


@every_state
def test_crop_within_the_chunk_needs_no_recording(overrides: dict[str, Any]) -> None:
    """Up to the last boundary it is free; one further is a ValueError."""
    model = tiny_model(tiny_config(**overrides))
    tokens = random_tokens(model.config, 1, 14)  # two chunks of 5, and 4
    cache = model.new_cache()
    logits_of(model, tokens, cache)
    for count in range(1, 5):
        forget_and_go_on(model, list(tokens), cache.clone(), count)
    before = contents(cache)
    with pytest.raises(ValueError, match=r"cannot crop 5 positions: .*not recorded; call `activate_past_recording`"):
        cache.crop(-5)
    assert contents(cache) == before


@every_state
def test_reading_and_going_back_at_random(overrides: dict[str, Any]) -> None:
    """Any sequence of calls and crops leaves the state of the tokens that remain."""
    model = tiny_model(tiny_config(**overrides))
    generator = torch.Generator().manual_seed(3)
    cache, text = model.new_cache(), torch.zeros(0, dtype=torch.int64)
    cache.activate_past_recording()
    for step in range(60):
        if len(text) and torch.rand((), generator=generator) < 0.4:
            count = int(torch.randint(1, min(len(text), 12) + 1, (), generator=generator))
            cache.crop(-count)
            text = text[:-count]
        else:
            more = random_tokens(model.config, int(torch.randint(1, 9, (), generator=generator)), seed=step)
            text = torch.cat([text, more])
            assert_close(logits_of(model, more[None], cache), logits_of(model, text[None])[:, -len(more) :], **CLOSE)
        assert cache.get_seq_length() == len(text)


@pytest.mark.parametrize("num_pause_tokens", [0, 1])
def test_a_state_that_went_back_is_a_file(num_pause_tokens: int, tmp_path: Path) -> None:
    """What a boundary had kept is of the same dtypes as what took its place, pauses that are not there too."""
    model = tiny_model(tiny_config(num_pause_tokens=num_pause_tokens))
    tokens, cache = random_tokens(model.config, 1, 13), model.new_cache()
    cache.activate_past_recording()
    logits_of(model, tokens, cache)
    cache.crop(-6)
    cache.save_pretrained(tmp_path)
    resumed, other = BakaCache.from_pretrained(tmp_path), model.new_cache()
    logits_of(model, tokens[:, :7], other)
    assert contents(resumed._pauses) == contents(other._pauses)
    assert torch.equal(logits_of(model, tokens[:, 7:], resumed), logits_of(model, tokens[:, 7:], cache))


def test_crop_as_far_as_is_recorded() -> None:
    """128 positions can be taken back however long the text, and what is kept for it does not grow."""
    model = tiny_model(tiny_config(chunk_size=7))
    tokens = random_tokens(model.config, 1, 300)
    for piece in (1, 50, 300):
        cache = model.new_cache()
        cache.activate_past_recording()
        for part in tokens.split(piece, dim=1):
            logits_of(model, part, cache)
        assert len(cache._boundaries) <= 128 // 7 + 1
        forget_and_go_on(model, list(tokens), cache.clone(), 128)
        before = contents(cache)
        with pytest.raises(ValueError, match="cannot crop 150 positions"):
            cache.crop(-150)
        assert contents(cache) == before


def test_crop_counts_in_tensors_too() -> None:
    """Assisted generation counts its guesses in a tensor; what the state says of itself stays plain numbers."""
    model = tiny_model(tiny_config())
    cache = model.new_cache()
    logits_of(model, random_tokens(model.config, 1, 4), cache)
    cache.crop(torch.tensor(-3))
    assert type(cache.get_seq_length()) is int and cache.get_seq_length() == 1


def test_crop_everything() -> None:
    """A state that has forgotten all it read reads a new text as a new state does, and takes a seed."""
    model = tiny_model(tiny_config())
    cache = model.new_cache()
    cache.activate_past_recording()
    logits_of(model, random_tokens(model.config, 1, 12), cache)
    cache.crop(-12)
    assert cache.get_seq_length() == 0 and cache.num_tokens.tolist() == [0]
    tokens = random_tokens(model.config, 1, 12, seed=1)
    assert_close(logits_of(model, tokens, cache), logits_of(model, tokens), **CLOSE)


def test_crop_of_nothing() -> None:
    """Zero positions are no positions."""
    model = tiny_model(tiny_config())
    _, cache = rows_out_of_phase(model, 2, 6)
    before = contents(cache)
    cache.crop(0)
    assert contents(cache) == before


def over_padding(model: BakaForCausalLM, cache: BakaCache) -> None:
    logits_of(model, random_tokens(model.config, 2, 3), cache, attention_mask=torch.tensor([[1, 1, 1], [1, 0, 1]]))


def over_a_reset(model: BakaForCausalLM, cache: BakaCache) -> None:
    cache.reset_rows(torch.tensor([False, True]))


def over_a_restart(model: BakaForCausalLM, cache: BakaCache) -> None:
    logits_of(model, random_tokens(model.config, 2, 3), cache, position_ids=torch.tensor([[4, 5, 6], [4, 0, 1]]))


def over_a_boundary_of_a_training_call(model: BakaForCausalLM, cache: BakaCache) -> None:
    model(random_tokens(model.config, 2, 6, seed=1), cache=cache)


@pytest.mark.parametrize(
    "obstacle",
    [over_padding, over_a_reset, over_a_restart, over_a_boundary_of_a_training_call],
    ids=lambda f: f.__name__,
)
def test_crop_refuses_to_go_back(obstacle: Callable) -> None:
    """What cannot be undone exactly is a ValueError, and the state stays as it was: it reads on."""
    model = tiny_model(tiny_config())
    cache = model.new_cache(2)
    cache.activate_past_recording()
    logits_of(model, random_tokens(model.config, 2, 7), cache)
    obstacle(model, cache)
    tokens = random_tokens(model.config, 2, 2, seed=2)
    logits_of(model, tokens, cache)
    before, twin = contents(cache), cache.clone()
    with pytest.raises(ValueError, match="cannot crop 9 positions"):
        cache.crop(-9)
    assert contents(cache) == before
    assert torch.equal(logits_of(model, tokens, cache), logits_of(model, tokens, twin))


def test_crop_refuses_numbers_that_make_no_sense() -> None:
    """Positive numbers (older transformers' lengths), and more than was ever read."""
    model = tiny_model(tiny_config())
    cache = model.new_cache()
    cache.activate_past_recording()
    logits_of(model, random_tokens(model.config, 1, 7), cache)
    before = contents(cache)
    with pytest.raises(ValueError, match="takes a negative number of positions to remove, got 3"):
        cache.crop(3)
    with pytest.raises(ValueError, match="cannot crop 8 positions: only the last 7"):
        cache.crop(-8)
    for number in (-1.9, -1.0, "-1", None, torch.tensor(-1.5)):
        with pytest.raises(ValueError, match="takes an integer number of positions"):
            cache.crop(number)
    assert contents(cache) == before


# Another stream's memory


@pytest.mark.parametrize(
    "overrides",
    [CONFIGS[name] for name in ("rmt_carry", "rmt_tokens", "layer_separate", "rmt_without_xl")],
    ids=lambda o: str(o),
)
@pytest.mark.parametrize("per_row", [True, False], ids=["[B, R, D]", "[R, D]"])
def test_a_stream_seeded_with_anothers_memory(overrides: dict[str, Any], per_row: bool) -> None:
    """Logits and memory are those of the naive reading that begins with this memory, in one call or many."""
    model = tiny_model(tiny_config(**overrides))
    _, source = rows_out_of_phase(model, 11, 5)
    before = contents(source)
    memory = source.memory if per_row else source.memory[0]
    tokens = random_tokens(model.config, 2, 13, seed=4)
    readings = [naive_read(model, tokens[row], memory=source.memory[row if per_row else 0]) for row in (0, 1)]
    for piece in (13, 1, 4):
        cache = model.new_cache(2, memory=memory)
        found = torch.cat([logits_of(model, part, cache) for part in tokens.split(piece, dim=1)], dim=1)
        assert_close(found, torch.stack([reading.logits for reading in readings]), **CLOSE)
        assert_close(cache.memory, torch.stack([reading.memories[-1] for reading in readings]), **CLOSE)
    assert contents(source) == before


def test_seeding_takes_over_the_memory_and_nothing_else() -> None:
    """The unfinished chunk of the source does not come over, and later changes of the source do not either."""
    model = tiny_model(tiny_config())
    source, longer = model.new_cache(), model.new_cache()
    tokens = random_tokens(model.config, 1, 14)
    logits_of(model, tokens[:, :10], source)
    logits_of(model, tokens, longer)
    fresh = model.new_cache(memory=source.memory)
    assert fresh.get_seq_length() == 0 and fresh.num_tokens.tolist() == [0]
    assert contents(fresh) == contents(model.new_cache(memory=longer.memory))
    source.memory.zero_()
    assert contents(fresh) == contents(model.new_cache(memory=longer.memory))


def test_seed_in_another_precision() -> None:
    """A memory saved in half precision seeds a stream of the model's own."""
    model = tiny_model(tiny_config(), torch.float32)
    memory = torch.randn(2, 12, dtype=torch.bfloat16)
    cache = model.new_cache(3, memory=memory)
    assert cache.memory.dtype == torch.float32 and torch.equal(cache.memory, memory.float().expand(3, 2, 12))


def test_a_seeded_row_that_is_reset_begins_with_the_learned_memory() -> None:
    """`reset_rows` forgets the seed of these rows, and of no others."""
    model = tiny_model(tiny_config())
    memory = torch.randn(2, 2, 12, dtype=torch.float64)
    cache = model.new_cache(2, memory=memory)
    cache.reset_rows(torch.tensor([True, False]))
    tokens = random_tokens(model.config, 2, 8)
    found = logits_of(model, tokens, cache)
    assert_close(found[0], naive_read(model, tokens[0]).logits, **CLOSE)
    assert_close(found[1], naive_read(model, tokens[1], memory=memory[1]).logits, **CLOSE)


def test_gradients_reach_a_seed() -> None:
    """A memory that is itself being learned gets its gradient."""
    model = tiny_model(tiny_config())
    memory = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    model(random_tokens(model.config, 1, 8), cache=model.new_cache(memory=memory)).logits.sum().backward()
    assert memory.grad.abs().min() > 0


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 10), (1, 2, 12), (3, 2, 12), (1, 2, 2, 12)], ids=str)
def test_refuses_a_seed_of_another_shape(shape: tuple[int, ...]) -> None:
    """The message says which shapes fit and which came."""
    model = tiny_model(tiny_config())
    with pytest.raises(ValueError) as error:
        model.new_cache(2, memory=torch.zeros(shape))
    assert "(2, 2, 12) or (2, 12)" in str(error.value) and str(shape) in str(error.value)


def test_refuses_to_seed_what_has_read_or_has_no_memory() -> None:
    """A seed is a beginning; the state stays as it was."""
    model = tiny_model(tiny_config())
    cache = state_at(model, "mid-chunk")
    before = contents(cache)
    with pytest.raises(ValueError, match=r"can only seed a fresh state, this one has read \[12, 12\]"):
        cache.seed_memory(torch.zeros(2, 12))
    assert contents(cache) == before
    with pytest.raises(ValueError, match="num_memory_tokens=0"):
        tiny_model(tiny_config(num_memory_tokens=0)).new_cache(memory=torch.zeros(0, 12))


# Autograd modes on one state


def gradients(model: BakaForCausalLM, loss: Tensor) -> list[Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def read_on(model: BakaForCausalLM, cache: BakaCache) -> None:
    logits_of(model, random_tokens(model.config, 2, 9, seed=5), cache)


def read_one(model: BakaForCausalLM, cache: BakaCache) -> None:
    logits_of(model, random_tokens(model.config, 2, 1, seed=5), cache)


def read_padded(model: BakaForCausalLM, cache: BakaCache) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    logits_of(model, random_tokens(model.config, 2, 5, seed=5), cache, attention_mask=mask)


def read_detached(model: BakaForCausalLM, cache: BakaCache) -> None:
    cache.detach_()
    read_on(model, cache)


def read_in_inference_mode(model: BakaForCausalLM, cache: BakaCache) -> None:
    with torch.inference_mode():
        model(random_tokens(model.config, 2, 9, seed=5), cache=cache)


def change_rows(model: BakaForCausalLM, cache: BakaCache) -> None:
    cache.reset_rows(torch.tensor([True, False]))
    cache.reorder_cache(torch.tensor([1, 0]))
    read_one(model, cache)


def go_back(model: BakaForCausalLM, cache: BakaCache) -> None:
    cache.crop(-1)
    read_on(model, cache)


AFTERWARDS = [read_on, read_one, read_padded, read_detached, read_in_inference_mode, change_rows, go_back]


@pytest.mark.parametrize("overrides", [STATES["carry"], STATES["without_xl"]], ids=["carry", "without_xl"])
@pytest.mark.parametrize("length", [3, 12])
@pytest.mark.parametrize("in_step", [True, False], ids=["in step", "out of step"])
@pytest.mark.parametrize("trained", ["everything", "q_proj"])
@pytest.mark.parametrize("afterwards", AFTERWARDS, ids=lambda f: f.__name__)
def test_a_graph_survives_what_the_state_does_next(
    overrides: dict[str, Any], length: int, in_step: bool, trained: str, afterwards: Callable
) -> None:
    """A loss whose graph holds the state's tensors has the same gradients after the state was used without one."""
    model = tiny_model(tiny_config(**overrides))
    for name, parameter in model.named_parameters():
        # With the queries alone, keys and values of the first block are in the graph, but have no gradient themselves.
        parameter.requires_grad_(trained == "everything" or trained in name)
    tokens = random_tokens(model.config, 2, length + 4)
    mask = torch.ones(2, 4) if in_step else torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])

    def two_calls(afterwards: Callable | None) -> list[Tensor]:
        cache = model.new_cache(2)
        model(tokens[:, :4], attention_mask=mask, cache=cache)
        loss = model(tokens[:, 4:], cache=cache).logits.square().sum() + cache.memory.sum()
        if afterwards is not None:
            afterwards(model, cache)
        return gradients(model, loss)

    for found, expected in zip(two_calls(afterwards), two_calls(None), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("overrides", STATES.values(), ids=STATES)
def test_reading_on_without_a_graph_continues_the_text(overrides: dict[str, Any]) -> None:
    """Calls with a graph, without one and in inference mode take turns; the logits are those of one call."""
    model = tiny_model(tiny_config(**overrides))
    tokens = random_tokens(model.config, 2, 26)
    expected = logits_of(model, tokens)
    modes = [torch.enable_grad, torch.no_grad, torch.inference_mode]
    order = [0, 1, 2, 0, 2, 1, 0, 0, 1, 1, 2, 2, 0]
    cache, found = model.new_cache(2), []
    for mode, part in zip(order, tokens.split(2, dim=1), strict=True):
        with modes[mode]():
            found.append(model(part, cache=cache).logits.detach().clone())
    assert_close(torch.cat(found, dim=1), expected, **CLOSE)


@pytest.mark.parametrize("length", [3, 5, 12])
def test_a_prefix_read_in_inference_mode_is_trained_upon(length: int) -> None:
    """Its tensors are inference tensors, which autograd refuses: gradients are those after a detached prefix."""
    model = tiny_model(tiny_config(memory_solidifier="glu"))
    prefix, tokens = random_tokens(model.config, 2, length), random_tokens(model.config, 2, 8, seed=1)

    def after(cache: BakaCache) -> list[Tensor]:
        return gradients(model, model(tokens, cache=cache).logits.square().sum())

    with torch.inference_mode():
        inferred = model(prefix, use_cache=True).past_key_values
    detached = model(prefix, use_cache=True).past_key_values.detach_()
    for found, expected in zip(after(inferred), after(detached), strict=True):
        assert_close(found, expected, **CLOSE)


def test_one_prefix_for_several_losses() -> None:
    """Clones of a state share its graph: each continuation's gradient reaches the prefix."""
    model = tiny_model(tiny_config())
    prefix, tokens = random_tokens(model.config, 1, 8), random_tokens(model.config, 3, 4, seed=1)
    state = model(prefix, use_cache=True).past_key_values
    losses = [model(row[None], cache=state.clone()).logits.square().sum() for row in tokens]
    together = model(torch.cat([prefix.expand(3, -1), tokens], dim=1)).logits[:, 8:].square().sum()
    for found, expected in zip(gradients(model, sum(losses)), gradients(model, together), strict=True):
        assert_close(found, expected, **CLOSE)


def test_training_step_by_step_on_one_state() -> None:
    """Truncated backpropagation as it is written: read, backward, detach, step, and on."""
    model = tiny_model(tiny_config()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    state = model.new_cache(2)
    for step in range(4):
        tokens = random_tokens(model.config, 2, 7, seed=step)
        model(tokens, labels=tokens, cache=state).loss.backward()
        state.detach_()
        optimizer.step()
        optimizer.zero_grad()
    assert state.num_tokens.tolist() == [28, 28]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


# Its names


@torch.no_grad()
@pytest.mark.smoke
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_state_goes_by_both_names(name: str) -> None:
    """transformers 5.24 calls it `cache`, older ones `past_key_values`: forward and generate take either, always."""
    model = tiny_model(tiny_config())
    tokens = random_tokens(model.config, 2, 14)
    expected, state = model(tokens).logits, model.new_cache(2)
    read = model(tokens[:, :6], **{name: state})
    assert getattr(read, calls_baka.CACHE_NAME) is state and read["past_key_values"] is state
    assert_close(model.model(tokens[:, 6:12], **{name: state}).last_hidden_state, model.model(tokens)[0][:, 6:12])
    mask = torch.ones(2, 14, dtype=torch.int64)
    found = model.generate(tokens[:, 12:], attention_mask=mask, max_new_tokens=3, do_sample=False, **{name: state})
    assert found[:, 2].tolist() == expected[:, -1].argmax(-1).tolist()
    assert state.num_tokens.tolist() == [16, 16]


@torch.no_grad()
def test_one_state_under_each_name() -> None:
    model = tiny_model(tiny_config())
    one, other, tokens = model.new_cache(), model.new_cache(), random_tokens(model.config, 1, 3)
    model(tokens, past_key_values=one, cache=one)
    with pytest.raises(ValueError, match="expected one state"):
        model(tokens, past_key_values=one, cache=other)
    assert (one.num_tokens.tolist(), other.num_tokens.tolist()) == ([3], [0])
