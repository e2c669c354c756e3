"""Training by graphs: losses, gradients and states of the plain path, and the plain path wherever that is all there is.

There are no CUDA graphs on a CPU, but all they would record runs here as well, and leaves its results where those of
the first time were, as a graph does.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONFIGS, random_tokens, tiny_config, tiny_model
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from baka_hf import BakaCache, BakaForCausalLM, training_graphs_baka
from baka_hf.training import BakaTrainer, BakaTrainingArguments


@pytest.fixture(autouse=True)
def on_cpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(training_graphs_baka, "DEVICES", ("cpu",))
    for method, results in (("_run_forward", "outputs"), ("_run_backward", "gradients")):
        plain = getattr(training_graphs_baka.TrainingGraph, method)

        def run(self: Any, *args: Any, plain: Any = plain, results: str = results) -> None:
            plain(self, *args)
            fresh = [tensor for tensor in getattr(self, results) if tensor is not None]
            first = self.__dict__.setdefault(f"first_{results}", [tensor.detach().clone() for tensor in fresh])
            for own, tensor in zip(first, fresh, strict=True):
                tensor.data = own.copy_(tensor.detach())

        monkeypatch.setattr(training_graphs_baka.TrainingGraph, method, run)
    yield
    training_graphs_baka._recorders.clear()


@pytest.fixture
def num_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many calls were read by graphs."""
    calls = [0]
    plain = training_graphs_baka.TrainingGraph.read

    def counted(self: Any, *args: Any) -> Any:
        calls[0] += 1
        return plain(self, *args)

    monkeypatch.setattr(training_graphs_baka.TrainingGraph, "read", counted)
    return lambda: calls[0]


def twins(config: Any = None, **fields: Any) -> tuple[BakaForCausalLM, BakaForCausalLM]:
    """The same model twice, in training; the second reads by graphs."""
    pair = [tiny_model(config or tiny_config(**fields), torch.float64).train() for _ in range(2)]
    pair[1].cuda_graphs_enable()
    return pair[0], pair[1]


def gradients(model: BakaForCausalLM) -> list[Tensor | None]:
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return found


def step(model: BakaForCausalLM, tokens: Tensor, **options: Any) -> Any:
    outputs = model(tokens, labels=tokens, use_cache="cache" in options, **options)
    outputs.loss.backward()
    return outputs


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients(name: str, num_read: Callable[[], int]) -> None:
    """Of every kind of model, for whole chunks and a rest, with new tokens and weights in every step."""
    plain, graphed = twins(tiny_config(**CONFIGS[name]))
    length = 3 * plain.config.chunk_size + min(2, plain.config.chunk_size - 1)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in (plain, graphed)]
    for seed in range(4):
        tokens = random_tokens(plain.config, 2, length, seed=seed)
        expected, found = (step(model, tokens) for model in (plain, graphed))
        assert_close(found.loss, expected.loss)
        assert_close(found.logits, expected.logits)
        for parameter, twin in zip(plain.parameters(), graphed.parameters(), strict=True):
            assert_close(twin.grad, parameter.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert num_read() == 3  # the first of a kind is read as ever


LANES: list[dict[str, Any]] = [
    *({}, dict(bptt_chunks=1), dict(use_xl_cache=False), dict(memory_solidifier="glu")),
    dict(associative_dim=3, associative_write="tokens", associative_gate="hard_sigmoid", associative_write_cost=2.0),
]


@pytest.mark.parametrize("fields", LANES)
def test_lanes(fields: dict[str, Any], num_read: Callable[[], int]) -> None:
    """With the state carried from step to step, and rows that begin a text where others go on."""
    plain, graphed = twins(**fields)
    length, num_steps = 3 * plain.config.chunk_size, 6
    tokens = random_tokens(plain.config, 3, num_steps * length)
    positions = torch.arange(num_steps * length).repeat(3, 1)
    positions[1] %= 4 * plain.config.chunk_size
    positions[2] %= 6 * plain.config.chunk_size
    states: list[BakaCache] = [model.new_cache(3) for model in (plain, graphed)]
    for index in range(num_steps):
        part = slice(index * length, (index + 1) * length)
        losses = []
        for model, state in zip((plain, graphed), states, strict=True):
            state.reset_rows(positions[:, part][:, 0] == 0)
            outputs = step(model, tokens[:, part], cache=state, position_ids=positions[:, part], skip_logits=True)
            state.detach_()
            losses.append(outputs.loss)
        assert_close(losses[1], losses[0])
        assert_close(gradients(graphed), gradients(plain))
        assert_close(states[1].memory, states[0].memory)
        assert states[1].num_tokens.tolist() == states[0].num_tokens.tolist()
        for own, other in zip(states[1].layers, states[0].layers, strict=True):
            assert_close(own.keys, other.keys)
            assert_close(own.values, other.values)
    assert num_read() == num_steps - 1
    probe = random_tokens(plain.config, 3, 7, seed=9)
    with torch.no_grad():
        expected, found = (m.eval()(probe, cache=s).logits for m, s in zip((plain, graphed), states, strict=True))
    assert_close(found, expected)


def test_packed_texts_and_gradients_that_add_up(num_read: Callable[[], int]) -> None:
    plain, graphed = twins()
    positions = torch.arange(20).repeat(2, 1)
    positions[1, 10:] -= 10
    for seed in range(4):
        tokens = random_tokens(plain.config, 2, 20, seed=seed)
        for model in (plain, graphed):
            step(model, tokens, position_ids=positions)
        assert_close([p.grad for p in graphed.parameters()], [p.grad for p in plain.parameters()])
    assert num_read() == 3


def test_what_a_call_gave_stays_as_it_is() -> None:
    """Later calls write neither into outputs and gradients nor into a state."""
    _, model = twins()
    state = model.new_cache(2)
    kept = []
    for seed in range(4):
        outputs = step(model, random_tokens(model.config, 2, 10, seed=seed), cache=state)
        state.detach_()
        tensors = [outputs.logits.detach(), state.memory, state.layers[1].keys, *gradients(model)]
        kept.append([(tensor, tensor.clone()) for tensor in tensors])
    for pairs in kept:
        for tensor, copy in pairs:
            assert torch.equal(tensor, copy)


def test_calls_beside_each_other(num_read: Callable[[], int]) -> None:
    """While a call waits for its backward pass others are read as ever; it need not come."""
    plain, graphed = twins()
    texts = [random_tokens(plain.config, 2, 10, seed=seed) for seed in range(3)]
    step(graphed, texts[0])
    gradients(graphed)
    losses = [[model(text, labels=text).loss for text in texts] for model in (plain, graphed)]
    assert num_read() == 1
    for parts in losses:
        sum(parts).backward()
    assert_close(gradients(graphed), gradients(plain))
    del losses, parts
    step(graphed, texts[0])
    assert num_read() == 2
    model_outputs = graphed(texts[0], labels=texts[0])
    assert num_read() == 3
    del model_outputs
    gc.collect()
    step(graphed, texts[0])
    assert num_read() == 4


def test_evaluation_between_the_passes(num_read: Callable[[], int]) -> None:
    plain, graphed = twins()
    tokens = random_tokens(plain.config, 2, 10)
    for model in (plain, graphed):
        step(model, tokens)
        gradients(model)
        loss = model(tokens, labels=tokens).loss
        model.eval()
        with torch.no_grad():
            model(tokens)
        model.train()
        loss.backward()
    assert num_read() == 1
    assert_close(gradients(graphed), gradients(plain))


def test_frozen_weights(num_read: Callable[[], int]) -> None:
    """Weights that are not trained get no gradient; another choice is another kind of call."""
    plain, graphed = twins()
    tokens = random_tokens(plain.config, 2, 10)
    for round_ in range(2):
        for model in (plain, graphed):
            model.requires_grad_(False)
            model.model.layers[round_].requires_grad_(True)
        for _ in range(2):
            for model in (plain, graphed):
                step(model, tokens)
            found, expected = gradients(graphed), gradients(plain)
            assert [gradient is None for gradient in found] == [gradient is None for gradient in expected]
            assert_close([g for g in found if g is not None], [g for g in expected if g is not None])
    assert num_read() == 2


def test_hooks_of_parameters() -> None:
    """They see each gradient once, when all of it is there; and the parameters are in their places."""
    plain, graphed = twins()
    parameters = list(graphed.parameters())
    for model in (plain, graphed):
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: 2 * gradient)
    for seed in range(3):
        tokens = random_tokens(plain.config, 2, 10, seed=seed)
        for model in (plain, graphed):
            step(model, tokens)
        assert_close(gradients(graphed), gradients(plain))
        assert all(own is other for own, other in zip(graphed.parameters(), parameters, strict=True))


def test_a_call_that_was_interrupted(monkeypatch: pytest.MonkeyPatch, num_read: Callable[[], int]) -> None:
    plain, graphed = twins()
    tokens = random_tokens(plain.config, 2, 10)
    parameters = list(graphed.parameters())
    step(graphed, tokens)
    gradients(graphed)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_graphs_baka.TrainingGraph, "_keep", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        step(graphed, tokens)
    assert all(own is other for own, other in zip(graphed.parameters(), parameters, strict=True))
    gc.collect()
    for model in (plain, graphed):
        step(model, tokens)
    assert_close(gradients(graphed), gradients(plain))
    assert num_read() == 2


def test_weights_that_are_others(num_read: Callable[[], int]) -> None:
    """Weights put in the place of those that were recorded are seen."""
    plain, graphed = twins()
    tokens = random_tokens(plain.config, 2, 10)
    for model in (plain, graphed):
        step(model, tokens)
        step(model, tokens)
        gradients(model)
        weight = model.model.layers[0].mlp.up_proj.weight
        model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.detach() * 2)
        for _ in range(2):
            loss = step(model, tokens).loss
    assert num_read() == 2
    assert_close(loss, step(plain, tokens).loss)
    gradients(plain), gradients(graphed)
    step(plain, tokens), step(graphed, tokens)
    assert_close(gradients(graphed), gradients(plain))


def test_what_is_read_as_ever(num_read: Callable[[], int]) -> None:
    plain, graphed = twins()
    tokens = random_tokens(plain.config, 2, 10)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    embeds = plain.model.embed_tokens(tokens).detach()

    def run_twice(**options: Any) -> None:
        for _ in range(2):
            losses = [model(labels=tokens, **options).loss for model in (plain, graphed)]
            sum(losses).backward()
            assert_close(losses[1], losses[0])
        assert_close(gradients(graphed), gradients(plain))

    run_twice(input_ids=tokens, attention_mask=mask)
    run_twice(input_ids=tokens, output_hidden_states=True)
    seen: list[Any] = []
    handle = graphed.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    run_twice(input_ids=tokens)
    assert len(seen) == 4
    handle.remove()
    for name in ("enable", "disable"):
        change = getattr(graphed, f"activation_checkpointing_{name}", None)
        (change or getattr(graphed, f"gradient_checkpointing_{name}"))()
        if name == "enable":
            run_twice(input_ids=tokens)
    graphed.disable_input_require_grads()  # a hook that it leaves behind
    with torch.no_grad():
        for _ in range(2):
            graphed(tokens)
    graphed.cuda_graphs_enable(False)
    run_twice(input_ids=tokens)
    assert num_read() == 0
    graphed.cuda_graphs_enable()
    run_twice(input_ids=tokens)
    assert num_read() == 1
    run_twice(inputs_embeds=embeds)
    assert num_read() == 2


def test_random_pauses_are_read_as_ever(num_read: Callable[[], int]) -> None:
    _, graphed = twins(pause_placement="random")
    for _ in range(3):
        step(graphed, random_tokens(graphed.config, 2, 10))
    assert num_read() == 0


def test_gradients_that_graphs_cannot_give() -> None:
    _, model = twins()
    tokens = random_tokens(model.config, 2, 10)
    step(model, tokens)
    loss = model(tokens, labels=tokens).loss
    loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match="expected one backward pass"):
        loss.backward()
    state = model.new_cache(2)
    step(model, tokens, cache=state)
    state.detach_()
    first = model(tokens, labels=tokens, cache=state, use_cache=True)
    second = model(tokens, labels=tokens, cache=state, use_cache=True)
    assert state.memory.requires_grad
    del first
    with pytest.raises(ValueError, match="detach_"):
        second.loss.backward()


def test_autocast(num_read: Callable[[], int]) -> None:
    """Weights in float32, products in bfloat16, as Trainer's `bf16=True` has them."""
    plain, graphed = (model.float() for model in twins())
    for seed in range(3):
        tokens = random_tokens(plain.config, 2, 10, seed=seed)
        with torch.autocast("cpu", torch.bfloat16):
            losses = [model(tokens, labels=tokens, skip_logits=True).loss for model in (plain, graphed)]
        sum(losses).backward()
        assert_close(losses[1], losses[0])
        # Autocast's copies of weights gather their gradients in bfloat16, and only the plain path keeps such copies.
        assert_close(gradients(graphed), gradients(plain), rtol=2e-2, atol=1e-3)
    assert num_read() == 2


def test_models_go_and_their_graphs_with_them() -> None:
    _, model = twins()
    for _ in range(2):
        step(model, random_tokens(model.config, 2, 10))
    assert len(training_graphs_baka._recorders) == 1
    del model, _
    gc.collect()
    assert len(training_graphs_baka._recorders) == 0


def test_there_is_an_end_to_kinds(num_read: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of many lengths are not recorded one and all; after a while the kinds that are read now take their turn."""
    monkeypatch.setattr(training_graphs_baka, "PATIENCE", 20)
    _, model = twins()
    for _ in range(2):
        for length in range(1, 12):
            step(model, random_tokens(model.config, 1, length))
    assert num_read() == training_graphs_baka.NUM_GRAPHS
    for _ in range(25):
        step(model, random_tokens(model.config, 1, 20))
    read = num_read()
    step(model, random_tokens(model.config, 1, 20))
    assert num_read() == read + 1
    (recorder,) = training_graphs_baka._recorders.values()
    assert len(recorder.graphs) == training_graphs_baka.NUM_GRAPHS


def test_one_kind_among_many(num_read: Callable[[], int]) -> None:
    """A kind that comes again and again is recorded, however many others come once."""
    _, model = twins()
    for length in range(1, 31):
        step(model, random_tokens(model.config, 1, length))
        step(model, random_tokens(model.config, 2, 20))
    assert num_read() == 29


def test_shared_weights(num_read: Callable[[], int]) -> None:
    """A weight in two places, the embedding's among them, has the gradients of both."""
    plain, graphed = twins()
    tokens = random_tokens(plain.config, 2, 10)
    for place in ("q_proj", "o_proj"):
        for model in (plain, graphed):
            first, second = (layer.self_attn for layer in model.model.layers)
            getattr(second, place).weight = getattr(first, place).weight
        for _ in range(3):
            for model in (plain, graphed):
                step(model, tokens)
            assert_close(gradients(graphed), gradients(plain))
    assert num_read() == 0


def test_those_who_watch_see_everything(num_read: Callable[[], int]) -> None:
    """What autograd keeps, and what modules do."""
    plain, graphed = twins()
    tokens = random_tokens(plain.config, 2, 10)
    seen = []
    for model in (plain, graphed):
        kept: list[Tensor] = []
        called: list[Any] = []

        def loss(scale: Tensor, model: BakaForCausalLM = model) -> Tensor:
            return model(tokens, labels=tokens).loss * scale

        one = torch.ones((), requires_grad=True, dtype=torch.float64)
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x)
        handle = register_module_forward_hook(lambda *call, called=called: called.append(call))
        for _ in range(2):
            loss(one).backward()
        handle.remove()
        for _ in range(2):
            with hooks:
                loss(one).backward()
            with torch.autograd.set_detect_anomaly(True):
                loss(one).backward()
            checkpoint(loss, one, use_reentrant=False).backward()
        seen.append((len(kept), len(called)))
    assert num_read() == 0
    assert seen[0] == seen[1] and min(seen[0]) > 10
    assert_close(gradients(graphed), gradients(plain))


def test_weights_that_change_between_the_passes() -> None:
    _, model = twins()
    tokens = random_tokens(model.config, 2, 10)
    step(model, tokens)
    loss = model(tokens, labels=tokens).loss
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="got changed ones"):
        loss.backward()
    step(model, tokens)


def test_graphs_are_freed(num_read: Callable[[], int]) -> None:
    _, model = twins()
    for _ in range(2):
        step(model, random_tokens(model.config, 2, 10))
    (recorder,) = training_graphs_baka._recorders.values()
    gone = weakref.ref(recorder)
    del recorder
    model.cuda_graphs_enable(False)
    gc.collect()
    assert gone() is None
    step(model, random_tokens(model.config, 2, 10))
    assert num_read() == 1


def test_a_trainer_that_makes_its_model(tmp_path: Path) -> None:
    arguments = BakaTrainingArguments(str(tmp_path), cuda_graphs=True, use_cpu=True, report_to=[])
    trainer = BakaTrainer(args=arguments, model_init=lambda: tiny_model(tiny_config()))
    assert trainer.model.model.records_training
    assert trainer.call_model_init().model.records_training
    assert not BakaTrainer(
        tiny_model(tiny_config()), replace(arguments, cuda_graphs=False)
    ).model.model.records_training
