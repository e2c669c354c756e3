"""Time per token through stock `generate`, beside Llama of the same size.

    python benchmarks/generation.py                                # on a GPU: static caches, as generate compiles them
    python benchmarks/generation.py --batches 1 16 --new_tokens 1024
    python benchmarks/generation.py --device cpu

Every call reads a prompt and generates at least one chunk more, so chunk boundaries are in the mean. On a GPU both
sides have `cache_implementation="static"`: Llama's forward is compiled by generate itself, ours is read by CUDA graphs.
`--dynamic` adds both sides without it. Writes generation.png: ms per token against the batch size.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from side_by_side import Comparison, arguments, new_baka, new_llama, random_tokens, settle


def parse_args() -> argparse.Namespace:
    parser = arguments(__doc__, takes_source=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, help="tokens of the prompt (default: 512)")
    parser.add_argument("--new_tokens", type=int, help="tokens to generate (default: 512)")
    parser.add_argument("--dynamic", action="store_true", help="also without static caches, as on a CPU")
    args = settle(parser.parse_args())
    args.prompt = args.prompt or (9 if args.quick else 512)
    args.new_tokens = args.new_tokens or (10 if args.quick else 512)
    return args


def prepare(new_model: Callable, batch: int, args: argparse.Namespace, options: dict[str, Any]) -> Callable:
    """A run of one greedy `generate`; no token ends it."""
    model = new_model(args)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    prompt = random_tokens(model, batch, args.prompt)
    options = dict(max_new_tokens=args.new_tokens, do_sample=False) | options
    return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


def draw(comparison: Comparison) -> Figure:
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for side in dict.fromkeys(row["side"] for row in comparison.rows):
        points = [(row["batch"], row["ms/token"]) for row in comparison.rows if row["side"] == side]
        axes.plot(*zip(*points, strict=True), "o-", label=side)
    axes.set(xlabel="batch size", ylabel="ms per token", ylim=(0, None))
    axes.legend()
    return figure


def main() -> None:
    args = parse_args()
    comparison = Comparison(args, "generation")
    kinds = {"": {}}
    if args.device != "cpu":
        kinds = {", static": dict(cache_implementation="static")} | ({", dynamic": {}} if args.dynamic else {})
    for batch in args.batches:
        sides: dict[str, Callable[[], Callable]] = {}
        for kind, options in kinds.items():
            for name, new_model in (("BakaLLM", new_baka), ("Llama", new_llama)):
                sides[name + kind] = partial(prepare, new_model, batch, args, options)
        work = f"generate {args.new_tokens:,} after {args.prompt:,}, batch {batch}"
        comparison.measure(work, args.new_tokens, sides, per_token=True, warm_ups=1, batch=batch)
    comparison.finish("BakaLLM" + next(iter(kinds)), ("ms/token",))
    comparison.save(draw)


if __name__ == "__main__":
    main()
