"""Beside what one would take instead for constant cost: GatedDeltaNet, GLA and Mamba2 of flash-linear-attention.

    pip install flash-linear-attention
    python benchmarks/linear.py                                     # on a GPU
    python benchmarks/linear.py --train 32x2048 --reads --batches --only BakaLLM Mamba2

All have the same vocabulary, the same width and about the same number of parameters (190 million). GatedDeltaNet and
GLA have the same number of blocks, Mamba2, which has no feed-forward layers, more. Theirs are run as they are, by
their own fused kernels. Three measurements: steps of training, forward and backward, the reading of a long text in one
call, and one token in each of some rows after `--context` tokens. A kernel that refuses a device or a version of Triton
is named, and its model left out of what needs it.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from long_context import Stepping, reading_by, states_after
from side_by_side import SIZES, Comparison, arguments, new_baka, settle
from training import training_of

REFERENCE = dict(vocab_size=SIZES["reference"]["vocab_size"], hidden_size=768, tie_word_embeddings=False)
PEERS: dict[str, dict[str, Any]] = {
    "GatedDeltaNet": dict(num_hidden_layers=12, intermediate_size=2560, num_heads=9, head_dim=64),
    "GLA": dict(num_hidden_layers=12, intermediate_size=3072, num_heads=4),
    "Mamba2": dict(num_hidden_layers=30),
}


def parse_args() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--train", nargs="*", metavar="BxL", default=["32x2048", "4x16384"], help="batches and lengths")
    parser.add_argument("--reads", nargs="*", metavar="BxL", default=["1x131072"], help="batches and lengths to read")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16], help="rows that take a step together")
    parser.add_argument("--context", type=int, default=512, help="tokens read before the steps")
    parser.add_argument("--steps", type=int, default=64, help="steps of theirs to time; ours are a chunk's")
    return settle(parser.parse_args())


def new_peer(name: str, args: argparse.Namespace) -> Any:
    import fla.models

    config = getattr(fla.models, f"{name}Config")(**REFERENCE | PEERS[name])
    return getattr(fla.models, f"{name}ForCausalLM")(config).to(args.device, args.dtype).eval()


def train(new_model: Callable, args: argparse.Namespace, shape: tuple[int, int]) -> Callable:
    model = new_model(args)
    args.eager = model.config.model_type != "baka" or args.device == "cpu"  # theirs have kernels of their own
    if model.config.model_type != "baka":
        return training_of(model, args, shape)
    model.cuda_graphs_enable()
    return training_of(model, args, shape, skip_logits=True)


def steps(new_model: Callable, args: argparse.Namespace, batch: int, count: int) -> Callable:
    model = new_model(args)
    stepping = Stepping(model, states_after(model, [args.context])[args.context], batch)
    return lambda: [stepping() for _ in range(count)]


def main() -> None:
    args = parse_args()
    comparison = Comparison(args, "linear")
    sides = comparison.chosen({"BakaLLM": new_baka} | {name: partial(new_peer, name) for name in PEERS})

    def measure(name: str, work: str, tokens: int, prepare: Callable, **options: Any) -> None:
        try:
            comparison.measure(work, tokens, {name: prepare}, **options)
        except Exception as error:  # of a kernel that does not run here: the others go on
            comparison.note(work=work, side=name, error=f"{type(error).__name__}: {error}"[:300])

    shapes = {shape: tuple(map(int, shape.split("x"))) for shape in (*args.train, *args.reads)}
    for name, new_model in sides.items():
        model = new_model(args)
        comparison.note(side=name, parameters=model.num_parameters())
        count = model.config.chunk_size if name == "BakaLLM" else args.steps
        del model
        for batch, length in map(shapes.__getitem__, args.train):
            work = f"train {batch} x {length:,}"
            prepare = partial(train, new_model, args, (batch, length))
            options: dict[str, Any] = {} if args.device == "cpu" else dict(warm_ups=2, in_a_row=2)
            measure(name, work, batch * length, prepare, **options)
        for batch, length in map(shapes.__getitem__, args.reads):
            prepare = lambda batch=batch, length=length, new=new_model: reading_by(new(args), batch, length)  # noqa: E731
            measure(name, f"read {batch} x {length:,}", batch * length, prepare, warm_ups=1)
        for batch in args.batches:
            work = f"step, batch {batch}, after {args.context:,}"
            prepare = partial(steps, new_model, args, batch, count)
            measure(name, work, count, prepare, warm_ups=1, per_token=True)
    comparison.finish("BakaLLM", ("tokens/s", "peak GiB", "ms/token"))


if __name__ == "__main__":
    main()
