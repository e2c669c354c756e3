"""Attention in parts beside the formula; and which of PyTorch's kernels read pieces of chunks on GPUs."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from baka_hf.attention_baka import FEW_VECTORS, AttentionInParts, any_length

is_enabled = torch.backends.cuda.cudnn_sdp_enabled


def test_cudnn_is_left_as_it_was() -> None:
    """And so is a user's own choice."""
    for choice in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(choice)
        with any_length:
            assert not is_enabled()
        assert is_enabled() is choice
    torch.backends.cuda.enable_cudnn_sdp(True)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), any_length:
        assert is_enabled()  # there is nothing else
    assert is_enabled()


def test_threads_that_overlap() -> None:
    """The one that came last may leave last."""
    steps = Barrier(2)

    def first() -> None:
        with any_length:
            steps.wait()  # both are in
            steps.wait()
        steps.wait()  # the second one is alone

    def second() -> bool:
        with any_length:
            steps.wait()
            steps.wait()
            steps.wait()
            return is_enabled()

    with ThreadPoolExecutor(2) as threads:
        futures = threads.submit(first), threads.submit(second)
        assert futures[1].result(timeout=60) is False
    assert is_enabled()


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(0, 40)),
    memory=st.integers(0, 6) | st.just(FEW_VECTORS + 1),
    is_whole=st.booleans(),
    rows_differ=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_parts_are_the_whole(
    sizes: tuple[int, int, int, int], memory: int, is_whole: bool, rows_differ: bool, seed: int
) -> None:
    """Output and gradients are those of one softmax over all that a query sees, whichever rows see a past."""
    batch_size, heads, num_text, num_past = sizes
    length = num_text + memory * (1 + is_whole)
    generator = torch.Generator().manual_seed(seed)

    def draw(num: int) -> torch.Tensor:
        return torch.randn(batch_size, heads, num, 4, dtype=torch.float64, generator=generator).requires_grad_()

    query, key, value, grad_output = (draw(length) for _ in range(4))
    past = [draw(num_past), draw(num_past)] if num_past else [None, None]
    has_past = torch.rand(batch_size, 1, 1, 1, generator=generator) < 0.5 if rows_differ else None

    positions = torch.arange(length)
    horizons = torch.where(positions < memory, memory - 1, positions)
    if is_whole:
        horizons[length - memory :] = length - 1
    scores = (0.7 * query @ key.mT).where(positions <= horizons[:, None], float("-inf"))
    values = value
    if num_past:
        past_scores = 0.7 * query @ past[0].mT
        if has_past is not None:
            past_scores = past_scores.where(has_past, float("-inf"))
        scores, values = torch.cat([past_scores, scores], dim=-1), torch.cat([past[1], value], dim=2)
    expected = scores.softmax(-1) @ values

    ends = (slice(0, memory), slice(length - memory, length))[: 1 + is_whole] if memory else ()
    tensors = [tensor if tensor is None else tensor.transpose(1, 2) for tensor in (query, key, value, *past)]
    found = AttentionInParts.apply(*tensors, has_past if num_past else None, ends, 0.7).transpose(1, 2)
    assert_close(found, expected)
    inputs = [tensor for tensor in (query, key, value, *past) if tensor is not None]
    for mine, right in zip(grad(found, inputs, grad_output), grad(expected, inputs, grad_output), strict=True):
        assert_close(mine, right, atol=1e-12, rtol=1e-7)
