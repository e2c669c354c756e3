"""Stock `generate`: the state changes how fast it is, never what it says; and a state can be gone on from."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    CLOSE,
    CONFIGS,
    contents,
    forget_and_go_on,
    logits_of,
    random_tokens,
    rows_out_of_phase,
    tiny_config,
    tiny_model,
)
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer, set_seed

from baka_hf import BakaCache, BakaForCausalLM

# With chunks of 5, 30 tokens cross at least five boundaries.
GREEDY = dict(max_new_tokens=30, do_sample=False)

NAMES = ["pristine", "xl", "pause_without_xl", "rmt_carry", "rmt_without_xl", "layer_separate", "grouped_queries"]
several_configs = pytest.mark.parametrize("overrides", [CONFIGS[name] for name in NAMES], ids=NAMES)


@pytest.fixture(scope="module")
def model() -> BakaForCausalLM:
    """Drawn so that its greedy texts are varied; see `test_the_model_is_worth_testing`."""
    return tiny_model(tiny_config(memory_solidifier="mlp"), seed=5)


def prompt(*shape: int, seed: int = 0) -> Tensor:
    return random_tokens(tiny_config(), *shape, seed=seed)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int64)


def left_padded(rows: list[Tensor], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of any length as input_ids and attention_mask."""
    longest = max(map(len, rows))
    tokens, mask = torch.full((len(rows), longest), fill), torch.zeros(len(rows), longest, dtype=torch.int64)
    for row, text in enumerate(rows):
        tokens[row, longest - len(text) :] = text
        mask[row, longest - len(text) :] = 1
    return tokens, mask


def state_after(model: BakaForCausalLM, tokens: Tensor, **arguments: Any) -> BakaCache:
    cache = model.new_cache(len(tokens))
    logits_of(model, tokens, cache, **arguments)
    return cache


def assert_has_read(model: BakaForCausalLM, cache: BakaCache, texts: list[Tensor]) -> None:
    """Each row of the state goes on as a fresh reading of its text would."""
    assert cache.num_tokens.tolist() == [len(text) for text in texts]
    more = prompt(len(texts), 7, seed=99)
    found = logits_of(model, more, cache.clone())
    for row, text in enumerate(texts):
        expected = logits_of(model, torch.cat([text, more[row]])[None])[0, len(text) :]
        assert_close(found[row], expected, **CLOSE)


def test_the_model_is_worth_testing(model: BakaForCausalLM) -> None:
    """Its greedy texts are varied, and depend on what was read several chunks before."""
    text = prompt(1, 21)
    changed = text.clone()
    changed[0, 2] += 1
    found, other = model.generate(text, **GREEDY)[0, 21:], model.generate(changed, **GREEDY)[0, 21:]
    assert len(set(found.tolist())) >= 6
    assert not torch.equal(found, other)


def test_greedy_in_training_mode() -> None:
    """What it says in eval mode, where pauses are random too."""
    model = tiny_model(tiny_config(pause_placement="random", num_pause_tokens=3), seed=5)
    expected = model.generate(prompt(2, 9), **GREEDY)
    model.train()
    for use_cache in (True, False):
        assert torch.equal(model.generate(prompt(2, 9), use_cache=use_cache, **GREEDY), expected)


# With and without a state


@pytest.mark.smoke
@several_configs
def test_greedy_is_the_same_with_and_without_a_state(overrides: dict[str, Any]) -> None:
    """Across six boundaries, and both are the argmax of a full reading at every step."""
    model = tiny_model(tiny_config(**overrides), seed=1)
    tokens = prompt(2, 7)
    found = model.generate(tokens, **GREEDY)
    assert torch.equal(found, model.generate(tokens, use_cache=False, **GREEDY))
    assert found.shape == (2, 37)
    assert torch.equal(found[:, 7:], logits_of(model, found)[:, 6:-1].argmax(-1))


@pytest.mark.parametrize("length", range(1, 12))
def test_prompts_of_every_length(model: BakaForCausalLM, length: int) -> None:
    """Wherever in its chunk a prompt ends."""
    tokens = prompt(2, length, seed=length)
    arguments = GREEDY | dict(max_new_tokens=12)
    assert torch.equal(model.generate(tokens, **arguments), model.generate(tokens, use_cache=False, **arguments))


@pytest.mark.smoke
@several_configs
def test_left_padded_rows_are_rows_alone(overrides: dict[str, Any]) -> None:
    """Rows in different phases of their chunks, with the mask given."""
    model = tiny_model(tiny_config(**overrides), seed=1)
    rows = [prompt(length, seed=length) for length in (3, 12, 5)]
    tokens, mask = left_padded(rows)
    found = model.generate(tokens, attention_mask=mask, **GREEDY)
    assert torch.equal(found, model.generate(tokens, attention_mask=mask, use_cache=False, **GREEDY))
    for row, text in enumerate(rows):
        assert torch.equal(found[row, 12:], model.generate(text[None], **GREEDY)[0, len(text) :])


@pytest.mark.parametrize("options", [{}, dict(use_cache=False), dict(num_beams=2)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_packed_prompts(model: BakaForCausalLM, options: dict[str, Any], padded: bool) -> None:
    """The last text of each row goes on as if alone, whether a tensor or an array of numpy says where it begins, of
    each row or of all."""
    tokens, positions = prompt(2, 9), torch.arange(9).expand(2, -1) % 5
    mask = ones(2, 9)
    if padded:  # on the right: it is put on the left, and positions with it
        mask[:, 7:] = 0
    arguments = GREEDY | options
    alone = model.generate(tokens[:, 5 : 7 if padded else 9], **arguments)[:, -30:]
    for given in (positions, positions[:1], positions.numpy(), positions.numpy().astype(np.uint16)):
        found = model.generate(tokens, attention_mask=mask, position_ids=given, **arguments)
        assert torch.equal(found[:, -30:], alone)


def test_the_mask_is_inferred_from_the_pad_token(model: BakaForCausalLM) -> None:
    """As transformers does, when the pad token is known and stands in the prompt."""
    rows = [prompt(length, seed=length).clamp(min=1) for length in (3, 12)]
    tokens, mask = left_padded(rows)
    found = model.generate(tokens, pad_token_id=0, **GREEDY)
    assert torch.equal(found, model.generate(tokens, attention_mask=mask, pad_token_id=0, **GREEDY))


@pytest.mark.parametrize("num_new", [0, 4])
def test_a_pad_token_said_last_is_text(model: BakaForCausalLM, num_new: int) -> None:
    """Without a mask: with the whole history or alone it is read, as by a mask of ones."""
    state = model.new_cache()
    text = model.generate(prompt(1, 9), cache=state, **GREEDY)
    pad = int(text[0, -1])
    new = prompt(1, num_new, seed=3)
    whole = torch.cat([text, new.where(new != pad, (pad + 1) % 19)], dim=1)
    expected = model.generate(whole, attention_mask=torch.ones_like(whole), cache=state.clone(), **GREEDY)
    found = [model.generate(whole, cache=state.clone(), pad_token_id=pad, **GREEDY)]
    if num_new == 0:
        found.append(model.generate(text[:, -1:], cache=state.clone(), pad_token_id=pad, **GREEDY))
    for each in found:
        assert torch.equal(each[:, -30:], expected[:, -30:])


def test_a_pad_token_after_the_end_is_none(model: BakaForCausalLM) -> None:
    """It fills up the row of a text that had ended before the longest, and there is nothing to go on from."""
    state, rows = model.new_cache(2), torch.cat([prompt(1, 9), prompt(1, 9, seed=4)])
    ending, other = (set(row.tolist()) for row in model.generate(rows, **GREEDY)[:, 9:-1])
    arguments = GREEDY | dict(eos_token_id=min(ending - other), pad_token_id=min(set(range(19)) - ending - other))
    text = model.generate(rows, cache=state, **arguments)
    assert (text[:, -1] == arguments["pad_token_id"]).tolist() == [True, False]
    for again in (text, text[:, -1:]):
        with pytest.raises(ValueError, match=r"in the rows \[0\]|expected the whole history or new tokens"):
            model.generate(again, cache=state.clone(), **arguments)


def test_without_a_prompt(model: BakaForCausalLM) -> None:
    """A text can begin with nothing but the begin-of-text token."""
    assert torch.equal(model.generate(bos_token_id=3, **GREEDY), model.generate(torch.tensor([[3]]), **GREEDY))


@pytest.mark.parametrize(
    "arguments",
    [
        dict(do_sample=True),
        dict(do_sample=True, temperature=0.7, top_k=5),
        dict(do_sample=True, top_p=0.8, num_return_sequences=3),
        dict(do_sample=False, repetition_penalty=1.3),
        dict(do_sample=False, no_repeat_ngram_size=2),
        dict(do_sample=True, repetition_penalty=1.2, num_beams=2),
        dict(do_sample=False, num_beams=3),
        dict(do_sample=False, num_beams=3, num_return_sequences=2, length_penalty=0.5),
        dict(do_sample=False, guidance_scale=1.5),
        dict(do_sample=False, min_new_tokens=12, eos_token_id=12, pad_token_id=0),
    ],
    ids=str,
)
def test_every_strategy_says_the_same_without_a_state(model: BakaForCausalLM, arguments: dict[str, Any]) -> None:
    """Sampling with a seed, penalties, beams: for a batch of rows out of phase."""
    tokens, mask = left_padded([prompt(length, seed=length) for length in (4, 9)])
    found = []
    for use_cache in (True, False):
        set_seed(5)
        found.append(model.generate(tokens, attention_mask=mask, max_new_tokens=27, use_cache=use_cache, **arguments))
    assert torch.equal(*found)


def test_beams_are_the_same_with_their_scores(model: BakaForCausalLM) -> None:
    """Beams change places at every step and at every phase of a chunk; their scores tell if a state went astray."""
    arguments = dict(num_beams=4, num_return_sequences=4, do_sample=False, max_new_tokens=27)
    arguments |= dict(output_scores=True, return_dict_in_generate=True)
    found, expected = (model.generate(prompt(2, 7), use_cache=use, **arguments) for use in (True, False))
    assert torch.equal(found.sequences, expected.sequences)
    assert_close(found.sequences_scores, expected.sequences_scores, rtol=1e-5, atol=1e-5)


def test_sampling_with_a_seed(model: BakaForCausalLM) -> None:
    """The same seed gives the same text, another one another."""

    def sample(seed: int) -> Tensor:
        set_seed(seed)
        return model.generate(prompt(1, 7), max_new_tokens=30, do_sample=True)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


def test_max_length_counts_the_prompt(model: BakaForCausalLM) -> None:
    """`max_length` is that of the whole text; `max_new_tokens` that of the continuation."""
    tokens = prompt(1, 7)
    found = model.generate(tokens, max_length=20, do_sample=False)
    assert torch.equal(found, model.generate(tokens, max_new_tokens=13, do_sample=False))


@pytest.mark.parametrize("size", [1, 2, 5, 7, 100])
def test_prefill_chunk_size(model: BakaForCausalLM, size: int) -> None:
    """A prompt is read chunk by chunk anyway: in which pieces it is asked for changes nothing."""
    tokens, mask = left_padded([prompt(length, seed=length) for length in (4, 17)])
    expected = model.generate(tokens, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(tokens, attention_mask=mask, prefill_chunk_size=size, **GREEDY), expected)


def test_prompts_of_embeddings(model: BakaForCausalLM) -> None:
    """Embeddings of a prompt, padded or not, are answered as its tokens are; only new tokens come back."""
    tokens, mask = left_padded([prompt(length, seed=length) for length in (4, 9)])
    embeds = model.get_input_embeddings()(tokens).detach()
    expected = model.generate(tokens, attention_mask=mask, **GREEDY)[:, 9:]
    assert torch.equal(model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY), expected)
    assert torch.equal(model.generate(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **GREEDY), expected)


# Padding on the right


def right_padded(rows: list[Tensor], fill: int = 0) -> tuple[Tensor, Tensor]:
    tokens, mask = left_padded([row.flip(0) for row in rows], fill)
    return tokens.flip(1), mask.flip(1)


def with_padding(side: Callable, lengths: tuple[int, ...] = (3, 12, 5), **overrides: Any) -> dict[str, Any]:
    tokens, mask = side([prompt(length, seed=length) for length in lengths])
    return dict(input_ids=tokens, attention_mask=mask, **overrides)


WAYS = {
    "greedy": dict(do_sample=False),
    "without a state": dict(do_sample=False, use_cache=False),
    "static": dict(do_sample=False, cache_implementation="static"),
    "sampling": dict(do_sample=True, num_return_sequences=2),
    "beams": dict(do_sample=False, num_beams=3, num_return_sequences=2),
    "beams without a state": dict(do_sample=False, num_beams=2, use_cache=False),
    "ngrams": dict(do_sample=False, no_repeat_ngram_size=2),
    "guidance": dict(do_sample=False, guidance_scale=1.5),
}


@pytest.mark.smoke
@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_padding_on_either_side(model: BakaForCausalLM, how: dict[str, Any]) -> None:
    """The same answers, and the prompt comes back as it was given."""
    answers = []
    for side in (left_padded, right_padded):
        given = with_padding(side)
        set_seed(0)
        found = model.generate(**given, **how, max_new_tokens=12)
        prompts = given["input_ids"].repeat_interleave(len(found) // 3, 0)
        assert torch.equal(found[:, :12], prompts)
        answers.append(found[:, 12:])
    assert torch.equal(*answers)


def test_right_padded_rows_are_rows_alone(model: BakaForCausalLM) -> None:
    state, given = model.new_cache(3), with_padding(right_padded)
    found = model.generate(**given, cache=state, **GREEDY)
    texts = [model.generate(prompt(n, seed=n)[None], **GREEDY)[0] for n in (3, 12, 5)]
    assert torch.equal(found[:, 12:], torch.stack([text[-30:] for text in texts]))
    assert_has_read(model, state, [text[:-1] for text in texts])


def test_the_mask_of_right_padding_is_inferred(model: BakaForCausalLM) -> None:
    rows = [prompt(length, seed=length).clamp(min=1) for length in (3, 12)]
    found, expected = (model.generate(side(rows)[0], pad_token_id=0, **GREEDY) for side in (right_padded, left_padded))
    assert torch.equal(found[:, 12:], expected[:, 12:])


def test_embeddings_padded_on_the_right(model: BakaForCausalLM) -> None:
    answers = []
    for side in (left_padded, right_padded):
        given = with_padding(side)
        embeds = model.get_input_embeddings()(given.pop("input_ids")).detach()
        answers.append(model.generate(inputs_embeds=embeds, **given, **GREEDY))
    assert torch.equal(*answers)


@pytest.mark.parametrize("given", ["whole", "new"])
def test_a_second_turn_padded_on_the_right(model: BakaForCausalLM, given: str) -> None:
    """Both turns are; the history comes back as it is, or only what is new."""
    old, new = [prompt(n, seed=n) for n in (3, 8, 5)], [prompt(n, seed=n + 50) for n in (6, 2, 7)]
    (history, history_mask), (tokens, mask) = right_padded(old), right_padded(new)
    state = state_after(model, history, attention_mask=history_mask)
    ids = torch.cat([history, tokens], dim=1) if given == "whole" else tokens
    found = model.generate(ids, attention_mask=torch.cat([history_mask, mask], dim=1), cache=state, **GREEDY)
    assert torch.equal(found[:, :-30], ids)
    texts = [model.generate(torch.cat(pair)[None], **GREEDY)[0] for pair in zip(old, new, strict=True)]
    assert torch.equal(found[:, -30:], torch.stack([text[-30:] for text in texts]))
    assert_has_read(model, state, [text[:-1] for text in texts])


def test_states_and_weights_of_right_padded_prompts() -> None:
    """They stand where the prompt's tokens do, with a state and without."""
    model = tiny_model(tiny_config(attn_implementation="eager"), seed=1)
    given = with_padding(right_padded)
    with torch.no_grad():
        expected = model(**given, output_hidden_states=True, output_attentions=True)
    asked = dict(return_dict_in_generate=True, output_hidden_states=True, output_attentions=True)
    for use_cache in (True, False):
        found = model.generate(**given, **asked, use_cache=use_cache, max_new_tokens=3, do_sample=False)
        for step in range(1 if use_cache else 3):
            assert_close([t[:, :12] for t in found.hidden_states[step]], list(expected.hidden_states), **CLOSE)
            assert_close([t[:, :, :12] for t in found.attentions[step]], list(expected.attentions), **CLOSE)


def test_a_negative_prompt_padded_on_the_right(model: BakaForCausalLM) -> None:
    answers = []
    for side in (left_padded, right_padded):
        negative = with_padding(side, (4, 9, 6))
        names = dict(negative_prompt_ids="input_ids", negative_prompt_attention_mask="attention_mask")
        arguments = {name: negative[key] for name, key in names.items()}
        arguments |= dict(guidance_scale=2.0, output_scores=True, return_dict_in_generate=True)
        answers.append(model.generate(**with_padding(left_padded), **arguments, max_new_tokens=2, do_sample=False))
    assert_close(*(torch.stack(answer.scores) for answer in answers))


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_of_nothing_but_padding_is_refused(model: BakaForCausalLM, use_cache: bool) -> None:
    tokens, mask = prompt(3, 4), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    with pytest.raises(ValueError, match=r"a token in every row .* none in the rows \[1\]"):
        model.generate(tokens, attention_mask=mask, use_cache=use_cache, **GREEDY)
    state = state_after(model, prompt(3, 7))
    before = contents(state)
    with pytest.raises(ValueError, match=r"none in the rows \[1\]"):
        model.generate(tokens, attention_mask=torch.cat([ones(3, 7), mask], dim=1), cache=state, **GREEDY)
    assert contents(state) == before


def test_a_decoding_loop_of_ones_own_pads_on_the_left(model: BakaForCausalLM) -> None:
    """transformers lets a function take the place of its loops: it is told, not given the logits of padding."""

    def loop(model: Any, input_ids: Tensor, **arguments: Any) -> Tensor:
        kept = {name: arguments[name] for name in ("attention_mask", "cache", "past_key_values") if name in arguments}
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kept)
        return model(**inputs).logits[:, -1].argmax(-1)

    arguments = dict(custom_generate=loop, max_new_tokens=1)
    found = model.generate(**with_padding(left_padded), **arguments)
    assert torch.equal(found, model.generate(**with_padding(left_padded), max_new_tokens=1, do_sample=False)[:, -1])
    with pytest.raises(ValueError, match="padding on the left"):
        model.generate(**with_padding(right_padded), **arguments)


# What generate gives besides tokens


def test_scores_are_the_logits(model: BakaForCausalLM) -> None:
    """`output_logits` and `output_scores` of every step are those of a full reading."""
    arguments = GREEDY | dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
    found = model.generate(prompt(2, 7), **arguments)
    expected = logits_of(model, found.sequences)[:, 6:-1]
    assert_close(torch.stack(found.logits, dim=1).double(), expected, rtol=1e-5, atol=1e-5)
    assert_close(torch.stack(found.scores, dim=1).double(), expected, rtol=1e-5, atol=1e-5)


def test_hidden_states_and_attentions_of_every_step() -> None:
    """First those of the prompt, then one position at a time: the states and weights of a full reading."""
    model = tiny_model(tiny_config(attn_implementation="eager"), seed=1)
    config, slots = model.config, 2 * model.config.stream_length
    arguments = GREEDY | dict(return_dict_in_generate=True, output_hidden_states=True, output_attentions=True)
    found = model.generate(prompt(2, 7), **arguments)
    with torch.no_grad():
        expected = model(found.sequences[:, :-1], output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == len(found.attentions) == 30
    assert [states[0].shape[1] for states in found.hidden_states] == [7] + [1] * 29
    for layer in range(config.num_hidden_layers + 1):
        states = torch.cat([step[layer] for step in found.hidden_states], dim=1)
        assert_close(states, expected.hidden_states[layer], **CLOSE)
    for layer in range(config.num_hidden_layers):
        weights = torch.cat([step[layer] for step in found.attentions], dim=2)
        assert weights.shape == (2, config.num_attention_heads, 36, slots)
        assert_close(weights, expected.attentions[layer], **CLOSE)


def test_text_streamer(
    model: BakaForCausalLM, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture
) -> None:
    """Every token is printed once, in order, across boundaries."""
    inputs = tokenizer("w3 w1 w4 w1 w5 w9 w2", return_tensors="pt", return_token_type_ids=False)
    found = model.generate(**inputs, streamer=TextStreamer(tokenizer), **GREEDY)
    assert capsys.readouterr().out.split() == tokenizer.decode(found[0]).split()
    assert torch.equal(found, model.generate(**inputs, **GREEDY))


def test_text_iterator_streamer(model: BakaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Text arrives piece by piece from a thread that generates with a state of the user's."""
    inputs = tokenizer("w3 w1 w4 w1 w5 w9 w2", return_tensors="pt", return_token_type_ids=False)
    streamer, state = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60), model.new_cache()
    arguments = dict(**inputs, streamer=streamer, cache=state, **GREEDY)
    thread = threading.Thread(target=model.generate, kwargs=arguments)
    thread.start()
    pieces = list(streamer)
    thread.join()
    expected = model.generate(**inputs, **GREEDY)[0]
    assert len(pieces) > 10
    assert "".join(pieces).split() == tokenizer.decode(expected[7:]).split()
    assert_has_read(model, state, [expected[:-1]])


# From a state


def test_a_fresh_state_holds_everything_but_the_last_token(model: BakaForCausalLM) -> None:
    """A given state is filled in place and is the one that comes back."""
    state = model.new_cache(2)
    arguments = GREEDY | dict(return_dict_in_generate=True)
    found = model.generate(prompt(2, 7), cache=state, **arguments)
    assert found.past_key_values is state
    assert state.get_seq_length() == 36
    assert torch.equal(found.sequences, model.generate(prompt(2, 7), **GREEDY))
    assert_has_read(model, state, list(found.sequences[:, :-1]))


def whole(history: Tensor, new: Tensor) -> dict[str, Tensor]:
    return dict(input_ids=torch.cat([history, new], dim=1))


def whole_with_a_mask(history: Tensor, new: Tensor) -> dict[str, Tensor]:
    text = torch.cat([history, new], dim=1)
    return dict(input_ids=text, attention_mask=torch.ones_like(text))


def new_tokens(history: Tensor, new: Tensor) -> dict[str, Tensor]:
    return dict(input_ids=new)


def new_tokens_with_their_mask(history: Tensor, new: Tensor) -> dict[str, Tensor]:
    return dict(input_ids=new, attention_mask=torch.ones_like(new))


def new_tokens_with_a_whole_mask(history: Tensor, new: Tensor) -> dict[str, Tensor]:
    return dict(input_ids=new, attention_mask=ones(len(new), history.shape[1] + new.shape[1]))


@pytest.mark.smoke
@pytest.mark.parametrize(
    "given", [whole, whole_with_a_mask, new_tokens, new_tokens_with_their_mask, new_tokens_with_a_whole_mask]
)
@pytest.mark.parametrize(("fed", "length"), [(9, 4), (9, 9), (5, 5), (3, 12), (10, 1), (1, 1)], ids=str)
def test_continuing(model: BakaForCausalLM, given: Callable, fed: int, length: int) -> None:
    """From a state of P positions, L more: right, or a ValueError where it cannot be told what the tokens are."""
    text = prompt(2, fed + length, seed=2)
    history, new = text[:, :fed], text[:, fed:]
    state = state_after(model, history)
    arguments = given(history, new)
    if length > fed and given in (new_tokens, new_tokens_with_their_mask):
        before = contents(state)
        with pytest.raises(ValueError, match=rf"pass an `attention_mask` of shape \[2, {fed + length}\]"):
            model.generate(**arguments, cache=state, **GREEDY)
        assert contents(state) == before
        return
    found = model.generate(**arguments, cache=state, **GREEDY)
    expected = model.generate(text, **GREEDY)
    assert torch.equal(found[:, :-30], arguments["input_ids"])
    assert torch.equal(found[:, -30:], expected[:, -30:])
    assert_has_read(model, state, list(expected[:, :-1]))


# The same text again


ONCE = dict(max_new_tokens=6, do_sample=False)
AGAIN = "cannot be told whether they are to be read again"


def assert_refused(model: BakaForCausalLM, state: BakaCache, *inputs: Tensor, **arguments: Any) -> None:
    before = contents(state)
    for tokens in inputs:
        for more in ({}, dict(attention_mask=torch.ones_like(tokens))):
            with pytest.raises(ValueError, match=AGAIN):
                model.generate(tokens, cache=state, **more | arguments, **ONCE)
    assert contents(state) == before


@pytest.mark.smoke
@pytest.mark.parametrize("length", [1, 2, 7, 40])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_same_prompt_again(model: BakaForCausalLM, batch_size: int, length: int) -> None:
    """A cell that is run twice is told so; a mask over all says that the text is to be read again."""
    state, text = model.new_cache(batch_size), prompt(batch_size, length)
    said = model.generate(text, cache=state, **ONCE)
    assert_refused(model, state, text)
    mask = ones(batch_size, state.get_seq_length() + length)
    found = model.generate(text, attention_mask=mask, cache=state, **ONCE)
    both = torch.cat([said[:, :-1], text], dim=1)
    assert torch.equal(found[:, -6:], model.generate(both, **ONCE)[:, -6:])


@pytest.mark.parametrize("given", [new_tokens, whole])
def test_the_same_turn_again(model: BakaForCausalLM, given: Callable, tmp_path: Any) -> None:
    """So is one in the middle of a conversation, by the state itself, its copies and its rows; by its file, if it is
    the whole text."""
    history, new = prompt(2, 11), prompt(2, 4, seed=1)
    state = state_after(model, history)
    model.generate(**given(history, new), cache=state, **ONCE)
    assert_refused(model, state, given(history, new)["input_ids"])
    assert_refused(model, state.clone(), given(history, new)["input_ids"])
    state.save_pretrained(tmp_path)
    state.reorder_cache(torch.tensor([1, 0]))
    assert_refused(model, state, given(history, new)["input_ids"].flip(0))
    if given is whole:
        assert_refused(model, BakaCache.from_pretrained(tmp_path), torch.cat([history, new], dim=1))


@pytest.mark.parametrize(
    "how", [dict(num_return_sequences=3, do_sample=True), dict(prompt_lookup_num_tokens=3)], ids=str
)
def test_the_same_turn_again_however_it_was_answered(model: BakaForCausalLM, how: dict[str, Any]) -> None:
    rows = how.get("num_return_sequences", 1)
    state, history, new = model.new_cache(), prompt(1, 11), prompt(1, 4, seed=1)
    logits_of(model, history, state)
    state.batch_repeat_interleave(rows)
    model.generate(new, cache=state, max_new_tokens=6, **how)
    before = contents(state)
    with pytest.raises(ValueError, match=AGAIN):
        model.generate(new, cache=state, max_new_tokens=6, **how)
    assert contents(state) == before


def test_a_turn_that_was_broken_off_has_not_been_read(model: BakaForCausalLM) -> None:
    """So it can be asked again, and is answered as if nothing had happened."""

    class Stop(Exception):
        pass

    def stop(*_: Any) -> Any:
        raise Stop

    state, new = state_after(model, prompt(1, 9)), prompt(1, 4, seed=1)
    before = state.clone()
    with pytest.raises(Stop):
        model.generate(new, cache=state, stopping_criteria=[stop], **ONCE)
    assert state.get_seq_length() == 9
    assert torch.equal(model.generate(new, cache=before, **ONCE), model.generate(new, cache=state, **ONCE))
    assert_refused(model, state, new)


# Ids that a re-encoded history lacks, or has besides.
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "the first token lost": lambda text: text[:, 1:],
    "some lost": lambda text: text[:, [column for column in range(text.shape[1]) if column not in (0, 5, 11, 19)]],
    "one more": lambda text: torch.cat([torch.tensor([[3]]), text], dim=1),
    "an earlier end": lambda text: text[:, :14],
    "another end": lambda text: torch.cat([text[:, :14], prompt(1, 3, seed=5)], dim=1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("fed_by", ["generate", "calls", "tokens"])
def test_a_history_that_has_changed(model: BakaForCausalLM, change: Callable, fed_by: str) -> None:
    """It begins like what was read, and is neither that nor plainly new."""
    state, text = model.new_cache(), prompt(1, 21)
    if fed_by == "generate":
        text = model.generate(text, cache=state, **ONCE)
    else:
        text = torch.cat([text, prompt(1, 6, seed=3)], dim=1)
        for piece in text[:, :-1].split(1 if fed_by == "tokens" else 7, dim=1):
            logits_of(model, piece, state)
    assert_refused(model, state, change(text)[:, :26])


def test_a_padded_prompt_again(model: BakaForCausalLM) -> None:
    """Padding on whatever side, the text counts."""
    for side in (left_padded, right_padded):
        state = model.new_cache(3)
        model.generate(**with_padding(side), cache=state, **ONCE)
        assert_refused(model, state, **with_padding(left_padded))


def test_new_texts_that_look_old(model: BakaForCausalLM) -> None:
    """They need no mask where the state knows better: the token that was said, rows begun anew, turns taken back."""
    state, text = model.new_cache(), prompt(1, 21)
    found = model.generate(text, cache=state, **ONCE)
    for _ in range(30):  # the token that was said, whatever it is
        found = torch.cat([found, model.generate(found[:, -1:], cache=state, max_new_tokens=1)[:, -1:]], dim=1)
    assert torch.equal(found, model.generate(text, max_new_tokens=36, do_sample=False))

    state.reset_rows(torch.tensor([True]))
    again = model.generate(text, cache=state, **ONCE)
    assert torch.equal(again, found[:, : again.shape[1]])

    state = model.new_cache()
    logits_of(model, prompt(1, 30, seed=1), state)
    state.activate_past_recording()
    for _ in range(2):
        fed = state.get_seq_length()
        found = model.generate(text, cache=state, **ONCE)
        expected = model.generate(torch.cat([prompt(1, 30, seed=1), text], dim=1), **ONCE)
        assert torch.equal(found[:, -6:], expected[:, -6:])
        state.crop(fed - state.get_seq_length())


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
@pytest.mark.parametrize("use_assistant", [True, False])
def test_speculation_gives_no_states_or_weights(name: str, use_assistant: bool) -> None:
    """transformers cuts them out at the wrong places."""
    model = tiny_model(tiny_config(attn_implementation="eager"), seed=1)
    how = assistants(model)["right assistant" if use_assistant else "lookup"]
    state = model.new_cache()
    before = contents(state)
    with pytest.raises(ValueError, match=f"expected no `{name}=True` in speculation"):
        model.generate(prompt(1, 9), cache=state, **how, return_dict_in_generate=True, **{name: True}, **GREEDY)
    assert {**contents(state), "_is_recording": False, "_prompt": None} == before


@pytest.mark.parametrize("given", [whole, whole_with_a_mask])
def test_nothing_new(model: BakaForCausalLM, given: Callable) -> None:
    """Nothing can be said after a history that was read to its end: its last logits are gone."""
    history = prompt(2, 9, seed=2)
    state = state_after(model, history)
    before = contents(state)
    with pytest.raises(ValueError, match="has read all of these 9 tokens"):
        model.generate(**given(history, history[:, :0]), cache=state, **GREEDY)
    assert contents(state) == before


def test_continuing_a_left_padded_batch(model: BakaForCausalLM) -> None:
    """With the mask of the whole history, with or without the history's tokens; the new tokens padded as well."""
    old, new = [prompt(n, seed=n) for n in (3, 8, 5)], [prompt(n, seed=n + 50) for n in (6, 2, 7)]
    (history, history_mask), (tokens, mask) = left_padded(old), left_padded(new)
    whole_mask = torch.cat([history_mask, mask], dim=1)
    expected = [model.generate(torch.cat(pair)[None], **GREEDY)[0, -30:] for pair in zip(old, new, strict=True)]
    for given in (torch.cat([history, tokens], dim=1), tokens):
        state = state_after(model, history, attention_mask=history_mask)
        found = model.generate(given, attention_mask=whole_mask, cache=state, **GREEDY)[:, -30:]
        assert torch.equal(found, torch.stack(expected))
        texts = [torch.cat([*parts[:2], parts[2][:-1]]) for parts in zip(old, new, expected, strict=True)]
        assert_has_read(model, state, texts)


def test_the_history_of_a_padded_batch_is_recognised(model: BakaForCausalLM) -> None:
    """A whole history of ids that differ from what was read, only under the mask or not, is told apart."""
    rows = [prompt(n, seed=n) for n in (3, 8)]
    history, mask = left_padded(rows, fill=0)
    other, _ = left_padded(rows, fill=7)
    new = prompt(2, 4, seed=3)
    expected = model.generate(
        torch.cat([history, new], dim=1), attention_mask=torch.cat([mask, ones(2, 4)], dim=1), **GREEDY
    )[:, -30:]
    for text in (history, other):  # what stands under the mask was not read
        state = state_after(model, history, attention_mask=mask)
        found = model.generate(
            torch.cat([text, new], dim=1),
            attention_mask=torch.cat([mask, ones(2, 4)], dim=1),
            cache=state,
            **GREEDY,
        )
        assert torch.equal(found[:, -30:], expected)
    wrong = torch.cat([history, new], dim=1)
    wrong[1, 2] = (wrong[1, 2] + 1) % 19
    state = state_after(model, history, attention_mask=mask)
    with pytest.raises(ValueError, match="the first 8 are not what the state has read"):
        model.generate(wrong, attention_mask=torch.cat([mask, ones(2, 4)], dim=1), cache=state, **GREEDY)


@pytest.mark.parametrize("given", [whole, new_tokens_with_a_whole_mask])
@pytest.mark.parametrize("chunk_size", [1, 3, 5])
def test_a_conversation_of_many_turns(given: Callable, chunk_size: int) -> None:
    """Each answer is that to the whole conversation read afresh, with one state all along."""
    config = tiny_config(chunk_size=chunk_size, num_pause_tokens=min(2, chunk_size))
    model = tiny_model(config, seed=1)
    state, text = model.new_cache(), torch.zeros(1, 0, dtype=torch.int64)
    for turn, (length, answer) in enumerate([(4, 9), (1, 1), (30, 2), (2, 12), (7, 5), (1, 8)]):
        fed = state.get_seq_length()  # the last answer's last token is not among it
        text = torch.cat([text, prompt(1, length, seed=turn)], dim=1)
        arguments = given(text[:, :fed], text[:, fed:])
        found = model.generate(**arguments, cache=state, max_new_tokens=answer, do_sample=False)
        text = torch.cat([text, found[:, -answer:]], dim=1)
        assert torch.equal(text, model.generate(text[:, :-answer], max_new_tokens=answer, do_sample=False))
    assert_has_read(model, state, [text[0, :-1]])


def test_max_length_across_calls(model: BakaForCausalLM) -> None:
    """`max_length` counts the ids that are passed: the whole text if it is, the new tokens if only they are."""
    text = prompt(1, 13)
    expected = model.generate(text, max_new_tokens=20, do_sample=False)
    found = model.generate(text, cache=state_after(model, text[:, :9]), max_length=20, do_sample=False)
    assert torch.equal(found, expected[:, :20])
    found = model.generate(text[:, 9:], cache=state_after(model, text[:, :9]), max_length=20, do_sample=False)
    assert torch.equal(found, expected[:, 9:29])


def test_penalties_across_calls(model: BakaForCausalLM) -> None:
    """With the whole history they see all of it, as without a state."""
    text, arguments = prompt(2, 13), GREEDY | dict(repetition_penalty=1.4, no_repeat_ngram_size=3)
    found = model.generate(text, cache=state_after(model, text[:, :9]), **arguments)
    assert torch.equal(found, model.generate(text, **arguments))


def test_embeddings_after_a_state(model: BakaForCausalLM) -> None:
    """The whole history as embeddings, or new ones with a mask over all that was fed."""
    text = prompt(2, 13)
    embeds = model.get_input_embeddings()(text).detach()
    expected = model.generate(text, **GREEDY)[:, 13:]
    for given, length in ((embeds, 13), (embeds[:, 4:], 9)):
        arguments = dict(inputs_embeds=given, attention_mask=ones(2, 13))
        state = state_after(model, text[:, : 13 - 9])
        assert torch.equal(model.generate(**arguments, cache=state, **GREEDY), expected), length
    state = state_after(model, text[:, :4])
    assert torch.equal(model.generate(inputs_embeds=embeds, cache=state, **GREEDY), expected)


def test_after_embeddings_ids_are_new_unless_said_otherwise(model: BakaForCausalLM) -> None:
    """What was fed as embeddings has no ids to be recognised by: a longer text needs a mask over all."""
    text = prompt(1, 13)
    embeds = model.get_input_embeddings()(text).detach()

    def state() -> BakaCache:
        cache = model.new_cache()
        with torch.no_grad():
            model(inputs_embeds=embeds[:, :4], cache=cache)
        return cache

    with pytest.raises(ValueError, match=r"pass an `attention_mask` of shape \[1, 17\]"):
        model.generate(text, cache=state(), **GREEDY)
    found = model.generate(text[:, 4:], attention_mask=ones(1, 13), cache=state(), **GREEDY)
    assert torch.equal(found[:, -30:], model.generate(text, **GREEDY)[:, -30:])


def test_whole_history_after_going_back(model: BakaForCausalLM) -> None:
    """A state that was cropped knows what it has still read."""
    text, other = prompt(1, 13), prompt(1, 9, seed=1)
    state = model.new_cache()
    state.activate_past_recording()
    logits_of(model, text, state)
    state.crop(-6)
    changed = torch.cat([text[:, :7], other], dim=1)
    found = model.generate(changed, cache=state, **GREEDY)
    assert torch.equal(found, model.generate(changed, **GREEDY))


def test_use_cache_false_with_a_state_is_refused(model: BakaForCausalLM) -> None:
    """Every step would feed the whole text into it again."""
    state = state_after(model, prompt(1, 9))
    before = contents(state)
    for given in (state, model.new_cache()):
        with pytest.raises(ValueError, match="use_cache"):
            model.generate(prompt(1, 13), cache=given, use_cache=False, **GREEDY)
    assert contents(state) == before


# Rows that end early


def rows_that_end(model: BakaForCausalLM) -> tuple[Tensor, Tensor, int, list[Tensor]]:
    """Padded prompts, their mask, a token that ends their answers at different steps, and each text up to there."""
    rows = [prompt(length, seed=length) for length in (3, 12, 5, 9)]
    tokens, mask = left_padded(rows)
    answers = [model.generate(row[None], **GREEDY)[0, len(row) :] for row in rows]
    for stop in range(19):
        ends = [answer.tolist().index(stop) for answer in answers if stop in answer]
        if len(ends) == 4 and len(set(ends)) >= 3 and max(ends) - min(ends) > 6:
            texts = [torch.cat([row, a[:end]]) for row, a, end in zip(rows, answers, ends, strict=True)]
            return tokens, mask, stop, texts
    raise AssertionError("no token ends all rows at different steps: choose another seed")


@pytest.mark.smoke
@pytest.mark.parametrize("pad_is_eos", [True, False])
@pytest.mark.parametrize("eos_is_a_list", [True, False])
def test_rows_that_end_early_keep_a_clean_state(model: BakaForCausalLM, pad_is_eos: bool, eos_is_a_list: bool) -> None:
    """No padding enters a row that has met EOS: its state is that of its text before EOS, and it goes on from there."""
    tokens, mask, stop, texts = rows_that_end(model)
    state = model.new_cache(4)
    pad = stop if pad_is_eos else next(t for t in range(19) if t != stop)
    absent = next(t for t in range(19) if t != stop and not any(t in text for text in texts))
    found = model.generate(
        tokens,
        attention_mask=mask,
        cache=state,
        eos_token_id=[absent, stop] if eos_is_a_list else stop,
        pad_token_id=pad,
        **GREEDY,
    )
    for row, text in enumerate(texts):
        prompt_length = int(mask[row].sum())
        answer = torch.cat([text[prompt_length:], torch.tensor([stop])])
        assert torch.equal(found[row, 12 : 12 + len(answer)], answer)
        assert (found[row, 12 + len(answer) :] == pad).all()
    assert_has_read(model, state, texts)

    # The next turn: each row's EOS, then what is said to it.
    said = [torch.cat([torch.tensor([stop]), prompt(length, seed=length + 30)]) for length in (2, 6, 1, 9)]
    new, new_mask = left_padded(said, fill=pad)
    whole_mask = torch.cat([ones(4, state.get_seq_length()), new_mask], dim=1)
    arguments = dict(max_new_tokens=12, do_sample=False)
    found = model.generate(new, attention_mask=whole_mask, cache=state, pad_token_id=pad, **arguments)
    for row, (text, more) in enumerate(zip(texts, said, strict=True)):
        assert torch.equal(found[row, -12:], model.generate(torch.cat([text, more])[None], **arguments)[0, -12:])


def test_a_history_with_early_ends_is_not_taken_for_what_was_read(model: BakaForCausalLM) -> None:
    """The whole output holds EOS tokens that rows have not read: refused, where EOS would be lost in silence."""
    tokens, mask, stop, _ = rows_that_end(model)
    state = model.new_cache(4)
    found = model.generate(tokens, attention_mask=mask, cache=state, eos_token_id=stop, pad_token_id=stop, **GREEDY)
    text = torch.cat([found, prompt(4, 3)], dim=1)
    before = contents(state)
    with pytest.raises(ValueError, match="not what the state has read"):
        model.generate(text, attention_mask=(text != -1).long(), cache=state, **GREEDY)
    assert contents(state) == before


def test_prompts_that_hold_eos(model: BakaForCausalLM) -> None:
    """Only what is generated ends a row: EOS within or at the end of a prompt is text, and is read."""
    tokens = prompt(2, 9)
    tokens[0, 4] = tokens[0, -1] = tokens[1, 2] = 12
    arguments = GREEDY | dict(eos_token_id=12, pad_token_id=12, min_new_tokens=30)
    state = model.new_cache(2)
    found = model.generate(tokens, attention_mask=ones(2, 9), cache=state, **arguments)
    for row in (0, 1):
        assert torch.equal(found[row], model.generate(tokens[row, None], attention_mask=ones(1, 9), **arguments)[0])
    assert_has_read(model, state, list(found[:, :-1]))


def test_a_single_row_that_ends(model: BakaForCausalLM) -> None:
    """Its EOS is the last token, and so not in the state."""
    tokens, _, stop, texts = rows_that_end(model)
    state = model.new_cache()
    found = model.generate(tokens[1:2], cache=state, eos_token_id=stop, pad_token_id=stop, **GREEDY)
    assert torch.equal(found[0], torch.cat([texts[1], torch.tensor([stop])]))
    assert_has_read(model, state, [texts[1]])


# Beams and several answers from one state


def test_beam_search_from_a_state(model: BakaForCausalLM) -> None:
    """A state repeated for each beam gives the beams of a fresh reading, with the whole history or new tokens."""
    text, arguments = prompt(2, 13), dict(num_beams=3, do_sample=False, max_new_tokens=20)
    expected = model.generate(text, **arguments)
    for given in (whole, whole_with_a_mask, new_tokens_with_a_whole_mask):
        state = state_after(model, text[:, :9])
        state.batch_repeat_interleave(3)
        found = model.generate(**given(text[:, :9], text[:, 9:]), cache=state, **arguments)
        assert torch.equal(found[:, -20:], expected[:, -20:])


@pytest.mark.smoke
@pytest.mark.parametrize("own_state", [True, False])
def test_the_state_after_beam_search_is_refused(model: BakaForCausalLM, own_state: bool, tmp_path: Any) -> None:
    """It is that of the running beams, not of what was returned: no call goes on from it, until it is reset."""
    arguments = dict(num_beams=2, do_sample=False, max_new_tokens=12, return_dict_in_generate=True)
    arguments |= dict(cache=model.new_cache(4)) if own_state else {}
    output = model.generate(prompt(2, 7), **arguments)
    state = output.past_key_values
    state.save_pretrained(tmp_path)
    for used in (state, state.clone(), BakaCache.from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="beam search left this one with the state of its running beams"):
            model(prompt(4, 1), cache=used)
        with pytest.raises(ValueError, match="beam search"):
            model.generate(prompt(4, 3), cache=used, **GREEDY)
        with pytest.raises(ValueError, match="beam search"):
            model.generate(prompt(2, 3), cache=used, num_beams=2, do_sample=False, max_new_tokens=2)
    state.reset()
    assert torch.equal(logits_of(model, prompt(4, 8), state), logits_of(model, prompt(4, 8), model.new_cache(4)))


@pytest.mark.parametrize("static", [False, True])
def test_beam_search_that_has_read_nothing_leaves_the_state_usable(model: BakaForCausalLM, static: bool) -> None:
    """An error before the first block has read: the state is still that of its rows' texts."""
    state = model.new_cache(2, static=static)
    before = contents(state)

    def out_of_memory(*arguments: Any) -> None:
        raise MemoryError

    handle = model.model.embed_tokens.register_forward_pre_hook(out_of_memory)
    with pytest.raises(MemoryError):
        model.generate(prompt(1, 7), cache=state, num_beams=2, do_sample=False, max_new_tokens=2)
    handle.remove()
    assert contents(state) == before
    assert_close(logits_of(model, prompt(2, 8), state), logits_of(model, prompt(2, 8)), **CLOSE)


@pytest.mark.parametrize("given", [whole, whole_with_a_mask, new_tokens_with_a_whole_mask])
def test_several_answers_from_one_state(model: BakaForCausalLM, given: Callable) -> None:
    """A state repeated for each answer; every answer's state is its own."""
    text, arguments = prompt(2, 13), dict(num_return_sequences=3, do_sample=True, max_new_tokens=20)
    set_seed(3)
    expected = model.generate(text, **arguments)
    assert len({tuple(row) for row in expected[:, 13:].tolist()}) == 6
    state = state_after(model, text[:, :9])
    state.batch_repeat_interleave(3)
    set_seed(3)
    found = model.generate(**given(text[:, :9], text[:, 9:]), cache=state, **arguments)
    assert torch.equal(found[:, -20:], expected[:, -20:])
    assert_has_read(model, state, list(expected[:, :-1]))


def test_several_answers_need_a_state_each(model: BakaForCausalLM) -> None:
    """A state that was not repeated is refused and left as it was."""
    text = prompt(2, 13)
    state = state_after(model, text[:, :9])
    before = contents(state)
    with pytest.raises(ValueError, match="expected a state of batch size 6, got one of 2; `batch_repeat_interleave`"):
        model.generate(text, cache=state, num_return_sequences=3, do_sample=True, max_new_tokens=2)
    assert contents(state) == before


# Speculation


# Three boundaries and more, in chunks of 7.
SPOKEN = dict(max_new_tokens=16, do_sample=False)
CHUNKS = {1: dict(chunk_size=1, num_pause_tokens=1), 3: dict(chunk_size=3), 7: dict(chunk_size=7)}


@pytest.fixture(scope="module", params=CHUNKS.values(), ids=lambda overrides: f"chunks of {overrides['chunk_size']}")
def speculating(request: pytest.FixtureRequest) -> BakaForCausalLM:
    return tiny_model(tiny_config(**request.param), seed=1)


def assistants(model: BakaForCausalLM) -> dict[str, dict[str, Any]]:
    """Ways to speculate: from the text itself, with a smaller model that is mostly wrong, with one always right."""
    small = tiny_model(tiny_config(num_hidden_layers=1, chunk_size=4, num_memory_tokens=1), seed=3)
    twin = copy.deepcopy(model)
    return {
        "lookup": dict(prompt_lookup_num_tokens=4),
        "wrong assistant": dict(assistant_model=small),
        "right assistant": dict(assistant_model=twin),
    }


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["lookup", "wrong assistant", "right assistant"])
@pytest.mark.parametrize("length", [2, 21])
def test_speculation_says_what_greedy_says(speculating: BakaForCausalLM, name: str, length: int) -> None:
    """Guesses that turn out wrong leave no trace, across many boundaries."""
    tokens = prompt(1, length, seed=length)
    found = speculating.generate(tokens, **assistants(speculating)[name], **SPOKEN)
    assert torch.equal(found, speculating.generate(tokens, **SPOKEN))


@pytest.mark.parametrize("name", ["lookup", "wrong assistant", "right assistant"])
@pytest.mark.parametrize("given", [whole, new_tokens_with_a_whole_mask])
def test_speculation_from_a_state(speculating: BakaForCausalLM, name: str, given: Callable) -> None:
    """A state goes in and comes out as it does without speculation, turn after turn."""
    state, text = speculating.new_cache(), torch.zeros(1, 0, dtype=torch.int64)
    for turn, length in enumerate((11, 5)):
        fed = state.get_seq_length()
        text = torch.cat([text, prompt(1, length, seed=turn)], dim=1)
        arguments = given(text[:, :fed], text[:, fed:]) | assistants(speculating)[name]
        found = speculating.generate(**arguments, cache=state, **SPOKEN)
        expected = speculating.generate(text, **SPOKEN)
        assert torch.equal(found[:, -16:], expected[:, -16:])
        text = expected
        assert state.get_seq_length() == text.shape[1] - 1
        assert_has_read(speculating, state, [text[0, :-1]])


@pytest.mark.parametrize("records", [False, True])
def test_speculation_records_for_itself(speculating: BakaForCausalLM, records: bool) -> None:
    """Afterwards a state keeps what boundaries overwrite only if it did before."""
    state = speculating.new_cache()
    if records:
        state.activate_past_recording()
    found = speculating.generate(prompt(1, 9), cache=state, prompt_lookup_num_tokens=4, **SPOKEN)
    assert (state._is_recording, bool(state._boundaries), state._recent_ids is not None) == (records,) * 3
    if records:
        forget_and_go_on(speculating, [found[0, :-1]], state, speculating.config.chunk_size)


@pytest.mark.parametrize("name", ["lookup", "wrong assistant", "right assistant"])
def test_speculation_returns_a_state_that_does_not_record(speculating: BakaForCausalLM, name: str) -> None:
    """Also one that nobody had given."""
    output = speculating.generate(prompt(1, 9), **assistants(speculating)[name], **SPOKEN, return_dict_in_generate=True)
    state = output.past_key_values
    assert (state._is_recording, state._boundaries, state._recent_ids) == (False, [], None)
    assert_has_read(speculating, state, [output.sequences[0, :-1]])


@pytest.mark.parametrize("name", ["lookup", "wrong assistant", "right assistant"])
def test_speculation_after_a_padded_prompt(speculating: BakaForCausalLM, name: str) -> None:
    """Padding in front of a single row matters no more than elsewhere."""
    tokens, mask = left_padded([prompt(9, seed=9), prompt(14, seed=14)])
    arguments = SPOKEN | dict(attention_mask=mask[:1])
    found = speculating.generate(tokens[:1], **assistants(speculating)[name], **arguments)
    assert torch.equal(found, speculating.generate(tokens[:1], **arguments))


@pytest.mark.parametrize("name", ["lookup", "wrong assistant", "right assistant"])
@pytest.mark.parametrize("turn", [1, 2])
def test_speculation_after_padding_on_the_right(speculating: BakaForCausalLM, name: str, turn: int) -> None:
    tokens, mask = right_padded([prompt(9, seed=9), prompt(14, seed=14)])
    tokens, mask = tokens[:1], mask[:1]
    state, history = speculating.new_cache(), prompt(1, 11) if turn == 2 else tokens[:, :0]
    if turn == 2:
        logits_of(speculating, history, state)
        mask = torch.cat([ones(1, 11), mask], dim=1)
    arguments = assistants(speculating)[name] | SPOKEN | dict(attention_mask=mask, cache=state)
    found = speculating.generate(tokens, **arguments)
    text = speculating.generate(torch.cat([history, tokens[:, :9]], dim=1), **SPOKEN)
    assert torch.equal(found, torch.cat([tokens, text[:, -16:]], dim=1))
    assert_has_read(speculating, state, [text[0, :-1]])


def test_speculation_that_ends(speculating: BakaForCausalLM) -> None:
    """EOS among the guesses ends the text where greedy ends it."""
    tokens = prompt(1, 9)
    greedy = speculating.generate(tokens, **SPOKEN)[0, 9:].tolist()
    arguments = SPOKEN | dict(eos_token_id=greedy[11], pad_token_id=0, attention_mask=ones(1, 9))
    expected = speculating.generate(tokens, **arguments)
    for how in assistants(speculating).values():
        assert torch.equal(speculating.generate(tokens, **how, **arguments), expected)


def test_speculation_saves_calls(model: BakaForCausalLM) -> None:
    """With an assistant that is always right the model is called a few times for many tokens."""
    calls = []
    model, twin = copy.deepcopy(model), copy.deepcopy(model)
    model.register_forward_hook(lambda *_: calls.append(1))
    twin.generation_config.num_assistant_tokens_schedule = "constant"
    twin.generation_config.num_assistant_tokens = 5
    twin.generation_config.assistant_confidence_threshold = 0
    found = model.generate(prompt(1, 9), assistant_model=twin, **GREEDY)
    assert len(calls) <= 30 // 6 + 1
    assert torch.equal(found, twin.generate(prompt(1, 9), **GREEDY))


@pytest.mark.parametrize("refused", [whole, new_tokens_with_a_whole_mask])
@pytest.mark.parametrize("given", [whole, new_tokens, new_tokens_with_a_whole_mask])
def test_a_state_after_a_refused_speculation(model: BakaForCausalLM, refused: Callable, given: Callable) -> None:
    """transformers speculates for one row only; a state of two goes on as if nobody had tried."""
    text = prompt(2, 13)
    state = state_after(model, text[:, :9])
    with pytest.raises(ValueError, match="batch_size = 1"):
        model.generate(**refused(text[:, :9], text[:, 9:]), cache=state, prompt_lookup_num_tokens=3, **GREEDY)
    found = model.generate(**given(text[:, :9], text[:, 9:]), cache=state, **GREEDY)
    assert torch.equal(found[:, -30:], model.generate(text, **GREEDY)[:, -30:])


def test_sampling_while_speculating(model: BakaForCausalLM) -> None:
    """Speculative sampling runs, is seeded, and leaves a state of what it said."""
    how = dict(do_sample=True, max_new_tokens=30) | assistants(model)["wrong assistant"]
    texts = []
    for _ in range(2):
        state = model.new_cache()
        set_seed(0)
        texts.append(model.generate(prompt(1, 9), cache=state, **how))
        assert_has_read(model, state, [texts[-1][0, : state.get_seq_length()]])
    assert torch.equal(*texts)


def test_rows_out_of_phase_go_on(model: BakaForCausalLM) -> None:
    """A state made by forward calls, its rows in different phases, is generated from row by row as alone."""
    texts, state = rows_out_of_phase(model, 4, 13, 5)
    more = prompt(3, 6, seed=6)
    found = model.generate(more, attention_mask=ones(3, 19), cache=state, **GREEDY)
    for row, text in enumerate(texts):
        alone = model.generate(torch.cat([text, more[row]])[None], **GREEDY)
        assert torch.equal(found[row, -30:], alone[0, -30:])
