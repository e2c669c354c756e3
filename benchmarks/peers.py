"""Beside `recurrent-memory-transformer-pytorch`, the RMT that most people find first: training, and generating text.

    pip install recurrent-memory-transformer-pytorch
    python benchmarks/peers.py --device cpu

Both have the same width, depth, heads, segments, memory tokens and the previous segment's keys and values. Theirs is
run as its README shows; it has no cache within a segment, and no gradients through the previous one's keys and values.
"""

import argparse
from collections.abc import Callable

from side_by_side import SIZES, Comparison, arguments, new_baka, random_tokens, settle

PEER = "recurrent-memory-transformer-pytorch"


def parse_args() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--shape", metavar="BxL", help="batch size and length to train on (default: 1x2048)")
    parser.add_argument("--new_tokens", type=int, help="tokens to generate (default: 1024)")
    args = settle(parser.parse_args())
    args.shape = args.shape or ("2x16" if args.quick else "1x2048")
    args.new_tokens = args.new_tokens or (12 if args.quick else 1024)
    return args


def new_peer(args: argparse.Namespace, config: object) -> object:
    from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer, RecurrentMemoryTransformerWrapper

    size = SIZES[args.size]
    heads = size["num_attention_heads"]
    model = RecurrentMemoryTransformer(
        num_tokens=size["vocab_size"],
        dim=size["hidden_size"],
        depth=size["num_hidden_layers"],
        heads=heads,
        dim_head=size["hidden_size"] // heads,
        # Its feed-forward layers are gated too; this factor gives them the same width.
        ff_mult=size["intermediate_size"] * 3 / (2 * size["hidden_size"]),
        num_memory_tokens=config.num_memory_tokens,
        seq_len=config.chunk_size,
        causal=True,
        use_flash_attn=True,
        use_xl_memories=True,
    )
    return RecurrentMemoryTransformerWrapper(model).to(args.device, args.dtype)


def main() -> None:
    args = parse_args()
    comparison = Comparison(args, "peers")
    batch, length = (int(number) for number in args.shape.split("x"))

    def train_ours() -> Callable:
        model = new_baka(args).train()
        tokens = random_tokens(model, batch, length)

        def run() -> None:
            model(input_ids=tokens, labels=tokens, use_cache=False, skip_logits=True).loss.backward()
            model.zero_grad()

        return run

    def train_theirs() -> Callable:
        ours = new_baka(args)
        model, tokens = new_peer(args, ours.config), random_tokens(ours, batch, length)

        def run() -> None:
            model(tokens, return_loss=True)[0].backward()
            model.zero_grad()

        return run

    def generate_ours() -> Callable:
        model = new_baka(args)
        model.generation_config.pad_token_id = 0
        prompt = random_tokens(model, 1, 1)
        static = {} if args.device == "cpu" else dict(cache_implementation="static")
        return lambda: model.generate(prompt, max_new_tokens=args.new_tokens, do_sample=True, **static)

    def generate_theirs() -> Callable:
        ours = new_baka(args)
        model, prompt = new_peer(args, ours.config), random_tokens(ours, 1, 1)
        return lambda: model.generate(prompt, length=args.new_tokens + 1)

    for name, side in comparison.chosen(
        {"BakaLLM": new_baka(args), PEER: new_peer(args, new_baka(args).config)}
    ).items():
        comparison.note(side=name, parameters=sum(parameter.numel() for parameter in side.parameters()))
    comparison.measure(f"train {batch} x {length:,}", batch * length, {"BakaLLM": train_ours, PEER: train_theirs})
    comparison.measure(
        f"generate {args.new_tokens:,}",
        args.new_tokens,
        {"BakaLLM": generate_ours, PEER: generate_theirs},
        per_token=True,
    )
    comparison.finish("BakaLLM", ("tokens/s", "ms/token", "peak GiB"))


if __name__ == "__main__":
    main()
