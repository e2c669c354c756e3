"""The kernel of a step of many rows, run by Triton's interpreter, beside PyTorch's attention."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from baka_hf.decoding_attention_baka import attend_seen

pytest.importorskip("triton")


def case(
    rows: int, heads: int, group: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values as they lie in a static state, and what is hidden of them."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, queries, heads, head_dim, generator=generator).transpose(1, 2).to(dtype)
    slots = torch.randn(2, 3, rows, heads // group, keys + 5, head_dim, generator=generator).to(dtype)
    key, value = slots[:, 1, :, :, :keys]
    # Of each row the slots of the own stream so far, and of some rows those before.
    start, numbers = keys // 2, torch.arange(keys)
    stops = torch.randint(start + 1, keys + 1, (rows, queries, 1), generator=generator)
    has_previous = torch.rand(rows, 1, 1, generator=generator) < 0.4
    sees = (numbers < stops) & ((numbers >= start) | has_previous)
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, float("-inf"))[:, None]
    return query, key, value, mask


@given(
    rows=st.integers(1, 3),
    heads=st.integers(1, 2),
    group=st.integers(1, 3),
    queries=st.integers(1, 2),
    keys=st.sampled_from([1, 2, 63, 64, 65, 130, 200]),
    head_dim=st.sampled_from([1, 8, 12, 16, 40]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_it_is_attention(
    rows: int,
    heads: int,
    group: int,
    queries: int,
    keys: int,
    head_dim: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    query, key, value, mask = case(rows, heads * group, group, queries, keys, head_dim, dtype, seed)
    actual = attend_seen(query, key, value, mask, 0.3)
    wide = (x.double() for x in (query, key, value))
    expected = scaled_dot_product_attention(*wide, attn_mask=mask.double(), scale=0.3, enable_gqa=True)
    assert actual.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert_close(actual.double(), expected, rtol=0, atol=tolerance)


def test_what_is_hidden_is_not_read() -> None:
    """NaN would be found in what it says, were it read."""
    query, key, value, mask = case(3, 2, 1, 1, 200, 16, torch.float32, 0)
    expected = attend_seen(query, key, value, mask, 0.3)
    hidden = (mask[:, :, 0] != 0)[..., None].expand(key.shape)
    key, value = (x.masked_fill(hidden, float("nan")) for x in (key, value))
    assert_close(attend_seen(query, key, value, mask, 0.3), expected)
