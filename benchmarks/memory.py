"""What becomes of a checkpoint's memory over thousands of chunks of a text, in float32 and in bfloat16.

    python benchmarks/memory.py --checkpoint baka-small --text_file books.txt --chunks 5000 --device cuda --out results

Reads the text through one state, chunk after chunk, and looks at the memory after each: the norm of its vectors (mean),
the share of its numbers that are others than a chunk before, by how much they differ (the norm of the difference over
that of the memory), and the loss of the chunk in nats per token. Printed are means over tenths of the stream; `--out`
also keeps the table (memory.md), all chunks (memory.jsonl) and a plot (memory.png).
"""

import argparse
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer

from baka_hf import BakaForCausalLM
from baka_hf.inspect import COLUMNS, LABELS, course, follow_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="A folder or a name on the Hub.")
    parser.add_argument("--text_file", type=Path, required=True, help="UTF-8, read from its beginning.")
    parser.add_argument("--tokenizer", help="By default the checkpoint's.")
    parser.add_argument("--chunks", type=int, default=5000)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="A folder for the table, the figures and the plot.")
    return parser.parse_args()


def table_of(measured: dict[str, torch.Tensor], chunk_size: int) -> str:
    lines = [f"| dtype | chunks | tokens | {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * (2 + len(COLUMNS))]
    for dtype, rows in measured.items():
        stop = 0
        for part in rows.tensor_split(min(10, len(rows))):
            start, stop = stop, stop + len(part)
            norm, changed, change, loss = part.mean(0).tolist()
            means = f"{norm:.3f} | {changed:.2%} | {change:.4f} | {loss:.4f}"
            lines.append(f"| {dtype} | {start + 1:,} to {stop:,} | {stop * chunk_size:,} | {means} |")
    return "\n".join(lines) + "\n"


def draw(measured: dict[str, torch.Tensor]) -> Figure:
    """A line for each dtype, of means over hundredths of the stream."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    for column, (axes, label) in enumerate(zip(figure.subplots(2, 2).flat, LABELS, strict=True)):
        for dtype, rows in measured.items():
            axes.plot(*course(rows[:, column]), label=dtype)
        axes.set(xlabel="chunks read", ylabel=label, ylim=(0, None))
        axes.legend(fontsize="small")
    return figure


def main() -> None:
    args = parse_args()
    text = args.text_file.read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(args.tokenizer or args.checkpoint)(text, add_special_tokens=False).input_ids
    measured = {}
    for dtype in args.dtypes:
        model = BakaForCausalLM.from_pretrained(args.checkpoint, dtype=DTYPES[dtype]).to(args.device).eval()
        n = model.config.chunk_size
        if not model.config.num_memory_tokens:
            raise ValueError(f"expected a model with memory, got num_memory_tokens=0 in {args.checkpoint}.")
        length = args.chunks * n + 1
        if args.chunks < 1 or len(ids) < length:
            most = (len(ids) - 1) // n
            raise ValueError(f"expected `chunks` from 1 to {most} for {args.text_file}, got {args.chunks}.")
        measured[dtype] = follow_memory(model, torch.tensor(ids[:length]))
    table = table_of(measured, n)
    print(table)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "memory.md").write_text(table)
        with open(args.out / "memory.jsonl", "w") as file:
            for dtype, rows in measured.items():
                for index, row in enumerate(rows.tolist()):
                    figures = dict(zip(COLUMNS, row, strict=True))
                    file.write(json.dumps({"dtype": dtype, "chunk": index} | figures) + "\n")
        draw(measured).savefig(args.out / "memory.png", dpi=120)


if __name__ == "__main__":
    main()
