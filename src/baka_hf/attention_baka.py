"""Attention of a span over the previous stream and the own one, and the kernels that compute it."""

import hashlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import library, nn
from torch.nn.attention import SDPBackend
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_layer_baka import BakaCacheLayer
from .compile_baka import on_host
from .configuration_baka import BakaConfig
from .functions_baka import apply_rotary, at_least_float32, initialise
from .stream_baka import Parts, Placement, View

# Compiled, attention does without a mask where these are PyTorch's kernels, by the type of device.
IN_PARTS: dict[str, SDPBackend] = {"cuda": SDPBackend.CUDNN_ATTENTION}

FEW_VECTORS = 32  # up to so many memory vectors, products of all with all are left to the kernel around them


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
    weights = nn.functional.softmax(weights, dim=-1, dtype=at_least_float32(query.dtype)).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


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
            past_key, past_value: what was before the span, [B, K, H, head_dim]; None if nothing was.
            has_past: [B, 1, 1, 1] bool, rows that see it; None: all.
            ends: the read slots and the write slots, as far as they are in the span.
            scale: what scores are multiplied by.
        """
        output, own_logs = _attend(query, key, value, True, scale)
        logs, weights = own_logs, None
        if past_key is not None and past_value is not None:
            past, past_logs = _attend(query, past_key, past_value, False, scale)
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
        ctx.save_for_backward(query, key, value, past_key, past_value, has_past, output, logs, weights)
        ctx.ends, ctx.scale = ends, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, past_key, past_value, has_past, output, logs, weights = ctx.saved_tensors
        ends, scale = ctx.ends, ctx.scale
        grads = list(_attend_backward(grad_output, query, key, value, output, logs, True, scale))
        past_grads: tuple[Any, ...] = None, None
        if past_key is not None:
            past_logs = logs if has_past is None else torch.where(has_past, logs, torch.finfo(logs.dtype).max / 2)
            more, *past_grads = _attend_backward(
                grad_output, query, past_key, past_value, output, past_logs, False, scale
            )
            grads[0] = grads[0] + more
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


# A name of its own for each copy of this module, since code that comes with a checkpoint may be loaded beside it. The
# module's name has a folder's in it, which may hold what no name of an operator may.
OPERATORS = f"baka_{hashlib.sha256(__name__.encode()).hexdigest()[:16]}"


@library.custom_op(f"{OPERATORS}::attend_backward", mutates_args=())
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
    """[..., R, R], the products of all rows of [..., R, head_dim], in float32 at least: softmax takes their exponent.

    A few are done where they are needed, by whatever kernel is compiled around them. For many that would be R · R ·
    head_dim numbers in memory or on their way: these are a matrix product, which autocast must not round. TF32 does
    not, as it has all bits of half precision.
    """
    left, right = (x.to(at_least_float32(x.dtype)) for x in (left, right))
    if left.shape[-2] <= FEW_VECTORS:
        return (left[..., :, None, :] * right[..., None, :, :]).sum(-1)
    with torch.autocast(left.device.type, enabled=False):
        return left @ right.mT


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
    if placement.slots is None or placement.valid is None:
        return new if past is None else torch.cat([past.to(new), new], dim=2)
    past = new.new_zeros(*new.shape[:2], num_slots, new.shape[3]) if past is None else past.to(new)
    index = placement.slots.expand_as(new)
    return past.scatter(2, index, torch.where(placement.valid, new, past.gather(2, index)))


def attend(
    module: "BakaAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor | None,
    past_value: torch.Tensor | None,
    view: View,
    slots: BakaCacheLayer | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The one way to a kernel: attention of a span, [B, Q, H, head_dim], and its weights [B, H, Q, K] (eager only).

    Args:
        module: the attention whose heads these are.
        query, key, value: of the span, [B, Q, H or H_kv, head_dim], in their places in the stream.
        past_key, past_value: what is kept from before, [B, H_kv, K, head_dim]; None if nothing is.
        view: what the span sees.
        slots: where keys and values are written in place, instead of `past_key` and `past_value`.
    """
    if view.parts is not None and torch.compiler.is_compiling():
        return _attend_in_parts(module, query, key, value, past_key, past_value, view.parts), None
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if slots is not None:
        keys, values = slots.update(key, value, view.placement)
    else:
        num_slots = module.config.stream_length * (1 + module.config.use_xl_cache)
        keys = place(past_key, key, view.placement, num_slots)
        values = place(past_value, value, view.placement, num_slots)
    attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager_attention_forward
    )
    return attention(module, query, keys, values, view.mask, dropout=0.0, scaling=module.scaling)


def _attend_in_parts(
    module: "BakaAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor | None,
    past_value: torch.Tensor | None,
    parts: Parts,
) -> torch.Tensor:
    """`AttentionInParts` of keys and values as `attend` takes them."""

    def all_heads(x: torch.Tensor) -> torch.Tensor:
        return repeat_kv(x.to(query).transpose(1, 2), module.num_key_value_groups).transpose(1, 2)

    past: tuple[Any, ...] = None, None
    if past_key is not None and past_value is not None:
        past = all_heads(past_key.transpose(1, 2)), all_heads(past_value.transpose(1, 2))
    return attend_in_parts(query, all_heads(key), all_heads(value), *past, parts.has_past, parts.ends, module.scaling)


class BakaValueResidual(nn.Module):
    """v ← (1 - λ) v + λ v₀, with v₀ the first block's values and λ = 1/2 + a weight that is 0 at first
    (arXiv 2410.17897)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))
        initialise(0.0, self)

    def forward(self, value: torch.Tensor, first_value: torch.Tensor) -> torch.Tensor:
        # Under autocast in the weight's float32.
        return torch.addcmul(value, 0.5 + self.weight, first_value - value).to(value.dtype)


class BakaAttention(nn.Module):
    """Multi-head attention over the previous stream and the own one."""

    def __init__(self, config: BakaConfig, has_value_residual: bool = False):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False  # the mask says it all
        width, kv_width = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.layer_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.layer_norm_eps)
        self.value_residual = BakaValueResidual() if has_value_residual else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key: torch.Tensor | None,
        past_value: torch.Tensor | None,
        view: View,
        slots: BakaCacheLayer | None = None,
        first_value: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Returns the output [B, Q, D], the keys and values to keep [B, Q, H_kv, head_dim], the weights (eager only).

        Arguments as `attend` takes them, and the values that the first block keeps, for `value_residual`.
        """
        products = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        query, key, value, kept_key = self.arrange(*products, view, first_value)
        attended, weights = attend(self, query, key, value, past_key, past_value, view, slots)
        return self.o_proj(attended.flatten(2)), kept_key, value, weights

    def arrange(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        view: View,
        first_value: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [B, Q, ·] by heads and in their places, [B, Q, ·, head_dim]; and keys to keep.

        They stay so, as they lie in memory, until they are attended: a compiler copies what lies otherwise, gradients
        above all.
        """
        query, key, value = (x.view(*x.shape[:-1], -1, self.head_dim) for x in (query, key, value))
        if self.config.qk_norm:
            # Under autocast in the weights' float32. Kernels want queries, keys and values of one dtype.
            query, key = (
                norm(x.to(norm.weight.dtype)).to(x.dtype) for norm, x in ((self.q_norm, query), (self.k_norm, key))
            )
        if self.value_residual is not None and first_value is not None:
            value = self.value_residual(value, first_value)
        turned = apply_rotary(key, *view.angles)
        kept = turned if view.previous_angles is None else apply_rotary(key, *view.previous_angles)
        return apply_rotary(query, *view.angles), turned, value, kept
