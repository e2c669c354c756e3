"""What options of the architecture cost: training, and steps of one token, beside the default.

    python benchmarks/options.py                                      # on a GPU
    python benchmarks/options.py --options "associative / 4" "no QK-norm" --repeats 3
    python benchmarks/options.py --device cpu --quick

An option is the default with some fields of the configuration changed. Products in float32, which are those of
associations, are in TF32 where the device has it, as in `examples/ladder.py`. Beside each ratio of speeds stand the
parameters, since some options have more of them.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from fast_paths import stepping, training
from side_by_side import SIZES, Comparison, arguments, new_baka, settle

ASSOCIATIVE = dict(associative_dim=64, associative_write="tokens")
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no QK-norm": dict(qk_norm=False),
    "no memory norm": dict(memory_norm=False),
    "gate": dict(memory_update="gate"),
    "RMSNorm": dict(norm_type="rmsnorm"),
    "branches in turn": dict(parallel_residual=False),
    "elephant": dict(hidden_act="elephant"),
    "no value residual": dict(value_residual=False),
    "8 pauses": dict(num_pause_tokens=8),
    "XL alone": dict(num_memory_tokens=0),
    "associative": ASSOCIATIVE,
    "associative / 2": ASSOCIATIVE | dict(associative_layer_interval=2),
    "associative / 4": ASSOCIATIVE | dict(associative_layer_interval=4),
    "associative by memory": dict(associative_dim=64, associative_write="memory"),
}
SHAPES = {"train": (training, (16, 2048), (2, 32)), "step": (stepping, (1, 512), (1, 8))}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS), metavar="NAME")
    parser.add_argument("--works", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = settle(parser.parse_args())
    torch.set_float32_matmul_precision("high")
    comparison = Comparison(args, "options")
    chosen = {name: dict(fields) for name, fields in OPTIONS.items() if name in ("default", *args.options)}
    for fields in chosen.values():
        if "associative_layer_interval" in fields:  # some sizes have fewer blocks
            every, count = fields["associative_layer_interval"], SIZES[args.size]["num_hidden_layers"]
            fields["associative_layer_interval"] = min(every, count)
    for name, fields in chosen.items():
        model = new_baka(args, **fields)
        comparison.note(option=name, **fields, parameters=model.num_parameters(), state_bytes=model.new_cache(1).nbytes)
        del model
    for work in args.works:
        prepare, *sizes = SHAPES[work]
        rows, length = sizes[args.quick]
        sides: dict[str, Callable] = {
            name: partial(prepare, args, nullcontext, rows, length, **fields) for name, fields in chosen.items()
        }
        comparison.measure(f"{work} {rows} x {length:,}", rows * length, sides, warm_ups=2)
    comparison.finish("default", ("tokens/s", "peak GiB"))


if __name__ == "__main__":
    main()
