"""What a chunk leaves to the next: how a memory is updated.

A memory of another kind is one class and its name in `MEMORY_UPDATES`, which is what `config.memory_update` may be.
What it declares to hold is carried, saved, reset, cropped and recorded like everything else of a state. What a memory
passes through on its way into a chunk is in `solidifiers_baka`; how a state changes otherwise is never in here.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

Memory = dict[str, torch.Tensor]  # [B, …] each: what a memory holds, by the names of `BakaMemoryUpdate.held`


class Held(NamedTuple):
    """A tensor that a state has for each row."""

    shape: tuple[int, ...]  # of one row
    in_float32: bool = False  # kept in float32 at least, whatever the model's dtype

    def dtype_in(self, dtype: torch.dtype) -> torch.dtype:
        """Its dtype in a state of `dtype`."""
        return torch.promote_types(dtype, torch.float32) if self.in_float32 else dtype

    def zeros(self, batch_size: int, device: torch.device | str | None, dtype: torch.dtype) -> torch.Tensor:
        """It in rows that have read nothing, in a state of `dtype`: [B, …]."""
        return torch.zeros(batch_size, *self.shape, device=device, dtype=self.dtype_in(dtype))


class BakaMemoryUpdate(nn.Module):
    """RMT's formula (arXiv 2207.06881): what a chunk has written is the memory of the next.

    Another update is a subclass. It may have parameters, and hold more than the memory vectors.
    """

    def __init__(self, config: Any):  # a BakaConfig
        super().__init__()

    @classmethod
    def held(cls, config: Any) -> dict[str, Held]:
        """What it holds for each row, by name; "memory", the vectors that a chunk reads, are [R, D].

        All of it is zero for a row that has read nothing. In the place of "memory" its chunk reads the learned vectors.
        A `BakaCache` has it as attributes, so a name must be free there and in `state_files_baka.ROW_DTYPES`.

        Args:
            config: a `BakaConfig`, or what a state knows of one: the fields in `state_files_baka.SIGNATURE_FIELDS`.
        """
        return {"memory": Held((config.num_memory_tokens, config.hidden_size))}

    def forward(self, memory: Memory, written: torch.Tensor) -> Memory:
        """What `memory`, whose vectors the chunk has read, becomes after it has `written` [B, R, D].

        Rows do not see each other, nothing is changed in place, and no number goes to the host. `memory` is in the
        dtypes it is kept in, which what is returned is brought to; `written` is in the model's. With `memory_norm` what
        was written is normed already.
        """
        return memory | {"memory": written}


MEMORY_UPDATES: dict[str, type[BakaMemoryUpdate]] = {"replace": BakaMemoryUpdate}
