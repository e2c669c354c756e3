"""Peak memory of a training step against the chunks that its gradients span, for each kind of gradient checkpointing.

    python benchmarks/bptt_memory.py
    python benchmarks/bptt_memory.py --chunks 1 2 8 32 --batch 4 --granularity chunk

The reference size (12 layers of width 768, chunks of 512 tokens), float32 weights under bfloat16 autocast, on the GPU.
Peak memory is what a forward and backward pass take beside weights and gradients. With granularity "chunk" it may grow
by one state per chunk, which is the last line; the rest is that of one chunk.
"""

import argparse
import gc
import time

import torch

from baka_hf import BakaConfig, BakaForCausalLM

REFERENCE = dict(
    vocab_size=50277, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)


def new_model(granularity: str) -> BakaForCausalLM:
    model = BakaForCausalLM(BakaConfig(**REFERENCE)).cuda().train()
    if granularity != "none":
        # The name changed in transformers 5.23.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"granularity": granularity})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def step(model: BakaForCausalLM, batch: int, chunks: int) -> tuple[float, float]:
    """MiB at the peak, and tokens per second, of one step."""
    tokens = torch.randint(model.config.vocab_size, (batch, chunks * model.config.chunk_size), device="cuda")
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids=tokens, labels=tokens, skip_logits=True).loss
    loss.backward()
    torch.cuda.synchronize()
    taken = time.perf_counter() - start
    return (torch.cuda.max_memory_allocated() - before) / 2**20, tokens.numel() / taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 8, 32])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--granularity", nargs="+", default=["none", "layer", "chunk"])
    args = parser.parse_args()
    print(f"batch {args.batch}, torch {torch.__version__}, {torch.cuda.get_device_name()}")
    print(f"{'checkpointing':<14}" + "".join(f"{f'{chunks} chunks':>28}" for chunks in args.chunks))
    for granularity in args.granularity:
        model, cells = new_model(granularity), []
        for chunks in args.chunks:
            try:
                step(model, args.batch, chunks)
                memory, speed = step(model, args.batch, chunks)
                cells.append(f"{memory:,.0f} MiB {speed:9,.0f} tokens/s")
            except torch.OutOfMemoryError:
                cells.append("out of memory")
        print(f"{granularity:<14}" + "".join(f"{cell:>28}" for cell in cells), flush=True)
        del model
    config = BakaConfig(**REFERENCE)
    keys_and_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * config.stream_length
    state = 2 * keys_and_values + 4 * config.num_memory_tokens * config.hidden_size
    print(f"the state that is kept of a chunk: {args.batch * state / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
