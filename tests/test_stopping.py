"""`generate` that looks at its tokens a step late says, streams and leaves what one does that looks at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import CLOSE, CONFIGS, logits_of, random_tokens, tiny_config, tiny_model
from torch.testing import assert_close
from transformers import StoppingCriteria
from transformers.generation import GenerationMixin
from transformers.generation.streamers import BaseStreamer

from baka_hf import BakaCache, BakaForCausalLM, decoding_graphs_baka, stopping_baka


class NoEvent:
    """Of a device that has done what it was told to by the time that it is asked."""

    def __init__(self, **options: Any):
        pass

    def record(self) -> None:
        pass

    synchronize = record


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.is_over = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.is_over = True


@pytest.fixture(scope="module")
def model() -> BakaForCausalLM:
    return tiny_model(tiny_config(**CONFIGS["gate"] | dict(vocab_size=97)))


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Any:
    def switch_on() -> None:
        monkeypatch.setattr(stopping_baka, "DEVICES", ("cpu",))
        monkeypatch.setattr(decoding_graphs_baka, "DEVICES", ("cpu",))
        monkeypatch.setattr(torch, "Event", NoEvent)

    return switch_on


def test_transformers_asks_for_it() -> None:
    """By the name that is given another meaning, for this package alone."""
    assert "DeferredStopCheck" in GenerationMixin._sample.__code__.co_names
    assert GenerationMixin._sample.__globals__["DeferredStopCheck"] is not stopping_baka.OneStepLate


class Enough(StoppingCriteria):
    """So many tokens, of which nothing is known before they are looked at. It goes for one of transformers' own."""

    __module__ = "transformers.generation.stopping_criteria"

    def __init__(self, count: int):
        self.count = count

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((1,), input_ids.shape[1] >= self.count)


def counting(function: Callable, calls: list[None]) -> Callable:
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return function(*args, **kwargs)

    return counted


@pytest.mark.parametrize("static", [False, True])
def test_it_ends_where_it_would(
    model: BakaForCausalLM, static: bool, late: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any place of a chunk, after the first token, after the last that there may be; and it goes on from there."""
    text, calls = random_tokens(model.config, 1, 7), []
    monkeypatch.setattr(model.lm_head, "forward", counting(model.lm_head.forward, calls))

    def answer(length: int) -> tuple[Any, BakaCache, Kept]:
        state, streamer = model.new_cache(static=static), Kept()
        options: dict[str, Any] = dict(max_new_tokens=17, do_sample=False, output_scores=True)
        options |= dict(streamer=streamer, stopping_criteria=[Enough(7 + length)])
        return model.generate(text, cache=state, return_dict_in_generate=True, **options), state, streamer

    expected = [answer(length) for length in range(1, 18)]
    late()
    more = random_tokens(model.config, 1, 9, seed=1)
    for length, (known, before, stream) in enumerate(expected, 1):
        calls.clear()
        found, state, streamer = answer(length)
        assert torch.equal(found.sequences, known.sequences) and len(found.scores) == length
        assert_close(torch.cat(found.scores), torch.cat(known.scores), **CLOSE)
        assert streamer.tokens == stream.tokens and streamer.is_over
        # One step too many, but where the length ends it, or where that step would have filled a chunk.
        fills_a_chunk = (7 + length) % model.config.chunk_size == 0
        assert len(calls) - length == (length < 17 and not fills_a_chunk)
        for name in ("_num_tokens", "_history", "_said", "_asked"):
            assert torch.equal(getattr(state, name), getattr(before, name)), name
        assert torch.equal(*(each._opening[:, : each.num_tokens] for each in (state, before)))
        for name in ("_seq_length", "_aligned", "_recent_ids", "_boundaries", "_is_recording"):
            assert getattr(state, name) == getattr(before, name), name
        history = torch.cat([found.sequences, more], dim=1)
        going_on = [model.generate(history, cache=each, max_new_tokens=8, do_sample=False) for each in (state, before)]
        assert torch.equal(*going_on)
        assert_close(logits_of(model, more, state), logits_of(model, more, before), **CLOSE)


def test_who_may_not_bear_what_comes_after_the_end(model: BakaForCausalLM, late: Any) -> None:
    """Processors and criteria of one's own never see it, nor does a state that records."""
    text, lengths = random_tokens(model.config, 1, 7), []
    end = model.generate(text, max_new_tokens=3, do_sample=False)[0, -1].item()
    options: dict[str, Any] = dict(max_new_tokens=9, do_sample=False, eos_token_id=end, pad_token_id=0)
    expected = model.generate(text, **options)
    late()

    def look(input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        assert end not in input_ids[0, 7:]
        lengths.append(input_ids.shape[1])
        return scores

    class Never(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            assert end not in input_ids[0, 7:-1]
            lengths.append(input_ids.shape[1])
            return torch.zeros(1, dtype=torch.bool)

    def allow(row: int, ids: torch.Tensor) -> list[int]:
        look(ids[None], ids)
        return [*range(97)]

    state = model.new_cache()
    for own in (dict(logits_processor=[look]), dict(stopping_criteria=[Never()]), dict(prefix_allowed_tokens_fn=allow)):
        assert torch.equal(model.generate(text, **options | own), expected)
    assert len(lengths) == 3 * (expected.shape[1] - 7)
    state.activate_past_recording()
    long = random_tokens(model.config, 1, 150)
    model.generate(long, cache=state, max_new_tokens=9, do_sample=False, stopping_criteria=[Enough(153)])
    state.crop(-128)
    assert state._history is not None and state.num_tokens.tolist() == [152 - 128]


def test_sampling_up_to_an_end(model: BakaForCausalLM, late: Any) -> None:
    found = []
    for begin in (lambda: None, late):
        begin()
        torch.manual_seed(0)
        text, ends = random_tokens(model.config, 1, 3), [*range(20)]
        found.append(model.generate(text, do_sample=True, eos_token_id=ends, pad_token_id=90, max_new_tokens=40))
    assert torch.equal(*found) and 4 < found[0].shape[1] < 43 and found[0][0, -1] < 20


def test_where_it_does_not_help(model: BakaForCausalLM) -> None:
    """On a CPU nobody waits; which of several rows have ended is to be known, and so is what an assistant drafts."""
    supports = stopping_baka.OneStepLate.is_supported
    cuda, one = torch.device("cuda"), model.new_cache()
    assert supports(cuda, one, True, is_assistant=False)
    assert not supports(torch.device("cpu"), one, True, is_assistant=False)
    assert not supports(cuda, model.new_cache(2), True, is_assistant=False)
    assert not supports(cuda, one, True, is_assistant=True)
    assert not supports(cuda, None, False, is_assistant=False)
