"""What a call may hold: ids or embeddings, mask, positions and state, checked before anything is read."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from .cache_baka import BakaCache
from .configuration_baka import BakaConfig
from .functions_baka import as_tensor
from .state_files_baka import check_signature, check_state, signature_of


@runtime_checkable
class ArrayLike(Protocol):
    """A tensor, or an array of numpy, which is not imported here."""

    def __array__(self) -> Any: ...


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


def check_tensors(**arguments: Any) -> None:
    """Raise a `ValueError` if one of a call's arguments is something else than a tensor."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise ValueError(f"expected `{name}` to be a tensor, got {type(value).__name__}.")


def check_ids(input_ids: torch.Tensor) -> None:
    is_integer = not (input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool)
    if input_ids.ndim != 2 or not is_integer:
        raise ValueError(
            f"expected `input_ids` to be integers of shape [batch, length], got {input_ids.dtype} "
            f"of shape {tuple(input_ids.shape)}."
        )


def check_text(
    config: BakaConfig, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> tuple[int, int]:
    """B and L of a call's text."""
    if torch.jit.is_tracing():
        raise ValueError(
            "expected a call, got `torch.jit.trace`: how a text is cut into chunks depends on its length, and a trace "
            "would give wrong logits at any other. `torch.compile` knows it."
        )
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("expected exactly one of `input_ids` and `inputs_embeds`.")
    if input_ids is not None:
        check_ids(input_ids)
        shape = input_ids.shape
    else:
        assert inputs_embeds is not None
        shape = inputs_embeds.shape
        if len(shape) != 3 or shape[2] != config.hidden_size or not inputs_embeds.is_floating_point():
            raise ValueError(
                f"expected `inputs_embeds` to be floats of shape [batch, length, {config.hidden_size}], got "
                f"{inputs_embeds.dtype} of shape {tuple(shape)}."
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
    return tensor.device.type == "cpu" or (tensor.shape[-1] > 1 and not torch.is_grad_enabled())


def check_targets(targets: torch.Tensor, number: int, ignored: int) -> None:
    """That labels are token ids or classes, of a `number`, or `ignored`; values are looked at on a CPU alone."""
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"expected labels to be token ids or classes, integers, got {targets.dtype}.")
    if targets.device.type == "cpu" and can_look_at(targets):
        wrong = targets[(targets != ignored) & ((targets < 0) | (targets >= number))]
        if len(wrong):
            raise ValueError(f"expected labels from 0 to {number - 1}, or {ignored} for none, got {int(wrong[0])}.")


def check_positions(batch_size: int, **positions: torch.Tensor | None) -> None:
    """That positions [B] are given all or none; values are looked at on a CPU alone."""
    if all(value is None for value in positions.values()):
        return
    for name, value in positions.items():
        if value is None:
            raise ValueError(f"expected {' and '.join(f'`{each}`' for each in positions)}, got no `{name}`.")
        if value.dtype not in (torch.int32, torch.int64) or value.shape != (batch_size,):
            raise ValueError(
                f"expected `{name}` to be integers of shape {[batch_size]}, got {value.dtype} of shape "
                f"{list(value.shape)}."
            )
        if value.device.type == "cpu" and can_look_at(value) and bool((value < 0).any()):
            raise ValueError(f"expected `{name}` of at least 0, got {int(value.min())}.")


def check_kept(logits_to_keep: Any, length: int) -> None:
    """That `logits_to_keep` is a number of positions, or a tensor of some of the `length` there are."""
    if isinstance(logits_to_keep, int):
        if logits_to_keep < 0:
            raise ValueError(f"expected `logits_to_keep` of at least 0, got {logits_to_keep}.")
        return
    is_tensor = isinstance(logits_to_keep, torch.Tensor)
    if not is_tensor or logits_to_keep.ndim != 1 or logits_to_keep.dtype not in (torch.int32, torch.int64):
        got = f"{logits_to_keep.dtype} of shape {list(logits_to_keep.shape)}" if is_tensor else repr(logits_to_keep)
        raise ValueError(f"expected `logits_to_keep` to be an integer or a 1-D tensor of positions, int64, got {got}.")
    if len(logits_to_keep) and can_look_at(logits_to_keep):
        least, most = (int(value) for value in torch.aminmax(logits_to_keep))
        if least < -length or most >= length:
            wrong = least if least < -length else most
            raise ValueError(f"expected `logits_to_keep` from {-length} to {length - 1}, got {wrong}.")


def check_kind(cache: BakaCache | None, use_cache: bool | None) -> None:
    """That a state is one, and wanted."""
    if cache is None:
        return
    check_state("the state", cache)
    if use_cache is False:
        raise ValueError("expected no state with `use_cache=False`: a state can only go forward.")


def check_cache(model: Any, cache: BakaCache | None, batch_size: int, within_beam_search: bool = False) -> None:
    """That a state is one which `model`, a `BakaModel`, can read on from with so many rows."""
    check_kind(cache, None)
    if cache is None:
        return
    cache.check_whole()
    if cache._reader is None or cache._reader.model() is not model:  # else it was looked at before
        check_signature(cache.signature, signature_of(model.config))
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
    """The mask [B, L] of this call's tokens that are in the stream; of several tokens its values are looked at, where
    looking costs little."""
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[0] != batch_size or mask.shape[1] not in (length, fed + length):
        expected = f"[{batch_size}, {length}]" + (f" or [{batch_size}, {fed + length}]" if fed else "")
        raise ValueError(f"expected an `attention_mask` of shape {expected}, got {list(mask.shape)}.")
    mask = mask[:, -length:]
    real = mask != 0
    if mask.dtype != torch.bool and length > 1 and can_look_at(mask):
        wrong = mask[real & (mask != 1)]
        if len(wrong):
            raise ValueError(f"expected an `attention_mask` of 0 and 1, got {wrong[0].item()}.")
    return real


def positions_of(position_ids: Any, batch_size: int) -> torch.Tensor:
    """`position_ids` [B or 1, L], a tensor of integers or an array of numpy, as a tensor [B, L], int64."""
    if not isinstance(position_ids, ArrayLike):
        kind = type(position_ids).__name__
        raise ValueError(f"expected `position_ids` to be a tensor, or an array of numpy, got {kind}.")
    positions = as_tensor(position_ids, "`position_ids` to be a tensor, or an array that PyTorch takes")
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise ValueError(f"expected `position_ids` to be integers, got {positions.dtype}.")
    if positions.ndim != 2 or positions.shape[0] not in (1, batch_size):
        raise ValueError(f"expected `position_ids` of shape [{batch_size}, length], got {list(positions.shape)}.")
    return positions.long().expand(batch_size, -1)


def find_restarts(position_ids: Any, batch_size: int, length: int, real: torch.Tensor | None) -> torch.Tensor | None:
    """[B, L] bool, the tokens with which a new text begins inside a row, or None if there are none. They lie where
    `position_ids` do, a tensor or an array of numpy; with `real`, where that does."""
    if position_ids is None:
        return None
    positions = positions_of(position_ids, batch_size)
    if real is not None:
        positions = positions.to(real.device)
    if positions.shape[1] != length:
        raise ValueError(f"expected `position_ids` of shape [{batch_size}, {length}], got {list(position_ids.shape)}.")
    if length == 1:
        return None
    columns = torch.arange(length, device=positions.device).expand(batch_size, -1)
    # The column of the real token before each, -1 for none. What is not in the stream may be counted, or not.
    reals = columns if real is None else columns.masked_fill(~real, -1)
    before = nn.functional.pad(reals.cummax(1).values[:, :-1], (1, 0), value=-1)
    step = positions - positions.gather(1, before.clamp(min=0))
    goes_on = (positions != 0) & ((step == 1) | (step == columns - before))
    restarts = (reals >= 0) & (before >= 0) & ~goes_on
    return restarts if bool(restarts.any()) else None


def find_alone(restarts: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor | None:
    """[B, L] bool, the texts of one token that another text follows in this call, or None if there are none."""
    length = restarts.shape[1]
    columns = torch.arange(length, device=restarts.device).expand(restarts.shape)
    reals = columns if real is None else columns.masked_fill(~real, length)
    following = nn.functional.pad(reals.flip(1).cummin(1).values.flip(1), (0, 1), value=length)[:, 1:]
    alone = restarts & nn.functional.pad(restarts, (0, 1)).gather(1, following)
    return alone if bool(alone.any()) else None
