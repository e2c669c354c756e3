"""What a chunk leaves to the next: how a memory is updated.

A memory of another kind is one class and its name in `MEMORY_UPDATES`, which is what `config.memory_update` may be.
What it declares to hold is carried, saved, reset, cropped and recorded like everything else of a state. What a memory
passes through on its way into a chunk is in `solidifiers_baka`; how a state changes otherwise is never in here.
"""

from typing import Any

import torch
from torch import nn

Memory = dict[str, torch.Tensor]  # [B, …] each: what a memory holds, by the names of `state_shapes`


class BakaMemoryUpdate(nn.Module):
    """RMT's formula (arXiv 2207.06881): what a chunk has written is the memory of the next.

    Another update is a subclass. It may have parameters, and hold more than the memory vectors.
    """

    def __init__(self, config: Any):  # a BakaConfig
        super().__init__()

    @staticmethod
    def state_shapes(num_memory_tokens: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """What it holds for each row, by name, all in the state's dtype.

        All of it is zero for a row that has read nothing. In the place of "memory" its chunk reads the learned vectors.
        A `BakaCache` has it as attributes, so a name must be free there and in `state_files_baka.ROW_DTYPES`.
        """
        return {"memory": (num_memory_tokens, hidden_size)}

    def forward(self, memory: Memory, written: torch.Tensor) -> Memory:
        """What `memory`, whose vectors the chunk has read, becomes after it has `written` [B, R, D].

        Rows do not see each other, nothing is changed in place, and no number goes to the host. With `memory_norm`
        what was written is normed already.
        """
        return memory | {"memory": written}


MEMORY_UPDATES: dict[str, type[BakaMemoryUpdate]] = {"replace": BakaMemoryUpdate}
