"""The block of the decoder. Norms, residuals and what multiplies what are decided here and nowhere else."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .associative_baka import ASSOCIATIONS, BakaTokenAssociation, write_strength
from .attention_baka import BakaAttention
from .cache_layer_baka import BakaCacheLayer
from .compile_baka import recompute
from .configuration_baka import BakaConfig
from .functions_baka import get_activation, get_norm, initialise
from .stream_baka import Associated, View


class BakaMLP(nn.Module):
    """W_down(W_up h ⊙ act(W_gate h))."""

    def __init__(self, config: BakaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = get_activation(config.hidden_act)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(recompute(self.activate, self.gate_proj(hidden_states), self.up_proj(hidden_states)))

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.act_fn(gate) * up


class BakaDecoderLayer(GradientCheckpointingLayer):
    """y = x + attention(N x) + mlp(N x), one norm for both branches; or, without `parallel_residual`, Llama's block:
    h = x + attention(N x), y = h + mlp(N' h).

    An associative memory that vectors write is read before all that; one that tokens write, beside attention.
    """

    def __init__(self, config: BakaConfig, has_association: bool = False, has_value_residual: bool = False):
        super().__init__()
        self.is_parallel = config.parallel_residual
        self.input_layernorm = get_norm(config)
        self.self_attn = BakaAttention(config, has_value_residual)
        if not self.is_parallel:
            self.post_attention_layernorm = get_norm(config)
        self.mlp = BakaMLP(config)
        if config.residual_initializer_range is not None:
            initialise(config.residual_initializer_range, self.self_attn.o_proj, self.mlp.down_proj)
        self.association: Any = ASSOCIATIONS[config.associative_write](config) if has_association else None
        self.is_read_beside = has_association and config.associative_writers == "tokens"

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key: torch.Tensor | None,
        past_value: torch.Tensor | None,
        view: View,
        slots: BakaCacheLayer | None = None,
        associated: Associated | None = None,
        first_value: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, Associated | None]:
        """Returns the output [B, Q, D], the keys and values to keep [B, Q, H_kv, head_dim], the weights (eager only),
        and what is left of associations.

        Arguments as `BakaAttention.forward` takes them, and what is found of associations. By position: checkpointing
        keeps positional arguments for each call of a layer.
        """
        if associated is not None:
            hidden_states = self.read_before(hidden_states, associated.held)
        normed = self.input_layernorm(hidden_states)
        # What else reads the normed input, and not in turn, adds to what attention gives.
        attended, key, value, weights = self.self_attn(normed, past_key, past_value, view, slots, first_value)
        if associated is not None and self.is_read_beside:
            attended = attended + self.association.read(self.association.q_proj(normed), associated.held)
        output = self.combine(hidden_states, attended, self.mlp, normed)
        if associated is None:
            return output, key, value, weights, None
        writers = view.writers
        if writers is not None:
            inputs = writers.take(normed if self.is_read_beside else output).to(key.dtype)  # that of products
            if slots is None or slots.inputs is None:
                inputs = writers.place(associated.inputs, inputs)
            else:
                inputs = writers.place_(slots.inputs, inputs)
            held, strength = associated.held, None
            if writers.completes:
                held = self.association.write(held, inputs)
                if view.writing_costs and self.training and torch.is_grad_enabled():
                    strength = write_strength(self.association, inputs)
            associated = Associated(held, inputs, strength)
        if self.training and torch.is_grad_enabled() and (writers is None or not writers.completes):
            # Each weight gets a gradient even if nothing is written yet: distributed training waits for it.
            output = output + 0 * sum(product.sum() for product in self.association.project(normed[:, :1]))
        return output, key, value, weights, associated

    def read_before(self, hidden_states: torch.Tensor, held: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The block's input, with what is read of associations if they come before all else."""
        if self.is_read_beside:
            return hidden_states
        return hidden_states + self.association.read(self.association.q_proj(hidden_states), held)

    def combine(
        self, hidden_states: torch.Tensor, attended: torch.Tensor, mlp: Callable[[Any], torch.Tensor], mlp_input: Any
    ) -> torch.Tensor:
        """The output [B, Q, D]: the input, what all that reads the normed input beside the MLP has made of it, and what
        `mlp` makes of `mlp_input`, or in turn of a norm of the sum of these."""
        if self.is_parallel:
            return hidden_states + attended + mlp(mlp_input)
        hidden_states = hidden_states + attended
        return hidden_states + mlp(self.post_attention_layernorm(hidden_states))

    # Decoding has another order of work (`decoding_graphs_baka`), of these pieces:

    @property
    def input_projections(self) -> list[nn.Linear]:
        """What multiplies the normed input: queries, keys, values, if the MLP reads it too gate and up, and if
        associations are read by it the queries of these."""
        attention = self.self_attn
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        if self.is_parallel:
            projections += self.mlp_projections
        if self.is_read_beside:
            projections.append(self.association.q_proj)
        return projections

    @property
    def projections_beside(self) -> list[nn.Linear]:
        """What gives the sum beside the MLP: attention's output, and that of associations if they are read as usual."""
        projections = [self.self_attn.o_proj]
        if self.is_read_beside and type(self.association).read is BakaTokenAssociation.read:
            o_proj = self.association.o_proj
            projections += [o_proj] if type(o_proj) is nn.Linear and o_proj.bias is None else []
        return projections

    @property
    def mlp_projections(self) -> list[nn.Linear]:
        """What multiplies the input of the MLP: gate, up."""
        return [self.mlp.gate_proj, self.mlp.up_proj]


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
