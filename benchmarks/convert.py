"""What a converted decoder loses before any training: nats per token by chunk, of the source and with each memory.

    python benchmarks/convert.py --source HuggingFaceTB/SmolLM2-135M --text_file books.jsonl.xz --chunk_size 256
    python benchmarks/convert.py --source HuggingFaceTB/SmolLM2-135M --text_file books.jsonl.xz --chunks 128 \\
        --depths 0 1 8 32 64

The same tokens of each document are read by the source, with all of them in sight and in windows of two chunks, each
for the loss of its second one, and by models that `add_memory` makes of it: without memory, with a sink alone (a pause
that stands before every chunk), and with both for each number of memory vectors and each update. Lines are printed as
they come, `--out` keeps them as a table (convert.md). Nats per token are also given as bits per byte, by the tokens and
bytes of all that is read.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from baka_hf.convert import add_memory
from baka_hf.texts import read_documents

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", required=True, help="A folder or a name on the Hub.")
    add("--text_file", required=True, help='.jsonl (a document a line, in "text") or text, also .xz.')
    add("--chunk_size", type=int, default=256)
    add("--chunks", type=int, default=8, help="Chunks of each document that are read.")
    add("--depths", type=int, nargs="+", help="First chunks of those that a column means over (default: each chunk).")
    add("--documents", type=int, default=2, help="As many, from the first.")
    add("--skip_chars", type=int, default=0, help="Where reading begins in each document.")
    add("--num_memory_tokens", type=int, nargs="*", default=[1, 4, 16])
    add("--memory_updates", nargs="*", default=["replace", "gate"])
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, help="A folder for the table.")
    return parser.parse_args()


def losses(logits: Iterable[torch.Tensor], targets: Iterable[torch.Tensor]) -> list[float]:
    """Mean nats per token of each chunk."""
    return [F.cross_entropy(x.float().mT, y).item() for x, y in zip(logits, targets, strict=True)]


def whole(model: Any, tokens: torch.Tensor, chunk_size: int) -> Iterable[torch.Tensor]:
    return model(tokens).logits.split(chunk_size, dim=1)


def windows(model: Any, tokens: torch.Tensor, chunk_size: int) -> Iterable[torch.Tensor]:
    for end in range(chunk_size, tokens.shape[1] + 1, chunk_size):
        yield model(tokens[:, max(0, end - 2 * chunk_size) : end]).logits[:, -chunk_size:]


def streamed(model: Any, tokens: torch.Tensor, chunk_size: int) -> Iterable[torch.Tensor]:
    state = model.new_cache(len(tokens))
    for chunk in tokens.split(chunk_size, dim=1):
        yield model(chunk, cache=state).logits


def models(source: Any, args: argparse.Namespace) -> Iterator[tuple[str, Any, Callable]]:
    yield "source, all in sight", source, whole
    yield "source, windows of two chunks", source, windows
    for pauses in (0, 1):
        fields = dict(chunk_size=args.chunk_size, num_memory_tokens=0, num_pause_tokens=pauses)
        yield f"chunks, {'a sink' if pauses else 'no sink'}", add_memory(source, **fields), streamed
    for number in args.num_memory_tokens:
        for update in args.memory_updates:
            fields = dict(chunk_size=args.chunk_size, num_memory_tokens=number, memory_update=update)
            yield f"{number} vectors, {update}", add_memory(source, **fields), streamed


@torch.no_grad()
def main() -> None:
    args = parse_args()
    depths = args.depths or list(range(args.chunks))
    if depths != sorted(set(depths)) or not 0 <= depths[0] <= depths[-1] < args.chunks:
        raise ValueError(f"--depths: expected ascending numbers from 0 to {args.chunks - 1}, got {depths}.")
    source = AutoModelForCausalLM.from_pretrained(args.source, dtype=DTYPES[args.dtype]).to(args.device).eval()
    tokenizer, length = AutoTokenizer.from_pretrained(args.source), args.chunks * args.chunk_size + 1
    texts = [text[args.skip_chars :][: 16 * length] for text in read_documents(args.text_file)[: args.documents]]
    rows = [tokenizer(text, add_special_tokens=False).input_ids[:length] for text in texts]
    if not rows or min(map(len, rows)) < length:
        raise ValueError(f"expected documents of at least {length} tokens in {args.text_file}.")
    tokens = torch.tensor(rows, device=args.device)
    num_bytes = sum(len(text.encode()) for text in tokenizer.batch_decode(tokens[:, 1:]))
    bits = tokens[:, 1:].numel() / num_bytes / math.log(2)
    lines = [f"| | {' | '.join(f'chunk {i}' for i in depths)} | mean from 1 on | bits per byte |"]
    lines.append("| --- |" + " ---: |" * (len(depths) + 2))
    print("\n".join(lines))
    for name, model, read in models(source, args):
        # One document at a time: its logits may fill the memory.
        by_document = [
            losses(read(model, row[None, :-1], args.chunk_size), row[None, 1:].split(args.chunk_size, dim=1))
            for row in tokens
        ]
        each = torch.tensor(by_document, dtype=torch.float64).mean(0)
        means = [each[first:following].mean() for first, following in zip_longest(depths, depths[1:])]
        figures = [f"{loss:.3f}" for loss in (*means, each[1:].mean() if len(each) > 1 else each[0])]
        lines.append(f"| {name} | {' | '.join(figures)} | {bits * each.mean():.3f} |")
        print(lines[-1], flush=True)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "convert.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
