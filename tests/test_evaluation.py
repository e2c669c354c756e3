"""evaluate_documents against every document read naively, alone and in float64."""

import copy
import itertools
import json
import math
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CONFIGS, naive_read, random_tokens, tiny_config, tiny_model
from saving import byte_tokenizer, save_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from baka_hf import BakaForCausalLM, evaluation
from baka_hf.evaluation import evaluate_documents, evaluate_windows, gain_by_depth

# Chunks of 5: none, one and several of them full, a token more and less, and nothing to score.
LENGTHS = [1, 2, 5, 6, 7, 11, 26, 3, 1, 16, 31, 4, 10, 12, 2, 1, 8, 21]


def documents_of(model: BakaForCausalLM, lengths: list[int] = LENGTHS) -> list[list[int]]:
    return [random_tokens(model.config, length, seed=seed).tolist() for seed, length in enumerate(lengths)]


def naive_scores(model: BakaForCausalLM, documents: list[list[int]]) -> dict[str, Any]:
    """What `evaluate_documents` says, from one naive reading of each document."""
    by_chunk: dict[int, list[Tensor]] = defaultdict(list)
    for document in documents:
        tokens = torch.tensor(document)
        losses = F.cross_entropy(naive_read(model, tokens).logits[:-1], tokens[1:], reduction="none")
        for position, loss in enumerate(losses):
            by_chunk[position // model.config.chunk_size].append(loss)
    loss = float(torch.stack([loss for losses in by_chunk.values() for loss in losses]).mean())
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "num_tokens": sum(map(len, documents)) - len(documents),
        "num_documents": len(documents),
        "loss_by_chunk": [
            {"chunk": chunk, "loss": float(torch.stack(losses).mean()), "num_tokens": len(losses)}
            for chunk, losses in sorted(by_chunk.items())
        ],
    }


def assert_same(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    flat, flat_expected = (
        {name: value for name, value in scores.items() if name != "loss_by_chunk"} for scores in (actual, expected)
    )
    assert flat == pytest.approx(flat_expected, rel=tolerance)
    for chunk, expected_chunk in zip(actual["loss_by_chunk"], expected["loss_by_chunk"], strict=True):
        assert chunk == pytest.approx(expected_chunk, rel=tolerance)


@pytest.fixture(scope="module")
def model() -> BakaForCausalLM:
    return tiny_model(tiny_config())


@pytest.fixture(scope="module")
def expected(model: BakaForCausalLM) -> dict[str, Any]:
    return naive_scores(model, documents_of(model))


@pytest.mark.smoke
@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_equals_the_naive_reading(
    model: BakaForCausalLM, expected: dict[str, Any], batch_size: int, dtype: torch.dtype, tolerance: float
) -> None:
    documents = documents_of(model)
    same = BakaForCausalLM(model.config).to(dtype)
    same.load_state_dict(model.state_dict())
    actual = evaluate_documents(same, documents, batch_size)
    assert_same(actual, expected, tolerance)
    assert sum(chunk["num_tokens"] for chunk in actual["loss_by_chunk"]) == actual["num_tokens"]


@pytest.mark.parametrize("name", ["pristine", "xl", "rmt_alone", "chunk_of_one", "layer_separate"])
def test_equals_the_naive_reading_of_every_kind_of_model(name: str) -> None:
    model = tiny_model(tiny_config(**CONFIGS[name]))
    documents = documents_of(model, [6, 1, 12, 2, 5, 3])
    assert_same(evaluate_documents(model, documents, batch_size=3), naive_scores(model, documents), 1e-9)


def test_order_and_batch_size_do_not_matter(model: BakaForCausalLM, expected: dict[str, Any]) -> None:
    documents = documents_of(model)
    for seed, batch_size in enumerate((2, 3, 7, 100)):
        random.Random(seed).shuffle(documents)
        assert_same(evaluate_documents(model, documents, batch_size), expected, 1e-12)


def test_documents_are_taken_from_a_generator_when_a_lane_is_free(model: BakaForCausalLM) -> None:
    documents = documents_of(model, [6, 16, 6, 6, 4])
    taken: list[int] = []
    taken_by_call: list[int] = []

    def generate() -> Iterator[list[int]]:
        for index, document in enumerate(documents):
            taken.append(index)
            yield document

    handle = model.register_forward_pre_hook(lambda *_: taken_by_call.append(len(taken)))
    try:
        result = evaluate_documents(model, generate(), batch_size=2)
    finally:
        handle.remove()
    assert taken_by_call == [2, 3, 4, 5]
    assert_same(result, evaluate_documents(model, documents, batch_size=2), 0)


def test_no_lane_idles(model: BakaForCausalLM) -> None:
    """Rows are refilled in step, dropped when nothing is left, and a call is no wider than its longest piece."""
    shapes = []
    handle = model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        evaluate_documents(model, documents_of(model, [16, 6, 6, 1, 6, 4, 9]), batch_size=2)
    finally:
        handle.remove()
    # Inputs: 15 | 5, then 5, 5 beside it; 3 goes on with 8 beside it, whose rest is read alone.
    assert shapes == [(2, 5), (2, 5), (2, 5), (2, 5), (1, 3)]


def test_padding_never_shows(model: BakaForCausalLM) -> None:
    """The short document's row is filled up beside the long one's, and then taken by another document."""
    documents = documents_of(model, [9, 3, 14])
    alone = [evaluate_documents(model, [document]) for document in documents]
    together = evaluate_documents(model, documents, batch_size=2)
    nats = sum(result["loss"] * result["num_tokens"] for result in alone)
    assert together["loss"] == pytest.approx(nats / together["num_tokens"], rel=1e-12)


def test_a_chunk_has_exactly_that_many_chunks_to_remember() -> None:
    """Without anything to carry, chunk i scores as a document that begins with it: chunk 0 holds n losses, not n-1."""
    model = tiny_model(tiny_config(**CONFIGS["pristine"]))
    (document,) = documents_of(model, [16])
    chunks = evaluate_documents(model, [document])["loss_by_chunk"]
    for i in range(3):
        piece = evaluate_documents(model, [document[5 * i : 5 * i + 6]])
        assert chunks[i] == pytest.approx({"chunk": i, "loss": piece["loss"], "num_tokens": 5})


def test_documents_may_be_tensors_and_arrays(model: BakaForCausalLM, expected: dict[str, Any]) -> None:
    kinds: list[Any] = [
        list,
        tuple,
        torch.tensor,
        lambda d: np.array(d, np.uint16),
        lambda d: torch.tensor(d, dtype=torch.int32),
    ]
    documents = [kinds[i % len(kinds)](document) for i, document in enumerate(documents_of(model))]
    assert_same(evaluate_documents(model, tuple(documents)), expected, 1e-12)


def test_bits_per_byte(model: BakaForCausalLM) -> None:
    result = evaluate_documents(model, documents_of(model), num_bytes=1000)
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * result["num_tokens"] / math.log(2) / 1000)
    assert "bits_per_byte" not in evaluate_documents(model, documents_of(model))


def test_hopeless_models_have_infinite_perplexity(model: BakaForCausalLM) -> None:
    hopeless = tiny_model(model.config)
    with torch.no_grad():
        hopeless.lm_head.weight *= 1e6
    result = evaluate_documents(hopeless, documents_of(model))
    assert result["loss"] > 1000 and result["perplexity"] == math.inf


def test_half_precision_is_scored_in_float32(model: BakaForCausalLM, expected: dict[str, Any]) -> None:
    half = BakaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    result = evaluate_documents(half.to(torch.bfloat16), documents_of(model))
    assert result["loss"] == pytest.approx(expected["loss"], rel=0.02)


def test_modes_are_restored_and_nothing_is_learned(model: BakaForCausalLM) -> None:
    config = tiny_config(pause_placement="random")  # which are not drawn
    model = tiny_model(config).train()
    model.model.norm.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert_same(evaluate_documents(model, documents_of(model)), naive_scores(model, documents_of(model)), 1e-9)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="document 0"):
        evaluate_documents(model, [[999]])
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_a_model_with_code_of_its_own(model: BakaForCausalLM, expected: dict[str, Any], tmp_path: Any) -> None:
    model.save_pretrained(tmp_path)
    remote_class = get_class_from_dynamic_module("modeling_baka.BakaForCausalLM", str(tmp_path))
    remote = remote_class.from_pretrained(tmp_path, dtype=torch.float64)
    assert not isinstance(remote, BakaForCausalLM)
    assert_same(evaluate_documents(remote, documents_of(model)), expected, 1e-9)


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([[1, 2], []], {}, "document 1 is empty"),
        ([[1, 2], [3], [4, 19]], {}, "document 2: expected token ids from 0 to 18, got 19"),
        ([[1, 2], [-1, 3]], {}, "document 1: expected token ids from 0 to 18, got -1"),
        ([[1, 2], [0.5, 1.0]], {}, "document 1: expected a sequence of token ids, got torch.float32"),
        ([[[1, 2]]], {}, r"document 0: expected a sequence of token ids, got torch.int64 of shape \(1, 2\)"),
        (["text"], {}, "document 0: expected a sequence of token ids"),
        ([{"input_ids": [1, 2]}], {}, "document 0: expected a sequence of token ids"),
        ([1, 2, 3], {}, "document 0: expected a sequence of token ids"),
        ([], {}, "expected a document of two tokens or more, got 0 documents"),
        ([[1], [2]], {}, "expected a document of two tokens or more, got 2 documents"),
        ([[1, 2]], {"batch_size": 0}, "`batch_size` must be an integer of at least 1, got 0"),
        ([[1, 2]], {"batch_size": True}, "`batch_size`"),
        ([[1, 2]], {"batch_size": None}, "`batch_size`"),
        ([[1, 2]], {"num_bytes": 0}, "`num_bytes` must be an integer of at least 1, got 0"),
    ],
)
def test_bad_input(model: BakaForCausalLM, documents: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_documents(model, documents, **options)


def test_progress_is_shown_when_it_takes_long(
    model: BakaForCausalLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_documents(model, documents_of(model))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("baka_hf.evaluation.SECONDS_UNTIL_PROGRESS", 0.0)
    evaluate_documents(model, documents_of(model))
    assert "Evaluating: 100%" in capsys.readouterr().err
    evaluate_documents(model, documents_of(model), progress=False)
    assert capsys.readouterr().err == ""


# What the past is worth: chunks that read another one


def states_of(model: BakaForCausalLM, document: list[int]) -> list[Any]:
    """The state before each chunk of a document, read alone."""
    n, state = model.config.chunk_size, model.new_cache()
    states = [state.clone()]
    for chunk in range((len(document) - 2) // n):
        with torch.no_grad():
            model(torch.tensor([document[chunk * n : (chunk + 1) * n]]), cache=state)
        states.append(state.clone())
    return states


def losses_with(model: BakaForCausalLM, documents: list[list[int]], memory: str, keys: str) -> list[list[float | None]]:
    """By document and chunk the mean loss, each chunk read alone, from a state put together by hand."""
    n, states = model.config.chunk_size, [states_of(model, document) for document in documents]
    plain = copy.deepcopy(model)  # its solidifier does nothing, as to what a first chunk reads
    if model.config.memory_solidifier == "glu":
        nn.init.zeros_(plain.model.solidifier.proj.weight)
    losses: list[list[float | None]] = []
    for number, document in enumerate(documents):
        losses.append([])
        for chunk, own in enumerate(states[number]):
            others = [
                k for k in itertools.chain(range(number + 1, len(documents)), range(number)) if chunk < len(states[k])
            ]
            if chunk and not others and "exchanged" in (memory, keys):
                losses[-1].append(None)
                continue
            other = states[others[0]][chunk] if others else own
            learned = {name: torch.zeros_like(tensor) for name, tensor in own.carried.items()}
            if model.config.num_memory_tokens:
                learned["memory"] = model.model.memory_tokens.weight[None].detach()
            given = {
                "carried": own.carried,
                "exchanged": other.carried,
                "learned": learned,
                "frozen": states[number][min(chunk, 1)].carried,
            }[memory]
            state = own.clone()
            if chunk:
                state = model.new_cache(memory=given["memory"]) if keys == "none" else state
                state.carried = given
                if keys == "exchanged":
                    for mine, its in zip(state.layers, other.layers, strict=True):
                        mine.keys, mine.values = its.keys, its.values
            tokens = torch.tensor(document[chunk * n : (chunk + 1) * n + 1])
            with torch.no_grad():
                logits = (plain if memory == "learned" else model)(tokens[None, :-1], cache=state).logits[0]
            losses[-1].append(float(F.cross_entropy(logits, tokens[1:])))
    return losses


# What a model may carry beside keys and values.
PASTS: list[dict[str, Any]] = [
    dict(memory_solidifier="glu", associative_dim=3),
    dict(num_memory_tokens=0, associative_dim=3, associative_write="tokens"),
]


@pytest.mark.parametrize("keys", ["carried", "exchanged", "none"])
@pytest.mark.parametrize("memory", ["carried", "exchanged", "learned", "frozen"])
@pytest.mark.parametrize("fields", PASTS, ids=["vectors and associations", "associations"])
def test_chunks_that_read_another_past(memory: str, keys: str, fields: dict[str, Any]) -> None:
    """As if each chunk was read alone from such a state; the first chunk has no past, whatever is asked."""
    model = tiny_model(tiny_config(**fields))
    documents = documents_of(model, [26, 13, 31, 3])
    scores = evaluate_documents(model, documents, 4, memory=memory, keys=keys, by_document=True)
    expected = losses_with(model, documents, memory, keys)
    for found, right in zip(scores["documents"], expected, strict=True):
        means = [nats / count if count else None for nats, count in found]
        assert [mean is None for mean in means] == [loss is None for loss in right]
        assert list(filter(None, means)) == pytest.approx(list(filter(None, right)), rel=1e-9)
    whole = evaluate_documents(model, documents, 2, by_document=True)
    assert [found[0] for found in scores["documents"]] == [pytest.approx(found[0]) for found in whole["documents"]]
    if (memory, keys) != ("carried", "carried"):
        first, second, *rest = (abs(gain["gain"]) for gain in gain_by_depth(whole, scores))
        assert first < 1e-12 and min(rest) > 1e-4 and (second > 1e-4 or memory == "frozen")


def test_a_memory_without_keys_read_naively() -> None:
    """A chunk without a previous one is a text that begins with that memory."""
    model = tiny_model(tiny_config(memory_norm=True))
    (document,) = documents_of(model, [26])
    memories = naive_read(model, torch.tensor(document)).memories
    ((_, *found),) = evaluate_documents(model, [document], keys="none", by_document=True)["documents"]
    for chunk, (nats, count) in enumerate(found, start=1):
        tokens = torch.tensor(document[5 * chunk : 5 * chunk + 6])
        logits = naive_read(model, tokens[:-1], memory=memories[chunk]).logits
        assert nats / count == pytest.approx(float(F.cross_entropy(logits, tokens[1:])), rel=1e-9)


@pytest.mark.parametrize(
    "past", [dict(memory="learned"), dict(memory="frozen", keys="none"), dict(keys="none")], ids=str
)
def test_another_past_does_not_depend_on_the_batch(past: dict[str, str]) -> None:
    model = tiny_model(tiny_config())
    documents = documents_of(model)
    scores = [evaluate_documents(model, documents, size, **past, by_document=True)["documents"] for size in (1, 4, 30)]
    for found in scores[1:]:
        for a, b in zip(found, scores[0], strict=True):
            assert [count for _, count in a] == [count for _, count in b]
            assert [nats for nats, _ in a] == pytest.approx([nats for nats, _ in b], rel=1e-9)


def test_documents_are_exchanged_in_groups() -> None:
    """Of as many as are read side by side; who has nobody left is not scored any more."""
    model = tiny_model(tiny_config())
    documents = documents_of(model, [12, 26, 12, 12, 21])
    found = evaluate_documents(model, documents, 2, memory="exchanged", by_document=True)["documents"]
    assert [[count for _, count in scores] for scores in found] == [
        [5, 5, 1],
        [5, 5, 5, 0, 0],
        [5, 5, 1],
        [5, 5, 1],
        [5, 0, 0, 0],
    ]


def test_gain_by_depth() -> None:
    """Against its formula: the ratio of sums, and how it spreads over documents."""
    generator = random.Random(0)
    counts = [[5, 5, 5, 2], [5, 3], [5, 5, 5], []]
    both = [
        {"documents": [[(count * generator.uniform(1, 3), count) for count in row] for row in counts]} for _ in range(2)
    ]
    first, second, rest = gain_by_depth(*both, depths=(0, 1, 3))
    for found, part, last in ((first, slice(0, 1), 0), (second, slice(1, 3), 2), (rest, slice(3, None), None)):
        own, other = (
            [np.array([nats for nats, _ in row[part]]).sum() for row in scores["documents"] if row[part]]
            for scores in both
        )
        sizes = np.array([sum(row[part]) for row in counts if row[part]])
        differences = np.array(other) - np.array(own)
        gain = differences.sum() / sizes.sum()
        assert (found["first_chunk"], found["last_chunk"]) == (part.start, last)
        assert (found["num_documents"], found["num_tokens"]) == (len(sizes), sizes.sum())
        assert found["gain"] == pytest.approx(gain)
        if len(sizes) == 1:
            assert found["standard_error"] is None
        else:
            error = np.std(differences - gain * sizes, ddof=1) * len(sizes) ** 0.5 / sizes.sum()
            assert found["standard_error"] == pytest.approx(error)
    with pytest.raises(ValueError, match="others of document 1"):
        gain_by_depth(both[0], {"documents": [both[1]["documents"][0]]})


@pytest.mark.parametrize(
    ("fields", "past", "message"),
    [
        (dict(), dict(memory="other"), "`memory` must be one of carried, exchanged, learned, frozen, got 'other'"),
        (dict(), dict(keys="learned"), "`keys` must be one of carried, exchanged, none, got 'learned'"),
        (dict(num_memory_tokens=0), dict(memory="frozen"), "no memory to carry, got 'frozen'"),
        (dict(use_xl_cache=False), dict(keys="none"), "no keys to carry, got 'none'"),
        (dict(), dict(memory="exchanged", batch_size=1), "`batch_size` of at least 2"),
    ],
)
def test_pasts_that_there_are_not(fields: dict[str, Any], past: dict[str, Any], message: str) -> None:
    model = tiny_model(tiny_config(**fields))
    with pytest.raises(ValueError, match=message):
        evaluate_documents(model, documents_of(model), **past)


# ---- windows ----


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=19, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.5)).double()


@pytest.mark.parametrize(("context", "stride"), [(2, None), (6, None), (6, 3), (7, 1), (40, 20)])
def test_windows_score_every_token_once(llama: LlamaForCausalLM, context: int, stride: int | None) -> None:
    """Each token alone, from the text of the one window that it is scored in; chunks are of its predecessor's place."""
    documents = [random_tokens(llama.config, length, seed=length) for length in (23, 1, 6, 7, 2, 13)]
    step = stride or context - 1
    expected: list[dict[int, list[float]]] = []
    for document in documents:
        chunks: dict[int, list[float]] = defaultdict(list)
        for target in range(1, len(document)):
            start = 0
            while start + context <= target:  # the first window that holds it
                start += step
            with torch.no_grad():
                logits = llama(document[None, start:target]).logits[0, -1]
            chunks[(target - 1) // 4].append(-float(logits.log_softmax(-1)[document[target]]))
        expected.append(chunks)

    found = evaluate_windows(
        llama, documents, context, stride, batch_size=3, chunk_size=4, num_bytes=9, by_document=True
    )
    for chunks, scores in zip(expected, found["documents"], strict=True):
        assert [count for _, count in scores] == [len(chunks[chunk]) for chunk in range(len(scores))]
        assert [nats for nats, _ in scores] == pytest.approx([sum(chunks[chunk]) for chunk in range(len(scores))])
    total = sum(loss for chunks in expected for losses in chunks.values() for loss in losses)
    assert found["num_tokens"] == 46 and found["num_documents"] == 6
    assert found["loss"] == pytest.approx(total / 46) and found["bits_per_byte"] == pytest.approx(
        total / math.log(2) / 9
    )


def test_windows_that_there_are_not(llama: LlamaForCausalLM) -> None:
    for options, message in (
        (dict(context=6, stride=6), "`stride` must be from 1 to 5, one less than `context`, got 6"),
        (dict(context=6, stride=0), "from 1 to 5, .*got 0"),
        (dict(context=0), "`context` must be an integer of at least 1, got 0"),
        (dict(context=6, num_bytes=0), "`num_bytes` must be an integer of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_windows(llama, [[1, 2]], **options)
    with pytest.raises(ValueError, match="two tokens or more, got 2 documents without"):
        evaluate_windows(llama, [[1], [2]], 6)
    with pytest.raises(ValueError, match="document 1: expected token ids from 0 to 18, got 19"):
        evaluate_windows(llama, [[1], [19]], 6)


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores of each file's documents, each behind the token that begins a text; and what cannot be scored."""
    model = save_checkpoint(tmp_path / "model", chunk_size=16)
    texts = ["What is read. " * 5, "And what is left. " * 3]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "one.txt").write_text(texts[0])
    files = [str(tmp_path / name) for name in ("two.jsonl", "one.txt")]
    arguments = [str(tmp_path / "model"), *files, "--num_chars", "40", "--device", "cpu"]
    evaluation.main(arguments)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["text", "documents", "tokens", "nats", "per", "token", "perplexity", "bits", "per", "byte"]
    for line, read in zip(lines, (texts, texts[:1]), strict=True):
        documents = [[0, *(byte_tokenizer()(text[:40]).input_ids)] for text in read]  # a token is a byte
        expected = evaluate_documents(model, documents, num_bytes=40 * len(read))
        counts = [str(len(read)), str(40 * len(read))]
        assert line.split()[1:3] == counts and line[:32].strip() in files[0] + files[1]
        figures = [f"{expected[name]:.{digits}f}" for name, digits in (("loss", 4), ("perplexity", 2))]
        assert line.split()[3:] == [*figures, f"{expected['bits_per_byte']:.4f}"]
    evaluation.main([*arguments, "--memory", "learned", "--keys", "none"])
    assert capsys.readouterr().out.splitlines()[1:] != lines
    with pytest.raises(SystemExit, match=r"error: .*missing\.txt"):
        evaluation.main([str(tmp_path / "model"), str(tmp_path / "missing.txt")])
    (tmp_path / "empty.txt").write_text("")
    for wrong, message in (
        ([str(tmp_path / "empty.txt")], r"error: expected text in .*empty\.txt, got none"),
        ([files[1], "--num_chars", "0"], "error: `num_chars` must be"),
    ):
        with pytest.raises(SystemExit, match=message):
            evaluation.main([str(tmp_path / "model"), *wrong, "--device", "cpu"])
    with pytest.raises(SystemExit, match=r"error: --device: .*nowhere"):
        evaluation.main([*arguments[:-1], "nowhere"])
    LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path / "llama")
    with pytest.raises(SystemExit, match="error: expected a BakaLLM, got a LlamaForCausalLM"):
        evaluation.main([str(tmp_path / "llama"), *arguments[1:]])
