"""The stock Trainer: nothing of it is overridden, and what it promises holds for a recurrent model."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CHECKPOINTING, random_tokens, tiny_config
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from baka_hf import BakaForCausalLM
from baka_hf.training import BakaTrainer

Samples = list[dict[str, Tensor]]
LENGTH = 18  # three chunks of 5 and a rest


def new_model(**overrides: Any) -> BakaForCausalLM:
    """The same weights each time."""
    torch.manual_seed(0)
    return BakaForCausalLM(tiny_config(memory_solidifier="glu", **overrides))


def counting(number: int = 32) -> Samples:
    """Texts that count upwards from anywhere: easily learned."""
    texts = (torch.arange(number)[:, None] * 5 + torch.arange(LENGTH)) % 19
    return [dict(input_ids=text, labels=text) for text in texts]


def trainer(folder: Path, model: BakaForCausalLM, samples: Any, **arguments: Any) -> Trainer:
    collator, callbacks = arguments.pop("data_collator", None), arguments.pop("callbacks", None)
    evaluated, trainer_class = arguments.pop("eval_dataset", None), arguments.pop("trainer_class", Trainer)
    defaults = dict(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    return trainer_class(
        model=model,
        args=TrainingArguments(**defaults | arguments),
        train_dataset=samples,
        eval_dataset=evaluated,
        data_collator=collator,
        callbacks=callbacks,
    )


def losses(trained: Trainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def assert_same_weights(found: BakaForCausalLM, expected: BakaForCausalLM, **tolerance: float) -> None:
    for name, parameter in expected.named_parameters():
        assert_close(found.get_parameter(name), parameter, **tolerance or dict(rtol=0, atol=0))


@pytest.mark.smoke
def test_loss_falls(tmp_path: Path) -> None:
    """Fixed-length samples of several chunks are learned."""
    trained = trainer(tmp_path, new_model(initializer_range=0.2), counting(), max_steps=30)
    trained.train()
    found = losses(trained)
    assert found[0] > 2.5
    assert found[-1] < 0.7 * found[0]


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: BakaForCausalLM, **_: Any) -> None:
        if not self.found:
            self.found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def with_holes() -> Samples:
    """Eight samples with very different numbers of labels that do not count."""
    samples = []
    for row, holes in enumerate((0, 15, 3, 9, 17, 1, 12, 6)):
        text = random_tokens(tiny_config(), LENGTH, seed=row)
        labels = text.clone()
        labels[:holes] = -100
        samples.append(dict(input_ids=text, labels=labels))
    return samples


@pytest.mark.smoke
def test_accumulated_steps_are_one_step(tmp_path: Path) -> None:
    """Batches of 4, 2 and 1 until 4 samples are read: the same gradient, that of the mean over all their labels."""
    samples = with_holes()[:4]
    found = []
    for accumulated in (1, 2, 4):
        gradients = Gradients()
        trained = trainer(
            tmp_path,
            new_model(),
            samples,
            per_device_train_batch_size=4 // accumulated,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            max_grad_norm=0,
            callbacks=[gradients],
        )
        trained.train()
        found.append((gradients.found, losses(trained)[0]))

    model = new_model()
    tokens, labels = (torch.stack([sample[key] for sample in samples]) for key in ("input_ids", "labels"))
    loss = F.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    for gradients, reported in found:
        assert abs(reported - loss.item()) < 1e-4
        for name, parameter in model.named_parameters():
            assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


class Renamed(BakaForCausalLM):
    """A subclass, as of a user's."""


def with_remote_code(folder: Path) -> Any:
    """The model of its own folder's code."""
    new_model().save_pretrained(folder)
    code: Any = get_class_from_dynamic_module("modeling_baka.BakaForCausalLM", str(folder))
    assert code is not BakaForCausalLM
    return code.from_pretrained(folder)


def with_adapter(name: str, **fields: Any) -> Any:
    peft = pytest.importorskip("peft")
    model = new_model()
    return peft.get_peft_model(model, getattr(peft, name)(task_type="CAUSAL_LM", **fields))


KINDS: dict[str, Callable[[Path], Any]] = {
    "plain": lambda _: new_model(),
    "subclass": lambda _: Renamed(new_model().config),
    "remote code": with_remote_code,
    "adapter": lambda _: with_adapter("LoraConfig", target_modules="all-linear", init_lora_weights=False),
    "virtual tokens": lambda _: with_adapter("PromptTuningConfig", num_virtual_tokens=3),
}


# PEFT 0.21 asks `is_gradient_checkpointing`, the old name, of every model.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainer_class", [Trainer, BakaTrainer])
def test_label_smoothing(tmp_path: Path, trainer_class: Any, kind: str) -> None:
    """Over the next token, in training and evaluation, also with next to no smoothing."""
    if trainer_class is Trainer and kind == "virtual tokens":
        pytest.skip("of any model the stock Trainer takes the virtual tokens' logits for the text's")
    samples, model = with_holes(), KINDS[kind](tmp_path / "model")
    tokens, labels = (torch.stack([sample[key] for sample in samples]) for key in ("input_ids", "labels"))
    logits, targets = model(tokens).logits[:, -LENGTH:-1].flatten(0, 1), labels[:, 1:].flatten()
    for smoothing in (0.3, 1e-12) if kind == "plain" else (0.3,):
        expected = F.cross_entropy(logits, targets, label_smoothing=smoothing).item()
        trained = trainer(
            tmp_path,
            model,
            samples,
            trainer_class=trainer_class,
            eval_dataset=samples,
            label_smoothing_factor=smoothing,
            gradient_accumulation_steps=2,
            per_device_eval_batch_size=8,
            max_steps=1,
            learning_rate=0,
        )
        assert trained.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
        trained.train()
        assert losses(trained)[0] == pytest.approx(expected, abs=1e-4)


def test_label_smoothing_of_a_compiled_model(tmp_path: Path) -> None:
    """The stock Trainer finds no model's name in what `torch.compile` makes of it. `BakaTrainer` needs none."""
    samples, model = with_holes(), new_model()
    expected = trainer(tmp_path, model, samples, eval_dataset=samples, label_smoothing_factor=0.3).evaluate()
    found = trainer(
        tmp_path, model, samples, trainer_class=BakaTrainer, eval_dataset=samples, label_smoothing_factor=0.3
    )
    found.model_wrapped = torch.compile(model, backend="eager")
    batch = found.data_collator(samples)
    loss = found.compute_loss(found.model_wrapped.eval(), batch)
    assert loss.item() == pytest.approx(expected["eval_loss"], rel=1e-5)


def test_what_writes_cost_is_in_the_loss_or_label_smoothing_is_refused(tmp_path: Path) -> None:
    fields = dict(associative_dim=3, associative_write="tokens")
    models = [new_model(**fields, associative_write_cost=cost) for cost in (0.0, 20.0)]
    models[1].load_state_dict(models[0].state_dict())
    found = []
    for model in models:
        trained = trainer(tmp_path, model, counting(), trainer_class=BakaTrainer, max_steps=2)
        trained.train()
        found.append(losses(trained)[0])
    assert found[0] + 5 < found[1] < found[0] + 20  # a strength is about a half at first
    with pytest.raises(ValueError, match=r"`label_smoothing_factor` 0 with `associative_write_cost`.* got 0\.1"):
        trainer(
            tmp_path, models[1], counting(), trainer_class=BakaTrainer, max_steps=1, label_smoothing_factor=0.1
        ).train()


def test_gradient_checkpointing(tmp_path: Path) -> None:
    """Recomputing the blocks changes nothing that is learned."""
    trained = []
    for checkpointing in (False, True):
        run = trainer(tmp_path, new_model(), counting(), **{CHECKPOINTING: checkpointing})
        run.train()
        assert run.model.model.layers[0].gradient_checkpointing is checkpointing
        trained.append(run.model)
    assert_same_weights(*trained, rtol=1e-4, atol=1e-5)


def test_truncated_backpropagation(tmp_path: Path) -> None:
    """`bptt_chunks` is a field of the config: it changes what is learned, by itself."""
    trained = []
    for chunks in (None, 1):
        run = trainer(tmp_path, new_model(bptt_chunks=chunks), counting())
        run.train()
        assert all(math.isfinite(loss) for loss in losses(run))
        trained.append(run.model.model.memory_tokens.weight)
    assert not torch.equal(*trained)


def test_bf16(tmp_path: Path) -> None:
    """Mixed precision stays finite and learns; the weights stay float32."""
    trained = trainer(tmp_path, new_model(initializer_range=0.2), counting(), bf16=True, max_steps=20)
    trained.train()
    found = losses(trained)
    assert all(math.isfinite(loss) for loss in found) and found[-1] < found[0]
    for name, parameter in trained.model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.isfinite(parameter).all(), name


@pytest.mark.smoke
@pytest.mark.parametrize("use_cache", [True, False])
def test_evaluation(tmp_path: Path, use_cache: bool) -> None:
    """The loss over all labels, and logits without a state among them, in batches of unequal size."""
    samples = counting(7)
    model = new_model()
    evaluation = trainer(
        tmp_path, model, samples, per_device_eval_batch_size=3, eval_dataset=samples, use_cache=use_cache
    )
    assert model.config.use_cache is use_cache  # transformers' default is False
    metrics = evaluation.evaluate()
    text = torch.stack([sample["input_ids"] for sample in samples])
    with torch.no_grad():
        logits = model(text).logits
    assert metrics["eval_loss"] == pytest.approx(
        F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()).item(), rel=1e-4
    )
    predictions = evaluation.predict(samples)
    assert predictions.predictions.shape == (7, LENGTH, 19)  # an array: a state would make it a tuple
    assert_close(torch.from_numpy(predictions.predictions), logits, rtol=1e-4, atol=1e-4)


def test_evaluation_between_steps_changes_nothing(tmp_path: Path) -> None:
    """With evaluations in between, training ends with the same weights: no state leaks from one into the other."""
    trained = []
    for strategy in ("no", "steps"):
        run = trainer(tmp_path, new_model(), counting(), eval_dataset=counting(5), eval_strategy=strategy, eval_steps=1)
        run.train()
        trained.append(run.model)
    assert_same_weights(*trained)


def test_resuming_from_a_checkpoint(tmp_path: Path) -> None:
    """Stopped after three steps and resumed, the weights after six are those of an uninterrupted run, bit for bit."""
    arguments = dict(max_steps=6, save_strategy="steps", save_steps=3, pause_placement="random", num_pause_tokens=3)
    overrides = {name: arguments.pop(name) for name in ("pause_placement", "num_pause_tokens")}
    uninterrupted = trainer(tmp_path, new_model(**overrides), counting(), **arguments)
    uninterrupted.train()
    resumed = trainer(tmp_path, new_model(**overrides), counting(), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert_same_weights(resumed.model, uninterrupted.model)


def test_checkpoints_carry_the_code(tmp_path: Path) -> None:
    """Checkpoints and `save_model` hold all that loading with remote code needs, and the weights."""
    trained = trainer(tmp_path / "run", new_model(), counting(), max_steps=1, save_strategy="steps", save_steps=1)
    trained.train()
    trained.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "run" / "checkpoint-1", tmp_path / "final"):
        names = {path.name for path in folder.iterdir()}
        assert {
            "configuration_baka.py",
            "cache_baka.py",
            "modeling_baka.py",
            "config.json",
            "model.safetensors",
        } <= names
        assert_same_weights(BakaForCausalLM.from_pretrained(folder), trained.model)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, side: str) -> None:
    """Samples of any length, padded by the stock collator on either side: the gradient is that of the samples alone."""
    tokenizer.padding_side = side
    texts = [random_tokens(tiny_config(), length, seed=length).clamp(min=1) for length in (4, 17, 9, 6)]
    gradients = Gradients()
    trained = trainer(
        tmp_path,
        new_model(),
        [dict(input_ids=text) for text in texts],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        max_steps=1,
        max_grad_norm=0,
        callbacks=[gradients],
    )
    trained.train()

    model = new_model()
    targets = sum(len(text) - 1 for text in texts)
    if side == "left":
        # The token before a row's first one is padding; the causal shift of transformers makes it predict the first.
        targets += sum(len(text) < 17 for text in texts)
    loss = torch.zeros(())
    for text in texts:
        loss = loss + F.cross_entropy(model(text[None]).logits[0, :-1], text[1:], reduction="sum") / targets
        if side == "left" and len(text) < 17:
            nothing = model.lm_head(torch.zeros(1, model.config.hidden_size))
            loss = loss + F.cross_entropy(nothing, text[:1], reduction="sum") / targets
    loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(gradients.found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
