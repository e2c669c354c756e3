"""Tokens per second and peak memory beside Llama of the same size, all in one run: report ratios, machines are shared.

    python benchmarks/speed.py train --batch 32 --length 2048 --compile
    python benchmarks/speed.py prefill --length 131072
    python benchmarks/speed.py decode --context 512 65536
    python benchmarks/speed.py train --device cpu --small --batch 2 --length 2048

The reference size is 12 layers of width 768 with 50,277 token ids; random weights, bfloat16 (float32 on the CPU).
"""

import argparse
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from baka_hf import BakaConfig, BakaForCausalLM

REFERENCE = dict(
    vocab_size=50277, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)
SMALL = dict(vocab_size=4096, hidden_size=320, intermediate_size=960, num_hidden_layers=5, num_attention_heads=5)


def models(args: argparse.Namespace) -> dict[str, Callable[[], PreTrainedModel]]:
    size = SMALL if args.small else REFERENCE
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    return {
        "Baka": lambda: BakaForCausalLM(BakaConfig(**size)).to(args.device, dtype),
        "Llama": lambda: LlamaForCausalLM(LlamaConfig(**size, max_position_embeddings=2**21)).to(args.device, dtype),
    }


def seconds(run: Callable[[], object], repeats: int, device: str, warmup: int = 2) -> float:
    """Median time of a call."""
    times = []
    for _ in range(warmup + repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[warmup:])[repeats // 2]


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def report(name: str, tokens: int, taken: float, device: str, note: str = "") -> None:
    memory = "" if device == "cpu" else f"{torch.cuda.max_memory_allocated() / 2**30:7.1f} GiB"
    print(f"{name:16} {tokens / taken:12,.0f} tokens/s {1e3 * taken:10.2f} ms {memory} {note}", flush=True)


def train(model: PreTrainedModel, args: argparse.Namespace, name: str) -> None:
    model.train()
    step = torch.compile(model) if args.compile else model
    tokens = torch.randint(model.config.vocab_size, (args.batch, args.length), device=args.device)
    options = dict(skip_logits=True) if name == "Baka" else {}

    def run() -> None:
        step(input_ids=tokens, labels=tokens, use_cache=False, **options).loss.backward()
        model.zero_grad()

    report(name, tokens.numel(), seconds(run, args.repeats, args.device), args.device)


@torch.inference_mode()
def prefill(model: PreTrainedModel, args: argparse.Namespace, name: str) -> None:
    model.eval()
    tokens = torch.randint(model.config.vocab_size, (args.batch, args.length), device=args.device)
    taken = seconds(lambda: model(tokens, logits_to_keep=1, use_cache=True), args.repeats, args.device, warmup=1)
    report(name, tokens.numel(), taken, args.device)


@torch.inference_mode()
def decode(model: PreTrainedModel, args: argparse.Namespace, name: str) -> None:
    model.eval()
    for context in args.context:
        tokens = torch.randint(model.config.vocab_size, (args.batch, context), device=args.device)
        cache = model(tokens, logits_to_keep=1, use_cache=True).past_key_values
        token = tokens[:, :1]
        taken = seconds(lambda: model(token, cache=cache), 64, args.device)  # noqa: B023 - called here
        report(name, args.batch, taken, args.device, f"after {context:,} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["train", "prefill", "decode"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--context", type=int, nargs="+", default=[512])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="about 10 million parameters")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the whole model")
    args = parser.parse_args()
    print(args.work, {k: v for k, v in vars(args).items() if k not in ("work",)}, "torch", torch.__version__)
    for name, make in models(args).items():
        torch.manual_seed(0)
        if args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        try:
            {"train": train, "prefill": prefill, "decode": decode}[args.work](make(), args, name)
        except torch.OutOfMemoryError:
            print(f"{name:16} out of memory", flush=True)


if __name__ == "__main__":
    main()
