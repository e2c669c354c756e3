"""A step of decoding as a program of tensors: exported, compiled as one graph, compiled to a library."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLOSE, CONFIGS, logits_of, random_tokens, state_at, tiny_config, tiny_model
from torch import Tensor
from torch.testing import assert_close

from baka_hf import BakaCache, BakaForCausalLM
from baka_hf.export import DecodingStep, export_steps, step_for, tensors_of

Step = Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


def read_on(model: BakaForCausalLM, state: BakaCache, steps: dict[str, Step], **tolerance: Any) -> list[str]:
    """Read more than two chunks by steps and by the model: the kinds of steps, which gave what it gave."""
    tensors, kinds, config = tensors_of(state), [], model.config
    given = {name: tensor.clone() for name, tensor in tensors.items()}
    first = tensors
    with torch.no_grad():
        for token in random_tokens(config, state.batch_size, 2 * config.chunk_size + 3, seed=9).split(1, dim=1):
            kinds.append(step_for(config, tensors["num_tokens"]))
            logits, tensors = steps[kinds[-1]](token, tensors)
            assert_close(logits, logits_of(model, token, state)[:, 0], **tolerance)
    assert_close(tensors["num_tokens"], state.num_tokens)
    assert_close(tensors["memory"], state.memory, **tolerance)
    assert first.keys() == tensors.keys() and all(torch.equal(first[name], given[name]) for name in first)
    return kinds


@pytest.mark.smoke
@pytest.mark.parametrize(
    "name",
    ["default", "associations_of_memory", "associations_of_tokens_and_memory", "layer_separate", "gate", "pristine"],
)
@pytest.mark.parametrize("stage", ["seeded", "mid-chunk", "left-padded"])
def test_steps_read_as_the_model_does(name: str, stage: str) -> None:
    """From any state on, across chunks and their boundaries, whatever the state has; what is given stays as it is."""
    if stage == "seeded" and not tiny_config(**CONFIGS[name]).num_memory_tokens:
        pytest.skip("no memory")
    model = tiny_model(tiny_config(**CONFIGS[name]))
    steps = {kind: DecodingStep(model, kind) for kind in ("plain", "pause", "edge")}
    kinds = read_on(model, state_at(model, stage), steps, **CLOSE)
    if stage == "mid-chunk":  # twelve tokens of chunks of five were read, and pauses stand before the first and third
        has_pauses = model.config.num_pause_tokens == 2 and model.config.chunk_size == 5
        assert not has_pauses or kinds[:4] == ["pause", "plain", "edge", "edge"]


def test_one_kind_serves_all() -> None:
    model = tiny_model(tiny_config())
    read_on(model, model.new_cache(2), dict.fromkeys(("plain", "pause", "edge"), DecodingStep(model)), **CLOSE)


def test_exported_programs(tmp_path: Path) -> None:
    """Full graphs, one for each kind of step, that are saved and loaded."""
    model = tiny_model(tiny_config(num_hidden_layers=1))
    steps: dict[str, Step] = {}
    for kind, program in export_steps(model, batch_size=2).items():
        torch.export.save(program, tmp_path / f"{kind}.pt2")
        steps[kind] = torch.export.load(tmp_path / f"{kind}.pt2").module()
    assert list(steps) == ["plain", "pause", "edge"]
    assert {*read_on(model, state_at(model, "mid-chunk"), steps, **CLOSE)} == steps.keys()


def test_only_the_kinds_that_there_are() -> None:
    assert list(export_steps(tiny_model(tiny_config(**CONFIGS["chunk_of_one"], num_hidden_layers=1)))) == ["edge"]


def test_a_step_compiles_to_one_graph() -> None:
    """Exported first: PyTorch 2.9 cannot follow all that an export leaves behind."""
    model = tiny_model(tiny_config(**CONFIGS["gate"], num_hidden_layers=1))
    program = export_steps(model, batch_size=2)["edge"].module()
    step = torch.compile(program, fullgraph=True, backend="eager")
    read_on(model, state_at(model, "left-padded"), dict.fromkeys(("plain", "pause", "edge"), step), **CLOSE)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_a_step_without_python(tmp_path: Path) -> None:
    """A program that AOTInductor has compiled to a library for the CPU."""
    model = tiny_model(tiny_config(num_hidden_layers=1, chunk_size=3), torch.float32)
    # Nothing that a compiler takes long for.
    options = {"aot_inductor.compile_wrapper_opt_level": "O0", "cpp.simdlen": 1, "cpp.vec_isa_ok": False}
    path = torch._inductor.aoti_compile_and_package(
        export_steps(model)["edge"], package_path=str(tmp_path / "step.pt2"), inductor_configs=options
    )
    step = torch._inductor.aoti_load_package(path)
    steps = dict.fromkeys(("plain", "pause", "edge"), step)
    read_on(model, model.new_cache(), steps, rtol=1e-4, atol=1e-4)


def test_what_has_no_step() -> None:
    model = tiny_model(tiny_config())
    with pytest.raises(ValueError, match="`kind` must be one of plain, pause, edge, got 'chunk'"):
        DecodingStep(model, "chunk")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="expected attention 'sdpa' or 'eager', got 'flex_attention'"):
        export_steps(model)
    with pytest.raises(ValueError, match="expected `pause_placement` 'fixed', got 'random'"):
        DecodingStep(tiny_model(tiny_config(pause_placement="random")))
    state = model.new_cache()
    state._is_torn = True
    with pytest.raises(ValueError, match="expected a state between two calls"):
        tensors_of(state)
