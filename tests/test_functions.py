"""The functions without weights: the elephant, its gradients, and RoPE's table."""

from collections.abc import Callable

import pytest
import torch
from helpers import tiny_config, tiny_model
from naive import elephant
from torch import Tensor
from torch.testing import assert_close

from baka_hf.functions_baka import ElephantActivation

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
