"""What a converted decoder loses before any training: nats per token by chunk, of the source and with each memory.

    python benchmarks/convert.py --source HuggingFaceTB/SmolLM2-135M --text_file books.jsonl.xz --chunk_size 256

The same tokens of each document are read by the source with all of them in sight, and by models that `add_memory` makes
of it: without memory, with a sink alone (a pause that stands before every chunk), and with both for each number of
memory vectors and each update. Lines are printed as they come, `--out` keeps them as a table (convert.md).
"""

import argparse
from collections.abc import Iterator
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
    add("--documents", type=int, default=2, help="As many, from the first.")
    add("--skip_chars", type=int, default=0, help="Where reading begins in each document.")
    add("--num_memory_tokens", type=int, nargs="*", default=[1, 4, 16])
    add("--memory_updates", nargs="*", default=["replace", "gate"])
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, help="A folder for the table.")
    return parser.parse_args()


def losses(model: Any, tokens: torch.Tensor, piece: int) -> list[float]:
    """Mean nats per token of each piece of `tokens` [B, T + 1], read with a state if the model is one of ours."""
    state = model.new_cache(len(tokens)) if hasattr(model, "new_cache") else None
    if state is None:
        logits = model(tokens[:, :-1]).logits.split(piece, dim=1)
    else:
        logits = [model(x, cache=state).logits for x in tokens[:, :-1].split(piece, dim=1)]
    targets = tokens[:, 1:].split(piece, dim=1)
    return [F.cross_entropy(x.float().mT, y).item() for x, y in zip(logits, targets, strict=True)]


def models(source: Any, args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    yield "source, all in sight", source
    for pauses in (0, 1):
        fields = dict(chunk_size=args.chunk_size, num_memory_tokens=0, num_pause_tokens=pauses)
        yield f"chunks, {'a sink' if pauses else 'no sink'}", add_memory(source, **fields)
    for number in args.num_memory_tokens:
        for update in args.memory_updates:
            fields = dict(chunk_size=args.chunk_size, num_memory_tokens=number, memory_update=update)
            yield f"{number} vectors, {update}", add_memory(source, **fields)


@torch.no_grad()
def main() -> None:
    args = parse_args()
    source = AutoModelForCausalLM.from_pretrained(args.source, dtype=DTYPES[args.dtype]).to(args.device).eval()
    tokenizer, length = AutoTokenizer.from_pretrained(args.source), args.chunks * args.chunk_size + 1
    texts = [text[args.skip_chars :][: 16 * length] for text in read_documents(args.text_file)[: args.documents]]
    rows = [tokenizer(text, add_special_tokens=False).input_ids[:length] for text in texts]
    if not rows or min(map(len, rows)) < length:
        raise ValueError(f"expected documents of at least {length} tokens in {args.text_file}.")
    tokens = torch.tensor(rows, device=args.device)
    lines = [f"| | {' | '.join(f'chunk {i}' for i in range(args.chunks))} | mean from 1 on |"]
    lines.append("| --- |" + " ---: |" * (args.chunks + 1))
    print("\n".join(lines))
    for name, model in models(source, args):
        # One document at a time: its logits may fill the memory.
        each = torch.tensor([losses(model, row[None], args.chunk_size) for row in tokens]).mean(0).tolist()
        mean = sum(each[1:]) / max(len(each) - 1, 1)
        lines.append(f"| {name} | {' | '.join(f'{loss:.3f}' for loss in each)} | {mean:.3f} |")
        print(lines[-1], flush=True)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "convert.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
