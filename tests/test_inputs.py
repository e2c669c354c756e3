"""Bad input: a ValueError that says what was expected and what came, and a state left exactly as it was."""

from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from helpers import contents, logits_of, random_tokens, rows_out_of_phase, tiny_config, tiny_model
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from baka_hf import (
    BakaCache,
    BakaForCausalLM,
    BakaForQuestionAnswering,
    BakaForSequenceClassification,
    BakaForTokenClassification,
    BakaModel,
)
from baka_hf.inputs_baka import check_mask
from baka_hf.memory_baka import MEMORY_UPDATES, BakaMemoryUpdate


@pytest.fixture(scope="module")
def model() -> BakaForCausalLM:
    """Two rows of chunks of 5, 19 token ids, D = 12."""
    return tiny_model(tiny_config())


@pytest.fixture
def cache(model: BakaForCausalLM) -> Iterator[BakaCache]:
    """A state of two rows out of phase, 13 positions fed. After the test it must be what it was, and read on."""
    _, cache = rows_out_of_phase(model, 4, 13)
    before, twin = contents(cache), cache.clone()
    yield cache
    assert contents(cache) == before
    for length in (1, 7):
        tokens = random_tokens(model.config, 2, length, seed=length)
        assert torch.equal(logits_of(model, tokens, cache), logits_of(model, tokens, twin))


def refused(call: Callable, *said: str) -> None:
    """`call` raises a ValueError whose message holds all of `said`."""
    with pytest.raises(ValueError) as error:
        call()
    for words in said:
        assert words in str(error.value)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int64)


modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad], ids=["no_grad", "grad"])

TEXTS: dict[str, tuple[dict[str, Tensor], tuple[str, ...]]] = {
    "a negative token id": (dict(input_ids=torch.tensor([[3, 4], [3, -1]])), ("from 0 to 18", "got -1")),
    "a token id beyond the vocabulary": (dict(input_ids=torch.tensor([[3, 19], [0, 1]])), ("from 0 to 18", "got 19")),
    "a wrong single token": (dict(input_ids=torch.tensor([[18], [19]])), ("from 0 to 18", "got 19")),
    "token ids far out": (dict(input_ids=torch.tensor([[2**40], [0]])), ("from 0 to 18", str(2**40))),
    "no tokens": (dict(input_ids=ones(2, 0)), ("at least one row and one token", "(2, 0)")),
    "no rows": (dict(input_ids=ones(0, 2)), ("at least one row and one token", "(0, 2)")),
    "no embeddings": (dict(inputs_embeds=torch.zeros(2, 0, 12)), ("at least one row and one token", "(2, 0, 12)")),
    "float token ids": (dict(input_ids=torch.ones(2, 3)), ("integers of shape [batch, length]", "torch.float32")),
    "complex token ids": (dict(input_ids=ones(2, 3) * 1j), ("integers of shape [batch, length]", "torch.complex64")),
    "bool token ids": (dict(input_ids=ones(2, 3).bool()), ("integers of shape [batch, length]", "torch.bool")),
    "token ids without a batch": (dict(input_ids=ones(3)), ("[batch, length]", "(3,)")),
    "three-dimensional token ids": (dict(input_ids=ones(2, 3, 1)), ("[batch, length]", "(2, 3, 1)")),
    "embeddings of another width": (dict(inputs_embeds=torch.zeros(2, 3, 13)), ("[batch, length, 12]", "(2, 3, 13)")),
    "embeddings without a batch": (dict(inputs_embeds=torch.zeros(3, 12)), ("[batch, length, 12]", "(3, 12)")),
    "neither": (dict(), ("exactly one of `input_ids` and `inputs_embeds`",)),
    "both": (dict(input_ids=ones(2, 3), inputs_embeds=torch.zeros(2, 3, 12)), ("exactly one of `input_ids` and",)),
}


@modes
@pytest.mark.parametrize(("arguments", "said"), TEXTS.values(), ids=TEXTS)
def test_text(model: BakaForCausalLM, cache: BakaCache, mode: Any, arguments: Any, said: tuple[str, ...]) -> None:
    """Neither the language model nor the decoder reads it, from a state or from nothing."""
    with mode():
        refused(lambda: model(**arguments, cache=cache), *said)
        refused(lambda: model.model(**arguments, cache=cache), *said)
        refused(lambda: model(**arguments), *said)


def test_text_to_train_on(model: BakaForCausalLM) -> None:
    """While training too, where a wrong id would otherwise die in a kernel."""
    trained = tiny_model(model.config).train()
    tokens = torch.tensor([[3, 4, 19]])
    refused(lambda: trained(tokens, labels=tokens), "from 0 to 18", "got 19")


def test_the_vocabulary_is_the_embeddings(model: BakaForCausalLM) -> None:
    """After `resize_token_embeddings` the new ids are read and the next one is refused."""
    resized = tiny_model(tiny_config())
    resized.resize_token_embeddings(21)
    assert resized(torch.tensor([[20]])).logits.shape == (1, 1, 21)
    refused(lambda: resized(torch.tensor([[21]])), "from 0 to 20", "got 21")


# `P + L` is 13 + 3 here.
MASKS: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "shorter than the text": ((2, 2), ("[2, 3] or [2, 16]", "got [2, 2]")),
    "between text and history": ((2, 4), ("[2, 3] or [2, 16]", "got [2, 4]")),
    "as long as the history": ((2, 13), ("[2, 3] or [2, 16]", "got [2, 13]")),
    "longer than all": ((2, 17), ("[2, 3] or [2, 16]", "got [2, 17]")),
    "of one row": ((1, 3), ("[2, 3] or [2, 16]", "got [1, 3]")),
    "of more rows": ((4, 3), ("[2, 3] or [2, 16]", "got [4, 3]")),
    "without a batch": ((3,), ("[2, 3] or [2, 16]", "got [3]")),
    "of four dimensions": ((2, 1, 3, 3), ("[2, 3] or [2, 16]", "got [2, 1, 3, 3]")),
}


@pytest.mark.parametrize(("shape", "said"), MASKS.values(), ids=MASKS)
def test_mask(model: BakaForCausalLM, cache: BakaCache, shape: tuple[int, ...], said: tuple[str, ...]) -> None:
    """A mask is [B, L] or [B, P + L], nothing is broadcast or cut to fit."""
    refused(lambda: model(ones(2, 3), attention_mask=ones(*shape), cache=cache), *said)


@pytest.mark.parametrize("shape", [(2, 2), (2, 16), (1, 3), (3,), (2, 1, 3, 3)], ids=str)
def test_mask_without_a_state(model: BakaForCausalLM, shape: tuple[int, ...]) -> None:
    """Then there is one shape only."""
    refused(
        lambda: model(ones(2, 3), attention_mask=ones(*shape)),
        "expected an `attention_mask` of shape [2, 3], got " + str(list(shape)),
    )


@pytest.mark.parametrize("shape", [(2, 2), (2, 16), (3, 3), (), (3,), (3, 2, 3)], ids=str)
def test_position_ids(model: BakaForCausalLM, cache: BakaCache, shape: tuple[int, ...]) -> None:
    """Positions are those of this call's tokens."""
    length = "length" if len(shape) != 2 or shape[0] == 3 else "3"
    said = f"expected `position_ids` of shape [2, {length}], got {list(shape)}"
    refused(lambda: model(ones(2, 3), position_ids=ones(*shape), cache=cache), said)
    if length == "length":
        refused(generation(model, cache, ones(2, 3), position_ids=ones(*shape)), said)


@pytest.mark.parametrize("dtype", [object, str, "datetime64[s]"], ids=str)
def test_position_ids_that_pytorch_does_not_take(model: BakaForCausalLM, cache: BakaCache, dtype: Any) -> None:
    """Arrays such as those that pandas makes of columns with gaps."""
    positions, said = np.zeros((2, 3), dtype), "expected `position_ids` to be a tensor, or an array that PyTorch takes"
    refused(lambda: model(ones(2, 3), position_ids=positions, cache=cache), said)
    refused(generation(model, cache, ones(2, 3), position_ids=positions), said)


@pytest.mark.parametrize("value", [0.0, float("nan"), 1j, True], ids=str)
def test_position_ids_that_are_no_integers(model: BakaForCausalLM, cache: BakaCache, value: Any) -> None:
    for positions in (torch.full((2, 3), value), np.full((2, 3), value)):
        said = f"expected `position_ids` to be integers, got {torch.as_tensor(positions).dtype}"
        refused(lambda positions=positions: model(ones(2, 3), position_ids=positions, cache=cache), said)
        refused(generation(model, cache, ones(2, 3), position_ids=positions), said)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "seq_idx"])
def test_packed_texts_without_position_ids(model: BakaForCausalLM, cache: BakaCache, name: str) -> None:
    """What other collators say of where texts begin is not read: alone it would be passed over in silence."""
    packed = {name: torch.tensor([0, 2, 3])}
    refused(lambda: model(ones(2, 3), cache=cache, **packed), "expected `position_ids`", f"got `{name}` alone")


@pytest.mark.parametrize("wrong", [2, -1, 0.5, float("-inf"), torch.finfo(torch.float32).min, float("nan")])
def test_values_of_a_mask(model: BakaForCausalLM, cache: BakaCache, wrong: Any) -> None:
    """Numbers of documents, weights and what is added to scores are no masks of ours, where several tokens are read."""
    classifier = BakaForSequenceClassification(model.config).eval()
    for length in (2, 3):
        mask = torch.ones(2, length, dtype=torch.tensor(wrong).dtype)
        mask[1, 0] = wrong
        said = f"expected an `attention_mask` of 0 and 1, got {wrong}"
        refused(lambda mask=mask: model(ones(*mask.shape), attention_mask=mask, cache=cache), said)
        refused(lambda mask=mask: classifier(ones(*mask.shape), attention_mask=mask), said)
    refused(generation(model, cache, ones(2, 3), attention_mask=mask), said)


def test_values_of_a_mask_that_is_read(model: BakaForCausalLM) -> None:
    """0 and 1 of any dtype; on an accelerator a step does not wait to see them."""
    tokens, mask = random_tokens(model.config, 2, 9), ones(2, 9)
    mask[1, 2:5] = 0
    expected = model(tokens, attention_mask=mask).logits
    for dtype in (torch.bool, torch.uint8, torch.bfloat16, torch.float64):
        assert torch.equal(model(tokens, attention_mask=mask.to(dtype)).logits, expected)
    assert check_mask(torch.empty(2, 12, device="meta"), 2, 1, 11).shape == (2, 1)


@pytest.mark.parametrize("shape", [(2, 2), (2, 4), (1, 3), (6,)], ids=str)
def test_labels(model: BakaForCausalLM, cache: BakaCache, shape: tuple[int, ...]) -> None:
    """Labels have the shape of the text; it is said before anything is read."""
    refused(
        lambda: model(ones(2, 3), labels=ones(*shape), cache=cache),
        f"expected `labels` of shape [2, 3], got {list(shape)}",
    )
    refused(
        lambda: model(inputs_embeds=torch.zeros(2, 3, 12), labels=ones(*shape), cache=cache),
        f"expected `labels` of shape [2, 3], got {list(shape)}",
    )


# States


@modes
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_a_state_of_another_batch_size(model: BakaForCausalLM, cache: BakaCache, mode: Any, batch_size: int) -> None:
    """Nothing is broadcast: not one row to many, not many to one."""
    with mode():
        refused(
            lambda: model(ones(batch_size, 3), cache=cache),
            f"expected a state of batch size {batch_size}, got one of 2",
        )


OTHER_CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "hidden_size": (16, dict(head_dim=6)),
    "num_hidden_layers": (3, {}),
    "num_key_value_heads": (1, {}),
    "head_dim": (8, {}),
    "hidden_act": ("silu", {}),
    "norm_type": ("rmsnorm", {}),
    "parallel_residual": (False, {}),
    "qk_norm": (True, {}),
    "value_residual": (True, {}),
    "rope_theta": (50.0, {}),
    "rope_scaling": ({"rope_type": "linear", "factor": 2.0}, {}),
    "chunk_size": (6, {}),
    "num_memory_tokens": (3, {}),
    "memory_write": ("tokens", {}),
    "memory_update": ("other", {}),
    "memory_solidifier": ("glu", {}),
    "separate_solidifiers": (True, dict(memory_solidifier="mlp")),
    "memory_norm": (True, {}),
    "associative_dim": (4, {}),
    "associative_write": ("tokens", dict(associative_dim=4)),
    "associative_gate": ("hard_sigmoid", dict(associative_dim=4)),
    "associative_layer_interval": (2, dict(associative_dim=4)),
    "num_attention_heads": (4, dict(associative_dim=4, associative_write="tokens", num_key_value_heads=2, head_dim=6)),
    "num_pause_tokens": (1, {}),
    "pause_placement": ("random", {}),
    "use_xl_cache": (False, {}),
}


def test_every_field_of_a_signature_is_tried(cache: BakaCache) -> None:
    """The list above is complete."""
    derived = {"num_attention_heads": "num_associative_heads"}
    assert {derived.get(name, name) for name in OTHER_CONFIGS} == cache.signature.keys()


@pytest.mark.parametrize("name", OTHER_CONFIGS)
def test_a_state_of_another_config(cache: BakaCache, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the state depends on must agree; the message names the field and both values."""
    monkeypatch.setitem(MEMORY_UPDATES, "other", BakaMemoryUpdate)
    value, others = OTHER_CONFIGS[name]
    said = ["another configuration"]
    if not others:
        said.append(f"expected {name}={value!r}, got {cache.signature[name]!r}")
    other = tiny_model(tiny_config(**{name: value}, **others))
    refused(lambda: other(ones(2, 3), cache=cache), *said)
    refused(lambda: other.generate(ones(2, 20), cache=cache, max_new_tokens=2), *said)


def test_a_state_of_a_config_that_differs_elsewhere(model: BakaForCausalLM) -> None:
    """What the state does not depend on may differ: how many query heads share its keys, how gradients are cut, biases
    (which change nothing where they are zero)."""
    others = dict(attention_bias=True, mlp_bias=True, residual_initializer_range=0.0, bptt_chunks=1)
    other = tiny_model(tiny_config(num_attention_heads=4, num_key_value_heads=2, head_dim=6, **others))
    assert logits_of(other, ones(2, 3), model.new_cache(2)).shape == (2, 3, 19)


@pytest.mark.parametrize(
    "other",
    [DynamicCache(), ((torch.zeros(2, 2, 3, 6), torch.zeros(2, 2, 3, 6)),) * 2, {}, torch.zeros(2)],
    ids=lambda other: type(other).__name__,
)
def test_a_state_of_another_class(model: BakaForCausalLM, other: Any) -> None:
    """A cache of transformers' own, legacy tuples, anything: refused by forward and generate."""
    name = type(other).__name__
    refused(lambda: model(ones(2, 3), cache=other), f"to be a BakaCache (see `new_cache`), got {name}")
    refused(
        lambda: model.generate(ones(2, 3), cache=other, max_new_tokens=2),
        f"to be a BakaCache (see `new_cache`), got {name}",
    )


# generate


def generation(model: BakaForCausalLM, cache: BakaCache, tokens: Any, **arguments: Any) -> Callable:
    return lambda: model.generate(tokens, cache=cache, max_new_tokens=3, do_sample=False, pad_token_id=0, **arguments)


@pytest.mark.smoke
@pytest.mark.parametrize("implementation", ["offloaded", "quantized", "sliding_window"])
def test_cache_implementation(model: BakaForCausalLM, cache: BakaCache, implementation: str) -> None:
    """The state is a BakaCache; other kinds are refused, not ignored."""
    arguments = dict(max_new_tokens=2, cache_implementation=implementation)
    refused(lambda: model.generate(ones(2, 3), **arguments), "cache_implementation", implementation)
    refused(lambda: model.generate(ones(2, 3), cache=cache, **arguments))


def test_generate_from_a_wrong_text(model: BakaForCausalLM, cache: BakaCache) -> None:
    """A wrong id in the prompt is noticed before anything is read."""
    tokens = torch.tensor([[3, 19], [0, 1]])
    refused(generation(model, cache, tokens), "from 0 to 18", "got 19")
    refused(lambda: model.generate(tokens, max_new_tokens=2), "from 0 to 18", "got 19")
    for wrong in (ones(3), ones(1, 2, 3), torch.ones(2, 3)):
        said = f"expected `input_ids` to be integers of shape [batch, length], got {wrong.dtype} of shape"
        refused(generation(model, cache, wrong), said, str(tuple(wrong.shape)))
        refused(lambda wrong=wrong: model.generate(input_ids=wrong, max_new_tokens=2), said)


def test_beam_search_from_a_wrong_text(model: BakaForCausalLM, cache: BakaCache) -> None:
    """A search that never began does not mark the state as one of running beams."""
    refused(generation(model, cache, torch.tensor([[3, 19]]), num_beams=2), "from 0 to 18", "got 19")


@pytest.mark.parametrize(
    ("batch_size", "arguments"),
    [(1, {}), (3, {}), (2, dict(num_beams=2)), (2, dict(num_return_sequences=2, do_sample=True))],
    ids=str,
)
def test_generate_with_a_state_of_another_batch_size(
    model: BakaForCausalLM, cache: BakaCache, batch_size: int, arguments: dict[str, Any]
) -> None:
    """The expanded batch must be the state's; a refusal does not mark the state as one of beam search."""
    arguments = dict(cache=cache, max_new_tokens=3, pad_token_id=0) | arguments
    refused(lambda: model.generate(ones(batch_size, 4), **arguments), "state of batch size", "got one of 2")


@pytest.mark.parametrize("shape", [(2, 3), (2, 16), (2, 18), (1, 4), (2, 1, 4, 4)], ids=str)
def test_generate_with_a_mask_of_another_shape(
    model: BakaForCausalLM, cache: BakaCache, shape: tuple[int, ...]
) -> None:
    """[B, L] or [B, P + L], as for a forward call."""
    refused(
        generation(model, cache, ones(2, 4), attention_mask=ones(*shape)),
        "expected an `attention_mask` of shape [2, 4] or [2, 17]",
        f"got {list(shape)}",
    )


def test_generate_with_an_early_exit(model: BakaForCausalLM) -> None:
    """Drafts by the first layers alone would need a state of their own; the model stays whole after the refusal."""
    arguments = dict(assistant_early_exit=1, max_new_tokens=2)
    refused(lambda: model.generate(ones(1, 4), **arguments), "`assistant_early_exit`", "got 1")
    assert model.config.num_hidden_layers == 2


def test_generate_from_too_many_new_tokens(model: BakaForCausalLM, cache: BakaCache) -> None:
    """More tokens than the history, which do not begin with it: transformers would drop the first 13 in silence."""
    for mask in (None, ones(2, 15)):
        refused(
            generation(model, cache, ones(2, 15), attention_mask=mask),
            "got 15 tokens of which the first 13 are not what the state has read",
            "`attention_mask` of shape [2, 28]",
        )


def test_generate_from_too_few_embeddings(model: BakaForCausalLM, cache: BakaCache) -> None:
    """Embeddings without a full mask stand for the whole history, so there are more of them than was read."""
    refused(
        lambda: model.generate(inputs_embeds=torch.zeros(2, 4, 12), cache=cache, max_new_tokens=2),
        "more than the 13 positions that the state has read, got 4",
    )


def test_classification_of_a_wrong_text() -> None:
    """The classifier refuses what the language model refuses."""
    model = BakaForSequenceClassification(tiny_config()).eval()
    for arguments, said in TEXTS.values():
        refused(lambda arguments=arguments: model(**arguments), *said)


# Values that are looked at before anything moves


@modes
@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (torch.tensor([[3, 19, 0], [0, 1, 2]]), ("labels from 0 to 18, or -100 for none", "got 19")),
        (torch.tensor([[3, -1, 0], [0, 1, 2]]), ("labels from 0 to 18, or -100 for none", "got -1")),
        (torch.ones(2, 3), ("labels to be token ids", "torch.float32")),
        (torch.ones(2, 3).bool(), ("labels to be token ids", "torch.bool")),
        ([[1, 2, 3]] * 2, ("labels` to be a tensor", "got list")),
    ],
    ids=str,
)
def test_wrong_labels(
    model: BakaForCausalLM, cache: BakaCache, mode: Any, skip_logits: bool, name: str, targets: Any, said: Any
) -> None:
    """Found before the state has moved."""
    with mode():
        refused(lambda: model(ones(2, 3), cache=cache, skip_logits=skip_logits, **{name: targets}), *said)


@pytest.mark.parametrize("labels", [None, ones(2, 3)], ids=["without labels", "with labels"])
@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (torch.tensor([99]), ("from -3 to 2", "got 99")),
        (torch.tensor([0, -4]), ("from -3 to 2", "got -4")),
        (torch.tensor([[1]]), ("1-D tensor of positions", "[1, 1]")),
        (torch.tensor([1.0]), ("1-D tensor of positions", "torch.float32")),
        (-1, ("at least 0", "got -1")),
        (1.5, ("an integer or a 1-D tensor", "got 1.5")),
    ],
    ids=str,
)
def test_logits_to_keep(model: BakaForCausalLM, cache: BakaCache, labels: Any, kept: Any, said: Any) -> None:
    """Positions that are there."""
    refused(lambda: model(ones(2, 3), cache=cache, labels=labels, logits_to_keep=kept), *said)


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "position_ids", "inputs_embeds"])
def test_lists(model: BakaForCausalLM, cache: BakaCache, name: str) -> None:
    """Tensors only, and arrays for positions."""
    arguments: dict[str, Any] = dict(input_ids=ones(2, 3)) | {name: [[1, 1, 1]] * 2}
    others = ", or an array of numpy" if name == "position_ids" else ""
    said = f"expected `{name}` to be a tensor{others}, got list"
    refused(lambda: model(cache=cache, **arguments), said)
    refused(lambda: model.generate(cache=cache, max_new_tokens=2, **arguments), said)


def test_text_that_a_tokenizer_gave_as_lists(model: BakaForCausalLM, cache: BakaCache) -> None:
    refused(generation(model, cache, [[1, 1, 1]] * 2), "expected `inputs` to be a tensor, got list")


def test_a_state_that_is_not_to_be_used(model: BakaForCausalLM, cache: BakaCache) -> None:
    """With `use_cache=False` a state would go forward all the same: forward refuses it as generate does."""
    refused(lambda: model(ones(2, 3), cache=cache, use_cache=False), "no state with `use_cache=False`")
    refused(generation(model, cache, ones(2, 3), use_cache=False), "`use_cache=False`")
    asked = GenerationConfig(use_cache=False, max_new_tokens=3)
    refused(lambda: model.generate(ones(2, 3), cache=cache, generation_config=asked), "`use_cache=False`")


def test_a_state_beside_a_configuration_without(model: BakaForCausalLM, cache: BakaCache) -> None:
    """A state that is given is used, also where the configuration says no, as after a Trainer was made."""
    expected = generation(model, cache.clone(), ones(2, 3))()
    model.config.use_cache = model.generation_config.use_cache = False
    state = cache.clone()
    assert torch.equal(generation(model, state, ones(2, 3))(), expected) and state.get_seq_length() > 13


def test_traces(model: BakaForCausalLM) -> None:
    """A trace would hold the chunks of one length."""
    refused(lambda: torch.jit.trace(lambda ids: model(ids).logits, (ones(1, 7),)), "`torch.jit.trace`", "any other")


# What is taken for what it means


@pytest.mark.parametrize(
    "kind",
    [
        BakaModel,
        BakaForCausalLM,
        BakaForQuestionAnswering,
        BakaForSequenceClassification,
        BakaForTokenClassification,
    ],
    ids=lambda kind: kind.__name__,
)
def test_positions_are_annotated_as_what_is_taken(kind: type) -> None:
    """By a type checker as by `forward`: tensors and arrays, and no lists."""
    hint = get_type_hints(kind.forward)["position_ids"]
    assert all(isinstance(taken, hint) for taken in (ones(2, 3), np.ones((2, 3), int), None))
    assert not isinstance([[0, 1, 2]], hint)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_integers_of_any_kind(model: BakaForCausalLM, dtype: torch.dtype) -> None:
    """Ids, labels and positions."""
    tokens, found = random_tokens(model.config, 2, 13), []
    for each in (torch.int64, dtype):
        state = model.new_cache(2)
        ids, positions = tokens.to(each), (torch.arange(13)[None] % 7).to(each)
        outputs = model(ids, labels=ids, position_ids=positions, cache=state)
        loss = model(ids, labels=ids, skip_logits=True, cache=state).loss
        generated = model.generate(ids[:1], max_new_tokens=3, do_sample=False).tolist()
        found.append((outputs.logits.tolist(), outputs.loss.item(), loss.item(), generated, contents(state)))
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_embeddings_of_another_dtype(model: BakaForCausalLM, dtype: torch.dtype) -> None:
    """They become what the model's own are."""
    embeds = model.model.embed_tokens(random_tokens(model.config, 2, 9)).detach().to(dtype)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(inputs_embeds=embeds.double()).logits)


def test_labels_and_logits_to_keep(model: BakaForCausalLM) -> None:
    """The loss is that of all positions, whatever logits are asked for."""
    tokens = random_tokens(model.config, 2, 9)
    whole = model(tokens, labels=tokens)
    for kept in (2, torch.tensor([0, 4])):
        outputs = model(tokens, labels=tokens, logits_to_keep=kept)
        assert torch.equal(outputs.loss, whole.loss)
        assert torch.equal(outputs.logits, whole.logits[:, slice(-2, None) if isinstance(kept, int) else kept])


def test_labels_that_are_a_view(model: BakaForCausalLM) -> None:
    """Not contiguous in memory."""
    tokens, wide = random_tokens(model.config, 2, 9), random_tokens(model.config, 2, 20, seed=1)
    expected = model(tokens, shift_labels=wide[:, :9].contiguous()).loss
    assert torch.equal(model(tokens, shift_labels=wide[:, :9]).loss, expected)
