"""A stream of millions of tokens through one state: memory stays flat, and so do time and arithmetic.

    python benchmarks/endless.py                        # 2 million tokens on the CPU

Reads random tokens in pieces of odd size. Prints time per token and resident memory by tenths of the stream, and at
both ends reads one fixed chunk from one fixed state: the logits must be the same bit for bit.
"""

import argparse
import resource
import time

import torch
from transformers import set_seed

from baka_hf import BakaCache, BakaConfig, BakaForCausalLM


def resident_megabytes() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--piece", type=int, default=4099)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    set_seed(0)
    config = BakaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        chunk_size=128,
        num_memory_tokens=4,
        num_pause_tokens=2,
        memory_solidifier="glu",
        memory_norm=True,
    )
    model = BakaForCausalLM(config).to(args.device).eval()

    def piece(length: int) -> torch.Tensor:
        return torch.randint(config.vocab_size, (1, length), device=args.device)

    def probe(state: BakaCache) -> torch.Tensor:
        return model(fixed_chunk, cache=state.clone()).logits

    fixed_chunk, fixed_state, cache = piece(config.chunk_size), model.new_cache(), model.new_cache()
    model(piece(1000), cache=fixed_state)
    at_start = probe(fixed_state)
    size = cache.nbytes
    print(f"{'tokens read':>12} {'µs/token':>9} {'resident MB':>12} {'memory norm':>12}")
    for _ in range(10):
        start, read = time.perf_counter(), 0
        while read < args.tokens // 10:
            model(piece(args.piece), cache=cache, logits_to_keep=1)
            read += args.piece
        seconds = time.perf_counter() - start
        norm = cache.memory.norm(dim=-1).mean().item()
        print(
            f"{cache.get_seq_length():12,} {1e6 * seconds / read:9.2f} {resident_megabytes():12.1f} {norm:12.3f}",
            flush=True,
        )
    print("state:", size, "bytes at the start,", cache.nbytes, "at the end")
    print("same chunk, same state, same bits at both ends:", torch.equal(at_start, probe(fixed_state)))
    once, again = probe(cache), probe(cache)
    print(
        "the state at the end gives the same bits twice:",
        torch.equal(once, again),
        "and finite:",
        bool(once.isfinite().all()),
    )


if __name__ == "__main__":
    main()
