"""Training on lanes by `BakaTrainer`, on one GPU or several: tokens per second of whole steps, optimizer and all.

    python benchmarks/lanes.py                                      # on one GPU
    accelerate launch --config_file examples/accelerate/ddp.yaml benchmarks/lanes.py
    accelerate launch --config_file examples/accelerate/fsdp2.yaml --fsdp_auto_wrap_policy NO_WRAP benchmarks/lanes.py
    python benchmarks/lanes.py --device cpu

Documents of random tokens, as long as encyclopedia articles. The lanes are those of all processes together: on more
GPUs the same text is read in as many steps. Weights are float32, products on a GPU bfloat16. Prints one JSON line.
"""

import argparse
import json
import math
import os
import tempfile
import time
from typing import Any

import torch
import transformers
from side_by_side import QUICK_CHUNK, SIZES, processor_name, wait_for
from transformers import TrainerCallback

from baka_hf import BakaConfig, BakaForCausalLM
from baka_hf.data import LaneDataset
from baka_hf.training import BakaTrainer, BakaTrainingArguments

WARM_UPS = 6  # steps in which programs are compiled and graphs recorded


class Stopwatch(TrainerCallback):
    """Time of all steps but the first, with GPUs waited for before and after them alone."""

    def __init__(self, device: str):
        self.device, self.seconds = device, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == WARM_UPS:
            self.seconds = -self._now()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds += self._now()

    def _now(self) -> float:
        wait_for(self.device)
        return time.perf_counter()


def documents(vocab_size: int, num_tokens: int, median: int) -> list[torch.Tensor]:
    """So many random tokens at least, in documents of log-normal lengths."""
    generator = torch.Generator().manual_seed(0)
    found, total = [], 0
    while total < num_tokens:
        length = int(median * math.exp(0.8 * torch.randn((), generator=generator).item())) + 1
        found.append(torch.randint(vocab_size, (length,), generator=generator))
        total += length
    return found


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu (default: %(default)s)")
    add("--size", choices=list(SIZES), help="default: reference on a GPU, small on a CPU")
    add("--lanes", type=int, help="rows of all processes together (default: 64 on a GPU, 4 on a CPU)")
    add("--chunks", type=int, default=4, help="chunks of a step (default: %(default)s)")
    add("--steps", type=int, help="steps to time (default: 20)")
    add("--eager", action="store_true", help="without torch.compile, as on a CPU")
    add("--no_graphs", action="store_true", help="without CUDA graphs, as on a CPU")
    add("--quick", action="store_true", help="a tiny model and few lanes: does it run? Its figures mean nothing")
    args = parser.parse_args()
    args.on_gpu = args.device != "cpu"
    args.size = "quick" if args.quick else args.size or ("reference" if args.on_gpu else "small")
    args.lanes = args.lanes or (2 if args.quick else 64 if args.on_gpu else 4)
    args.steps = args.steps or (2 if args.quick else 20)
    args.processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.lanes % args.processes:
        raise ValueError(f"--lanes: expected a multiple of {args.processes} processes, got {args.lanes}.")
    return args


def main() -> None:
    args = parse_args()
    on_gpu = args.on_gpu
    torch.manual_seed(0)
    model = BakaForCausalLM(BakaConfig(**SIZES[args.size] | (QUICK_CHUNK if args.quick else {})))
    chunk_size, steps = model.config.chunk_size, WARM_UPS + args.steps
    tokens = args.lanes * args.chunks * chunk_size
    texts = documents(model.config.vocab_size, int(1.2 * steps * tokens), median=3 * chunk_size)
    stopwatch = Stopwatch(args.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = BakaTrainer(
            model,
            BakaTrainingArguments(
                folder,
                per_device_train_batch_size=args.lanes // args.processes,
                max_steps=steps,
                bf16=on_gpu,
                torch_compile=on_gpu and not args.eager,
                cuda_graphs=on_gpu and not args.no_graphs,
                optim="adamw_torch_fused" if on_gpu else "adamw_torch",
                use_cpu=not on_gpu,
                dataloader_num_workers=1 if on_gpu else 0,
                dataloader_pin_memory=on_gpu,
                logging_steps=steps,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=LaneDataset(texts, args.lanes, chunk_size, args.chunks),
            callbacks=[stopwatch],
        )
        trainer.train()
    if trainer.is_world_process_zero():
        row = {"benchmark": "lanes", "processes": args.processes, "lanes": args.lanes, "chunks": args.chunks}
        row |= {"tokens/s": round(args.steps * tokens / stopwatch.seconds)}
        row |= {"peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2)} if on_gpu else {}
        row |= {"device": torch.cuda.get_device_name() if on_gpu else processor_name(), "size": args.size}
        print(json.dumps(row | {"torch": torch.__version__, "transformers": transformers.__version__}), flush=True)


if __name__ == "__main__":
    main()
