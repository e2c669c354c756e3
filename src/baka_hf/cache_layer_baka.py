"""Keys and values of one block of a state, and how a span's are written among them."""

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from .stream_baka import Placement


class BakaCacheLayer(CacheLayerMixin):
    """Keys and values of one block, [B, num_key_value_heads, 2S, head_dim] (S slots with `use_xl_cache=False`).

    Where tokens write associations also its normed inputs [B, n, D], of the text of the chunk in progress: from these
    follows what they will write.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    keys: torch.Tensor
    values: torch.Tensor
    inputs: torch.Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True
        # An autograd graph may hold on to these very tensors: copy before writing in place.
        self.is_shared = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the slots exist from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, placement: Placement, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a span's keys and values [B, H, Q, head_dim] in place; return all that its queries may look at.

        From then on `inputs` may be written in place as well.
        """
        if self.keys.shape[1] != key_states.shape[1] and not (self.keys.any() or self.values.any()):
            # Under tensor parallelism each process has its share of the heads.
            heads = key_states.shape[1]
            self.keys, self.values = self.keys[:, :heads].clone(), self.values[:, :heads].clone()
        self.make_writable(key_states)
        if placement.slots is None or placement.valid is None:
            self.keys[:, :, placement.start : placement.stop] = key_states
            self.values[:, :, placement.start : placement.stop] = value_states
            visible = slice(placement.first, placement.stop)
            return self.keys[:, :, visible], self.values[:, :, visible]
        index = placement.slots.expand_as(key_states)
        self.keys.scatter_(2, index, torch.where(placement.valid, key_states, self.keys.gather(2, index)))
        self.values.scatter_(2, index, torch.where(placement.valid, value_states, self.values.gather(2, index)))
        return self.keys, self.values

    def make_writable(self, like: torch.Tensor) -> None:
        """Have tensors that may be written in place, on the device and in the dtype of `like`."""
        self.keys, self.values = self._writable(self.keys, like), self._writable(self.values, like)
        if self.inputs is not None:
            self.inputs = self._writable(self.inputs, like)
        self.is_shared = False

    def _writable(self, buffer: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if buffer.device != like.device or buffer.dtype != like.dtype:
            return buffer.detach().to(device=like.device, dtype=like.dtype)
        if self.is_shared or buffer.requires_grad or (buffer.is_inference() and not torch.is_inference_mode_enabled()):
            return buffer.detach().clone()
        return buffer

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        """How many slots there are: how much was read is not a layer's to know, see `BakaCache.get_seq_length`."""
        return self.keys.shape[2]

    def get_max_length(self) -> int:
        return -1
