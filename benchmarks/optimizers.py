"""Time of one optimizer step: Muon and AdamW as the Trainer has them, PyTorch's own Muon in its place, AdamW alone.

    python benchmarks/optimizers.py                                   # on a GPU
    python benchmarks/optimizers.py --device cpu --quick

Gradients are random and stay where they are. "host" is the time until the step has been asked for: what is left of it
when the device is busy with other things.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from side_by_side import Comparison, arguments, new_baka, settle, wait_for

from baka_hf import optimizers


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), fused=True)


def muon(model: torch.nn.Module) -> optimizers.MuonAndAdamW:
    return optimizers.muon_and_adamw(model, 0.02, 0.1, lr=3e-3, fused=True)


def one_by_one(model: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = muon(model)
    plain = torch.optim.Muon(optimizer.muon.param_groups[0]["params"], adjust_lr_fn="original")
    optimizer.muon = plain  # type: ignore[assignment]
    return optimizer


SIDES: dict[str, Callable[[torch.nn.Module], torch.optim.Optimizer]] = {
    "Muon and AdamW": muon,
    "torch.optim.Muon and AdamW": one_by_one,
    "AdamW": adamw,
}


def measure(new: Callable, args: argparse.Namespace) -> dict[str, float]:
    model = new_baka(args).float()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer, whole, host = new(model), [], []
    for _ in range(3 + 4 * args.repeats):
        wait_for(args.device)
        start = time.perf_counter()
        optimizer.step()
        host.append(time.perf_counter() - start)
        wait_for(args.device)
        whole.append(time.perf_counter() - start)
    return {"ms": 1e3 * statistics.median(whole[3:]), "host ms": 1e3 * statistics.median(host[3:])}


def main() -> None:
    args = settle(arguments(__doc__).parse_args())
    comparison = Comparison(args, "optimizers")
    for name, new in comparison.chosen(SIDES).items():
        comparison.add("a step", name, **measure(new, args))
    comparison.finish("Muon and AdamW", ("ms", "host ms"))


if __name__ == "__main__":
    main()
