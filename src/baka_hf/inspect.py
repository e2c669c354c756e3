"""What a memory does with a text: where attention goes, how the memory moves, and what it is worth.

    python -m baka_hf.inspect baka-small book.txt -o inside

draws three slides, attention.png, memory.png and gain.png, and writes their figures to inspection.json. The same by
functions:

    attention_shares(model, tokens)        by block, head, kind of query and kind of key
    follow_memory(model, tokens)           norm, change and loss of each chunk
    memory_gain(model, documents)          nats per token by depth

What a single call reads and leaves is in its outputs, `model(..., output_memories=True).memories`. The names of the 2S
slots that weights of attention (`output_attentions=True`) are over are `slot_names(config)`.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .configuration_baka import check_integers
from .evaluation import evaluate_documents, gain_by_depth, in_eval_mode, open_checkpoint
from .plots import COLOURS, draw_gains, finish, slide
from .stream_baka import slot_names

QUERIES = ("read", "text", "pause", "write")
KEYS = tuple(f"{stream} {kind}" for stream in ("previous", "own") for kind in ("read", "text", "pause", "write"))
# What of these a slide tells apart.
GROUPS: dict[str, tuple[str, ...]] = {
    "previous stream": tuple(key for key in KEYS if key.startswith("previous")),
    "memory": ("own read", "own write"),
    "pauses": ("own pause",),
    "own text": ("own text",),
}
COLUMNS = ("norm", "changed", "change", "loss")  # of `follow_memory`
LABELS = ("norm of the memory", "share of numbers that changed", "relative change", "loss, nats per token")


@torch.no_grad()
def follow_memory(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """How memory moves while a text is read through one state, chunk after chunk.

    Args:
        model: a `BakaForCausalLM` with memory vectors, or one that a checkpoint brought with its own code.
        tokens: ids [T] int64. As many chunks are read as have a token after each of theirs; the rest is left out.

    Returns:
        [chunks, 4] float64 on the CPU, the `COLUMNS` of each chunk: the mean norm of the memory's vectors after it, the
        share of their numbers that are others than before it, by how much they differ (the norm of the difference over
        that of the memory), and the chunk's loss in nats per token. Before the first chunk there are zeros.

    Raises:
        ValueError: the model has no memory vectors, or there is not a whole chunk and a token.
    """
    chunks, targets = _chunks_of(model, tokens)
    cache, rows = model.new_cache(static=True), []
    before = cache.memory.clone()
    with in_eval_mode(model):
        for chunk, following in zip(chunks, targets, strict=True):
            loss = model(chunk[None], shift_labels=following[None], cache=cache, skip_logits=True).loss
            memory = cache.memory.clone()
            numbers, difference = memory.double(), memory.double() - before.double()
            norm, change = numbers.norm(dim=-1).mean(), difference.norm() / numbers.norm()
            rows.append(torch.stack([norm, (memory != before).double().mean(), change, loss.double()]))
            before = memory
    return torch.stack(rows).cpu()


@torch.no_grad()
def attention_shares(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Where attention goes while a text is read chunk after chunk: means over the positions of a kind, and over all
    chunks that have one before them, or of the first if it is the only one.

    Args:
        model, tokens: as for `follow_memory`.

    Returns:
        [blocks, heads, 4, 8] float64 on the CPU: of the weights of queries of each of `QUERIES` the share that falls on
        keys of each of `KEYS`. Each row of 8 adds up to 1, or is 0 where there are no such queries.

    Raises:
        ValueError: as `follow_memory`.
    """
    config, (chunks, _) = model.config, _chunks_of(model, tokens)
    names = [name.rpartition(" ")[0] for name in slot_names(config)]
    S = config.stream_length
    of_keys = torch.tensor([[name == key for key in KEYS] for name in names]).double()
    of_queries = torch.tensor([[name == f"own {query}" for query in QUERIES] for name in names[S:]]).double()
    of_queries /= of_queries.sum(0).clamp(min=1)
    shares = torch.zeros(config.num_hidden_layers, config.num_attention_heads, len(QUERIES), len(KEYS)).double()

    def add(index: int) -> Any:
        def hook(module: nn.Module, arguments: Any, output: tuple[Any, ...]) -> None:
            weights = output[3][0].double().cpu()  # [H, S, S or 2S]
            shares[index] += of_queries.T @ weights @ of_keys[-weights.shape[-1] :]

        return hook

    hooks: list[Any] = []
    cache = model.new_cache()
    try:
        with in_eval_mode(model), _eager(model):
            for number, chunk in enumerate(chunks):
                if number == min(1, len(chunks) - 1):  # from here on it counts
                    for index, layer in enumerate(model.get_decoder().layers):
                        hooks.append(layer.self_attn.register_forward_hook(add(index)))
                model(chunk[None], cache=cache, logits_to_keep=1)
    finally:
        for handle in hooks:
            handle.remove()
    return shares / max(len(chunks) - 1, 1)


def memory_gain(model: Any, documents: Sequence[Any], **options: Any) -> list[dict[str, Any]]:
    """By how much the memory that a document has left helps, by how many chunks were read before.

    Beside another document's memory, or of a single one beside the learned vectors; keys and values are its own.

    Args:
        model, documents, options: as for `evaluate_documents`.

    Returns:
        As `gain_by_depth`.

    Raises:
        ValueError: as `evaluate_documents`.
    """
    other = "exchanged" if len(documents) > 1 else "learned"
    options = dict(progress=False, by_document=True) | options
    own, others = (evaluate_documents(model, documents, memory=memory, **options) for memory in ("carried", other))
    return gain_by_depth(own, others)


def _chunks_of(model: Any, tokens: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The chunks of a text on the model's device, and what each position predicts."""
    n = model.config.chunk_size
    if not model.config.num_memory_tokens:
        raise ValueError("expected a model with memory vectors, got num_memory_tokens=0.")
    if tokens.ndim != 1 or len(tokens) <= n:
        raise ValueError(f"expected `tokens` [T] of more than a chunk ({n}), got {list(tokens.shape)}.")
    count = (len(tokens) - 1) // n * n
    tokens = tokens.to(model.device)
    return list(tokens[:count].split(n)), list(tokens[1 : count + 1].split(n))


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """With attention that gives its weights."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


# Slides


def draw_attention(shares: torch.Tensor) -> Any:
    """A bar for each block, of means over heads of `attention_shares`; of text, read and write positions."""
    asked = {"text": "from text", "read": "from read memory", "write": "from write memory"}
    figure, all_axes = slide("share of attention", *[""] * (len(asked) - 1))
    for axes, (query, title) in zip(all_axes, asked.items(), strict=True):
        bottom = torch.zeros(len(shares))
        for colour, (group, keys) in zip(COLOURS, GROUPS.items(), strict=False):
            heights = shares.mean(1)[:, QUERIES.index(query), [KEYS.index(key) for key in keys]].sum(-1)
            axes.bar(range(1, len(shares) + 1), heights, bottom=bottom, color=colour, label=group, width=0.8)
            bottom = bottom + heights
        axes.set(title=title, xlabel="block", ylim=(0, 1))
    finish(figure)
    return figure


def draw_memory(rows: torch.Tensor, name: str) -> Any:
    """Norm and relative change of `follow_memory`, of means over hundredths of the stream."""
    columns = ("norm", "change")
    figure, all_axes = slide(*(LABELS[COLUMNS.index(column)] for column in columns))
    for axes, column in zip(all_axes, columns, strict=True):
        axes.plot(*course(rows[:, COLUMNS.index(column)]), color=COLOURS[0], label=name, linewidth=2.4)
        axes.set(xlabel="chunks read", ylim=(0, None))
    finish(figure)
    return figure


def course(values: torch.Tensor, most: int = 100) -> tuple[list[int], list[float]]:
    """Means over at most so many parts of a stream [chunks], and how many chunks were read at the end of each."""
    parts = values.tensor_split(min(most, len(values)))
    return torch.tensor([len(part) for part in parts]).cumsum(0).tolist(), [part.mean().item() for part in parts]


def draw_gain(gains: Sequence[Mapping[str, Any]], name: str) -> Any:
    """`memory_gain` by depth."""
    figure, (axes,) = slide("gain (nats per token)")
    draw_gains(axes, {name: [(each["first_chunk"], each["gain"], each["standard_error"]) for each in gains]})
    axes.set_title("Gain by the own memory")
    finish(figure)
    return figure


# python -m baka_hf.inspect


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m baka_hf.inspect", description="Where attention goes, how memory moves, and what it is worth."
    )
    parser.add_argument("checkpoint", help="a folder or a name on the Hub")
    parser.add_argument("texts", nargs="+", type=Path, metavar="TEXT", help="UTF-8; each is a document")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="for the slides and figures")
    parser.add_argument("--tokenizer", help="by default the checkpoint's")
    parser.add_argument("--chunks", type=int, default=100, help="most chunks to read of each text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the parts that the checkpoint brings")
    args = parser.parse_args(arguments)
    try:
        check_integers(chunks=args.chunks)
        if args.output.exists() and not args.output.is_dir():
            raise ValueError(f"--output: expected a folder, got the file {args.output}.")
        model, tokenizer = open_checkpoint(args.checkpoint, args.device, args.trust_remote_code, args.tokenizer)
        most = args.chunks * model.config.chunk_size + 1
        documents = [
            torch.tensor(tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False).input_ids[:most])
            for path in args.texts
        ]
        shares, rows = attention_shares(model, documents[0]), follow_memory(model, documents[0])
        gains = memory_gain(model, documents)
        other = "another document's" if len(documents) > 1 else "the learned vectors"
        slides = {
            "attention": draw_attention(shares),
            "memory": draw_memory(rows, args.texts[0].name),
            "gain": draw_gain(gains, f"beside {other}"),
        }
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    args.output.mkdir(parents=True, exist_ok=True)
    for name, figure in slides.items():
        figure.savefig(args.output / f"{name}.png")
    by_query = {
        query: {key: shares.mean(1)[:, i, j].tolist() for j, key in enumerate(KEYS)} for i, query in enumerate(QUERIES)
    }
    found = {
        "checkpoint": args.checkpoint,
        "texts": [str(path) for path in args.texts],
        "chunk_size": model.config.chunk_size,
        "attention": by_query,
        "memory": [dict(zip(COLUMNS, row, strict=True)) for row in rows.tolist()],
        "gain": gains,
    }
    (args.output / "inspection.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{args.output}: {', '.join(f'{name}.png' for name in slides)}, inspection.json")


__all__ = [
    "attention_shares",
    "draw_attention",
    "draw_gain",
    "draw_memory",
    "follow_memory",
    "main",
    "memory_gain",
    "slot_names",
]

if __name__ == "__main__":
    main()
