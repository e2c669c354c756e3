"""The formulas of associations, against loops over tokens and features."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from baka_hf import associative_baka
from baka_hf.associative_baka import delta_rule, dpfp, recall, solve_unit_lower, store

EXACT = dict(rtol=0, atol=1e-9)


def unit_keys(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_features() -> None:
    x = torch.randn(2, 5, dtype=torch.float64)
    rectified = torch.cat([x, -x], dim=-1).clamp(min=0)
    expected = [rectified[:, i] * rectified[:, (i - j) % 10] for j in (1, 2, 3) for i in range(10)]
    assert_close(dpfp(x), torch.stack(expected, dim=1), **EXACT)


def test_a_few_vectors_at_once() -> None:
    """Twice, since a first time nothing is there: then what is read is zero and every key is new."""
    torch.manual_seed(0)
    association, normalizer = torch.zeros(1, 12, 4, dtype=torch.float64), torch.zeros(1, 12, dtype=torch.float64)
    assert not recall(association, normalizer, dpfp(torch.randn(1, 3, 2, dtype=torch.float64))).any()
    for _ in range(2):
        keys, values = dpfp(torch.randn(1, 3, 2, dtype=torch.float64)), torch.randn(1, 3, 4, dtype=torch.float64)
        strengths = torch.rand(1, 3, dtype=torch.float64)
        A, z = association[0].clone(), normalizer[0].clone()
        for key, value, strength in zip(keys[0], values[0], strengths[0], strict=True):
            there = association[0].T @ key / (normalizer[0] @ key + 1e-5)
            A += strength * torch.outer(key, value - there)
            z += (1 - normalizer[0] @ key / (key @ key + 1e-5)).clamp(0, 1) * key
        association, normalizer = store(association, normalizer, keys, values, strengths)
        assert_close(association[0], A, **EXACT)
        assert_close(normalizer[0], z, **EXACT)
        assert_close(recall(association, normalizer, keys[:, :1])[0, 0], A.T @ keys[0, 0] / (z @ keys[0, 0] + 1e-5))


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 40, 64, 65, 129, 200, 512])
def test_every_token_in_turn(length: int) -> None:
    torch.manual_seed(length)
    keys, values, state = unit_keys(2, 3, length, 4), torch.randn(2, 3, length, 5).double(), torch.randn(2, 3, 4, 5)
    strengths, decay = torch.rand(2, 3, length).double(), torch.rand(2, 3).double()
    expected = decay[..., None, None] * state
    for t in range(length):
        key, value = keys[..., t, :], values[..., t, :]
        there = torch.einsum("bhd,bhdv->bhv", key, expected)
        expected = expected + torch.einsum("bhd,bhv->bhdv", strengths[..., t, None] * key, value - there)
    assert_close(delta_rule(state.double(), keys, values, strengths, decay), expected, **EXACT)
    floats = (x.float() for x in (state, keys, values, strengths, decay))
    assert_close(delta_rule(*floats), expected.float(), rtol=0, atol=1e-4)


def test_the_same_key_again_and_again() -> None:
    """The hardest system: what was stored last is what is there, also in float32."""
    keys = unit_keys(1, 1, 4).expand(1, 512, 4).float()
    values = torch.randn(1, 512, 3)
    state = delta_rule(torch.randn(1, 4, 3), keys, values, torch.ones(1, 512), torch.ones(1))
    assert_close(keys[:, 0] @ state, values[:, -1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [5, 21])
def test_gradients(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(associative_baka, "MAX_PIECE", 8)
    torch.manual_seed(0)
    inputs = torch.randn(1, 3, 2), unit_keys(1, length, 3), torch.randn(1, length, 2), torch.rand(1, length)
    leaves = [x.double().requires_grad_() for x in (*inputs, torch.rand(1))]
    torch.autograd.gradcheck(delta_rule, leaves)
    A, z, features = torch.randn(1, 12, 2), torch.rand(1, 12), dpfp(torch.randn(1, 3, 2))
    leaves = [x.double().requires_grad_() for x in (A, features, torch.randn(1, 3, 2), torch.rand(1, 3))]
    torch.autograd.gradcheck(lambda A, *others: store(A, z.double(), *others)[0], leaves)


def test_triangular_systems() -> None:
    torch.manual_seed(0)
    lower, right = torch.randn(2, 64, 64).double().tril(-1) / 8, torch.randn(2, 64, 3).double()
    expected = torch.linalg.solve_triangular(lower + torch.eye(64), right, upper=False, unitriangular=True)
    assert_close(solve_unit_lower(lower, right), expected, **EXACT)
