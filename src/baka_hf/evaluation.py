"""How well a model predicts whole documents, each read from its first token to its last with its memory carried.

    evaluate_documents(model, documents, batch_size=16)
    {"loss": 2.31, "perplexity": 10.1, "num_tokens": 81920, "num_documents": 40, "loss_by_chunk": [...]}

The rows of the batch are lanes. A lane reads one document, a chunk in every call, and takes the next one when it ends,
so all rows stand at the beginning of a chunk in every call, which is the model's fast path. What fills up the last
chunk of a document comes after all that is scored and is forgotten with the document: nothing ever sees it.

What the past is worth shows when chunks read another one in its place:

    own = evaluate_documents(model, documents, by_document=True)
    other = evaluate_documents(model, documents, by_document=True, memory="exchanged")
    gain_by_depth(own, other)

`evaluate_windows` scores the same tokens by a model without a state, which sees a window of text at a time.

    python -m baka_hf.evaluation baka-small notes.txt articles.jsonl.xz

prints the scores of a checkpoint on the documents of each file.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from .configuration_baka import check_integers
from .data import SECONDS_UNTIL_PROGRESS, check_document
from .parts import import_parts
from .texts import read_documents

MEMORIES = ("carried", "exchanged", "learned", "frozen")
KEYS = ("carried", "exchanged", "none")

# Chunks that `gain_by_depth` takes together, by the first of them.
DEPTHS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass
class Lane:
    """A row of the batch: the document it reads, [T] int64 on the CPU, and how many chunks of it are read."""

    document: torch.Tensor
    scores: list[tuple[float, int]]  # nats and how many tokens they are of, chunk by chunk; 0 of 0 if not scored
    chunk: int = 0
    frozen: Any = None  # what memory held, by name, after its first chunk


@torch.no_grad()
def evaluate_documents(
    model: Any,
    documents: Iterable[Any],
    batch_size: int = 8,
    *,
    num_bytes: int | None = None,
    progress: bool = True,
    memory: str = "carried",
    keys: str = "carried",
    by_document: bool = False,
) -> dict[str, Any]:
    """Score every token of every document, but for its first, once; each predicted from all that stands before it.

    The result depends on neither `batch_size` nor the order of the documents, up to the rounding of the model's own
    arithmetic: 1e-12 in float64, 1e-6 in float32. Losses are taken in float32 at least and added up in float64. Device
    memory does not depend on the length of the documents; the logits of one chunk per row are all that is ever held.

    Args:
        model: a `BakaForCausalLM`, or one that a checkpoint brought with its own code. It is read in eval mode; then
            each of its modules is back in the mode it was in.
        documents: token ids, a list, an array or a 1-D tensor per document; may be a generator. A document of one
            token has nothing to score, it only counts as a document.
        batch_size: documents read side by side. Fewer are, once the documents run out.
        num_bytes: bytes of the text that is scored, for bits per byte.
        progress: show a progress bar when it takes long.
        memory: what a chunk, other than a document's first, reads as memory: "carried", what its document has left;
            "exchanged", what another one has left after as many chunks; "learned", the vectors that a first chunk
            reads, without a solidifier as there (nobody else may read the model meanwhile); "frozen", what its
            document's first chunk has left.
        keys: what it sees of a previous chunk: "carried", that of its document; "exchanged", that of the other one;
            "none".
        by_document: also return `documents`, for each of them a list of (nats, number of tokens) by chunk.

    The state itself goes on undisturbed, so a chunk is then read twice: as it is for what it leaves, and with the other
    past for its loss. To be exchanged, documents are read in step, `batch_size` of them at a time, and each is given
    the past of the next one that has not ended. The longest has no other at its end, and is not scored there.

    Returns:
        `loss` (nats per token, the mean over all tokens), `perplexity`, `num_tokens` (that were scored),
        `num_documents`, `bits_per_byte` if `num_bytes` is given, and `loss_by_chunk`: for each chunk of a document a
        dict of `chunk` (0 for the first), `loss` and `num_tokens`. A token counts for the chunk that predicts it, so
        the losses at `chunk` i are those with exactly i chunks to remember.

    Raises:
        ValueError: a document is empty, has ids out of the vocabulary or is no sequence of ids (the message has its
            index); there is nothing to score; `batch_size` or `num_bytes` is below 1; `memory` or `keys` is another
            word, or is asked of a model that has none, or documents are to be exchanged one at a time.
    """
    check_integers(batch_size=batch_size)
    _check_past(model.config, batch_size, memory, keys)
    if num_bytes is not None:
        check_integers(num_bytes=num_bytes)
    scores: list[list[tuple[float, int]]] = []
    lanes = _lanes_of(documents, model.config.vocab_size, scores)
    with (
        in_eval_mode(model),
        logging.tqdm(
            desc="Evaluating",
            total=_count_tokens(documents),
            unit="tok",
            unit_scale=True,
            disable=not progress,
            delay=SECONDS_UNTIL_PROGRESS,
        ) as bar,
    ):
        _score(model, lanes, batch_size, memory, keys, bar)
    return _summarize(scores, num_bytes, by_document)


@torch.no_grad()
def evaluate_windows(
    model: Any,
    documents: Sequence[Any],
    context: int,
    stride: int | None = None,
    batch_size: int = 8,
    *,
    chunk_size: int = 512,
    num_bytes: int | None = None,
    by_document: bool = False,
) -> dict[str, Any]:
    """Score every token of every document, but for its first, once, by a causal model that sees `context` tokens.

    Args:
        model: any causal language model of transformers. It is read in eval mode, and is back in its own afterwards.
        documents: token ids, a list, an array or a 1-D tensor per document.
        context: tokens of a window.
        stride: by how much a window begins after the one before. Of each but the first only those tokens are scored
            that the one before did not hold, so all but `stride` are context alone; `context // 2` slides by half.
            `context - 1`, the most, if not given: windows stand side by side, and share the token that both need.
        batch_size: windows read side by side.
        chunk_size: tokens that `loss_by_chunk` takes together, as for a model that reads chunks of this size.
        num_bytes, by_document: as for `evaluate_documents`.

    Returns:
        What `evaluate_documents` returns.

    Raises:
        ValueError: as `evaluate_documents`; or `stride` is not from 1 to `context - 1`.
    """
    check_integers(context=context, batch_size=batch_size, chunk_size=chunk_size)
    stride = context - 1 if stride is None else stride
    if not 1 <= stride < context:
        raise ValueError(f"`stride` must be from 1 to {context - 1}, one less than `context`, got {stride!r}.")
    if num_bytes is not None:
        check_integers(num_bytes=num_bytes)
    tokens = [check_document(document, number, model.config.vocab_size) for number, document in enumerate(documents)]
    scores = [[(0.0, 0)] * -(-(len(document) - 1) // chunk_size) for document in tokens]
    # Of which document, where it begins, and the first position in it whose prediction is scored.
    windows = [
        (number, start, 0 if start == 0 else context - stride - 1)
        for number, document in enumerate(tokens)
        for start in range(0, max(len(document) - context + stride, min(len(document) - 1, 1)), stride)
    ]
    windows.sort(key=lambda window: len(tokens[window[0]]) - window[1], reverse=True)  # full ones side by side
    with in_eval_mode(model):
        for first in range(0, len(windows), batch_size):
            batch = windows[first : first + batch_size]
            pieces = [tokens[number][start : start + context] for number, start, _ in batch]
            # Padding comes after all that is scored.
            input_ids = pad_sequence(pieces, batch_first=True).to(model.device)
            losses = _losses_of(model(input_ids=input_ids, use_cache=False).logits, pieces)
            for (number, start, begin), row in zip(batch, losses, strict=True):
                while begin < len(row):
                    chunk = (start + begin) // chunk_size
                    part = row[begin : (chunk + 1) * chunk_size - start]
                    nats, count = scores[number][chunk]
                    scores[number][chunk] = nats + float(part.sum()), count + len(part)
                    begin += len(part)
    return _summarize(scores, num_bytes, by_document)


@contextmanager
def in_eval_mode(model: Any) -> Iterator[None]:
    """Afterwards each module is back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _summarize(scores: list[list[tuple[float, int]]], num_bytes: int | None, by_document: bool) -> dict[str, Any]:
    """What is returned, of (nats, number of tokens) of each document by chunk."""
    by_chunk = [list(filter(None, of_chunk)) for of_chunk in zip_longest(*scores)]
    sums, counts = ([math.fsum(score[part] for score in of_chunk) for of_chunk in by_chunk] for part in (0, 1))
    num_tokens = int(sum(counts))
    if not num_tokens:
        raise ValueError(f"expected a document of two tokens or more, got {len(scores)} documents without.")
    nats = math.fsum(sums)
    result: dict[str, Any] = {
        "loss": nats / num_tokens,
        "perplexity": perplexity(nats / num_tokens),
        "num_tokens": num_tokens,
        "num_documents": len(scores),
    }
    if num_bytes is not None:
        result["bits_per_byte"] = nats / math.log(2) / num_bytes
    result["loss_by_chunk"] = [
        {"chunk": chunk, "loss": total / count, "num_tokens": int(count)}
        for chunk, (total, count) in enumerate(zip(sums, counts, strict=True))
        if count
    ]
    return result | ({"documents": scores} if by_document else {})


def gain_by_depth(
    scores: Mapping[str, Any], others: Mapping[str, Any], depths: Sequence[int] = DEPTHS
) -> list[dict[str, Any]]:
    """By how much a model predicts the same documents better than another, or than it does with another past.

    Args:
        scores, others: what `evaluate_documents(by_document=True)` gave for the same documents in the same order.
        depths: the first chunks of the ranges that are taken together, ascending; the last range has no end.

    Returns:
        For each range in which both have scored something a dict of `first_chunk`, `last_chunk` (None: all that
        follow), `gain` (nats per token), `standard_error` (over documents, of the ratio of sums; None for a single
        one), `num_documents` and `num_tokens`.

    Raises:
        ValueError: the scores are of other documents.
    """
    pairs = list(zip_longest(scores["documents"], others["documents"]))
    gains = []
    for first, following in zip_longest(depths, depths[1:]):
        part = slice(first, following)
        differences, counts = [], []
        for number, (own, other) in enumerate(pairs):
            both = [(a, b) for a, b in zip((own or [])[part], (other or [])[part], strict=False) if a[1] and b[1]]
            if any(a[1] != b[1] for a, b in both) or own is None or other is None:
                raise ValueError(f"expected scores of the same documents, got others of document {number}.")
            if both:
                differences.append(math.fsum(b[0] - a[0] for a, b in both))
                counts.append(sum(a[1] for a, _ in both))
        if counts:
            total, number = sum(counts), len(counts)
            gain = math.fsum(differences) / total
            squares = math.fsum((d - gain * count) ** 2 for d, count in zip(differences, counts, strict=True))
            gains.append(
                {
                    "first_chunk": first,
                    "last_chunk": None if following is None else following - 1,
                    "gain": gain,
                    "standard_error": math.sqrt(squares * number / (number - 1)) / total if number > 1 else None,
                    "num_documents": number,
                    "num_tokens": total,
                }
            )
    return gains


def perplexity(loss: float) -> float:
    """exp(loss), ∞ where that is beyond a float."""
    return math.inf if loss > 709 else math.exp(loss)


def _lanes_of(documents: Iterable[Any], vocab_size: int, scores: list[Any]) -> Iterator[Lane]:
    """The documents that have something to score, checked one by one as taken; each adds its own to `scores`."""
    for number, document in enumerate(documents):
        tokens = check_document(document, number, vocab_size)
        scores.append([])
        if len(tokens) > 1:
            yield Lane(tokens, scores[-1])


def _check_past(config: Any, batch_size: int, memory: str, keys: str) -> None:
    for name, value, allowed, has_any in (
        ("memory", memory, MEMORIES, config.num_memory_tokens > 0 or config.associative_dim > 0),
        ("keys", keys, KEYS, config.use_xl_cache),
    ):
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")
        if value != "carried" and not has_any:
            raise ValueError(f"expected {name}='carried' of a model that has no {name} to carry, got {value!r}.")
    if "exchanged" in (memory, keys) and batch_size < 2:
        raise ValueError(f"expected a `batch_size` of at least 2, to exchange what documents leave, got {batch_size}.")


def _score(model: Any, documents: Iterator[Lane], batch_size: int, memory: str, keys: str, bar: Any) -> None:
    """Read all documents, and enter their scores."""
    in_step, is_changed = "exchanged" in (memory, keys), (memory, keys) != ("carried", "carried")
    n = model.config.chunk_size
    lanes = list(islice(documents, batch_size))
    cache = model.new_cache(len(lanes)) if lanes else None
    while lanes:
        assert cache is not None
        # A chunk and the token after it, which it predicts and the next one reads.
        pieces = [lane.document[lane.chunk * n : (lane.chunk + 1) * n + 1] for lane in lanes]
        input_ids = pad_sequence([piece[:-1] for piece in pieces], batch_first=True).to(cache.device)
        has_past = any(lane.chunk for lane in lanes)
        other = _with_another_past(model, cache, lanes, memory, keys) if is_changed and has_past else None
        logits = model(input_ids=input_ids, cache=cache, use_cache=True).logits
        if other is not None:
            with _reading_as_it_is(model) if memory == "learned" else nullcontext():
                logits = model(input_ids=input_ids, cache=other, use_cache=True).logits
        losses = _losses_of(logits, pieces)
        del logits

        is_scored = not in_step or len(lanes) > 1 or lanes[0].chunk == 0
        for row, (lane, part) in enumerate(zip(lanes, losses, strict=True)):
            lane.scores.append((float(part.sum()), len(part)) if is_scored else (0.0, 0))
            if lane.chunk == 0 and memory == "frozen":
                lane.frozen = {name: tensor[row].clone() for name, tensor in cache.carried.items()}
            lane.chunk += 1
        bar.update(sum(map(len, losses)))

        ended = [lane.chunk * n >= len(lane.document) - 1 for lane in lanes]
        cache.reset_rows(torch.tensor(ended))
        may_follow = not in_step or all(ended)
        following = [
            (next(documents, None) if may_follow else None) if end else lane
            for lane, end in zip(lanes, ended, strict=True)
        ]
        lanes = [lane for lane in following if lane is not None]
        if 0 < len(lanes) < len(following):
            cache.batch_select_indices(torch.tensor([row for row, lane in enumerate(following) if lane is not None]))
        elif in_step and all(ended):
            lanes += islice(documents, batch_size - len(lanes))
            cache = model.new_cache(len(lanes)) if lanes else None


def _with_another_past(model: Any, cache: Any, lanes: list[Lane], memory: str, keys: str) -> Any:
    """The state that the next chunk of each lane is scored with; rows that begin a document have no past to change."""
    begins = torch.tensor([lane.chunk == 0 for lane in lanes])
    given, config = cache.carried, model.config
    if memory == "exchanged":
        given = {name: tensor.roll(-1, 0) for name, tensor in given.items()}
    elif memory == "learned":
        given = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
        if config.num_memory_tokens:
            given["memory"] = model.get_decoder().learned_memory(given["memory"]).expand_as(given["memory"]).clone()
    elif memory == "frozen":
        for name, tensor in given.items():
            rows = [row if lane.frozen is None else lane.frozen[name] for row, lane in zip(tensor, lanes, strict=True)]
            given[name] = torch.stack(rows)
    if keys == "none":
        has_memory = config.num_memory_tokens or config.associative_dim
        other = model.new_cache(len(lanes), memory=given["memory"] if has_memory else None)
    else:
        other = cache.clone()
    other.carried = given
    if keys == "exchanged":
        for layer in other.layers:
            layer.keys, layer.values = layer.keys.roll(-1, 0), layer.values.roll(-1, 0)
    other.reset_rows(begins)
    return other


@contextmanager
def _reading_as_it_is(model: Any) -> Iterator[None]:
    """What is read as memory passes through no solidifier, as in a first chunk."""
    decoder = model.get_decoder()
    decoder.solidify = lambda memory, to: memory
    try:
        yield
    finally:
        del decoder.solidify


def _losses_of(logits: torch.Tensor, pieces: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Nats of each piece [T], float64 [T - 1] on the CPU and taken in float32 at least, by logits [B, …, V]."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # Row by row: what is copied on the way to the losses is never more than the logits of one row.
    rows = [
        F.cross_entropy(row[: len(piece) - 1].to(dtype), piece[1:].to(row.device), reduction="none")
        for row, piece in zip(logits, pieces, strict=True)
    ]
    return torch.cat(rows).cpu().double().split([len(row) for row in rows])


def _count_tokens(documents: Iterable[Any]) -> int | None:
    """How many tokens there are to score, if that can be seen without reading the documents."""
    if not isinstance(documents, list | tuple):
        return None
    try:
        return sum(max(len(document) - 1, 0) for document in documents)
    except TypeError:
        return None


# python -m baka_hf.evaluation


def open_checkpoint(
    checkpoint: str, device: str, trust_remote_code: bool = False, tokenizer: str | None = None
) -> tuple[Any, Any]:
    """A BakaLLM and a tokenizer, its own if none is named, as the command lines ask for them.

    Raises:
        ValueError: there is no such device, or another model.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {error}") from error
    if trust_remote_code:
        import_parts(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    if model.config.model_type != "baka":
        raise ValueError(f"expected a BakaLLM, got a {type(model).__name__} in {checkpoint}.")
    return model.to(device), AutoTokenizer.from_pretrained(tokenizer or checkpoint)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m baka_hf.evaluation", description="Scores of a checkpoint on whole documents, memory carried."
    )
    parser.add_argument("checkpoint", help="a folder or a name on the Hub")
    parser.add_argument(
        "texts", nargs="+", metavar="TEXT", help='.jsonl (a document a line, in "text") or a UTF-8 document; also .xz'
    )
    parser.add_argument("--num_chars", type=int, help="characters to read of each document; all if not given")
    parser.add_argument("--batch_size", type=int, default=16, help="documents read side by side (default: %(default)s)")
    parser.add_argument("--memory", choices=MEMORIES, default="carried", help="what chunks read as memory")
    parser.add_argument("--keys", choices=KEYS, default="carried", help="what they see of the chunk before")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the parts that the checkpoint brings")
    args = parser.parse_args(arguments)
    try:
        check_integers(batch_size=args.batch_size, **({} if args.num_chars is None else {"num_chars": args.num_chars}))
        model, tokenizer = open_checkpoint(args.checkpoint, args.device, args.trust_remote_code)
        first = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
        print(
            f"{'text':<32}{'documents':>10}{'tokens':>11}{'nats per token':>16}{'perplexity':>12}{'bits per byte':>15}"
        )
        for path in args.texts:
            texts = [text[: args.num_chars] for text in read_documents(path)]
            if not any(texts):
                raise ValueError(f"expected text in {path}, got none.")
            documents = [first + tokenizer(text, add_special_tokens=False).input_ids for text in texts]
            found = evaluate_documents(
                model,
                documents,
                args.batch_size,
                num_bytes=sum(len(text.encode()) for text in texts),
                memory=args.memory,
                keys=args.keys,
            )
            print(
                f"{path[-30:]:<32}{found['num_documents']:>10,}{found['num_tokens']:>11,}{found['loss']:16.4f}"
                f"{found['perplexity']:12.2f}{found['bits_per_byte']:15.4f}",
                flush=True,
            )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


__all__ = ["evaluate_documents", "evaluate_windows", "gain_by_depth", "main"]

if __name__ == "__main__":
    main()
