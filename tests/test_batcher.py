"""The batcher: whoever joins and leaves, a row says what its text says alone."""

import gc
import random
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import STATES, contents, random_tokens, recorded_calls, tiny_config, tiny_model
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from baka_hf import BakaCache, BakaForCausalLM, decoding_graphs_baka, serving
from baka_hf.serving import Batcher, Request


@pytest.fixture(params=["plain", "by programs", "a step late"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """As on a CPU; by what graphs would record on a GPU; and with tokens that are looked at as late as there."""
    if request.param != "plain":
        monkeypatch.setattr(decoding_graphs_baka, "DEVICES", ("cpu",))
    if request.param == "a step late":
        monkeypatch.setattr(serving, "LATE", ("cpu",))
    yield request.param
    decoding_graphs_baka._idle.clear()


def alone(model: BakaForCausalLM, prompt: Tensor, **options: Any) -> list[int]:
    """What stock `generate` says after a prompt [L], greedily."""
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0) | options
    return model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **options)[
        0, len(prompt) :
    ].tolist()


def collected(batcher: Batcher, requests: list[Request]) -> list[list[int]]:
    """What all say until the end, as `run` gives it; each is over once, after its last token."""
    said: dict[Request, list[int]] = {request: [] for request in requests}
    over = []
    for request, token in batcher.run():
        assert request not in over
        if token is None:
            over.append(request)
        else:
            said[request].append(token)
    assert set(over) == set(requests)
    assert [request.tokens for request in requests] == list(said.values())
    return list(said.values())


@pytest.mark.parametrize("overrides", STATES.values(), ids=STATES)
def test_texts_join_and_leave_at_random(way: str, overrides: dict[str, Any]) -> None:
    """Prompts of 1 token to many chunks, more texts than rows, some cancelled: `generate` says the same of each."""
    model = tiny_model(tiny_config(**overrides))
    batcher, dice = Batcher(model, 3, 1 + (way != "plain")), random.Random(3)
    todo = [(random_tokens(model.config, dice.choice([1, 2, 5, 9, 10, 33]), seed=i), i) for i in range(7)]
    requests: dict[Request, Tensor] = {}
    over: list[Request] = []
    while todo or not batcher.is_idle:
        if todo and dice.random() < 0.3:
            prompt, index = todo.pop()
            limit = dice.choice([1, 2, 7, 12])
            kind = prompt if index % 2 else prompt.tolist()
            requests[batcher.add(kind, max_new_tokens=limit, eos_token_id=(), keep_state=index % 3 == 0)] = prompt
        if requests and dice.random() < 0.03:
            batcher.cancel(dice.choice(list(requests)))
        over += [request for request, token in batcher.step() if token is None]
    assert len(over) == len(set(over)) == 7 and set(over) == set(requests)
    assert {"length"} <= {request.finish_reason for request in over} <= {"length", "cancelled"}
    for request, prompt in requests.items():
        expected = alone(model, prompt, max_new_tokens=request.max_new_tokens)
        assert request.tokens == expected[: len(request.tokens)]
        assert request.finish_reason == "cancelled" or request.tokens == expected
        if request.keep_state and request.finish_reason == "length":
            text = torch.cat([prompt, torch.tensor(expected)])
            more = random_tokens(model.config, 1, 8, seed=9)
            with torch.no_grad():
                found = model(more, cache=request.state).logits
                torch.testing.assert_close(found, model(torch.cat([text[None], more], 1)).logits[:, len(text) :])


def test_a_large_batch(way: str) -> None:
    """Whose rows are read apart at the edges of chunks, and wait for one another there."""
    model = tiny_model(tiny_config(chunk_size=11))
    batcher, dice = Batcher(model, 20, 3), random.Random(0)
    prompts = [random_tokens(model.config, dice.randint(1, 40), seed=index) for index in range(30)]
    requests = []
    for prompt in prompts:
        requests.append(batcher.add(prompt, dice.randint(1, 30), eos_token_id=()))
        batcher.step()
    list(batcher.run())
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.tokens == alone(model, prompt, max_new_tokens=request.max_new_tokens)


def test_a_conversation(way: str) -> None:
    """Turn after turn from the state that was kept; the one that was given stays as it was."""
    model = tiny_model(tiny_config())
    batcher, state, text = Batcher(model, 2), None, torch.empty(0, dtype=torch.int64)
    for turn in range(3):
        new = random_tokens(model.config, 4 + 5 * turn, seed=turn)
        before = contents(state)
        request = batcher.add(new, max_new_tokens=6, eos_token_id=(), state=state, keep_state=True)
        batcher.add(random_tokens(model.config, 3, seed=turn), max_new_tokens=9)
        text = torch.cat([text, new])
        assert collected(batcher, [request, batcher.waiting[-1]])[0] == alone(model, text, max_new_tokens=6)
        assert contents(state) == before
        text, state = torch.cat([text, torch.tensor(request.tokens)]), request.state
        assert state.num_tokens.tolist() == [len(text)]


@torch.no_grad()
def test_a_state_that_does_not_know_its_text(way: str) -> None:
    """It was fed embeddings. Those beside it, before and after, know theirs all the same."""
    model = tiny_model(tiny_config())
    batcher, given = Batcher(model, 4), model.new_cache()
    model(inputs_embeds=model.get_input_embeddings()(torch.tensor([[1, 2, 3]])), cache=given)
    options: dict[str, Any] = dict(keep_state=True, eos_token_id=())
    before = batcher.add([5, 6, 7], 9, **options)
    batcher.step()
    unknown = batcher.add([4], 2, state=given, **options)
    list(batcher.run())
    after = batcher.add([8, 9, 10], 9, **options)
    list(batcher.run())
    for request in (before, after):
        history = torch.tensor([request.input_ids + request.tokens + [1]])
        assert model.generate(history, cache=request.state, max_new_tokens=2).shape == (1, history.shape[1] + 2)
    assert unknown.state._history is None and unknown.state._opening is None
    assert given._history is None and unknown.state.num_tokens.tolist() == [3 + 1 + 2]


def test_a_text_ends(way: str) -> None:
    """At EOS, which is said and, if the state is kept, read; at once, if it is the first token."""
    model = tiny_model(tiny_config())
    prompt = random_tokens(model.config, 7)
    expected = alone(model, prompt)
    unsaid = min({*range(model.config.vocab_size)} - {*expected})
    batcher = Batcher(model, 2)
    for end in (expected[0], expected[-1]):
        stop = expected[: expected.index(end) + 1]
        requests = [batcher.add(prompt, 20, eos_token_id=end, keep_state=keep) for keep in (False, True)]
        requests.append(batcher.add(prompt, len(stop), eos_token_id=[end, unsaid]))
        assert collected(batcher, requests) == [stop] * 3
        assert [request.finish_reason for request in requests] == ["stop"] * 3
        assert requests[0].state is None and requests[1].state.num_tokens.tolist() == [7 + len(stop)]
    model.generation_config.eos_token_id = expected[0]
    assert collected(batcher, [batcher.add(prompt, 20)]) == [expected[:1]]
    assert batcher.step() == [] and list(batcher.run()) == []


@torch.no_grad()
def test_states_of_texts_that_end_anywhere(way: str) -> None:
    """At EOS at any place of a chunk, some waiting for others there: each has read its last token, and no more."""
    model = tiny_model(tiny_config(vocab_size=97))
    batcher, known = Batcher(model, 4, 2), {}
    for length in range(1, 12):
        prompt = random_tokens(model.config, length, seed=length)
        said = alone(model, prompt, max_new_tokens=9)
        end = next(token for token in reversed(said) if said.index(token) == max(map(said.index, said)))
        request = batcher.add(prompt, 9, eos_token_id=end if length % 3 else (), keep_state=True)
        known[request] = torch.cat([prompt, torch.tensor(said[: said.index(end) + 1] if length % 3 else said)])
    list(batcher.run())
    more = random_tokens(model.config, 1, 8, seed=9)
    for request, text in known.items():
        assert request.input_ids + request.tokens == text.tolist()
        assert request.state.num_tokens.tolist() == [len(text)]
        found = model(more, cache=request.state).logits
        torch.testing.assert_close(found, model(torch.cat([text[None], more], 1)).logits[:, len(text) :])


def test_tokens_are_looked_at_a_step_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step has been asked for by then, and once a text is over nothing more is."""
    model, prompt = tiny_model(tiny_config()), [1, 2, 3]
    expected = alone(model, torch.tensor(prompt), max_new_tokens=3)
    for late in (False, True):
        monkeypatch.setattr(serving, "LATE", ("cpu",) if late else ())
        batcher = Batcher(model, 1)
        request, steps = batcher.add(prompt, 3, eos_token_id=()), []
        while not batcher.is_idle:
            steps.append(([token for _, token in batcher.step()], int(batcher.state.num_tokens)))
        assert request.tokens == expected
        first, *others = expected
        if late:
            assert steps == [([], 3), ([first], 4), ([others[0]], 5), ([others[1], None], 5)]
        else:
            assert steps == [([first, others[0]], 4), ([others[1], None], 5)]
        end = batcher.add(prompt, 9, eos_token_id=expected[1])
        list(batcher.run())
        assert end.tokens == expected[:2] and int(batcher.state.num_tokens) == 4 + late


def test_sampling(way: str) -> None:
    """Every draw by hand, from the logits of the text alone; and the same draws beside whoever else is there."""
    model = tiny_model(tiny_config())
    prompts = [random_tokens(model.config, length, seed=length) for length in (4, 11, 6, 6)]
    kinds = [dict(temperature=0.7), dict(temperature=1.3, top_k=3), dict(temperature=1.0, top_p=0.6)]
    kinds.append(dict(temperature=1.3, top_k=3))
    batcher = Batcher(model, 3)
    requests = [
        batcher.add(prompt, 70, seed=5, eos_token_id=(), **kind) for prompt, kind in zip(prompts, kinds, strict=True)
    ]
    greedy = batcher.add(prompts[0], 9, eos_token_id=())
    said = collected(batcher, [*requests, greedy])
    assert said[-1] == alone(model, prompts[0], max_new_tokens=9)
    for prompt, kind, tokens in zip(prompts, kinds, said, strict=False):
        text = torch.cat([prompt, torch.tensor(tokens)])
        with torch.no_grad():
            logits = model(text[None]).logits[0, len(prompt) - 1 : -1]
        draws = torch.rand(128, generator=torch.Generator().manual_seed(5))
        for scores, draw, token in zip(logits, draws, tokens, strict=False):
            p = (scores / kind["temperature"]).softmax(0)
            order = p.argsort(descending=True)
            count = kind.get("top_k", len(p))
            if "top_p" in kind:
                count = int((p[order].cumsum(0) < kind["top_p"]).sum()) + 1
            p[order[count:]] = 0
            assert p[:token].sum() / p.sum() <= draw + 1e-6 and draw - 1e-6 < p[: token + 1].sum() / p.sum()
    unlike = [batcher.add(prompts[0], 30, temperature=1.0, eos_token_id=()) for _ in range(2)]
    first, second = collected(batcher, unlike)
    assert first != second and unlike[0].seed != unlike[1].seed


def test_scores_that_leave_no_choice(way: str) -> None:
    """Next to no temperature says the likeliest token; no score at all says one that there is, and ends no batch."""
    model = tiny_model(tiny_config())
    prompt, batcher = random_tokens(model.config, 7), Batcher(model, 4)
    cold = [batcher.add(prompt, 20, temperature=t, top_k=3, eos_token_id=()) for t in (1e-320, 1e-30)]
    nothing = batcher.add(prompt, 9, temperature=1.0, logits_processor=[lambda ids, x: x - torch.inf], eos_token_id=())
    other = batcher.add(prompt, 20, eos_token_id=())
    *said, expected = collected(batcher, [*cold, nothing, other])
    assert said[:2] == [expected, expected] and expected == alone(model, prompt)
    assert len(nothing.tokens) == 9 and max(nothing.tokens) < model.config.vocab_size


def test_processors_of_scores(way: str) -> None:
    """transformers' own, given the text of their row; others have none."""
    model = tiny_model(tiny_config())
    prompts = [random_tokens(model.config, length, seed=length) for length in (6, 9)]
    batcher = Batcher(model, 2)
    options = dict(max_new_tokens=20, eos_token_id=())
    penalty = [RepetitionPenaltyLogitsProcessor(1.7)]
    requests = [batcher.add(prompts[0], logits_processor=penalty, **options), batcher.add(prompts[1], **options)]
    expected = [alone(model, prompts[0], repetition_penalty=1.7), alone(model, prompts[1])]
    assert collected(batcher, requests) == expected and expected[0] != alone(model, prompts[0])


def test_prompts_hold_nobody_up() -> None:
    """While a prompt of many chunks is read, those who speak say a token with every chunk."""
    model = tiny_model(tiny_config())
    batcher = Batcher(model, 3, num_prompts=1)
    speaker = batcher.add([1, 2, 3], 50, eos_token_id=())
    batcher.step()
    reader = batcher.add(random_tokens(model.config, 52), 3, eos_token_id=())
    steps = []
    while not reader.tokens:
        steps.append([request for request, _ in batcher.step()])
    assert steps[:-1] == [[speaker]] * 10 and len(steps) == 11  # 52 tokens in chunks of 5
    assert reader.num_read == 53  # and its first token

    # Two prompts at a time: one alone waits for another, but not for long, and not if nobody speaks. So do texts that
    # have the last token of a chunk to read.
    batcher = Batcher(model, 3, num_prompts=2)
    first = batcher.add([4], 14, eos_token_id=())
    second = None
    numbers = []
    while not batcher.is_idle:
        batcher.step()
        second = second or batcher.add([5], 9, eos_token_id=())
        numbers.append((len(first.tokens), len(second.tokens)))
    # The first token comes with the prompt, and the next at once.
    assert numbers[:6] == [(2, 0), (3, 0), (4, 0), (5, 0), (6, 2), (7, 3)]
    assert numbers[-1] == (14, 9) and len(numbers) <= 18

    # Chunks of a prompt after its first wait half as long: 4 steps, and 2 for each of 3.
    batcher = Batcher(model, 3, num_prompts=2)
    batcher.add([4], 40, eos_token_id=())
    batcher.step()
    reader = batcher.add(random_tokens(model.config, 20), 3, eos_token_id=())
    steps = 0
    while not reader.tokens:
        batcher.step()
        steps += 1
    assert steps == 4 + 3 * 2


def test_prompts_begin_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait for others are put into their rows when they are read, all at once."""
    model = tiny_model(tiny_config())
    batcher = Batcher(model, 5, num_prompts=3)
    batcher.add([4], 40, eos_token_id=())
    batcher.step()
    put = recorded_calls(monkeypatch, BakaCache, "put_rows")
    prompts = [random_tokens(model.config, 3, seed=seed) for seed in range(3)]
    for prompt in prompts:
        assert not put
        last = batcher.add(prompt, 4, eos_token_id=())
        batcher.step()
    assert [rows for _, rows, *_ in put] == [[0, 1, 2], [1, 2, 3]] and len(last.tokens) == 2
    list(batcher.run())
    assert last.tokens == alone(model, prompts[-1], max_new_tokens=4)


def test_who_is_cancelled_leaves(way: str) -> None:
    """Waiting, while its prompt is read, and while it speaks; its row is free for others."""
    model = tiny_model(tiny_config())
    batcher = Batcher(model, 1)
    requests = [batcher.add(random_tokens(model.config, 12, seed=i), 5, eos_token_id=()) for i in range(4)]
    batcher.step()
    assert batcher.reading == [requests[0]]
    batcher.cancel(requests[0])
    batcher.cancel(requests[3])
    assert batcher.step() == [(requests[3], None), (requests[0], None)]
    while not requests[1].tokens:
        batcher.step()
    batcher.cancel(requests[1])
    said = [(request, token) for request, token in batcher.run() if request is not requests[2]]
    assert said == [(requests[1], None)]
    assert [request.finish_reason for request in requests] == ["cancelled", "cancelled", "length", "cancelled"]
    assert requests[2].tokens == alone(model, random_tokens(model.config, 12, seed=2), max_new_tokens=5)
    batcher.cancel(requests[2])
    assert requests[2].finish_reason == "length" and batcher.is_idle


def test_texts_from_another_thread(way: str) -> None:
    """They are added, and some cancelled, while steps are made."""
    model = tiny_model(tiny_config(), torch.float32)
    batcher, requests = Batcher(model, 4), []
    done = threading.Event()

    def add() -> None:
        for index in range(40):
            requests.append(batcher.add([index % 19], 6, eos_token_id=()))
            if index % 5 == 0:
                batcher.cancel(requests[-1])
        done.set()

    thread = threading.Thread(target=add)
    thread.start()
    over = []
    while not (done.is_set() and batcher.is_idle):
        over += [request for request, token in batcher.step() if token is None]
    thread.join()
    assert len(over) == 40 and set(over) == set(requests)
    assert all(len(request.tokens) == 6 for request in requests if request.finish_reason == "length")


@pytest.mark.parametrize("num_good", [0, 1, 3])
def test_processors_that_fail(way: str, num_good: int) -> None:
    """They end their own text, once, wherever it is; it keeps what it has said, and its row goes to others."""
    model = tiny_model(tiny_config())
    prompts = [random_tokens(model.config, length, seed=length) for length in (6, 9, 4)]
    calls: list[int] = []

    def fail(ids: Tensor, scores: Tensor) -> Tensor:
        calls.append(ids.shape[1])
        return scores if len(calls) <= num_good else scores / [0]

    batcher, options = Batcher(model, 2), dict(max_new_tokens=20, eos_token_id=())
    failing = batcher.add(prompts[0], logits_processor=[fail], keep_state=True, **options)
    others = [batcher.add(prompt, **options) for prompt in prompts[1:]]
    assert collected(batcher, [failing, *others])[1:] == [alone(model, prompt) for prompt in prompts[1:]]
    assert calls == list(range(6, 7 + num_good))
    assert failing.tokens == alone(model, prompts[0])[:num_good] and failing.state is None
    assert failing.finish_reason == "error" and failing.error
    assert "scores / [0]" in failing.error and "TypeError" in failing.error
    assert [(request.finish_reason, request.error) for request in others] == [("length", None)] * 2


def test_a_step_that_fails() -> None:
    """All that were not over are by then, and so is what is added afterwards by the next step."""
    model = tiny_model(tiny_config())
    batcher = Batcher(model, 2)
    over, *requests = [batcher.add([1], 5) for _ in range(4)]
    batcher.cancel(over)
    handle = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as failure:
        batcher.step()
    handle.remove()
    assert [request.finish_reason for request in requests] == ["error"] * 3
    assert all("ZeroDivisionError: division by zero" in str(request.error) for request in requests)
    assert (over.finish_reason, over.error) == ("cancelled", None)
    late = batcher.add([1], 5)
    with pytest.raises(ValueError, match="one whose last step was interrupted or failed"):
        batcher.step()
    assert late.finish_reason == "error" and "one whose last step was interrupted" in str(late.error)
    state = weakref.ref(batcher.state)  # goes with the batcher, though requests are kept
    del batcher, failure
    gc.collect()
    assert state() is None


def test_what_a_batcher_refuses() -> None:
    model = tiny_model(tiny_config())
    for numbers in (dict(num_rows=0), dict(num_rows=True), dict(num_rows=2, num_prompts=0), dict(num_rows=1.5)):
        with pytest.raises(ValueError, match="must be an integer of at least 1, got"):
            Batcher(model, **numbers)
    with pytest.raises(ValueError, match="a language modelling head, got BakaModel"):
        Batcher(model.train().model)
    assert model.model.training
    batcher = Batcher(model, 2)
    torn, other = model.new_cache(), tiny_model(tiny_config(chunk_size=7)).new_cache()
    torn._is_torn = True
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(input_ids=[]), "at least one token id"),
        (dict(input_ids=[[1, 2]]), r"of shape \[length\], got torch.int64 of shape \[1, 2\]"),
        (dict(input_ids=[0.5]), "got torch.float32"),
        (dict(input_ids=[1j]), "got torch.complex64"),
        (dict(input_ids="def f("), r"`input_ids` to be token ids, got 'def f\('"),
        (dict(input_ids=None), "`input_ids` to be token ids, got None"),
        (dict(input_ids=[[1], [2, 3]]), r"`input_ids` to be token ids, got \[\[1\], \[2, 3\]\]"),
        (dict(input_ids=[3, 19]), "token ids from 0 to 18, got 19"),
        (dict(input_ids=[3, -1]), "token ids from 0 to 18, got -1"),
        (dict(max_new_tokens=0), "`max_new_tokens` must be an integer of at least 1, got 0"),
        (dict(temperature=-1), "temperature"),
        (dict(temperature=[1]), r"`temperature` to be a number, got \[1\]"),
        (dict(temperature=None), "`temperature` to be a number, got None"),
        (dict(top_k=0), "top_k"),
        (dict(top_p=1.5), "top_p"),
        (dict(top_p=[1]), r"`top_p` to be a number, got \[1\]"),
        (dict(seed=-1), r"`seed` to be an integer from 0 to 2\*\*63 - 1, got -1"),
        (dict(eos_token_id="2"), "`eos_token_id` to be a token id from 0 to 18 or a sequence of some, got '2'"),
        (dict(eos_token_id=torch.tensor([1, 2])), "from 0 to 18 or a sequence of some, got tensor"),
        (dict(eos_token_id=19), "from 0 to 18 or a sequence of some, got 19"),
        (dict(eos_token_id=[2, -1]), r"from 0 to 18 or a sequence of some, got \[2, -1\]"),
        (dict(logits_processor=[3]), r"`logits_processor` to be a sequence of functions, got \[3\]"),
        (dict(state=model.new_cache(2)), "expected a state of batch size 1, got one of 2"),
        (dict(state=other), "expected chunk_size=5, got 7"),
        (dict(state=torn), "between two calls"),
        (dict(state=3), "expected the state to be a BakaCache"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            batcher.add(**dict(input_ids=[1]) | arguments)
    assert batcher.is_idle
