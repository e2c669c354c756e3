"""Decoders that get a memory: the same function of a first chunk, and of what follows, as far as a chunk sees."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LLAMA3, byte_tokenizer
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from baka_hf import BakaForCausalLM
from baka_hf.convert import add_memory, main

N = 7
BARE = dict(chunk_size=N, num_memory_tokens=0, num_pause_tokens=0)
LINEAR = dict(rope_type="linear", rope_theta=50.0, factor=3.0)
SOURCES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, dict(rope_parameters=LLAMA3, head_dim=6)),
    "llama_with_biases": (LlamaConfig, LlamaForCausalLM, dict(attention_bias=True, mlp_bias=True)),
    "smollm2": (LlamaConfig, LlamaForCausalLM, dict(tie_word_embeddings=True, rope_parameters=LINEAR)),
    "mistral": (MistralConfig, MistralForCausalLM, dict(sliding_window=2 * N)),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, dict(tie_word_embeddings=True, rms_norm_eps=0.01)),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, dict(head_dim=10, hidden_act="gelu")),
}


def source(name: str = "llama", **fields: Any) -> Any:
    """A tiny model, every parameter drawn anew: biases and norms are nothing at initialisation."""
    configuration, kind, others = SOURCES[name]
    sizes = dict(vocab_size=19, hidden_size=16, intermediate_size=20, num_hidden_layers=2, max_position_embeddings=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=[2, 3])
    model = kind(configuration(**sizes | heads | others | fields)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            mean = float("norm" in parameter_name)
            parameter.copy_(mean + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def text(length: int, rows: int = 2) -> Tensor:
    return torch.randint(19, (rows, length), generator=torch.Generator().manual_seed(1))


def what_a_token_sees(length: int) -> Tensor:
    """[1, 1, T, T]: its own chunk so far and the whole one before."""
    place = torch.arange(length)
    chunks = place // N
    return ((place <= place[:, None]) & (chunks >= chunks[:, None] - 1))[None, None]


@pytest.mark.smoke
@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_the_same_function(name: str, tmp_path: Path) -> None:
    """Of a chunk, of more by the mask, by `generate` within a chunk; and so it is loaded where only its own code is."""
    model = source(name)
    converted = add_memory(model, **BARE)
    tokens = text(4 * N - 3)
    assert_close(converted(tokens[:, :N]).logits, model(tokens[:, :N]).logits, rtol=0, atol=1e-4)
    expected = model(tokens, attention_mask=what_a_token_sees(4 * N - 3)).logits
    assert_close(converted(tokens).logits, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(expected, model(tokens).logits, rtol=0, atol=1e-2)
    greedy = dict(max_new_tokens=N - 3, do_sample=False, eos_token_id=None)
    assert torch.equal(converted.generate(tokens[:, :3], **greedy), model.generate(tokens[:, :3], **greedy))
    converted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert_close(loaded(tokens).logits, converted(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize("pauses", [0, 1])
@torch.no_grad()
def test_associations_begin_without_a_trace(pauses: int) -> None:
    """Nothing is read of them before they are trained, whatever was stored."""
    model, tokens = source("qwen3"), text(3 * N + 2)
    fields = BARE | dict(num_pause_tokens=pauses)
    converted = add_memory(model, **fields, associative_dim=4, associative_write="tokens")
    state = converted.new_cache(len(tokens))
    found = converted(tokens, cache=state).logits
    assert_close(found, add_memory(model, **fields)(tokens).logits, rtol=0, atol=0)
    assert state.associations.abs().max() > 0
    weight = converted.model.layers[0].association.o_proj.weight
    weight.normal_()
    assert not torch.allclose(converted(tokens).logits, found)


@torch.no_grad()
def test_in_half_precision() -> None:
    model = source().bfloat16()
    tokens = text(N)
    expected = model(tokens).logits
    assert_close(add_memory(model, **BARE)(tokens).logits, expected, rtol=0, atol=0.02 * expected.abs().max().item())


def test_all_else_is_the_sources() -> None:
    """Tensors, not copies; dtype, mode, ids, generation config, tied weights."""
    model = source("smollm2").bfloat16().train()
    model.generation_config.repetition_penalty = 1.5
    converted = add_memory(model, chunk_size=N, num_memory_tokens=3, memory_update="gate", num_pause_tokens=2)
    assert converted.training and converted.lm_head.weight is converted.model.embed_tokens.weight
    own, before = dict(converted.named_parameters()), dict(model.named_parameters())
    assert all(own[name].data_ptr() == weight.data_ptr() for name, weight in before.items())
    assert all(weight.requires_grad and weight.dtype == torch.bfloat16 for weight in own.values())
    assert {name.split(".")[1] for name in own.keys() - before.keys()} == {
        "memory_tokens",
        "memory_norm",
        "memory_update",
        "pause_token",
    }
    assert converted.generation_config.repetition_penalty == 1.5
    assert converted.generation_config is not model.generation_config
    assert (converted.config.pad_token_id, converted.config.eos_token_id) == (0, [2, 3])
    converted(text(3 * N), labels=text(3 * N)).loss.backward()
    assert all(weight.grad is not None for weight in own.values())


@torch.no_grad()
def test_what_is_new_begins_quietly() -> None:
    """Pauses and the first memory vector as a first token's state, of the block from which it grows in a text too."""
    model = source("llama", num_hidden_layers=5, num_key_value_heads=4)
    for layer in model.model.layers[:4]:  # what grows, grows most where there is nothing else to read
        layer.self_attn.o_proj.weight.mul_(3)
    model.model.layers[3].mlp.down_proj.weight.mul_(50)
    converted = add_memory(model, chunk_size=N, num_memory_tokens=4, num_pause_tokens=2).model
    alone = model(torch.tensor([[1]]), output_hidden_states=True).hidden_states[:-1]
    text = model.model.embed_tokens(torch.arange(1, 33) * (19 // 33))
    reached = []
    for state in alone:
        embeds = torch.cat([text, state[0]])[None]
        states = model(inputs_embeds=embeds, output_hidden_states=True).hidden_states[:-1]
        reached.append(max(state[0, -1].norm().item() for state in states))
    most = max(state.norm().item() for state in alone)
    half = min((reached[0] * most) ** 0.5, max(reached))
    sink = next(state[0, 0] for state, norm in zip(alone, reached, strict=True) if norm >= half * 0.9999)
    assert_close(converted.memory_tokens.weight[0], sink)
    assert_close(converted.pause_token.weight[0], sink)
    scale = model.model.embed_tokens.weight.square().mean().sqrt().item()
    assert_close(converted.memory_norm.weight, torch.full((16,), scale / 100))
    assert 0.5 < converted.memory_tokens.weight[1:].std().item() / (scale / 100) < 1.5


def test_of_a_source_that_is_trained() -> None:
    """What is new begins as in eval mode, whatever is dropped in training; each module is in its mode afterwards."""
    found = []
    for training in (False, True):
        model = source("llama", attention_dropout=0.5).train(training)
        model.model.norm.eval()
        modes = [module.training for module in model.modules()]
        torch.manual_seed(0)
        converted = add_memory(model, chunk_size=N, num_memory_tokens=4)
        assert [module.training for module in model.modules()] == modes and converted.training is training
        found.append(converted.state_dict())
    assert all(torch.equal(found[1][name], weight) for name, weight in found[0].items())


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = source("qwen2")
    converted = add_memory(model, chunk_size=N, num_memory_tokens=3)
    assert {weight.device.type for weight in converted.parameters()} == {"meta"}


def quantized() -> PreTrainedModel:
    model = source()
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    return model


def adapted() -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(source(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))


def spread() -> PreTrainedModel:
    model = source()
    model.lm_head.to("meta")
    return model


def mixture() -> Any:
    sizes = dict(vocab_size=19, hidden_size=16, intermediate_size=20, num_hidden_layers=1)
    return MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2))


def with_another_rope(**rope: Any) -> Any:
    return source(rope_parameters=dict(rope_theta=50.0, **rope))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (mixture, {}, r"got 'mixtral', which has a mixture of experts\."),
        (lambda: nn.Linear(2, 2), {}, "got 'Linear'"),
        (lambda: with_another_rope(rope_type="yarn", factor=2.0), {}, "got 'yarn'"),
        (lambda: with_another_rope(rope_type="default", partial_rotary_factor=0.5), {}, "partial_rotary_factor"),
        (lambda: source().model, {}, "got embed_tokens.weight"),
        (adapted, {}, "merge_and_unload"),
        (quantized, {}, r"up_proj.weight`, a Parameter of torch.int8: load the source without quantization"),
        (spread, {}, "on one device, got cpu and, for `lm_head.weight`, meta"),
        (lambda: source("mistral", sliding_window=2 * N - 1), {}, "14 positions, are within the 13"),
        (source, dict(num_memory_tokens=13), "66 positions, are within the 64"),
        (source, dict(hidden_size=32), "the source decides, got hidden_size"),
        (source, dict(value_residual=True), "the source decides, got value_residual"),
        (source, dict(memory_update="none"), "`memory_update` must be one of"),
        (source, dict(chunk_sizes=5), "no field `chunk_sizes`"),
        (source, dict(bogus=1, rope_theta=2.0), "expected fields of BakaConfig, got bogus, rope_theta"),
    ],
)
def test_what_is_refused(make: Callable[[], Any], fields: dict[str, Any], message: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=message):
        add_memory(model, **BARE | fields)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in shards, with a tokenizer and a chat template."""
    model = source("smollm2", vocab_size=258)
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(tmp_path / "source", max_shard_size="8KB")
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "source")
    assert len(list((tmp_path / "source").glob("model-*.safetensors"))) > 1
    return tmp_path


@torch.no_grad()
def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = folder / "target"
    command = [str(folder / "source"), str(target), "--chunk_size", str(N), "--num_memory_tokens", "3"]
    main([*command, "--fields", '{"memory_update": "gate"}', "--dtype", "bfloat16"])
    assert "parameters" in capsys.readouterr().out
    model = BakaForCausalLM.from_pretrained(target)
    assert (model.dtype, model.config.memory_update, model.config.num_memory_tokens) == (torch.bfloat16, "gate", 3)
    assert model.generation_config.repetition_penalty == 1.5
    assert AutoTokenizer.from_pretrained(target).chat_template == "{{ messages[0].content }}"
    weights = LlamaForCausalLM.from_pretrained(folder / "source", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in weights.items())
    other = [*command[:1], f"{target}2", "--chunk_size"]
    for arguments, message in (
        (command, "must not be there yet"),
        ([*other, "99"], "99"),
        ([*other, "9", "--fields", "[1]"], r"--fields: expected an object .*, got \[1\]"),
        ([*other, "9", "--fields", '{"chunk_size": 8}'], "without chunk_size and num_memory_tokens, got"),
        ([*other, "9", "--dtype", "foo"], "--dtype: expected auto or a dtype of PyTorch's, got 'foo'"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(arguments)
    assert not (folder / "target2").exists()
