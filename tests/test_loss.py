"""Losses without logits: the plain loss and its gradients, by pieces of a text and by blocks of logits."""

from typing import Any

import pytest
import torch
from helpers import num_programs, random_tokens, recorded_calls, tiny_config, tiny_model
from torch.nn import functional as F
from torch.testing import assert_close

from baka_hf import loss_baka

EXACT = dict(rtol=1e-5, atol=1e-6)  # of float64: transformers takes losses in float32


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize("ignored", [-1, 5])
@pytest.mark.parametrize("number", [None, 7])
def test_losses_without_logits_ignore_another_index(name: str, ignored: int, number: Any) -> None:
    model = tiny_model(tiny_config())
    tokens = random_tokens(model.config, 2, 11)
    options = {name: random_tokens(model.config, 2, 11, seed=1).masked_fill(tokens > 12, ignored)}
    options |= dict(ignore_index=ignored, num_items_in_batch=number)
    assert_close(model(tokens, **options, skip_logits=True).loss, model(tokens, **options).loss, **EXACT)


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("ignored", [-100, 5])
@pytest.mark.parametrize("side", ["left", "right", "within"])
def test_padding_predicts_nothing(side: str, ignored: int, skips: bool) -> None:
    """The loss of padded rows is the mean over the tokens of each read alone, from a state too."""
    model, lengths = tiny_model(tiny_config()), (3, 11, 8)
    rows = [random_tokens(model.config, length, seed=length) for length in lengths]
    rows = [row.where(row != ignored, 6) for row in rows]
    tokens, mask = torch.zeros(2, 3, 11, dtype=torch.int64)
    for row, text in enumerate(rows):
        where = {"left": slice(11 - len(text), None), "right": slice(len(text))}.get(side)
        columns = torch.arange(11)[where] if where else torch.tensor([*range(2), *range(13 - len(text), 11)])
        tokens[row, columns], mask[row, columns] = text, 1
    labels = tokens.masked_fill(mask == 0, ignored)
    options = dict(skip_logits=skips, ignore_index=ignored)
    found = model(tokens, attention_mask=mask, labels=labels, **options).loss
    losses = [F.cross_entropy(model(text[None]).logits[0, :-1], text[1:], reduction="none") for text in rows]
    if side == "within":  # the token after a gap has nobody to predict it
        losses = [torch.cat([loss[:1], loss[2:]]) if len(loss) < 10 else loss for loss in losses]
    assert_close(found, torch.cat(losses).mean().float(), **EXACT)
    shifted = F.pad(labels, (0, 1), value=ignored)[:, 1:]
    assert_close(model(tokens, attention_mask=mask, shift_labels=shifted, **options).loss, found, **EXACT)
    if side == "left":
        cache = model.new_cache(3)
        model(tokens, attention_mask=mask, cache=cache)
        more = torch.cat([torch.ones_like(mask), mask], dim=1)
        again = [
            model(tokens, attention_mask=m, labels=labels, cache=cache.clone(), **options).loss for m in (mask, more)
        ]
        assert_close(*again, rtol=0, atol=0)


@pytest.mark.parametrize("piece", [3, 7, 4096])
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize("number", [None, 5, torch.tensor(11.0)], ids=str)
def test_losses_without_logits(monkeypatch: pytest.MonkeyPatch, piece: int, name: str, number: Any) -> None:
    """The plain loss and its gradients, computed for a few tokens at a time."""
    monkeypatch.setattr(loss_baka, "LOSS_PIECE", piece)
    found = []
    model = tiny_model(tiny_config()).train()
    tokens = random_tokens(model.config, 2, 11)
    labels = {name: random_tokens(model.config, 2, 11, seed=1).masked_fill(tokens > 12, -100)}
    for skips in (False, True):
        outputs = model(tokens, **labels, skip_logits=skips, num_items_in_batch=number)
        assert (outputs.logits is None) is skips
        gradients = torch.autograd.grad(outputs.loss, list(model.parameters()))
        found.append((outputs.loss, *gradients))
        with torch.no_grad():
            assert_close(model(tokens, **labels, skip_logits=skips, num_items_in_batch=number).loss, outputs.loss)
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, **EXACT)


def test_pieces_of_a_loss_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more logits at a time than its caches hold."""
    model = tiny_model(tiny_config()).train()
    tokens, pieces = random_tokens(model.config, 1, 600), recorded_calls(monkeypatch, loss_baka, "_cross_entropy")
    model(tokens, labels=tokens, skip_logits=True)
    assert [len(logits) for logits, *_ in pieces] == [256, 256, 88]


@pytest.mark.parametrize("frozen", [(), ("lm_head.weight",), ("model",)], ids=str)
@pytest.mark.parametrize("hooked", [False, True])
def test_losses_without_logits_of_other_heads(
    monkeypatch: pytest.MonkeyPatch, frozen: tuple[str, ...], hooked: bool
) -> None:
    """A head that is more than its weight is called as it is, and what is frozen gets no gradient."""
    monkeypatch.setattr(loss_baka, "LOSS_PIECE", 5)
    model = tiny_model(tiny_config(tie_word_embeddings=False)).train()
    tokens = random_tokens(model.config, 2, 11)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    if hooked:
        model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    found = []
    for skips in (False, True):
        model.zero_grad()
        loss = model(tokens, labels=tokens, skip_logits=skips).loss
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in model.parameters())])
    for actual, expected in zip(*found, strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            assert_close(actual, expected, **EXACT)


def test_losses_without_logits_of_a_resized_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers puts a plain linear layer in the head's place: logits are not computed a second time for it."""
    model = tiny_model(tiny_config(tie_word_embeddings=False)).train()
    model.resize_token_embeddings(23)
    tokens = random_tokens(model.config, 2, 11)
    expected = model(tokens, labels=tokens).loss
    monkeypatch.setattr(loss_baka, "_loss_of_head", None)
    assert_close(model(tokens, labels=tokens, skip_logits=True).loss, expected, **EXACT)


def test_losses_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient is computed where nobody will ask for one."""
    asked = []
    plain = loss_baka._cross_entropy
    monkeypatch.setattr(loss_baka, "_cross_entropy", lambda *args: (asked.append(args[3]), plain(*args))[1])
    model = tiny_model(tiny_config()).train()
    tokens = random_tokens(model.config, 2, 11)
    model(tokens, labels=tokens, skip_logits=True)
    with torch.no_grad():
        model(tokens, labels=tokens, skip_logits=True)
    assert asked == [True, False]


@pytest.mark.parametrize("label", [-1, 19, 20])
def test_losses_of_what_is_no_token(label: int) -> None:
    """The head is padded to 24 columns in there; none of those is a target."""
    model = tiny_model(tiny_config()).train()
    tokens = random_tokens(model.config, 1, 5)
    labels = tokens.clone()
    labels[0, 2] = label
    with pytest.raises(ValueError, match=f"labels from 0 to 18, or -100 for none, got {label}"):
        model(tokens, labels=labels, skip_logits=True)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("vocab_size", [96, 101])
def test_losses_without_logits_in_half_precision(
    monkeypatch: pytest.MonkeyPatch, autocast: bool, vocab_size: int
) -> None:
    """Loss and gradients are as near to those of float64 as rounding of their operands allows, over many pieces."""
    monkeypatch.setattr(loss_baka, "LOSS_PIECE", 8)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(203, 24, generator=generator).bfloat16()
    weight = torch.randn(vocab_size, 24, generator=generator).bfloat16()
    targets = torch.randint(vocab_size, (203,), generator=generator).masked_fill(states[:, 0] > 1, -100)
    wide = [tensor.double().requires_grad_() for tensor in (states, weight)]
    expected = F.cross_entropy(wide[0] @ wide[1].T, targets, reduction="sum") / 7
    expected.backward()
    dtype = torch.float32 if autocast else torch.bfloat16
    narrow = [tensor.to(dtype).requires_grad_() for tensor in (states, weight)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_baka.LinearCrossEntropy.apply(*narrow, targets, True) / 7
    loss.backward()
    assert_close(loss.double(), expected, rtol=2e-3, atol=0)
    for actual, reference in zip(narrow, wide, strict=True):
        assert actual.grad.dtype == dtype
        error = (actual.grad.double() - reference.grad).norm() / reference.grad.norm()
        assert error < 1e-2


def test_losses_without_logits_need_targets() -> None:
    model, tokens = tiny_model(tiny_config()), random_tokens(tiny_config(), 2, 11)
    with pytest.raises(ValueError, match="expected `labels` or `shift_labels` with `skip_logits=True`"):
        model(tokens, skip_logits=True)
    for name in ("labels", "shift_labels"):
        with pytest.raises(ValueError, match=rf"expected `{name}` of shape \[2, 11\], got \[2, 10\]"):
            model(tokens, **{name: tokens[:, 1:]}, skip_logits=True)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("block", [8, 40, 1024])
def test_losses_by_blocks_of_logits(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, a token's loss is computed from blocks of its logits, with padding in the last of them."""
    monkeypatch.setattr(loss_baka, "LOSS_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    head = loss_baka.BakaHead(6, 101, bias=False).double()
    states = (5 * torch.randn(7, 6, dtype=torch.float64, generator=generator)).requires_grad_()
    targets = torch.tensor([0, 100, -100, 39, 40, 7, 96])
    inputs = [states, head.weight]
    expected = torch.nn.functional.cross_entropy(head(states), targets, reduction="sum")
    found = torch.compile(head, backend="aot_eager")(states, targets)
    assert num_programs() == 1
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))
