"""Where tokens stand: the spans that a call is cut into, and pieces of chunks told from whole ones."""

from types import SimpleNamespace

import pytest
import torch
from helpers import CONFIGS, random_tokens, recorded_calls, tiny_config, tiny_model

from baka_hf import reading_baka
from baka_hf.stream_baka import Span, fixed_pauses, lay_out


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
                    found = reading_baka.Reading._is_piece(SimpleNamespace(config=config, model=model), layout)
                    assert found is (is_cuda and (start, stop) != (0, n))


def test_padded_positions_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collator's zeros behind a text are texts of one token: they are read side by side, each id once."""
    model = tiny_model(tiny_config())
    spans = recorded_calls(monkeypatch, reading_baka.Reading, "read_span")
    tokens, positions = random_tokens(model.config, 2, 300), torch.arange(300).repeat(2, 1)
    tokens[:, 20:], positions[:, 20:] = 0, 0
    model(tokens, position_ids=positions)
    assert len(spans) == 4 + 1 + 1  # chunks, the last text in its stream, and all others beside
