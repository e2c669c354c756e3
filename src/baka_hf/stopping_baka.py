"""When `generate` stops: on a GPU a step late, so that the host asks for the next while the device is at this one."""

from types import FunctionType
from typing import Any

import torch
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
        # Which of several rows have ended has to be known before their next step.
        return cache.batch_size == 1 and not is_assistant

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
            kept = state._recent_ids
            state._recent_ids = self.last[0][:, None] if kept is None else kept  # so that its hash can go back
            state.crop(-1)
            state._recent_ids = None if kept is None else state._recent_ids
        return count


def stopping_late(decode: Any) -> Any:
    """transformers' own decoding method, that asks for our check where it would ask for its own."""
    names = decode.__globals__ | {DeferredStopCheck.__name__: OneStepLate}
    return FunctionType(decode.__code__, names, decode.__name__, decode.__defaults__, decode.__closure__)
