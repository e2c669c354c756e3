"""A small training run, the same in the test's own process and in one or several others, which may be killed."""

import os
import signal
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from helpers import random_tokens, recorded_calls, tiny_config, tiny_model
from programs import forkserver
from torch import Tensor
from torch.multiprocessing import start_processes
from torch.nn.attention import SDPBackend
from torch.testing import assert_close
from transformers import TrainerCallback

from baka_hf import BakaForCausalLM, attention_baka, loss_baka, training_graphs_baka
from baka_hf.data import LaneDataset, StreamingLanes
from baka_hf.training import BakaTrainer, BakaTrainingArguments, ChunkCurriculum

# Chunks of 5: one token, full chunks, a token more and less, and documents longer than a step.
LENGTHS = (1, 7, 40, 5, 12, 33, 2, 9, 10, 23, 6, 16)

Weights = dict[str, Tensor]


def documents() -> list[list[int]]:
    return [random_tokens(tiny_config(), length, seed=length).tolist() for length in LENGTHS]


class Texts:
    """The documents as texts, shuffled anew in every epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[str]:
        order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(self.epoch))
        texts = documents()
        yield from (" ".join(map(str, texts[index])) for index in order)


@dataclass
class Record(TrainerCallback):
    """What happened: for each optimizer step the weights it began with, its gradients and its loss."""

    weights: list[Weights] = field(default_factory=list)
    gradients: list[Weights] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    eval_losses: list[float] = field(default_factory=list)
    tokenized: list[str] = field(default_factory=list)
    final: Weights = field(default_factory=dict)
    num_graphs: int = 0  # kinds of calls that were recorded
    num_in_parts: int = 0  # times that attention without a mask was run, or compiled

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: BakaForCausalLM, **_: Any) -> None:
        self.weights.append(weights_of(model))
        self.gradients.append({name: whole(parameter.grad) for name, parameter in model.named_parameters()})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        self.losses += [logs["loss"]] if "loss" in logs else []
        self.eval_losses += [logs["eval_loss"]] if "eval_loss" in logs else []

    def tokenize(self, text: str) -> list[int]:
        self.tokenized.append(text)
        return [int(token) for token in text.split()]


def weights_of(model: BakaForCausalLM) -> Weights:
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    """A copy, of all processes' shards."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


@dataclass
class Kill(TrainerCallback):
    """No chance to tidy up."""

    step: int

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer(
    folder: Path,
    record: Record,
    *,
    lanes: int = 3,
    chunks_per_step: int = 2,
    stream: bool = False,
    kill_at: int = -1,
    schedule: dict[int, int] | None = None,
    model: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    trainer_class: Any = BakaTrainer,
    processing_class: Any = None,
    **arguments: Any,
) -> BakaTrainer:
    """A trainer of a tiny model on `lanes` lanes; `arguments` are those of training."""
    config = tiny_config(**dict(memory_solidifier="glu") | (model or {}))
    dataset: Any
    if stream:
        dataset = StreamingLanes(Texts(), lanes, config.chunk_size, chunks_per_step, tokenize=record.tokenize)
    else:
        dataset = LaneDataset(documents(), lanes, config.chunk_size, chunks_per_step)
    rows = lanes // int(os.environ.get("WORLD_SIZE", 1))
    defaults = dict(
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        num_train_epochs=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    callbacks = [record, Kill(kill_at)] + ([ChunkCurriculum(schedule)] if schedule else [])
    return trainer_class(
        model=tiny_model(config, dtype),
        args=BakaTrainingArguments(str(folder), **defaults | arguments),
        train_dataset=dataset,
        eval_dataset=LaneDataset(documents(), lanes, config.chunk_size, chunks_per_step),
        processing_class=processing_class,
        callbacks=callbacks,
    )


class ShardingTrainer(BakaTrainer):
    """Shards as the environment says, on the CPU too: accelerate does so for processes that have a GPU each."""

    def create_accelerator_and_postprocess(self) -> None:
        self.args.distributed_state.distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


def train(folder: Path, resume: Path | None = None, **settings: Any) -> Record:
    record = Record()
    trained = trainer(folder, record, **settings)
    training_graphs_baka.DEVICES = ("cpu",)  # with `cuda_graphs=True` alone
    training_graphs_baka._recorders.clear()
    with pytest.MonkeyPatch.context() as patch:
        in_parts = recorded_calls(patch, attention_baka, "_attend")
        trained.train(resume_from_checkpoint=None if resume is None else str(resume))
    record.num_in_parts = len(in_parts)
    record.final = weights_of(trained.accelerator.unwrap_model(trained.model, keep_torch_compile=False))
    recorders = training_graphs_baka._recorders.values()
    record.num_graphs = sum(graph.is_ready for recorder in recorders for graph in recorder.graphs.values())
    return record


def assert_same(found: Weights, expected: Weights, **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(found[name], tensor, **tolerance or dict(rtol=0, atol=0), msg=lambda m, n=name: f"{n}: {m}")


def assert_moved_alike(found: Record, expected: Record) -> None:
    """With Muon, which computes in bfloat16 where matrices are sharded: every parameter, from first to last."""
    before = expected.weights[0]
    for name, tensor in expected.final.items():
        error = (found.final[name] - tensor).norm() / (tensor - before[name]).norm()
        assert error < 0.1, f"{name}: {error}"


def assert_resumed(resumed: Record, uninterrupted: Record) -> None:
    """The last steps, bit for bit."""
    assert 0 < len(resumed.losses) < len(uninterrupted.losses)
    assert resumed.losses == uninterrupted.losses[-len(resumed.losses) :]
    assert_same(resumed.final, uninterrupted.final)


def launched(name: str) -> Any:
    """The options of `accelerate launch` with one of the examples' configurations."""
    path = Path(__file__).parents[1] / "examples" / "accelerate" / name
    options = launch_command_parser().parse_args(["--config_file", str(path), "examples/train.py"])
    return _validate_launch_command(options)[0]


def in_processes(
    number: int, runs: dict[Path, dict[str, Any]], environment: Mapping[str, str] | None = None
) -> list[Record]:
    """Train in processes of their own, run after run: the folder of each and its settings. Process 0's records."""
    forkserver()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start_processes(_work, args=(number, port, runs, environment or {}), nprocs=number, start_method="forkserver")
    return [torch.load(folder / "record.pt", weights_only=False) for folder in runs]


def _work(rank: int, number: int, port: int, runs: dict[Path, dict[str, Any]], environment: Mapping[str, str]) -> None:
    os.environ |= environment
    if environment:
        loss_baka.LOSS_PIECE = 5  # several pieces, as the losses of real steps have
        attention_baka.IN_PARTS["cpu"] = SDPBackend.FLASH_ATTENTION  # compiled, as on a GPU
    if number > 1 or environment:
        os.environ |= dict(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(number),
            MASTER_ADDR="localhost",
            MASTER_PORT=str(port),
        )
        # transformers 5.17 loads the optimizer onto "cpu:0", a device that torch.load does not know.
        torch.load = partial(_load, torch.load)
    for folder, settings in runs.items():
        record = train(folder, **settings)
        if rank == 0:
            torch.save(record, folder / "record.pt")
    if number > 1 or environment:
        torch.distributed.destroy_process_group()


def _load(load: Any, *args: Any, map_location: Any = None, **options: Any) -> Any:
    return load(*args, map_location="cpu", **options)
