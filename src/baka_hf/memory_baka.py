"""What a chunk leaves to the next: how a memory is updated, and the solidifiers it is read through.

A memory of another kind is one class in `MEMORY_UPDATES`. What it declares to hold is carried, saved, reset, cropped
and recorded like everything else of a state. What a chunk's blocks compute is never in here.
"""

import torch
from torch import nn

from .configuration_baka import BakaConfig
from .functions_baka import ElephantActivation, rotary_table_of
from .layers_baka import BakaDecoderLayer, BakaMLP
from .stream_baka import Memory, Placement, View


class BakaMemoryUpdate(nn.Module):
    """RMT's formula (arXiv 2207.06881): what a chunk has written is the memory of the next.

    Another update is a subclass. It may have parameters, and hold more than the memory vectors.
    """

    @staticmethod
    def state_shapes(config: BakaConfig) -> dict[str, tuple[int, ...]]:
        """What it holds for each row, by name. All of it is zero for a row that has read nothing; "memory" alone, what
        a chunk reads, is then the learned vectors."""
        return {"memory": (config.num_memory_tokens, config.hidden_size)}

    def forward(self, memory: Memory, written: torch.Tensor) -> Memory:
        """What `memory` becomes, whose vectors the chunk has read, after it has `written` [B, R, D]."""
        return memory | {"memory": written}


MEMORY_UPDATES: dict[str, type[BakaMemoryUpdate]] = {"replace": BakaMemoryUpdate}


class BakaGatedSolidifier(nn.Module):
    """x + W x ⊙ gate(W_g x) on each memory vector: "glu" with a sigmoid, "gelephant" with elephant."""

    def __init__(self, config: BakaConfig):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.gate = ElephantActivation() if config.memory_solidifier == "gelephant" else nn.Sigmoid()

    def forward(self, memory: torch.Tensor) -> torch.Tensor:
        return memory + self.proj(memory) * self.gate(self.gate_proj(memory))

    @property
    def output_weights(self) -> list[torch.Tensor]:
        return [self.proj.weight]


class BakaMLPSolidifier(nn.Module):
    """x + MLP(LN x) on each memory vector."""

    def __init__(self, config: BakaConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = BakaMLP(config)

    def forward(self, memory: torch.Tensor) -> torch.Tensor:
        return memory + self.mlp(self.norm(memory))

    @property
    def output_weights(self) -> list[torch.Tensor]:
        return [self.mlp.down_proj.weight]


class BakaLayerSolidifier(BakaDecoderLayer):
    """A block over the R memory vectors, all attending to all, in RoPE slots 0 … R-1."""

    def __init__(self, config: BakaConfig):
        super().__init__(config)
        self.config = config

    def forward(self, memory: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        cos, sin = rotary_table_of(self.config, memory.device, memory.dtype)
        length = memory.shape[1]
        view = View((cos[:length], sin[:length]), None, Placement())
        hidden_states, *_ = super().forward(memory, None, None, view)
        return hidden_states

    @property
    def output_weights(self) -> list[torch.Tensor]:
        return [self.self_attn.o_proj.weight, self.mlp.down_proj.weight]


SOLIDIFIERS: dict[str, type[nn.Module]] = {
    "glu": BakaGatedSolidifier,
    "gelephant": BakaGatedSolidifier,
    "mlp": BakaMLPSolidifier,
    "layer": BakaLayerSolidifier,
}
