"""A call is all or nothing: wherever it is broken off, the state is what it was before, or refused from then on.

A call is broken off before and after each module (hooks), and at the lines of the package's own code (a trace). What is
left must read on, bit for bit, as a state that nothing disturbed.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from helpers import contents, random_tokens, rows_out_of_phase, tiny_config, tiny_model
from torch import Tensor

from baka_hf import BakaCache, BakaForCausalLM, decoding_graphs_baka, training_graphs_baka

CODE = str(Path(decoding_graphs_baka.__file__).parent)
REFUSED = "in the middle of a call that was interrupted"
MODES: dict[str, Callable] = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


class Broken(Exception):
    """What a hook raises."""


class Places:
    """Counts the places that a call comes by, and raises at one of them."""

    def __init__(self, stop: int | None):
        self.count, self.stop = 0, stop

    def come_by(self, *_: Any) -> None:
        self.count += 1
        if self.count - 1 == self.stop:
            raise (Broken, KeyboardInterrupt)[self.stop % 2]("here")


@contextmanager
def hooks(model: BakaForCausalLM, stop: int | None) -> Iterator[Places]:
    """Places before and after each module's call, the model's own among them."""
    places = Places(stop)
    handles = [module.register_forward_pre_hook(places.come_by) for module in model.modules()]
    handles += [module.register_forward_hook(places.come_by) for module in model.modules()]
    try:
        yield places
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def lines(_: BakaForCausalLM, stop: int | None) -> Iterator[Places]:
    """Places at the lines of the package's code, where Ctrl-C may find it; but not while it goes back already."""
    places = Places(stop)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(CODE) or frame.f_code.co_name == "go_back":
            return None
        if event == "line":
            places.come_by()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield places
    finally:
        sys.settrace(before)


Call = Callable[[BakaCache], Any]


def break_off(
    where: Callable, model: BakaForCausalLM, make: Callable[[], BakaCache], call: Call, other: Call, tries: int
) -> Counter[str]:
    """Break `call` off at some `tries` of its places, each time with a new state, and go on from what is left.

    Args:
        where: what says where a call can be broken off.
        model: the model.
        make: gives the state before the call.
        call, other: the call, and another one to go on with.
        tries: so many places, evenly.

    Returns:
        How often the state was "as before", and how often it was "refused".
    """
    before, whole, again = make(), make(), make()
    expected = call(whole)
    with where(model, None) as places:
        call(again)
    others, found, known = other(before.clone()), Counter[str](), seen(before)
    step = max(1, places.count // tries)
    for stop in range(0, places.count, step - 1 + step % 2):  # odd, so that both kinds of exceptions come
        state = make()
        with pytest.raises((Broken, KeyboardInterrupt), match="here"), where(model, stop):
            call(state)
        if state._is_torn:
            refuses_all_but_a_new_text(model, state, call)
            found["refused"] += 1
            continue
        assert seen(state) == known, stop
        assert torch.equal(other(state.clone()), others), stop
        assert torch.equal(call(state), expected), stop
        assert seen(state) == seen(whole), stop
        found["as before"] += 1
    return found


def seen(state: BakaCache) -> dict[str, Any]:
    """All that a state knows, bit for bit, but for slots: many of them nothing sees."""
    return {name: contents(value) for name, value in vars(state).items() if name not in ("layers", "_reader")}


def refuses_all_but_a_new_text(model: BakaForCausalLM, state: BakaCache, call: Call) -> None:
    rows = torch.arange(state.batch_size)
    uses: list[Callable] = [
        lambda: call(state),
        lambda: model.generate(random_tokens(model.config, state.batch_size, 3), cache=state, max_new_tokens=2),
        lambda: state.crop(-1),
        lambda: state.batch_select_indices(rows),
        lambda: state.batch_repeat_interleave(2),
        lambda: state.reset_rows(rows < 1),
        lambda: state.save_pretrained("never"),
        lambda: BakaCache.cat([state, state]),
        lambda: state.put_row(0, model.new_cache()),
        lambda: model.new_cache().put_row(0, state),
        state.split,
        *(state.clone, state.detach_, state.to, state.__getstate__),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=REFUSED):
            use()
    fresh = model.new_cache(state.batch_size, static=state.is_static)
    anew = state.draft()
    anew.reset_rows(rows >= 0)
    state.reset()
    tokens = random_tokens(model.config, state.batch_size, 12)
    for each in (state, anew):
        assert torch.equal(model(tokens, cache=each).logits, model(tokens, cache=fresh).logits)
        fresh.reset()


def in_step(model: BakaForCausalLM) -> BakaCache:
    """Two rows in the middle of a chunk."""
    state = model.new_cache(2)
    with torch.no_grad():
        model(random_tokens(model.config, 2, 8, seed=1), cache=state)
    return state


STATES: dict[str, Callable[[BakaForCausalLM], BakaCache]] = {
    "fresh": lambda model: model.new_cache(2),
    "in step": in_step,
    "out of step": lambda model: rows_out_of_phase(model, 4, 13)[1],
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": dict(attention_mask=torch.tensor([[1] * 9, [0, 1, 1, 1, 0, 1, 1, 0, 1]])),
    "packed": dict(position_ids=torch.tensor([[8, 0, 1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7, 8, 9, 10, 0, 1]])),
    "with a loss": dict(labels=random_tokens(tiny_config(), 2, 9), skip_logits=True),
}


BY_TOKENS = dict(associative_dim=3, associative_write="tokens")


@modes
@pytest.mark.parametrize(
    ("before", "arguments", "overrides"),
    [
        ("fresh", "plain", {}),
        ("in step", "plain", {}),
        ("in step", "masked", {}),
        ("in step", "packed", dict(use_xl_cache=False, **BY_TOKENS)),
        ("in step", "with a loss", {}),
        ("out of step", "plain", BY_TOKENS),
        ("out of step", "packed", {}),
        ("out of step", "plain", dict(use_xl_cache=False, associative_dim=3)),
    ],
    ids=str,
)
def test_a_call(mode: Callable, before: str, arguments: str, overrides: dict[str, Any]) -> None:
    """Over two ends of chunks: the state is always as before, and so it is if what fails is the head or the loss."""
    model = tiny_model(tiny_config(**overrides))
    tokens, state = random_tokens(model.config, 2, 9, seed=2), STATES[before](model)

    def call(state: BakaCache) -> Tensor:
        with mode():
            outputs = model(tokens, cache=state, **ARGUMENTS[arguments])
        return (outputs.loss if outputs.logits is None else outputs.logits).detach()

    def other(state: BakaCache) -> Tensor:
        with torch.no_grad():
            return model(tokens[:, 3:5], cache=state).logits

    for where in (hooks, lines):
        found = break_off(where, model, state.clone, call, other, tries=10)
        assert found["as before"] >= 10 and not found["refused"]


@pytest.mark.parametrize("options", [dict(), dict(num_beams=2), dict(prompt_lookup_num_tokens=2)], ids=str)
def test_generate(options: dict[str, Any]) -> None:
    """All of `generate` is one call: what it had said when it was broken off the state has not read."""
    model = tiny_model(tiny_config())
    tokens, state = random_tokens(model.config, 1, 7, seed=2), model.new_cache(options.get("num_beams", 1))
    state.activate_past_recording()
    with torch.no_grad():
        model(random_tokens(model.config, state.batch_size, 8, seed=1)[:1].expand(state.batch_size, -1), cache=state)

    def call(state: BakaCache) -> Tensor:
        return model.generate(tokens, cache=state, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)

    def other(state: BakaCache) -> Tensor:
        with torch.no_grad():
            return model(tokens[:, 3:5].expand(state.batch_size, -1), cache=state).logits

    for where in (hooks, lines):
        found = break_off(where, model, state.clone, call, other, tries=8)
        assert found["as before"] >= 8 and not found["refused"]


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.crop(-6),
        lambda state: state.reset(),
        lambda state: state.reset_rows(torch.tensor([True, False])),
        lambda state: state.batch_select_indices(torch.tensor([1, 1])),
        lambda state: state.to(dtype=torch.float32),
        lambda state: state.detach_(),
    ],
)
def test_what_else_changes_a_state(change: Call) -> None:
    """Its own methods are all or nothing as well."""
    model = tiny_model(tiny_config())
    state = in_step(model)
    state.activate_past_recording()
    with torch.no_grad():
        model(random_tokens(model.config, 2, 9, seed=2), cache=state)

    def call(state: BakaCache) -> Tensor:
        change(state)
        return torch.zeros(1)

    def other(state: BakaCache) -> Tensor:
        with torch.no_grad():
            return model(random_tokens(model.config, 2, 7), cache=state).logits

    found = break_off(lines, model, state.clone, call, other, tries=8)
    assert found["as before"] >= 8 and not found["refused"]


@torch.no_grad()
def test_static_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """What graphs would change where it is cannot be taken back: from the first change on the state is refused."""
    monkeypatch.setattr(decoding_graphs_baka, "DEVICES", ("cpu",))
    model = tiny_model(tiny_config())
    tokens = random_tokens(model.config, 2, 13, seed=2)

    def make() -> BakaCache:
        decoding_graphs_baka._idle.clear()  # else what is done depends on when states were collected
        state = model.new_cache(2, static=True)
        model(tokens[:, :5], cache=state)  # has a reader from here on
        return state

    def other(state: BakaCache) -> Tensor:
        return model(tokens[:, 3:5], cache=state).logits

    calls: dict[str, Call] = {
        "a chunk": lambda state: model(tokens[:, 5:12], cache=state).logits,
        "a token": lambda state: model(tokens[:, 5:6], cache=state).logits,
        "a piece": lambda state: model(tokens[:, 5:7], cache=state).logits,
        "generate": lambda state: model.generate(tokens[:, 5:9], cache=state, max_new_tokens=7, do_sample=False),
    }
    for name, call in calls.items():
        found = break_off(lines, model, make, call, other, tries=12)
        assert found["as before"] > 1 and found["refused"] > 1, name


def test_training_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph is given it is given anew after a call that was broken off."""
    monkeypatch.setattr(training_graphs_baka, "DEVICES", ("cpu",))
    model = tiny_model(tiny_config()).train()
    model.cuda_graphs_enable()
    tokens, state = random_tokens(model.config, 2, 9, seed=2), in_step(model)

    def call(state: BakaCache) -> Tensor:
        return model(tokens, cache=state, use_cache=True).logits.detach()

    def other(state: BakaCache) -> Tensor:
        with torch.no_grad():
            return model(tokens[:, 3:5], cache=state).logits

    call(state.clone())  # read as ever; recorded from here on
    found = break_off(lines, model, state.clone, call, other, tries=15)
    assert found["as before"] >= 15 and not found["refused"]
    assert training_graphs_baka._recorders[model.model].graphs
