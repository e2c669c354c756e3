"""The block: that of other decoders where the configuration says so, and what it begins with."""

from typing import Any

import pytest
import torch
from helpers import LLAMA3, random_tokens, recorded_calls, tiny_config, tiny_model
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from baka_hf import BakaForCausalLM, attention_baka

BARE = dict(num_memory_tokens=0, num_pause_tokens=0, use_xl_cache=False, hidden_act="silu", layer_norm_eps=1e-6)
IN_TURN = dict(norm_type="rmsnorm", parallel_residual=False)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("peer", "fields"),
    [
        ((LlamaConfig, LlamaForCausalLM), dict(num_key_value_heads=1, rope_parameters=LLAMA3)),
        ((LlamaConfig, LlamaForCausalLM), dict(attention_bias=True, mlp_bias=True, head_dim=8)),
        ((Qwen3Config, Qwen3ForCausalLM), dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)),
    ],
    ids=["llama3", "llama_with_biases", "qwen3"],
)
def test_a_chunk_is_read_as_by_a_peer(peer: tuple[Any, Any], fields: dict[str, Any]) -> None:
    """With its weights, under the names that it has for them: the block, its norms and RoPE are the same function."""
    qk_norm = peer[0] is Qwen3Config
    model = tiny_model(tiny_config(**BARE | IN_TURN | fields, chunk_size=40, qk_norm=qk_norm), torch.float32)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(model.config, name) for name in (*names, "num_key_value_heads", "head_dim")}
    other = peer[1](peer[0](**sizes | fields, rms_norm_eps=1e-6, tie_word_embeddings=False)).eval()
    other.load_state_dict(model.state_dict())
    tokens = random_tokens(model.config, 2, 40)
    with torch.no_grad():
        expected = other(tokens).logits
        assert_close(model(tokens).logits, expected, rtol=0, atol=1e-4 * expected.abs().max())


def test_initial_weights() -> None:
    """Norms begin as norms alone, biases and value residuals at zero, what blocks add as small as is asked for."""
    fields = dict(
        qk_norm=True,
        value_residual=True,
        attention_bias=True,
        mlp_bias=True,
        memory_solidifier="layer",
        memory_norm=True,
    )
    sizes = dict(hidden_size=48, intermediate_size=80)
    for spread in (None, 0.0, 0.005):
        model = BakaForCausalLM(tiny_config(**IN_TURN | fields | sizes, residual_initializer_range=spread))
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith("bias") or "value_residual" in name:
                assert (weight == float("norm" in name)).all(), name
            elif "solidifier" not in name:
                is_added = "o_proj" in name or "down_proj" in name
                expected = 0.02 if spread is None or not is_added else spread
                assert_close(weight.std().item(), expected, rtol=0.15, atol=0.0, msg=name)
        for output in (model.model.solidifier.self_attn.o_proj, model.model.solidifier.mlp.down_proj):
            assert 0 < output.weight.std() < 0.001


@torch.no_grad()
def test_blocks_that_begin_as_the_identity() -> None:
    for parallel in (True, False):
        model = BakaForCausalLM(tiny_config(residual_initializer_range=0.0, parallel_residual=parallel)).eval()
        hidden = model(random_tokens(model.config, 1, 12), output_hidden_states=True).hidden_states
        assert torch.equal(hidden[1], hidden[0])


@pytest.mark.parametrize("cast", ["weights", "autocast"])
def test_kernels_get_one_dtype(cast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of queries and keys leave them in the dtype of the values, and the state is in that of the products."""
    model = tiny_model(tiny_config(qk_norm=True, **IN_TURN), torch.float32)
    tokens = random_tokens(model.config, 1, 12)
    expected = model(tokens).logits
    model = model.bfloat16() if cast == "weights" else model
    calls = recorded_calls(monkeypatch, attention_baka, "attend")
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        found = model(tokens, use_cache=True)
    assert {x.dtype for _, *vectors in calls for x in vectors[:3]} == {torch.bfloat16}
    assert {layer.keys.dtype for layer in found.past_key_values.layers} == {torch.bfloat16}
    assert_close(found.logits.float(), expected, rtol=0, atol=0.1 * expected.abs().max().item())
