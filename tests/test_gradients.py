"""Gradients are those of the formulas: through memory and previous keys, as far back as asked."""

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from helpers import checkpoint_activations, every_config, random_tokens, tiny_config, tiny_model
from naive import read
from torch import Tensor
from torch.testing import assert_close

from baka_hf import BakaForCausalLM

EXACT = dict(rtol=1e-8, atol=1e-10)
CHUNKS = 5

checkpointed = pytest.mark.parametrize("checkpointing", [None, "layer", "chunk"], ids=["plain", "by_layer", "by_chunk"])

# What carries a gradient from chunk to chunk: with XL alone, one chunk back per layer.
CARRIERS: dict[str, dict[str, Any]] = {
    "memory_and_xl": dict(),
    "memory": dict(use_xl_cache=False),
    "memory_solidified": dict(memory_solidifier="glu", memory_norm=True, use_xl_cache=False),
    "tokens_and_xl": dict(memory_write="tokens", memory_solidifier="mlp", qk_norm=True, parallel_residual=False),
    "xl": dict(num_memory_tokens=0, num_hidden_layers=3),
}


def training_model(checkpointing: str | None = None, **overrides: Any) -> BakaForCausalLM:
    """Chunks of 3: a few of them are a short text."""
    model = tiny_model(tiny_config(**dict(chunk_size=3) | overrides)).train()
    if checkpointing:
        checkpoint_activations(model, checkpointing)
    return model


def text_embeds(model: BakaForCausalLM, length: int, rows: int = 1) -> Tensor:
    """[B, T, D], a leaf of its own."""
    tokens = random_tokens(model.config, rows, length)
    return model.get_input_embeddings()(tokens).detach().requires_grad_()


def weigh(logits: Tensor) -> Tensor:
    """A loss to which every logit matters differently."""
    return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits).cos()).sum()


def naive_logits(model: BakaForCausalLM, embeds: Tensor, detach_at: Iterable[int] = ()) -> Tensor:
    """[T, V] of one row, with the graph to `embeds` [T, D] and to the model's own parameters."""
    weights = dict(model.named_parameters())
    return read(model.config, weights, embeds=embeds, detach_at=set(detach_at)).logits


def gradients(model: BakaForCausalLM, loss: Tensor, embeds: Tensor, again: bool = False) -> dict[str, Tensor]:
    """Of `loss` with respect to embeddings and parameters; zeros for what it does not depend on."""
    tensors = {"embeds": embeds, **dict(model.named_parameters())}
    found = torch.autograd.grad(loss, list(tensors.values()), retain_graph=again, materialize_grads=True)
    return dict(zip(tensors, found, strict=True))


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        scale = max(1.0, gradient.abs().max().item())
        assert_close(actual[name] / scale, gradient / scale, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


# Through the chunks of a call, and through calls


@every_config
@checkpointed
def test_gradients_of_one_call(overrides: dict[str, Any], checkpointing: str | None) -> None:
    """Gradients of a text of several chunks are the naive ones, for parameters and for every token."""
    model = training_model(checkpointing, **overrides)
    embeds = text_embeds(model, 3 * model.config.chunk_size + 1)
    actual = gradients(model, weigh(model(inputs_embeds=embeds).logits), embeds)
    assert_same_gradients(actual, gradients(model, weigh(naive_logits(model, embeds[0])), embeds))


def ragged(model: BakaForCausalLM, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, mask and positions of a row padded left, a row with holes, and a row of two documents."""
    mask, positions = torch.ones(3, length, dtype=torch.long), torch.arange(length).repeat(3, 1)
    mask[0, :2] = mask[1, [4, length - 1]] = 0
    positions[2, 5:] -= 5
    return text_embeds(model, length, rows=3), mask, positions


def documents(embeds: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """The documents [T, D] of a `ragged` batch, in the order of its real tokens."""
    left_padded, holes, packed = (row[real] for row, real in zip(embeds, mask.bool(), strict=True))
    return left_padded, holes, packed[:5], packed[5:]


@pytest.mark.parametrize("carrier", CARRIERS)
@checkpointed
def test_gradients_of_padded_and_packed_rows(carrier: str, checkpointing: str | None) -> None:
    """Rows out of step and documents in the middle of a row get the gradients that each has alone."""
    model = training_model(checkpointing, **CARRIERS[carrier])
    embeds, mask, positions = ragged(model, 11)
    logits = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits[mask.bool()]
    naive = torch.cat([naive_logits(model, document) for document in documents(embeds, mask)])
    assert_same_gradients(gradients(model, weigh(logits), embeds), gradients(model, weigh(naive), embeds))


@pytest.mark.parametrize("carrier", CARRIERS)
@checkpointed
@pytest.mark.parametrize("lengths", [(6, 7), (4, 1, 8), (5, 5, 3), (1,) * 13], ids=str)
def test_gradients_across_calls(carrier: str, checkpointing: str | None, lengths: tuple[int, ...]) -> None:
    """Text in several calls, cut anywhere, has the gradients of one call."""
    model = training_model(checkpointing, **CARRIERS[carrier])
    embeds, cache = text_embeds(model, 13), model.new_cache(1)
    parts = [model(inputs_embeds=part, cache=cache).logits[0] for part in embeds.split(lengths, dim=1)]
    actual = gradients(model, weigh(torch.cat(parts)), embeds)
    assert_same_gradients(actual, gradients(model, weigh(naive_logits(model, embeds[0])), embeds))


@pytest.mark.parametrize("carrier", CARRIERS)
@checkpointed
def test_gradients_of_rows_out_of_step_across_calls(carrier: str, checkpointing: str | None) -> None:
    """Rows that take different numbers of tokens from every call have the gradients that each has alone."""
    model = training_model(checkpointing, **CARRIERS[carrier])
    embeds, cache = text_embeds(model, 13, rows=3), model.new_cache(3)
    mask = torch.tensor([[1] * 13, [0, 1, 1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 0, 1, 1]])
    parts = [
        model(inputs_embeds=part, attention_mask=real, cache=cache).logits
        for part, real in zip(embeds.split((4, 1, 4, 4), dim=1), mask.split((4, 1, 4, 4), dim=1), strict=True)
    ]
    logits = torch.cat(parts, dim=1)[mask.bool()]
    naive = torch.cat([naive_logits(model, row[real]) for row, real in zip(embeds, mask.bool(), strict=True)])
    assert_close(logits, naive, **EXACT)
    assert_same_gradients(gradients(model, weigh(logits), embeds), gradients(model, weigh(naive), embeds))


@pytest.mark.parametrize("carrier", CARRIERS)
@checkpointed
def test_detached_state(carrier: str, checkpointing: str | None) -> None:
    """After cache.detach_() between two chunks, gradients are those of a chunk whose past is a constant."""
    model = training_model(checkpointing, **CARRIERS[carrier])
    embeds, cache = text_embeds(model, 13), model.new_cache(1)
    first = model(inputs_embeds=embeds[:, :6], cache=cache).logits[0]
    assert cache.memory.requires_grad or not model.config.num_memory_tokens
    cache.detach_()
    assert not cache.memory.requires_grad
    second = model(inputs_embeds=embeds[:, 6:], cache=cache).logits[0]
    naive = naive_logits(model, embeds[0], detach_at=[2])
    assert_same_gradients(
        gradients(model, weigh(torch.cat([first, second])), embeds), gradients(model, weigh(naive), embeds)
    )


@pytest.mark.parametrize("carrier", CARRIERS)
def test_detached_within_a_chunk(carrier: str) -> None:
    """cache.detach_() cuts the text of an unfinished chunk off too, and leaves what is said as it was."""
    model = training_model(**CARRIERS[carrier])
    embeds, cache = text_embeds(model, 13), model.new_cache(1)
    model(inputs_embeds=embeds[:, :7], cache=cache)
    cache.detach_()
    logits = model(inputs_embeds=embeds[:, 7:], cache=cache).logits[0]
    assert_close(logits, naive_logits(model, embeds[0])[7:], **EXACT)
    (gradient,) = torch.autograd.grad(weigh(logits), embeds)
    assert gradient[0, :7].eq(0).all()
    assert gradient[0, 7:].ne(0).any(dim=-1).all()


# bptt_chunks: the loss of chunk i takes the state that entered chunk i-k for a constant


def windowed_logits(model: BakaForCausalLM, embeds: Tensor, bptt_chunks: int) -> Tensor:
    """`naive_logits`, those of every chunk from a reading of its own with its own window."""
    n = model.config.chunk_size
    windows = [
        naive_logits(model, embeds, detach_at=[i - bptt_chunks] if i > bptt_chunks else []).split(n)[i]
        for i in range(math.ceil(len(embeds) / n))
    ]
    return torch.cat(windows)


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("bptt_chunks", [None, 1, 2, 3], ids="k={}".format)
@checkpointed
def test_bptt_window_of_each_chunk(carrier: str, bptt_chunks: int | None, checkpointing: str | None) -> None:
    """The loss of chunk i has a gradient in chunks i-k … i and in no other, and it is the naive one."""
    model = training_model(checkpointing, bptt_chunks=bptt_chunks, **CARRIERS[carrier])
    n, window = model.config.chunk_size, bptt_chunks or CHUNKS
    reach = min(window, model.config.num_hidden_layers) if carrier == "xl" else window
    embeds = text_embeds(model, CHUNKS * n)
    logits, naive = model(inputs_embeds=embeds).logits[0].split(n), windowed_logits(model, embeds[0], window).split(n)
    for i in range(CHUNKS):
        actual = gradients(model, weigh(logits[i]), embeds, again=True)
        reached = [j for j, gradient in enumerate(actual["embeds"][0].split(n)) if gradient.ne(0).any()]
        assert reached == list(range(max(0, i - reach), i + 1))
        assert_same_gradients(actual, gradients(model, weigh(naive[i]), embeds, again=True))


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("bptt_chunks", [1, 2, 3], ids="k={}".format)
@checkpointed
def test_bptt_of_a_whole_text(carrier: str, bptt_chunks: int, checkpointing: str | None) -> None:
    """One backward pass over a text adds up its chunks' windows; its logits are those of no window."""
    model = training_model(checkpointing, bptt_chunks=bptt_chunks, **CARRIERS[carrier])
    embeds = text_embeds(model, CHUNKS * model.config.chunk_size - 1)
    logits = model(inputs_embeds=embeds).logits[0]
    assert_close(logits, naive_logits(model, embeds[0]), **EXACT)
    naive = windowed_logits(model, embeds[0], bptt_chunks)
    assert_same_gradients(gradients(model, weigh(logits), embeds), gradients(model, weigh(naive), embeds))


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("bptt_chunks", [1, 2], ids="k={}".format)
@checkpointed
def test_bptt_of_padded_and_packed_rows(carrier: str, bptt_chunks: int, checkpointing: str | None) -> None:
    """Windows are counted in each document's own chunks, whatever the phase of the other rows."""
    model = training_model(checkpointing, bptt_chunks=bptt_chunks, **CARRIERS[carrier])
    embeds, mask, positions = ragged(model, 16)
    logits = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits[mask.bool()]
    naive = torch.cat([windowed_logits(model, document, bptt_chunks) for document in documents(embeds, mask)])
    assert_same_gradients(gradients(model, weigh(logits), embeds), gradients(model, weigh(naive), embeds))


# Gradient checkpointing, and parameters left out


@pytest.mark.smoke
@every_config
def test_checkpointing_changes_no_gradient(overrides: dict[str, Any]) -> None:
    """Checkpointing computes blocks twice and gives the gradients of computing them once."""
    passes, results = [], []
    for checkpointing in (None, "layer", "chunk"):
        model = training_model(checkpointing, **overrides)
        tokens = random_tokens(model.config, 2, 3 * model.config.chunk_size + 1)
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        model.model.layers[0].mlp.register_forward_pre_hook(count)
        model(tokens, labels=tokens).loss.backward()
        passes.append(calls)
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert passes[1] == passes[2] == 2 * passes[0] > 0
    for name, gradient in results[0].items():
        for recomputed in results[1:]:
            assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-12)


def test_checkpointing_by_chunk_keeps_nothing_of_a_chunk() -> None:
    """Outside of what is computed again, no more is kept for the backward pass than a state and the text's outputs."""
    kept = {}
    for num_chunks in (2, 6):
        model = training_model("chunk", hidden_size=16, num_hidden_layers=4, num_attention_heads=2)
        tokens = random_tokens(model.config, 1, num_chunks * 3)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.numel()), x)[1], lambda x: x):
            model(tokens, labels=tokens, skip_logits=True)
        kept[num_chunks] = sum(sizes)
    assert kept[6] - kept[2] <= 4 * 3 * (16 + 2)  # 4 chunks of 3 tokens: an output, an id and a target each


@pytest.mark.parametrize("granularity", ["block", True])
def test_unknown_granularity(granularity: Any) -> None:
    with pytest.raises(ValueError, match=f"'layer' or 'chunk', got {granularity!r}"):
        checkpoint_activations(training_model(), granularity)
    with pytest.raises(ValueError, match="use_reentrant=False, got True"):
        checkpoint_activations(training_model(), "chunk", use_reentrant=True)


@every_config
def test_every_parameter_gets_a_gradient(overrides: dict[str, Any]) -> None:
    """No parameter is left without a gradient, however short the text: data-parallel training waits for each."""
    check_gradients(training_model(**overrides), 2)


@checkpointed
@pytest.mark.parametrize("chunks", [1, 2])
def test_every_parameter_gets_a_gradient_checkpointed(checkpointing: str | None, chunks: int) -> None:
    """Also where blocks or chunks are computed again, with texts that end where a chunk does."""
    model = training_model(checkpointing, memory_norm=True, memory_solidifier="mlp", separate_solidifiers=True)
    check_gradients(model, chunks * model.config.chunk_size)


def check_gradients(model: BakaForCausalLM, length: int) -> None:
    tokens = random_tokens(model.config, 2, length)
    model(tokens, labels=tokens).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@every_config
def test_training_reads_as_evaluation_does(overrides: dict[str, Any]) -> None:
    """Whatever training does for its gradients, embeddings, blocks and logits are those of eval mode."""
    model = training_model(**overrides)
    tokens = random_tokens(model.config, 2, 10)
    training = model(tokens, output_hidden_states=True)
    evaluation = model.eval()(tokens, output_hidden_states=True)
    assert_close(training.logits, evaluation.logits, **EXACT)
    assert_close(training.hidden_states, evaluation.hidden_states, **EXACT)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of the tracer
@pytest.mark.parametrize("hidden_act", ["elephant", "silu"])
def test_gradients_of_the_traced_model(hidden_act: str) -> None:
    """What torch.compile traces has the gradients of the model, each of them."""
    model = training_model(hidden_act=hidden_act, memory_solidifier="gelephant")
    tokens = random_tokens(model.config, 2, 3 * model.config.chunk_size + 1)
    results = []
    for forward in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        forward(tokens, labels=tokens).loss.backward()
        results.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in results[0].items():
        assert gradient.abs().max() > 0
        assert_close(results[1][name], gradient, rtol=1e-9, atol=1e-15)
