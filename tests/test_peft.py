"""PEFT: adapters beside learned memory are trained, saved, loaded and merged; virtual tokens are read as text."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CHECKPOINTING, CLOSE, random_tokens, tiny_config, tiny_model
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from baka_hf import BakaForCausalLM
from baka_hf.data import LaneDataset
from baka_hf.state_files_baka import fingerprint_of
from baka_hf.training import BakaTrainer, BakaTrainingArguments

peft = pytest.importorskip("peft")
# PEFT 0.21 asks `is_gradient_checkpointing`, the old name, of every model.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

LENGTH = 18  # three chunks of 5 and a rest
GREEDY = dict(max_new_tokens=12, do_sample=False)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEARNED = ["memory_tokens", "pause_token"]
SOLIDIFIERS: dict[str, dict[str, Any]] = {
    "none": dict(),
    "glu": dict(memory_solidifier="glu"),
    "glu_separate": dict(memory_solidifier="glu", separate_solidifiers=True),
    "mlp": dict(memory_solidifier="mlp"),
    "layer": dict(memory_solidifier="layer", memory_norm=True),
}


def lora(**overrides: Any) -> Any:
    """On every linear layer of blocks and solidifiers; `proj` is a layer of the gated solidifiers."""
    fields = dict(task_type="CAUSAL_LM", r=3, target_modules=[*PROJECTIONS, "proj"], modules_to_save=LEARNED)
    return peft.LoraConfig(**fields | overrides)


def adapted(base: BakaForCausalLM, **overrides: Any) -> Any:
    """Every adapter drawn at random: with PEFT's own first weights, half of them get no gradient in the first step."""
    return peft.get_peft_model(base, lora(init_lora_weights=False, **overrides))


def texts(number: int = 16) -> list[dict[str, Tensor]]:
    """Texts that count upwards from anywhere."""
    rows = (torch.arange(number)[:, None] * 5 + torch.arange(LENGTH)) % 19
    return [dict(input_ids=row, labels=row) for row in rows]


def arguments(folder: Path, kind: Any = TrainingArguments, **overrides: Any) -> Any:
    fields = dict(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        max_steps=4,
        save_steps=4,
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    return kind(**fields | overrides)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny_model(tiny_config(memory_solidifier="glu", eos_token_id=18)).save_pretrained(folder)
    return folder


def load(folder: Path) -> BakaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("overrides", SOLIDIFIERS.values(), ids=SOLIDIFIERS)
def test_gradients_reach_adapters_and_learned_memory_alone(overrides: dict[str, Any]) -> None:
    model = adapted(tiny_model(tiny_config(**overrides))).train()
    linear = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    kinds = {name.split(".")[-1] for name in linear}
    assert kinds >= set(PROJECTIONS)
    assert any("solidifier" in name for name in linear) == ("memory_solidifier" in overrides)
    row = random_tokens(tiny_config(), 2, LENGTH)
    model(row, labels=row).loss.backward()
    got = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    moved = {name for name in got if model.get_parameter(name).grad.abs().max() > 0}
    expected = {f"base_model.model.{name}.lora_{half}.default.weight" for name in linear for half in "AB"}
    expected |= {f"base_model.model.model.{name}.modules_to_save.default.weight" for name in LEARNED}
    assert got == moved == expected


def test_learned_memory_is_the_adapters_own() -> None:
    """Read from the first token on while the adapter is active, and not while it is not."""
    model = adapted(tiny_model(tiny_config())).eval()
    tokens = random_tokens(tiny_config(), 1, LENGTH)
    before = model(tokens).logits
    with torch.no_grad():
        model.get_base_model().model.memory_tokens.weight.normal_()
    assert (model(tokens).logits - before).abs().amax(-1).min() > 1e-6
    with model.disable_adapter():
        assert_close(model(tokens).logits, tiny_model(tiny_config())(tokens).logits, **CLOSE)


LOAD = """
import sys
sys.modules["baka_hf"] = None
import json
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
folder, target, tokens = sys.argv[1], sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
model = AutoPeftModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model.get_base_model()).__module__.startswith("transformers_modules.")
state = model.new_cache(len(tokens))
with torch.no_grad():
    found = dict(logits=model(tokens).logits, generated=model.generate(tokens, cache=state, max_new_tokens=12,
        do_sample=False))
model.merge_and_unload().save_pretrained(target)
save_file(found, target + "/found.safetensors")
"""


def test_a_trained_adapter_is_loaded_and_merged(base: Path, tmp_path: Path) -> None:
    """By the stock Trainer, from the checkpoint that it saved, where `baka_hf` is not installed."""
    model = peft.get_peft_model(load(base), lora())
    trained = Trainer(model=model, args=arguments(tmp_path / "out", max_steps=8, save_steps=8), train_dataset=texts())
    trained.train()
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    checkpoint = tmp_path / "out" / "checkpoint-8"
    saved = load_file(checkpoint / "adapter_model.safetensors")
    original = load(base).state_dict()
    for name in LEARNED:
        learned = saved[f"base_model.model.model.{name}.weight"]
        assert (learned - original[f"model.{name}.weight"]).abs().max() > 0.01
        assert_close(learned, model.get_base_model().model.get_submodule(name).weight, rtol=0, atol=0)
    assert any("solidifier.proj.lora_B" in name for name in saved)
    frozen = {name: weight for name, weight in model.get_base_model().named_parameters() if ".base_layer." in name}
    assert frozen
    for name, weight in frozen.items():
        assert_close(weight, original[name.replace(".base_layer", "")], rtol=0, atol=0)

    tokens = random_tokens(tiny_config(), 2, LENGTH)
    merged = tmp_path / "merged"
    subprocess.run([sys.executable, "-c", LOAD, checkpoint, merged, json.dumps(tokens.tolist())], check=True)
    found, model = load_file(merged / "found.safetensors"), model.eval()
    with torch.no_grad():
        assert_close(found["logits"], model(tokens).logits, **CLOSE)
        assert_close(load(merged)(tokens).logits, model(tokens).logits, **CLOSE)
    assert not [name for name in load(merged).state_dict() if "lora" in name or "modules_to_save" in name]
    assert found["generated"].tolist() == model.generate(tokens, use_cache=False, **GREEDY).tolist()
    assert found["generated"].tolist() == load(merged).generate(tokens, **GREEDY).tolist()


def test_an_adapted_model_generates_with_a_carried_state() -> None:
    """Through PEFT's wrapper as by the merged model: what was read once is not read again."""
    model = adapted(tiny_model(tiny_config(memory_solidifier="glu"), seed=5)).eval()
    tokens = random_tokens(tiny_config(), 2, LENGTH)
    state = model.new_cache(2)
    assert state.signature == model.get_base_model().new_cache(2).signature
    first = model.generate(tokens, cache=state, **GREEDY)
    more = torch.cat([first, random_tokens(tiny_config(), 2, 7, seed=1)], dim=1)
    new = more[:, state.get_seq_length() :]
    mask = torch.ones_like(more)
    second = model.generate(new, attention_mask=mask, cache=state, **GREEDY)
    assert state.num_tokens.tolist() == [more.shape[1] + GREEDY["max_new_tokens"] - 1] * 2

    expected = model.generate(more, use_cache=False, **GREEDY)
    assert len(set(expected[:, more.shape[1] :].flatten().tolist())) > 2
    merged = model.merge_and_unload()
    assert second[:, new.shape[1] :].tolist() == expected[:, more.shape[1] :].tolist()
    assert merged.generate(more, **GREEDY).tolist() == expected.tolist()
    # A state of the adapted model is one of the merged model.
    kept = merged.new_cache(2)
    merged(more[:, : -GREEDY["max_new_tokens"]], cache=kept)
    assert merged.generate(more, cache=kept, **GREEDY).tolist() == expected.tolist()


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_losses_by_pieces_know_adapted_ends(end: str) -> None:
    """`skip_logits` takes the weight of a plain head; an adapted one is more than its weight."""
    model = adapted(tiny_model(tiny_config()), target_modules=[end]).train()
    tokens = random_tokens(tiny_config(), 2, LENGTH)
    model(tokens, labels=tokens).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plain = model(tokens, labels=tokens).loss
    pieces = model(tokens, labels=tokens, skip_logits=True).loss
    pieces.backward()
    assert_close(pieces, plain, rtol=1e-6, atol=1e-6)
    for name, gradient in expected.items():
        assert_close(model.get_parameter(name).grad, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", [None, "layer", "chunk"])
def test_lanes_train_an_adapter_with_carried_memory(granularity: str | None, tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_model(tiny_config(memory_solidifier="glu"), torch.float32), lora())
    documents = [((torch.arange(40) + start) % 19).tolist() for start in range(6)]
    lanes = LaneDataset(documents, num_lanes=2, chunk_size=5, chunks_per_step=2)
    options: dict[str, Any] = dict(per_device_train_batch_size=2, max_steps=8, save_strategy="no")
    if granularity is not None:
        options |= {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"granularity": granularity}}
    args = arguments(tmp_path, BakaTrainingArguments, **options)
    trainer = BakaTrainer(model=model, args=args, train_dataset=lanes)
    before = model.get_base_model().model.memory_tokens.weight.clone()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert (model.get_base_model().model.memory_tokens.weight - before).abs().max() > 0.01


# Virtual tokens: vectors before the text, read as text


def virtual(name: str) -> Any:
    common = dict(task_type="CAUSAL_LM", num_virtual_tokens=7)  # they fill a chunk and begin another
    configs = {
        "prompt": lambda: peft.PromptTuningConfig(**common),
        "p_tuning": lambda: peft.PromptEncoderConfig(**common, encoder_hidden_size=8),
        "prefix": lambda: peft.PrefixTuningConfig(**common),
    }
    return configs[name]()


def prompted(name: str) -> Any:
    model = peft.get_peft_model(tiny_model(tiny_config(), seed=5), virtual(name)).double().eval()
    if name == "prompt":
        with torch.no_grad():
            for parameter in model.prompt_encoder.parameters():
                parameter.normal_()
    return model


def with_virtual(model: Any, tokens: Tensor) -> Tensor:
    embedded = model.get_base_model().get_input_embeddings()(tokens)
    return torch.cat([model.get_prompt(len(tokens)).to(embedded), embedded], dim=1)


@pytest.mark.parametrize("name", ["prompt", "p_tuning"])
def test_virtual_tokens_are_read_first(name: str) -> None:
    model, tokens = prompted(name), random_tokens(tiny_config(), 3, LENGTH)
    base = model.get_base_model()
    read = base(inputs_embeds=with_virtual(model, tokens)).logits
    assert_close(model(tokens).logits, read, **CLOSE)
    # Padding on the left of the text comes between it and the virtual tokens, and is not in the stream.
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    found = model(tokens, attention_mask=mask).logits
    assert_close(found[1:], read[1:], **CLOSE)
    alone = base(inputs_embeds=with_virtual(model, tokens[:1, 4:])).logits
    assert_close(torch.cat([found[:1, :7], found[:1, 11:]], dim=1), alone, **CLOSE)
    # The loss is that of the text, its first token included: the last virtual token predicts it.
    loss = model(tokens, labels=tokens).loss
    predicted = read[:, 6:-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(predicted, tokens.flatten())
    assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["prompt", "p_tuning"])
def test_virtual_tokens_are_trained(name: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_model(tiny_config(), torch.float32), virtual(name))
    before = model.get_prompt(1).detach().clone()
    trained = Trainer(model=model, args=arguments(tmp_path, max_steps=8, save_steps=8), train_dataset=texts())
    trained.train()
    assert (model.get_prompt(1) - before).abs().max() > 1e-3
    moved = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved and all("prompt_encoder" in name for name in moved)


@pytest.mark.parametrize("chunks_per_backward", [None, 2])
def test_memory_is_not_carried_past_virtual_tokens(chunks_per_backward: int | None, tmp_path: Path) -> None:
    """They would be read again in every step of a lane, and in every piece of a row."""
    model = peft.get_peft_model(tiny_model(tiny_config(), torch.float32), virtual("prompt"))
    args = arguments(tmp_path, BakaTrainingArguments, chunks_per_backward=chunks_per_backward)
    rows: Any = texts()
    if chunks_per_backward is None:
        rows = LaneDataset([[1, 2, 3] * 10] * 4, num_lanes=4, chunk_size=5, chunks_per_step=2)
    with pytest.raises(ValueError, match="PEFT's prompt learning puts its virtual tokens before every call"):
        BakaTrainer(model=model, args=args, train_dataset=rows).train()


@pytest.mark.parametrize("name", ["prompt", "p_tuning"])
def test_generating_after_virtual_tokens(name: str) -> None:
    """Right without a state, refused with one that PEFT feeds, and right with one that is fed by hand."""
    model, tokens = prompted(name), random_tokens(tiny_config(), 2, LENGTH)
    base = model.get_base_model()
    read, expected = with_virtual(model, tokens), []
    for _ in range(GREEDY["max_new_tokens"]):
        expected.append(base(inputs_embeds=read).logits[:, -1].argmax(-1))
        read = torch.cat([read, base.get_input_embeddings()(expected[-1])[:, None]], dim=1)
    answer = torch.stack(expected, dim=1)
    assert len(set(answer.flatten().tolist())) > 2

    assert model.generate(input_ids=tokens, use_cache=False, **GREEDY)[:, LENGTH:].tolist() == answer.tolist()
    for given in ({}, {"cache": model.new_cache(2)}):
        with pytest.raises(ValueError, match=r"expected `use_cache=False` in `generate` with PEFT's prompt learning"):
            model.generate(input_ids=tokens, **given, **GREEDY)
    # As the message says. Afterwards the state has read the virtual tokens, and goes on as any other.
    state = base.new_cache(2)
    found = base.generate(inputs_embeds=with_virtual(model, tokens), cache=state, max_new_tokens=5, do_sample=False)
    assert found.tolist() == answer[:, :5].tolist()
    mask = torch.ones(2, state.get_seq_length() + 1, dtype=torch.int64)
    more = base.generate(found[:, -1:], attention_mask=mask, cache=state, max_new_tokens=7, do_sample=False)
    assert more[:, 1:].tolist() == answer[:, 5:].tolist()


def test_prefix_tuning_is_refused() -> None:
    """Its keys and values have no slots in a chunk."""
    model, tokens = prompted("prefix"), random_tokens(tiny_config(), 2, LENGTH)
    with pytest.raises(ValueError, match=r"to be a BakaCache .*, got DynamicCache"):
        model(tokens)
    with pytest.raises(ValueError, match="PEFT's prompt learning"):
        model.generate(input_ids=tokens, **GREEDY)
    with pytest.raises(ValueError, match=r"to be a BakaCache .*, got DynamicCache"):
        model.generate(input_ids=tokens, use_cache=False, **GREEDY)


def test_packed_texts_after_virtual_tokens_are_refused() -> None:
    """PEFT drops position ids, and with them where a text begins."""
    model, tokens = prompted("prompt"), random_tokens(tiny_config(), 1, LENGTH)
    packed = dict(position_ids=torch.arange(LENGTH)[None] % 9, cu_seq_lens_q=torch.tensor([0, 9, 18]))
    with pytest.warns(UserWarning, match="Position ids are not supported"), pytest.raises(ValueError, match="packed"):
        model(tokens, **packed)
    model.get_base_model()(tokens, **packed)


def test_fingerprints_of_weights() -> None:
    """An adapter's weights count as soon as they are there, beside the others or merged into them."""
    model = tiny_model(tiny_config())
    plain = fingerprint_of(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    fingerprint = fingerprint_of(adapted)
    assert len({plain, fingerprint, fingerprint_of(adapted.merge_and_unload())}) == 3
