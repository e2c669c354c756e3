"""Memories of other kinds: whatever an update computes and holds goes every way that the memory vectors go."""

import itertools
import json
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import naive_read, random_tokens, tiny_config, tiny_model
from naive import read
from torch import Tensor, nn
from torch.testing import assert_close

from baka_hf import BakaCache, BakaForCausalLM, decoding_graphs_baka, state_files_baka, training_graphs_baka
from baka_hf.memory_baka import MEMORY_UPDATES, BakaGatedMemoryUpdate, BakaMemoryUpdate, Held, Memory

EXACT = dict(rtol=0, atol=1e-9)


class EverySecond(BakaMemoryUpdate):
    """Written by the first chunk, the third, the fifth."""

    @classmethod
    def held(cls, config: Any) -> dict[str, Held]:
        return super().held(config) | {"is_second": Held(())}

    def forward(self, memory: Memory, written: Tensor) -> Memory:
        is_second = memory["is_second"]
        vectors = torch.where(is_second[:, None, None] > 0, memory["memory"], written)
        return {"memory": vectors, "is_second": 1 - is_second}


class Mixed(BakaMemoryUpdate):
    """Half of what was written and half of what the chunk before had read: tensors go from name to name."""

    @classmethod
    def held(cls, config: Any) -> dict[str, Held]:
        vectors = Held((config.num_memory_tokens, config.hidden_size), in_float32=True)
        return {"memory": vectors, "before": vectors}

    def forward(self, memory: Memory, written: Tensor) -> Memory:
        return {"memory": (written + memory["before"]) / 2, "before": memory["memory"]}


UPDATES = {"gate": BakaGatedMemoryUpdate, "every_second": EverySecond, "mixed": Mixed}


@pytest.fixture(autouse=True)
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, update in UPDATES.items():
        monkeypatch.setattr(update, "__module__", BakaMemoryUpdate.__module__)  # graphs leave strangers alone
        monkeypatch.setitem(MEMORY_UPDATES, name, update)


ASSOCIATIONS = {
    "associations_of_memory": dict(associative_dim=3, associative_layer_interval=2),
    "associations_of_tokens": dict(associative_dim=3, associative_write="tokens", parallel_residual=False),
}


@pytest.fixture(params=[*UPDATES, *ASSOCIATIONS])
def model(request: pytest.FixtureRequest) -> BakaForCausalLM:
    fields = ASSOCIATIONS.get(request.param, dict(memory_update=request.param))
    return tiny_model(tiny_config(memory_norm=True, memory_solidifier="glu", **fields))


@pytest.fixture
def on_cpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for graphs in (decoding_graphs_baka, training_graphs_baka):
        monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    yield
    decoding_graphs_baka._idle.clear()
    training_graphs_baka._recorders.clear()


def formula(model: BakaForCausalLM) -> Callable[[Tensor, Tensor], Tensor]:
    """What a text's memories become, one after another; of "gate" the naive reading knows it."""
    before: list[Tensor] = []

    def update(memory: Tensor, written: Tensor) -> Tensor:
        before.append(memory)
        if model.config.memory_update == "every_second":
            return written if len(before) % 2 else memory
        if model.config.memory_update == "replace":
            return written
        earlier = before[-2] if len(before) > 1 else torch.zeros_like(written)
        return (written + (earlier if memory.requires_grad else earlier.detach())) / 2  # cut where memory is

    return update


def naive_logits(model: BakaForCausalLM, tokens: Tensor) -> Tensor:
    return naive_read(model, tokens, update=formula(model)).logits


def assert_same_state(found: BakaCache, expected: BakaCache, **tolerance: float) -> None:
    """Of memory and associations; of a chunk's inputs those it has, which the rest of what was read follows from."""
    assert found.carried.keys() == expected.carried.keys()
    for name, tensor in expected.carried.items():
        assert_close(found.carried[name], tensor, **tolerance)
    for layer, other in zip(found.layers, expected.layers, strict=True):
        if other.inputs is not None:
            for row, count in enumerate((expected.num_tokens % expected.chunk_size).tolist()):
                assert_close(layer.inputs[row, :count], other.inputs[row, :count], **tolerance)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_however_it_is_cut(model: BakaForCausalLM, seed: int, with_gradients: bool) -> None:
    tokens = random_tokens(model.config, 2, 33)
    expected = torch.stack([naive_logits(model, row) for row in tokens])
    generator = torch.Generator().manual_seed(seed)
    cuts = sorted({0, 33, *torch.randint(1, 33, (seed * 4,), generator=generator).tolist()})
    cuts = list(range(34)) if seed == 3 else cuts
    state = model.new_cache(2)
    with torch.set_grad_enabled(with_gradients):
        parts = [model(tokens[:, a:b], cache=state).logits for a, b in itertools.pairwise(cuts)]
    assert_close(torch.cat(parts, dim=1), expected, **EXACT)


@torch.no_grad()
def test_rows_out_of_step(model: BakaForCausalLM) -> None:
    """Padding anywhere, in calls one after another; a row that has read nothing holds nothing."""
    tokens = random_tokens(model.config, 3, 40)
    mask = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[2, :20] = False
    state, parts = model.new_cache(3), []
    for part in (slice(0, 3), slice(3, 20), slice(20, 40)):
        parts.append(model(tokens[:, part], attention_mask=mask[:, part].long(), cache=state).logits)
        if part.stop == 20:
            assert not any(tensor[2].any() for tensor in state.carried.values())
    for row, logits in enumerate(torch.cat(parts, dim=1)):
        assert_close(logits[mask[row]], naive_logits(model, tokens[row, mask[row]]), **EXACT)


@torch.no_grad()
def test_states_of_another_precision(model: BakaForCausalLM, on_cpus: None) -> None:
    """All that is held comes to the model's."""
    tokens = random_tokens(model.config, 2, 12)
    for is_static in (False, True):
        state = model.new_cache(2, static=is_static).to(dtype=torch.bfloat16)
        assert_close(model(tokens, cache=state).logits[0], naive_logits(model, tokens[0]), rtol=0, atol=1e-5)
        assert {tensor.dtype for tensor in state.carried.values()} == {torch.float64}


@torch.no_grad()
def test_what_is_kept_in_float32(on_cpus: None, tmp_path: Path) -> None:
    """It is so in every state of a model in half precision, whatever is done with it, and never rounded on the way."""
    model = tiny_model(tiny_config(memory_update="mixed"), torch.bfloat16)
    tokens = random_tokens(model.config, 3, 24)

    def check(state: BakaCache) -> BakaCache:
        assert state.layers[0].keys.dtype == torch.bfloat16
        assert {tensor.dtype for tensor in state.carried.values()} == {torch.float32}
        return state

    state = check(model.new_cache(3))
    sizes = [tensor.numel() * (4 if name in ("memory", "before") else 2) for name, tensor in state.tensors().items()]
    assert state.nbytes == sum(sizes)
    state.activate_past_recording()
    for part in tokens.split([1, 11, 12], dim=1):
        model(part, cache=state)
    assert not torch.equal(state.memory, state.memory.bfloat16().float())  # half of two sums
    static = model.new_cache(3, static=True)
    model(tokens, cache=static)
    assert_same_state(check(static), state)
    with torch.enable_grad():
        assert_same_state(check(model(tokens, use_cache=True).past_key_values.detach_()), state, rtol=0, atol=0.1)

    check(state).save_pretrained(tmp_path)
    loaded = check(BakaCache.from_pretrained(tmp_path, config=model.config, dtype=torch.bfloat16))
    joined = check(BakaCache.cat([state, loaded]).to(dtype=torch.bfloat16))
    assert torch.equal(joined.memory, state.memory.repeat(2, 1, 1))
    check(model.new_cache(3, memory=state.memory.bfloat16()))
    assert_same_state(check(model.new_cache(1, memory=state.memory[0])), model.new_cache().seed_memory(state.memory[0]))
    loaded.reset_rows(torch.tensor([True, False, False]))
    loaded.batch_select_indices(torch.tensor([2, 1]))
    assert torch.equal(check(loaded).memory, state.memory[[2, 1]])
    state.crop(-10)
    check(state).reset()
    check(state).memory = state.memory.bfloat16()
    state.save_pretrained(tmp_path)
    assert torch.equal(check(BakaCache.from_pretrained(tmp_path, config=model.config)).memory, state.memory.float())


@pytest.mark.parametrize("name", ["every_second", "mixed"])
def test_blocks_on_another_device(name: str) -> None:
    """As a device map may put them: an update finds everything where the last block is."""
    model = tiny_model(tiny_config(memory_update=name)).model
    memory = model.empty_memory(torch.zeros(()), 2)
    updated = model.update_memory(memory, memory["memory"].to("meta"))
    assert {tensor.device.type for tensor in updated.values()} == {"meta"}


@torch.no_grad()
def test_packed_texts(model: BakaForCausalLM) -> None:
    tokens = random_tokens(model.config, 2, 36)
    ends = [(0, 13, 36), (0, 20, 36)]
    positions = torch.stack([torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(e)]) for e in ends])
    state = model.new_cache(2)
    found = [model(tokens[:, p], position_ids=positions[:, p], cache=state).logits for p in (slice(22), slice(22, 36))]
    for row, end in enumerate(ends):
        expected = [naive_logits(model, tokens[row, a:b]) for a, b in itertools.pairwise(end)]
        assert_close(torch.cat(found, dim=1)[row], torch.cat(expected), **EXACT)


@torch.no_grad()
def test_what_states_go_through(model: BakaForCausalLM, tmp_path: Path) -> None:
    """Files, crop over boundaries, rows that move, are joined and begin anew."""
    tokens, more = random_tokens(model.config, 3, 18), random_tokens(model.config, 3, 17, seed=1)
    state = model.new_cache(3)
    state.activate_past_recording()
    model(tokens, cache=state)
    before = state.clone()
    model(more, cache=state)
    state.crop(-17)
    assert_same_state(state, before)
    state.save_pretrained(tmp_path, model)
    loaded = BakaCache.from_pretrained(tmp_path, model=model)
    assert_same_state(loaded, before)
    loaded.reorder_cache(torch.tensor([2, 0, 1]))
    loaded.reset_rows(torch.tensor([False, False, True]))
    texts = [torch.cat([tokens[2], more[0]]), torch.cat([tokens[0], more[1]]), more[2]]
    both = BakaCache.cat([loaded, before])
    for row, logits in enumerate(model(more.repeat(2, 1), cache=both).logits):
        text = texts[row] if row < 3 else torch.cat([tokens[row - 3], more[row - 3]])
        assert_close(logits, naive_logits(model, text)[-17:], **EXACT)
    before.crop(-3)
    state.crop(-18)
    assert_close(model(tokens, cache=state).logits[0], naive_logits(model, tokens[0]), **EXACT)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate(model: BakaForCausalLM, num_beams: int) -> None:
    tokens = random_tokens(model.config, 2, 8)
    options = dict(max_new_tokens=20, do_sample=False, num_beams=num_beams, eos_token_id=None)
    found = model.generate(tokens, **options)
    assert found.tolist() == model.generate(tokens, use_cache=False, **options).tolist()
    if num_beams == 1:
        for row in found:
            assert naive_logits(model, row).argmax(1)[7:-1].tolist() == row[8:].tolist()


@pytest.mark.parametrize("granularity", [None, "chunk"])
@pytest.mark.parametrize("bptt_chunks", [None, 1, 2])
def test_gradients(model: BakaForCausalLM, bptt_chunks: int | None, granularity: str | None) -> None:
    """Those of the formulas, as far back as they reach."""
    model.config.bptt_chunks = bptt_chunks
    weights, tokens = dict(model.named_parameters()), random_tokens(model.config, 24)
    losses = []
    for index in range(0, 24, model.config.chunk_size):
        detach_at = [] if bptt_chunks is None else [index // model.config.chunk_size - bptt_chunks]
        logits = read(
            model.config, weights, tokens.tolist(), detach_at=set(detach_at) - {0}, update=formula(model)
        ).logits
        losses.append(logits[index : index + model.config.chunk_size].square().sum())
    expected = torch.autograd.grad(sum(losses), list(weights.values()))
    model.train()
    if granularity:
        name = "activation_checkpointing_enable"  # in newer versions of transformers
        enable = getattr(model, name, None) or model.gradient_checkpointing_enable
        enable({"granularity": granularity})
    model(tokens[None]).logits.square().sum().backward()
    for (name, weight), gradient in zip(weights.items(), expected, strict=True):
        scale = max(1.0, gradient.abs().max().item())
        assert_close(weight.grad / scale, gradient / scale, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def test_static_states(model: BakaForCausalLM, on_cpus: None) -> None:
    """Chunks and tokens by graphs, a piece between them as ever."""
    tokens = random_tokens(model.config, 2, 60)
    state = model.new_cache(2, static=True)
    cuts = [0, 20, *range(21, 38), 44, *range(45, 61)]
    logits = [model(tokens[:, a:b], cache=state).logits for a, b in itertools.pairwise(cuts)]
    assert state.is_static and state._reader is not None
    for row, found in enumerate(torch.cat(logits, dim=1)):
        assert_close(found, naive_logits(model, tokens[row]), rtol=0, atol=1e-5)


def test_training_graphs(on_cpus: None, model: BakaForCausalLM) -> None:
    plain, graphed = model.train(), tiny_model(model.config).train()
    graphed.cuda_graphs_enable()
    tokens = random_tokens(model.config, 2, 60)
    states = [each.new_cache(2) for each in (plain, graphed)]
    for part in tokens.split(15, dim=1):
        for each, state in zip((plain, graphed), states, strict=True):
            each.zero_grad()
            each(part, labels=part, cache=state, use_cache=True).loss.backward()
            state.detach_()
        for parameter, twin in zip(plain.parameters(), graphed.parameters(), strict=True):
            assert_close(twin.grad, parameter.grad)
        assert_same_state(states[1], states[0])
    (recorder,) = training_graphs_baka._recorders.values()
    assert recorder.graphs


def test_compiled(model: BakaForCausalLM) -> None:
    if model.config.num_associative_heads:
        pytest.skip("compiled in test_compile")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")  # what is traced is the update: the rest is test_compile's
    tokens = random_tokens(model.config, 2, 17)
    expected = torch.stack([naive_logits(model, row) for row in tokens])
    assert_close(compiled(tokens).logits, expected, **EXACT)
    compiled(tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        state = model.new_cache(2)
        assert_close(torch.cat([compiled(x, cache=state).logits for x in tokens.split(9, 1)], 1), expected, **EXACT)


def test_checkpoint(model: BakaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = BakaForCausalLM.from_pretrained(tmp_path)
    tokens = random_tokens(model.config, 1, 17)
    assert_close(loaded(tokens).logits, model(tokens).logits, **EXACT)


def test_a_text_of_one_chunk_gives_every_weight_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(Mixed):
        """Its weight shows in what it holds beside the memory vectors alone."""

        def __init__(self, config: Any):
            super().__init__(config)
            self.proj = nn.Linear(config.hidden_size, config.hidden_size)

        def forward(self, memory: Memory, written: Tensor) -> Memory:
            return {"memory": written + memory["before"], "before": self.proj(written)}

    monkeypatch.setitem(MEMORY_UPDATES, "later", Later)
    model = tiny_model(tiny_config(memory_update="later")).train()
    tokens = random_tokens(model.config, 1, 3)
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_state_of_another_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, gated = (tiny_model(tiny_config(memory_update=name, memory_norm=True)) for name in ("replace", "gate"))
    state = gated.new_cache()
    with pytest.raises(ValueError, match="expected memory_update='replace', got 'gate'"):
        plain(random_tokens(plain.config, 1, 3), cache=state)
    state.save_pretrained(tmp_path)
    monkeypatch.delitem(MEMORY_UPDATES, "gate")
    with pytest.raises(ValueError, match="of a memory_update that is not here: 'gate'"):
        BakaCache.from_pretrained(tmp_path)


def test_a_file_from_before_updates_had_names(tmp_path: Path) -> None:
    model = tiny_model(tiny_config())
    state = model.new_cache()
    model(random_tokens(model.config, 1, 12), cache=state)
    state.save_pretrained(tmp_path)
    path = tmp_path / state_files_baka.CACHE_FILE
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header["__metadata__"]
    named = json.loads(metadata["config"])
    metadata["config"] = json.dumps({field: value for field, value in named.items() if field != "memory_update"})
    metadata["digest"] = state_files_baka.UNSIGNED
    text = json.dumps(header).encode().ljust(length)
    digest = sha256(data[:8] + text + data[8 + length :]).hexdigest()
    path.write_bytes(data[:8] + text.replace(metadata["digest"].encode(), digest.encode(), 1) + data[8 + length :])
    loaded = BakaCache.from_pretrained(tmp_path, config=model.config)
    assert loaded.signature == state.signature
    assert_same_state(loaded, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_normed_memory_holds(dtype: torch.dtype) -> None:
    """Over hundreds of chunks its norm stays, it goes on changing, and it is where its formula says it must be."""
    numbers = {}
    for name in ("plain", "replace", "gate"):
        torch.manual_seed(0)
        kind = dict(memory_update=name.replace("plain", "replace"), memory_norm=name != "plain")
        config = tiny_config(**kind, chunk_size=2, num_pause_tokens=0, hidden_size=48, num_memory_tokens=4)
        model = BakaForCausalLM(config).to(dtype).eval()
        state, memories = model.new_cache(), []
        with torch.no_grad():
            for chunk in random_tokens(config, 1, 600).split(2, dim=1):
                model(chunk, cache=state, logits_to_keep=1)
                memories.append(state.memory[0])
        numbers[name] = torch.stack(memories)
    assert numbers["plain"].dtype == dtype
    norms = {name: memories.float().norm(dim=-1).mean(-1) for name, memories in numbers.items()}
    assert norms["plain"][-1] > 1.5 * norms["plain"][99]
    for name in ("replace", "gate"):
        assert numbers[name].dtype == torch.float32
        early, late = norms[name][100:200].mean(), norms[name][200:].mean()
        assert 0.9 < late / early < 1.1 and norms[name][100:].std() < 0.1 * early
        changed = numbers[name][1:] != numbers[name][:-1]
        assert changed.float().mean() > 0.99
    norm, learned = model.model.memory_norm, model.model.learned_memory(state.memory)
    bound = norm.weight.abs() * 47**0.5 + norm.bias.abs()
    assert (numbers["gate"].abs() <= bound.maximum(learned.abs())).all()


def test_a_new_gate() -> None:
    """W = 0, b from 0 to 3 over the vectors, and learned vectors of the scale that a norm gives."""
    torch.manual_seed(0)
    model = BakaForCausalLM(
        tiny_config(memory_update="gate", memory_norm=True, hidden_size=400, num_memory_tokens=4)
    ).model
    assert not model.memory_update.gate_proj.weight.any()
    assert_close(model.memory_update.gate_bias, torch.tensor([0.0, 1, 2, 3])[:, None].expand(4, 400))
    assert_close(model.memory_tokens.weight.std(), torch.tensor(1.0), rtol=0.05, atol=0)
    assert BakaForCausalLM(tiny_config(hidden_size=400)).model.memory_tokens.weight.std() < 0.03  # "replace": as ever
