"""What a call may hold: ids or embeddings, mask, positions and state, checked before anything is read."""

from typing import Any

import torch

from .cache_baka import BakaCache, check_signature, signature_of
from .configuration_baka import BakaConfig


def either_name(past_key_values: BakaCache | None, cache: BakaCache | None) -> BakaCache | None:
    """The state that a call was given under one of its names."""
    if past_key_values is not None and cache is not None and cache is not past_key_values:
        raise ValueError("expected one state, got another one as `cache` than as `past_key_values`.")
    return past_key_values if cache is None else cache


def state_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> BakaCache | None:
    """The state among a call's arguments, by its own account: remote code has a class of its own."""
    for value in (kwargs.get("past_key_values"), kwargs.get("cache"), *args):
        if value is not None and hasattr(value, "go_back"):
            return value
    return None


def check_text(
    config: BakaConfig, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> tuple[int, int]:
    """B and L of a call's text."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("expected exactly one of `input_ids` and `inputs_embeds`.")
    if input_ids is not None:
        if input_ids.ndim != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise ValueError(
                f"expected `input_ids` to be integers of shape [batch, length], got {input_ids.dtype} "
                f"of shape {tuple(input_ids.shape)}."
            )
        shape = input_ids.shape
    else:
        assert inputs_embeds is not None
        shape = inputs_embeds.shape
        if len(shape) != 3 or shape[2] != config.hidden_size:
            raise ValueError(
                f"expected `inputs_embeds` of shape [batch, length, {config.hidden_size}], got {tuple(shape)}."
            )
    if shape[0] == 0 or shape[1] == 0:
        raise ValueError(f"expected at least one row and one token, got an input of shape {tuple(shape)}.")
    if input_ids is not None and can_look_at(input_ids):
        least, most = (int(value) for value in torch.aminmax(input_ids))
        if least < 0 or most >= config.vocab_size:
            raise ValueError(
                f"expected token ids from 0 to {config.vocab_size - 1}, got {least if least < 0 else most}."
            )
    return shape[0], shape[1]


def can_look_at(tensor: torch.Tensor) -> bool:
    """Looking costs nothing on the CPU; on an accelerator it waits for the device, so only for prompts."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or (tensor.shape[1] > 1 and not torch.is_grad_enabled())


def check_cache(model: Any, cache: BakaCache | None, batch_size: int, within_beam_search: bool = False) -> None:
    """That a state is one which `model`, a `BakaModel`, can read on from with so many rows."""
    if cache is None:
        return
    # By its own account, not by isinstance: a checkpoint's remote code has a class of its own.
    signature = getattr(cache, "signature", None)
    if signature is None or not hasattr(cache, "memory"):
        raise ValueError(f"expected `past_key_values` to be a BakaCache (see `new_cache`), got {type(cache).__name__}.")
    cache.check_whole()
    if cache._reader is None or cache._reader.model() is not model:  # else it was looked at before
        check_signature(signature, signature_of(model.config))
    if cache.batch_size != batch_size:
        raise ValueError(
            f"expected a state of batch size {batch_size}, got one of {cache.batch_size}; "
            "`batch_repeat_interleave` and `batch_select_indices` change it."
        )
    if cache._is_beam_search and not within_beam_search:
        raise ValueError(
            "expected a state that belongs to its rows' texts: beam search left this one with the state of its "
            "running beams, not of the sequences it returned."
        )


def check_mask(mask: torch.Tensor | None, batch_size: int, length: int, fed: int) -> torch.Tensor | None:
    """The mask [B, L] of this call's tokens that are in the stream."""
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[0] != batch_size or mask.shape[1] not in (length, fed + length):
        expected = f"[{batch_size}, {length}]" + (f" or [{batch_size}, {fed + length}]" if fed else "")
        raise ValueError(f"expected an `attention_mask` of shape {expected}, got {list(mask.shape)}.")
    return mask[:, -length:] != 0


def find_restarts(
    position_ids: torch.Tensor | None, batch_size: int, length: int, real: torch.Tensor | None
) -> torch.Tensor | None:
    """[B, L] bool, the tokens with which a new text begins inside a row, or None if there are none."""
    if position_ids is None:
        return None
    if position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch_size) or position_ids.shape[1] != length:
        raise ValueError(f"expected `position_ids` of shape [{batch_size}, {length}], got {list(position_ids.shape)}.")
    if length == 1:
        return None
    zeros = (position_ids == 0).expand(batch_size, length)
    if real is None:
        restarts = zeros.clone()
        restarts[:, 0] = False
    else:
        restarts = zeros & real & (real.cumsum(1) > 1)
    return restarts if bool(restarts.any()) else None
