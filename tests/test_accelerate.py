"""Weights that are elsewhere than a plain model has them: offloaded, in another precision, quantized."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import convert_to_fp32
from helpers import random_tokens, tiny_config, tiny_model
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from baka_hf import BakaForCausalLM, functions_baka, inputs_baka, loss_baka

LENGTH = 18  # three chunks of 5 and a rest
PARTS = (
    "model.embed_tokens",
    "model.pause_token",
    "model.memory_tokens",
    "model.memory_norm",
    "model.solidifier",
    "model.layers.0",
    "model.layers.1",
    "model.norm",
    "lm_head",
)


def load(folder: Path, **arguments: Any) -> BakaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **arguments)


def carried(model: Any, tokens: Tensor) -> tuple[list[list[int]], Any]:
    """What a model says, asked twice, and the state that was carried between."""
    state = model.new_cache(len(tokens))
    text = model.generate(tokens, cache=state, max_new_tokens=6, do_sample=False)
    return model.generate(text, cache=state, max_new_tokens=8, do_sample=False).tolist(), state


def losses(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """With logits and without."""
    return model(tokens, labels=tokens).loss, model(tokens, labels=tokens, skip_logits=True).loss


# Offloading


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(tiny_config(memory_solidifier="glu", memory_norm=True), torch.float32, seed=5).save_pretrained(folder)
    return folder


def on_disk(*parts: str) -> Callable:
    """Loaded with a device map that leaves some parts on the disk."""
    device_map = {part: "disk" if part in parts else "cpu" for part in PARTS}
    return lambda checkpoint, folder: load(checkpoint, device_map=device_map, offload_folder=folder)


def dispatched(checkpoint: Path, folder: Path) -> BakaForCausalLM:
    device_map = {part: "disk" if part.startswith("model.layers") else "cpu" for part in PARTS}
    return dispatch_model(load(checkpoint), device_map, main_device="cpu", offload_dir=folder)


PLACES: dict[str, Callable] = {
    "auto": lambda checkpoint, folder: load(checkpoint, device_map="auto"),
    "a_block_on_disk": on_disk("model.layers.1"),
    "memory_on_disk": on_disk("model.pause_token", "model.memory_tokens", "model.solidifier"),
    "ends_on_disk": on_disk("model.embed_tokens", "lm_head", "model.norm"),
    "all_on_disk": on_disk(*PARTS),
    "dispatch_model": dispatched,
    "cpu_offload": lambda checkpoint, folder: cpu_offload(load(checkpoint), torch.device("cpu")),
    "disk_offload": lambda checkpoint, folder: disk_offload(load(checkpoint), folder, torch.device("cpu")),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_offloaded_weights_are_read_as_if_they_were_there(place: Callable, checkpoint: Path, tmp_path: Path) -> None:
    model, plain = place(checkpoint, tmp_path), load(checkpoint)
    is_offloaded = {parameter.device.type for parameter in model.parameters()} != {"cpu"}
    assert is_offloaded == (place is not PLACES["auto"])
    tokens = random_tokens(model.config, 2, LENGTH)
    with torch.no_grad():
        assert_close(model(tokens).logits, plain(tokens).logits, rtol=0, atol=0)
        for found, expected in zip(losses(model, tokens), losses(plain, tokens), strict=True):
            assert_close(found, expected)
    (text, state), (expected, _) = carried(model, tokens), carried(plain, tokens)
    assert text == expected
    # Where the blocks compute, not "meta".
    assert {tensor.device.type for tensor in state.tensors().values()} == {"cpu"}
    assert state.memory.dtype == torch.float32


def test_outputs_in_float32_have_the_same_state() -> None:
    """With mixed precision accelerate converts what is returned; a state is no tensor, whatever its dtype."""
    model = tiny_model(tiny_config(), torch.bfloat16)
    outputs = model(random_tokens(model.config, 2, LENGTH), use_cache=True)
    converted = convert_to_fp32(outputs)
    assert converted.logits.dtype == torch.float32
    assert converted[-1] is outputs[-1] and converted[-1].layers[0].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_no_block_is_split_between_devices(share: float) -> None:
    with init_empty_weights():
        model = BakaForCausalLM(tiny_config(num_hidden_layers=4, memory_solidifier="layer", separate_solidifiers=True))
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    device_map = infer_auto_device_map(
        model, {"cpu": int(share * size), "disk": 10 * size}, no_split_module_classes=model._no_split_modules
    )
    assert set(device_map.values()) == {"cpu", "disk"}
    blocks = [f"model.layers.{index}" for index in range(4)]
    assert not [name for name in device_map if any(name.startswith(f"{block}.") for block in blocks)]


class Elsewhere(AlignDevicesHook):
    """Accelerate's hook of a part on a device; its weights are there already."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module


@pytest.mark.parametrize("far", PARTS)
def test_any_part_may_be_on_another_device(far: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors know their devices and mix no two of them; they need no second device to be there."""
    monkeypatch.setattr(inputs_baka, "can_look_at", lambda tensor: False)  # they hold no numbers
    monkeypatch.setattr(functions_baka, "_rotary_table", functions_baka._rotary_table.__wrapped__)  # nor may be kept
    with torch.no_grad(), FakeTensorMode():
        model = BakaForCausalLM(tiny_config(memory_solidifier="glu", memory_norm=True))
        for name, parameter in list(model.named_parameters()):
            owner, _, own_name = name.rpartition(".")
            device = "meta" if name.startswith(f"{far}.") else "cpu"
            moved = nn.Parameter(torch.empty(parameter.shape, device=device))
            model.get_submodule(owner)._parameters[own_name] = moved
        for part in PARTS:
            hook = Elsewhere(torch.device("meta" if part == far else "cpu"))
            add_hook_to_module(model.get_submodule(part), hook)
        skipped = model._skip_keys_device_placement
        add_hook_to_module(model, Elsewhere(torch.device("cpu"), io_same_device=True, skip_keys=skipped))
        tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
        for arguments in (dict(), dict(skip_logits=True), dict(output_hidden_states=True)):
            outputs = model(tokens, labels=tokens, use_cache=False, **arguments)
            assert outputs.loss.device.type == "cpu"
            assert outputs.logits is None or outputs.logits.device.type == "cpu"


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_weights_are_loaded_in_another_precision(name: str, checkpoint: Path) -> None:
    """Under its name and the one before it; the state follows."""
    for dtype in (torch.bfloat16, "bfloat16"):
        model = load(checkpoint, **{name: dtype})
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        tokens = random_tokens(model.config, 2, LENGTH)
        state = carried(model, tokens)[1]
        assert state.layers[0].keys.dtype == model(tokens).logits.dtype == torch.bfloat16
        assert state.memory.dtype == torch.float32  # normed


# Quantization


def torchao(name: str, **options: Any) -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(getattr(quantization, name)(), **options)


def bitsandbytes(**options: Any) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**options)


QUANTIZED: dict[str, tuple[Callable, float]] = {
    "torchao_int8_weights": (lambda: torchao("Int8WeightOnlyConfig"), 0.02),
    "torchao_int8_head": (lambda: torchao("Int8WeightOnlyConfig", include_input_output_embeddings=True), 0.02),
    "torchao_int8_activations": (lambda: torchao("Int8DynamicActivationInt8WeightConfig"), 0.05),
    "bitsandbytes_int8": (lambda: bitsandbytes(load_in_8bit=True), 0.05),
    "bitsandbytes_nf4": (lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.2),
}
KINDS = pytest.mark.parametrize(("kind", "error"), QUANTIZED.values(), ids=QUANTIZED)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for blocks of 64 numbers that share a scale."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = tiny_config(hidden_size=64, intermediate_size=64, memory_solidifier="glu", initializer_range=0.1)
    BakaForCausalLM(config).save_pretrained(folder)
    return folder


def says_what_it_means(model: Any, text: Tensor) -> bool:
    """Whether what was generated after `LENGTH` tokens is what a reading of the whole text finds most likely.

    Nearly: where activations are rounded to eight bits, the smallest difference can become a step.
    """
    with torch.no_grad():
        logits = model(text).logits[:, LENGTH - 1 : -1]
    chosen = logits.gather(2, text[:, LENGTH:, None])[:, :, 0]
    return bool((logits.amax(2) - chosen).max() < 0.05 * logits.std())


@KINDS
def test_a_quantized_model_is_close_and_carries_its_state(
    kind: Callable, error: float, wide: Path, tmp_path: Path
) -> None:
    model, plain = load(wide, quantization_config=kind(), dtype=torch.float32), load(wide)
    blocks = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    assert len(blocks) == 2 * 7
    linear = [*blocks, model.model.solidifier.proj, model.model.solidifier.gate_proj]
    assert all(type(module.weight) is not nn.Parameter for module in linear)
    for name in ("memory_tokens", "pause_token"):
        assert type(model.model.get_submodule(name).weight) is nn.Parameter

    tokens = random_tokens(model.config, 2, LENGTH)
    with torch.no_grad():
        found, expected = model(tokens).logits, plain(tokens).logits
        difference = (found - expected).norm() / expected.norm()
        assert 0 < difference < error
        with_logits, without = losses(model, tokens)
        assert_close(with_logits, without, rtol=1e-5, atol=1e-5)
    text, state = carried(model, tokens)
    assert state.memory.dtype == torch.float32
    assert says_what_it_means(model, torch.tensor(text))

    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again.model.layers[0].mlp.up_proj.weight) is type(model.model.layers[0].mlp.up_proj.weight)
    with torch.no_grad():
        assert_close(again(tokens).logits, found)


def test_a_head_quantized_in_place_keeps_its_loss(wide: Path) -> None:
    """It is a plain linear layer still; what its weight is has changed."""
    quantization = pytest.importorskip("torchao.quantization")
    model = load(wide)
    tokens = random_tokens(model.config, 2, LENGTH)
    before = losses(model, tokens)[1]
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model.lm_head) is loss_baka.BakaHead
    with_logits, without = losses(model, tokens)
    assert with_logits != before
    assert_close(with_logits, without, rtol=1e-5, atol=1e-5)
    without.backward()  # through the head to what is not quantized
    assert model.model.memory_tokens.weight.grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # PEFT 0.21 uses the old names
@pytest.mark.parametrize("kind", [QUANTIZED[name][0] for name in ("torchao_int8_weights", "bitsandbytes_nf4")])
def test_a_quantized_model_is_fine_tuned_beside_its_weights(kind: Callable, wide: Path) -> None:
    """Adapters on quantized layers, and memory vectors of their own (QLoRA)."""
    peft = pytest.importorskip("peft")
    model = load(wide, quantization_config=kind(), dtype=torch.float32)
    model = peft.prepare_model_for_kbit_training(model)
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", modules_to_save=["memory_tokens"])
    model = peft.get_peft_model(model, adapter)
    tokens = (torch.arange(LENGTH)[None] + torch.tensor([[0], [7]])) % 19
    memory = model.get_base_model().model.memory_tokens.weight
    before = memory.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    found = []
    for _ in range(12):
        loss = model(tokens, labels=tokens, skip_logits=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found[-1] < 0.7 * found[0]
    assert (model.get_base_model().model.memory_tokens.weight - before).abs().max() > 0.05
    text, _ = carried(model.eval(), tokens)
    assert says_what_it_means(model, torch.tensor(text))


# Export


def test_export_is_refused_rather_than_specialised() -> None:
    """Where a row stands in its chunk is counted on the host: a program of one call would be right for no other."""
    model = tiny_model(tiny_config(), torch.float32)
    state = model.new_cache()
    tokens = random_tokens(model.config, 1, 7)
    model(tokens, cache=state)

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, token: Tensor) -> Tensor:
            return self.model(token, cache=state).logits

    with pytest.raises(RuntimeError, match=r"torch\.compiler\.disable is not supported with torch\.export"):
        torch.export.export(Step(), (tokens[:, :1],), strict=False)
    with pytest.raises(RuntimeError, match=r"torch\.compiler\.disable is not supported with torch\.export"):
        torch.export.export(model, (), dict(input_ids=tokens, use_cache=False), strict=False)
    with pytest.raises(ValueError, match=r"Unsupported input type .*BakaCache"):
        torch.export.export(model, (), dict(input_ids=tokens[:, :1], cache=state), strict=False)
    assert state.num_tokens.tolist() == [7]
