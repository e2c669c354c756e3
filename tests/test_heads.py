"""Heads that label tokens and that find an answer's span: texts of any length, read naively to compare."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLOSE, CONFIGS, naive_head, random_tokens, tiny_config, word_tokenizer
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from baka_hf import BakaForCausalLM, BakaForQuestionAnswering, BakaForTokenClassification

HEADS = {"labels": (BakaForTokenClassification, "score"), "span": (BakaForQuestionAnswering, "qa_outputs")}
every_head = pytest.mark.parametrize(("model_class", "layer"), HEADS.values(), ids=HEADS)


def with_head(model_class: Any, seed: int = 0, **overrides: Any) -> Any:
    """In float64 and eval mode, its weights large enough that every part of it shows."""
    model = model_class(tiny_config(**dict(num_labels=3) | overrides)).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(float("norm" in name and name.endswith("weight")) + 0.3 * noise)
    return model


def logits_of(model: Any, *arguments: Any, **options: Any) -> Tensor:
    """[B, L, labels], or starts and ends side by side."""
    with torch.no_grad():
        outputs = model(*arguments, **options)
    spans = isinstance(model, BakaForQuestionAnswering)
    return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1) if spans else outputs.logits


def batch(*lengths: int, side: str = "left") -> tuple[list[Tensor], Tensor, Tensor]:
    """Texts, themselves padded, and the mask."""
    texts = [random_tokens(tiny_config(), length, seed=row) for row, length in enumerate(lengths)]
    pads = [(max(lengths) - length, 0) if side == "left" else (0, max(lengths) - length) for length in lengths]
    tokens, mask = (
        torch.stack([F.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
        for rows in (texts, [torch.ones_like(text) for text in texts])
    )
    return texts, tokens, mask


@pytest.mark.smoke
@every_head
@pytest.mark.parametrize("name", ["rmt_carry", "layer_separate", "associations_of_tokens_and_memory"])
def test_each_token_is_judged_by_what_stands_before_it(model_class: Any, layer: str, name: str) -> None:
    """Padded texts of several chunks, at every position as the naive reading has it; and in pieces with a state."""
    model = with_head(model_class, **CONFIGS[name])
    texts, tokens, mask = batch(14, 3, 8)
    found = logits_of(model, tokens, attention_mask=mask)
    for row, text in enumerate(texts):
        assert_close(found[row, mask[row] != 0], naive_head(model, text, layer), **CLOSE)
    state = model.new_cache(3)
    pieces = [
        logits_of(model, tokens[:, at], attention_mask=mask[:, : at.stop], past_key_values=state)
        for at in (slice(0, 6), slice(6, 14))
    ]
    assert_close(torch.cat(pieces, dim=1), found, **CLOSE)
    assert state.get_seq_length() == 14


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_answer(side: str) -> None:
    """A row's probabilities of start and end are those of the row alone: padding has none, whatever state it has."""
    model = with_head(BakaForQuestionAnswering)
    texts, tokens, mask = batch(13, 6, side=side)
    found = logits_of(model, tokens, attention_mask=mask).softmax(dim=1)
    for row, text in enumerate(texts):
        assert_close(found[row, mask[row] != 0], logits_of(model, text[None])[0].softmax(dim=0), **CLOSE)
    assert not found[mask == 0].any()


def test_loss_of_labels() -> None:
    """The mean over tokens that have one; or their sum, divided by what Trainer has counted."""
    model = with_head(BakaForTokenClassification)
    _, tokens, mask = batch(13, 6)
    labels = torch.where(mask == 1, tokens % 3, -100)
    outputs = model(tokens, attention_mask=mask, labels=labels.int())
    assert outputs.loss.item() == pytest.approx(
        F.cross_entropy(outputs.logits[mask == 1], labels[mask == 1]).item(), rel=1e-6
    )
    total = model(tokens, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    assert total.item() == pytest.approx(outputs.loss.item() * 19 / 7, rel=1e-6)
    outputs.loss.backward()
    assert model.model.memory_tokens.weight.grad.any()


def test_loss_of_spans() -> None:
    """The mean of that of starts and of ends; one beyond the text does not count."""
    model = with_head(BakaForQuestionAnswering)
    tokens = random_tokens(model.config, 2, 13)
    outputs = model(tokens, start_positions=torch.tensor([4, 0]), end_positions=torch.tensor([6, 13]))
    starts = F.cross_entropy(outputs.start_logits, torch.tensor([4, 0]))
    assert_close(outputs.loss, (starts - outputs.end_logits[0].log_softmax(0)[6]) / 2, **CLOSE)


@every_head
def test_bad_targets(model_class: Any, layer: str) -> None:
    """Found before anything is read."""
    model = with_head(model_class)
    tokens, row = random_tokens(model.config, 2, 7), torch.tensor([1, 2])
    wrong: list[tuple[dict[str, Any], str]] = [
        (dict(labels=tokens[:, :6]), r"expected `labels` of shape \[2, 7\], got \[2, 6\]"),
        (dict(labels=tokens % 3 + 1), "expected labels from 0 to 2, or -100 for none, got 3"),
        (dict(labels=tokens.tolist()), "expected `labels` to be a tensor, got list"),
    ]
    if layer == "qa_outputs":
        wrong = [
            (dict(start_positions=row), "expected `start_positions` and `end_positions`, got no `end_positions`"),
            (dict(start_positions=row, end_positions=row - 2), "expected `end_positions` of at least 0, got -1"),
            (dict(start_positions=row[None], end_positions=row), r"integers of shape \[2\], got .* of shape \[1, 2\]"),
            (dict(start_positions=row, end_positions=row / 2), "`end_positions` to be integers .* got torch.float32"),
        ]
    state = model.new_cache(2)
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            model(tokens, cache=state, **arguments)
    assert state.get_seq_length() == 0


@every_head
def test_save_and_load(model_class: Any, layer: str, tmp_path: Path) -> None:
    """By the Auto class, weight by weight; a language model's decoder is taken over, and only the head is new."""
    spans = layer == "qa_outputs"
    auto_class: Any = AutoModelForQuestionAnswering if spans else AutoModelForTokenClassification
    model, tokens = with_head(model_class), random_tokens(tiny_config(), 1, 13)
    model.save_pretrained(tmp_path / "head")
    loaded = auto_class.from_pretrained(tmp_path / "head", dtype=torch.float64)
    assert type(loaded) is model_class
    assert_close(logits_of(loaded, tokens), logits_of(model, tokens), **CLOSE)
    language_model = BakaForCausalLM(tiny_config())
    language_model.save_pretrained(tmp_path / "language")
    tuned = auto_class.from_pretrained(tmp_path / "language", num_labels=4)
    assert getattr(tuned, layer).weight.shape == (2 if spans else 4, 12)
    for name, parameter in language_model.model.named_parameters():
        assert torch.equal(tuned.model.get_parameter(name), parameter)
    BakaForCausalLM.from_pretrained(tmp_path / "head")  # and back again


def test_trainer_counts_labels(tmp_path: Path) -> None:
    """Samples with very different numbers of labels, one by one or at once: the same step."""
    samples = []
    for row, count in enumerate((1, 12, 3, 7)):
        tokens = random_tokens(tiny_config(), 13, seed=row)
        samples.append(dict(input_ids=tokens, labels=torch.where(torch.arange(13) < count, tokens % 3, -100)))
    losses = []
    for accumulated in (1, 4):
        torch.manual_seed(0)
        args = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4 // accumulated,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(with_head(BakaForTokenClassification).float(), args, train_dataset=samples)
        trainer.train()
        losses.append(trainer.state.log_history[0])
    for name in ("loss", "grad_norm"):
        assert losses[0][name] == pytest.approx(losses[1][name], rel=1e-4)


def test_an_answer_that_only_memory_knows() -> None:
    """Which of two places in the last chunk it is was asked for by the first token of the first of four."""
    torch.manual_seed(0)
    config = tiny_config(use_xl_cache=False, hidden_size=24, initializer_range=0.2, memory_norm=True)
    model = BakaForQuestionAnswering(config).train()
    asked = torch.arange(32) % 2
    tokens = torch.randint(4, 19, (32, 20))
    tokens[:, 0], tokens[:, 16], tokens[:, 18] = asked + 2, 0, 1
    where = torch.where(asked == 0, 16, 18)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model(tokens, start_positions=where, end_positions=where).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 < 0.6 < losses[0]


def test_entities_by_pipeline(tmp_path: Path) -> None:
    """`pipeline("token-classification")` says of each word what the head says of its token."""
    names = {0: "none", 1: "person", 2: "place"}
    model = with_head(BakaForTokenClassification, id2label=names).float()
    model.save_pretrained(tmp_path)
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    label = pipeline("token-classification", model=str(tmp_path), device="cpu", ignore_labels=[])
    words = "w3 w7 w2 w11 w4 w18 w5"
    expected = logits_of(model, tokenizer(words, return_tensors="pt").input_ids)[0].argmax(-1)
    assert [entity["entity"] for entity in label(words)] == [names[index] for index in expected.tolist()]
