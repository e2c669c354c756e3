"""The formulas of associations, against loops over tokens and features."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONFIGS, checkpoint_activations, naive_read, random_tokens, tiny_config, tiny_model
from torch import Tensor
from torch.testing import assert_close

from baka_hf import BakaForCausalLM, associative_baka, training_graphs_baka
from baka_hf.associative_baka import (
    ASSOCIATIONS,
    BakaTokenAssociation,
    UnitLowerSolve,
    delta_rule,
    dpfp,
    recall,
    register_association,
    store,
)
from baka_hf.functions_baka import initialise

EXACT = dict(rtol=0, atol=1e-9)
FLOATS = (torch.float64, torch.float32)


def unit_keys(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_features() -> None:
    x = torch.randn(2, 5, dtype=torch.float64)
    rectified = torch.cat([x, -x], dim=-1).clamp(min=0)
    products = [rectified[:, i] * rectified[:, (i - j) % 10] for j in (1, 2, 3) for i in range(10)]
    expected = torch.stack(products, dim=1)
    expected = expected / expected.square().sum(1, keepdim=True).sqrt()
    assert_close(dpfp(x), expected, **EXACT)
    # Of any size, in half precision too: products of 10⁴ are more than it can say.
    for scale in (1e-4, 1e4):
        assert_close(dpfp((scale * x).half()).double(), expected, rtol=0, atol=0.01)
    assert not dpfp(torch.zeros(1, 5)).any()


def test_a_few_vectors_at_once() -> None:
    """Twice, since a first time nothing is there: then what is read is zero and every key is new."""
    torch.manual_seed(0)
    association, normalizer = torch.zeros(1, 12, 4, dtype=torch.float64), torch.zeros(1, 12, dtype=torch.float64)
    assert not recall(association, normalizer, dpfp(torch.randn(1, 3, 2, dtype=torch.float64))).any()
    for _ in range(2):
        keys, values = dpfp(torch.randn(1, 3, 2, dtype=torch.float64)), torch.randn(1, 3, 4, dtype=torch.float64)
        strengths = torch.rand(1, 3, dtype=torch.float64)
        A, z = association[0].clone(), normalizer[0].clone()
        for key, value, strength in zip(keys[0], values[0], strengths[0], strict=True):
            there = association[0].T @ key / (normalizer[0] @ key + 1e-5)
            A += strength * torch.outer(key, value - there)
            z += (1 - normalizer[0] @ key / (key @ key + 1e-5)).clamp(0, 1) * key
        association, normalizer = store(association, normalizer, keys, values, strengths)
        assert_close(association[0], A, **EXACT)
        assert_close(normalizer[0], z, **EXACT)
        assert_close(recall(association, normalizer, keys[:, :1])[0, 0], A.T @ keys[0, 0] / (z @ keys[0, 0] + 1e-5))


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 40, 64, 65, 129, 200, 512])
def test_every_token_in_turn(length: int) -> None:
    torch.manual_seed(length)
    keys, values, state = unit_keys(2, 3, length, 4), torch.randn(2, 3, length, 5).double(), torch.randn(2, 3, 4, 5)
    strengths, decay = torch.rand(2, 3, length).double(), torch.rand(2, 3).double()
    expected = decay[..., None, None] * state
    for t in range(length):
        key, value = keys[..., t, :], values[..., t, :]
        there = torch.einsum("bhd,bhdv->bhv", key, expected)
        expected = expected + torch.einsum("bhd,bhv->bhdv", strengths[..., t, None] * key, value - there)
    assert_close(delta_rule(state.double(), keys, values, strengths, decay), expected, **EXACT)
    floats = (x.float() for x in (state, keys, values, strengths, decay))
    assert_close(delta_rule(*floats), expected.float(), rtol=0, atol=1e-4)


def test_the_same_key_again_and_again() -> None:
    """The hardest system: what was stored last is what is there, also in float32."""
    keys = unit_keys(1, 1, 4).expand(1, 512, 4).float()
    values = torch.randn(1, 512, 3)
    state = delta_rule(torch.randn(1, 4, 3), keys, values, torch.ones(1, 512), torch.ones(1))
    assert_close(keys[:, 0] @ state, values[:, -1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [5, 21])
def test_gradients(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(associative_baka, "MAX_PIECE", 8)
    torch.manual_seed(0)
    inputs = torch.randn(1, 3, 2), unit_keys(1, length, 3), torch.randn(1, length, 2), torch.rand(1, length)
    leaves = [x.double().requires_grad_() for x in (*inputs, torch.rand(1))]
    torch.autograd.gradcheck(delta_rule, leaves)
    A, z, features = torch.randn(1, 12, 2), torch.rand(1, 12), dpfp(torch.randn(1, 3, 2))
    leaves = [x.double().requires_grad_() for x in (A, features, torch.randn(1, 3, 2), torch.rand(1, 3))]
    torch.autograd.gradcheck(lambda A, *others: store(A, z.double(), *others)[0], leaves)


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_triangular_systems(size: int) -> None:
    torch.manual_seed(0)
    lower, right = torch.randn(2, size, size).double().tril(-1) / 8, torch.randn(2, size, 3).double()
    expected = torch.linalg.solve_triangular(lower + torch.eye(size), right, upper=False, unitriangular=True)
    assert_close(UnitLowerSolve.apply(lower, right), expected, **EXACT)


# As parts of a model

KINDS: dict[str, dict[str, Any]] = {
    "memory": dict(associative_dim=16),
    "tokens": dict(associative_dim=16, associative_write="tokens"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_new_models(kind: str) -> None:
    """What is read is zero at first, queries and keys are of length 1, and heads forget in different times."""
    model = BakaForCausalLM(
        tiny_config(hidden_size=64, num_hidden_layers=3, associative_layer_interval=2, **KINDS[kind])
    )
    assert [layer.association is not None for layer in model.model.layers] == [False, True, False]
    found = dict(model.model.layers[1].association.named_parameters())
    zero = {"v_proj.weight", "beta_proj.weight", "beta_proj.bias"}
    if kind == "tokens":
        zero = zero - {"v_proj.weight"} | {"o_proj.weight", "gamma_proj.weight"}
        assert found.pop("gamma_proj.bias").tolist() == [2, 12]
    assert {name for name, weight in found.items() if not weight.any()} == zero
    for name in found.keys() - zero:
        assert found[name].std().item() == pytest.approx(64**-0.5, rel=0.1), name
    plain = BakaForCausalLM(tiny_config(hidden_size=64, num_hidden_layers=3))
    plain.load_state_dict(model.state_dict(), strict=False)
    tokens = random_tokens(model.config, 1, 12)
    assert torch.equal(model(tokens).logits, plain(tokens).logits)


@torch.no_grad()
def test_a_new_model_finds_what_followed_a_token(tmp_path: Path) -> None:
    """By the token itself, before anything is learned; and what was loaded stays as it is."""
    model = BakaForCausalLM(tiny_config(hidden_size=64, head_dim=32, **KINDS["tokens"] | dict(associative_dim=32)))
    association: Any = model.model.layers[0].association
    inputs = torch.randn(1, 9, 64)
    (state,) = association.write((torch.zeros(1, association.num_heads, 32, 32),), inputs)
    found = association.look_up(association.q_proj(inputs[:, :-1]), (state,))[0]
    values = association.v_proj(inputs)[0]
    likeness = torch.nn.functional.cosine_similarity(found[:, None], values[None], dim=-1)
    assert likeness.argmax(dim=1).tolist() == list(range(1, 9))
    association.q_proj.weight.mul_(-1)
    model.save_pretrained(tmp_path)
    again: Any = BakaForCausalLM.from_pretrained(tmp_path).model.layers[0]
    assert torch.equal(again.association.q_proj.weight, -again.association.k_proj.weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [3, 12])
def test_every_weight_has_a_gradient(kind: str, length: int) -> None:
    """Also in a text that ends before anything is written."""
    model = tiny_model(tiny_config(**KINDS[kind])).train()
    tokens = random_tokens(model.config, 1, length)
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ["associations_of_memory", "associations_of_tokens_and_memory"])
def test_precisions(name: str) -> None:
    """float32 is close to the naive reading; in models of less, and in states made less, associations are float32."""
    model = tiny_model(tiny_config(**CONFIGS[name]), torch.float32)
    tokens = random_tokens(model.config, 40)
    assert_close(model(tokens[None]).logits[0].double(), naive_read(model, tokens).logits, rtol=0, atol=1e-4)
    model = model.bfloat16()
    state = model.new_cache()
    logits = [model(part, cache=state).logits for part in tokens[None].split(13, dim=1)]
    assert (torch.cat(logits, dim=1)[0] - naive_read(model, tokens).logits).abs().mean() < 0.05
    state.to(dtype=torch.float16)
    assert {state.associations.dtype, state.layers[0].keys.dtype} == {torch.float32, torch.float16}


@torch.no_grad()
def test_float16() -> None:
    """Where nothing is stored a share of it may be more than float16 can say, and nothing is read."""
    model = tiny_model(tiny_config(**CONFIGS["associations_of_memory"]))
    tokens = random_tokens(model.config, 2, 14)
    expected = model(tokens).logits
    torch.testing.assert_close(model.half()(tokens).logits.double(), expected, rtol=0, atol=0.05)


def test_float32_does_not_drift() -> None:
    """Chunk after chunk errors are forgotten with what they are of."""
    torch.manual_seed(0)
    helds = {dtype: [torch.zeros(size, dtype=dtype) for size in ((1, 8, 4), (1, 48, 4), (1, 48))] for dtype in FLOATS}
    errors = []
    for _ in range(300):
        inputs = unit_keys(1, 16, 8), torch.randn(1, 16, 4).double(), torch.rand(1, 16).double()
        for dtype, held in helds.items():
            keys, values, strengths = (x.to(dtype) for x in inputs)
            held[0] = delta_rule(held[0], keys, values, strengths, torch.full((1,), 0.999, dtype=dtype))
            held[1:] = store(*held[1:], dpfp(keys), values, strengths)
        pairs = zip(*helds.values(), strict=True)
        errors.append([((exact - single).norm() / exact.norm()).item() for exact, single in pairs])
    assert all(max(late) < 2e-6 for late in errors[100:])


# What writing costs

COSTS: dict[str, dict[str, Any]] = {
    "memory": dict(associative_dim=3, associative_write_cost=0.5),
    "tokens": dict(
        **dict(associative_dim=3, associative_write="tokens", associative_layer_interval=2, num_hidden_layers=3),
        **dict(associative_gate="hard_sigmoid", associative_write_cost=0.5),
    ),
    "random pauses": dict(
        associative_dim=3, associative_write_cost=0.5, pause_placement="random", num_pause_tokens=3, bptt_chunks=1
    ),
}


def costly_model(kind: str, **fields: Any) -> BakaForCausalLM:
    model = tiny_model(tiny_config(**COSTS[kind] | fields), torch.float64).train()
    with torch.no_grad():
        for layer in model.model.layers:
            if layer.association is not None:
                layer.association.beta_proj.weight.mul_(3)  # so that some gates are closed
    return model


@pytest.mark.parametrize("kind", ["memory", "tokens"])
def test_the_strength_of_writes(kind: str) -> None:
    """Of what full chunks have written in rows out of step, on from a state; and what it adds to a loss."""
    model = costly_model(kind)
    n = model.config.chunk_size
    tokens = random_tokens(model.config, 2, 5 * n)
    lengths = 3 * n + 1, 4 * n + 2
    mask = torch.arange(5 * n) < torch.tensor(lengths)[:, None]
    begun = n + n // 2
    state = model.new_cache(2)
    found = []
    for part in (slice(0, begun), slice(begun, None)):
        labels = tokens.masked_fill(~mask, -100)[:, part]
        outputs = model(tokens[:, part], attention_mask=mask[:, part], labels=labels, cache=state)
        plain = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        assert_close(outputs.loss, plain + 0.5 * outputs.write_strength, check_dtype=False, rtol=1e-6, atol=0)
        found.append(outputs.write_strength.item())
    readings = [naive_read(model, row[:length]) for row, length in zip(tokens, lengths, strict=True)]
    every = model.config.num_hidden_layers // model.config.associative_layer_interval
    first = [each for reading in readings for each in reading.strengths[:every]]
    rest = [each for reading in readings for each in reading.strengths[every:]]
    expected = [torch.stack([each.mean() for each in part]).mean().item() for part in (first, rest)]
    assert found == pytest.approx(expected, rel=1e-9)
    assert kind == "memory" or any((each == 0).any() for each in rest)


def test_no_cost_of_nothing() -> None:
    """Chunks that are not full write nothing; evaluation pays nothing; nor does a model whose writes are free."""
    model = costly_model("tokens")
    tokens = random_tokens(model.config, 2, 2 * model.config.chunk_size)
    few = tokens[:, : model.config.chunk_size - 1]
    assert model(few, labels=few, use_cache=True).write_strength is None
    assert model(tokens, labels=tokens, use_cache=True).write_strength is not None
    plain = model.eval()(tokens, labels=tokens, use_cache=True)
    assert plain.write_strength is None
    assert_close(plain.loss, costly_model("tokens", associative_write_cost=0.0)(tokens, labels=tokens).loss)


@pytest.mark.parametrize("number", [None, 7, torch.tensor(40)])
@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_part_of_a_batch_pays_its_share(number: Any, skip_logits: bool, shifted: bool) -> None:
    """A loss that is divided by the targets of several calls grows in each by what the call has of them."""
    model = costly_model("memory")
    tokens = random_tokens(model.config, 2, 2 * model.config.chunk_size)
    labels = tokens.clone()
    labels[0, :3] = -100
    targets = dict(shift_labels=torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)) if shifted else {}
    options: dict[str, Any] = dict(skip_logits=skip_logits, num_items_in_batch=number)
    options |= targets or dict(labels=labels)
    outputs, free = model(tokens, **options), costly_model("memory", associative_write_cost=0.0)(tokens, **options)
    share = 1.0 if number is None else (labels[:, 1:] != -100).sum().item() / int(number)
    assert_close(outputs.loss - free.loss, 0.5 * share * outputs.write_strength, check_dtype=False, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize("granularity", ["layer", "chunk"])
def test_recomputed_strengths(kind: str, granularity: str) -> None:
    models = [costly_model(kind) for _ in range(2)]
    checkpoint_activations(models[1], granularity)
    tokens = random_tokens(models[0].config, 2, 3 * models[0].config.chunk_size)
    found = []
    for model in models:
        torch.manual_seed(0)
        strength = model(tokens, labels=tokens, use_cache=False).write_strength
        weights = [layer.association.beta_proj.weight for layer in model.model.layers if layer.association is not None]
        found.append([strength, *torch.autograd.grad(strength, [model.model.embed_tokens.weight, *weights])])
    assert_close(found[1], found[0])
    assert found[0][1].abs().max() > 0


def test_strengths_reach_as_far_back_as_losses() -> None:
    """With `bptt_chunks`: that of a chunk is a matter of one chunk before it, by gradients."""
    free, cut = costly_model("tokens"), costly_model("tokens", bptt_chunks=1)
    n, chunks = free.config.chunk_size, 3
    embeds = torch.randn(2, chunks * n, free.config.hidden_size, dtype=torch.float64, requires_grad=True)

    def total(model: BakaForCausalLM, inputs: Tensor) -> Tensor:
        return model(inputs_embeds=inputs, use_cache=True).write_strength * (inputs.shape[1] // n)

    expected = torch.zeros_like(embeds)
    for chunk in range(chunks):
        known = max(chunk - 1, 0) * n
        inputs = torch.cat([embeds[:, :known].detach(), embeds[:, known : (chunk + 1) * n]], dim=1)
        of_chunk = total(free, inputs) - (total(free, inputs[:, : chunk * n]) if chunk else 0)
        expected += torch.autograd.grad(of_chunk, embeds)[0]
    assert_close(torch.autograd.grad(total(cut, embeds), embeds)[0], expected)
    assert not torch.allclose(torch.autograd.grad(total(free, embeds), embeds)[0], expected)


def test_a_cost_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts from the next call on, by graphs too."""
    monkeypatch.setattr(training_graphs_baka, "DEVICES", ("cpu",))
    for graphs in (False, True):
        model = costly_model("tokens")
        model.cuda_graphs_enable(graphs)
        tokens = random_tokens(model.config, 2, 2 * model.config.chunk_size)
        losses = []
        for cost in (0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.0):
            model.config.associative_write_cost = cost
            outputs = model(tokens, labels=tokens, use_cache=False)
            outputs.loss.backward()
            assert (outputs.write_strength is None) == (cost == 0)
            losses.append(outputs.loss.item())
        assert losses[0] == losses[1] == losses[2] == losses[6] < losses[3] == losses[4] == losses[5]


@pytest.mark.parametrize("kind", ["memory", "tokens"])
def test_what_is_not_written_leaves_no_trace(kind: str) -> None:
    """Of closed gates neither associations nor normalizers know; what was there fades with γ alone."""
    model = tiny_model(tiny_config(**KINDS[kind], associative_gate="hard_sigmoid"))
    tokens = random_tokens(model.config, 2, 3 * model.config.chunk_size)
    n = model.config.chunk_size
    with torch.no_grad():
        for layer in model.model.layers:
            layer.association.beta_proj.weight.zero_()
            layer.association.beta_proj.bias.fill_(-3.1)
        model(tokens, cache=(state := model.new_cache(2)))
        assert not state.associations.any() and (kind == "tokens" or not state.normalizers.any())
        for layer in model.model.layers:
            layer.association.beta_proj.bias.fill_(3.1)
        model(tokens[:, :n], cache=(state := model.new_cache(2)))
        written = {name: x.clone() for name, x in state.tensors().items() if name in ("associations", "normalizers")}
        for layer in model.model.layers:
            layer.association.beta_proj.bias.fill_(-3.1)
            if kind == "tokens":
                layer.association.gamma_proj.weight.zero_()
                layer.association.gamma_proj.bias.fill_(100)
        model(tokens[:, n:], cache=state)
    for name, x in written.items():
        assert x.any()
        assert_close(state.tensors()[name], x)


def test_costs_of_other_associations() -> None:
    """A class that makes strengths its own way is charged for these."""

    @register_association("constant")
    class Constant(BakaTokenAssociation):
        def __init__(self, config: Any):
            super().__init__(config)
            del self.beta_proj

        def project(self, inputs: Tensor) -> tuple[Tensor, ...]:
            strengths = inputs.new_full((*inputs.shape[:2], self.num_heads), 1.5)
            return self.k_proj(inputs), self.v_proj(inputs), strengths, self.gamma_proj(inputs)

    try:
        fields = dict(associative_dim=3, associative_write="constant", associative_gate="hard_sigmoid")
        config = tiny_config(**fields, associative_write_cost=0.5)
        model = BakaForCausalLM(config).double().train()
        tokens = random_tokens(config, 2, 2 * config.chunk_size)
        outputs = model(tokens, labels=tokens, use_cache=True)
        assert outputs.write_strength.item() == pytest.approx(0.75)
    finally:
        ASSOCIATIONS.pop("constant")


def test_an_association_whose_queries_begin_in_another_way() -> None:
    @register_association("silent")
    class Silent(BakaTokenAssociation):
        def __init__(self, config: Any):
            super().__init__(config)
            initialise(0.0, self.q_proj)

    try:
        model = BakaForCausalLM(tiny_config(associative_dim=3, associative_write="silent"))
        assert not any(weight.any() for name, weight in model.named_parameters() if "association.q_proj" in name)
        assert all(weight.any() for name, weight in model.named_parameters() if "association.k_proj" in name)
    finally:
        ASSOCIATIONS.pop("silent")


def test_checkpointing_that_would_lose_gradients_is_refused() -> None:
    model = costly_model("tokens")
    with pytest.raises(ValueError, match="blocks with associations needs use_reentrant=False, got True"):
        checkpoint_activations(model, use_reentrant=True)


def test_the_gradient_of_strengths_alone_by_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_graphs_baka, "DEVICES", ("cpu",))
    models = [costly_model("tokens") for _ in range(2)]
    models[1].cuda_graphs_enable()
    tokens = random_tokens(models[0].config, 2, 3 * models[0].config.chunk_size)
    models[1](tokens, use_cache=False).write_strength.backward()
    models[1].zero_grad()
    for model in models:
        model(tokens, use_cache=False).write_strength.backward()
    for parameter, twin in zip(models[0].parameters(), models[1].parameters(), strict=True):
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_close(torch.zeros_like(twin) if twin.grad is None else twin.grad, expected)
