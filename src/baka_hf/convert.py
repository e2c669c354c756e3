"""A decoder gets a memory: one of Llama's block, with its own weights, reads on as a BakaLLM.

    model = add_memory(AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M"), chunk_size=512)

    python -m baka_hf.convert HuggingFaceTB/SmolLM2-135M smollm2-with-memory --chunk_size 512

Names and weights stay as they are. What a source does not say of itself in its configuration, it says by the names of
its parameters, and a parameter that has no place here is refused.
"""

import argparse
import copy
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from .configuration_baka import BakaConfig
from .evaluation import in_eval_mode
from .modeling_baka import BakaForCausalLM

# The decoders of transformers that are this block and nothing else.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# The block, and by which name of a source's configuration we know a field of ours.
BLOCK: dict[str, Any] = dict(norm_type="rmsnorm", parallel_residual=False, residual_initializer_range=None)
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_act": "hidden_act",
    "layer_norm_eps": "rms_norm_eps",
    "initializer_range": "initializer_range",
    "rope_parameters": "rope_parameters",
    "tie_word_embeddings": "tie_word_embeddings",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A pause before each chunk is its sink, see `_sink_of`.
DEFAULTS: dict[str, Any] = dict(num_pause_tokens=1, memory_write="carry", memory_update="replace", memory_norm=True)
# Scale of memory vectors beside that of embeddings: norms of blocks, whose epsilon is more than their squares, leave
# them small, and blocks make of each another vector. Of equal ones each would take its share of attention.
QUIET = 0.01
# Parts that a source has where it has such a parameter.
PARTS = {
    "qk_norm": "model.layers.0.self_attn.q_norm.weight",
    "attention_bias": "model.layers.0.self_attn.q_proj.bias",
    "mlp_bias": "model.layers.0.mlp.gate_proj.bias",
}
# What other architectures have, by the fields that tell of it; for the message that refuses them.
OTHERS = {
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "attn_logit_softcapping": "soft-capped attention",
    "final_logit_softcapping": "soft-capped logits",
    "partial_rotary_factor": "RoPE for a part of each head",
    "no_rope_layers": "blocks without RoPE",
    "residual_multiplier": "scaled residuals",
    "logit_scale": "scaled logits",
    "layer_norm_eps": "LayerNorms",
    "layer_norm_epsilon": "LayerNorms",
}


def add_memory(model: Any, *, chunk_size: int, num_memory_tokens: int = 16, **fields: Any) -> BakaForCausalLM:
    """A BakaLLM of a decoder's weights. They are the source's tensors, not copies: what trains one trains the other.

    Dtype, device, mode, tied embeddings, token ids and generation config are the source's. One on the meta device gives
    a model there.

    Args:
        model: a causal language model of one of `MODEL_TYPES`.
        chunk_size: n, tokens of text in a chunk. A token sees the chunk before and its own: at most 2S slots (see
            `BakaConfig`), no more than the source was made to see.
        num_memory_tokens: R, memory vectors; 0 for none.
        fields: any others of `BakaConfig` that the source does not decide.

    Returns:
        The model. Without memory and pauses, a text of up to n tokens has the source's logits, and of a longer one
        those of the source when each token is shown no more than its own chunk so far and the whole one before.

    Raises:
        ValueError: the source is another architecture, or has a RoPE or a part that has no place here; it is quantized,
            has an adapter, or lies on several devices; it was not made to see 2S positions; or a field has a value that
            is not allowed, or is for the source to say.
    """
    given = dict(chunk_size=chunk_size, num_memory_tokens=num_memory_tokens, **fields)
    weights = _weights_of(model)
    config = _configure(model.config, weights, given)
    with torch.device("meta"):
        target = BakaForCausalLM(config).to(model.dtype)
    if config.attention_bias:  # Qwen2 has none here
        nothing = weights["model.norm.weight"].new_zeros(config.hidden_size)
        for index in range(config.num_hidden_layers):
            weights.setdefault(f"model.layers.{index}.self_attn.o_proj.bias", nothing.clone())
    missing, unexpected = target.load_state_dict(weights, strict=False, assign=True)
    if unexpected:
        raise ValueError(f"expected no parameters but those of Llama's block, got {', '.join(unexpected[:3])}.")
    target.tie_weights()
    for name, parameter in target.named_parameters():
        parameter._is_hf_initialized = name not in missing
    for name in missing:
        target.get_submodule(name.rpartition(".")[0]).to_empty(device=model.device, recurse=False)
    target.initialize_weights()
    if missing and model.device.type != "meta":
        _begin(target.model, model)
    target.generation_config = copy.deepcopy(model.generation_config)
    return target.train(model.training)


def _weights_of(model: Any) -> dict[str, torch.Tensor]:
    """The parameters by name, of a source that is not wrapped, packed or spread."""
    if hasattr(model, "merge_and_unload"):
        raise ValueError(
            f"expected a model without an adapter, got {type(model).__name__}: give what `merge_and_unload` gives."
        )
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    if model_type not in MODEL_TYPES:
        reasons = sorted({what for name, what in OTHERS.items() if getattr(config, name, None) is not None})
        raise ValueError(
            f"expected a decoder of Llama's block ({', '.join(MODEL_TYPES)}), got {model_type!r}"
            + (f", which has {', '.join(reasons)}." if reasons else ".")
        )
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.dtype not in DTYPES:
            raise ValueError(
                f"expected weights in {', '.join(map(str, DTYPES))}, got `{name}`, a {type(parameter).__name__} of "
                f"{parameter.dtype}: load the source without quantization, or call its `dequantize()`."
            )
        if parameter.device != model.device:
            raise ValueError(
                f"expected a source on one device, got {model.device} and, for `{name}`, {parameter.device}."
            )
    return model.state_dict()


@torch.no_grad()
def _begin(decoder: Any, source: Any) -> None:
    """First values for what is new, by which it disturbs a trained source as little as may be."""
    config = decoder.config
    with in_eval_mode(source):
        sink = _sink_of(source)
    if config.num_pause_tokens:
        decoder.pause_token.weight.copy_(sink.expand_as(decoder.pause_token.weight))
    if config.num_memory_tokens:
        quiet = QUIET * decoder.embed_tokens.weight.float().square().mean().sqrt().item()
        decoder.memory_tokens.weight.normal_(std=quiet)[0] = sink
        if config.memory_norm:
            decoder.memory_norm.weight.fill_(quiet)


def _sink_of(source: Any) -> torch.Tensor:
    """A vector [D] that a source takes for a text's first token, wherever it stands.

    Trained decoders lean on that token: its state becomes so large in some block that nothing that it reads changes it
    any more (arXiv 2402.17762), and attention that looks for nothing rests there (attention sinks, arXiv 2309.17453).
    An embedding in the middle of a text does not come to this. The token's own state, of a block before, does: it is
    the first that grows, where it stands behind other tokens, at least half of the way, in factors, from what an
    embedding there comes to, to what the first token does.
    """
    ids = source.config.eos_token_id if source.config.bos_token_id is None else source.config.bos_token_id
    first = torch.tensor([[ids[0] if isinstance(ids, list) else ids or 0]], device=source.device)
    states = source(first, output_hidden_states=True).hidden_states[:-1]  # the last one is normed
    candidates = torch.cat(states)  # [L, 1, D]
    others = torch.arange(1, 33, device=source.device) * (source.config.vocab_size // 33)
    text = source.get_input_embeddings()(others).expand(len(candidates), -1, -1)
    read = source(inputs_embeds=torch.cat([text, candidates], dim=1), output_hidden_states=True, logits_to_keep=1)
    reached = torch.stack([state[:, -1].float().norm(dim=-1) for state in read.hidden_states[:-1]]).amax(0)
    least = (reached[0] * candidates.float().norm(dim=-1).max()).sqrt().clamp(max=reached.max())
    return candidates[(reached >= least).int().argmax(), 0]


def _configure(source: Any, weights: Mapping[str, torch.Tensor], given: dict[str, Any]) -> BakaConfig:
    """What the source's configuration and its parameters say, and what is given beside."""
    said = {field: getattr(source, name) for field, name in FIELDS.items() if hasattr(source, name)}
    said |= BLOCK | {field: name in weights for field, name in PARTS.items()} | {"value_residual": False}
    if decided := said.keys() & given.keys():
        raise ValueError(f"expected no field that the source decides, got {', '.join(sorted(decided))}.")
    config = BakaConfig(**said | DEFAULTS | given)
    if unknown := [name for name in given if not hasattr(BakaConfig, name)]:
        raise ValueError(f"expected fields of BakaConfig, got {', '.join(unknown)}.")
    config._name_or_path = source._name_or_path
    window = getattr(source, "sliding_window", None) or source.max_position_embeddings
    seen, most = 2 * config.stream_length, min(window, source.max_position_embeddings)
    if seen > most:
        raise ValueError(
            f"`chunk_size` must be such that two streams, {seen} positions, are within the {most} that the source was "
            f"made to see, got {config.chunk_size}."
        )
    return config


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m baka_hf.convert`."""
    parser = argparse.ArgumentParser(
        prog="python -m baka_hf.convert", description="Give a decoder a memory: its checkpoint becomes a BakaLLM's."
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder or Hub name of a Llama, Mistral, Qwen2, Qwen3 or SmolLM2")
    add("target", metavar="TARGET", type=Path, help="folder for the new checkpoint, which is not there yet")
    add("--chunk_size", type=int, required=True, help="tokens of text in a chunk")
    add("--num_memory_tokens", type=int, default=16, help="memory vectors (default: %(default)s)")
    add("--fields", type=json.loads, default={}, help='other fields of BakaConfig, {"num_pause_tokens": 4}')
    add("--dtype", default="auto", help="float32, bfloat16, ... (default: the source's)")
    args = parser.parse_args(arguments)
    if args.target.exists():
        sys.exit(f"error: TARGET must not be there yet, got {args.target}.")
    try:
        sizes = dict(chunk_size=args.chunk_size, num_memory_tokens=args.num_memory_tokens)
        if not isinstance(args.fields, dict) or sizes.keys() & args.fields.keys():
            raise ValueError(
                f"--fields: expected an object of fields without {' and '.join(sizes)}, got {args.fields!r}."
            )
        if args.dtype != "auto" and not isinstance(getattr(torch, args.dtype, None), torch.dtype):
            raise ValueError(f"--dtype: expected auto or a dtype of PyTorch's, got {args.dtype!r}.")
        source = AutoModelForCausalLM.from_pretrained(args.source, dtype=args.dtype)
        tokenizer = AutoTokenizer.from_pretrained(args.source)
        model = add_memory(source, **sizes, **args.fields)
        model.save_pretrained(args.target)
        tokenizer.save_pretrained(args.target)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    number, new = model.num_parameters(), model.num_parameters() - source.num_parameters()
    print(f"{args.target}: {number:,} parameters, of which {new:,} are new")


__all__ = ["add_memory"]

if __name__ == "__main__":
    main()
