"""Checkpoints as examples/train.py leaves them, tiny and untrained: folders that other programs load by themselves."""

from pathlib import Path
from typing import Any

import torch
from helpers import tiny_config, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from baka_hf import BakaForCausalLM

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token is a byte, but for the two special ones."""
    alphabet = [END_OF_TEXT, PADDING, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict(bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PADDING)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def save_checkpoint(folder: Path, chat_template: str | None = None, **overrides: Any) -> BakaForCausalLM:
    """Write a model in float32 that speaks printable ASCII, its weights large enough that memory shows, and its
    tokenizer; return it as it is read back."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48)  # enough for a varied text
    model = tiny_model(tiny_config(**sizes | special | overrides), torch.float32)
    printable = tokenizer.convert_tokens_to_ids([chr(code) for code in range(33, 127)])
    rest = [token for token in range(len(tokenizer)) if token not in printable]
    with torch.no_grad():
        model.lm_head.weight[rest] = 0  # of 94 logits one is greater than that
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()
