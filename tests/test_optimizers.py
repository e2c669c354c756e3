"""Muon for matrices and AdamW for all else, held against both written out; one optimizer to Trainer and accelerate."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import random_tokens, tiny_config, tiny_model
from torch import Tensor, nn
from torch.testing import assert_close
from train_worker import (
    Record,
    Weights,
    assert_moved_alike,
    assert_resumed,
    assert_same,
    train,
    trainer,
    weights_of,
)
from transformers import TrainingArguments

from baka_hf import BakaForSequenceClassification
from baka_hf.optimizers import RATES, Muon, MuonAndAdamW, muon_and_adamw, remembers
from baka_hf.training import BakaTrainer, BakaTrainingArguments

MUON: dict[str, Any] = dict(muon_learning_rate=0.02, learning_rate=1e-2, weight_decay=0.5)
BLOCK = [f"self_attn.{name}_proj.weight" for name in "qkvo"] + [
    f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")
]


def is_matrix(name: str) -> bool:
    return "_proj." in name or "solidifier" in name


def orthogonal(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz iterations are a polynomial of the singular values."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left * values @ right


class NaiveSteps:
    """Both formulas, in float64. With a rate for it, what remembers is AdamW's, but for matrices that have another."""

    def __init__(
        self,
        memory_rate: float | None = None,
        decay: float = 0.5,
        has_muon: bool = True,
        memory_muon_rate: float | None = None,
    ) -> None:
        self.memory_rate, self.decay, self.has_muon = memory_rate, decay, has_muon
        self.memory_muon_rate = memory_muon_rate
        self.first: Weights = {}
        self.second: Weights = {}
        self.number = 0

    def step(self, weights: Weights, gradients: Weights, share: float) -> Weights:
        """The next weights; `share` of both peak rates."""
        self.number += 1
        return {name: self.update(name, weight, gradients[name], share) for name, weight in weights.items()}

    def update(self, name: str, weight: Tensor, gradient: Tensor, share: float) -> Tensor:
        is_memory = self.memory_rate is not None and re.search("memory|solidifier|pause|association", name)
        muon_rate = 0.02 if self.has_muon else None
        if is_memory:
            muon_rate = None if re.search("beta_proj|gamma_proj", name) else self.memory_muon_rate
        if muon_rate is not None and is_matrix(name):
            rate, (rows, columns) = share * muon_rate, weight.shape
            momentum = 0.95 * self.first.get(name, torch.zeros_like(weight)) + 0.05 * gradient
            self.first[name] = momentum
            update = orthogonal(0.05 * gradient + 0.95 * momentum) * max(1, rows / columns) ** 0.5
            return weight - rate * (self.decay * weight + update)
        rate = share * (self.memory_rate if is_memory else 1e-2)
        first = 0.9 * self.first.get(name, torch.zeros_like(weight)) + 0.1 * gradient
        second = 0.999 * self.second.get(name, torch.zeros_like(weight)) + 0.001 * gradient**2
        self.first[name], self.second[name] = first, second
        update = first / (1 - 0.9**self.number) / ((second / (1 - 0.999**self.number)).sqrt() + 1e-8)
        decay = self.decay if name == "lm_head.weight" or is_matrix(name) else 0
        return weight - rate * (decay * weight + update)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_steps_are_those_of_the_formulas(tmp_path: Path, optim: str) -> None:
    """Of clipped gradients, with rates that fall together; both are logged."""
    trained = trainer(
        tmp_path, record := Record(), **MUON, optim=optim, max_steps=5, lr_scheduler_type="linear", max_grad_norm=0.1
    )
    trained.train()
    naive = NaiveSteps()
    for step, (weights, gradients) in enumerate(zip(record.weights, record.gradients, strict=True)):
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        assert norm.item() == pytest.approx(0.1, rel=1e-4)
        expected = naive.step(weights, gradients, 1 - step / 5)
        found = [*record.weights[1:], weights_of(trained.model)][step]
        assert_same(found, expected, rtol=1e-4, atol=1e-6)
    logs = [entry for entry in trained.state.log_history if "loss" in entry]
    assert [entry["learning_rate"] for entry in logs] == pytest.approx([1e-2 * (1 - step / 5) for step in range(5)])
    assert [entry["muon_learning_rate"] for entry in logs] == pytest.approx(
        [0.02 * (1 - step / 5) for step in range(5)]
    )


@pytest.mark.parametrize("muon_rate", [0.02, None])
def test_what_remembers_has_a_rate_of_its_own(tmp_path: Path, muon_rate: float | None) -> None:
    """AdamW's, beside Muon and alone; of vectors, a gate and a solidifier."""
    rates = dict(muon_learning_rate=muon_rate, learning_rate=1e-2, memory_learning_rate=0.1)
    decay = 0.5 if muon_rate else 0.0  # the stock Trainer decays other parameters
    model = dict(memory_solidifier="glu", memory_update="gate", memory_norm=True)
    settings = dict(weight_decay=decay, max_steps=4, lr_scheduler_type="linear", optim="adamw_torch", model=model)
    trained = trainer(tmp_path, record := Record(), **rates, **settings)
    trained.train()
    naive = NaiveSteps(0.1, decay, muon_rate is not None)
    assert {"model.memory_tokens.weight", "model.memory_update.gate_proj.weight"} <= record.weights[0].keys()
    for step, (weights, gradients) in enumerate(zip(record.weights, record.gradients, strict=True)):
        found = [*record.weights[1:], weights_of(trained.model)][step]
        assert_same(found, naive.step(weights, gradients, 1 - step / 4), rtol=1e-4, atol=1e-6)
    for entry in (entry for entry in trained.state.log_history if "loss" in entry):
        share = entry["learning_rate"] / 1e-2
        assert entry["memory_learning_rate"] == pytest.approx(0.1 * share)
        assert entry.get("muon_learning_rate") == (pytest.approx(0.02 * share) if muon_rate else None)


@pytest.mark.parametrize("muon_rate", [0.02, None])
def test_matrices_of_what_remembers_have_a_rate_of_their_own(tmp_path: Path, muon_rate: float | None) -> None:
    """Muon's, whoever has those of blocks; strengths and decays of associations stay AdamW's."""
    rates = dict(memory_learning_rate=0.1, memory_muon_learning_rate=0.05)
    model = dict(memory_update="gate", memory_norm=True, associative_dim=2, associative_write="tokens")
    settings = dict(weight_decay=0.0, max_steps=3, lr_scheduler_type="linear", optim="adamw_torch", model=model)
    settings |= dict(muon_learning_rate=muon_rate, learning_rate=1e-2)
    trained = trainer(tmp_path, record := Record(), **rates, **settings)
    trained.train()
    naive = NaiveSteps(0.1, 0.0, muon_rate is not None, 0.05)
    for step, (weights, gradients) in enumerate(zip(record.weights, record.gradients, strict=True)):
        found = [*record.weights[1:], weights_of(trained.model)][step]
        assert_same(found, naive.step(weights, gradients, 1 - step / 3), rtol=1e-4, atol=1e-6)
    for entry in (entry for entry in trained.state.log_history if "loss" in entry):
        share = entry["learning_rate"] / 1e-2
        assert {name: entry[name] for name in rates} == pytest.approx({n: rate * share for n, rate in rates.items()})
        assert entry.get("muon_learning_rate") == (pytest.approx(0.02 * share) if muon_rate else None)


def test_matrices_of_a_memory_that_has_none(tmp_path: Path) -> None:
    model = dict(memory_solidifier="none", memory_update="replace")
    trained = trainer(tmp_path, Record(), memory_muon_learning_rate=0.05, muon_learning_rate=None, model=model)
    with pytest.raises(ValueError, match=r"for memory_muon_learning_rate=0\.05, found none in BakaForCausalLM"):
        trained.train()


# Who trains what


def parts_of(model: nn.Module) -> tuple[set[str], set[str], set[str]]:
    """The names of what Muon trains, of what AdamW trains with decay and without."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared, muon = muon_and_adamw(model, 0.02, 0.5, lr=1e-3).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"], muon["weight_decay"]) == (0.5, 0, 0.5)
    return tuple({names[id(parameter)] for parameter in group["params"]} for group in (muon, decayed, spared))


def test_matrices_of_blocks_and_solidifiers() -> None:
    """All else is AdamW's, of which only a head that is no embedding is decayed: a gate's bias is no matrix."""
    fields = dict(memory_solidifier="layer", separate_solidifiers=True, memory_norm=True, memory_update="gate")
    blocks = ("layers.0", "layers.1", "read_solidifier", "write_solidifier")
    matrices = {f"model.{block}.{name}" for block in blocks for name in BLOCK} | {
        "model.memory_update.gate_proj.weight"
    }
    for tied in (False, True):
        model = tiny_model(tiny_config(tie_word_embeddings=tied, **fields))
        muon, decayed, spared = parts_of(model)
        assert muon == matrices
        assert decayed == (set() if tied else {"lm_head.weight"})
        assert muon | decayed | spared == {name for name, _ in model.named_parameters()}


def test_what_remembers() -> None:
    """By names of the model's own, whatever those of adapters are."""
    for name in ("model.memory_tokens.weight", "layers.1.association.q_proj.weight", "x.pause_token.modules_to_save.a"):
        assert remembers(name)
    for name in ("layers.0.self_attn.q_proj.lora_A.memory_tokens.weight", "layers.0.mlp.up_proj.weight", "memory"):
        assert not remembers(name)


def test_a_classifier_with_frozen_parts() -> None:
    """A frozen block, and integers, which have no gradients."""
    model = BakaForSequenceClassification(tiny_config(memory_solidifier="glu", num_labels=3))
    model.model.layers[0].requires_grad_(False)
    model.model.memory_tokens.requires_grad_(False)
    quantized = torch.zeros(12, 12, dtype=torch.int8)
    model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(quantized, requires_grad=False)
    muon, decayed, spared = parts_of(model)
    assert muon == {f"model.layers.1.{name}" for name in BLOCK[1:]} | {
        "model.solidifier.proj.weight",
        "model.solidifier.gate_proj.weight",
    }
    assert decayed == {"score.weight"}
    assert not [name for name in spared if "layers.0" in name or "memory_tokens" in name]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT 0.21 uses the old name
def test_adapters() -> None:
    """Factors are AdamW's; a copy of a whole matrix is a matrix, one of memory vectors is not."""
    peft = pytest.importorskip("peft")
    saved = ["memory_tokens", "down_proj"]
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"], modules_to_save=saved)
    muon, decayed, spared = parts_of(peft.get_peft_model(tiny_model(tiny_config(), torch.float32), lora))
    prefix = "base_model.model.model"
    copies = {f"{prefix}.layers.{index}.mlp.down_proj.modules_to_save.default.weight" for index in (0, 1)}
    assert muon == copies
    assert spared == {f"{prefix}.memory_tokens.modules_to_save.default.weight"}
    assert len(decayed) == 6 and all("lora_" in name for name in decayed)

    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    with pytest.raises(ValueError, match=r"expected matrices to train in layers.*=0\.02, found none in PeftModel"):
        parts_of(peft.get_peft_model(tiny_model(tiny_config(), torch.float32), lora))


# One optimizer


def samples(number: int = 12, length: int = 13) -> list[dict[str, Tensor]]:
    texts = random_tokens(tiny_config(), number, length, seed=3)
    return [dict(input_ids=text, labels=text) for text in texts]


def train_samples(folder: Path, resume: Path | None = None, **arguments: Any) -> Record:
    trained = trainer(folder, record := Record(), **MUON | arguments)
    trained.train_dataset = samples()
    trained.train(resume_from_checkpoint=None if resume is None else str(resume))
    record.final = weights_of(trained.model)
    return record


@pytest.mark.parametrize(
    "rates",
    [
        {},
        dict(memory_learning_rate=0.1),
        dict(memory_learning_rate=0.1, muon_learning_rate=None),
        dict(memory_learning_rate=0.1, memory_muon_learning_rate=0.05, muon_learning_rate=None),
        dict(memory_muon_learning_rate=0.05),
    ],
)
@pytest.mark.parametrize("run", [train_samples, train])
def test_resumed_runs_end_with_the_same_bits(tmp_path: Path, run: Any, rates: dict[str, Any]) -> None:
    settings = MUON | dict(max_steps=6, lr_scheduler_type="linear", dtype=torch.float32) | rates
    whole = run(tmp_path, save_strategy="steps", save_steps=3, **settings)
    resumed = run(tmp_path / "resumed", tmp_path / "checkpoint-3", **settings)
    assert len(resumed.losses) == 3
    assert_resumed(resumed, whole)


def test_accumulated_steps_are_one_step(tmp_path: Path) -> None:
    whole, accumulated = (
        train_samples(tmp_path, max_steps=2, per_device_train_batch_size=rows, gradient_accumulation_steps=4 // rows)
        for rows in (4, 1)
    )
    assert_moved_alike(accumulated, whole)


def optimizer_of(model: nn.Module) -> MuonAndAdamW:
    tokens = random_tokens(model.config, 2, 7)
    model(tokens, labels=tokens).loss.backward()
    return muon_and_adamw(model, 0.02, 0.5, lr=1e-2)


def test_a_closure() -> None:
    """It is called once, with gradients."""
    model = tiny_model(tiny_config())
    plain, called = optimizer_of(model), []
    before = weights_of(model)
    plain.step()
    after = weights_of(model)
    model.load_state_dict(before)

    def closure() -> float:
        called.append(torch.is_grad_enabled())
        return 0.5

    assert optimizer_of(tiny_model(tiny_config())).step(closure) == 0.5
    again = muon_and_adamw(model, 0.02, 0.5, lr=1e-2)
    assert again.step(closure) == 0.5
    assert called == [True, True]
    assert_same(weights_of(model), after)
    again.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_scaler_skips_steps_that_overflow() -> None:
    """Both optimizers, or none; what is finite is scaled back first."""
    model, scaled = (tiny_model(tiny_config(), torch.float32) for _ in range(2))
    plain, optimizer = optimizer_of(model), optimizer_of(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    gradient = scaled.lm_head.weight.grad
    kept = gradient.clone()
    gradient[3, 2] = math.inf
    before = weights_of(scaled)
    scaler.step(optimizer)
    scaler.update()
    assert_same(weights_of(scaled), before)
    gradient.copy_(kept)
    for parameter in scaled.parameters():
        parameter.grad.copy_(model.get_parameter(names_of(scaled)[id(parameter)]).grad * scaler.get_scale())
    scaler.step(optimizer)
    plain.step()
    assert_same(weights_of(scaled), weights_of(model))


def names_of(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def test_checkpoints_that_do_not_say_whose_a_group_is() -> None:
    """Those of Muon did not."""
    model = tiny_model(tiny_config())
    state = optimizer_of(model).state_dict()
    del state["param_groups"][-1]["rate"]
    optimizer = optimizer_of(model)
    optimizer.load_state_dict(state)
    assert [group.get("rate") for group in optimizer.param_groups] == [None, None, "muon_learning_rate"]


# What does not fit


def test_a_checkpoint_without_a_rate_for_what_remembers(tmp_path: Path) -> None:
    """Where memory alone is trained there are as many groups of parameters with it as without."""
    memory_alone = dict(max_steps=4, save_steps=2, save_strategy="steps", model=dict(memory_norm=True))
    for folder, rate in (("plain", None), ("other", 0.1)):
        trained = trainer(tmp_path / folder, Record(), memory_learning_rate=rate, **memory_alone)
        for name, parameter in trained.model.named_parameters():
            parameter.requires_grad_("memory_" in name)
        trained.remove_callback(Record)
        if rate is None:
            trained.train()
        else:
            with pytest.raises(ValueError, match="expected a checkpoint saved with memory_learning_rate"):
                trained.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("rate", [0, 0.0, -0.02, math.nan, math.inf, True, "0.02"])
def test_rates_that_are_none(tmp_path: Path, name: str, rate: Any) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must be a positive number, got {rate!r}\."):
        BakaTrainingArguments(str(tmp_path), **{name: rate})


@pytest.mark.parametrize("muon_rate", [0.02, None])
def test_nothing_that_remembers(tmp_path: Path, muon_rate: float | None) -> None:
    model = dict(memory_solidifier="none", num_memory_tokens=0, num_pause_tokens=0)
    trained = trainer(tmp_path, Record(), memory_learning_rate=0.1, muon_learning_rate=muon_rate, model=model)
    with pytest.raises(ValueError, match=r"to train with memory_learning_rate=0\.1, found none in BakaForCausalLM"):
        trained.train()


def test_other_optimizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`optim` must be one of adamw_torch, adamw_torch_fused, got 'adafactor'"):
        BakaTrainingArguments(str(tmp_path), muon_learning_rate=0.02, optim="adafactor")
    BakaTrainingArguments(str(tmp_path), optim="adafactor")
    model = tiny_model(tiny_config())
    adamw = torch.optim.AdamW(model.parameters())
    for name in RATES:
        args = BakaTrainingArguments(str(tmp_path), **{name: 0.02})
        given: Any
        for given in (dict(optimizers=(adamw, None)), dict(optimizer_cls_and_kwargs=(torch.optim.AdamW, dict(lr=1)))):
            with pytest.raises(ValueError, match=rf"expected {name}=0\.02 or an optimizer, got both"):
                BakaTrainer(model, args, **given)
    BakaTrainer(model, TrainingArguments(str(tmp_path)), optimizers=(adamw, None))


def refused(folder: Path, trainer_class: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"expected DDP or FSDP2 with muon_learning_rate=0\.02, got {name}"):
        trainer_class(tiny_model(tiny_config()), BakaTrainingArguments(str(folder), muon_learning_rate=0.02))


def test_flat_pieces_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class DeepSpeedTrainer(BakaTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = True

    refused(tmp_path, DeepSpeedTrainer, "DeepSpeed")
    plugin = SimpleNamespace(fsdp_version=1, activation_checkpointing=False)
    monkeypatch.setattr(AcceleratorState, "fsdp_plugin", plugin, raising=False)
    refused(tmp_path, BakaTrainer, "FSDP1")


def test_a_step_of_many_matrices_is_that_of_each() -> None:
    """Of any shape, some without a gradient, beside PyTorch's own, which computes in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 6), (6, 6), (9, 4), (4, 9), (9, 4), (5, 1)]
    mine, theirs = ([nn.Parameter(torch.randn(s, generator=generator.manual_seed(1))) for s in shapes] for _ in "ab")
    options = dict(lr=0.1, weight_decay=0.3, momentum=0.9, adjust_lr_fn="original")
    optimizers = Muon(mine, **options), torch.optim.Muon(theirs, **options)
    for _ in range(3):
        for index, pair in enumerate(zip(mine, theirs, strict=True)):
            gradient = torch.randn(pair[0].shape, generator=generator)
            for parameter in pair:
                parameter.grad = None if index == 1 else gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for found, expected, shape in zip(mine, theirs, shapes, strict=True):
        assert_close(found, expected, rtol=0, atol=0.03, msg=lambda m, s=shape: f"{s}: {m}")
    assert torch.equal(mine[1], theirs[1])
    assert optimizers[0].state_dict()["state"].keys() == optimizers[1].state_dict()["state"].keys()
