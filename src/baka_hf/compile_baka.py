"""What torch.compile needs to be told: what stays on the host, what is recomputed, how many programs there may be.

Under torch.compile the blocks are compiled, a few programs for all blocks and chunks, see `BlockwisePass`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._dynamo
from torch.utils.checkpoint import checkpoint

on_host = torch.compiler.disable  # what is decided on the host is marked as such
# One program for each kind of chunk, and again for other batch sizes. torch gives up compiling at 8 of them by default.
# Under DDP it would cut every program in two, to send the gradients of one half early: blocks are small enough.
allow_programs = partial(torch._dynamo.config.patch, recompile_limit=64, optimize_ddp=False)
static_shapes = partial(allow_programs, automatic_dynamic_shapes=False)


def runs_compiled_parts(function: Callable) -> Callable:
    """`function`, which runs what is compiled and is itself left alone."""
    wrapper = torch.compiler.disable(function, recursive=False)
    # PyTorch 2.9 follows this from a bound method to what it wraps, and loses the object.
    del wrapper._torchdynamo_orig_callable
    return wrapper


def recompute(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)`; compiled training does not keep its result but computes it again in the backward pass.

    For what is cheap next to the matrix products around it and as large as they are. Uncompiled, a call costs more.
    """
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)
