"""Training speed and memory beside Llama of the same size: steps of forward and backward pass, no optimizer.

    python benchmarks/training.py                                     # on a GPU, both sides compiled
    python benchmarks/training.py --shapes 4x16384 --eager
    python benchmarks/training.py --device cpu --shapes 1x2048 1x16384

Ours leaves out logits that nobody asks for (`skip_logits=True`, as its Trainer does). On a GPU its steps are recorded
as CUDA graphs (`cuda_graphs_enable`). Gradients flow through all chunks of a text. Writes training.png: tokens per
second and peak memory.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from side_by_side import Comparison, arguments, new_baka, new_llama, random_tokens, settle
from transformers import PreTrainedModel

DIARY = dict(hidden_act="elephant", qk_norm=False, memory_norm=False, num_pause_tokens=8)
SHAPES = {"cuda": ["32x2048", "4x16384", "5x2048"], "cpu": ["1x2048", "1x16384"], "quick": ["2x32", "1x64"]}


def parse_args() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", metavar="BxL", help="batch sizes and lengths")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, as on a CPU")
    args = settle(parser.parse_args())
    args.shapes = args.shapes or SHAPES["quick" if args.quick else args.device.partition(":")[0]]
    args.eager = args.eager or args.device == "cpu"
    return args


def training_of(model: PreTrainedModel, args: argparse.Namespace, shape: tuple[int, int], **options: Any) -> Callable:
    """A run of one step."""
    torch._dynamo.reset()
    model.train()
    step = model if args.eager else torch.compile(model)
    tokens = random_tokens(model, *shape)

    def run() -> None:
        step(input_ids=tokens, labels=tokens, use_cache=False, **options).loss.backward()
        model.zero_grad()

    return run


def draw(comparison: Comparison) -> Figure:
    works = list(dict.fromkeys(row["work"] for row in comparison.rows))
    sides = list(dict.fromkeys(row["side"] for row in comparison.rows))
    names = [name for name in ("tokens/s", "peak GiB") if any(name in row for row in comparison.rows)]
    figure = Figure(figsize=(5 * len(names), 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for index, side in enumerate(sides):
            rows = [row for row in comparison.rows if row["side"] == side]
            places = [works.index(row["work"]) + 0.4 * (index - (len(sides) - 1) / 2) for row in rows]
            axes.bar(places, [row[name] for row in rows], width=0.38, label=side)
        axes.set_xticks(range(len(works)), [work.removeprefix("train ") for work in works])
        axes.set(xlabel="rows x tokens", ylabel=name)
        axes.yaxis.set_major_formatter("{x:,.0f}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(sides))
    return figure


def main() -> None:
    args = parse_args()
    comparison = Comparison(args, "training")
    kind = "eager" if args.eager else "torch.compile"
    for shape in args.shapes:
        batch, length = (int(number) for number in shape.split("x"))

        def ours(shape: tuple[int, int] = (batch, length)) -> Callable:
            model = new_baka(args)
            model.cuda_graphs_enable()
            return training_of(model, args, shape, skip_logits=True)

        def theirs(shape: tuple[int, int] = (batch, length)) -> Callable:
            return training_of(new_llama(args), args, shape)

        def before(shape: tuple[int, int] = (batch, length)) -> Callable:
            model = new_baka(args, **DIARY)
            model.cuda_graphs_enable()
            return training_of(model, args, shape, skip_logits=True)

        sides = {"BakaLLM": ours, "the diary's BakaLLM": before, f"Llama, {kind}": theirs}
        options = {} if args.device == "cpu" else dict(warm_ups=2, in_a_row=2)
        comparison.measure(f"train {batch} x {length:,}", batch * length, sides, **options)
    comparison.finish("BakaLLM", ("tokens/s", "peak GiB"))
    comparison.save(draw)


if __name__ == "__main__":
    main()
