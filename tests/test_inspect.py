"""Looking inside: what is shown is what a naive reading finds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONFIGS, naive_read, random_tokens, tiny_config, tiny_model
from saving import save_checkpoint
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from baka_hf import BakaModel, decoding_graphs_baka, inspect
from baka_hf.evaluation import evaluate_documents, gain_by_depth
from baka_hf.inspect import KEYS, QUERIES, attention_shares, follow_memory, memory_gain, slot_names

EXACT = dict(rtol=0, atol=1e-9)
KINDS = ["rmt_carry", "gate_for_tokens", "layer_separate", "rmt_alone", "chunk_of_one"]
every_kind = pytest.mark.parametrize("overrides", [CONFIGS[name] for name in KINDS], ids=KINDS)


def test_names_of_slots() -> None:
    """Pauses do not divide the chunk: they stand before text 0 and text 2."""
    names = ["read 0", "read 1", "pause 0", "text 0", "text 1", "pause 1", "text 2", "text 3", "text 4"]
    names += ["write 0", "write 1"]
    assert slot_names(tiny_config()) == [f"previous {name}" for name in names] + [f"own {name}" for name in names]
    for overrides in CONFIGS.values():
        config = tiny_config(**overrides)
        found = slot_names(config)
        assert len(found) == len(set(found)) == 2 * config.stream_length


# Memories of a call


def memories_of(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    return naive_read(model, tokens).memories


@every_kind
@pytest.mark.parametrize("with_gradients", [False, True])
def test_memories(overrides: dict[str, Any], with_gradients: bool) -> None:
    """Those that chunks read and leave, however calls cut them, and without changing anything."""
    model = tiny_model(tiny_config(**overrides))
    tokens = random_tokens(model.config, 2, 23)
    expected = [torch.stack(rows) for rows in zip(*(memories_of(model, row) for row in tokens), strict=True)]
    with torch.set_grad_enabled(with_gradients):
        whole = model(tokens, output_memories=True)
        state = model.new_cache(2)
        parts = [model(part, cache=state, output_memories=True) for part in tokens.split([3, 9, 1, 10], dim=1)]
    assert_close(whole.logits, model(tokens).logits, **EXACT)
    assert model(tokens).memories is None
    for found in (whole.memories, sum((part.memories for part in parts), ())):
        assert len(found) == len(expected) - 1
        for (read, left), before, after in zip(found, expected, expected[1:], strict=False):
            assert_close(read, before, **EXACT)
            assert_close(left, after, **EXACT)
            assert left.requires_grad == with_gradients


@torch.no_grad()
def test_memories_of_rows_out_of_step() -> None:
    """Where no chunk becomes full, a row's memory stays; a text that begins has read the learned vectors."""
    model = tiny_model(tiny_config())
    tokens = random_tokens(model.config, 2, 13)
    mask = torch.ones(2, 13, dtype=torch.int64)
    mask[1, :4] = 0
    found = model(tokens, attention_mask=mask, output_memories=True).memories
    for row, text in enumerate((tokens[0], tokens[1, 4:])):
        expected = memories_of(model, text)
        moved = [(read[row], left[row]) for read, left in found if not torch.equal(read[row], left[row])]
        assert len(moved) == len(expected) - 1
        for (read, left), before, after in zip(moved, expected, expected[1:], strict=False):
            assert_close(read, before, **EXACT)
            assert_close(left, after, **EXACT)
    positions = torch.cat([torch.arange(5), torch.arange(8)])[None]
    packed = model(tokens[:1], position_ids=positions, output_memories=True).memories
    assert_close(packed[1][0][0], model.model.memory_tokens.weight, **EXACT)


@torch.no_grad()
def test_memories_of_a_static_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read as from any other, and stay as they were given."""
    monkeypatch.setattr(decoding_graphs_baka, "DEVICES", ("cpu",))
    model = tiny_model(tiny_config(memory_update="gate", memory_norm=True))
    tokens = random_tokens(model.config, 1, 26)
    state = model.new_cache(static=True)
    found: list[Any] = []
    for part, asks in zip(tokens.split([7, 3, 5, 1, 10], dim=1), (False, True, False, True, True), strict=True):
        found.append(model(part, cache=state, output_memories=asks).memories)
    expected = memories_of(model, tokens[0])
    assert [each is None or len(each) for each in found] == [True, 1, True, 0, 2]
    for number, (read, left) in zip((1, 3, 4), (*found[1], *found[4]), strict=True):
        assert_close(read[0], expected[number], rtol=0, atol=1e-5)
        assert_close(left[0], expected[number + 1], rtol=0, atol=1e-5)
    decoding_graphs_baka._idle.clear()


def test_memories_of_a_decoder_and_of_a_model_without() -> None:
    model = tiny_model(tiny_config())
    tokens = random_tokens(model.config, 1, 7)
    decoder: BakaModel = model.model
    (found,), (expected,) = (each(tokens, output_memories=True).memories for each in (decoder, model))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert decoder(tokens, output_memories=True, return_dict=False)[-1][0][0].equal(expected[0])
    with pytest.raises(ValueError, match="`output_memories` must be False when `num_memory_tokens` is 0, got True"):
        tiny_model(tiny_config(num_memory_tokens=0))(tokens, output_memories=True)


# A text


@every_kind
@pytest.mark.parametrize("num_chunks", [1, 4])
def test_attention_shares(overrides: dict[str, Any], num_chunks: int) -> None:
    """Sums of a naive reading's weights, slot by slot."""
    model = tiny_model(tiny_config(**overrides))
    config, implementation = model.config, model.config._attn_implementation
    tokens = random_tokens(config, num_chunks * config.chunk_size + 1)
    names = slot_names(config)
    expected = torch.zeros(config.num_hidden_layers, config.num_attention_heads, 4, 8).double()
    for layer, streams in enumerate(naive_read(model, tokens[:-1]).streams):
        for stream in streams[1:] or streams:
            for query, weights in enumerate(stream.unbind(1)):
                kind = QUERIES.index(names[config.stream_length + query].split()[1])
                count = sum(name.startswith(f"own {QUERIES[kind]} ") for name in names)
                for key, weight in enumerate(weights.unbind(1)):
                    place = KEYS.index(" ".join(names[key].split()[:2]))
                    expected[layer, :, kind, place] += weight / count / max(num_chunks - 1, 1)
    found = attention_shares(model.train(), tokens)
    assert_close(found, expected, **EXACT)
    assert model.training and model.config._attn_implementation == implementation
    assert not any(module._forward_hooks for module in model.modules())


def test_following_a_memory() -> None:
    model = tiny_model(tiny_config(memory_norm=True))
    tokens = random_tokens(model.config, 24)
    found = follow_memory(model, tokens)
    logits, memories = (getattr(naive_read(model, tokens[:20]), name) for name in ("logits", "memories"))
    losses = torch.nn.functional.cross_entropy(logits, tokens[1:21], reduction="none").view(4, 5).mean(1)
    memories = [torch.zeros_like(memories[0]), *memories[1:]]
    for row, before, after, loss in zip(found, memories, memories[1:], losses, strict=False):
        change = (after - before).norm() / after.norm()
        expected = torch.stack([after.norm(dim=1).mean(), torch.ones(()).double(), change, loss])
        assert_close(row, expected, rtol=0, atol=1e-6)
    assert len(found) == 4


def test_gain_of_a_memory() -> None:
    model = tiny_model(tiny_config(), torch.float32)
    documents = [random_tokens(model.config, length, seed=length) for length in (31, 24)]
    for texts, other in ((documents, "exchanged"), (documents[:1], "learned")):
        scores = [
            evaluate_documents(model, texts, memory=memory, by_document=True, progress=False)
            for memory in ("carried", other)
        ]
        assert memory_gain(model, texts) == gain_by_depth(*scores)


def test_too_little_to_look_at() -> None:
    model = tiny_model(tiny_config())
    for look in (attention_shares, follow_memory):
        for tokens in (random_tokens(model.config, 5), random_tokens(model.config, 1, 9)):
            with pytest.raises(ValueError, match=r"expected `tokens` \[T\] of more than a chunk \(5\), got"):
                look(model, tokens)
        with pytest.raises(ValueError, match="expected a model with memory vectors, got num_memory_tokens=0"):
            look(tiny_model(tiny_config(num_memory_tokens=0)), random_tokens(model.config, 9))


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three slides, and their figures in a file."""
    save_checkpoint(tmp_path / "model", chunk_size=16)
    texts = [tmp_path / name for name in ("one.txt", "two.txt")]
    for text, words in zip(texts, ("What is read. ", "And what is left of it. "), strict=True):
        text.write_text(words * 12)
    inspect.main([*map(str, [tmp_path / "model", *texts]), "-o", str(tmp_path / "inside"), "--chunks", "6"])
    assert {path.name for path in (tmp_path / "inside").iterdir()} == {
        "attention.png",
        "memory.png",
        "gain.png",
        "inspection.json",
    }
    assert capsys.readouterr().out == f"{tmp_path / 'inside'}: attention.png, memory.png, gain.png, inspection.json\n"
    found = json.loads((tmp_path / "inside" / "inspection.json").read_text())
    assert len(found["memory"]) == 6 and found["gain"][0]["num_documents"] == 2
    for block in range(2):
        assert sum(shares[block] for shares in found["attention"]["write"].values()) == pytest.approx(1)
    texts[0].write_text("short")
    with pytest.raises(SystemExit, match=r"error: expected `tokens` \[T\] of more than a chunk \(16\)"):
        inspect.main([*map(str, [tmp_path / "model", texts[0]]), "-o", str(tmp_path / "other")])
    LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path / "llama")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"error: --output: expected a folder, got the file .*file"):
        inspect.main([*map(str, [tmp_path / "model", texts[1]]), "-o", str(tmp_path / "file")])
    for model, wrong, message in (
        ("model", ["--chunks", "0"], "`chunks` must be an integer of at least 1, got 0"),
        ("model", ["--device", "nowhere"], "--device: .*nowhere"),
        ("llama", [], "expected a BakaLLM, got a LlamaForCausalLM"),
    ):
        with pytest.raises(SystemExit, match=f"error: {message}"):
            inspect.main([*map(str, [tmp_path / model, texts[1]]), "-o", str(tmp_path / "other"), *wrong])
    assert not (tmp_path / "other").exists()
