"""The functions without weights: the elephant, its gradients, and RoPE's table."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import LLAMA3, tiny_config, tiny_model
from naive import elephant
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from baka_hf import BakaConfig
from baka_hf.functions_baka import ElephantActivation, inverse_frequencies, rotary_table_of

# Elephant: 1 / (1 + |x|^8)

MAGNITUDES = [0, 1e-8, 1e-4, 1e-2, 0.3, 0.5, 0.9, 1, 1.1, 1.5, 2, 3, 3.9, 4, 4.1, 5, 10, 100, 255, 1e3, 6e4]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def elephant_derivative(x: Tensor) -> Tensor:
    return -8 * x * x.abs() ** 6 / (1 + x.abs() ** 8) ** 2


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_elephant_gradcheck(check: Callable[..., bool]) -> None:
    """First and second derivatives are those of the finite differences."""
    x = torch.cat([torch.tensor([0, 1e-3, -1, 1, 2, -4]), torch.linspace(-3, 3, 25)]).double().requires_grad_()
    assert check(ElephantActivation(), (x,))


def test_elephant_takes_batches_of_gradients() -> None:
    """As whole Jacobians are computed, all rows at once."""
    x = torch.linspace(-3, 3, 25).double()
    jacobian = torch.autograd.functional.jacobian(ElephantActivation(), x, vectorize=True)
    assert_close(jacobian, elephant_derivative(x).diag())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elephant_in_every_dtype(dtype: torch.dtype) -> None:
    """Finite forward and backward, and within one rounding of the formula in float64."""
    x = torch.tensor([sign * magnitude for magnitude in MAGNITUDES for sign in (1, -1)], dtype=dtype)
    x.requires_grad_()
    y = ElephantActivation()(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    exact = x.detach().double()
    info = torch.finfo(dtype)
    # float32 and float64 have no wider format to compute |x|^8 in: a few roundings instead of one.
    rounding = dict(rtol=info.eps * (1 if info.bits == 16 else 16), atol=info.tiny * info.eps)
    assert_close(y.detach().double(), elephant(exact), **rounding)
    assert_close(x.grad.double(), elephant_derivative(exact), **rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elephant_far_out(dtype: torch.dtype) -> None:
    """At the end of a format's range the elephant is 0 and flat, where |x|^8 is infinite."""
    x = torch.tensor([1.0, -1.0], dtype=dtype).mul(torch.finfo(dtype).max).requires_grad_()
    y = ElephantActivation()(x)
    y.sum().backward()
    assert y.eq(0).all() and x.grad.eq(0).all()


def test_traced_elephant_far_out() -> None:
    """The formula that compilers see is finite, forward and backward, as far as numbers go."""
    module = torch.compile(ElephantActivation(), backend="eager")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        limit = torch.finfo(dtype).max
        x = torch.tensor([-limit, -6e4, -300.0, -1e-8, 0.0, 1e-8, 1.0, 4.0, 6e4, limit], dtype=dtype).requires_grad_()
        module(x).sum().backward()
        assert x.grad.isfinite().all() and module(x).isfinite().all()
        assert_close(x.grad[6], torch.tensor(-2.0, dtype=dtype))


# RoPE


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation_is_traced_in_any_precision(dtype: torch.dtype, autocast: bool) -> None:
    """A solidifier that is a block asks for RoPE's table where it is compiled."""
    model = tiny_model(tiny_config(memory_solidifier="layer"), dtype)
    memory = torch.randn(2, model.config.num_memory_tokens, model.config.hidden_size, dtype=dtype)
    solidify = torch.compile(model.model.solidify, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_close(solidify(memory, "read"), model.model.solidify(memory, "read"))


LLAMA31 = LLAMA3 | dict(rope_theta=5e5, factor=8.0, original_max_position_embeddings=8192)


@pytest.mark.smoke
@pytest.mark.parametrize("rope", [LLAMA31, LLAMA3, dict(rope_type="linear", rope_theta=1e4, factor=3.0)])
def test_frequencies_of_scaled_rope(rope: dict[str, Any]) -> None:
    """Those of transformers, which computes them in float32 and scales no scores with these types; in the table too."""
    rope_type, theta, scaling = BakaConfig(rope_parameters=rope).rope
    found = inverse_frequencies(rope_type, theta, 128, *scaling.values())
    expected, attention_scaling = ROPE_INIT_FUNCTIONS[rope_type](LlamaConfig(head_dim=128, rope_parameters=rope))
    assert attention_scaling == 1 and found.dtype == torch.float64
    assert_close(found.float(), expected, rtol=1e-6, atol=0)
    config = tiny_config(rope_parameters=rope, head_dim=128)
    cos, _ = rotary_table_of(config, torch.device("cpu"), torch.float64)
    assert_close(cos[1, 0, :64], found.cos())


def test_table_of_plain_rope() -> None:
    """Bit for bit that of theta ^ -(2i / head_dim), in float64, as it has always been."""
    config = tiny_config(head_dim=64, rope_parameters=dict(rope_theta=50))
    cos, sin = rotary_table_of(config, torch.device("cpu"), torch.float64)
    angles = torch.arange(22.0, dtype=torch.float64)[:, None, None] * 50.0 ** (-torch.arange(0, 64, 2).double() / 64)
    assert torch.equal(cos, angles.cos().repeat(1, 1, 2))
    assert torch.equal(sin, torch.cat([-angles.sin(), angles.sin()], dim=-1))
