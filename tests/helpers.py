"""What tests share: tiny models of every kind, texts and states for them, tokenizers.

The models are small enough to be read naively, and their weights large enough that every part shows in the logits.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import Reading, read
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch._dynamo.utils import counters
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast, TrainingArguments

from baka_hf import BakaCache, BakaConfig, BakaForCausalLM

# Of three pairs of features the first turns as ever, the second somewhat more slowly, the third by the whole factor.
LLAMA3 = dict(rope_type="llama3", rope_theta=50.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=48)

# Every field of a config, each where it shows. By default the pauses do not divide the chunk.
CONFIGS: dict[str, dict[str, Any]] = {
    "pristine": dict(hidden_act="silu", num_memory_tokens=0, num_pause_tokens=0, use_xl_cache=False),
    "elephant": dict(num_memory_tokens=0, num_pause_tokens=0, use_xl_cache=False),
    "xl": dict(num_memory_tokens=0, num_pause_tokens=0),
    "pause": dict(num_memory_tokens=0),
    "pause_without_xl": dict(num_memory_tokens=0, use_xl_cache=False),
    "rmt_tokens": dict(memory_write="tokens"),
    "rmt_carry": dict(),
    "default": dict(hidden_act="silu", qk_norm=True, memory_norm=True),
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
    "gate": dict(memory_update="gate", memory_norm=True, num_memory_tokens=3),
    "gate_for_tokens": dict(
        memory_update="gate", memory_norm=True, memory_write="tokens", memory_solidifier="glu", use_xl_cache=False
    ),
    "one_memory_token": dict(num_memory_tokens=1),
    "more_memory_than_text": dict(num_memory_tokens=40, chunk_size=2, num_pause_tokens=1),
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
    "associations_of_memory": dict(associative_dim=3, memory_norm=True),
    "associations_of_tokens": dict(
        **dict(associative_dim=3, associative_write="tokens", associative_layer_interval=2, num_hidden_layers=3),
        num_memory_tokens=0,
    ),
    "associations_of_tokens_and_memory": dict(
        **dict(associative_dim=4, associative_write="tokens", use_xl_cache=False, chunk_size=7),
        **dict(associative_gate="hard_sigmoid", associative_write_cost=0.5),
        **dict(norm_type="rmsnorm", parallel_residual=False, num_attention_heads=4, num_key_value_heads=2, head_dim=4),
    ),
    "block_of_llama": dict(norm_type="rmsnorm", parallel_residual=False, hidden_act="silu", rope_parameters=LLAMA3),
    "block_of_qwen3": dict(
        **dict(norm_type="rmsnorm", parallel_residual=False, qk_norm=True, layer_norm_eps=0.01, memory_norm=True),
        **dict(memory_solidifier="layer", head_dim=8, num_attention_heads=4, num_key_value_heads=2),
    ),
    "side_by_side_with_biases": dict(
        **dict(qk_norm=True, attention_bias=True, mlp_bias=True, memory_solidifier="mlp"),
        rope_parameters={"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0},
    ),
    "value_residual": dict(
        value_residual=True, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=4
    ),
    "value_residual_in_turn": dict(
        value_residual=True, qk_norm=True, parallel_residual=False, memory_solidifier="layer"
    ),
    "in_turn_with_biases": dict(
        parallel_residual=False, attention_bias=True, memory_solidifier="layer", separate_solidifiers=True
    ),
}
every_config = pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)

# The configs whose states differ in kind.
STATES = {
    "pristine": CONFIGS["pristine"],
    "xl": CONFIGS["xl"],
    "carry": CONFIGS["rmt_carry"],
    "without_xl": CONFIGS["rmt_without_xl"],
    "layer_separate": CONFIGS["layer_separate"],
    "grouped_queries": CONFIGS["grouped_queries"],
    "associations_of_memory": CONFIGS["associations_of_memory"],
    "associations_of_tokens": CONFIGS["associations_of_tokens"],
    "random_pauses": dict(pause_placement="random", num_pause_tokens=3),
}
every_state = pytest.mark.parametrize("overrides", STATES.values(), ids=STATES)

CLOSE = dict(rtol=1e-9, atol=1e-9)  # float64, added up in another order

# transformers 5.23 calls activation checkpointing by its name; 5.17 knows only the old one.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)


def tiny_config(**overrides: Any) -> BakaConfig:
    """Two layers, D = 12, chunks of 5 with 2 pauses that do not divide them, 2 memory tokens; the diary's blocks."""
    fields: dict[str, Any] = dict(
        vocab_size=19,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        chunk_size=5,
        num_memory_tokens=2,
        num_pause_tokens=2,
        hidden_act="elephant",
        qk_norm=False,
        value_residual=False,
        memory_norm=False,
        residual_initializer_range=None,
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


@torch.no_grad()
def logits_of(model: BakaForCausalLM, tokens: Tensor, cache: BakaCache | None = None, **arguments: Any) -> Tensor:
    return model(tokens, cache=cache, use_cache=cache is not None, **arguments).logits


def rows_out_of_phase(model: BakaForCausalLM, *lengths: int) -> tuple[list[Tensor], BakaCache]:
    """Texts of these lengths, and the state after reading them left-padded."""
    texts = [random_tokens(model.config, length, seed=row) for row, length in enumerate(lengths)]
    tokens = torch.ones(len(lengths), max(lengths), dtype=torch.int64)
    for row, text in enumerate(texts):
        tokens[row, max(lengths) - len(text) :] = text
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    cache = model.new_cache(len(lengths))
    logits_of(model, tokens, cache, attention_mask=mask)
    return texts, cache


def state_at(model: BakaForCausalLM, stage: str) -> BakaCache:
    """A state of two rows: fresh, seeded, mid-chunk, at a boundary, or with rows out of phase."""
    if stage == "seeded":
        memory = 3 * torch.randn(2, model.config.num_memory_tokens, model.config.hidden_size)
        return model.new_cache(2, memory=memory)
    if stage == "left-padded":
        return rows_out_of_phase(model, 4, 11)[1]
    cache = model.new_cache(2)
    if stage != "fresh":
        logits_of(model, random_tokens(model.config, 2, {"mid-chunk": 12, "boundary": 10}[stage]), cache)
    return cache


def contents(value: Any) -> Any:
    """All that a state holds, bit for bit, as plain values that can be compared."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.tolist()
    if isinstance(value, dict):
        return {key: contents(item) for key, item in value.items() if key not in ("is_shared", "_is_user_defined")}
    if isinstance(value, list | tuple):
        return [contents(item) for item in value]
    return contents(vars(value)) if hasattr(value, "__dict__") else value


def forget_and_go_on(model: BakaForCausalLM, texts: list[Tensor], cache: BakaCache, count: int) -> None:
    """Crop `count` positions; the rest of these texts and what follows must be as if they had never been read."""
    more = random_tokens(model.config, len(texts), model.config.chunk_size + 4, seed=7)
    cache.crop(-count)
    kept = [text[: len(text) - count] for text in texts]
    assert cache.num_tokens.tolist() == [len(text) for text in kept]
    found = logits_of(model, more, cache)
    for row, text in enumerate(kept):
        expected = logits_of(model, torch.cat([text, more[row]])[None])[0, len(text) :]
        assert_close(found[row], expected, **CLOSE, msg=lambda m, row=row: f"crop(-{count}), row {row}: {m}")


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


def naive_head(model: Any, tokens: Tensor, layer: str) -> Tensor:
    """What a head, a linear layer without bias, makes of one document [T] that is read naively: [T, outputs]."""
    with torch.no_grad():
        weights = model.state_dict() | {"lm_head.weight": getattr(model, layer).weight}
        return read(model.config, weights, tokens.tolist()).logits


def byte_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer without training: a token is a byte, ids 0 … 255, and `special_tokens` such as `eos_token` follow."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word for each of the 19 ids, the first one for padding."""
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(19)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", padding_side="left")


def checkpoint_activations(model: BakaForCausalLM, granularity: str = "layer", **arguments: Any) -> None:
    """Under the name that this version of transformers has for it."""
    getattr(model, f"{CHECKPOINTING}_enable")({"granularity": granularity, **arguments})


def num_programs() -> int:
    return counters["stats"]["unique_graphs"]


def run_script(script: str, home: Path, *arguments: Any) -> None:
    """Run a script in a process of its own, with a Hugging Face home of its own and nothing of this one's paths."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, *map(str, arguments)],
        env=variables | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def snippet(card: str) -> str:
    """The code that a model card shows."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    return code
