"""torch.compile of the model: the same numbers, in few programs, however many chunks, steps and calls there are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    CONFIGS,
    checkpoint_activations,
    num_programs,
    random_tokens,
    recorded_calls,
    tiny_config,
    tiny_model,
)
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.testing import assert_close

from baka_hf import BakaForCausalLM, attention_baka

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def train_on_lanes(model: BakaForCausalLM, run: Callable[..., Any], num_steps: int) -> tuple[list[float], list[Tensor]]:
    """Losses and gradients of steps of three chunks in three lanes, one of which begins a document now and then."""
    length, config = 3 * model.config.chunk_size, model.config
    tokens = random_tokens(config, 3, num_steps * length)
    positions = torch.arange(num_steps * length).repeat(3, 1)
    positions[1] %= 4 * config.chunk_size
    state, losses = model.new_cache(3), []
    model.zero_grad()
    for step in range(num_steps):
        part = slice(step * length, (step + 1) * length)
        state.reset_rows(positions[:, part][:, 0] == 0)
        outputs = run(
            input_ids=tokens[:, part],
            position_ids=positions[:, part],
            cache=state,
            use_cache=True,
            labels=tokens[:, part],
            skip_logits=True,
        )
        outputs.loss.backward()
        state.detach_()
        losses.append(outputs.loss.item())
    return losses, [parameter.grad.clone() for parameter in model.parameters()]


def test_compiled_as_by_older_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.9 goes from what it is to compile to what that wraps, though it be a method of an object."""

    def innermost(function: Any, unaltered_fn_attr: str = "_torchdynamo_orig_callable") -> Any:
        while hasattr(function, unaltered_fn_attr):
            function = getattr(function, unaltered_fn_attr)
        return function

    model = tiny_model(tiny_config())
    tokens = random_tokens(model.config, 2, 9)
    monkeypatch.setattr(torch._dynamo.eval_frame, "innermost_fn", innermost)
    assert_close(torch.compile(model, backend="eager")(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(("solidifier", "granularity"), [("gelephant", None), ("layer", "chunk")])
def test_training_compiles_to_few_programs(solidifier: str, granularity: str | None) -> None:
    """Losses and gradients are those of the plain model, and later steps need no new program."""
    associations = dict(associative_dim=3, associative_write="tokens", associative_write_cost=0.1)
    associations = {} if granularity else associations
    config = tiny_config(memory_solidifier=solidifier, num_hidden_layers=1, **associations)
    model = tiny_model(config, torch.float64).train()
    losses, gradients = train_on_lanes(model, model, 8)
    if granularity:
        checkpoint_activations(model, granularity)
    compiled = torch.compile(model, backend="aot_eager")
    found = train_on_lanes(model, compiled, 8)
    assert_close(found[0], losses)
    assert_close(found[1], gradients)
    programs = num_programs()
    assert 0 < programs <= 10
    train_on_lanes(model, compiled, 8)
    assert num_programs() == programs


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("more_memory_than_text", "aot_eager"),
        ("block_of_qwen3", "aot_eager"),
        ("pause_without_xl", "eager"),
        ("xl", "eager"),
        ("one_memory_token", "eager"),
    ],
)
def test_training_in_parts(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled attention without a mask, in calls with and without a state: losses and gradients of the plain model."""
    config = tiny_config(**CONFIGS[name])
    model = tiny_model(config, torch.float64).train()
    tokens = random_tokens(config, 3, 4 * config.chunk_size + 3)

    def train(run: Callable[..., Any]) -> tuple[float, list[Tensor]]:
        model.zero_grad()
        loss = run(tokens, labels=tokens).loss
        loss.backward()
        return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]

    expected = train(model), train_on_lanes(model, model, 3)
    calls = recorded_calls(monkeypatch, attention_baka, "_attend")
    monkeypatch.setitem(attention_baka.IN_PARTS, "cpu", SDPBackend.FLASH_ATTENTION)
    assert_close((train(model), train_on_lanes(model, model, 3)), expected)
    assert not calls  # uncompiled, a mask takes fewer kernels
    compiled = torch.compile(model, backend=backend)
    assert_close((train(compiled), train_on_lanes(model, compiled, 3)), expected)
    assert calls


def test_programs_serve_texts_of_any_length() -> None:
    """One for the first chunk, one for those after it, and one for any length of what is left, or of a last chunk."""
    config = tiny_config(chunk_size=9, num_hidden_layers=2, associative_dim=3, associative_write="tokens")
    model = tiny_model(config, torch.float64).train()
    programs = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if "self_attn" in str(module.graph):
            programs.append(any(isinstance(size, torch.SymInt) for size in inputs))
        return module.forward

    compiled = torch.compile(model, backend=backend)
    for length in (27, 30, 32, 45, 41, 28):
        tokens = random_tokens(config, 2, length)
        assert_close(compiled(tokens, labels=tokens).loss, model(tokens, labels=tokens).loss)
        assert programs == [False, False, True]


def test_reading_with_a_state_needs_no_programs() -> None:
    """Every call with a state has other slots to write to: nothing but the head is compiled, and all is right."""
    model = tiny_model(tiny_config(num_hidden_layers=1), torch.float64)
    compiled = torch.compile(model, backend="aot_eager")
    tokens = random_tokens(model.config, 2, 61)
    with torch.no_grad():
        expected = model(tokens).logits
        state = model.new_cache(2)
        assert_close(compiled(tokens[:, :50], cache=state).logits, expected[:, :50])
        for column in range(50, 61):
            part = compiled(tokens[:, column : column + 1], cache=state)
            assert_close(part.logits, expected[:, column : column + 1])
        assert num_programs() <= 3


@pytest.mark.parametrize("name", ["labels", "logits_to_keep"])
def test_a_compiled_call_that_fails_leaves_its_state(name: str) -> None:
    """Also where it fails after the decoder, in what is compiled."""
    model = tiny_model(tiny_config(num_hidden_layers=1))
    compiled = torch.compile(model, backend="eager")
    tokens, state = random_tokens(model.config, 2, 9), model.new_cache(2)
    wrong = tokens.clone().fill_(model.config.vocab_size + 5) if name == "labels" else torch.tensor([99])
    with torch.no_grad():
        compiled(tokens, cache=state)
        expected = model(tokens, cache=state.clone()).logits
        with pytest.raises((IndexError, ValueError, RuntimeError)):
            compiled(tokens, cache=state, **{name: wrong})
        assert state.num_tokens.tolist() == [9, 9]
        assert_close(compiled(tokens, cache=state).logits, expected)
