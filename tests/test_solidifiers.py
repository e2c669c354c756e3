"""What a memory passes through on its way into the next chunk."""

import pytest
import torch
from helpers import random_tokens, tiny_config

from baka_hf import BakaForCausalLM


@pytest.mark.smoke
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("initializer_range", [0.02, 0.3])
@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("solidifier", ["glu", "gelephant", "mlp", "layer"])
def test_solidifiers_start_close_to_the_identity(
    solidifier: str, width: int, initializer_range: float, separate: bool
) -> None:
    """A new model hardly changes a memory that it has written, one as it was learned, or any other; but it does."""
    sizes = dict(hidden_size=width, intermediate_size=3 * width, initializer_range=initializer_range)
    model = BakaForCausalLM(tiny_config(memory_solidifier=solidifier, separate_solidifiers=separate, **sizes))
    state = model.new_cache(3)
    with torch.no_grad():
        model(random_tokens(model.config, 3, 5), cache=state)
        learned = model.model.memory_tokens.weight.expand(3, -1, -1)
        for memory in (state.memory, learned, torch.randn(3, 2, width)):
            for role in ("read", "write"):
                change = (model.model.solidify(memory, role) - memory).norm() / memory.norm()
                assert 0 < change < 0.02


def test_solidifiers_that_a_checkpoint_lacks_start_close_to_the_identity(tmp_path: object) -> None:
    """Added on loading, while all else is as it was saved."""
    model = BakaForCausalLM(tiny_config())
    model.save_pretrained(tmp_path)
    loaded = BakaForCausalLM.from_pretrained(tmp_path, memory_solidifier="glu")
    assert torch.equal(loaded.model.memory_tokens.weight, model.model.memory_tokens.weight)
    memory = torch.randn(3, 2, 12)
    with torch.no_grad():
        change = (loaded.model.solidify(memory, "read") - memory).norm() / memory.norm()
    assert 0 < change < 0.02
