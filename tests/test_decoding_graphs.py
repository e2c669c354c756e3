"""Static states: what graphs would record gives the logits and the state of the plain path, whatever happens between.

There are no CUDA graphs on a CPU, but all they would record runs here as well.
"""

import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import CONFIGS, random_tokens, recorded_calls, tiny_config, tiny_model
from torch import Tensor
from torch.testing import assert_close

from baka_hf import BakaCache, BakaForCausalLM, decoding_attention_baka, decoding_graphs_baka

EXACT = dict(rtol=0, atol=1e-5)


@pytest.fixture(autouse=True)
def static_reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(decoding_graphs_baka, "DEVICES", ("cpu",))
    decoding_graphs_baka._idle.clear()
    yield
    decoding_graphs_baka._idle.clear()


@pytest.fixture(autouse=True)
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many tokens, pieces and chunks were read by programs."""
    counts = {"tokens": 0, "pieces": 0, "chunks": 0}
    for name, method in (("tokens", "read_token"), ("pieces", "read_piece"), ("chunks", "read_chunk")):
        plain = getattr(decoding_graphs_baka.StaticReader, method)

        def counted(self: Any, *args: Any, plain: Any = plain, name: str = name) -> Tensor:
            counts[name] += 1
            return plain(self, *args)

        monkeypatch.setattr(decoding_graphs_baka.StaticReader, method, counted)
    return counts


def assert_same_state(actual: BakaCache, expected: BakaCache) -> None:
    assert actual.num_tokens.tolist() == expected.num_tokens.tolist()
    assert actual.get_seq_length() == expected.get_seq_length()
    assert_close(actual.memory, expected.memory, **EXACT)
    assert_close(actual._history, expected._history)
    S = actual.layers[0].keys.shape[2] // (1 + actual.signature["use_xl_cache"])
    n, R = actual.chunk_size, actual.signature["num_memory_tokens"]
    for row, num_tokens in enumerate(actual.num_tokens.tolist()):
        # What is in slots that nothing sees yet may differ.
        start = num_tokens % n
        stop = actual.layers[0].keys.shape[2] - S + (R + start if start else 0)
        for mine, other in zip(actual.layers, expected.layers, strict=True):
            first = 0 if num_tokens >= n else actual.layers[0].keys.shape[2] - S
            assert_close(mine.keys[row, :, first:stop], other.keys[row, :, first:stop], **EXACT)
            assert_close(mine.values[row, :, first:stop], other.values[row, :, first:stop], **EXACT)


def states_out_of_step(model: BakaForCausalLM, tokens: Tensor, generator: torch.Generator) -> tuple[BakaCache, ...]:
    """An ordinary state and a static one, whose rows have read the last few of `tokens` [B, T], at least three."""
    batch_size, length = tokens.shape
    mask = (torch.arange(length) >= torch.randint(length - 2, (batch_size, 1), generator=generator)).long()
    states = model.new_cache(batch_size), model.new_cache(batch_size, static=True)
    for state in states:
        model(tokens, attention_mask=mask, cache=state)
    return states


VARIANTS = CONFIGS | {"random_pauses": dict(pause_placement="random")}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head", [1, 3, 40])
@torch.no_grad()
def test_static_reading(variant: str, head: int, counts: dict[str, int]) -> None:
    """A prompt of any length, then tokens one by one over several chunks."""
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    n = model.config.chunk_size
    length = head + 3 * n + 2
    tokens = random_tokens(model.config, 2, length)
    state, static = model.new_cache(2), model.new_cache(2, static=True)
    expected, found = [], []
    for cache, logits in ((state, expected), (static, found)):
        logits.append(model(tokens[:, :head], cache=cache).logits)
        for column in range(head, length):
            logits.append(model(tokens[:, column : column + 1], cache=cache).logits)
        assert_same_state(cache, state)
    assert_close(torch.cat(found, 1), torch.cat(expected, 1), **EXACT)
    assert_close(torch.cat(found, 1), model(tokens).logits, **EXACT)
    if variant != "random_pauses":
        assert counts == {
            "tokens": length - head + (head == 1),
            "pieces": int(head > 1 and head % n > 0),
            "chunks": head // n if head > 1 else 0,
        }
    assert counts["tokens"] > 2 * n


@pytest.mark.parametrize("batch_size", [3, 17])
@torch.no_grad()
def test_rows_out_of_step(batch_size: int, counts: dict[str, int]) -> None:
    """Rows in other phases of their chunks, of which some take a token and others do not, or become other texts."""
    model = tiny_model(tiny_config())
    other = model.new_cache()
    model(random_tokens(model.config, 1, 8), cache=other)
    tokens, generator = random_tokens(model.config, batch_size, 60), torch.Generator().manual_seed(0)
    prompt = (torch.rand(batch_size, 20, generator=generator) < 0.6).long()
    state, static = model.new_cache(batch_size), model.new_cache(batch_size, static=True)
    for cache in (state, static):
        model(tokens[:, :20], attention_mask=prompt, cache=cache)
    for column in range(20, 60):
        mask = (torch.rand(batch_size, 1, generator=generator) < 0.8).long()
        token = tokens[:, column : column + 1]
        expected = model(token, attention_mask=mask, cache=state).logits
        assert_close(model(token, attention_mask=mask, cache=static).logits, expected, **EXACT)
        for cache in (state, static) if column % 9 == 8 else ():
            cache.put_row(column % batch_size, other)
    assert_same_state(static, state)
    assert counts["tokens"] == 40 and (counts["pieces"] > 0) == (batch_size == 3)
    reader = static._reader
    tokens = random_tokens(model.config, batch_size, 13, seed=1)
    mask = (torch.rand(batch_size, 13, generator=generator) < 0.8).long()
    expected = model(tokens, attention_mask=mask, cache=state).logits
    assert_close(model(tokens, attention_mask=mask, cache=static).logits, expected, **EXACT)
    assert_same_state(static, state)
    assert static._reader is reader and (batch_size > 3 or static.layers[0].keys is reader.slots[0]["keys"])


@torch.no_grad()
def test_a_row_is_put_beside_others_that_begin() -> None:
    """Together, and in a batch whose pieces no graph reads: all have the learned memory, and one gets another."""
    model = tiny_model(tiny_config(**CONFIGS["gate"]))
    other, texts = model.new_cache(), random_tokens(model.config, 17, 14)
    model(random_tokens(model.config, 1, 8), cache=other)
    static = model.new_cache(17, static=True)
    model(texts[:, :3], cache=static)
    static.put_row(0, other)
    found = model(texts[:, 3:], cache=static).logits
    assert_close(found[1:], model(texts).logits[1:, 3:], **EXACT)
    assert_close(found[:1], model(texts[:1, 3:], cache=other).logits, **EXACT)


@pytest.mark.parametrize("name", ["default", "gate", "associations_of_tokens_and_memory", "one_layer"])
@torch.no_grad()
def test_rows_at_the_edge_of_a_chunk_are_read_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a large batch, when they are few; then it is as if all were read together. Weights may change meanwhile."""
    model = tiny_model(tiny_config(**CONFIGS[name] | dict(chunk_size=23)))
    tokens, generator = random_tokens(model.config, 33, 60), torch.Generator().manual_seed(0)
    state, static = states_out_of_step(model, tokens[:, :40], generator)
    kinds = recorded_calls(monkeypatch, decoding_graphs_baka.StaticReader, "_token")
    for column in range(36):
        mask = (torch.rand(33, 1, generator=generator) < (0.9 if column else 0.1)).long()
        token = tokens[:, column : column + 1]
        expected = model(token, attention_mask=mask, cache=state).logits
        assert_close(model(token, attention_mask=mask, cache=static).logits, expected, **EXACT)
        if column == 20:
            model.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    assert_same_state(static, state)
    sizes = [(reader.batch_size, kind) for reader, kind, *_ in kinds]
    assert sizes.count((8, decoding_graphs_baka.EDGE)) > 10
    assert 0 < sizes.count((33, decoding_graphs_baka.EDGE)) < 15  # when they are many


@pytest.mark.parametrize("name", ["default", "associations_of_tokens_and_memory", "rmt_without_xl", "grouped_queries"])
@torch.no_grad()
def test_many_rows_read_what_they_see_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of step by the kernel that skips what is hidden, in step by PyTorch's, as if each read all."""
    pytest.importorskip("triton")
    monkeypatch.setattr(decoding_attention_baka, "FEWEST_ROWS", 16)
    monkeypatch.setattr(decoding_attention_baka, "DEVICES", ("cpu",))
    monkeypatch.setattr(decoding_graphs_baka, "LARGEST_PART_APART", 1)
    fields = dict(chunk_size=40, num_hidden_layers=2)
    model = tiny_model(tiny_config(**CONFIGS[name] | fields), torch.float32)
    tokens, generator = random_tokens(model.config, 17, 100), torch.Generator().manual_seed(0)
    state, static = states_out_of_step(model, tokens[:, :60], generator)
    kinds = recorded_calls(monkeypatch, decoding_graphs_baka.StaticReader, "_token")
    for column in range(60, 65):
        mask = (torch.rand(17, 1, generator=generator) < 0.9).long()
        token = tokens[:, column : column + 1]
        expected = model(token, attention_mask=mask, cache=state).logits
        assert_close(model(token, attention_mask=mask, cache=static).logits, expected, rtol=0, atol=1e-4)
    assert any(skips for *_, skips in kinds)
    kinds.clear()
    state, static = model.new_cache(17), model.new_cache(17, static=True)
    for cache in (state, static):
        model(tokens[:, :78], cache=cache)
    expected = model(tokens[:, 78:79], cache=state).logits
    assert_close(model(tokens[:, 78:79], cache=static).logits, expected, rtol=0, atol=1e-4)
    assert [skips for *_, skips in kinds] == [False]


@torch.no_grad()
def test_what_changes_a_state_between_steps() -> None:
    """Rows are chosen, texts begin anew, weights change, gradients are taken: the next step knows."""
    model = tiny_model(tiny_config())
    tokens = random_tokens(model.config, 2, 100)
    state, static = model.new_cache(2), model.new_cache(2, static=True)
    column = 0

    def read(count: int) -> None:
        nonlocal column
        for _ in range(count):
            token = tokens[:, column : column + 1]
            expected = model(token, cache=state).logits
            assert_close(model(token, cache=static).logits, expected, **EXACT)
            column += 1
        assert_same_state(static, state)

    read(7)
    for cache in (state, static):
        cache.reorder_cache(torch.tensor([1, 1]))
    read(5)
    for cache in (state, static):
        cache.reset_rows(torch.tensor([True, False]))
    read(9)
    twins = state.clone(), static.clone()
    read(3)
    for weights in (model.model.layers[1].self_attn.k_proj.weight, model.model.memory_tokens.weight):
        weights.mul_(1.5)
        read(2)
    model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(torch.randn(12, 20).double())
    read(2)
    with torch.enable_grad():
        for cache in (state, static):
            outputs = model(tokens[:, :3], cache=cache)
            if cache is static:
                held = outputs.logits.square().sum()
            cache.detach_()
    read(9)
    held.backward()  # what its graph holds was not written over
    for cache in (state, static):
        cache.reset()
    read(8)
    for cache in (state, static):
        cache.crop(-3)
    read(6)
    state, static = twins
    read(4)
    for cache in (state, static):
        cache.batch_select_indices(torch.tensor([0, 1]))
    read(2)


@torch.no_grad()
def test_states_side_by_side_and_one_after_another() -> None:
    """Two states alive at once share copies of weights alone; what one leaves is taken by the next, and forgotten."""
    model = tiny_model(tiny_config())
    tokens = random_tokens(model.config, 4, 40)
    expected = model(tokens).logits
    states = [model.new_cache(1, static=True) for _ in range(2)]
    for column in range(40):
        for row, state in enumerate(states):
            logits = model(tokens[row : row + 1, column : column + 1], cache=state).logits
            assert_close(logits[:, 0], expected[row : row + 1, column], **EXACT)
    reader = states[1]._reader
    assert states[0]._reader is not reader and states[0]._reader.weights is reader.weights
    del states[1], state
    new = model.new_cache(1, static=True)
    for column in range(20):
        logits = model(tokens[2:3, column : column + 1], cache=new).logits
        assert_close(logits[:, 0], expected[2:3, column], **EXACT)
    assert new._reader is reader
    wider = model.new_cache(2, static=True)
    assert_close(model(tokens[:2, :1], cache=wider).logits[:, 0], expected[:2, 0], **EXACT)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generate_with_a_static_state(batch_size: int, counts: dict[str, int]) -> None:
    """`cache_implementation="static"` of stock `generate`, some rows stopping early."""
    model = tiny_model(tiny_config(eos_token_id=3, pad_token_id=0))
    prompt = random_tokens(model.config, batch_size, 21)
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    options = dict(attention_mask=mask, min_new_tokens=6, max_new_tokens=40, do_sample=True)
    options |= dict(return_dict_in_generate=True)
    torch.manual_seed(0)
    expected = model.generate(prompt, **options)
    torch.manual_seed(0)
    found = model.generate(prompt, cache_implementation="static", **options)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert_same_state(found.past_key_values, expected.past_key_values)
    assert found.past_key_values.is_static and counts["tokens"] > 5


@pytest.mark.parametrize(
    "case", ["hook", "adapter", "adapted solidifier", "eager", "recording", "hidden states", "embeddings", "grad"]
)
def test_what_is_not_plain_is_read_plainly(case: str, counts: dict[str, int]) -> None:
    model = tiny_model(tiny_config(memory_solidifier="glu"))
    tokens = random_tokens(model.config, 2, 4)
    state, options = model.new_cache(2, static=True), {}
    if case == "hook":
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif case == "adapter":
        model.model.layers[0].self_attn.q_proj = torch.nn.Sequential(model.model.layers[0].self_attn.q_proj)
    elif case == "adapted solidifier":
        model.model.solidifier.proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif case == "eager":
        model.set_attn_implementation("eager")
    elif case == "recording":
        state.activate_past_recording()
    elif case == "hidden states":
        options = dict(output_hidden_states=True)
    with torch.set_grad_enabled(case == "grad"):
        expected = model(tokens).logits
        for column in range(4):
            text: dict[str, Any] = dict(input_ids=tokens[:, column : column + 1])
            if case == "embeddings":
                text = dict(inputs_embeds=model.get_input_embeddings()(text["input_ids"]))
            logits = model(**text, cache=state, **options).logits
            assert_close(logits[:, 0], expected[:, column], **EXACT)
    assert counts == {"tokens": 0, "pieces": 0, "chunks": 0}


@pytest.mark.parametrize("change", ["fused optimizer", "data"])
@pytest.mark.parametrize("same_state", [True, False])
def test_weights_that_change_without_a_trace(change: str, same_state: bool) -> None:
    """A fused optimizer does not count a weight's versions, and nor does `.data`: the next text knows all the same."""
    model = tiny_model(tiny_config(), torch.float32)
    tokens = random_tokens(model.config, 1, 9)

    def read(state: BakaCache) -> Tensor:
        with torch.no_grad():
            logits = [model(part, cache=state).logits for part in tokens.split([6, 1, 1, 1], 1)]
        return torch.cat(logits, 1)

    state, beside = model.new_cache(static=True), model.new_cache(static=True)
    read(state), read(beside)
    if change == "data":
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    if same_state:
        state.reset()
    else:
        state = model.new_cache(static=True)
    beside.reset()
    for each in (state, beside):
        assert_close(read(each), model(tokens).logits, **EXACT)


@pytest.mark.parametrize(
    ("change", "num_by_programs"), [("weight", 13), ("hook", 5), ("hook between", 6), ("hook before a token", 6)]
)
@torch.no_grad()
def test_a_model_that_changes_as_it_generates(change: str, num_by_programs: int, counts: dict[str, int]) -> None:
    """Whoever changes it, and when: the next token knows."""
    scores = []
    for implementation in ("dynamic", "static"):
        model = tiny_model(tiny_config(), torch.float32)
        model.generation_config.eos_token_id = None
        layer, tokens = model.model.layers[0].mlp.up_proj, random_tokens(model.config, 2, 6)
        state = model.new_cache(2, static=implementation == "static")

        def change_model(ids: Tensor, logits: Tensor, layer: torch.nn.Linear = layer) -> Tensor:
            if change == "weight" and ids.shape[1] in (8, 11):
                layer.weight.mul_(2)
            if change == "hook" and ids.shape[1] == 11:
                layer.register_forward_hook(lambda module, inputs, output: 2 * output)
            return logits

        options = dict(max_new_tokens=7, do_sample=False, output_scores=True, return_dict_in_generate=True)
        found = model.generate(tokens, cache=state, logits_processor=[change_model], **options)
        inputs = model.prepare_inputs_for_generation(
            found.sequences, next_sequence_length=1, is_first_iteration=False, cache=state
        )
        if change in ("hook between", "hook before a token"):
            layer.register_forward_hook(lambda module, inputs, output: 2 * output)
        if change == "hook before a token":
            scores.append(model(**inputs).logits)
        else:
            again = model.generate(found.sequences, cache=state, **options)
            scores.append(torch.stack(found.scores + again.scores))
    assert_close(scores[1], scores[0], **EXACT)
    assert counts["tokens"] == num_by_programs  # a hook ends it at once, a weight does not


@torch.no_grad()
def test_one_state_read_by_two_models() -> None:
    """Each reads with its own weights, where the other stopped."""
    models = [tiny_model(tiny_config(), seed=seed) for seed in (0, 1)]
    tokens = random_tokens(models[0].config, 1, 12)
    state, static = models[0].new_cache(), models[0].new_cache(static=True)
    for column in range(12):
        token, model = tokens[:, column : column + 1], models[column // 3 % 2]
        assert_close(model(token, cache=static).logits, model(token, cache=state).logits, **EXACT)
    assert_same_state(static, state)


@torch.no_grad()
def test_a_step_that_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device has counted by then is not believed."""
    model = tiny_model(tiny_config())
    tokens = random_tokens(model.config, 1, 9)
    static = model.new_cache(static=True)
    model(tokens[:, :3], cache=static)
    plain = decoding_graphs_baka.StaticReader._run

    def interrupted(self: Any, key: Any, program: Any) -> None:
        plain(self, key, program)
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(decoding_graphs_baka.StaticReader, "_run", interrupted)
        model(tokens[:, 3:4], cache=static)
    del static
    again = model.new_cache(static=True)
    logits = [model(part, cache=again).logits for part in tokens.split([3, 1, 1, 1, 1, 1, 1], 1)]
    assert_close(torch.cat(logits, 1), model(tokens).logits, **EXACT)


@torch.no_grad()
def test_a_state_of_another_precision() -> None:
    """It is read plainly first, which brings it to the model's."""
    model = tiny_model(tiny_config(), torch.float32)
    tokens = random_tokens(model.config, 1, 20)
    static = model.new_cache(static=True).to(dtype=torch.float64)
    logits = [model(part, cache=static).logits for part in tokens.split([12, 1, 1, 1, 5], 1)]
    assert_close(torch.cat(logits, 1), model(tokens).logits, **EXACT)


@torch.no_grad()
def test_a_row_that_has_read_nothing_has_no_memory(counts: dict[str, int]) -> None:
    """Beside one that reads tokens by programs, and when it begins it reads as ever."""
    model = tiny_model(tiny_config())
    tokens, static = random_tokens(model.config, 2, 9), model.new_cache(2, static=True)
    for column in range(3):
        model(tokens[:, column : column + 1], attention_mask=torch.tensor([[1], [0]]), cache=static)
        assert not static.memory[1].any() and static.memory[0].any()
    found = torch.cat([model(tokens[:, column : column + 1], cache=static).logits for column in range(3, 9)], dim=1)
    assert counts["tokens"] == 9
    assert_close(found[1:], model(tokens[1:, 3:]).logits, **EXACT)
    assert_close(found[:1], model(tokens[:1]).logits[:, 3:], **EXACT)


def test_readers_that_were_given_up_are_gone() -> None:
    model = tiny_model(tiny_config())
    tokens, static = random_tokens(model.config, 1, 3), model.new_cache(static=True)
    readers = weakref.WeakSet()
    for _ in range(4):
        with torch.no_grad():
            model(tokens, cache=static)
        readers.add(static._reader)
        model(tokens, cache=static)  # its graph holds on to the tensors
        static.detach_()
    gc.collect()
    assert len(readers) == 0


def test_a_static_state_is_pickled() -> None:
    model = tiny_model(tiny_config())
    static, tokens = model.new_cache(static=True), random_tokens(model.config, 1, 3)
    with torch.no_grad():
        model(tokens, cache=static)
        twin = pickle.loads(pickle.dumps(static))
        assert_same_state(twin, static)
        assert_close(model(tokens, cache=twin).logits, model(tokens, cache=static).logits, **EXACT)


def test_bad_input_leaves_a_static_state_as_it_was() -> None:
    model: BakaForCausalLM = tiny_model(tiny_config())
    state = model.new_cache(2, static=True)
    tokens = random_tokens(model.config, 2, 5)
    with torch.no_grad():
        model(tokens, cache=state)
        before = state.clone()
        for bad, message in (
            (dict(input_ids=tokens[:1, :1]), "expected a state of batch size 1, got one of 2"),
            (dict(input_ids=tokens[:, :1] + 1000), "expected token ids from 0 to"),
            (dict(input_ids=tokens[:, :1], inputs_embeds=torch.zeros(2, 1, 12)), "expected exactly one of"),
            (dict(input_ids=tokens[:, :1], attention_mask=tokens[:, :3]), "expected an `attention_mask` of shape"),
        ):
            with pytest.raises(ValueError, match=message):
                model(**bad, cache=state)
        assert_same_state(state, before)
