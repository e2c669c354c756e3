"""When `generate` stops: on a GPU a step late, so that the host asks for the next while the device is at this one."""

from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any

import torch
from transformers import PrefixConstrainedLogitsProcessor
from transformers.generation.utils import DeferredStopCheck

from .cache_baka import BakaCache

# Where the host would otherwise wait for the device in every step.
DEVICES = ("cuda",)


class OneStepLate(DeferredStopCheck):
    """transformers' check that looks at a step's tokens when the next one has been asked for, for one text of ours.

    The step too many is undone. transformers records chunk boundaries to that end, which no graph of a static state can
    read past; here the step that would cross one waits instead, and all others can be undone as they are.
    """

    def __init__(
        self, input_ids: torch.Tensor, max_length: int, cache: Any, cache_is_returned: bool, streamer: Any = None
    ):
        super().__init__(input_ids, max_length, None, False, streamer)
        self.state = cache if cache_is_returned else None
        self.last: list[torch.Tensor] = []  # tokens of the last two steps

    @staticmethod
    def is_supported(device: torch.device, cache: Any, cache_is_returned: bool, is_assistant: bool) -> bool:
        if device.type not in DEVICES or not isinstance(cache, BakaCache):
            return DeferredStopCheck.is_supported(device, cache, cache_is_returned, is_assistant=is_assistant)
        # Which of several rows have ended has to be known before their next step. What a state records, it records of
        # a step too many as well.
        return cache.batch_size == 1 and not cache._is_recording and not is_assistant

    def __call__(self, unfinished_sequences: torch.Tensor, tokens: torch.Tensor, length: int) -> bool:
        self.last = [*self.last[-1:], tokens]
        if super().__call__(unfinished_sequences, tokens, length):
            return True
        state = self.state
        if state is None or (int(state._num_tokens) + 1) % state.chunk_size:
            return False
        should_stop, _, is_there = self.slots[1]
        is_there.synchronize()
        return bool(should_stop)

    def finish(self) -> int:
        count, state = super().finish(), self.state
        if count and state is not None:
            state._recent_ids = self.last[0][:, None]  # the token that was read too many: its hash is taken back
            state.crop(-1)
            state._recent_ids = None
        return count


def stopping_late(decode: Any) -> Callable:
    """transformers' own decoding method, that asks for our check where it would ask for its own.

    Processors and criteria that are not transformers' may not bear what comes after the end: with them it is as ever.
    """
    names = decode.__globals__ | {DeferredStopCheck.__name__: OneStepLate}
    late = FunctionType(decode.__code__, names, decode.__name__, decode.__defaults__, decode.__closure__)
    late.__kwdefaults__ = decode.__kwdefaults__

    @wraps(decode)
    def decode_late(self: Any, *args: Any, **kwargs: Any) -> Any:
        are_known = True
        for each in (*kwargs.get("logits_processor", ()), *kwargs.get("stopping_criteria", ())):
            is_own = type(each).__module__.startswith("transformers.")
            are_known &= is_own and not isinstance(each, PrefixConstrainedLogitsProcessor)
        return (late if are_known else decode)(self, *args, **kwargs)

    return decode_late
