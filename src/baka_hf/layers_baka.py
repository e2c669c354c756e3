"""The block of the decoder. Norms, residuals and what multiplies what are decided here and nowhere else."""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .associative_baka import ASSOCIATIONS, associative_layers
from .attention_baka import BakaAttention
from .cache_baka import BakaCacheLayer
from .compile_baka import recompute
from .configuration_baka import BakaConfig
from .functions_baka import get_activation
from .stream_baka import Associated, View


class BakaMLP(nn.Module):
    """W_down(W_up h ⊙ act(W_gate h))."""

    def __init__(self, config: BakaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = get_activation(config.hidden_act)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(recompute(self.activate, self.gate_proj(hidden_states), self.up_proj(hidden_states)))

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.act_fn(gate) * up


class BakaDecoderLayer(GradientCheckpointingLayer):
    """y = x + attention(LN x) + mlp(LN x): one LayerNorm for both branches."""

    def __init__(self, config: BakaConfig):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = BakaAttention(config)
        self.mlp = BakaMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key: torch.Tensor | None,
        past_value: torch.Tensor | None,
        view: View,
        slots: BakaCacheLayer | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Returns the output [B, Q, D], the keys and values to keep [B, Q, H_kv, head_dim], the weights (eager only).

        Arguments as `attention_baka.attend` takes them. By position: checkpointing keeps positional arguments for each
        call of a layer.
        """
        normed = self.input_layernorm(hidden_states)
        attended, key, value, weights = self.self_attn(normed, past_key, past_value, view, slots)
        return self.combine(hidden_states, attended, self.mlp(normed)), key, value, weights

    # Decoding has another order of work (`decoding_graphs_baka`), of these pieces:

    @property
    def input_projections(self) -> list[nn.Linear]:
        """What multiplies the normed input: queries, keys, values, gate, up."""
        attention, mlp = self.self_attn, self.mlp
        return [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]

    def combine(self, hidden_states: torch.Tensor, attended: torch.Tensor, transformed: torch.Tensor) -> torch.Tensor:
        return hidden_states + attended + transformed


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
