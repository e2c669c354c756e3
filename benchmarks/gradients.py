"""How far gradients of compiled training are from those of the plain model in float32: a table of relative errors.

    python benchmarks/gradients.py                                     # on a GPU: bfloat16, graphs, autocast
    python benchmarks/gradients.py --ways graphs --calls lanes plain lanes --fields num_key_value_heads=3 chunk_size=200
    python benchmarks/gradients.py --device cpu --quick

Calls of two kinds take turns in one process, since a GPU's kernels may be made for one and used for the other: whole
texts without a state ("plain"), and a text in parts whose state is passed on while some rows begin anew ("lanes"). A
parameter's error is the norm of the difference over that of its gradient. With the plain model in bfloat16, the last
way, it shows what rounding alone does.
"""

import argparse
import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from baka_hf import BakaConfig, BakaForCausalLM
from baka_hf.calls_baka import CACHE_NAME

WAYS = ["compiled", "graphs", "autocast", "eager"]
FIELDS: dict[str, Any] = dict(
    **dict(vocab_size=1000, hidden_size=384, intermediate_size=768, num_hidden_layers=2, num_attention_heads=6),
    residual_initializer_range=None,  # blocks that begin as the identity have no gradients inside
)
QUICK = dict(
    vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, chunk_size=24
)


def train_plain(model: BakaForCausalLM, run: Callable[..., Any], tokens: torch.Tensor) -> None:
    run(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()


def train_lanes(model: BakaForCausalLM, run: Callable[..., Any], tokens: torch.Tensor) -> None:
    """Three calls of two chunks; two rows begin a text after three and after four chunks."""
    chunk_size = model.config.chunk_size
    positions = torch.arange(6 * chunk_size, device=tokens.device).repeat(len(tokens), 1)
    positions[1] %= 3 * chunk_size
    positions[3] %= 4 * chunk_size
    state = model.new_cache(len(tokens))
    for begin in range(0, 6 * chunk_size, 2 * chunk_size):
        part = slice(begin, begin + 2 * chunk_size)
        state.reset_rows(positions[:, begin] == 0)
        arguments = dict(input_ids=tokens[:, part], labels=tokens[:, part], position_ids=positions[:, part])
        run(**arguments, **{CACHE_NAME: state}, use_cache=True, skip_logits=True).loss.backward()
        state.detach_()


CALLS = {"plain": train_plain, "lanes": train_lanes}


def gradients_of(kind: str, model: BakaForCausalLM, run: Callable[..., Any], tokens: torch.Tensor) -> list[Any]:
    model.zero_grad()
    CALLS[kind](model, run, tokens)
    return [parameter.grad.float() for parameter in model.parameters()]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--calls", nargs="+", choices=list(CALLS), default=["plain", "lanes", "plain"])
    parser.add_argument("--fields", nargs="+", default=[], metavar="NAME=N", help="of the configuration")
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    fields = FIELDS | (QUICK if args.quick else {})
    fields |= {name: int(value) for name, value in (field.split("=") for field in args.fields)}
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    reference = BakaForCausalLM(BakaConfig(**fields)).to(args.device).train()
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim > 1:
                parameter *= 2  # so that attention has something to choose
    length = 6 * reference.config.chunk_size + reference.config.chunk_size // 7
    tokens = torch.randint(reference.config.vocab_size, (5, length), device=args.device)
    expected = {kind: gradients_of(kind, reference, reference, tokens) for kind in dict.fromkeys(args.calls)}

    print(f"torch {torch.__version__}, {args.device}\n\n| | call | mean | worst |\n| --- | --- | ---: | ---: |")
    for way in args.ways:
        torch._dynamo.reset()
        model = copy.deepcopy(reference)
        if way != "autocast":
            model.bfloat16()
        if way == "graphs" and tokens.is_cuda:
            model.cuda_graphs_enable()
        run = model if way == "eager" else torch.compile(model)
        for kind in args.calls:
            with torch.autocast(tokens.device.type, torch.bfloat16) if way == "autocast" else nullcontext():
                for _ in range(3 if way == "graphs" else 1):  # the first call of a kind is not recorded
                    found = gradients_of(kind, model, run, tokens)
            pairs = zip(found, expected[kind], strict=True)
            errors = [((mine - right).norm() / right.norm()).item() for mine, right in pairs]
            print(f"| {way} | {kind} | {sum(errors) / len(errors):.4f} | {max(errors):.4f} |", flush=True)


if __name__ == "__main__":
    main()
