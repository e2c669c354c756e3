"""Which kernels of PyTorch's attention pieces of chunks are read with, where it would choose among them: on GPUs."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch
from helpers import CONFIGS, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from baka_hf.modeling_baka import Span, _Pass, any_length, fixed_pauses, lay_out

is_enabled = torch.backends.cuda.cudnn_sdp_enabled


@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_are_told_from_chunks(name: str) -> None:
    """By their width, whether or not another span follows; on a CPU nothing depends on it."""
    config = tiny_config(**CONFIGS[name])
    n = config.chunk_size
    for is_cuda in (True, False):
        model = SimpleNamespace(norm=SimpleNamespace(weight=SimpleNamespace(is_cuda=is_cuda)))
        for start in range(n):
            for stop in range(start + 1, n + 1):
                for followed in (True, False):
                    span = Span(0, start, stop - start, stop - start, True, False, stop)
                    layout = lay_out(span, config, fixed_pauses(config), followed)
                    found = _Pass._is_piece(SimpleNamespace(config=config, model=model), layout)
                    assert found is (is_cuda and (start, stop) != (0, n))


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
