"""How far logits are from the naive float64 reading, on any device, in any dtype: a table of the worst differences.

    python benchmarks/exactness.py                                     # CPU, float32 and float64
    python benchmarks/exactness.py --device cuda --dtypes float32 bfloat16 float16
    python benchmarks/exactness.py --device cuda --attention flex_attention --configs rmt_carry --hidden-size 64
    python benchmarks/exactness.py --device cuda --attention sdpa --configs rmt_carry layer --static --compile

Every configuration of the tests is read by a batch of four rows, unpadded, padded left and right and with holes, in one
call, token by token and in random splits with the state passed on. `--static` reads from static states, by CUDA graphs
on a GPU; `--compile` compiles the model for one call without a state. The reference reads each row alone with the same
weights (those of the dtype, in float64 arithmetic), so what is left is the noise of the arithmetic.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers import CONFIGS, random_tokens, tiny_config, tiny_model
from naive import read


def masks(length: int) -> torch.Tensor:
    """[4, length]: a full row, one padded left, one right, one with holes."""
    mask = torch.ones(4, length, dtype=torch.long)
    mask[1, : length // 3] = 0
    mask[2, -length // 4 :] = 0
    mask[3, 1::3] = 0
    return mask


def splits(length: int) -> Iterator[list[int]]:
    yield [length]
    yield [1] * length
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        ends = torch.randperm(length - 1, generator=generator)[:5].add(1).sort().values.tolist()
        yield [end - start for start, end in zip([0, *ends], [*ends, length], strict=True)]


@torch.no_grad()
def worst_difference(
    overrides: dict, attention: str, dtype: torch.dtype, device: str, static: bool, compiled: bool
) -> tuple[float, float]:
    """Largest difference of a logit, absolute and in standard deviations of the logits."""
    config = tiny_config(**overrides)
    model = tiny_model(config, dtype)
    length = 4 * config.chunk_size + 3
    tokens, mask = random_tokens(config, 4, length), masks(length)
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    expected = [read(config, weights, row[keep.bool()].tolist()).logits for row, keep in zip(tokens, mask, strict=True)]
    model.to(device).set_attn_implementation(attention)
    worst, deviation = 0.0, torch.cat(expected).std().item()
    readings = []
    for sizes in splits(length):
        cache, parts = model.new_cache(4, static=static), []
        for ids, keep in zip(tokens.split(sizes, 1), mask.split(sizes, 1), strict=True):
            parts.append(model(ids.to(device), attention_mask=keep.to(device), cache=cache).logits)
        readings.append(torch.cat(parts, 1))
    if compiled:
        torch._dynamo.reset()
        with torch.enable_grad():
            whole = torch.compile(model)(tokens.to(device), attention_mask=mask.to(device), use_cache=False)
        readings.append(whole.logits.detach())
    for logits in readings:
        logits = logits.double().cpu()
        for row, keep, reference in zip(logits, mask, expected, strict=True):
            difference = (row[keep.bool()] - reference).abs().max().item()
            worst = max(worst, difference) if difference == difference else float("nan")
    return worst, worst / deviation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float64"])
    parser.add_argument("--attention", nargs="+", default=["eager", "sdpa"])
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), help="names of tests/helpers.py's CONFIGS")
    parser.add_argument("--hidden-size", type=int, help="FlexAttention's GPU kernels want heads of 16 and more")
    parser.add_argument("--static", action="store_true")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    overrides = {} if args.hidden_size is None else {"hidden_size": args.hidden_size}
    # Full float32 on a GPU, not TF32.
    torch.set_float32_matmul_precision("highest")
    print(f"torch {torch.__version__}, {args.device}, {len(args.configs)} configurations")
    print(f"{'dtype':10} {'attention':15} {'worst |difference|':>19} {'in std of logits':>17}  worst configuration")
    for dtype in args.dtypes:
        for attention in args.attention:
            start = time.time()
            found = {
                name: worst_difference(
                    CONFIGS[name] | overrides, attention, getattr(torch, dtype), args.device, args.static, args.compile
                )
                for name in args.configs
            }
            name = max(found, key=lambda name: (found[name][1] != found[name][1], found[name][1]))
            absolute, seconds = max(difference for difference, _ in found.values()), time.time() - start
            row = f"{dtype:10} {attention:15} {absolute:19.1e} {found[name][1]:17.1e}  {name} ({seconds:.0f} s)"
            print(row, flush=True)


if __name__ == "__main__":
    main()
