"""Training with Muon for the matrices of blocks, AdamW for all else, and a rate of its own for what remembers."""

import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

SOLIDIFIERS = {"solidifier", "read_solidifier", "write_solidifier"}
# Parts of a model whose matrices multiply what flows through it, by their names in it.
BLOCKS = {"layers", "memory_update"} | SOLIDIFIERS
ADAMW = ("adamw_torch", "adamw_torch_fused")  # what may stand beside Muon
GATES = {"beta_proj", "gamma_proj"}  # of associations: their matrices have a row for each head
# Parts of a model that remember, by their names in it.
MEMORY = {"memory_tokens", "memory_norm", "memory_update", "pause_token", "association"} | SOLIDIFIERS


def remembers(name: str) -> bool:
    """Whether a module or parameter of this name is part of what remembers.

    That is memory and pause vectors, memory's norm, update and solidifiers, and associations. Copies of them that PEFT
    trains are, and factors of adapters are not, whatever the adapter is called.
    """
    return not MEMORY.isdisjoint(re.split(r"\.(?:lora_|modules_to_save)", name)[0].split("."))


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, whose steps take all matrices of one shape together.

    PyTorch's own takes one after another, and a GPU waits for the host, 53 ms for 84 matrices instead of 9 (190 M
    parameters, H200, `benchmarks/optimizers.py`). It is still the one to take matrices that are sharded.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if closure is not None or any(type(parameter) is not nn.Parameter for parameter in parameters):
            return super().step(closure)
        for group in self.param_groups:
            alike = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape, parameter.dtype, parameter.device].append(parameter)
            for matrices in alike.values():
                self._step(group, matrices)
        return None

    def _step(self, group: dict[str, Any], matrices: list[torch.Tensor]) -> None:
        rate, momentum, (rows, columns) = group["lr"], group["momentum"], matrices[0].shape
        gradients: list[Any] = [matrix.grad for matrix in matrices]
        for matrix in matrices:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        means = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        updates = orthogonal(torch.stack(torch._foreach_lerp(gradients, means, momentum)), group)
        torch._foreach_mul_(matrices, 1 - rate * group["weight_decay"])
        torch._foreach_add_(matrices, list(updates), alpha=-rate * max(1, rows / columns) ** 0.5)


def orthogonal(matrices: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """Each of `matrices` [N, rows, columns] near U Vᵀ, where it is U S Vᵀ: Newton-Schulz, as `group` says.

    In bfloat16, or in float32 on a CPU, most of which take ten times as long for bfloat16.
    """
    a, b, c = group["ns_coefficients"]
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


class MuonAndAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` and `Muon`, each stepping its own groups of parameters.

    Groups and state are held here, where schedulers, loggers and checkpoints look for them. The last are Muon's.
    """

    def __init__(self, adamw: torch.optim.AdamW, muon: Muon):
        self.adamw, self.muon = adamw, muon
        # Schedules with a lowest rate take it as a share of this one.
        super().__init__([*adamw.param_groups, *muon.param_groups], {"lr": adamw.defaults["lr"]})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        names = [group["rate"] for group in self.muon.param_groups]
        super().load_state_dict(state_dict)
        for group, name in zip(self.param_groups[-len(names) :], names, strict=True):
            group["rate"] = name  # which older checkpoints do not say

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # A checkpoint that is loaded replaces groups and state.
        self.adamw.state = self.muon.state = self.state
        count = len(self.adamw.param_groups)
        self.adamw.param_groups, self.muon.param_groups = self.param_groups[:count], self.param_groups[count:]
        self.adamw.step()
        self.muon.step()
        return loss


def with_memory_rate(groups: list[dict[str, Any]], model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """The groups of an optimizer of `model`, with `rate` for what remembers, which gets groups of its own.

    Raises:
        ValueError: nothing in the groups remembers.
    """
    memory = {id(parameter) for name, parameter in model.named_parameters() if remembers(name)}
    parts = []  # those that remember last: loggers look at the first
    for is_memory in (False, True):
        options = {"lr": rate, "is_memory": True} if is_memory else {}
        for group in groups:
            chosen = [parameter for parameter in group["params"] if (id(parameter) in memory) == is_memory]
            parts += [{**group, **options, "params": chosen}] if chosen else []
    if not any("is_memory" in part for part in parts):
        raise ValueError(
            f"expected memory, pauses or associations to train with memory_learning_rate={rate}, found none in "
            f"{type(model).__name__} that AdamW has."
        )
    return parts


def rate_of(group: dict[str, Any]) -> str:
    """The argument that gives a group of parameters its peak rate."""
    return "memory_learning_rate" if "is_memory" in group else group.get("rate", "learning_rate")


def muon_and_adamw(
    model: nn.Module,
    muon_learning_rate: float | None,
    weight_decay: float,
    memory_learning_rate: float | None = None,
    memory_muon_learning_rate: float | None = None,
    **adamw_options: Any,
) -> MuonAndAdamW:
    """One optimizer of all parameters of `model` that are trained.

    Muon (https://kellerjordan.github.io/posts/muon/) has the matrices of blocks, solidifiers and memory updates. With g
    the gradient of W [rows, columns], in any floating dtype, a step is

        M ← 0.95 M + 0.05 g
        W ← (1 - lr · weight_decay) W - lr · sqrt(max(1, rows / columns)) · orthogonal(0.05 g + 0.95 M)

    where orthogonal(U S Vᵀ) is near U Vᵀ, by five Newton-Schulz iterations, in bfloat16 or, on a CPU, in float32. AdamW
    has all else: embeddings, the head, norms, biases, and the factors of adapters (LoRA), since only their product is a
    matrix of the model.

    Weight decay is for what multiplies, the head too. What is looked up or added has none: norms, biases, and the rows
    of embeddings, memory and pause vectors. A row that few texts name would shrink in every step all the same (OLMo 2,
    arXiv 2501.00656, has none for embeddings either).

    Args:
        muon_learning_rate: the peak rate of Muon's matrices; None leaves those that do not `remember` to AdamW.
        weight_decay: of both, each times its own rate.
        memory_learning_rate: the peak rate of what `remembers`, which AdamW has then, but for the next argument.
        memory_muon_learning_rate: the peak rate of the matrices of what `remembers`, which Muon has then, but for those
            of strengths and decays (`GATES`).
        adamw_options: arguments of `torch.optim.AdamW`, its peak rate `lr` among them.

    Raises:
        ValueError: there is no such matrix to train, or nothing that remembers.
    """
    rates = {"muon_learning_rate": muon_learning_rate, "memory_muon_learning_rate": memory_muon_learning_rate}
    given = {name: rate for name, rate in rates.items() if rate is not None}
    remembers_apart = memory_learning_rate is not None or memory_muon_learning_rate is not None
    adapters = tuple(f"{name}." for name, module in model.named_modules() if hasattr(module, "base_layer"))
    matrices: dict[str, list[nn.Parameter]] = {name: [] for name in given}
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        module, _, kind = name.rpartition(".")
        is_added = parameter.ndim < 2 or kind.endswith("bias")  # a gate's bias is one row for each memory vector
        is_matrix = parameter.ndim == 2 and not name.startswith(adapters) and not BLOCKS.isdisjoint(name.split("."))
        rate = "muon_learning_rate"
        if remembers_apart and remembers(name):
            rate = "memory_muon_learning_rate"
            is_matrix = is_matrix and GATES.isdisjoint(name.split("."))
        if is_added or isinstance(model.get_submodule(module), nn.Embedding):
            spared.append(parameter)
        else:
            (matrices[rate] if is_matrix and rate in given else decayed).append(parameter)
    for name, found in matrices.items():
        if not found:
            places = "associations, memory updates or solidifiers" if "memory" in name else ", ".join(sorted(BLOCKS))
            raise ValueError(
                f"expected matrices to train in {places} for {name}={given[name]}, found none in "
                f"{type(model).__name__}: train it without that rate."
            )
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=spared, weight_decay=0.0)]
    if memory_learning_rate is not None:
        groups = with_memory_rate(groups, model, memory_learning_rate)
    apart = [dict(params=found, lr=given[name], rate=name) for name, found in matrices.items()]
    muon = Muon(apart, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="original")
    return MuonAndAdamW(torch.optim.AdamW(groups, **adamw_options), muon)


RATES = ("muon_learning_rate", "memory_learning_rate", "memory_muon_learning_rate")


@dataclass(repr=False)  # Trainer's own hides tokens
class MuonArguments(TrainingArguments):
    """`TrainingArguments` with learning rates for Muon and for what remembers.

    Raises:
        ValueError: a rate is not a positive number, or `optim` is no AdamW of PyTorch's beside Muon.
    """

    muon_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate of Muon (0.02, say) for the matrices of blocks, solidifiers and memory "
            "updates, beside AdamW and `learning_rate` for all else. AdamW alone if not given."
        },
    )

    memory_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate of what remembers: memory and pause vectors, memory's norm, update and "
            "solidifiers, associations. That of all else if not given."
        },
    )

    memory_muon_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate of Muon (0.02, say) for the matrices of what remembers, as those of "
            "associations, whoever has all else: for a trained model that was given a memory."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in RATES:
            rate = getattr(self, name)
            is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
            if rate is not None and not (is_number and 0 < rate < math.inf):
                raise ValueError(f"`{name}` must be a positive number, got {rate!r}.")
        has_muon = self.muon_learning_rate is not None or self.memory_muon_learning_rate is not None
        if has_muon and self.optim not in ADAMW:
            raise ValueError(
                f"Muon leaves to AdamW what is no matrix: `optim` must be one of {', '.join(ADAMW)}, got "
                f"{self.optim.value!r}."
            )


class MuonTrainer(Trainer):
    """A `Trainer` that does as the rates of its arguments say (see `MuonArguments`), if it has them.

    All rates follow the schedule, each from its own peak, and all are logged by these names.

    Raises:
        ValueError: beside such a rate there is an optimizer; beside one of Muon's there is DeepSpeed or FSDP1, which
            train flat pieces of matrices; or, when training begins, there is nothing to train with it.
    """

    optimizer: Any
    optimizer_cls_and_kwargs: Any

    def __init__(self, *args: Any, **kwargs: Any):
        self._logged_rates: dict[str, float] = {}  # at the last step that was logged
        super().__init__(*args, **kwargs)
        given = self._peaks()
        rates, muon_rates = (
            " and ".join(f"{name}={rate}" for name, rate in given.items() if part in name) for part in ("", "muon")
        )
        if given and (self.optimizer is not None or self.optimizer_cls_and_kwargs is not None):
            raise ValueError(
                f"expected {rates} or an optimizer, got both: `optimizers` or `optimizer_cls_and_kwargs` is given."
            )
        flat = "DeepSpeed" if self.is_deepspeed_enabled else None
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) == 1:
            flat = "FSDP1"
        if flat is not None and muon_rates:
            raise ValueError(
                f"expected DDP or FSDP2 with {muon_rates}, got {flat}: it trains flat pieces of matrices, of which "
                "Muon cannot be computed."
            )

    def _peaks(self) -> dict[str, float]:
        rates = {name: getattr(self.args, name, None) for name in RATES}
        return {name: rate for name, rate in rates.items() if rate is not None}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new, trained, peaks = self.optimizer is None, self.model if model is None else model, self._peaks()
        has_muon = any("muon" in name for name in peaks)
        if is_new and has_muon:
            _, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            rates = {"muon_learning_rate": None} | peaks
            self.optimizer = muon_and_adamw(trained, weight_decay=self.args.weight_decay, **rates, **options)
        optimizer = super().create_optimizer(model)
        if is_new and not has_muon and peaks:
            groups = with_memory_rate(optimizer.param_groups, trained, peaks["memory_learning_rate"])
            optimizer.param_groups[:] = groups
        return optimizer

    def _get_learning_rate(self) -> float:
        # Before the schedule goes on.
        now = {rate_of(group): group["lr"] for group in self.optimizer.param_groups}
        for name, peak in self._peaks().items():
            if name not in now:
                raise ValueError(
                    f"expected a checkpoint saved with {name}, to go on with {peak}, got one saved without: its "
                    "optimizer has another rate for this."
                )
            self._logged_rates[name] = now[name]
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "learning_rate" in logs:
            logs |= self._logged_rates
        super().log(logs, *args, **kwargs)
