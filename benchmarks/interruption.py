"""What it costs that a call is all or nothing: steps of one token and whole chunks, with and without it.

    python benchmarks/interruption.py                  # on a GPU: also from a static state
    python benchmarks/interruption.py --device cpu
    python benchmarks/interruption.py --steps 2048 --batch 16

Without it a call works on the state itself and rolls it over in place, as it would if no call ever failed. Both take
turns, step by step, on the same model. Ends of chunks are in the mean; the median is a step like most. A second table
has what is done for it on the host alone.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from side_by_side import arguments, new_baka, random_tokens, settle, wait_for
from torch import nn

from baka_hf import BakaCache, BakaForCausalLM
from baka_hf.functions_baka import where_rows
from baka_hf.modeling_baka import BakaPreTrainedModel
from baka_hf.reading_baka import Reading, backwards, rolled_over


def roll_over_in_place(self: Reading, cache: BakaCache, span: Any, layout: Any) -> None:
    S = self.config.stream_length
    for layer in cache.layers:
        rolled = rolled_over(layer.keys, layer.values, *backwards(self.config, layer.keys))
        for buffer, own in zip((layer.keys, layer.values), rolled, strict=True):
            buffer[:, :, :S] = where_rows(layout.completes, own, buffer[:, :, :S])


WITHOUT: list[tuple[Any, str, Any]] = [
    (BakaPreTrainedModel, "__call__", nn.Module.__call__),
    (BakaCache, "draft", lambda self, with_layers=True: self),
    (BakaCache, "go_on", lambda self, draft: None),
    (BakaCache, "check_whole", lambda self: None),
    (Reading, "_roll_over", roll_over_in_place),
]


@contextmanager
def without() -> Iterator[None]:
    kept = [(holder, name, vars(holder)[name]) for holder, name, _ in WITHOUT]
    for holder, name, value in WITHOUT:
        setattr(holder, name, value)
    yield
    for holder, name, value in kept:
        setattr(holder, name, value)


def milliseconds(model: BakaForCausalLM, state: BakaCache, tokens: torch.Tensor, device: str) -> float:
    wait_for(device)
    start = time.perf_counter()
    model(tokens, cache=state, logits_to_keep=1)
    wait_for(device)
    return 1000 * (time.perf_counter() - start)


def compare(model: BakaForCausalLM, args: argparse.Namespace, length: int, count: int, static: bool) -> None:
    """A row of the table: `count` calls of `length` tokens each way."""
    states = [model.new_cache(args.batch, static=static) for _ in range(2)]
    times: tuple[list[float], list[float]] = [], []
    tokens = random_tokens(model, args.batch, length)
    n = model.config.chunk_size
    warm_ups = 2 * n if static and length == 1 else 3  # graphs of all kinds of steps are recorded
    for index in range(warm_ups + count):
        for side in (0, 1) if index % 2 else (1, 0):
            if side:
                times[1].append(milliseconds(model, states[1], tokens, args.device))
            else:
                with without():
                    times[0].append(milliseconds(model, states[0], tokens, args.device))
    work = f"{'a token' if length == 1 else 'a chunk'}{', static' if static else ''}"
    for name, of in (("mean", statistics.fmean), ("median", statistics.median)):
        bare, whole = (of(side[warm_ups:]) for side in times)
        print(
            f"| {work}, {name} of {count:,} | {bare:.3f} | {whole:.3f} | {100 * (whole / bare - 1):+.2f} % |",
            flush=True,
        )


def on_the_host(model: BakaForCausalLM, args: argparse.Namespace) -> None:
    state = model.new_cache(args.batch)
    count = 200 if args.quick else 20_000
    for name, with_layers in (("a step", True), ("a step from a static state", False)):
        start = time.perf_counter()
        for _ in range(count):
            state.check_whole()
            state.go_on(state.draft(with_layers))
        print(f"| {name} | {1e6 * (time.perf_counter() - start) / count:.2f} |")


@torch.no_grad()
def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, help="tokens each way (default: two chunks)")
    args = settle(parser.parse_args())
    model = new_baka(args)
    n = model.config.chunk_size
    device = "CPU" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{args.size}, {args.dtype}, batch {args.batch}, {device}")
    print("| ms | without | all or nothing | |\n| --- | ---: | ---: | ---: |")
    for static in (False, True) if args.device != "cpu" else (False,):
        compare(model, args, 1, args.steps or 2 * n, static)
        compare(model, args, n, max(2, (args.steps or 20 * n) // n), static)
    print("\n| on the host | µs |\n| --- | ---: |")
    on_the_host(model, args)


if __name__ == "__main__":
    main()
