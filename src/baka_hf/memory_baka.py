"""What a chunk leaves to the next: how a memory is updated.

A memory of another kind is one class in `MEMORY_UPDATES`. What it declares to hold is carried, saved, reset, cropped
and recorded like everything else of a state. What a memory passes through on its way into a chunk is in
`solidifiers_baka`; how a state changes otherwise is never in here.
"""

import torch
from torch import nn

from .stream_baka import Memory


class BakaMemoryUpdate(nn.Module):
    """RMT's formula (arXiv 2207.06881): what a chunk has written is the memory of the next.

    Another update is a subclass. It may have parameters, and hold more than the memory vectors.
    """

    @staticmethod
    def state_shapes(num_memory_tokens: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """What it holds for each row, by name.

        All of it is zero for a row that has read nothing. In the place of "memory" its chunk reads the learned vectors.
        """
        return {"memory": (num_memory_tokens, hidden_size)}

    def forward(self, memory: Memory, written: torch.Tensor) -> Memory:
        """What `memory`, whose vectors the chunk has read, becomes after it has `written` [B, R, D]."""
        return memory | {"memory": written}


MEMORY_UPDATES: dict[str, type[BakaMemoryUpdate]] = {"replace": BakaMemoryUpdate}
