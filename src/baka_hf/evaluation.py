"""How well a model predicts whole documents, each read from its first token to its last with its memory carried.

    evaluate_documents(model, documents, batch_size=16)
    {"loss": 2.31, "perplexity": 10.1, "num_tokens": 81920, "num_documents": 40, "loss_by_chunk": [...]}

The rows of the batch are lanes. A lane reads one document, a chunk in every call, and takes the next one when it ends,
so all rows stand at the beginning of a chunk in every call, which is the model's fast path. What fills up the last
chunk of a document comes after all that is scored and is forgotten with the document: nothing ever sees it.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from .data import SECONDS_UNTIL_PROGRESS, check_document, check_positive


@dataclass
class Lane:
    """A row of the batch: the document it reads, [T] int64 on the CPU, and how many chunks of it are read."""

    document: torch.Tensor
    chunk: int = 0


@torch.no_grad()
def evaluate_documents(
    model: Any,
    documents: Iterable[Any],
    batch_size: int = 8,
    *,
    num_bytes: int | None = None,
    progress: bool = True,
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

    Returns:
        `loss` (nats per token, the mean over all tokens), `perplexity`, `num_tokens` (that were scored),
        `num_documents`, `bits_per_byte` if `num_bytes` is given, and `loss_by_chunk`: for each chunk of a document a
        dict of `chunk` (0 for the first), `loss` and `num_tokens`. A token counts for the chunk that predicts it, so
        the losses at `chunk` i are those with exactly i chunks to remember.

    Raises:
        ValueError: a document is empty, has ids out of the vocabulary or is no sequence of ids (the message has its
            index); there is nothing to score; `batch_size` or `num_bytes` is below 1.
    """
    check_positive(batch_size=batch_size)
    if num_bytes is not None:
        check_positive(num_bytes=num_bytes)
    reader = _Reader(documents, model.config.vocab_size)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with logging.tqdm(
            desc="Evaluating",
            total=_count_tokens(documents),
            unit="tok",
            unit_scale=True,
            disable=not progress,
            delay=SECONDS_UNTIL_PROGRESS,
        ) as bar:
            sums, counts = _score(model, iter(reader), batch_size, bar)
    finally:
        for module, mode in modes:
            module.training = mode

    num_tokens = sum(counts)
    if not num_tokens:
        raise ValueError(f"expected a document of two tokens or more, got {reader.num_documents} documents without.")
    nats = math.fsum(sums)
    result: dict[str, Any] = {
        "loss": nats / num_tokens,
        "perplexity": perplexity(nats / num_tokens),
        "num_tokens": num_tokens,
        "num_documents": reader.num_documents,
    }
    if num_bytes is not None:
        result["bits_per_byte"] = nats / math.log(2) / num_bytes
    result["loss_by_chunk"] = [
        {"chunk": chunk, "loss": total / count, "num_tokens": count}
        for chunk, (total, count) in enumerate(zip(sums, counts, strict=True))
    ]
    return result


def perplexity(loss: float) -> float:
    """exp(loss), ∞ where that is beyond a float."""
    return math.inf if loss > 709 else math.exp(loss)


class _Reader:
    """The documents that have something to score, checked one by one as a lane takes them."""

    def __init__(self, documents: Iterable[Any], vocab_size: int):
        self.documents, self.vocab_size = documents, vocab_size
        self.num_documents = 0

    def __iter__(self) -> Iterator[Lane]:
        for document in self.documents:
            tokens = check_document(document, self.num_documents, self.vocab_size)
            self.num_documents += 1
            if len(tokens) > 1:
                yield Lane(tokens)


def _score(model: Any, documents: Iterator[Lane], batch_size: int, bar: Any) -> tuple[list[float], list[int]]:
    """The sum of the losses (nats) and their number, by chunk of the document."""
    sums: list[float] = []
    counts: list[int] = []
    lanes = list(islice(documents, batch_size))
    if not lanes:
        return sums, counts
    cache, n = model.new_cache(len(lanes)), model.config.chunk_size
    while lanes:
        # A chunk and the token after it, which it predicts and the next one reads.
        pieces = [lane.document[lane.chunk * n : (lane.chunk + 1) * n + 1] for lane in lanes]
        input_ids = pad_sequence([piece[:-1] for piece in pieces], batch_first=True)
        logits = model(input_ids=input_ids.to(cache.device), cache=cache, use_cache=True).logits
        # Row by row: what is copied on the way to the losses is never more than the logits of one row.
        rows = [_cross_entropies(row, piece[1:]) for row, piece in zip(logits, pieces, strict=True)]
        del logits
        losses = torch.cat(rows).cpu().double()

        for lane, part in zip(lanes, losses.split([len(row) for row in rows]), strict=True):
            if lane.chunk == len(sums):
                sums.append(0.0)
                counts.append(0)
            sums[lane.chunk] += float(part.sum())
            counts[lane.chunk] += len(part)
            lane.chunk += 1
        bar.update(len(losses))

        ended = [lane.chunk * n >= len(lane.document) - 1 for lane in lanes]
        cache.reset_rows(torch.tensor(ended))
        following = [next(documents, None) if end else lane for lane, end in zip(lanes, ended, strict=True)]
        lanes = [lane for lane in following if lane is not None]
        if 0 < len(lanes) < len(following):
            cache.batch_select_indices(torch.tensor([row for row, lane in enumerate(following) if lane is not None]))
    return sums, counts


def _cross_entropies(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[T] nats, in float32 at least, of logits [T or more, V] for the first T tokens."""
    logits = logits[: len(targets)]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets.to(logits.device), reduction="none")


def _count_tokens(documents: Iterable[Any]) -> int | None:
    """How many tokens there are to score, if that can be seen without reading the documents."""
    if not isinstance(documents, list | tuple):
        return None
    try:
        return sum(max(len(document) - 1, 0) for document in documents)
    except TypeError:
        return None


__all__ = ["evaluate_documents"]
