"""Any config, any rows, any order of operations on the state: every row says what its document says read naively."""

import tempfile
from typing import Any

import pytest
import torch
from helpers import naive_read, tiny_config, tiny_model
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from torch import Tensor
from torch.testing import assert_close

from baka_hf import BakaForCausalLM

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
MAX_ROWS = 4
SWITCHES = ("parallel_residual", "qk_norm", "value_residual", "attention_bias", "mlp_bias")

every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Every field of the ladder, and odd sizes."""
    heads, kv_heads = draw(st.sampled_from([(1, None), (2, None), (2, 1), (4, 2), (3, 1)]))
    head_dim = draw(st.sampled_from([4, 2, 6]))
    own_width = draw(st.booleans()) or heads * head_dim < 6  # LayerNorm of fewer is hardly more than a sign
    chunk_size = draw(st.integers(1, 9))
    fields: dict[str, Any] = dict(
        hidden_size=draw(st.integers(6, 13)) if own_width else heads * head_dim,
        head_dim=head_dim if own_width else None,
        intermediate_size=draw(st.integers(1, 9)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_act=draw(st.sampled_from(["elephant", "silu"])),
        chunk_size=chunk_size,
        num_pause_tokens=draw(st.integers(0, chunk_size)),
        num_memory_tokens=draw(st.integers(0, 3)),
        use_xl_cache=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        rope_parameters={"rope_type": "default", "rope_theta": draw(st.sampled_from([10000.0, 7.0]))},
        norm_type=draw(st.sampled_from(["layernorm", "rmsnorm"])),
        **{name: draw(st.booleans()) for name in SWITCHES},
    )
    if fields["num_memory_tokens"]:
        fields["memory_write"] = write = draw(st.sampled_from(["carry", "tokens"]))
        fields["memory_solidifier"] = solidifier = draw(st.sampled_from(["none", "glu", "gelephant", "mlp", "layer"]))
        fields["separate_solidifiers"] = write == "carry" and solidifier != "none" and draw(st.booleans())
        fields["memory_update"] = update = draw(st.sampled_from(["replace", "gate"]))
        fields["memory_norm"] = update == "gate" or draw(st.booleans())
    return fields


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, ...]:
    """The marks of one forward call, a row each: `t` text, `.` padding, `^` text at position 0."""
    length = draw(st.integers(1, 10))
    padded = st.tuples(st.integers(0, length), st.booleans()).map(
        lambda drawn: ("t" * drawn[0]).rjust(length, ".") if drawn[1] else ("t" * drawn[0]).ljust(length, ".")
    )
    holes = st.text("ttt.", min_size=length, max_size=length)
    packed = st.text("ttt^.", min_size=length, max_size=length)
    row = st.one_of(st.just("t" * length), padded, holes, packed)
    return tuple(draw(st.lists(row, min_size=MAX_ROWS, max_size=MAX_ROWS)))


class Rows(RuleBasedStateMachine):
    """A batch of rows and its state, and beside it each row's document so far.

    Every rule gets enough for MAX_ROWS rows; the first `batch` of it counts.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.said: list[tuple[tuple[int, ...], Tensor]] = []  # documents, and the logits after their last tokens
        self.random = torch.Generator().manual_seed(0)

    @initialize(fields=configs(), batch=st.integers(1, MAX_ROWS))
    def start(self, fields: dict[str, Any], batch: int) -> None:
        self.model: BakaForCausalLM = tiny_model(tiny_config(**fields), self.dtype)
        self.cache = self.model.new_cache(batch)
        self.documents: list[tuple[int, ...]] = [()] * batch
        self.columns = 0

    def tokens(self, length: int) -> Tensor:
        vocab_size = self.model.config.vocab_size
        return torch.randint(vocab_size, (len(self.documents), length), generator=self.random)

    @rule(marks=calls(), mask_of_history=st.booleans())
    def feed(self, marks: tuple[str, ...], mask_of_history: bool) -> None:
        marks = marks[: len(self.documents)]
        input_ids = self.tokens(len(marks[0]))
        mask = torch.tensor([[mark != "." for mark in row] for row in marks]).long()
        positions = torch.zeros_like(input_ids)
        ends: list[tuple[int, int, tuple[int, ...]]] = []
        for row, line in enumerate(marks):
            first, position = True, len(self.documents[row])
            for column, mark in enumerate(line):
                if mark == ".":
                    continue
                position = 0 if mark == "^" else position
                if mark == "^" and not first:  # at a row's first token of a call nothing restarts
                    self.documents[row] = ()
                positions[row, column] = position
                self.documents[row] += (int(input_ids[row, column]),)
                ends.append((row, column, self.documents[row]))
                first, position = False, position + 1

        options: dict[str, Tensor] = {}
        if any("^" in row for row in marks):
            options["position_ids"] = positions
        if mask_of_history:
            options["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.columns), mask], dim=1)
        elif not mask.all():
            options["attention_mask"] = mask
        with torch.no_grad():
            logits = self.model(input_ids, cache=self.cache, **options).logits
        self.said += [(document, logits[row, column]) for row, column, document in ends]
        self.columns += len(marks[0])

    @rule(rows=st.tuples(*[st.booleans()] * MAX_ROWS))
    def reset_rows(self, rows: tuple[bool, ...]) -> None:
        rows = rows[: len(self.documents)]
        self.cache.reset_rows(torch.tensor(rows))
        self.documents = [() if reset else document for reset, document in zip(rows, self.documents, strict=True)]

    @rule(order=st.permutations(range(MAX_ROWS)) | st.tuples(*[st.integers(0, MAX_ROWS - 1)] * MAX_ROWS))
    def reorder_cache(self, order: tuple[int, ...]) -> None:
        batch = len(self.documents)
        order = tuple(row % batch for row in order[:batch])
        self.cache.reorder_cache(torch.tensor(order))
        self.documents = [self.documents[row] for row in order]

    @rule(indices=st.lists(st.integers(0, MAX_ROWS - 1), min_size=1, max_size=MAX_ROWS))
    def batch_select_indices(self, indices: list[int]) -> None:
        indices = [row % len(self.documents) for row in indices]
        self.cache.batch_select_indices(torch.tensor(indices))
        self.documents = [self.documents[row] for row in indices]

    @precondition(lambda self: 2 * len(self.documents) <= MAX_ROWS)
    @rule()
    def batch_repeat_interleave(self) -> None:
        self.cache.batch_repeat_interleave(2)
        self.documents = [document for document in self.documents for _ in range(2)]

    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save_pretrained(folder)
            self.cache = type(self.cache).from_pretrained(folder)

    @rule()
    def go_on_with_a_clone(self) -> None:
        original, self.cache = self.cache, self.cache.clone()
        with torch.no_grad():
            self.model(self.tokens(3), cache=original)

    def teardown(self) -> None:
        """Compare all that was said, and the state at the end, with the naive reading of each document."""
        if not hasattr(self, "documents"):
            return
        assert self.cache.get_seq_length() == self.columns
        assert self.cache.num_tokens.tolist() == [len(document) for document in self.documents]
        event(f"chunks read: {max(map(len, self.documents)) // self.model.config.chunk_size}")

        readings: dict[tuple[int, ...], Any] = {}
        for document, logits in sorted(self.said, key=lambda said: -len(said[0])):
            longer = next((known for known in readings if known[: len(document)] == document), document)
            if longer == document and document not in readings:
                readings[document] = naive_read(self.model, torch.tensor(document))
            note(f"token {len(document) - 1} of document {longer}")
            self.assert_close(logits, readings[longer].logits[len(document) - 1])
        for document, memory in zip(self.documents, self.cache.memory, strict=True):
            if document:
                note(f"memory after document {document}")
                self.assert_close(memory, naive_read(self.model, torch.tensor(document)).memories[-1])

    def assert_close(self, actual: Tensor, naive: Tensor) -> None:
        scale = max(1.0, naive.abs().max().item() if naive.numel() else 0)  # memory may grow with what was read
        assert_close(actual.double(), naive, rtol=0, atol=TOLERANCE[self.dtype] * scale)


@every_dtype
def test_rows_are_their_documents(dtype: torch.dtype) -> None:
    """Rows fed, padded, packed, reset, moved, saved and cloned at random equal their documents read naively."""
    run_state_machine_as_test(
        lambda: Rows(dtype), settings=settings(stateful_step_count=8, suppress_health_check=list(HealthCheck))
    )


@every_dtype
@given(fields=configs(), length=st.integers(1, 40), ends=st.sets(st.integers(1, 39)))
def test_texts_in_any_cuts(dtype: torch.dtype, fields: dict[str, Any], length: int, ends: set[int]) -> None:
    """A text of up to 40 tokens in one call, and cut anywhere, equals its naive reading."""
    model = tiny_model(tiny_config(**fields), dtype)
    tokens = torch.randint(model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(length))
    naive, cache = naive_read(model, tokens).logits, model.new_cache(1)
    cuts = sorted(end for end in ends if end < length)
    with torch.no_grad():
        whole = model(tokens[None]).logits[0]
        parts = [model(part[None], cache=cache).logits[0] for part in tokens.tensor_split(cuts)]
    for logits in (whole, torch.cat(parts)):
        assert_close(logits.double(), naive, rtol=0, atol=TOLERANCE[dtype])


@given(st.integers(1, 3), st.integers(1, 11), st.booleans(), st.randoms(use_true_random=False))
def test_positions_may_be_an_array(rows: int, length: int, is_padded: bool, random: Any) -> None:
    """It does as a tensor does, also with a mask, and with texts of one token."""
    model = tiny_model(tiny_config(chunk_size=4))
    drawn = torch.tensor([[random.randrange(3) for _ in range(length)] for _ in range(rows)])
    texts, mask = drawn + 4, (drawn > 0).long() if is_padded else None
    outputs, states = [], []
    for positions in (drawn, drawn.numpy()):
        states.append(model.new_cache(rows))
        with torch.no_grad():
            outputs.append(model(texts, mask, positions, states[-1]).logits)
    assert_close(*outputs, rtol=0, atol=0)
    assert_close(*(state.tensors() for state in states), rtol=0, atol=0)
