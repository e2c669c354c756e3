"""The block and what a memory passes through on its way into the next chunk."""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_baka import BakaAttention
from .cache_baka import BakaCacheLayer
from .compile_baka import recompute
from .configuration_baka import BakaConfig
from .functions_baka import ElephantActivation, get_activation, rotary_table_of
from .stream_baka import Placement


class BakaMLP(nn.Module):
    """W_down(W_up h ⊙ act(W_gate h))."""

    def __init__(self, config: BakaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = get_activation(config.hidden_act)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(recompute(self._activate, self.gate_proj(hidden_states), self.up_proj(hidden_states)))

    def _activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.act_fn(gate) * up


class BakaDecoderLayer(GradientCheckpointingLayer):
    """y = x + attention(LN x) + mlp(LN x): one LayerNorm for both branches."""

    def __init__(self, config: BakaConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = BakaAttention(config, layer_idx)
        self.mlp = BakaMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key: torch.Tensor | None,
        past_value: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        placement: Placement,
        cache_layer: BakaCacheLayer | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        normed = self.input_layernorm(hidden_states)
        attended, key, value, weights = self.self_attn(
            normed, past_key, past_value, position_embeddings, attention_mask, placement, cache_layer
        )
        return hidden_states + attended + self.mlp(normed), key, value, weights


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
        super().__init__(config, layer_idx=config.num_hidden_layers)
        self.config = config

    def forward(self, memory: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        cos, sin = rotary_table_of(self.config, memory.device, memory.dtype)
        length = memory.shape[1]
        hidden_states, *_ = super().forward(memory, None, None, (cos[:length], sin[:length]), None, Placement())
        return hidden_states

    @property
    def output_weights(self) -> list[torch.Tensor]:
        return [self.self_attn.o_proj.weight, self.mlp.down_proj.weight]


class BakaPauseDropout(nn.Dropout):
    """Whether random pauses are drawn: never called, a switch for whoever looks for dropout to turn off.

    So preference training (DPO, GRPO) compares a model with its reference as if it had no dropout. Without gradients
    nothing is trained, and `generate` gives in training mode what it gives in eval mode.
    """

    def __init__(self) -> None:
        super().__init__(p=1.0)

    @property
    def acts(self) -> bool:
        return self.training and self.p > 0 and torch.is_grad_enabled()


SOLIDIFIERS: dict[str, type[nn.Module]] = {
    "glu": BakaGatedSolidifier,
    "gelephant": BakaGatedSolidifier,
    "mlp": BakaMLPSolidifier,
    "layer": BakaLayerSolidifier,
}
