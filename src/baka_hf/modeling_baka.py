"""BakaLLM, top to bottom: activation, RoPE, attention, block, solidifiers, the chunk loop, heads.

A text is read in chunks of n tokens. One chunk is a stream of S = R + n + P + R positions, called slots:

    slot     0 … R-1         R … S-R-1                  S-R … S-1
             read memory     text with its P pauses     write memory

Attention sees the slots of the previous chunk, 0 … S-1, and the own ones, S … 2S-1. What the blocks give at the write
slots of a full chunk is the memory the next chunk reads. `BakaModel.forward` cuts a call into spans, pieces of one
chunk that are read in one pass, and gives each row its place; everything recurrent goes through `BakaCache`.
"""

import inspect
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple, Unpack

import torch
import torch._dynamo
from torch import library, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple

from .cache_baka import (
    BakaCache,
    BakaCacheLayer,
    Parts,
    Placement,
    check_signature,
    choose_rows,
    hash_tokens,
    signature_of,
)
from .configuration_baka import BakaConfig

logger = logging.get_logger(__name__)

# Under torch.compile the blocks are compiled, see `_PassByBlocks`: a few programs for all blocks and chunks.
# What is decided on the host is marked as such; what runs both is itself left alone.
on_host = torch.compiler.disable
runs_compiled_parts = torch.compiler.disable(recursive=False)
# One program for each kind of chunk, and again for other batch sizes. torch gives up compiling at 8 of them by default.
# Under DDP it would cut every program in two, to send the gradients of one half early: blocks are small enough.
allow_programs = partial(torch._dynamo.config.patch, recompile_limit=64, optimize_ddp=False)

# What transformers calls the state in its own calls and outputs, since 5.24 and before. Ours take both names.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

# Compiled, attention does without a mask where these are PyTorch's kernels, by the type of device.
IN_PARTS: dict[str, SDPBackend] = {"cuda": SDPBackend.CUDNN_ATTENTION}

IGNORED = -100  # a label that is no target

# Without logits, the loss is computed for so many tokens at a time.
LOSS_PIECE = 8192
# Compiled, a token's weights are summed for so many logits at a time, a multiple of 8.
LOSS_BLOCK = 1024


def _elephant(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + x^8), computed in float32 at least: x^8 overflows fp16 beyond 4."""
    fourth = _within_range(x).square().square()
    return (1 / (1 + fourth * fourth)).to(x.dtype)


def _within_range(x: torch.Tensor) -> torch.Tensor:
    """x in float32 or float64, held where x^4 does not overflow. There x^8 has long done so and elephant is 0."""
    limit = 1e70 if x.dtype == torch.float64 else 1e9
    return x.to(_at_least_float32(x.dtype)).clamp(-limit, limit)


class _Elephant(torch.autograd.Function):
    """elephant with its derivative -8 x^7 g^2, g = elephant(x), written out: it keeps nothing but x for it.

    It is multiplied in an order in which zero, as g soon is, meets no infinity and g^2 does not vanish early.
    """

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        wide = x.to(_at_least_float32(x.dtype))
        power = wide * wide
        return power.square_().square_().add_(1).reciprocal_().to(x.dtype)  # an infinite power gives 0, as it should

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        wide = _within_range(x)
        square = wide * wide
        fourth = square * square
        gate = (fourth * fourth).add_(1).reciprocal_()
        derivative = (fourth * gate).mul_(-8).mul_(square).mul_(wide).mul_(gate)
        return (derivative * grad_output).to(x.dtype)  # not in place: a batch of gradients (vmap) may come in


def recompute(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)`; compiled training does not keep its result but computes it again in the backward pass.

    For what is cheap next to the matrix products around it and as large as they are. Uncompiled, a call costs more.
    """
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)


class ElephantActivation(nn.Module):
    """elephant(x) = 1 / (1 + |x / a|^d) with a = 1, d = 8 (arXiv 2310.01365): a bump that opens around zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Compilers derive and fuse the plain formula; that of PyTorch 2.11 loses the gradient of the function above.
        return _elephant(x) if torch.compiler.is_compiling() else _Elephant.apply(x)


def either_name(past_key_values: BakaCache | None, cache: BakaCache | None) -> BakaCache | None:
    """The state that a call was given under one of its names."""
    if past_key_values is not None and cache is not None and cache is not past_key_values:
        raise ValueError("expected one state, got another one as `cache` than as `past_key_values`.")
    return past_key_values if cache is None else cache


def get_activation(name: str) -> nn.Module:
    return ElephantActivation() if name == "elephant" else ACT2FN[name]


@torch.compiler.assume_constant_result
def rotary_table(
    theta: float, head_dim: int, num_slots: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [num_slots, 1, head_dim] of RoPE's angles (arXiv 2104.09864) in Llama's rotate-half layout.

    sin has the other sign in its first half, see `apply_rotary`. The angles are computed in float64: no buffer that a
    cast of the model to half precision could spoil.
    """
    return _rotary_table(theta, head_dim, num_slots, device, dtype)


@lru_cache(maxsize=32)
def _rotary_table(
    theta: float, head_dim: int, num_slots: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):
        inverse_frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.arange(num_slots, dtype=torch.float64)[:, None, None] * inverse_frequencies
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        return cos.to(device=device, dtype=dtype), sin.to(device=device, dtype=dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn queries or keys [B, T, H, head_dim] by T angles of `rotary_table`; by a single one, in any layout.

    A pair (a, b) lies half a head apart and becomes (a cos - b sin, b cos + a sin): the halves change places, which
    compilers read past more easily than halves put together anew, and sin brings the sign.
    """
    return x * cos.to(x) + x.roll(x.shape[-1] // 2, dims=-1) * sin.to(x)


def repeat_kv(hidden_states: torch.Tensor, n_rep: int) -> torch.Tensor:
    """[B, key-value heads, T, head_dim] to [B, heads, T, head_dim]."""
    return hidden_states if n_rep == 1 else hidden_states.repeat_interleave(n_rep, dim=1)


class AnyLength:
    """A context, for all threads at once, in which PyTorch's attention does without cuDNN's.

    That takes some 30 ms to prepare itself for each new length, and a piece of a chunk may have any. Nothing else is
    changed: the order of backends is not ours to set, since once set, even for a moment, PyTorch's own is lost.
    """

    def __init__(self) -> None:
        self.lock, self.depth, self.was_enabled = threading.Lock(), 0, False

    @on_host
    def __enter__(self) -> None:
        with self.lock:
            if self.depth == 0:
                self.was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
                if torch.backends.cuda.mem_efficient_sdp_enabled() or torch.backends.cuda.math_sdp_enabled():
                    torch.backends.cuda.enable_cudnn_sdp(False)
            self.depth += 1

    @on_host
    def __exit__(self, *_: Any) -> None:
        with self.lock:
            self.depth -= 1
            if self.depth == 0:
                torch.backends.cuda.enable_cudnn_sdp(self.was_enabled)


any_length = AnyLength()


def eager_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as the formula says, for those who want its weights."""
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=_at_least_float32(query.dtype)).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def dtype_of_products(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What matrix products make of `dtype`: autocast's if that is on."""
    # Weights that are offloaded are on "meta", which autocast does not know.
    if dtype == torch.float64 or device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return dtype
    return torch.get_autocast_dtype(device.type)


class AttentionInParts(torch.autograd.Function):
    """Attention of a span in step by kernels without a mask: given one, they read it and compute what it hides.

    A query sees all that was before the span, and of the span what is up to itself: one call of a kernel each, the
    second one causal. Only read queries see all read slots, and write queries all write slots. What these see beyond
    themselves, R x R at most, is added by hand.

    The log of a query's summed weights in a part says what share of the whole it has. And as a weight is
    exp(score - log), a kernel's backward pass gives its part of the gradient from the log and the output of the whole.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        past_query: torch.Tensor | None,
        past_key: torch.Tensor | None,
        past_value: torch.Tensor | None,
        has_past: torch.Tensor | None,
        ends: tuple[slice, ...],
        scale: float,
    ) -> torch.Tensor:
        """Returns [B, Q, H, head_dim].

        Args:
            ctx: PyTorch's.
            query, key, value: of the span, [B, Q, H, head_dim].
            past_query: queries as they stand to what was before the span, or None if nothing was.
            past_key, past_value: that, [B, K, H, head_dim].
            has_past: [B, 1, 1, 1] bool, rows that see it; None: all.
            ends: the read slots and the write slots, as far as they are in the span.
            scale: what scores are multiplied by.
        """
        output, own_logs = _attend(query, key, value, True, scale)
        logs, weights = own_logs, None
        if past_query is not None and past_key is not None and past_value is not None:
            past, past_logs = _attend(past_query, past_key, past_value, False, scale)
            if has_past is not None:
                past_logs = torch.where(has_past, past_logs, float("-inf"))
            logs = torch.logaddexp(own_logs, past_logs)
        if ends:
            queries, keys, values = _ends(ends, query, key, value)
            is_beyond = torch.ones(queries.shape[-2], queries.shape[-2], dtype=torch.bool, device=query.device).triu(1)
            scores = (scale * _dots(queries, keys)).where(is_beyond, float("-inf"))
            beyond = _at_ends(scores.logsumexp(-1, keepdim=True), ends, logs.transpose(1, 2), float("-inf"))
            logs = torch.logaddexp(logs, beyond.transpose(1, 2))
        output = output * (own_logs - logs).exp().transpose(1, 2)
        if past_key is not None:
            output = output + past * (past_logs - logs).exp().transpose(1, 2)
        if ends:
            weights = (scores - _ends(ends, logs.transpose(1, 2))[0]).exp().to(query.dtype)
            output = output + _at_ends(weights @ values, ends, output)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, past_query, past_key, past_value, has_past, output, logs, weights)
        ctx.ends, ctx.scale = ends, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, past_query, past_key, past_value, has_past, output, logs, weights = ctx.saved_tensors
        ends, scale = ctx.ends, ctx.scale
        grads = _attend_backward(grad_output, query, key, value, output, logs, True, scale)
        past_grads: tuple[Any, ...] = None, None, None
        if past_key is not None:
            past_logs = logs if has_past is None else torch.where(has_past, logs, torch.finfo(logs.dtype).max / 2)
            past_grads = _attend_backward(
                grad_output, past_query, past_key, past_value, output, past_logs, False, scale
            )
        if ends:
            vectors = _ends(ends, key, query, grad_output, value)
            grad_outputs, values = vectors[2:]
            shares = (grad_outputs.to(logs) * _ends(ends, output)[0]).sum(-1, keepdim=True)
            grad_scores = (weights * (_dots(grad_outputs, values) - shares) * scale).to(query.dtype)
            added = torch.stack([grad_scores, grad_scores.mT, weights.mT]) @ vectors[:3]  # of queries, keys and values
            grads = [grad + _at_ends(more, ends, grad) for grad, more in zip(grads, added, strict=True)]
        return *grads, *past_grads, None, None, None


def can_attend_in_parts(config: BakaConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch has the kernels for it, and takes them for queries of `dtype` where there is no mask."""
    if config._attn_implementation != "sdpa" or device.type not in IN_PARTS:
        return False
    query = torch.empty(1, 1, config.stream_length, config.head_dim, dtype=dtype, device=device, requires_grad=True)
    return torch._fused_sdp_choice(query, query, query) == IN_PARTS[device.type].value


@torch.compiler.allow_in_graph
def attend_in_parts(*arguments: Any) -> torch.Tensor:
    """`AttentionInParts`, left to what derives it: PyTorch 2.11 loses the gradients of functions that it traces."""
    return AttentionInParts.apply(*arguments)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [B, Q, H, head_dim], and the log of each query's summed weights [B, H, Q, 1]."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if query.device.type == "cpu":
        output, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, scale=scale
        )
    else:
        output, logs, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, is_causal, False, scale=scale
        )
    return output.transpose(1, 2), logs.view(*query.shape[:3], 1)


# A name of its own for each copy of this module, since code that comes with a checkpoint may be loaded beside it.
@library.custom_op(f"{__name__.replace('.', '_')}::attend_backward", mutates_args=())
def _attend_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logs: torch.Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `_attend`'s queries, keys and values, by the output and the logs of the whole.

    Not left to compilers, which choose how tensors lie in memory: PyTorch takes a kernel of cuDNN's that it has made
    for another call, if queries, keys and values lie as they did there, and does not look at the others.
    """
    grad_output, query, key, value, output = (
        x.contiguous().transpose(1, 2) for x in (grad_output, query, key, value, output)
    )
    if query.device.type == "cpu":
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_output, query, key, value, output, logs[..., 0], 0.0, is_causal, scale=scale
        )
    else:
        logs = logs.reshape(-1).view(logs.shape)  # contiguous, and so are the strides of dimensions of size 1
        nothing = torch.empty((), dtype=torch.int64, device=query.device)
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(grad_output, query, key, value, output, logs, nothing, nothing, None, None, None),
            *(query.shape[2], key.shape[2], 0.0, is_causal),
            scale=scale,
        )
    grad_query, grad_key, grad_value = (grad.transpose(1, 2).contiguous() for grad in grads)
    return grad_query, grad_key, grad_value


@_attend_backward.register_fake
def _(grad_output: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> Any:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


def _dots(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[..., R, R], the products of all rows of [..., R, head_dim]; unlike a matrix product's, they are not rounded."""
    left, right = (x.to(_at_least_float32(x.dtype)) for x in (left, right))
    return (left[..., :, None, :] * right[..., None, :, :]).sum(-1)


def _ends(ends: tuple[slice, ...], *tensors: torch.Tensor) -> torch.Tensor:
    """The positions `ends` of each of `tensors` [B, Q, H, .], as [., E, B, H, R, .]."""
    return torch.stack([x[:, end].transpose(1, 2) for x in tensors for end in ends]).unflatten(0, (-1, len(ends)))


def _at_ends(x: torch.Tensor, ends: tuple[slice, ...], like: torch.Tensor, rest: float = 0.0) -> torch.Tensor:
    """x [E, B, H, R, .] at the positions `ends` of [B, Q, H, .], shape and dtype of `like`, and `rest` elsewhere."""
    result = torch.full_like(like, rest)
    for part, end in zip(x, ends, strict=True):
        result = result.slice_scatter(part.transpose(1, 2).to(like), 1, end.start, end.stop)
    return result


def place(past: torch.Tensor | None, new: torch.Tensor, placement: Placement, num_slots: int) -> torch.Tensor:
    """Keys or values of a span, `new` [B, H, Q, head_dim], among those kept from before; nothing is written in place.

    In step `past` ends where the span starts. Out of step it has all `num_slots` slots.
    """
    if past is not None and placement.turn is not None:
        past = apply_rotary(past, *placement.turn)
    if placement.slots is None or placement.valid is None:
        return new if past is None else torch.cat([past.to(new), new], dim=2)
    past = new.new_zeros(*new.shape[:2], num_slots, new.shape[3]) if past is None else past.to(new)
    index = placement.slots.expand_as(new)
    return past.scatter(2, index, torch.where(placement.valid, new, past.gather(2, index)))


def as_previous(
    keys: torch.Tensor, values: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, H, S, head_dim] of a stream that has ended as those of a previous one, in 2S slots."""
    keys = apply_rotary(keys, *turn)
    return pad_slots(keys, 0, keys.shape[2]), pad_slots(values, 0, values.shape[2])


class BakaAttention(nn.Module):
    """Multi-head attention over the previous stream and the own one."""

    def __init__(self, config: BakaConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False  # the mask says it all
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

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
        """Returns the output [B, Q, D], the new keys and values [B, Q, H_kv, head_dim], the weights (eager only)."""
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        # All is [B, Q, H, head_dim], as it lies in memory, until it is attended: a compiler copies what lies otherwise,
        # gradients above all.
        unturned_query = self.q_proj(hidden_states).view(hidden_shape)
        query_states = apply_rotary(unturned_query, *position_embeddings)
        new_key = apply_rotary(self.k_proj(hidden_states).view(hidden_shape), *position_embeddings)
        new_value = self.v_proj(hidden_states).view(hidden_shape)

        if placement.parts is not None and torch.compiler.is_compiling():
            past_query = query_states
            if placement.turn is not None:  # rather than keys from before the span, queries are turned, the other way
                past_query = apply_rotary(unturned_query, *placement.parts.angles)
            output = self._attend_in_parts(
                query_states, new_key, new_value, past_query, past_key, past_value, placement.parts
            )
            return self.o_proj(output.reshape(*input_shape, -1)), new_key, new_value, None

        query_states, keys, values = (x.transpose(1, 2) for x in (query_states, new_key, new_value))
        if cache_layer is not None:
            key_states, value_states = cache_layer.update(keys, values, placement)
        else:
            num_slots = self.config.stream_length * (1 + self.config.use_xl_cache)
            key_states = place(past_key, keys, placement, num_slots)
            value_states = place(past_value, values, placement._replace(turn=None), num_slots)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self, query_states, key_states, value_states, attention_mask, dropout=0.0, scaling=self.scaling
        )
        return self.o_proj(output.reshape(*input_shape, -1)), new_key, new_value, weights

    def _attend_in_parts(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        past_query: torch.Tensor,
        past_key: torch.Tensor | None,
        past_value: torch.Tensor | None,
        parts: Parts,
    ) -> torch.Tensor:
        """[B, Q, H, head_dim]; arguments as in `AttentionInParts.forward`, but of keys and values each head once, and
        those from before the span [B, H_kv, K, head_dim]."""

        def all_heads(x: torch.Tensor) -> torch.Tensor:
            return repeat_kv(x.to(query).transpose(1, 2), self.num_key_value_groups).transpose(1, 2)

        past: tuple[Any, ...] = None, None, None
        if past_key is not None and past_value is not None:
            past = past_query, all_heads(past_key.transpose(1, 2)), all_heads(past_value.transpose(1, 2))
        return attend_in_parts(query, all_heads(key), all_heads(value), *past, parts.has_past, parts.ends, self.scaling)


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


SOLIDIFIERS: dict[str, type[nn.Module]] = {
    "glu": BakaGatedSolidifier,
    "gelephant": BakaGatedSolidifier,
    "mlp": BakaMLPSolidifier,
    "layer": BakaLayerSolidifier,
}


def rotary_table_of(config: BakaConfig, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [3S, 1, head_dim] of a model's slots, for the queries and keys of states of `dtype`.

    The last S are for queries that see keys of the previous stream as that stream had them, S slots too late.
    """
    return rotary_table(*_rotary_key(config), device, dtype_of_products(dtype, device))


def _rotary_key(config: BakaConfig) -> tuple[float, int, int]:
    return float(config.rope_parameters["rope_theta"]), config.head_dim, 3 * config.stream_length


# Spans: which piece of its chunk each row reads in one pass


def fixed_pauses(config: BakaConfig) -> list[int]:
    """The text positions before which the pauses of a chunk stand, unless they are drawn."""
    count = config.num_pause_tokens
    return [index * (config.chunk_size // count) for index in range(count)]


class Span(NamedTuple):
    """For every row, a piece of one chunk, read in one pass.

    What all rows agree on is a number, the rest are CPU tensors [B]. Rows that agree on `start` are in step: they take
    the same slots, and a row that has fewer tokens than others reads on into what is not its text. Nothing sees that.
    """

    column: Any  # its first token among the call's tokens
    start: Any  # that token's position in the chunk
    count: Any  # how many tokens; 0 for a row that has none left
    length: int  # the most tokens of any row
    first: Any  # the chunk has no memory to read but the learned one
    has_previous: Any  # there is a previous chunk whose keys and values can be seen
    num_tokens: Any  # tokens the row has read after it

    @property
    def in_step(self) -> bool:
        return isinstance(self.start, int)

    @property
    def is_aligned(self) -> bool:
        """Whether all rows read the same columns."""
        return isinstance(self.column, int) and isinstance(self.count, int)


def plan_aligned(length: int, chunk_size: int) -> list[Span]:
    """Spans of a call in which every row begins its text and reads `length` tokens: whole chunks and a rest."""
    spans = []
    for column in range(0, length, chunk_size):
        count = min(chunk_size, length - column)
        spans.append(Span(column, 0, count, count, column == 0, column > 0, column + count))
    return spans


def plan_spans(
    lengths: torch.Tensor,
    num_tokens: torch.Tensor,
    seeded: torch.Tensor,
    restarts: torch.Tensor | None,
    chunk_size: int,
    keeps: bool,
) -> tuple[list[Span], torch.Tensor]:
    """Spans of a call in which rows may be anywhere in their chunks; all tensors on the CPU.

    Args:
        lengths: [B] int64, tokens each row reads in this call.
        num_tokens: [B] int64, tokens it has read before.
        seeded: [B] bool, rows whose text began with another stream's memory.
        restarts: [B, L] bool, tokens with which a new text begins, or None.
        chunk_size: n.
        keeps: whether the state outlasts the call, so that a row which has no more tokens must be left as it is.

    Returns:
        The spans, and `seeded` as it stands after them.
    """
    column = torch.zeros_like(lengths)
    if restarts is not None:
        length = restarts.shape[1]
        following = torch.where(restarts, torch.arange(length), length).flip(1).cummin(1).values.flip(1)
        following = nn.functional.pad(following, (0, 2), value=length)  # [b, c]: the first restart at or after c
    spans = []
    while bool((column < lengths).any()):
        stop = lengths
        if restarts is not None:
            anew = (following.gather(1, column[:, None])[:, 0] == column) & (column < lengths)
            num_tokens, seeded = num_tokens.masked_fill(anew, 0), seeded & ~anew
            stop = torch.minimum(lengths, following.gather(1, column[:, None] + 1)[:, 0])
        start = num_tokens % chunk_size
        count = torch.minimum(chunk_size - start, stop - column)
        has_previous = num_tokens >= chunk_size
        num_tokens = num_tokens + count
        where = start if keeps else start[count > 0]
        in_step = bool((where == where[0]).all())
        spans.append(
            Span(
                _agreed(column) if in_step else column,
                int(where[0]) if in_step else start,
                _agreed(count) if in_step else count,
                int(count.max()),
                _agreed(~(has_previous | seeded)),
                _agreed(has_previous),
                num_tokens,
            )
        )
        column = column + count
    return spans, seeded


def _agreed(rows: torch.Tensor) -> Any:
    """A tensor [B] as one number or bool, if its entries are all the same."""
    return rows[0].item() if bool((rows == rows[0]).all()) else rows


@dataclass
class Layout:
    """Where a span's tokens stand in the stream, and what the blocks need to know of it.

    In step, the span takes slots lo … hi-1 and `pieces` names them in order. Out of step, each row takes its own
    slots lo … hi-1, at the beginning of Q positions, and indices say which vector stands where.
    """

    begins: Any  # the chunk's read memory is in it
    completes: Any  # the chunk's write memory is in it
    followed: bool  # another span, or another call, reads what this one leaves behind
    lo: Any
    hi: Any
    pieces: list[tuple[str, int]] = field(default_factory=list)
    slots: Any = None  # [B, Q] slot of each position
    valid: Any = None  # [B, Q] positions that count
    sources: Any = None  # [B, Q] where each vector comes from: read | pause | text | write
    text: Any = None  # [B, T] position of each text token
    write: Any = None  # [B, R] position of each write slot

    @property
    def in_step(self) -> bool:
        return isinstance(self.lo, int)


def lay_out(span: Span, config: BakaConfig, pauses: Any, followed: bool, width: int | None = None) -> Layout:
    """The layout of a span.

    Args:
        span: the span.
        config: the model's configuration.
        pauses: the text positions before which the pauses stand, ascending: P numbers (in step) or [B, P].
        followed: whether another span, or another call, reads what this one leaves behind.
        width: Q out of step, if it is known; else it is looked up.
    """
    n, R, S = config.chunk_size, config.num_memory_tokens, config.stream_length
    if span.in_step:
        end = span.start + span.length
        begins, completes = span.start == 0, followed and end == n
        lo = 0 if begins else R + span.start + sum(p < span.start for p in pauses)
        hi = S if completes else R + end + sum(p < end for p in pauses)
        pieces: list[tuple[str, int]] = [("read", R)] if begins and R else []
        position = span.start
        for pause in pauses:
            if span.start <= pause < end:
                if pause > position:
                    pieces.append(("text", pause - position))
                pieces.append(("pause", 1))
                position = pause
        pieces.append(("text", end - position))
        if completes and R:
            pieces.append(("write", R))
        if completes and isinstance(span.count, torch.Tensor):
            completes = span.start + span.count == n
        return Layout(begins, completes, followed, lo, hi, pieces)

    end = span.start + span.count
    reads = span.count > 0
    begins, completes = (span.start == 0) & reads, (end == n) & reads & followed
    before = lambda position: (pauses < position[:, None]).sum(1)  # noqa: E731
    lo = torch.where(begins, 0, R + span.start + before(span.start))
    hi = torch.where(completes, S, torch.where(reads, R + end + before(end), lo))
    device = lo.device
    slots = lo[:, None] + torch.arange(int((hi - lo).max()) if width is None else width, device=device)
    valid = slots < hi[:, None]
    slots = slots % S

    pause_slots = R + pauses + torch.arange(pauses.shape[1], device=device)
    pauses_before = (pause_slots[:, None, :] < slots[:, :, None]).sum(2)
    is_pause = (pause_slots[:, None, :] == slots[:, :, None]).any(2)
    # The vectors of a span stand side by side as read [R] | pause [1] | text [T] | write [R].
    longest = span.length
    token = (slots - R - pauses_before - span.start[:, None]).clamp(0, longest - 1)
    sources = torch.where(is_pause, R, R + 1 + token)
    sources = torch.where(slots < R, slots, sources)
    sources = torch.where(slots >= S - R, R + 1 + longest + slots - (S - R), sources)

    positions = span.start[:, None] + torch.arange(longest, device=device)
    text = R + positions + (pauses[:, None, :] <= positions[:, :, None]).sum(2) - lo[:, None]
    text = text.clamp(0, slots.shape[1] - 1)
    write = (S - R - lo[:, None] + torch.arange(R, device=device)).clamp(0, slots.shape[1] - 1)
    return Layout(begins, completes, followed, lo, hi, [], slots, valid, sources, text, write)


def compare_slots(
    config: BakaConfig, span: Span, layout: Layout, placement: Placement, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """allowed(q, k) as one comparison: each key has a number, each query a horizon, and sees keys up to it.

    Keys are numbered by their slots, 0 … S-1 in the previous stream and S … 2S-1 in the own one. The horizon of a text
    query is its own slot, of a read query the last read slot, of a write query the last slot of all. Keys of a previous
    stream that a row does not have are numbered beyond every horizon.

    Returns:
        The numbers of the keys [B or 1, K] and the horizons of the queries [B or 1, Q].
    """
    S, R = config.stream_length, config.num_memory_tokens
    half = S if config.use_xl_cache else 0
    if layout.in_step:
        slots = torch.arange(layout.lo, layout.hi, device=device)[None]
        numbers = torch.arange(placement.first, placement.stop, device=device)[None]
    else:
        slots = layout.slots.to(device)
        numbers = torch.arange(half + S, device=device)[None]
    numbers = numbers + S - half
    horizons = torch.where(slots < R, S + R - 1, torch.where(slots >= S - R, 2 * S - 1, S + slots))
    if isinstance(span.has_previous, torch.Tensor):
        has_previous = span.has_previous.to(device)[:, None]
        numbers = numbers.masked_fill((numbers < S) & ~has_previous, 2 * S)
    elif not span.has_previous:
        numbers = numbers.masked_fill(numbers < S, 2 * S)
    return numbers, horizons


def pad_slots(tensor: torch.Tensor, left: int, right: int) -> torch.Tensor:
    """Add `left` and `right` empty slots to keys or values [B, H, slots, head_dim]."""
    return nn.functional.pad(tensor, (0, 0, left, right)) if left or right else tensor


def gather_positions(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [B, T, D] at `index` [B, K]: [B, K, D]."""
    return x.gather(1, index.to(x.device)[:, :, None].expand(-1, -1, x.shape[2]))


class Stream(NamedTuple):
    """What a chunk finds when it begins or goes on, as tensors with gradients that nothing writes into.

    Keys and values of each block stand for slots begin … begin + their length - 1 of the two halves. Where a chunk has
    just ended its keys are still as its own attention had them, S slots too late: whoever reads them turns them back.
    """

    memory: Any
    keys: list[Any]
    values: list[Any]
    begin: int = 0
    turns: bool = False

    def kept(self, layer: int, first: int, stop: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Keys and values of slots first … stop-1 of a block."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None or stop <= first:
            return None, None
        if first < self.begin or stop > self.begin + keys.shape[2]:
            left, right = self.begin - first, stop - self.begin - keys.shape[2]
            return pad_slots(keys, left, right), pad_slots(values, left, right)
        part = slice(first - self.begin, stop - self.begin)
        return keys[:, :, part], values[:, :, part]

    def detach(self, rows: Any = True) -> "Stream":
        """A copy without gradients in the rows that `rows`, a bool or a tensor [B], says."""

        def cut(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else _where(rows, tensor.detach(), tensor)

        return Stream(
            cut(self.memory), [cut(k) for k in self.keys], [cut(v) for v in self.values], self.begin, self.turns
        )


class BakaPreTrainedModel(PreTrainedModel):
    config: BakaConfig
    config_class = BakaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BakaDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, tuple(SOLIDIFIERS.values())):
            # A solidifier starts close to the identity.
            for weight in module.output_weights:  # type: ignore[union-attr]
                init.normal_(weight, std=self.config.initializer_range / self.config.hidden_size**0.5)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("torch."):
            # FSDP2 gives a sharded model a class of its own. What is saved with it is the code of the model's.
            model_class = next(base for base in cls.__mro__[1:] if not base.__module__.startswith("torch."))
            cls.__module__, cls.__name__ = model_class.__module__, model_class.__name__

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        """Gradient checkpointing, and one argument more: `gradient_checkpointing_kwargs={"granularity": "chunk"}`.

        "layer", the default, keeps each block's input of every chunk and computes a block again in the backward pass.
        "chunk" keeps what a chunk began with (memory, keys and values of the one before) and computes all blocks of
        the chunk again: beside these states, activation memory is that of one chunk, however many a call has.
        """
        arguments = dict(getattr(gradient_checkpointing_func, "keywords", {}))
        granularity = arguments.pop("granularity", "layer")
        if granularity not in ("layer", "chunk"):
            raise ValueError(
                f"`granularity` of gradient checkpointing must be 'layer' or 'chunk', got {granularity!r}."
            )
        by_chunk = granularity == "chunk"
        if arguments.setdefault("use_reentrant", False) and by_chunk:
            raise ValueError("checkpointing with granularity='chunk' needs use_reentrant=False, got True.")
        if isinstance(gradient_checkpointing_func, partial):
            gradient_checkpointing_func = partial(gradient_checkpointing_func.func, **arguments)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)
        for module in self.modules():
            if isinstance(module, BakaModel):
                module.checkpoints_chunks = enable and by_chunk
            elif by_chunk and isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = False

    def cuda_graphs_enable(self, enable: bool = True) -> None:
        """Record training calls as CUDA graphs (`training_graphs_baka`); or stop doing so, and free what they hold.

        A call's blocks are some thousand kernels, many of a few microseconds, and asking for one after another keeps a
        GPU waiting when rows are few. The first call of each kind (rows, tokens, with or without a state) runs as it
        would anyway, the second is recorded, and the blocks of all later ones are launched at once, forward and
        backward. Activation memory stays reserved for that. Only with gradients, on a CUDA device, from `input_ids`
        without an `attention_mask`, in models of plain modules without hooks, adapters, shards, shared weights,
        checkpointing or random pauses; whatever else comes is read as ever. One thread at a time may train a model.
        """
        from .training_graphs_baka import forget

        for module in self.modules():
            if isinstance(module, BakaModel):
                module.records_training = enable
                if not enable:
                    forget(module)

    def new_cache(self, batch_size: int = 1, memory: torch.Tensor | None = None, static: bool = False) -> BakaCache:
        """An empty state of this model's own class, device and dtype.

        Args:
            batch_size: number of texts to read side by side.
            memory: the `.memory` of another stream, [R, D] or [batch_size, R, D], for these texts to begin with. What
                that stream held in keys and values, and of a chunk not yet full, does not come over.
            static: on a CUDA device keep the state's tensors where they are, changed in place, and read whole chunks
                and single tokens by CUDA graphs (`graphs_baka`). Their kernels are compiled when first met, and
                forward hooks are not called. What is not so simple is read as from any other state.
        """
        # Weights that are offloaded have no device; the state follows the blocks' to where they compute.
        device = None if self.device.type == "meta" else self.device
        cache = BakaCache(self.config, batch_size, device, self.dtype)
        cache.is_static = static
        return cache if memory is None else cache.seed_memory(memory)


class BakaModel(BakaPreTrainedModel):
    """The decoder without a head. Its parameters are the union of what the configuration asks for."""

    records_training = False  # see `cuda_graphs_enable`

    def __init__(self, config: BakaConfig):
        super().__init__(config)
        config.validate_architecture()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.num_pause_tokens:
            self.pause_token = nn.Embedding(1, config.hidden_size)
        if config.num_memory_tokens:
            self.memory_tokens = nn.Embedding(config.num_memory_tokens, config.hidden_size)
            if config.memory_norm:
                self.memory_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            if config.separate_solidifiers:
                self.read_solidifier = SOLIDIFIERS[config.memory_solidifier](config)
                self.write_solidifier = SOLIDIFIERS[config.memory_solidifier](config)
            elif config.memory_solidifier != "none":
                self.solidifier = SOLIDIFIERS[config.memory_solidifier](config)
        self.layers = nn.ModuleList([BakaDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.checkpoints_chunks = False
        self.num_plans = 0  # calls that were more than a token from a static state; weights may change between them
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    @can_return_tuple
    @runs_compiled_parts
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: BakaCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: BakaCache | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]  # its types are not followed
    ) -> BaseModelOutputWithPast:
        """Read text, from its beginning or on from a state.

        Args:
            input_ids: [B, L] int64 token ids; or `inputs_embeds`, [B, L, D].
            attention_mask: [B, L], or [B, P + L] after P positions fed to the state; 0 means "not in the stream",
                wherever it stands.
            position_ids: [B, L]. A 0 at a real token, other than a row's first of this call, begins a new text there;
                other values do not matter.
            past_key_values, cache: the state to go on from, under either of its names. It is changed in place.
            use_cache: return the state; by default `config.use_cache`, and no when training.
            output_hidden_states: also return the embeddings and each block's output over the text, [B, L, D] each,
                the last one normed.
            output_attentions: also return each block's weights (eager attention only), [B, heads, L, 2S]: over
                the slots of the previous chunk's stream, then over those of the own one.

        Returns:
            `last_hidden_state` [B, L, D], zero where `attention_mask` is 0 (with `num_last_states=k` among `kwargs` the
            last k columns at least, and whatever else came with their chunks), and the state.

        Raises:
            ValueError: an argument does not fit the others, the model or the state, which is left as it was.
        """
        cache = either_name(past_key_values, cache)
        for name in ("cu_seq_lens_q", "seq_idx"):
            if position_ids is None and kwargs.get(name) is not None:
                raise ValueError(
                    f"expected `position_ids` that restart at 0 where a packed text begins, got `{name}` alone (PEFT's "
                    "prompt learning drops `position_ids`: give it samples that are not packed)."
                )
        if inputs_embeds is None:
            states = self._read_token(
                input_ids, attention_mask, cache, output_hidden_states, output_attentions, **kwargs
            )
            if states is not None:
                return BaseModelOutputWithPast(last_hidden_state=states, **{CACHE_NAME: cache})
        pass_ = self._plan(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            output_attentions,
            kwargs.get("within_beam_search", False),
            kwargs.get("num_last_states"),
        )
        if pass_.graph is None:
            with pass_.reading():
                for index in range(len(pass_.spans)):
                    pass_.read(index)
        else:
            pass_.graph.read(pass_)
        return pass_.close(pass_.kept_at_the_end())

    @on_host
    def _plan(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: BakaCache | None,
        inputs_embeds: torch.Tensor | None,
        use_cache: bool | None,
        output_hidden_states: bool | None,
        output_attentions: bool | None,
        within_beam_search: bool,
        num_last_states: int | None,
    ) -> "_Pass":
        """Check a call, and cut it into spans."""
        config = self.config
        self.num_plans += 1
        with_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        with_weights = config.output_attentions if output_attentions is None else output_attentions
        if with_weights and config._attn_implementation != "eager":
            logger.warning_once(
                f"`output_attentions` needs attn_implementation='eager', {config._attn_implementation!r} gives none."
            )
            with_weights = False
        batch_size, length = self._check_text(input_ids, inputs_embeds)
        self._check_cache(cache, batch_size, within_beam_search)
        fed = 0 if cache is None else cache.get_seq_length()
        real = self._check_mask(attention_mask, batch_size, length, fed)
        restarts = self._find_restarts(position_ids, batch_size, length, real)
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        if use_cache and cache is None:
            cache = self.new_cache(batch_size)
        if cache is not None:
            cache._is_beam_search = within_beam_search

        # Without a state every row begins here and nothing needs to be known on the host. With one, count.
        lengths: torch.Tensor | None = None
        whole_columns = torch.ones(length, dtype=torch.bool)
        if cache is not None or restarts is not None:
            lengths = torch.full((batch_size,), length)
            if real is not None:
                on_host = real.cpu()
                lengths, whole_columns = on_host.sum(1), on_host.all(0)
                real = None if bool(whole_columns.all()) else real
        ids = input_ids
        if real is not None:
            # Tokens that are not in the stream go behind those that are, where nothing sees them.
            order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
            ids = None if ids is None else ids.gather(1, order)
            inputs_embeds = None if inputs_embeds is None else gather_positions(inputs_embeds, order)
            restarts = None if restarts is None else restarts.gather(1, order)
        seeded = None
        if lengths is None:
            spans = plan_aligned(length, config.chunk_size)
        else:
            num_tokens = torch.zeros_like(lengths) if cache is None else cache._num_tokens
            seeded = torch.zeros(batch_size, dtype=torch.bool) if cache is None else cache._seeded
            restarts = None if restarts is None else restarts.cpu()
            keeps = cache is not None
            spans, seeded = plan_spans(lengths, num_tokens, seeded, restarts, config.chunk_size, keeps)

        recomputes = self.checkpoints_chunks and self.training and torch.is_grad_enabled()
        kind = _Pass if recomputes else _PassByBlocks
        pass_ = kind(self, cache, spans, batch_size, length, real, with_states, with_weights, recomputes)
        pass_.text = ids if inputs_embeds is None else inputs_embeds
        if pass_.in_place and inputs_embeds is None and not with_states and not with_weights:
            pass_.reader = self._static_reader(cache)
        if num_last_states is not None and not with_states and real is None and all(span.is_aligned for span in spans):
            pass_.num_last_states = num_last_states
        if inputs_embeds is None and torch.is_grad_enabled() and not recomputes:
            pass_.embed(self.embed_tokens)
        if self.records_training and pass_.pieces is not None:
            from .training_graphs_baka import recorder_of

            recorder = recorder_of(self, pass_)
            if recorder is not None:
                pass_.is_recordable, pass_.graph = True, recorder.find(pass_)
        if cache is not None and seeded is not None:
            # What the state will know of itself after the call.
            num_aligned = int(whole_columns.flip(0).cumprod(0).sum())
            pass_.following = input_ids, seeded, num_aligned, restarts is not None
        return pass_

    @on_host
    def _read_token(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        cache: BakaCache | None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        within_beam_search: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """Read one token in each row from a static state: its states [B, 1, D]; None if it is not so simple.

        It is what `forward` does, with as little as possible to do on the host.
        """
        config = self.config
        if cache is None or not getattr(cache, "is_static", False) or input_ids is None or input_ids.shape[-1] != 1:
            return None
        if output_hidden_states or output_attentions or config.output_hidden_states or config.output_attentions:
            return None
        batch_size, _ = self._check_text(input_ids, None)
        self._check_cache(cache, batch_size, within_beam_search)
        real = self._check_mask(attention_mask, batch_size, 1, cache.get_seq_length())
        reads = torch.ones(batch_size, dtype=torch.bool) if real is None else real[:, 0].cpu()
        if config.uses_random_pauses and not bool((cache._pauses == torch.tensor(fixed_pauses(config))).all()):
            return None
        reader = self._static_reader(cache) if bool(reads.any()) else None
        if reader is None:
            return None
        cache._is_beam_search = within_beam_search
        states = reader.read_token(self, cache, input_ids, reads)
        num_aligned = int(bool(reads.all()))
        cache._advance(1, cache._num_tokens + reads, cache._seeded, cache._pauses, num_aligned, False)
        return states

    def _static_reader(self, cache: BakaCache | None) -> Any:
        """What reads a static state by graphs, see `graphs_baka`; None where that is not possible."""
        if cache is None or not getattr(cache, "is_static", False) or torch.is_grad_enabled():
            return None
        from .graphs_baka import reader_of

        return reader_of(self, cache)

    # What a call may hold

    def _check_text(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> tuple[int, int]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of `input_ids` and `inputs_embeds`.")
        if input_ids is not None:
            if input_ids.ndim != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
                raise ValueError(
                    f"expected `input_ids` to be integers of shape [batch, length], got {input_ids.dtype} "
                    f"of shape {tuple(input_ids.shape)}."
                )
            shape = input_ids.shape
        else:
            assert inputs_embeds is not None
            shape = inputs_embeds.shape
            if len(shape) != 3 or shape[2] != self.config.hidden_size:
                raise ValueError(
                    f"expected `inputs_embeds` of shape [batch, length, {self.config.hidden_size}], got {tuple(shape)}."
                )
        if shape[0] == 0 or shape[1] == 0:
            raise ValueError(f"expected at least one row and one token, got an input of shape {tuple(shape)}.")
        if input_ids is not None and self._can_look_at(input_ids):
            least, most = (int(value) for value in torch.aminmax(input_ids))
            if least < 0 or most >= self.config.vocab_size:
                raise ValueError(
                    f"expected token ids from 0 to {self.config.vocab_size - 1}, got {least if least < 0 else most}."
                )
        return shape[0], shape[1]

    @staticmethod
    def _can_look_at(tensor: torch.Tensor) -> bool:
        """Looking costs nothing on the CPU; on an accelerator it waits for the device, so only for prompts."""
        if torch.compiler.is_compiling():
            return False
        return tensor.device.type == "cpu" or (tensor.shape[1] > 1 and not torch.is_grad_enabled())

    def _check_cache(self, cache: BakaCache | None, batch_size: int, within_beam_search: bool = False) -> None:
        if cache is None:
            return
        # By its own account, not by isinstance: a checkpoint's remote code has a class of its own.
        signature = getattr(cache, "signature", None)
        if signature is None or not hasattr(cache, "memory"):
            raise ValueError(
                f"expected `past_key_values` to be a BakaCache (see `new_cache`), got {type(cache).__name__}."
            )
        if cache._reader is None or cache._reader.model() is not self:  # else it was looked at before
            check_signature(signature, signature_of(self.config))
        if cache.batch_size != batch_size:
            raise ValueError(
                f"expected a state of batch size {batch_size}, got one of {cache.batch_size}; "
                "`batch_repeat_interleave` and `batch_select_indices` change it."
            )
        if cache._is_beam_search and not within_beam_search:
            raise ValueError(
                "expected a state that belongs to its rows' texts: beam search left this one with the state of its "
                "running beams, not of the sequences it returned."
            )

    def _check_mask(self, mask: torch.Tensor | None, batch_size: int, length: int, fed: int) -> torch.Tensor | None:
        """The mask [B, L] of this call's tokens that are in the stream."""
        if mask is None:
            return None
        if mask.ndim != 2 or mask.shape[0] != batch_size or mask.shape[1] not in (length, fed + length):
            expected = f"[{batch_size}, {length}]" + (f" or [{batch_size}, {fed + length}]" if fed else "")
            raise ValueError(f"expected an `attention_mask` of shape {expected}, got {list(mask.shape)}.")
        return mask[:, -length:] != 0

    def _find_restarts(
        self, position_ids: torch.Tensor | None, batch_size: int, length: int, real: torch.Tensor | None
    ) -> torch.Tensor | None:
        """[B, L] bool, the tokens with which a new text begins inside a row, or None if there are none."""
        if position_ids is None:
            return None
        if position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch_size) or position_ids.shape[1] != length:
            raise ValueError(
                f"expected `position_ids` of shape [{batch_size}, {length}], got {list(position_ids.shape)}."
            )
        if length == 1:
            return None
        zeros = (position_ids == 0).expand(batch_size, length)
        if real is None:
            restarts = zeros.clone()
            restarts[:, 0] = False
        else:
            restarts = zeros & real & (real.cumsum(1) > 1)
        return restarts if bool(restarts.any()) else None

    # What a chunk is made of

    def learned_memory(self, like: torch.Tensor) -> torch.Tensor:
        """m_0, [R, D], in the dtype and on the device of `like`."""
        return self.memory_tokens(torch.arange(self.config.num_memory_tokens, device=like.device)).to(like)

    def learned_pause(self, like: torch.Tensor) -> torch.Tensor:
        """The pause vector, [1, D], in the dtype and on the device of `like`."""
        return self.pause_token(torch.zeros(1, dtype=torch.int64, device=like.device)).to(like)

    def solidify(self, memory: torch.Tensor, to: str) -> torch.Tensor:
        """f_read (`to="read"`) or f_write (`to="write"`) of a memory [B, R, D]."""
        if self.config.memory_solidifier == "none":
            return memory
        solidifier = getattr(self, f"{to}_solidifier") if self.config.separate_solidifiers else self.solidifier
        return solidifier(memory).to(memory.device)  # a device map may have put it elsewhere

    def _anchor(self, like: torch.Tensor) -> torch.Tensor:
        """Zero, but it depends on every recurrent parameter, so that each gets a gradient even in a text of one chunk.

        Distributed training waits for the gradient of every parameter.
        """
        total = like.new_zeros(())
        if self.config.num_pause_tokens:
            total = total + self.learned_pause(like).sum()
        if self.config.num_memory_tokens:
            learned = self.learned_memory(like)[None]
            for to in ("read", "write"):
                total = total + self.solidify(learned, to).sum().to(like)
            if self.config.memory_norm:
                total = total + self.memory_norm(learned).sum().to(like)
        return 0 * total


def is_whole(layout: Layout, config: BakaConfig) -> bool:
    """Whether a span is a whole chunk, or what is one if nothing is written after it."""
    width = layout.hi - layout.lo if layout.in_step else layout.slots.shape[1]
    return width >= config.stream_length - config.num_memory_tokens


class _Pass:
    """One call of `BakaModel`: reads its spans one after another and collects what they give."""

    text: Any  # the call's ids [B, L], or its embeddings [B, L, D]
    embeddings: Any = None  # of all spans, one after another [·, D], if all rows read the same columns
    pieces: Any = None  # each span's part of them [B, T, D]
    following: Any = None  # what `close` tells the cache
    reader: Any = None  # reads whole chunks by graphs, from a static state
    is_recordable: bool = False  # as a graph, to train on it
    graph: Any = None  # reads all of the call at once
    turn: Any = None  # of that graph, which no other call can have until the backward pass
    num_last_states: int | None = None  # how many columns' states are asked for, from the last one back; None: all

    def __init__(
        self,
        model: BakaModel,
        cache: BakaCache | None,
        spans: list[Span],
        batch_size: int,
        length: int,
        real: torch.Tensor | None,
        with_states: bool,
        with_weights: bool,
        recomputes: bool = False,
    ):
        config = model.config
        self.model, self.config, self.cache, self.spans = model, config, cache, spans
        self.batch_size, self.length, self.real = batch_size, length, real
        self.with_states, self.with_weights = with_states, with_weights
        self.blocks: Any = model.layers
        self.half = config.stream_length if config.use_xl_cache else 0  # slots of the previous stream that are kept
        self.in_place = cache is not None and not torch.is_grad_enabled()
        self.bptt_chunks = config.bptt_chunks if torch.is_grad_enabled() else None
        self.recomputes = recomputes
        layers = config.num_hidden_layers
        if cache is None:
            stream = Stream(None, [None] * layers, [None] * layers, self.half)
        elif self.in_place:
            stream = Stream(cache.memory, [None] * layers, [None] * layers)
        else:
            stream = self._borrow(cache)
        # By how many chunks their gradients reach back: one stream, unless `bptt_chunks` asks for a sliding window.
        self.streams: dict[int, Stream] = {0: stream if self.bptt_chunks is None else stream.detach()}
        self.last = stream
        self.fixed_pauses = fixed_pauses(config)
        self.pauses: Any = self.fixed_pauses if cache is None or not config.uses_random_pauses else cache._pauses
        self.masks: dict[Any, torch.Tensor | None] = {}
        self.states: list[list[torch.Tensor]] = []
        self.weights: list[list[torch.Tensor]] = []

    @on_host
    def reading(self) -> Any:
        """What the spans are to be read in."""
        device = self.model.norm.weight.device.type
        if not self.is_recordable or not torch.is_autocast_enabled(device):
            return nullcontext()
        # What autocast keeps while recording would be found, and be stale, when all else is read. Programs are compiled
        # for the one or the other, so the first call of a kind does without as well.
        return torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=False)

    def embed(self, embed_tokens: nn.Module) -> None:
        """Look all ids up in one call: the embedding has one gradient to add up, not one for every span."""
        if self.real is not None or not all(span.is_aligned for span in self.spans):
            self.text = embed_tokens(self.text)
            return
        # Span by span, so that each part lies in memory as it would alone: programs are compiled for a memory layout.
        ids = self.text.split([span.count for span in self.spans], dim=1)
        self.take_embeddings(embed_tokens(torch.cat([piece.flatten() for piece in ids])))

    def take_embeddings(self, embeddings: torch.Tensor) -> None:
        self.embeddings = embeddings
        parts = embeddings.split([self.batch_size * span.count for span in self.spans])
        self.pieces = [part.unflatten(0, (self.batch_size, -1)) for part in parts]

    def _borrow(self, cache: BakaCache) -> Stream:
        """The cache's tensors for a pass whose autograd graph may hold on to them."""

        def readable(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor

        for layer in cache.layers:
            layer.is_shared = True
        cache._release()
        # In the dtype that attention will have, as later calls find them: programs are compiled for one.
        dtype = dtype_of_products(cache.layers[0].keys.dtype, cache.device)
        keys = [readable(layer.keys).to(dtype) for layer in cache.layers]
        values = [readable(layer.values).to(dtype) for layer in cache.layers]
        return Stream(readable(cache.memory), keys, values)

    @runs_compiled_parts
    def read(self, index: int) -> None:
        """Read span number `index`."""
        if self.reader is not None and self._is_whole_chunk(self.spans[index]):
            return self._read_chunk(self.spans[index])
        span, layout, *arguments = self._prepare(index)
        num_spans = len(self.spans)

        # `bptt_chunks=k`: the loss of chunk i may reach back k chunks, that of chunk i+1 as well, but one less of the
        # same. So the chunk is read from copies of its state that differ in the reach of their gradients alone: reach
        # d leads to d + 1. Copies nobody will read are dropped.
        k = self.bptt_chunks
        reach = 0 if k is None else min(index, k)
        following: dict[int, Stream] = {}

        def is_read(reach: int) -> bool:
            return k is not None and (reach == min(index + 1, k) or (reach <= k and index + 1 + k - reach < num_spans))

        for depth, stream in self.streams.items():
            if self.in_place:
                with any_length if self._is_piece(layout) else nullcontext():
                    memory, after, states, weights = self._run_on_host(span.first, layout, *arguments, stream)
            else:
                with allow_programs():
                    memory, after, states, weights = self._run(span.first, layout, *arguments, stream)
            if self.in_place and self.cache is not None:
                self.cache.memory = self.cache.memory if memory is None else memory
                if _any(layout.completes):
                    self._roll_over(self.cache, span, layout)
            if depth == reach:
                self.states.append([state[:, :0] for state in states] if self._is_skipped(span) else states)
                self.weights.append(weights)
                self.last = after
                if k is None:
                    following[0] = after
                elif is_read(0):
                    following[0] = after.detach(layout.completes)
            if is_read(depth + 1):
                following[depth + 1] = after
        self.streams = following

    def _is_whole_chunk(self, span: Span) -> bool:
        flags = isinstance(span.first, bool) and isinstance(span.has_previous, bool)
        return span.is_aligned and flags and (span.start, span.count) == (0, self.config.chunk_size)

    @on_host
    def _is_piece(self, layout: Layout) -> bool:
        """Whether a span is less than a chunk, on a CUDA device."""
        return self.model.norm.weight.is_cuda and not is_whole(layout, self.config)

    def _is_skipped(self, span: Span) -> bool:
        """Whether nobody asks for the states of a span's text."""
        return self.num_last_states is not None and span.column + span.count <= self.length - self.num_last_states

    @on_host
    def _read_chunk(self, span: Span) -> None:
        """Read a whole chunk from a static state."""
        assert self.cache is not None
        self.cache.memory = self.streams[0].memory
        self.reader.take_in(self.cache)
        states = self.reader.read_chunk(self.model, self.cache, span, self.text[:, span.column :][:, : span.count])
        self.states.append([states[:, :0] if self._is_skipped(span) else states.clone()])
        self.weights.append([])
        self.pauses = self.fixed_pauses
        nothing: list[Any] = [None] * len(self.blocks)
        self.last = Stream(self.cache.memory, nothing, nothing)
        self.streams = {0: self.last}

    @on_host
    def _prepare(self, index: int) -> tuple[Span, Layout, Any, torch.Tensor]:
        """Span number `index`, its layout, its view and its tokens: ids [B, T] or embeddings [B, T, D]."""
        span, pauses = self._place_pauses(self.spans[index])
        followed = self.cache is not None or index + 1 < len(self.spans)
        layout = lay_out(span, self.config, pauses, followed)
        if self.pieces is not None:
            text = self.pieces[index]
        elif isinstance(span.column, int):
            text = self.text[:, span.column : span.column + span.length]
        else:
            columns = span.column[:, None] + torch.arange(span.length)
            columns = columns.clamp(max=self.text.shape[1] - 1).to(self.text.device)
            text = self.text.gather(1, columns) if self.text.ndim == 2 else gather_positions(self.text, columns)
        dtype = text.dtype if text.ndim == 3 else self.model.embed_tokens.weight.dtype
        return span, layout, self._view(span, layout, text.device, dtype), text

    def _place_pauses(self, span: Span) -> tuple[Span, Any]:
        """The text positions of each row's pauses, as `lay_out` takes them; and the span, spread out if they differ."""
        config = self.config
        pauses = self.pauses
        if config.uses_random_pauses:
            kept = torch.as_tensor(pauses).expand(self.batch_size, -1)
            drawn = torch.tensor(self.fixed_pauses)
            if self.model.training:
                others = torch.randperm(config.chunk_size - 1)[: config.num_pause_tokens - 1].sort().values + 1
                drawn = torch.cat([torch.zeros(1, dtype=torch.int64), others])
            begins = torch.as_tensor((span.start == 0) & (span.count > 0)).expand(self.batch_size)
            kept = self.pauses = torch.where(begins[:, None], drawn, kept)
            pauses = kept[0].tolist() if bool((kept == kept[0]).all()) else kept
        if span.in_step and isinstance(pauses, torch.Tensor):
            start, count = (torch.as_tensor(value).expand(self.batch_size) for value in (span.start, span.count))
            span = span._replace(start=start, count=count)
        if not span.in_step and not isinstance(pauses, torch.Tensor):
            pauses = torch.tensor(pauses, dtype=torch.int64).reshape(1, -1)
        return span, pauses

    def _view(
        self, span: Span, layout: Layout, device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, torch.Tensor | None, Placement]:
        """What all blocks share for a span: angles, mask, and the place of its keys and values."""
        config, half, S = self.config, self.half, self.config.stream_length
        cos, sin = rotary_table_of(config, device, dtype)
        if layout.in_step:
            own = slice(S + layout.lo, S + layout.hi)
            angles = cos[own], sin[own]
            has_previous = span.has_previous if isinstance(span.has_previous, bool) else True
            first = 0 if has_previous and half else half
            placement = Placement(first, half + layout.lo, half + layout.hi, parts=self._parts(span, layout, cos, sin))
            key = (layout.lo, layout.hi, first) if isinstance(span.has_previous, bool) else None
            if key is None or key not in self.masks:
                self.masks[key] = self._mask(span, layout, placement, device, dtype)
            mask = self.masks[key]
        else:
            slots = layout.slots.to(device)
            angles = cos[S + slots], sin[S + slots]
            index = (half + slots)[:, None, :, None]
            placement = Placement(slots=index, valid=layout.valid.to(device)[:, None, :, None])
            mask = self._mask(span, layout, placement, device, dtype)
        return angles, mask, placement

    def _parts(self, span: Span, layout: Layout, cos: torch.Tensor, sin: torch.Tensor) -> Parts | None:
        """What compiled attention needs to know of a span in step to do without a mask; None if it cannot."""
        S, R, width = self.config.stream_length, self.config.num_memory_tokens, layout.hi - layout.lo
        has_past = None
        if isinstance(span.has_previous, torch.Tensor):
            has_past = span.has_previous.to(cos.device)[:, None, None, None]
        # In the middle of a chunk all rows see what they have read of it, if not all a previous one.
        if self.in_place or (has_past is not None and layout.lo > 0):
            return None
        if not can_attend_in_parts(self.config, cos.dtype, cos.device):
            return None
        ends = [slice(0, R)] if layout.lo == 0 else []
        if layout.hi == S:
            ends.append(slice(width - R, width))
        turned = slice(2 * S + layout.lo, 2 * S + layout.hi)
        return Parts(tuple(ends) if R > 1 else (), has_past, (cos[turned], sin[turned]))

    def _mask(
        self, span: Span, layout: Layout, placement: Placement, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Which keys each query of a span sees, as the attention implementation wants it; None if all."""
        config = self.config
        if layout.in_step and layout.hi - layout.lo == 1 and isinstance(span.has_previous, bool):
            return None  # a single query, and every key before it is in its past
        numbers, horizons = compare_slots(config, span, layout, placement, device)
        batch_size = max(numbers.shape[0], horizons.shape[0])
        if batch_size == 1:
            numbers, horizons = numbers[0], horizons[0]

            def allowed(b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
                return numbers[k] <= horizons[q]
        else:
            numbers, horizons = (rows.expand(batch_size, -1).contiguous() for rows in (numbers, horizons))

            def allowed(b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
                return numbers[b, k] <= horizons[b, q]

        mask = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
            batch_size=batch_size,
            q_length=horizons.shape[-1],
            kv_length=numbers.shape[-1],
            q_offset=0,
            kv_offset=0,
            mask_function=allowed,
            attention_mask=None,
            allow_is_causal_skip=False,
            use_vmap=False,
            dtype=dtype,
            config=config,
            device=device,
        )
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            return mask
        # Each block would make this of it again.
        return torch.zeros_like(mask, dtype=dtype_of_products(dtype, device)).masked_fill_(~mask, float("-inf"))

    def _run(self, *arguments: Any) -> Any:
        if self.recomputes:
            return self.model._gradient_checkpointing_func(self._read_stream, *arguments)
        return self._read_stream(*arguments)

    # What a state is given in place stands elsewhere in every call: there would be a compiled program for each.
    _run_on_host = on_host(_run)

    def _read_stream(
        self,
        first: Any,
        layout: Layout,
        view: tuple[Any, torch.Tensor | None, Placement],
        text: torch.Tensor,
        stream: Stream,
    ) -> tuple[torch.Tensor | None, Stream, list[torch.Tensor], list[torch.Tensor]]:
        """Run the blocks over one span.

        Returns:
            The memory that its chunk has read, the state after it, hidden states [B, T, D] and weights of its text.
        """
        angles, mask, placement = view
        memory, hidden_states, placement, pasts = self._enter(first, layout, placement, text, stream)
        states, news, weights = [hidden_states], [], []
        for layer, past in zip(self.blocks, pasts, strict=True):
            # By position: checkpointing keeps positional arguments for each call of a layer.
            hidden_states, key, value, weight = layer(hidden_states, *past[:2], angles, mask, placement, *past[2:])
            states = [*states, hidden_states] if self.with_states else [hidden_states]
            is_kept = layout.followed and not self.in_place
            news.append((key.transpose(1, 2), value.transpose(1, 2)) if is_kept else None)
            weights.append(weight if self.with_weights else None)
        return memory, *self._leave(layout, placement, memory, pasts, news, states, weights)

    def _enter(
        self, first: Any, layout: Layout, placement: Placement, text: torch.Tensor, stream: Stream
    ) -> tuple[torch.Tensor | None, torch.Tensor, Placement, list[tuple[Any, Any, Any]]]:
        """What is ready before the blocks run: the memory that a span's chunk reads, what the first block reads
        [B, Q, D], the span's place, and for each block the keys and values from before it or the layer of the cache
        that has them."""
        model, R = self.model, self.config.num_memory_tokens
        text = model.embed_tokens(text) if text.ndim == 2 else text
        memory, read, write = stream.memory, None, None
        if R and (_any(layout.begins) or _any(layout.completes)):
            learned = model.learned_memory(text).expand(self.batch_size, -1, -1)
            memory = learned if memory is None else memory.to(text)
            memory = _where(_and(layout.begins, first), learned, memory)
            if _any(layout.begins):
                read = learned if first is True else _where(first, learned, model.solidify(memory, "read"))
            if _any(layout.completes):
                write = learned
                if self.config.memory_write == "carry" and first is not True:
                    write = _where(first, learned, model.solidify(memory, "write"))
        if stream.turns:
            placement = placement._replace(turn=self._backwards(text))
        stop = placement.start if placement.slots is None else self.half + self.config.stream_length
        pasts: list[tuple[Any, Any, Any]] = []
        for index in range(len(self.blocks)):
            if self.cache is not None and self.in_place:
                pasts.append((None, None, self.cache.layers[index]))
            else:
                pasts.append((*stream.kept(index, placement.first, stop), None))
        return memory, self._assemble(layout, text, read, write), placement, pasts

    def _leave(
        self,
        layout: Layout,
        placement: Placement,
        memory: Any,
        pasts: list[tuple[Any, Any, Any]],
        news: list[Any],
        states: list[torch.Tensor],
        weights: list[Any],
    ) -> tuple[Stream, list[torch.Tensor], list[torch.Tensor]]:
        """The state after a span, and the states and weights of its text, from what the blocks gave."""
        model, config, R = self.model, self.config, self.config.num_memory_tokens
        kept = [
            self._keep(layout, placement, past[:2], *new) if new else (None, None)
            for past, new in zip(pasts, news, strict=True)
        ]
        begin = placement.first if layout.completes is False and not self.in_place else 0
        turns = layout.completes is True and self.half > 0 and not self.in_place
        if R and _any(layout.completes):
            written = states[-1][:, -R:] if layout.in_step else gather_positions(states[-1], layout.write)
            written = model.memory_norm(written) if config.memory_norm else written
            memory = _where(layout.completes, written, memory)
        after = Stream(memory, [keys for keys, _ in kept], [values for _, values in kept], begin, turns)
        *states, last = (self._text(layout, state) for state in states)
        weights = [self._text_weights(layout, placement, weight) for weight in weights if weight is not None]
        return after, [*states, model.norm(last)], weights

    def _assemble(
        self, layout: Layout, text: torch.Tensor, read: torch.Tensor | None, write: torch.Tensor | None
    ) -> torch.Tensor:
        """The stream of a span, [B, Q, D]."""
        R, P = self.config.num_memory_tokens, self.config.num_pause_tokens
        pause = self.model.learned_pause(text).expand(self.batch_size, 1, -1) if P else None
        if layout.in_step:
            texts = iter(text.split([length for kind, length in layout.pieces if kind == "text"], dim=1))
            others = {"read": read, "pause": pause, "write": write}
            parts: list[Any] = [next(texts) if kind == "text" else others[kind] for kind, _ in layout.pieces]
            return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        absent = text.new_zeros(self.batch_size, max(R, 1), text.shape[2])
        sources = [absent[:, :R] if read is None else read, absent[:, :1] if pause is None else pause, text]
        if write is not None:
            sources.append(write)
        stream = torch.cat(sources, dim=1)
        return gather_positions(stream, layout.sources.clamp(max=stream.shape[1] - 1))

    def _text(self, layout: Layout, hidden_states: torch.Tensor) -> torch.Tensor:
        """The positions of the text alone, [B, T, D]."""
        if not layout.in_step:
            return gather_positions(hidden_states, layout.text)
        parts = hidden_states.split([length for _, length in layout.pieces], dim=1)
        parts = [part for (kind, _), part in zip(layout.pieces, parts, strict=True) if kind == "text"]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _text_weights(self, layout: Layout, placement: Placement, weights: torch.Tensor) -> torch.Tensor:
        """The weights [B, H, Q, K] of the text's queries over all 2S slots, as [B, T, H · 2S]."""
        S = self.config.stream_length
        left = S - self.half + placement.first
        weights = nn.functional.pad(weights, (left, 2 * S - left - weights.shape[3]))
        return self._text(layout, weights.transpose(1, 2).flatten(2))

    def _keep(
        self, layout: Layout, placement: Placement, past: Any, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Keys and values of a block after a span, for a `Stream`."""
        S, half = self.config.stream_length, self.half
        if layout.completes is True:
            if not half:
                return None, None
            if not layout.begins:
                key, value = (
                    place(kept, new, placement, half + S)[:, :, half - placement.first :]
                    for kept, new in zip(past, (key, value), strict=True)
                )
            return key, value
        keys = place(past[0], key, placement, half + S)
        values = place(past[1], value, placement._replace(turn=None), half + S)
        if layout.completes is False or not half:
            return keys, values
        if layout.in_step:
            keys, values = (pad_slots(tensor, placement.first, 0) for tensor in (keys, values))
        rolled = torch.cat([apply_rotary(keys[:, :, S:], *self._backwards(keys)), keys[:, :, S:]], dim=2)
        keys = _where(layout.completes, rolled, keys)
        values = _where(layout.completes, torch.cat([values[:, :, S:], values[:, :, S:]], dim=2), values)
        return keys, values

    def _backwards(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [1, head_dim] that turn keys of the own stream into those of a previous one: S slots earlier."""
        S = self.config.stream_length
        cos, sin = rotary_table_of(self.config, like.device, like.dtype)
        return cos[S], -sin[S]

    @on_host
    def _roll_over(self, cache: BakaCache, span: Span, layout: Layout) -> None:
        """The own stream of the rows whose chunk is full becomes their previous one, in place."""
        S = self.config.stream_length
        if cache._is_recording:
            completes = torch.as_tensor(layout.completes).expand(self.batch_size)
            cache._record_boundary(span.num_tokens, completes, torch.as_tensor(self.pauses).expand(self.batch_size, -1))
        if not self.half:
            return
        for layer in cache.layers:
            for buffer, own in (
                (layer.keys, apply_rotary(layer.keys[:, :, S:], *self._backwards(layer.keys))),
                (layer.values, layer.values[:, :, S:]),
            ):
                buffer[:, :, :S] = _where(layout.completes, own, buffer[:, :, :S])

    @on_host
    def close(self, kept: list[tuple[torch.Tensor, torch.Tensor]]) -> BaseModelOutputWithPast:
        """Leave the state behind in the cache, `kept` for its keys and values, and put together what was read."""
        if self.spans and self.graph is None:
            self.anchor()
        if self.cache is not None:
            self._leave_state(self.cache, kept, *self.following)
        states, weights = self._outputs()
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            **{CACHE_NAME: self.cache},
            hidden_states=tuple(states) if self.with_states else None,
            attentions=weights,
        )

    def anchor(self) -> None:
        """In training, make every parameter one that the call depends on."""
        if self.model.training and torch.is_grad_enabled():
            first = self.states[0]
            first[-1] = first[-1] + self.model._anchor(first[-1])

    @runs_compiled_parts
    def kept_at_the_end(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each block's keys and values, [B, H_kv, slots, head_dim], that the cache is left with; none if in place."""
        kept, turn = self._find_kept()
        if turn is not None:
            with allow_programs():
                for index, (keys, values) in enumerate(kept):
                    kept[index] = as_previous(keys, values, turn)
        return kept

    @on_host
    def _find_kept(self) -> tuple[list[Any], Any]:
        """The same; or those of a stream that has just ended, and cos and sin that turn its keys back."""
        if self.cache is None or self.in_place or not self.spans:
            return [], None
        last, slots = self.last, self.half + self.config.stream_length
        if last.turns:
            return list(zip(last.keys, last.values, strict=True)), self._backwards(last.keys[0])
        kept = [last.kept(index, 0, slots) for index in range(len(self.blocks))]
        if kept[0][0] is None:  # nothing of a full chunk is kept without the XL cache
            kept = [(torch.zeros_like(layer.keys), torch.zeros_like(layer.values)) for layer in self.cache.layers]
        return kept, None

    def _leave_state(
        self,
        cache: BakaCache,
        kept: list[tuple[torch.Tensor, torch.Tensor]],
        input_ids: torch.Tensor | None,
        seeded: torch.Tensor,
        num_aligned: int,
        restarted: bool,
    ) -> None:
        """What the cache keeps of the call. In the last `num_aligned` positions no row had padding."""
        if self.spans:
            cache.memory = self.last.memory
        for layer, both in zip(cache.layers, kept, strict=False):  # none in place
            (layer.keys, layer.values), layer.is_shared = both, True
        num_tokens = self.spans[-1].num_tokens if self.spans else cache._num_tokens
        pauses = torch.as_tensor(self.pauses, dtype=torch.int64).expand(self.batch_size, -1).clone()
        cache._advance(self.length, num_tokens, seeded, pauses, num_aligned, restarted)
        if input_ids is None:
            cache._history = None
        else:
            cache._remember_ids(input_ids, self.real)

    def _outputs(self) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...] | None]:
        """Hidden states [B, L, D] and weights [B, H, L, 2S] of the call's tokens, each in its own column."""
        spans, batch_size, length, real = self.spans, self.batch_size, self.length, self.real
        config, S = self.config, self.config.stream_length
        if not spans:
            like = self.model.norm.weight
            empty = like.new_zeros(batch_size, length, config.hidden_size)
            blank = like.new_zeros(batch_size, config.num_attention_heads, length, 2 * S)
            count = config.num_hidden_layers + 1 if self.with_states else 1
            return [empty] * count, (blank,) * config.num_hidden_layers if self.with_weights else None

        columns = _columns_of(spans, batch_size, length)
        states = [_in_columns(parts, columns, real) for parts in zip(*self.states, strict=True)]
        weights = None
        if self.with_weights:
            shape = (batch_size, length, config.num_attention_heads, 2 * S)
            weights = tuple(
                _in_columns(parts, columns, real).view(shape).transpose(1, 2)
                for parts in zip(*self.weights, strict=True)
            )
        return states, weights


class _PassByBlocks(_Pass):
    """A pass of which torch.compile compiles the blocks alone: one program for all of them, not one that has them all.

    A block's own work is what it can speed up, and a program of many takes many times as long to compile. Only where a
    chunk is computed again in the backward pass, which happens outside, must it be compiled as a whole.
    """

    _run = runs_compiled_parts(_Pass._read_stream)
    _leave = on_host(_Pass._leave)

    # Whole chunks are compiled for their own length. PyTorch would take the second that it sees, a last chunk that
    # nothing reads on from, for one of many, and write slower code for any.

    def _view(self, span: Span, layout: Layout, *arguments: Any) -> tuple[Any, torch.Tensor | None, Placement]:
        angles, mask, placement = super()._view(span, layout, *arguments)
        turned = placement.parts.angles if placement.parts else ()
        self._fix_length(layout, *angles, *turned)
        if isinstance(mask, torch.Tensor):
            self._fix_length(layout, mask, dims=(2, 3))
        return angles, mask, placement

    @on_host
    def _enter(self, first: Any, layout: Layout, *arguments: Any) -> Any:
        memory, hidden_states, placement, pasts = super()._enter(first, layout, *arguments)
        self._fix_length(layout, hidden_states, dims=(1,))
        return memory, hidden_states, placement, pasts

    def _fix_length(self, layout: Layout, *tensors: torch.Tensor, dims: tuple[int, ...] = (0,)) -> None:
        """Have programs for whole chunks take `dims` of `tensors`, whose size the span decides, for what they are."""
        if layout.in_step and is_whole(layout, self.config):
            for tensor in tensors:
                torch._dynamo.mark_static(tensor, list(dims))


def _columns_of(spans: list[Span], batch_size: int, length: int) -> torch.Tensor | None:
    """[B, L] index: where the token of each column stands among the outputs of all spans; None if in its place."""
    if all(span.is_aligned for span in spans):
        return None
    columns = torch.zeros(batch_size, length + 1, dtype=torch.int64)  # one more, for what is not a token
    offset = 0
    for span in spans:
        count = torch.as_tensor(span.count).expand(batch_size)
        steps = torch.arange(span.length)
        target = torch.as_tensor(span.column).expand(batch_size)[:, None] + steps
        target = torch.where(steps < count[:, None], target, length)
        columns.scatter_(1, target, (offset + steps).expand(batch_size, -1))
        offset += len(steps)
    return columns[:, :length]


def _in_columns(
    parts: tuple[torch.Tensor, ...], columns: torch.Tensor | None, real: torch.Tensor | None
) -> torch.Tensor:
    """Put the outputs [B, T, ·] of all spans into the columns of the call; zeros where there is no real token."""
    joined = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    if columns is not None:
        joined = gather_positions(joined, columns)
    if real is None:
        return joined
    real = real.to(joined.device)
    rank = (real.cumsum(1) - 1).clamp(0, joined.shape[1] - 1)
    return gather_positions(joined, rank).masked_fill(~real[:, :, None], 0)


def _computes_losses(head: nn.Module) -> bool:
    """Whether a head can be asked for a loss: nothing wrapped, adapted, quantized or hooked. FSDP2 may shard it: its
    hooks have the weight ready whenever the head is called."""
    if type(head).__module__.startswith("torch.distributed.fsdp"):
        return isinstance(head, BakaHead)
    return (
        type(head) in (BakaHead, nn.Linear)  # the latter after `resize_token_embeddings`
        and head.bias is None
        and type(head.weight) is nn.Parameter
        and "forward" not in vars(head)
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks)
    )


def _any(rows: Any) -> bool:
    """Whether any row may be meant: nobody waits for an accelerator to say that none is."""
    return rows if isinstance(rows, bool) else rows.device.type != "cpu" or bool(rows.any())


def _and(left: Any, right: Any) -> Any:
    if isinstance(left, bool):
        return right if left else False
    return left & right


def _where(rows: Any, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    """`yes` in the rows that `rows`, a bool or a tensor [B], says and `no` in the others."""
    if isinstance(rows, bool):
        return yes if rows else no
    return choose_rows(rows, yes, no)


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear head, summed over tokens, with no more than `LOSS_PIECE` rows of logits at a time.

    Softmax gives the gradient of the logits as soon as there are logits. It is taken on to the hidden states and to the
    weight there and then, so that no logits are kept or computed twice; the backward pass has only to scale.
    """

    @staticmethod
    @runs_compiled_parts
    def forward(
        ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, with_gradient: bool
    ) -> torch.Tensor:
        """The loss, a float32 scalar, of hidden states [T, D] for `targets` [T], -100 for none, by `weight` [V, D]."""
        device, vocab_size = hidden_states.device, weight.shape[0]
        dtype = dtype_of_products(weight.dtype, device)
        # Whether gradients are enabled is not known in here.
        needs_hidden, needs_weight = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        states = hidden_states.to(dtype)
        num_blocks = _num_blocks(vocab_size)
        # Blocks of logits begin at multiples of 16 bytes: a GPU's matrix products are several times slower otherwise.
        width = num_blocks * 8 * -(-vocab_size // (8 * num_blocks))
        matrix = nn.functional.pad(weight.to(dtype), (0, 0, 0, width - vocab_size))
        total = torch.zeros((), dtype=_at_least_float32(dtype), device=states.device)
        grad_hidden = torch.empty_like(states) if needs_hidden else None
        grad_weight = torch.zeros_like(matrix) if needs_weight and not len(states) else None
        with torch.autocast(device.type, enabled=False):
            for begin in range(0, len(states), LOSS_PIECE):
                piece = slice(begin, begin + LOSS_PIECE)
                loss, gradient = _cross_entropy(
                    states[piece] @ matrix.T, targets[piece], vocab_size, needs_hidden or needs_weight
                )
                total += loss
                if grad_hidden is not None:
                    grad_hidden[piece] = gradient @ matrix
                if needs_weight:
                    grad_weight = _add_product(grad_weight, gradient.T, states[piece], total.dtype)
        ctx.dtypes = hidden_states.dtype, weight.dtype
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight[:vocab_size])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        def scaled(gradient: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
            if gradient is None:
                return None
            # In the precision of the sum: a scale rounded to half precision would be off for all of the gradient.
            return torch.mul(gradient, grad_output.view(1, 1), out=torch.empty_like(gradient, dtype=dtype))

        grad_hidden, grad_weight = map(scaled, ctx.saved_tensors, ctx.dtypes)
        return grad_hidden, grad_weight, None, None


@on_host
def _add_product(
    total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """total + left @ right, in place and in `dtype`; without a total the product, which may have its own."""
    is_half = left.dtype in (torch.bfloat16, torch.float16)
    if is_half and left.is_cuda and torch.version.cuda and torch.cuda.get_device_capability(left.device) >= (8, 0):
        # Added up as it is computed: neither rounded first nor written and read again.
        if total is None:
            return torch.mm(left, right, out_dtype=dtype)
        return torch.addmm(total, left, right, out_dtype=dtype, out=total)
    part = left @ right
    return part if total is None else total.to(dtype).add_(part)


def _num_blocks(num_logits: int) -> int:
    """Into how many blocks a token's logits are divided; padding of the last one changes nothing."""
    return -(-num_logits // LOSS_BLOCK)


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of logits [T, V'] for `targets` [T], and its gradient [T, V']; only `vocab_size` columns count."""
    wide, columns = logits.to(_at_least_float32(logits.dtype)), torch.arange(logits.shape[1], device=logits.device)
    if vocab_size < logits.shape[1]:
        wide = wide.masked_fill(columns >= vocab_size, float("-inf"))
    is_real = (targets != IGNORED)[:, None]
    target = torch.where(is_real, targets[:, None], 0)
    if torch.compiler.is_compiling():
        # What a compiler makes two passes of. The gradient takes the place of the logits, which nobody needs any more.
        logs = wide.unflatten(1, (_num_blocks(logits.shape[1]), -1)).logsumexp(2).logsumexp(1, keepdim=True)
        loss = torch.where(is_real, logs - wide.gather(1, target), 0).sum()
        gradient = torch.where(is_real, (wide - logs).exp() - (columns == target).to(wide.dtype), 0)
        return loss, logits.copy_(gradient) if with_gradient else logits
    probabilities = wide.log_softmax(1)
    loss = -torch.where(is_real, probabilities.gather(1, target), 0).sum()
    if not with_gradient:
        return loss, logits
    gradient = probabilities.exp_().scatter_add_(1, target, -torch.ones_like(wide[:, :1])).mul_(is_real)
    return loss, gradient.to(logits.dtype)


class BakaHead(nn.Linear):
    """The head of a language model: logits, or the summed loss with no more than `LOSS_PIECE` rows of them at a time.

    The loss is computed in here, and in one call, because a sharded model has a module's weight only while that runs.
    """

    def forward(self, hidden_states: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [..., V] of `hidden_states` [..., D]; or, of [T, D], the loss for `targets` [T], -100 for none."""
        return super().forward(hidden_states) if targets is None else self._loss(hidden_states, targets)

    @runs_compiled_parts
    def _loss(self, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return LinearCrossEntropy.apply(hidden_states, self.weight, targets, torch.is_grad_enabled())


class BakaForCausalLM(BakaPreTrainedModel, GenerationMixin):
    """BakaLLM with a language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: BakaConfig):
        super().__init__(config)
        self.model = BakaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = BakaHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: BakaCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        cache: BakaCache | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]  # its types are not followed
    ) -> CausalLMOutputWithPast:
        """Logits and loss; arguments as in `BakaModel.forward`, and

        Args:
            labels: [B, L] int64 token ids, -100 where there is no target; they are shifted here.
            logits_to_keep: only compute logits of the last so many positions (0: all), or of a 1-D tensor of positions.
            skip_logits: compute the loss alone, piece by piece: [B, L, vocab_size] never exists and `logits` is None.
            kwargs: among them `shift_labels` [B, L] int64, the target of each position itself, which counts instead of
                `labels`: so the last position of a call can have one.

        Returns:
            `loss` (if there are labels), `logits` [B, L, vocab_size], the state.

        Raises:
            ValueError: as `BakaModel.forward`; or labels have another shape than the text; or `skip_logits` has
                none or, on a CPU, one that is no token id.
        """
        text = input_ids if input_ids is not None else inputs_embeds
        # No parameter of its own: transformers takes every one with "label" in its name for one that must be there.
        shift_labels = kwargs.get("shift_labels")
        for name, targets in (("labels", labels), ("shift_labels", shift_labels)):
            if targets is not None and text is not None and targets.shape != text.shape[:2]:
                raise ValueError(f"expected `{name}` of shape {list(text.shape[:2])}, got {list(targets.shape)}.")
        if skip_logits:
            self._check_targets(labels if shift_labels is None else shift_labels)
        if labels is None and shift_labels is None and isinstance(logits_to_keep, int) and logits_to_keep:
            kwargs["num_last_states"] = logits_to_keep
        cache = either_name(past_key_values, cache)
        outputs = None
        hidden_states = None
        if cache is not None and inputs_embeds is None:
            hidden_states = self.model._read_token(input_ids, attention_mask, cache, **kwargs)
        if hidden_states is None:
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
            hidden_states, cache = outputs.last_hidden_state, getattr(outputs, CACHE_NAME)
        logits = loss = None
        if skip_logits:
            targets = shift_labels
            if targets is None and labels is not None:
                targets = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
            loss = self._loss_by_pieces(hidden_states, targets, kwargs.get("num_items_in_batch"))
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])
            if labels is not None or shift_labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: cache},
            hidden_states=None if outputs is None else outputs.hidden_states,
            attentions=None if outputs is None else outputs.attentions,
        )

    # `generate` asks for it in every step, and to find it out takes longer than all else that is done here on the host.
    forward.__signature__ = inspect.signature(forward)

    @on_host
    def _check_targets(self, targets: torch.Tensor | None) -> None:
        if targets is None:
            raise ValueError("expected `labels` or `shift_labels` with `skip_logits=True`: there is nothing to return.")
        # On an accelerator one would have to wait for the device.
        if targets.device.type == "cpu" and self.model._can_look_at(targets):
            wrong = targets[(targets != IGNORED) & ((targets < 0) | (targets >= self.config.vocab_size))]
            if len(wrong):
                most = self.config.vocab_size - 1
                raise ValueError(f"expected targets from 0 to {most}, or {IGNORED} for none, got {int(wrong[0])}.")

    @runs_compiled_parts
    def _loss_by_pieces(
        self, hidden_states: torch.Tensor, targets: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The loss of `hidden_states` [B, L, D] for `targets` [B, L], no more than `LOSS_PIECE` logits at a time."""
        targets = targets.to(hidden_states.device)
        if num_items_in_batch is None:
            num_items_in_batch = (targets != IGNORED).sum()
        hidden_states, targets = hidden_states.flatten(0, 1), targets.flatten()
        if self.loss_function is ForCausalLMLoss and _computes_losses(self.lm_head):
            of_head = self.lm_head if isinstance(self.lm_head, BakaHead) else partial(BakaHead._loss, self.lm_head)
            loss = of_head(hidden_states, targets)
        else:
            loss = self._loss_of_head(hidden_states, targets)
        return (loss / torch.as_tensor(num_items_in_batch, device=loss.device)).float()  # as transformers' own

    def _loss_of_head(self, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The summed loss of any head, adapted, offloaded or quantized. Backward computes logits again."""

        def total(hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits = self.lm_head(hidden_states)
            size = self.config.vocab_size
            return self.loss_function(
                logits=logits, labels=None, vocab_size=size, shift_labels=targets, num_items_in_batch=1
            )

        pieces = zip(hidden_states.split(LOSS_PIECE), targets.split(LOSS_PIECE), strict=True)
        if torch.is_grad_enabled():
            losses = [checkpoint(total, *piece, use_reentrant=False) for piece in pieces]
        else:
            losses = [total(*piece) for piece in pieces]
        return torch.stack(losses).sum()

    # What `generate` asks of a recurrent model. It gets the tokens new to the state or the whole history, and tells
    # them apart by the length of the mask: as long as the tokens for the whole history, longer by what was fed before
    # for new tokens. Without a mask, or with one for the tokens alone, the state itself knows what it has read.

    def _prepare_model_inputs(
        self, inputs: torch.Tensor | None, bos_token_id: torch.Tensor | None, model_kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, str | None, dict[str, Any]]:
        cache = either_name(model_kwargs.pop("past_key_values", None), model_kwargs.pop("cache", None))
        if cache is not None:
            model_kwargs[CACHE_NAME] = cache
        inputs, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        if cache is not None:
            self.model._check_cache(cache, getattr(cache, "batch_size", 0))
            if mask is not None:
                model_kwargs["attention_mask"] = self._complete_mask(cache, inputs, mask)
        return inputs, name, model_kwargs

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        mask = super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)
        cache = model_kwargs.get(CACHE_NAME)
        # transformers takes pad tokens for padding. An assistant without a mask has a text without padding, and pad
        # tokens that a state has read as text, having been generated, were none.
        if getattr(generation_config, "is_assistant", False):
            mask = torch.ones_like(mask)
        if cache is None:
            return mask
        fed = cache.get_seq_length()
        if inputs_tensor.ndim == 2 and self._is_history(cache, inputs_tensor[:, :fed], torch.ones_like(mask[:, :fed])):
            mask = torch.cat([torch.ones_like(mask[:, :fed]), mask[:, fed:]], dim=1)
        return self._complete_mask(cache, inputs_tensor, mask)

    def _complete_mask(self, cache: BakaCache, inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """A mask over all that `inputs` stands for: [B, L] if it is the whole history, [B, P + L] if it is new.

        Raises:
            ValueError: it cannot be told which, or nothing in it is new.
        """
        fed, length = cache.get_seq_length(), inputs.shape[1]
        cache._prompt = None  # how many columns of `inputs` the state has read, for `_prepare_cache_for_generation`
        if mask.ndim != 2 or mask.shape[0] != inputs.shape[0] or mask.shape[1] not in (length, fed + length):
            raise ValueError(
                f"expected an `attention_mask` of shape {[inputs.shape[0], length]} or "
                f"{[inputs.shape[0], fed + length]} for {length} tokens after the {fed} that the state has read, "
                f"got {list(mask.shape)}."
            )
        if fed == 0 or mask.shape[1] == fed + length:
            return mask
        advice = (
            f"For new tokens pass an `attention_mask` of shape {[inputs.shape[0], fed + length]}, ones for the {fed} "
            "positions read before it."
        )
        if inputs.ndim == 3:
            # Embeddings leave no trace to compare. transformers takes them for the whole history.
            if length <= fed:
                raise ValueError(
                    f"expected `inputs_embeds` of the whole history, more than the {fed} positions that the state has "
                    f"read, got {length}. {advice}"
                )
            cache._prompt = (fed, None)
            return mask
        if self._is_history(cache, inputs[:, :fed], mask[:, :fed]):
            if length == fed:
                raise ValueError(f"the state has read all of these {length} tokens: nothing is new. {advice}")
            cache._prompt = (fed, None)
            return mask
        if length > fed:
            raise ValueError(
                f"expected the whole history or new tokens, got {length} tokens of which the first {fed} are not "
                f"what the state has read. {advice}"
            )
        return torch.cat([mask.new_ones(mask.shape[0], fed), mask], dim=1)

    def _is_history(self, cache: BakaCache, input_ids: torch.Tensor, mask: torch.Tensor) -> bool:
        """Whether these are the tokens that the state has read, as far as a 64-bit hash can tell."""
        if input_ids.shape[1] != cache.get_seq_length() or cache._history is None:
            return False
        if cache.batch_size % input_ids.shape[0]:
            return False
        start = torch.zeros(input_ids.shape[0], dtype=torch.int64, device=input_ids.device)
        found = hash_tokens(input_ids, mask != 0, start)
        found = found.repeat_interleave(cache.batch_size // input_ids.shape[0])
        return bool((found.cpu() == cache._history.cpu()).all())

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, *args: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic", "static"):
            raise ValueError(
                "expected `cache_implementation` to be None, 'dynamic' or 'static' (the state is a BakaCache in any "
                f"case), got {generation_config.cache_implementation!r}."
            )
        is_static = generation_config.cache_implementation == "static"
        generation_config.prefill_chunk_size = None  # a prompt is read chunk by chunk as it is
        cache = model_kwargs.get(CACHE_NAME)
        if generation_config.use_cache is False:
            if cache is not None:
                cache._prompt = None
                raise ValueError(f"expected no `{CACHE_NAME}` with `use_cache=False`: a state can only go forward.")
            return
        # PEFT puts its own method in the place of this model's, but for prompt learning alone on this very object.
        wrapper = getattr(self.prepare_inputs_for_generation, "__self__", self)
        if getattr(getattr(wrapper, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                "expected `use_cache=False` in `generate` with PEFT's prompt learning, which would feed its virtual "
                "tokens to the state in every step. To carry a state, let `get_base_model()` generate from "
                "`inputs_embeds`, the virtual tokens of `get_prompt(batch_size)` first."
            )
        if cache is None:
            batch_size *= max(generation_config.num_beams, generation_config.num_return_sequences)
            cache = model_kwargs[CACHE_NAME] = self.new_cache(batch_size, static=is_static)
        else:
            cache._is_user_defined = True
            cache.is_static = cache.is_static or is_static
        if getattr(generation_config, "is_assistant", False):
            cache.activate_past_recording()  # a draft that is refused is cropped, by the model that it was made for
        if generation_config.num_beams > 1:
            model_kwargs["within_beam_search"] = True
        elif cache.batch_size > 1:
            model_kwargs["stop_token_ids"] = generation_config._eos_token_tensor

        # The mask of the prompt's new tokens. transformers crops and extends its own as the text grows, and not every
        # mode of generation cuts off the history: `prepare_inputs_for_generation` gets this for its first call.
        mask, num_read = model_kwargs.get("attention_mask"), 0 if cache._prompt is None else cache._prompt[0]
        cache._prompt = (num_read, None if mask is None else mask[:, cache.get_seq_length() :])
        cache._finished = None

    # Continuous batching pages the keys and values of many texts, and a state has no pages.

    @property
    def init_continuous_batching(self) -> Any:
        # A server asks by `hasattr`, warns, and goes on with `generate`, request by request.
        raise AttributeError("init_continuous_batching")

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "expected `generate`, got continuous batching (`generate_batch` or cache_implementation='paged'): it pages "
            "keys and values, and the state of a BakaLLM, of constant size, has no pages."
        )

    def _get_candidate_generator(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "expected `assistant_early_exit` to be None: the state of a text that some layers have not read is no "
                f"state to go on from, got {generation_config.assistant_early_exit!r}."
            )
        return super()._get_candidate_generator(generation_config, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: BakaCache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        stop_token_ids: torch.Tensor | None = None,
        cache: BakaCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        cache = either_name(past_key_values, cache)
        if cache is not None and cache._prompt is not None:
            # The prompt's new tokens, and those that an assistant has drafted after it.
            (num_read, attention_mask), cache._prompt = cache._prompt, None
            prompt = inputs_embeds if inputs_embeds is not None and is_first_iteration else input_ids
            next_sequence_length = prompt.shape[1] - num_read
            if attention_mask is not None and cache._is_recording:
                # Speculation: drafted tokens are text, and an assistant that starts late has the text's mask from then.
                drafted = max(0, next_sequence_length - attention_mask.shape[1])
                attention_mask = nn.functional.pad(attention_mask, (0, drafted), value=1)[:, -next_sequence_length:]
        elif cache is not None:
            # What was generated is in the stream, except that a row which has met EOS takes nothing any more: its
            # state is that before its last token, as it is for the row that ends last.
            attention_mask = None
            kwargs.pop("position_ids", None)
            if stop_token_ids is not None:
                ended = torch.isin(input_ids[:, -1], stop_token_ids.to(input_ids.device))
                cache._finished = ended if cache._finished is None else cache._finished | ended
                attention_mask = ~cache._finished[:, None]
            if next_sequence_length == 1 and not is_first_iteration and input_ids.device == cache.device:
                # A step of one token, by far the most frequent: there is nothing else to prepare.
                token = input_ids[:, -1:].clone(memory_format=torch.contiguous_format)
                inputs = {"input_ids": token, "attention_mask": attention_mask, CACHE_NAME: cache}
                return inputs | {key: value for key, value in kwargs.items() if key != "labels"}
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE_NAME: cache},
            **kwargs,
        )


class BakaForSequenceClassification(BakaPreTrainedModel):
    """BakaLLM that reads a document of any length, memory carried through, and judges it at its last token."""

    def __init__(self, config: BakaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = BakaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: BakaCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: BakaCache | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]  # its types are not followed
    ) -> SequenceClassifierOutputWithPast:
        """Logits [B, num_labels] at each row's last real token; arguments as in `BakaModel.forward`, and `labels` [B].

        The last real token is found by `attention_mask`, else by `config.pad_token_id`, else it is the last column.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=either_name(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)
        batch_size, length = logits.shape[:2]
        real = None
        if attention_mask is not None:
            real = attention_mask[:, -length:] != 0
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        columns = torch.arange(length, device=logits.device)
        last = columns[-1:].expand(batch_size) if real is None else (columns * real.to(logits.device)).argmax(1)
        pooled = logits[torch.arange(batch_size, device=logits.device), last]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=pooled, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=pooled,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


BakaModel.register_for_auto_class("AutoModel")
BakaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
BakaForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["BakaForCausalLM", "BakaForSequenceClassification", "BakaModel", "BakaPreTrainedModel"]
