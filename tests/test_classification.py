"""BakaForSequenceClassification: one verdict on a text of any length, given at its last real token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLOSE, CONFIGS, random_tokens, tiny_config
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from baka_hf import BakaForCausalLM, BakaForSequenceClassification
from baka_hf.training import BakaTrainer


def classifier(seed: int = 0, **overrides: Any) -> BakaForSequenceClassification:
    """In float64 and eval mode, its weights large enough that every part of it shows."""
    model = BakaForSequenceClassification(tiny_config(**dict(num_labels=3) | overrides)).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(float("norm" in name and name.endswith("weight")) + 0.3 * noise)
    return model


def texts(*lengths: int) -> list[Tensor]:
    """Random texts without token 0, which stands for padding here."""
    return [random_tokens(tiny_config(), length, seed=row).clamp(min=1) for row, length in enumerate(lengths)]


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    pads = [(longest - len(row), 0) if side == "left" else (0, longest - len(row)) for row in rows]
    tokens = torch.stack([F.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
    mask = torch.stack([F.pad(torch.ones_like(row), pad) for row, pad in zip(rows, pads, strict=True)])
    return tokens, mask


@torch.no_grad()
def verdict(model: BakaForSequenceClassification, tokens: Tensor, **arguments: Any) -> Tensor:
    return model(tokens, **arguments).logits


@pytest.mark.smoke
def test_it_judges_at_the_last_token() -> None:
    """[B, num_labels]: `score` of the decoder's last hidden state."""
    model = classifier()
    (tokens,) = texts(13)
    with torch.no_grad():
        expected = model.score(model.model(tokens[None]).last_hidden_state[:, -1])
    found = verdict(model, tokens[None])
    assert found.shape == (1, 3)
    assert_close(found, expected, **CLOSE)


@pytest.mark.smoke
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["mask", "pad token", "both"])
def test_padding_is_not_judged(side: str, how: str) -> None:
    """Rows of any length, padded on either side, are judged as alone: by the mask, or by where the pad token stands."""
    model = classifier(pad_token_id=0 if how != "mask" else None)
    rows = texts(3, 12, 5, 1)
    tokens, mask = padded(rows, side)
    if how == "pad token" and side == "left":
        # Padding in front is part of the text unless a mask says otherwise: only the last column is found by it.
        expected = torch.cat([verdict(model, row[None]) for row in tokens])
    else:
        expected = torch.cat([verdict(model, row[None]) for row in rows])
    found = verdict(model, tokens, **({} if how == "pad token" else dict(attention_mask=mask)))
    assert_close(found, expected, **CLOSE)


def test_a_pad_token_within_the_text() -> None:
    """The last token that is not padding counts, wherever the pad token stands besides."""
    model = classifier(pad_token_id=0)
    text = torch.tensor([[4, 0, 7, 3, 0, 0]])
    assert_close(verdict(model, text), verdict(model, text[:, :4]), **CLOSE)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])  # the mask is the better witness
    assert_close(
        verdict(model, text, attention_mask=mask), verdict(model, text[:, :5], attention_mask=mask[:, :5]), **CLOSE
    )


def test_without_mask_and_pad_token_the_last_column_counts() -> None:
    """There is nothing else to go by, for embeddings neither."""
    model = classifier()
    text = torch.tensor([[4, 7, 0, 0], [1, 2, 3, 4]])
    embeds = model.get_input_embeddings()(text).detach()
    expected = torch.cat([verdict(model, row[None]) for row in text])
    assert_close(verdict(model, text), expected, **CLOSE)
    with torch.no_grad():
        assert_close(model(inputs_embeds=embeds).logits, expected, **CLOSE)
        padded_embeds = model(inputs_embeds=embeds, attention_mask=torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])).logits
    assert_close(padded_embeds[0], verdict(model, text[:1, :2])[0], **CLOSE)


@pytest.mark.parametrize(
    "name", ["rmt_carry", "rmt_tokens", "rmt_without_xl", "rmt_alone", "glu_separate", "layer_separate"]
)
def test_what_was_read_chunks_ago_matters(name: str) -> None:
    """Memory carries a token of the first chunk to a verdict six chunks later; without memory and XL it does not."""
    text = texts(33)[0][None]
    changed = text.clone()
    changed[0, 1] = text[0, 1] % 18 + 1
    model = classifier(**CONFIGS[name])
    assert (verdict(model, text) - verdict(model, changed)).abs().max() > 1e-9
    forgetful = classifier(**CONFIGS["pristine"])
    assert torch.equal(verdict(forgetful, text), verdict(forgetful, changed))


def test_a_text_in_pieces() -> None:
    """A document too long for one call is read with a state; the last piece's verdict is that on all of it."""
    model = classifier()
    rows = texts(9, 14)
    tokens, mask = padded(rows, "left")
    state = model.new_cache(2)
    for piece in (slice(0, 6), slice(6, 11)):
        verdict(model, tokens[:, piece], attention_mask=mask[:, piece], cache=state)
    found = verdict(model, tokens[:, 11:], attention_mask=mask, cache=state)
    assert_close(found, torch.cat([verdict(model, row[None]) for row in rows]), **CLOSE)


LABELS: dict[str, tuple[dict[str, Any], Tensor]] = {
    "single label": (dict(num_labels=3), torch.tensor([2, 0])),
    "several labels": (dict(num_labels=3), torch.tensor([[1.0, 0, 1], [0, 0, 1]])),
    "regression": (dict(num_labels=1), torch.tensor([0.5, -1.5])),
    "regression of several": (
        dict(num_labels=2, problem_type="regression"),
        torch.tensor([[0.5, 1], [-1.5, 0]]),
    ),
}


@pytest.mark.parametrize(("overrides", "labels"), LABELS.values(), ids=LABELS)
def test_loss(overrides: dict[str, Any], labels: Tensor) -> None:
    """Cross entropy, binary cross entropy or squared error, as transformers chooses by labels and config."""
    model = classifier(**overrides)
    tokens, mask = padded(texts(4, 13), "left")
    labels = labels.double() if labels.is_floating_point() else labels
    outputs = model(tokens, attention_mask=mask, labels=labels)
    if not labels.is_floating_point():
        expected = F.cross_entropy(outputs.logits, labels)
    elif model.config.problem_type == "multi_label_classification":
        expected = F.binary_cross_entropy_with_logits(outputs.logits, labels)
    else:
        expected = F.mse_loss(outputs.logits.squeeze(-1), labels)
    assert_close(outputs.loss, expected, **CLOSE)
    outputs.loss.backward()
    assert model.model.embed_tokens.weight.grad.any()


@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
def test_labels_that_are_no_class(problem_type: str | None) -> None:
    """Classes that there are not, and the state is not moved; a class may be an int32, and -100 is none."""
    model = classifier(problem_type=problem_type)
    tokens, state = random_tokens(model.config, 2, 7), model.new_cache(2)
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=f"expected labels from 0 to 2, or -100 for none, got {wrong}"):
            model(tokens, labels=torch.tensor([1, wrong]), cache=state)
    assert state.get_seq_length() == 0
    labels = torch.tensor([-100, 1])
    outputs = model(tokens, labels=labels.int(), cache=state)
    assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels), **CLOSE)


class FirstGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
        self.found = [parameter.grad.clone() for parameter in trained]


# PEFT 0.21 asks `is_gradient_checkpointing`, the old name, of every model.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "trainer_class"),
    [(kind, BakaTrainer) for kind in (*LABELS, "adapter")] + [("single label", Trainer), ("adapter", Trainer)],
)
def test_accumulated_steps_are_one_step(tmp_path: Path, kind: str, trainer_class: Any) -> None:
    """Eight rows at once, in two batches or one by one: the loss and gradient of all."""
    overrides, labels = LABELS["single label" if kind == "adapter" else kind]
    labels = labels.repeat(4, *[1] * (labels.ndim - 1))
    rows = [dict(input_ids=text, labels=label) for text, label in zip(texts(*[13] * 8), labels, strict=True)]
    found = []
    for accumulated in (1, 2, 8):
        torch.manual_seed(0)
        model: Any = BakaForSequenceClassification(tiny_config(initializer_range=0.2, **overrides))
        if kind == "adapter":
            peft = pytest.importorskip("peft")
            config = dict(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            model = peft.get_peft_model(model, peft.LoraConfig(**config))
        gradients = FirstGradients()
        args = TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            per_device_train_batch_size=8 // accumulated,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            max_grad_norm=0,
            logging_steps=1,
            dataloader_pin_memory=False,
        )
        trained = trainer_class(model, args, train_dataset=rows, callbacks=[gradients])
        expected = model(torch.stack([row["input_ids"] for row in rows]), labels=labels).loss.item()
        trained.train()
        assert trained.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
        found.append(gradients.found)
    for others in found[1:]:
        for actual, gradient in zip(others, found[0], strict=True):
            assert_close(actual, gradient, rtol=1e-4, atol=1e-6)


def test_fine_tuning_learns_what_only_memory_can_tell() -> None:
    """The label is the first token of a text of four chunks: without keys of other chunks, memory must carry it."""
    torch.manual_seed(0)
    config = tiny_config(num_labels=2, use_xl_cache=False, hidden_size=24, initializer_range=0.2)
    model = BakaForSequenceClassification(config).train()
    tokens = torch.randint(2, 19, (32, 16))
    labels = tokens[:, 0] = torch.arange(32) % 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 < 0.6 < losses[0]


def test_save_and_load(tmp_path: Path) -> None:
    """Labels' names, weights and verdicts come back."""
    names = {0: "dull", 1: "fine", 2: "grand"}
    model = classifier(id2label=names, label2id={name: index for index, name in names.items()})
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is BakaForSequenceClassification
    assert loaded.config.id2label == names
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    tokens = texts(13)[0][None]
    assert_close(verdict(loaded, tokens), verdict(model, tokens), **CLOSE)


def test_a_language_model_becomes_a_classifier(tmp_path: Path) -> None:
    """The decoder of a saved language model is taken over; only the head is new."""
    language_model = BakaForCausalLM(tiny_config())
    language_model.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
    assert model.score.weight.shape == (4, 12)
    for name, parameter in language_model.model.named_parameters():
        assert torch.equal(model.model.get_parameter(name), parameter)
