"""Small functions of numbers: the elephant gate, norms, RoPE, dtypes of products, picks of rows and positions, copies.

What depends on a model's state, or on how a text is cut into chunks, is never in here.
"""

import math
import reprlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_baka import BakaConfig
from .parts_baka import Part, register


def _elephant(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + x^8), computed in float32 at least: x^8 overflows fp16 beyond 4."""
    fourth = _within_range(x).square().square()
    return (1 / (1 + fourth * fourth)).to(x.dtype)


def _within_range(x: torch.Tensor) -> torch.Tensor:
    """x in float32 or float64, held where x^4 does not overflow. There x^8 has long done so and elephant is 0."""
    limit = 1e70 if x.dtype == torch.float64 else 1e9
    return x.to(at_least_float32(x.dtype)).clamp(-limit, limit)


class _Elephant(torch.autograd.Function):
    """elephant with its derivative -8 x^7 g^2, g = elephant(x), written out: it keeps nothing but x for it.

    It is multiplied in an order in which zero, as g soon is, meets no infinity and g^2 does not vanish early.
    """

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        wide = x.to(at_least_float32(x.dtype))
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


class ElephantActivation(nn.Module):
    """elephant(x) = 1 / (1 + |x / a|^d) with a = 1, d = 8 (arXiv 2310.01365): a bump that opens around zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Compilers derive and fuse the plain formula; that of PyTorch 2.11 loses the gradient of the function above.
        return _elephant(x) if torch.compiler.is_compiling() else _Elephant.apply(x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"elephant": ElephantActivation}
NORMS: dict[str, type[nn.Module]] = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


def get_activation(name: str) -> nn.Module:
    return ACTIVATIONS[name]() if name in ACTIVATIONS else ACT2FN[name]


def register_activation(name: str) -> Callable[[Part], Part]:
    """A decorator for a class of modules that `hidden_act="name"` then stands for.

    It is made of nothing, and its `forward` takes and gives one tensor, number by number.

    Raises:
        ValueError: the class is none of modules, or the name is another's, transformers' `ACT2FN` included.
    """
    return register("hidden_act", name, ACTIVATIONS, (nn.Module,), ACT2FN.keys())


def register_norm(name: str) -> Callable[[Part], Part]:
    """A decorator for a class of modules that `norm_type="name"` then stands for.

    It is made as `nn.RMSNorm` is, of a width and `eps=`, and its `forward` takes and gives states [..., D]; what
    `qk_norm` norms stays RMSNorm.

    Raises:
        ValueError: the class is none of modules, or the name is another's.
    """
    return register("norm_type", name, NORMS, (nn.Module,))


def initialise(std: float, *modules: nn.Module) -> None:
    """Mark modules whose `weight` is drawn with another standard deviation than `initializer_range`.

    The mark is on them, not on the module that they are in, since transformers passes over modules without parameters
    of their own when it initialises a model whose code is not its own.
    """
    for module in modules:
        module.initial_std = std  # type: ignore[assignment]


class WideLayerNorm(nn.LayerNorm):
    """LayerNorm of states [..., D], computed and given in float32 at least."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        dtype = at_least_float32(states.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return nn.functional.layer_norm(states.to(dtype), self.normalized_shape, weight, bias, self.eps)


class WideRMSNorm(nn.RMSNorm):
    """RMSNorm of states [..., D], computed and given in float32 at least."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        dtype = at_least_float32(states.dtype)
        return nn.functional.rms_norm(states.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps)


WIDE_NORMS: dict[str, type[nn.Module]] = {"layernorm": WideLayerNorm, "rmsnorm": WideRMSNorm}


def get_norm(config: BakaConfig, wide: bool = False) -> nn.Module:
    """A norm of states [..., D], of the kind that the configuration says; `wide`: one that computes and gives float32
    at least, if the kind is one of the package's own."""
    kind: Any = NORMS[config.norm_type]
    kind = WIDE_NORMS.get(config.norm_type, kind) if wide else kind
    return kind(config.hidden_size, eps=config.layer_norm_eps)


def inverse_frequencies(rope_type: str, theta: float, head_dim: int, *scaling: float) -> torch.Tensor:
    """The angles [head_dim / 2] of one slot, by which RoPE turns pairs of features, in float64.

    `scaling` are the numbers that `configuration_baka.ROPE_TYPES` names. The formulas are those of transformers'
    `ROPE_INIT_FUNCTIONS`, which compute them in float32.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if rope_type == "linear":
        return frequencies / scaling[0]
    if rope_type == "llama3":
        # Features that turn often within the context of before stay, those that turn seldom are slowed down.
        factor, low, high, context = scaling
        turns = context * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / factor
    return frequencies


@torch.compiler.assume_constant_result
def rotary_table(
    rope: tuple[Any, ...], num_slots: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [num_slots, 1, head_dim] of RoPE's angles (arXiv 2104.09864) in Llama's rotate-half layout.

    `rope` is what `inverse_frequencies` takes.

    sin has the other sign in its first half, see `apply_rotary`. The angles are computed in float64: no buffer that a
    cast of the model to half precision could spoil.
    """
    return _rotary_table(rope, num_slots, device, dtype)


@lru_cache(maxsize=32)
def _rotary_table(
    rope: tuple[Any, ...], num_slots: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):
        angles = torch.arange(num_slots, dtype=torch.float64)[:, None, None] * inverse_frequencies(*rope)
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        return cos.to(device=device, dtype=dtype), sin.to(device=device, dtype=dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn queries or keys [B, T, H, head_dim] by T angles of `rotary_table`; by a single one, in any layout.

    A pair (a, b) lies half a head apart and becomes (a cos - b sin, b cos + a sin): the halves change places, which
    compilers read past more easily than halves put together anew, and sin brings the sign.
    """
    return x * cos.to(x) + x.roll(x.shape[-1] // 2, dims=-1) * sin.to(x)


def rotary_table_of(config: BakaConfig, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [2S, 1, head_dim] of a model's slots, for the queries and keys of states of `dtype`."""
    rope_type, theta, scaling = config.rope
    rope = rope_type, theta, config.head_dim, *scaling.values()
    return rotary_table(rope, 2 * config.stream_length, device, dtype_of_products(dtype, device))


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    # Not by `torch.promote_types`, which would be an operation of exported programs.
    return dtype if dtype == torch.float64 else torch.float32


def dtype_of_products(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What matrix products make of `dtype`: autocast's if that is on."""
    # Weights that are offloaded are on "meta", which autocast does not know.
    if dtype == torch.float64 or device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return dtype
    return torch.get_autocast_dtype(device.type)


def pad_slots(tensor: torch.Tensor, left: int, right: int) -> torch.Tensor:
    """Add `left` and `right` empty slots to keys or values [B, H, slots, head_dim]."""
    return nn.functional.pad(tensor, (0, 0, left, right)) if left or right else tensor


def as_tensor(value: Any, expected: str) -> torch.Tensor:
    """`value`, a tensor or what PyTorch takes for one, as a tensor.

    Raises:
        ValueError: it is neither, as an array of objects is not; with what was `expected`.
    """
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"expected {expected}, got {reprlib.repr(value)}: {error}") from error


def put_on(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` on that device, without waiting for what the device has still to do, if it comes from the host.

    CUDA reads memory of the host that is not pinned before such a copy returns, so the tensor may change afterwards.
    """
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


def sent_to_host(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Send a tensor to the host. What comes back gives it there, and waits for it alone: what a CUDA device was asked
    for afterwards may still be to do."""
    if tensor.device.type != "cuda":
        return tensor.cpu
    host = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    arrival = torch.Event(device=tensor.device)
    arrival.record()

    def arrived() -> torch.Tensor:
        arrival.synchronize()
        return host

    return arrived


def from_host(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` on that device if it lies on the host, else where it is."""
    return put_on(device, tensor) if tensor.device.type == "cpu" else tensor


def gather_positions(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [B, T, D] at `index` [B, K]: [B, K, D]."""
    return x.gather(1, index.to(x.device)[:, :, None].expand(-1, -1, x.shape[2]))


def choose_rows(rows: torch.Tensor, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    """`yes` [B, …] in the rows where `rows` [B] is True and `no` [B, …] in the others."""
    return torch.where(rows.to(yes.device).view(-1, *[1] * (yes.ndim - 1)), yes, no.to(yes))


def any_rows(rows: Any) -> bool:
    """Whether any row may be meant: nobody waits for an accelerator to say that none is, and a program serves all."""
    if isinstance(rows, bool):
        return rows
    return torch.compiler.is_compiling() or rows.device.type != "cpu" or bool(rows.any())


def and_rows(left: Any, right: Any) -> Any:
    if isinstance(left, bool):
        return right if left else False
    return left & right


def where_rows(rows: Any, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    """`yes` in the rows that `rows`, a bool or a tensor [B], says and `no` in the others."""
    if isinstance(rows, bool):
        return yes if rows else no
    return choose_rows(rows, yes, no)
