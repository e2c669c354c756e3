"""Solidifiers: what a memory passes through on its way into the next chunk. At first each is close to the identity."""

from collections.abc import Callable

import torch
from torch import nn

from .configuration_baka import BakaConfig
from .functions_baka import ElephantActivation, get_norm, initialise, rotary_table_of
from .layers_baka import BakaDecoderLayer, BakaMLP
from .parts_baka import Part, register
from .stream_baka import Placement, View


def start_small(*outputs: nn.Linear) -> None:
    """Mark the layers whose outputs a solidifier adds to a memory: at first it is close to the identity.

    A thousandth of what comes in hardly changes even a small memory, which "mlp" and "layer" norm.
    """
    for output in outputs:
        initialise(0.001 / output.in_features**0.5, output)


class BakaGatedSolidifier(nn.Module):
    """x + W x ⊙ gate(W_g x) on each memory vector: "glu" with a sigmoid, "gelephant" with elephant."""

    def __init__(self, config: BakaConfig):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.gate = ElephantActivation() if config.memory_solidifier == "gelephant" else nn.Sigmoid()
        start_small(self.proj)

    def forward(self, memory: torch.Tensor) -> torch.Tensor:
        return memory + self.proj(memory) * self.gate(self.gate_proj(memory))


class BakaMLPSolidifier(nn.Module):
    """x + MLP(N x) on each memory vector."""

    def __init__(self, config: BakaConfig):
        super().__init__()
        self.norm = get_norm(config)
        self.mlp = BakaMLP(config)
        start_small(self.mlp.down_proj)

    def forward(self, memory: torch.Tensor) -> torch.Tensor:
        return memory + self.mlp(self.norm(memory))


class BakaLayerSolidifier(BakaDecoderLayer):
    """A block over the R memory vectors, all attending to all, in RoPE slots 0 … R-1."""

    def __init__(self, config: BakaConfig):
        super().__init__(config)
        self.config = config
        start_small(self.self_attn.o_proj, self.mlp.down_proj)

    def forward(self, memory: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        cos, sin = rotary_table_of(self.config, memory.device, memory.dtype)
        length = memory.shape[1]
        view = View((cos[:length], sin[:length]), None, Placement())
        hidden_states, *_ = super().forward(memory, None, None, view)
        return hidden_states


SOLIDIFIERS: dict[str, type[nn.Module]] = {
    "glu": BakaGatedSolidifier,
    "gelephant": BakaGatedSolidifier,
    "mlp": BakaMLPSolidifier,
    "layer": BakaLayerSolidifier,
}


def register_solidifier(name: str) -> Callable[[Part], Part]:
    """A decorator for a class of modules that `memory_solidifier="name"` then stands for.

    It is made of a `BakaConfig`, and its `forward` takes and gives memories [B, R, D], row by row.

    Raises:
        ValueError: the class is none of modules, or the name is another's.
    """
    return register("memory_solidifier", name, SOLIDIFIERS, (nn.Module,), ("none",))
