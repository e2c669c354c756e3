"""What a chunk leaves to the next: how a memory is updated.

A memory of another kind is one class and its name, which `config.memory_update` may then be (`register_memory`).
What it declares to hold is carried, saved, reset, cropped and recorded like everything else of a state. What a memory
passes through on its way into a chunk is in `solidifiers_baka`; how a state changes otherwise is never in here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .parts_baka import register

Memory = dict[str, torch.Tensor]  # [B, …] each: what a memory holds, by the names of `BakaMemoryUpdate.held`


class Held(NamedTuple):
    """A tensor that a state has for each row."""

    shape: tuple[int, ...]  # of one row
    in_float32: bool = False  # kept in float32 at least, whatever the model's dtype

    def dtype_in(self, dtype: torch.dtype) -> torch.dtype:
        """Its dtype in a state of `dtype`."""
        return torch.float32 if self.in_float32 and dtype != torch.float64 else dtype

    def zeros(self, batch_size: int, device: torch.device | str | None, dtype: torch.dtype) -> torch.Tensor:
        """It in rows that have read nothing, in a state of `dtype`: [B, …]."""
        return torch.zeros(batch_size, *self.shape, device=device, dtype=self.dtype_in(dtype))


class BakaMemoryUpdate(nn.Module):
    """RMT's formula (arXiv 2207.06881): what a chunk has written is the memory of the next.

    Another update is a subclass. It may have parameters, and hold more than the memory vectors.
    """

    needs_norm = False  # of what is written, by `memory_norm`; m_0 is then drawn with a norm's std of 1

    def __init__(self, config: Any):  # a BakaConfig
        super().__init__()

    def reset_parameters(self) -> None:
        """Give parameters of its own their first values, after those of its parts; by `transformers.initialization`,
        which passes over what was loaded."""

    @classmethod
    def held(cls, config: Any) -> dict[str, Held]:
        """What it holds for each row, by name; "memory", the vectors that a chunk reads, are [R, D].

        All of it is zero for a row that has read nothing. In the place of "memory" its chunk reads the learned vectors.
        A `BakaCache` has it as attributes, so a name must be free there and in `state_files_baka.rows_known`.

        Args:
            config: a `BakaConfig`, or what a state knows of one: the fields in `state_files_baka.SIGNATURE_FIELDS`.
        """
        # Normed, vectors differ by little from chunk to chunk: half precision would give many of their numbers twice.
        return {"memory": Held((config.num_memory_tokens, config.hidden_size), in_float32=config.memory_norm)}

    def forward(self, memory: Memory, written: torch.Tensor) -> Memory:
        """What `memory`, whose vectors the chunk has read, becomes after it has `written` [B, R, D].

        Rows do not see each other, nothing is changed in place, and no number goes to the host. `memory` is in the
        dtypes it is kept in, which what is returned is brought to, and `written` in that of the vectors. With
        `memory_norm` what was written is normed already, and both are in float32 at least.
        """
        return memory | {"memory": written}


class BakaGatedMemoryUpdate(BakaMemoryUpdate):
    """A moving average with a learned gate (the input gate of an LSTM tied to its forget gate), which holds:

        g = σ(W written + b)    m ← g ⊙ m + (1 - g) ⊙ written

    Each number of m is between the least and the greatest of what it was and of all that was written since. What is
    written is normed (`memory_norm`): LayerNorm gives no number beyond |w| √(D - 1) + |c|, with its weight w and bias c
    there, and RMSNorm none beyond |w| √D. So after any number of chunks

        |m| ≤ max(|m_0|, |w| √(D - 1) + |c|)

    in each number, and as a norm's vectors have rms 1, m has at most about that.

    At first W is 0 and b goes from 0 to 3 over the R vectors: 1 - g is from 1/2 to 1/21, so some vectors keep a thing
    for 2 chunks and others for 21. Such small changes are less than half precision can add: m is kept, and the mean
    taken, in float32. m_0 is drawn with std 1. It leaves a slow vector over many chunks, so at any other scale m
    would grow or shrink for that long, and a model would meet chunks unlike any that it was trained on. It is also the
    part by which the R vectors differ, and embeddings' std of 0.02 is little in a sum with what blocks add.
    """

    needs_norm = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.gate_bias = nn.Parameter(torch.empty(config.num_memory_tokens, config.hidden_size))

    def reset_parameters(self) -> None:
        init.zeros_(self.gate_proj.weight)
        num_vectors, hidden_size = self.gate_bias.shape
        init.copy_(self.gate_bias, torch.linspace(0, 3, num_vectors)[:, None].expand(-1, hidden_size))

    def forward(self, memory: Memory, written: torch.Tensor) -> Memory:
        vectors = memory["memory"]
        gate = self.gate_proj(written.to(self.gate_bias.dtype)).to(vectors) + self.gate_bias.to(vectors)
        return {"memory": torch.lerp(written, vectors, gate.sigmoid())}


MEMORY_UPDATES: dict[str, type[BakaMemoryUpdate]] = {"replace": BakaMemoryUpdate, "gate": BakaGatedMemoryUpdate}


def register_memory(name: str) -> Callable[[type[BakaMemoryUpdate]], type[BakaMemoryUpdate]]:
    """A decorator for a class that `memory_update="name"` then stands for, a subclass of `BakaMemoryUpdate`.

    Raises:
        ValueError: the class is none, or the name is another's.
    """
    return register("memory_update", name, MEMORY_UPDATES, (BakaMemoryUpdate,))


def memory_held(config: Any) -> dict[str, Held]:
    """What the `memory_update` of a configuration holds for each row, by name.

    Raises:
        ValueError: it declares no "memory" [R, D], or something that is no `Held` under a name of Python's.
    """
    update = MEMORY_UPDATES[config.memory_update]
    held, vectors = update.held(config), (config.num_memory_tokens, config.hidden_size)
    if not all(isinstance(each, Held) and name.isidentifier() for name, each in held.items()):
        raise ValueError(f"expected {update.__name__}.held to give a `Held` of each name, got {held!r}.")
    if "memory" not in held or held["memory"].shape != vectors:
        raise ValueError(f'expected {update.__name__}.held to have a "memory" of shape {vectors}, got {held!r}.')
    return held


def check_updated(update: nn.Module, before: Memory, after: Memory) -> None:
    """Raise a `ValueError` unless an update has given of all that it holds what the next chunk finds."""
    found, expected = ({name: list(x.shape) for name, x in memory.items()} for memory in (after, before))
    if found != expected:
        raise ValueError(f"expected {type(update).__name__} to give tensors {expected}, got {found}.")
