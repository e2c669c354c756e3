"""Models small enough to be read naively, with weights large enough that every part of them shows in the logits."""

from typing import Any

import pytest
import torch
from naive import Reading, read
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from baka_hf import BakaConfig, BakaForCausalLM

# Every field of a config, each where it shows. By default the pauses do not divide the chunk.
CONFIGS: dict[str, dict[str, Any]] = {
    "pristine": dict(hidden_act="silu", num_memory_tokens=0, num_pause_tokens=0, use_xl_cache=False),
    "elephant": dict(num_memory_tokens=0, num_pause_tokens=0, use_xl_cache=False),
    "xl": dict(num_memory_tokens=0, num_pause_tokens=0),
    "pause": dict(num_memory_tokens=0),
    "pause_without_xl": dict(num_memory_tokens=0, use_xl_cache=False),
    "rmt_tokens": dict(memory_write="tokens"),
    "rmt_carry": dict(),
    "rmt_without_xl": dict(use_xl_cache=False),
    "rmt_without_pauses": dict(num_pause_tokens=0),
    "rmt_alone": dict(num_pause_tokens=0, use_xl_cache=False),
    "glu": dict(memory_solidifier="glu"),
    "gelephant": dict(memory_solidifier="gelephant"),
    "mlp": dict(memory_solidifier="mlp"),
    "layer": dict(memory_solidifier="layer"),
    "layer_of_a_grouped_query_model": dict(memory_solidifier="layer", num_memory_tokens=3, num_key_value_heads=1),
    "glu_separate": dict(memory_solidifier="glu", separate_solidifiers=True),
    "layer_separate": dict(memory_solidifier="layer", separate_solidifiers=True, memory_norm=True),
    "mlp_for_tokens": dict(memory_solidifier="mlp", memory_write="tokens"),
    "gelephant_silu": dict(memory_solidifier="gelephant", hidden_act="silu"),
    "memory_norm": dict(memory_norm=True),
    "memory_norm_tokens": dict(memory_norm=True, memory_write="tokens"),
    "one_memory_token": dict(num_memory_tokens=1),
    "more_memory_than_text": dict(num_memory_tokens=5, chunk_size=2, num_pause_tokens=1),
    "chunk_of_one": dict(chunk_size=1, num_pause_tokens=1),
    "chunk_of_one_bare": dict(chunk_size=1, num_pause_tokens=0, num_memory_tokens=0),
    "chunk_of_seven": dict(chunk_size=7, num_pause_tokens=3),
    "a_pause_for_every_token": dict(chunk_size=5, num_pause_tokens=5),
    "one_pause": dict(num_pause_tokens=1),
    "grouped_queries": dict(hidden_size=16, num_attention_heads=4, num_key_value_heads=2),
    "one_key_head": dict(hidden_size=16, num_attention_heads=4, num_key_value_heads=1),
    "wide_heads": dict(head_dim=10),
    "one_layer": dict(num_hidden_layers=1),
    "three_layers": dict(num_hidden_layers=3),
    "tied": dict(tie_word_embeddings=True),
    "silu": dict(hidden_act="silu"),
    "gelu": dict(hidden_act="gelu"),
    "other_theta": dict(rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
    "other_epsilon": dict(layer_norm_eps=0.1),
}


def tiny_config(**overrides: Any) -> BakaConfig:
    """Two layers, D = 12, chunks of 5 with 2 pauses that do not divide them, 2 memory tokens."""
    fields = dict(
        vocab_size=19,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        chunk_size=5,
        num_memory_tokens=2,
        num_pause_tokens=2,
    )
    return BakaConfig(**fields | overrides)


def tiny_model(config: BakaConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> BakaForCausalLM:
    """A model in eval mode, every parameter drawn anew: at initialisation memory, solidifiers, biases hardly show."""
    model = BakaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            mean = float("norm" in name and name.endswith("weight"))
            scale = 0.1 if "solidifier" in name else 0.3  # milder where memory multiplies itself, chunk after chunk
            parameter.copy_(mean + scale * noise)
    return model.to(dtype).eval()


def random_tokens(config: BakaConfig, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def recorded_calls(patch: pytest.MonkeyPatch, module: Any, name: str) -> list[tuple[Any, ...]]:
    """A list to which each call of a function adds its arguments while the patch lasts."""
    calls: list[tuple[Any, ...]] = []
    function = getattr(module, name)

    def record(*arguments: Any) -> Any:
        calls.append(arguments)
        return function(*arguments)

    patch.setattr(module, name, record)
    return calls


def naive_read(model: BakaForCausalLM, tokens: Tensor, **options: Any) -> Reading:
    """One document [T] read naively with the model's weights, without a graph."""
    with torch.no_grad():
        return read(model.config, model.state_dict(), tokens.tolist(), **options)


def byte_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer without training: a token is a byte, ids 0 … 255, and `special_tokens` such as `eos_token` follow."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)
