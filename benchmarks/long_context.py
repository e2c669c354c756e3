"""Reading long texts and going on from them, beside Llama of the same size: does cost grow with what was read?

    python benchmarks/long_context.py                              # on a GPU
    python benchmarks/long_context.py --reads 1x131072 --contexts 512 65536 --batches 1
    python benchmarks/long_context.py --device cpu

Three measurements. Reading: tokens per second and peak memory of one call. Stepping: one token after so many were read,
the mean over a whole chunk of steps, its boundary included, and the slowest single step of another one. The state: its
bytes against the formula. On a GPU our state is static. A state for many rows is that of one row, repeated; Llama only
takes contexts of up to `--peer_tokens` tokens in all. Writes long_context.png: tokens per second, peak memory and ms
per token against the tokens read.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from side_by_side import Comparison, arguments, new_baka, new_llama, random_tokens, seconds, settle, state_of
from transformers import PreTrainedModel

from baka_hf.calls_baka import CACHE_NAME

READS = {
    "cuda": ["1x8192", "1x32768", "1x131072", "1x1048576", "8x131072"],
    "cpu": ["1x1024", "1x4096", "1x16384", "1x32768"],
    "quick": ["1x32", "2x64"],
}
CONTEXTS = {"cuda": [512, 65536, 1048576], "cpu": [512, 4096, 16384, 32768], "quick": [16, 40]}
PIECE = 2**17  # tokens of a context that are read in one call
PEER_PIECE = 2**13  # Llama makes a mask of these and all before them


def parse_args() -> argparse.Namespace:
    parser = arguments(__doc__, takes_source=True)
    add = parser.add_argument
    add("--reads", nargs="*", metavar="BxL", help="batch sizes and lengths to read")
    add("--contexts", type=int, nargs="*", help="tokens read before the steps")
    add("--batches", type=int, nargs="+", help="rows that take a step together")
    add("--peer_tokens", type=int, default=2**17, help="most tokens for Llama to read (default: %(default)s)")
    add("--peer_steps", type=int, help="steps of Llama's to time (default: 32)")
    add("--plain_block", action="store_true", help="step without QK-norm and value residuals too, as Llama's block is")
    args = settle(parser.parse_args())
    kind = "quick" if args.quick else args.device.partition(":")[0]
    args.reads = READS[kind] if args.reads is None else args.reads
    args.contexts = CONTEXTS[kind] if args.contexts is None else args.contexts
    args.batches = args.batches or ([1, 2] if args.quick else [1] if args.device == "cpu" else [1, 16, 256])
    args.peer_steps = args.peer_steps or (2 if args.quick else 32)
    return args


def options_of(model: PreTrainedModel, batch: int) -> dict[str, Any]:
    """A static state for ours on a GPU; Llama's grows with the text."""
    if model.config.model_type == "baka" and model.device.type != "cpu":
        return dict(cache=model.new_cache(batch, static=True))
    return {}


def reading_by(model: PreTrainedModel, batch: int, length: int) -> Callable:
    tokens = random_tokens(model, batch, length)

    @torch.inference_mode()
    def run() -> None:
        model(tokens, logits_to_keep=1, use_cache=True, **options_of(model, batch))

    return run


@torch.inference_mode()
def states_after(model: PreTrainedModel, contexts: list[int]) -> dict[int, Any]:
    """The states of one row that has read so many tokens."""
    options: dict[str, Any] = options_of(model, 1)
    states, read = {}, 0
    piece = PIECE if model.config.model_type == "baka" else PEER_PIECE
    for context in sorted(contexts):
        while read < context:
            tokens = random_tokens(model, 1, min(piece, context - read))
            options = {CACHE_NAME: state_of(model(tokens, logits_to_keep=1, use_cache=True, **options))}
            read += tokens.shape[1]
        states[context] = copy.deepcopy(options[CACHE_NAME])
    return states


class Stepping:
    """Steps of one token in `batch` rows with the same state."""

    def __init__(self, model: PreTrainedModel, state: Any, batch: int):
        self.model, self.state = model, copy.deepcopy(state)
        self.token = random_tokens(model, batch, 1)
        if batch > 1:
            self.state.batch_repeat_interleave(batch)

    @torch.inference_mode()
    def __call__(self) -> None:
        self.model(self.token, **{CACHE_NAME: self.state})

    def mean(self, count: int) -> float:
        return seconds(lambda: [self() for _ in range(count)], self.model.device.type) / count

    def worst(self, count: int) -> float:
        return max(seconds(self, self.model.device.type) for _ in range(count))


def measure_steps(comparison: Comparison, args: argparse.Namespace) -> None:
    sides: dict[str, Callable] = {"BakaLLM": new_baka}
    if args.plain_block:
        sides["BakaLLM, plain block"] = partial(new_baka, qk_norm=False, value_residual=False)
    for name, new_model in comparison.chosen(sides | {"Llama": new_llama}).items():
        model, most = new_model(args), args.peer_tokens if name == "Llama" else float("inf")
        steps = args.peer_steps if name == "Llama" else model.config.chunk_size
        states = states_after(model, [context for context in args.contexts if context <= most])
        for batch in args.batches:
            is_warm = args.device == "cpu"
            for context in (context for context in states if context * batch <= most):
                stepping = Stepping(model, states[context], batch)
                first = seconds(stepping, args.device)
                # Each kind of step is compiled when first met and recorded when met again: at most once a chunk.
                stepping.mean(2 if is_warm else 2 * steps)
                is_warm = True
                comparison.add(
                    f"step, batch {batch}, after {context:,}",
                    name,
                    **{"ms/step": 1e3 * stepping.mean(steps), "worst ms": 1e3 * stepping.worst(steps)},
                    **{"first s": first, "context": context, "batch": batch},
                )
                if name == "BakaLLM":
                    report_size(comparison, model, stepping.state)


def report_size(comparison: Comparison, model: PreTrainedModel, state: Any) -> None:
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * config.stream_length
    formula = (
        numbers * state.layers[0].keys.itemsize + config.num_memory_tokens * config.hidden_size * state.memory.itemsize
    )
    comparison.note(state_bytes_a_row=state.nbytes // state.batch_size, by_formula=formula)


def draw(comparison: Comparison) -> Figure:
    plots = [("tokens/s", "length", "tokens read"), ("peak GiB", "length", "tokens read")]
    plots += [("ms/step", "context", "tokens read before the step")]
    plots = [plot for plot in plots if any(plot[0] in row for row in comparison.rows)]
    figure = Figure(figsize=(4.4 * max(len(plots), 1), 3.6), layout="constrained")
    for axes, (name, against, label) in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
        rows = [row for row in comparison.rows if name in row]
        for index, (side, batch) in enumerate(dict.fromkeys((row["side"], row["batch"]) for row in rows)):
            points = sorted((r[against], r[name]) for r in rows if (r["side"], r["batch"]) == (side, batch))
            style = ("C0" if side == "BakaLLM" else "C1") + "o^sD"[index % 4] + "-"
            axes.plot(*zip(*points, strict=True), style, label=f"{side}, batch {batch}")
        axes.set(xscale="log", xlabel=label, ylabel=name, ylim=(0, None))
        axes.legend(fontsize="small")
    return figure


def main() -> None:
    args = parse_args()
    comparison = Comparison(args, "long_context")
    for shape in args.reads:
        batch, length = (int(number) for number in shape.split("x"))
        sides: dict[str, Callable[[], Callable]] = {
            "BakaLLM": lambda batch=batch, length=length: reading_by(new_baka(args), batch, length)
        }
        if batch * length <= args.peer_tokens:
            sides["Llama"] = lambda batch=batch, length=length: reading_by(new_llama(args), batch, length)
        comparison.measure(f"read {batch} x {length:,}", batch * length, sides, warm_ups=1, batch=batch, length=length)
    measure_steps(comparison, args)
    comparison.finish("BakaLLM", ("tokens/s", "peak GiB", "ms/step", "worst ms"))
    comparison.save(draw)


if __name__ == "__main__":
    main()
