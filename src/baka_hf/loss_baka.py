"""The head of a language model and its loss, computed piece by piece: all logits of a long text never exist at once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from .compile_baka import on_host, runs_compiled_parts
from .functions_baka import at_least_float32, dtype_of_products

IGNORED = -100  # a label that is no target

# Without logits, the loss is computed for so many tokens at a time. A GPU needs many at once; a CPU is faster with what
# its caches hold, and needs the less memory.
LOSS_PIECE, LOSS_PIECE_ON_CPU = 8192, 256
# Compiled, a token's weights are summed for so many logits at a time, a multiple of 8.
LOSS_BLOCK = 1024


def _piece_on(device: torch.device) -> int:
    return min(LOSS_PIECE, LOSS_PIECE_ON_CPU) if device.type == "cpu" else LOSS_PIECE


def computes_losses(head: nn.Module) -> bool:
    """Whether a head can be asked for a loss: nothing wrapped, adapted, quantized or hooked. FSDP2 may shard it: its
    hooks have the weight ready whenever the head is called."""
    if type(head).__module__.startswith("torch.distributed.fsdp"):
        return isinstance(head, BakaHead)
    return (
        type(head) in (BakaHead, nn.Linear)  # the latter after `resize_token_embeddings`
        and head.bias is None
        and type(head.weight) is nn.Parameter
        and "forward" not in vars(head)
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks)
    )


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear head, summed over tokens, with no more than `LOSS_PIECE` rows of logits at a time.

    Softmax gives the gradient of the logits as soon as there are logits. It is taken on to the hidden states and to the
    weight there and then, so that no logits are kept or computed twice; the backward pass has only to scale.
    """

    @staticmethod
    @runs_compiled_parts
    def forward(
        ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, with_gradient: bool
    ) -> torch.Tensor:
        """The loss, a float32 scalar, of hidden states [T, D] for `targets` [T], -100 for none, by `weight` [V, D]."""
        device, vocab_size = hidden_states.device, weight.shape[0]
        dtype = dtype_of_products(weight.dtype, device)
        # Whether gradients are enabled is not known in here.
        needs_hidden, needs_weight = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        states = hidden_states.to(dtype)
        num_blocks = _num_blocks(vocab_size)
        # Blocks of logits begin at multiples of 16 bytes: a GPU's matrix products are several times slower otherwise.
        width = num_blocks * 8 * -(-vocab_size // (8 * num_blocks))
        matrix = nn.functional.pad(weight.to(dtype), (0, 0, 0, width - vocab_size))
        total = torch.zeros((), dtype=at_least_float32(dtype), device=states.device)
        grad_hidden = torch.empty_like(states) if needs_hidden else None
        grad_weight = torch.zeros_like(matrix) if needs_weight and not len(states) else None
        with torch.autocast(device.type, enabled=False):
            length = _piece_on(device)
            for begin in range(0, len(states), length):
                piece = slice(begin, begin + length)
                loss, gradient = _cross_entropy(
                    states[piece] @ matrix.T, targets[piece], vocab_size, needs_hidden or needs_weight
                )
                total += loss
                if grad_hidden is not None:
                    grad_hidden[piece] = gradient @ matrix
                if needs_weight:
                    grad_weight = _add_product(grad_weight, gradient.T, states[piece], total.dtype)
        ctx.dtypes = hidden_states.dtype, weight.dtype
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight[:vocab_size])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        def scaled(gradient: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
            if gradient is None:
                return None
            # In the precision of the sum: a scale rounded to half precision would be off for all of the gradient.
            return torch.mul(gradient, grad_output.view(1, 1), out=torch.empty_like(gradient, dtype=dtype))

        grad_hidden, grad_weight = map(scaled, ctx.saved_tensors, ctx.dtypes)
        return grad_hidden, grad_weight, None, None


@on_host
def _add_product(
    total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """total + left @ right, in place and in `dtype`; without a total the product, which may have its own."""
    is_half = left.dtype in (torch.bfloat16, torch.float16)
    if is_half and left.is_cuda and torch.version.cuda and torch.cuda.get_device_capability(left.device) >= (8, 0):
        # Added up as it is computed: neither rounded first nor written and read again.
        if total is None:
            return torch.mm(left, right, out_dtype=dtype)
        return torch.addmm(total, left, right, out_dtype=dtype, out=total)
    part = left @ right
    return part if total is None else total.to(dtype).add_(part)


def _num_blocks(num_logits: int) -> int:
    """Into how many blocks a token's logits are divided; padding of the last one changes nothing."""
    return -(-num_logits // LOSS_BLOCK)


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of logits [T, V'] for `targets` [T], and its gradient [T, V']; only `vocab_size` columns count."""
    wide, columns = logits.to(at_least_float32(logits.dtype)), torch.arange(logits.shape[1], device=logits.device)
    if vocab_size < logits.shape[1]:
        wide = wide.masked_fill(columns >= vocab_size, float("-inf"))
    is_real = (targets != IGNORED)[:, None]
    target = torch.where(is_real, targets[:, None], 0)
    if torch.compiler.is_compiling():
        # What a compiler makes two passes of. The gradient takes the place of the logits, which nobody needs any more.
        logs = wide.unflatten(1, (_num_blocks(logits.shape[1]), -1)).logsumexp(2).logsumexp(1, keepdim=True)
        loss = torch.where(is_real, logs - wide.gather(1, target), 0).sum()
        gradient = torch.where(is_real, (wide - logs).exp() - (columns == target).to(wide.dtype), 0)
        return loss, logits.copy_(gradient) if with_gradient else logits
    probabilities = wide.log_softmax(1)
    loss = -torch.where(is_real, probabilities.gather(1, target), 0).sum()
    if not with_gradient:
        return loss, logits
    gradient = probabilities.exp_().scatter_add_(1, target, -torch.ones_like(wide[:, :1])).mul_(is_real)
    return loss, gradient.to(logits.dtype)


def without_padding(
    labels: torch.Tensor | None, shift_labels: torch.Tensor | None, mask: torch.Tensor, ignored: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Both [B, L], `ignored` where padding would have to predict them: `mask` [B, … + L] is 0 there."""
    if labels is not None:
        is_padding = mask[:, -labels.shape[1] :].to(labels.device) == 0
        labels = labels.masked_fill(nn.functional.pad(is_padding[:, :-1], (1, 0)), ignored)
    if shift_labels is not None:
        is_padding = mask[:, -shift_labels.shape[1] :].to(shift_labels.device) == 0
        shift_labels = shift_labels.masked_fill(is_padding, ignored)
    return labels, shift_labels


class BakaHead(nn.Linear):
    """The head of a language model: logits, or the summed loss with no more than `LOSS_PIECE` rows of them at a time.

    The loss is computed in here, and in one call, because a sharded model has a module's weight only while that runs.
    """

    def forward(self, hidden_states: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [..., V] of `hidden_states` [..., D]; or, of [T, D], the loss for `targets` [T], -100 for none."""
        return super().forward(hidden_states) if targets is None else self._loss(hidden_states, targets)

    @runs_compiled_parts
    def _loss(self, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return LinearCrossEntropy.apply(hidden_states, self.weight, targets, torch.is_grad_enabled())


@runs_compiled_parts
def loss_by_pieces(
    head: nn.Module,
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    loss_function: Callable,
    num_items_in_batch: Any = None,
) -> torch.Tensor:
    """The loss of `hidden_states` [B, L, D] for `targets` [B, L], no more than `LOSS_PIECE` rows of logits at a time.

    Args:
        head: what makes logits [..., V] of hidden states; any module.
        hidden_states, targets: what it is to judge; -100 for no target.
        loss_function: a model's, as transformers calls it.
        num_items_in_batch: what the summed loss is divided by; the number of targets if not given.
    """
    targets = targets.to(hidden_states.device)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != IGNORED).sum()
    hidden_states, targets = hidden_states.flatten(0, 1), targets.flatten()
    if loss_function is ForCausalLMLoss and computes_losses(head):
        of_head = head if isinstance(head, BakaHead) else partial(BakaHead._loss, head)
        loss = of_head(hidden_states, targets)
    else:
        loss = _loss_of_head(head, hidden_states, targets, loss_function)
    return (loss / torch.as_tensor(num_items_in_batch, device=loss.device)).float()  # as transformers' own


def share_of_batch(
    labels: torch.Tensor | None,
    device: torch.device,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: Any = None,
    ignore_index: int = IGNORED,
    **kwargs: Any,
) -> Any:
    """How much of a batch a call's targets are, for what is added to a loss that is divided by `num_items_in_batch`.

    Arguments as a model's loss takes them, of which it takes `shift_labels` first. 1 without a number.
    """
    if num_items_in_batch is None:
        return 1.0
    targets = shift_labels if shift_labels is not None else labels[:, 1:]  # type: ignore[index]  # one is there
    return (targets != ignore_index).sum().to(device) / torch.as_tensor(num_items_in_batch, device=device)


def _loss_of_head(
    head: nn.Module, hidden_states: torch.Tensor, targets: torch.Tensor, loss_function: Callable
) -> torch.Tensor:
    """The summed loss of any head, adapted, offloaded or quantized. Backward computes logits again."""

    def total(hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = head(hidden_states)
        return loss_function(
            logits=logits, labels=None, vocab_size=logits.shape[-1], shift_labels=targets, num_items_in_batch=1
        )

    length = _piece_on(hidden_states.device)
    pieces = zip(hidden_states.split(length), targets.split(length), strict=True)
    if torch.is_grad_enabled():
        losses = [checkpoint(total, *piece, use_reentrant=False) for piece in pieces]
    else:
        losses = [total(*piece) for piece in pieces]
    return torch.stack(losses).sum()
