"""What each fast path gains: the same work with it and without it, in one run.

    python benchmarks/fast_paths.py                                   # on a GPU
    python benchmarks/fast_paths.py --paths graphs parts --repeats 3
    python benchmarks/fast_paths.py --device cpu --quick

A path is left out by putting what is plain in its place. "BakaLLM" in the table is with all paths, a peer without the
one that it names; figures are tokens per second and peak memory.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from side_by_side import Comparison, arguments, new_baka, random_tokens, settle
from torch import nn

from baka_hf import attention_baka, decoding_graphs_baka, layers_baka, loss_baka, modeling_baka, reading_baka

Context = Callable[[], AbstractContextManager[Any]]


def training(args: argparse.Namespace, without: Context, rows: int, length: int, **fields: Any) -> Callable[[], None]:
    """A run of one compiled training step, recorded as CUDA graphs."""
    torch._dynamo.reset()
    model = new_baka(args, **fields).train()
    model.cuda_graphs_enable()
    tokens = random_tokens(model, rows, length)
    step = model if args.device == "cpu" else torch.compile(model)

    def run() -> None:
        with without():
            step(input_ids=tokens, labels=tokens, use_cache=False, skip_logits=True).loss.backward()
            model.zero_grad()

    return run


def stepping(
    args: argparse.Namespace, without: Context, rows: int, length: int, is_spread: bool = False, **fields: Any
) -> Callable[[], None]:
    """A run of `length` steps of one token from a static state, its rows in step or spread evenly over a chunk."""
    torch._dynamo.reset()
    model = new_baka(args, **fields)
    tokens = random_tokens(model, rows, 1)
    with without():
        state = model.new_cache(rows, static=args.device != "cpu")
    if is_spread:
        n = model.config.chunk_size
        state._num_tokens = n + torch.arange(rows) * n // rows  # as if they had read so many

    @torch.inference_mode()
    def run() -> None:
        with without():
            for _ in range(length):
                model(tokens, cache=state)

    return run


def stepping_out_of_step(*arguments: Any) -> Callable[[], None]:
    return stepping(*arguments, is_spread=True)


def reading(args: argparse.Namespace, without: Context, rows: int, length: int) -> Callable[[], None]:
    """A run that reads a prompt and keeps what `generate` does."""
    model = new_baka(args)
    tokens = random_tokens(model, rows, length)

    @torch.inference_mode()
    def run() -> None:
        with without():
            model(tokens, logits_to_keep=1, use_cache=True)

    return run


def pieces(args: argparse.Namespace, without: Context, rows: int, length: int) -> Callable[[], None]:
    """A run that reads prompts of lengths not seen before, all shorter than a chunk."""
    model = new_baka(args)
    lengths = iter(range(model.config.chunk_size - 1, 0, -1))

    @torch.inference_mode()
    def run() -> None:
        with without():
            for _ in range(length):
                model(random_tokens(model, rows, next(lengths)), logits_to_keep=1, use_cache=True)

    return run


def static_pieces(args: argparse.Namespace, without: Context, rows: int, length: int) -> Callable[[], None]:
    """The same, into static states."""
    model = new_baka(args)
    tokens = random_tokens(model, rows, model.config.chunk_size - 1)

    @torch.inference_mode()
    def run() -> None:
        with without():
            for index in range(length):
                state = model.new_cache(rows, static=args.device != "cpu")
                model(tokens[:, : tokens.shape[1] - index], cache=state, logits_to_keep=1)

    return run


@contextmanager
def without_graphs() -> Iterator[None]:
    with patch.object(modeling_baka, "recorder_of", lambda model, call: None):
        yield


@contextmanager
def without_static_states() -> Iterator[None]:
    with patch.object(modeling_baka, "reader_of", lambda model, cache: None):
        yield


@contextmanager
def planned(**options: Any) -> Iterator[None]:
    """With other options of `plan`."""
    plain = modeling_baka.plan
    with patch.object(modeling_baka, "plan", lambda *args, **kwargs: plain(*args, **kwargs | options)):
        yield


def products_apart(joined: decoding_graphs_baka.Joined, normed: torch.Tensor) -> list[torch.Tensor]:
    weights = joined.weight.split(joined.sizes)
    biases = [None] * len(weights) if joined.bias is None else joined.bias.split(joined.sizes)
    return [nn.functional.linear(normed, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


# By the work with most to gain: its size on a GPU, where it is quick, and what is put in the place of each path.
Works = list[tuple[Callable, tuple[int, int], tuple[int, int], dict[str, Context]]]
WORKS: Works = [
    (
        *(training, (32, 2048), (2, 32)),
        {
            "parts": partial(patch.dict, attention_baka.IN_PARTS, clear=True),
            "recompute": partial(
                patch.object, layers_baka, "recompute", lambda function, *arguments: function(*arguments)
            ),
            "loss": partial(patch.object, loss_baka, "computes_losses", lambda head: False),
            "embeds": partial(planned, embeds=False),
        },
    ),
    (training, (5, 2048), (2, 32), {"graphs": without_graphs}),
    (
        *(stepping, (1, 512), (1, 8)),
        {
            "static": without_static_states,
            "product": partial(patch.object, decoding_graphs_baka, "one_product", products_apart),
        },
    ),
    (stepping, (256, 512), (16, 8), {"windows": partial(patch.object, decoding_graphs_baka, "NUM_WINDOWS", 1)}),
    (
        *(stepping_out_of_step, (256, 512), (16, 8)),
        {
            "apart": partial(patch.object, decoding_graphs_baka, "LARGEST_PART_APART", 0),
            "skipping": partial(patch.object, decoding_graphs_baka, "LARGEST_SHARE", 0),
        },
    ),
    (reading, (1, 131072), (1, 64), {"last_states": partial(planned, num_last_states=None)}),
    (pieces, (1, 30), (1, 1), {"any_length": partial(patch.object, reading_baka, "any_length", nullcontext())}),
    (
        *(static_pieces, (1, 30), (1, 1)),
        {"pieces": partial(patch.object, decoding_graphs_baka.StaticReader, "reads_pieces", False)},
    ),
]
PATHS = [path for *_, paths in WORKS for path in paths]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=PATHS, metavar="NAME")
    args = settle(parser.parse_args())
    comparison = Comparison(args, "fast_paths")
    for prepare, *sizes, paths in WORKS:
        rows, length = sizes[args.quick]
        chosen = {f"without {path}": context for path, context in paths.items() if path in args.paths}
        sides = {
            name: partial(prepare, args, context, rows, length)
            for name, context in ({"BakaLLM": nullcontext} | chosen).items()
        }
        if chosen:
            work = f"{prepare.__name__} {rows} x {length:,}"
            comparison.measure(work, rows * length, sides, warm_ups=0 if prepare is pieces else 2)
    comparison.finish("BakaLLM", ("tokens/s", "peak GiB"))


if __name__ == "__main__":
    main()
