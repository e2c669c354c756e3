"""Training across documents: a `Trainer` whose rows are lanes, with memory that goes on from step to step.

    lanes = LaneDataset(documents, num_lanes=8, chunk_size=512, chunks_per_step=4)
    trainer = BakaTrainer(model, BakaTrainingArguments("out", per_device_train_batch_size=8), train_dataset=lanes)
    trainer.train()

Each step goes on where the last one left every lane: the state is detached between steps, a row's starts anew where the
row begins with a document, evaluation has a state of its own, and every process saves its state with each checkpoint.
Any number of processes can resume from it, each with the state of the lanes that it reads. With any other data set,
whose rows have nothing to do with those before, `BakaTrainer` is a plain `Trainer`.
"""

import json
import random
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, TrainerCallback, default_data_collator
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import LabelSmoother, safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging

from .cache_baka import BakaCache
from .configuration_baka import check_integers
from .data import IGNORED, LaneDataset, StreamingLanes
from .functions_baka import sent_to_host
from .hub import trainer_card
from .optimizers import MuonArguments, MuonTrainer

logger = logging.get_logger(__name__)

STATE_FOLDER = "lanes-rank-{rank}"  # of a checkpoint: the state of one process's lanes
PLACES_FILE = "lanes.json"  # in that folder: which lanes these are, and where they stand
PLACES_FIELDS = {"num_lanes", "num_groups", "num_processes", "places", "epoch"}
TRAINER_STATE = "trainer_state.json"  # of a checkpoint: what Trainer writes last
REFUSED = (
    "Nothing was learned from this step: go on from the last checkpoint, without the document or with smaller steps."
)

# What the host has to know of a batch, and the name under which it stays there.
KNOWN = {"position_ids": "positions", "document": "document"}


def lanes_of(rank: int, num_processes: int, num_lanes: int, num_groups: int = 1) -> list[list[int]]:
    """The lanes that process `rank` reads, one for each of its rows, in each batch of a step.

    A step of `num_lanes` rows comes in `num_groups` batches, each of them dealt to the processes in equal runs of rows.
    So does accelerate, whether the first process reads for all of them or each for itself.
    """
    size = num_lanes // num_groups
    rows = size // num_processes
    starts = range(rank * rows, num_lanes, size)
    return [list(range(start, start + rows)) for start in starts]


@dataclass
class _Group:
    """Lanes that one process reads in the same batch."""

    lanes: list[int] = field(default_factory=list)  # one for each row
    state: BakaCache | None = None
    places: list[list[int]] | None = None  # where each row stands: a document and how many tokens of it were read
    began: Any = None  # which rows began a batch with a finite state [B], and where they stood
    # Which of these have one after each piece of the batch, and whether its loss is finite: [B + 1] on the host.
    finite: list[Callable[[], torch.Tensor]] = field(default_factory=list)


@dataclass(repr=False)  # Trainer's own hides tokens
class BakaTrainingArguments(MuonArguments):
    """`TrainingArguments`, and what a recurrent model has beside."""

    carry_memory: bool = field(
        default=True, metadata={"help": "Let each step of lanes go on with the state of the last; else start empty."}
    )
    chunks_per_backward: int | None = field(
        default=None,
        metadata={
            "help": "Chunks that gradients span. A step of more is read in pieces of so many, each with a backward "
            "pass of its own and the state carried between them. All of the step's if not given."
        },
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "Record training steps as CUDA graphs (`model.cuda_graphs_enable()`), beside `torch_compile`: much "
            "faster where rows are few."
        },
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Let DDP search every step for parameters without a gradient; each of a BakaLLM's gets one."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunks_per_backward is not None:
            check_integers(chunks_per_backward=self.chunks_per_backward)


class BakaTrainer(MuonTrainer):
    """A `Trainer` that carries memory from step to step when it is given `LaneDataset` or `StreamingLanes`.

    Label smoothing, or a `compute_loss_func`, sees the same targets as the plain loss: those of lanes, of pieces of
    `chunks_per_backward` and of any model that shifts its labels, whatever wraps it.

    Data sets of lanes are read in order, one row per lane: `num_lanes` is the batch size per device times the number of
    processes, or that times k, which reads a step of the lanes in k batches; gradients are then accumulated over a
    multiple of k batches. Their batches need no collator. While training no logits are kept, the loss is computed piece
    by piece. The evaluation loss of a `LaneDataset` is the mean over all its targets.

    A checkpoint can be resumed with another batch size and another number of processes, if these can see the folders of
    those that saved it: what counts is `num_lanes`.

    With `muon_learning_rate` or `memory_learning_rate` it trains as `optimizers.MuonTrainer` does.

    Takes what `Trainer` takes; `args` may be any `TrainingArguments`. `train` and `evaluate` raise

        ValueError: the number of lanes does not fit the rows, or their `chunk_size` the model's; more than one device
            in one process; the checkpoint to resume from was saved with other lanes or does not hold their state; a
            document does not go on where the state of its lane stands; a lane's state or a loss is not finite, before
            anything is learned from it; memory would be carried past virtual tokens; `chunks_per_backward` for a
            classifier.
    """

    _signature_columns: Any
    label_smoother: Any
    compute_loss_func: Any
    push_in_progress: Any

    def __init__(self, *args: Any, **kwargs: Any):
        given = kwargs.get("data_collator") or (args[2] if len(args) > 2 else None)
        super().__init__(*args, **kwargs)
        if given is None and (_is_lanes(self.train_dataset) or _is_lanes(self.eval_dataset)):
            self.data_collator = default_data_collator  # not a tokenizer's, which would add a mask
        if self.label_smoother is not None and self._loss_shifts_labels:
            self.label_smoother = _SmootherOfTargets(self.label_smoother.epsilon)
        if self.compute_loss_func is not None:
            self.compute_loss_func = partial(_complete, self.compute_loss_func)
        self._records(self.model)
        self._groups = deque([_Group()])  # of lanes; the one to be read next comes first
        self._lanes: LaneDataset | StreamingLanes | None = None  # what is being read
        self._skips_logits = True

    # Rows in order, every lane in its place

    def get_train_dataloader(self) -> Any:
        self._lanes = self.train_dataset if _is_lanes(self.train_dataset) else None
        self._groups = self._new_groups(self._train_batch_size)
        number, accumulated = len(self._groups), self.args.gradient_accumulation_steps
        if accumulated % number:
            raise ValueError(
                f"expected gradients accumulated over a multiple of {number} batches, as many as a step of the lanes "
                f"comes in, got gradient_accumulation_steps={accumulated}."
            )
        loader = super().get_train_dataloader()
        if isinstance(self.train_dataset, StreamingLanes):
            self.args.ignore_data_skip = True  # the lanes themselves go on where they stood
            # The seed that is drawn for workers whenever an iteration begins must not be one of the training's random
            # numbers: a resumed run begins one more.
            loader.base_dataloader.generator = torch.Generator()
        if self._lanes is not None and isinstance(loader, DataLoaderShard):
            loader.device = None  # batches go there later
        if self._refuses_losses:
            self.args.logging_nan_inf_filter = False  # there are none to filter, and a look at each would wait for it
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        # What has to be known of a batch is taken from it before it goes to the device: to ask there would be to wait
        # for all of the step before. (Streams are dealt out by accelerate, on the device.)
        batches = epoch_iterator if self._lanes is None else map(self._send, epoch_iterator)
        return super().get_batch_samples(batches, num_batches, device)

    def _send(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        known = {KNOWN[name]: batch[name].cpu().numpy() for name in KNOWN if name in batch}
        device = self.args.device
        return send_to_device(dict(batch), device, non_blocking=device.type == "cuda") | known

    def _new_groups(self, batch_size: int) -> deque[_Group]:
        """One for each of the batches that a step of the lanes comes in."""
        if self._lanes is None:
            return deque([_Group()])
        chunk_size = getattr(self.model.config, "chunk_size", self._lanes.chunk_size)  # other models have none
        if self._lanes.chunk_size != chunk_size:
            raise ValueError(
                f"expected lanes cut for the model's chunk_size={chunk_size}, got chunk_size={self._lanes.chunk_size}."
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"expected one device per process, got {self.args.n_gpu} (nn.DataParallel): start with "
                "`accelerate launch` or `torchrun`."
            )
        processes = 1 if self.accelerator.split_batches else self.args.world_size
        number, rest = divmod(self._lanes.num_lanes, batch_size * processes)
        if rest:
            raise ValueError(
                f"expected {batch_size * processes} lanes, one for each of the {batch_size} rows of {processes} "
                f"process(es), or a multiple, got num_lanes={self._lanes.num_lanes}."
            )
        own = lanes_of(self.args.process_index, self.args.world_size, self._lanes.num_lanes, number)
        return deque(_Group(lanes) for lanes in own)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset) if isinstance(dataset, LaneDataset) else super()._get_train_sampler(dataset)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*(self._signature_columns or ()), "shift_labels", "document"]

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        self._records(model)
        return model

    def _records(self, model: nn.Module) -> None:
        if getattr(self.args, "cuda_graphs", False):
            for module in model.modules():
                enable: Any = getattr(module, "cuda_graphs_enable", None)
                if enable is not None:
                    enable()

    # The state from step to step

    @property
    def _carries(self) -> bool:
        return self._lanes is not None and getattr(self.args, "carry_memory", True)

    @property
    def _refuses_losses(self) -> bool:
        """Whether a loss in training that is not finite ends the run: not in float16, whose scale is found by them."""
        return self._carries and self.accelerator.scaler is None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        pieces = self._cut(inputs)
        if not self._carries:
            self._groups[0].state = self.model.new_cache(len(inputs["input_ids"])) if len(pieces) > 1 else None
        losses = []
        for index, piece in enumerate(pieces):
            # Processes exchange gradients once, in the last backward pass.
            waits = index + 1 < len(pieces) and self.accelerator.sync_gradients
            with self.accelerator.no_sync(model) if waits else nullcontext():
                losses.append(super().training_step(model, piece, num_items_in_batch))
        self._check_state()
        self._groups.rotate(-1)
        return torch.stack(losses).sum()

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        # Trainer counts the targets of batches with labels alone. Those of `shift_labels` are counted by these.
        batches = [{"labels": None, **batch} if "shift_labels" in batch else batch for batch in batch_samples]
        return super()._get_num_items_in_batch(batches, device)

    def _check_state(self) -> None:
        """Refuse rows whose state is not finite, or a loss that is not, before the optimizer does its work: a device
        may still be at the backward pass."""
        group = self._groups[0]
        if group.began is None:
            return
        (began_finite, began_places), group.began = group.began, None
        pieces = torch.stack([finite() for finite in group.finite])
        group.finite.clear()
        *rows, loss_is_finite = pieces.all(0).tolist()
        wrong = []
        for row in (row for row, is_finite in enumerate(rows) if not is_finite):
            places = group.places if began_finite[row] else began_places
            if places is None:
                where = ""
            elif pieces[-1, row]:  # another document may have begun since, with a state of its own
                where = f" in or before document {places[row][0]}"
            else:
                where = " in document {} after {} tokens".format(*places[row])
            wrong.append(f"lane {group.lanes[row]}{where}")
        if wrong:
            raise ValueError(
                f"expected finite memory, keys and values, got NaN or infinity in {', '.join(wrong)}. {REFUSED}"
            )
        if not loss_is_finite:
            lanes = ", ".join(map(str, group.lanes))
            raise ValueError(f"expected a finite loss, got NaN or infinity from lanes {lanes}. {REFUSED}")

    def _cut(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """A batch in pieces of `chunks_per_backward` chunks."""
        chunks = getattr(self.args, "chunks_per_backward", None)
        if chunks is None:
            return [inputs]
        if not self._loss_shifts_labels:
            raise ValueError(
                f"expected a model with a target at every token for chunks_per_backward={chunks}, got "
                f"{type(self.model).__name__}, whose loss comes at the end of a text: cut its gradients by "
                "`bptt_chunks` of the configuration."
            )
        length, size = inputs["input_ids"].shape[1], chunks * self.model.config.chunk_size
        if length <= size:
            return [inputs]
        if "labels" in inputs:  # the last position of a piece has a target too
            inputs = {**inputs, "shift_labels": _targets(inputs)}
        return [
            {key: value[:, start : start + size] if key != "document" else value for key, value in inputs.items()}
            for start in range(0, length, size)
        ]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        inputs = dict(inputs)
        places, positions = inputs.pop("document", None), inputs.pop("positions", None)
        if isinstance(num_items_in_batch, torch.Tensor):
            # A step may have no target, when all that is left of an epoch are the last tokens of documents.
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        if not model.training and isinstance(self._lanes, LaneDataset):
            # Trainer means over steps and processes; so weighted, that is the mean over targets.
            num_batches = self._lanes.num_steps * len(self._groups)
            num_items_in_batch = max(self._lanes.stats.num_targets, 1) / num_batches
            if not self.args.average_tokens_across_devices:
                num_items_in_batch /= self.args.world_size
        self._set_signature_columns_if_needed()
        if "labels" in inputs or "shift_labels" in inputs:
            if self.compute_loss_func is not None:
                if "shift_labels" in inputs:  # as such a function shifts labels, these come after the first token's
                    inputs["labels"] = nn.functional.pad(inputs.pop("shift_labels"), (1, 0), value=IGNORED)
            elif isinstance(self.label_smoother, _SmootherOfTargets):
                cost: float = getattr(self.model.config, "associative_write_cost", 0.0)
                if model.training and cost > 0:
                    raise ValueError(
                        "expected `label_smoothing_factor` 0 with `associative_write_cost`, which would have no part "
                        f"in the loss, got {self.args.label_smoothing_factor}."
                    )
                inputs["labels"] = _targets(inputs)
                inputs.pop("shift_labels", None)
            elif self.label_smoother is None and self._skips_logits and "skip_logits" in self._signature_columns:
                inputs["skip_logits"] = True
        state = self._state_for(inputs, positions)
        if state is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        inputs |= {"cache": state, "use_cache": True}
        if positions is not None and isinstance(state, BakaCache):
            # Where the model looks at them: a device would have to be waited for. A tensor would be moved there by DDP
            # or FSDP. Code that came with a checkpoint may be older and take nothing else.
            inputs["position_ids"] = positions
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        group = self._groups[0]
        group.state = state.detach_()
        if group.began is not None:
            rows = group.began[0] & _finite_rows(state)
            judged = loss.detach().to(state.device) if model.training and self._refuses_losses else rows.new_zeros(())
            group.finite.append(sent_to_host(torch.cat([rows, judged.isfinite()[None]])))
        if places is not None:
            group.places = places.tolist()
        return (loss, outputs) if return_outputs else loss

    def _state_for(self, inputs: dict[str, Any], positions: Any) -> BakaCache | None:
        """The state to read a batch or a piece of one with, if any: new in rows that begin with a document.

        `positions` is `position_ids` on the host, if known there.
        """
        group = self._groups[0]
        if group.state is None and not self._carries:
            return None
        batch_size = len(inputs["input_ids"])
        if group.state is None:
            group.state = self.model.new_cache(batch_size)
        peft_config = getattr(self.model, "active_peft_config", None)
        if getattr(peft_config, "is_prompt_learning", False):
            raise ValueError(
                "expected samples that are read in one call: PEFT's prompt learning puts its virtual tokens before "
                "every call, so memory cannot be carried to the next. Train it with rows for the stock Trainer."
            )
        if "position_ids" in inputs:
            positions = inputs["position_ids"][:, :1].cpu() if positions is None else torch.from_numpy(positions)
            starts = positions[:, 0].expand(batch_size)
            if self._carries and (wrong := (starts > 0) & (starts != group.state.num_tokens)).any():
                row = int(wrong.int().argmax())
                raise ValueError(
                    f"expected the document in row {row} to go on at {int(group.state.num_tokens[row])}, where the "
                    f"state of its lane stands, got position {int(starts[row])}: resume with the documents, the chunks "
                    "per step and the steps of lanes per optimizer step that the checkpoint was saved with."
                )
            group.state.reset_rows(starts == 0)
        if self._carries and group.began is None:
            group.began = _finite_rows(group.state), group.places
        return group.state

    # Evaluation has a state of its own

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        only_loss = kwargs.get("prediction_loss_only", args[1] if len(args) > 1 else None)
        with self._set_aside():
            self._lanes = dataloader.dataset if _is_lanes(dataloader.dataset) else None
            self._groups = self._new_groups(self.args.eval_batch_size)
            self._skips_logits = self.args.prediction_loss_only if only_loss is None else only_loss
            return super().evaluation_loop(dataloader, *args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        outcome = super().prediction_step(*args, **kwargs)
        self._check_state()
        self._groups.rotate(-1)
        return outcome

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        kept = self._groups, self._lanes, self._skips_logits
        try:
            yield
        finally:
            self._groups, self._lanes, self._skips_logits = kept

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = _last_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint and not _is_complete(Path(resume_from_checkpoint)):
            raise ValueError(
                f"expected a complete checkpoint, got {resume_from_checkpoint} without a {TRAINER_STATE} that can be "
                "read: the run that wrote it was stopped. `resume_from_checkpoint=True` takes the last complete one."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # A checkpoint whose Trainer state is there is complete: everything else is written before, by all processes.
        checkpoint = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (checkpoint / TRAINER_STATE).unlink(missing_ok=True)  # of an earlier run
        states = [group.state for group in self._groups if group.state is not None]
        if self._carries and states and not self.args.save_only_model:
            folder = checkpoint / STATE_FOLDER.format(rank=self.args.process_index)
            whole = states[0] if len(states) == 1 else type(states[0]).cat(states)
            whole.save_pretrained(folder)
            assert self._lanes is not None
            about = {
                "num_lanes": self._lanes.num_lanes,
                "num_groups": len(self._groups),
                "num_processes": self.args.world_size,
                "places": [place for group in self._groups for place in group.places or ()],
                "epoch": self._lanes.epoch,
            }
            (folder / PLACES_FILE).write_text(json.dumps(about))
            self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self._carries:
            return
        lanes = self._lanes
        assert lanes is not None
        about = _about_lanes(checkpoint, 0, self.args.process_index)
        if about["num_lanes"] != lanes.num_lanes:
            raise ValueError(
                f"expected a checkpoint of {lanes.num_lanes} lanes, {checkpoint} was saved with {about['num_lanes']}: "
                "resume with as many lanes as before."
            )
        # By the model's own class: a checkpoint loaded with remote code brought one.
        cache_class = type(self.model.new_cache())
        own = [group.lanes for group in self._groups]
        states, saved, places = [], [], []
        for rank in range(about["num_processes"]):
            held = list(chain(*lanes_of(rank, about["num_processes"], about["num_lanes"], about["num_groups"])))
            if not set(held).isdisjoint(chain(*own)):
                saved += held
                places += _about_lanes(checkpoint, rank)["places"]
                folder = Path(checkpoint) / STATE_FOLDER.format(rank=rank)
                states.append(cache_class.from_pretrained(folder, config=self.model.config, device="cpu"))
        whole = cache_class.cat(states)
        for group in self._groups:
            indices = [saved.index(lane) for lane in group.lanes]
            group.state = whole.clone()
            group.state.batch_select_indices(torch.tensor(indices))
            group.state.to(self.args.device)
            group.places = [places[index] for index in indices] if places else None
        if isinstance(lanes, StreamingLanes):
            stand = [torch.tensor(group.places, device=self.args.device) for group in self._groups]
            lanes.resume(torch.cat([self.accelerator.gather(each) for each in stand]).cpu(), epoch=about["epoch"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        number = self.args.world_size
        if checkpoint is not None and self._carries:
            number = _about_lanes(checkpoint, 0, self.args.process_index)["num_processes"]
        if checkpoint is None or number == self.args.world_size:
            return super()._load_rng_state(checkpoint)
        # All processes draw the same pauses, so the first one's generators will do for any number of them. Devices'
        # own are left alone: the model draws nothing there.
        with safe_globals():
            name = "rng_state.pth" if number == 1 else "rng_state_0.pth"
            states = torch.load(Path(checkpoint) / name, weights_only=True)
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["cpu"])

    # The Hub

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.hub_token is not None:
            self.args.hub_token = _Secret(self.args.hub_token)  # the arguments are pickled beside the model
        super().save_model(output_dir, _internal_call)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # While training Trainer pushes a checkpoint's weights and configuration, which are no model without the code,
        # and no card. Nothing is changed under an upload that is still reading.
        if (
            self.is_world_process_zero()
            and self.args.hub_strategy != HubStrategy.END
            and (self.push_in_progress is None or self.push_in_progress.is_done())
        ):
            for file in Path(checkpoint_folder).glob("*.py"):
                shutil.copy(file, self.args.output_dir)
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write `README.md` of the output folder: `baka_hf.hub.trainer_card` with these arguments.

        `dataset_args` are not used: a result's `dataset` names the configuration. Adapters of PEFT have PEFT's card.
        """
        given: dict[str, Any] = dict(
            language=language,
            license=license,
            tags=tags,
            model_name=model_name,
            finetuned_from=finetuned_from,
            tasks=tasks,
            dataset_tags=dataset_tags,
            dataset=dataset,
        )
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, PreTrainedModel):
            super().create_model_card(**given, dataset_args=dataset_args)
        elif self.is_world_process_zero():
            trainer_card(self, **given).save(Path(self.args.output_dir) / "README.md")


def _about_lanes(checkpoint: str, *ranks: int) -> dict[str, Any]:
    """What the first of these processes that is found has saved of its lanes in a checkpoint."""
    folders = [Path(checkpoint) / STATE_FOLDER.format(rank=rank) for rank in ranks]
    for folder in folders:
        path = folder / PLACES_FILE
        if path.is_file():
            try:
                about = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                about = None
            if not isinstance(about, dict) or not set(about) >= PLACES_FIELDS:
                raise ValueError(f"{path} is damaged: resume from an earlier checkpoint.")
            return about
    raise ValueError(
        f"expected the state of lanes in {folders[0]}, found none: the checkpoint was not saved by a BakaTrainer that "
        "carried memory, or the folders of all its processes are not in one place."
    )


def _is_complete(checkpoint: Path) -> bool:
    """Whether all of a checkpoint is there, which is when its last file can be read."""
    with suppress(OSError, ValueError, TypeError):
        return bool(TrainerState.load_from_json(str(checkpoint / TRAINER_STATE)))
    return False


def _last_checkpoint(folder: str) -> str:
    """The last complete checkpoint of a run, which may have been stopped while it wrote another.

    Raises:
        ValueError: there is none.
    """
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    for checkpoint in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if _is_complete(checkpoint):
            return str(checkpoint)
        logger.warning(f"{checkpoint} is not complete: the run that wrote it was stopped. It is passed over.")
    raise ValueError(f"expected a complete checkpoint in {folder}, found none.")


def _targets(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[B, L] what each position of a batch is to predict."""
    if "shift_labels" in inputs:
        return inputs["shift_labels"]
    return nn.functional.pad(inputs["labels"], (0, 1), value=IGNORED)[:, 1:]


class _SmootherOfTargets(LabelSmoother):
    """Label smoothing over `_targets`, which Trainer would shift or not by the name of the model's outermost class."""

    def __call__(self, model_output: Any, labels: Any, shift_labels: bool = False, **kwargs: Any) -> torch.Tensor:
        logits = model_output["logits"][:, -labels.shape[1] :]  # after PEFT's virtual tokens
        return super().__call__({"logits": logits}, labels, **kwargs)


def _complete(function: Any, outputs: Any, labels: Any, **kwargs: Any) -> Any:
    """A `compute_loss_func` of labels that are one more than the logits, which get another one, without a target."""
    if labels is not None and labels.shape[1:] == (outputs["logits"].shape[1] + 1,):
        logits = nn.functional.pad(outputs["logits"], (0, 0, 0, 1))
        outputs = type(outputs)(**dict(outputs) | {"logits": logits})
    return function(outputs, labels, **kwargs)


def _finite_rows(state: Any) -> torch.Tensor:
    """[B] bool: rows of a state without NaN or infinity."""
    finite = [tensor.isfinite().flatten(1).all(1).to(state.device) for tensor in state.tensors().values()]
    return torch.stack(finite).all(0)


class _Secret(str):
    """A string that is pickled as None."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()

    def __deepcopy__(self, memo: Any) -> "_Secret":
        return self


class ChunkCurriculum(TrainerCallback):
    """Gradients that span more and more chunks, as RMT (arXiv 2207.06881) and its successors are trained: 1, 2, 4, …

        BakaTrainer(…, callbacks=[ChunkCurriculum({0: 1, 1000: 2, 2000: 4})])

    It sets `args.chunks_per_backward` by the optimizer step. A step reads the same tokens at every level, in pieces of
    so many chunks with the state carried between them: short spans are learned first and take less memory, and neither
    the order of the data nor the number of steps depends on the schedule. A resumed run goes on at its step's level.

    Args:
        schedule: the first step of each level (0 among them) and its number of chunks.

    Raises:
        ValueError: no level at step 0, a negative step or a number of chunks below 1.
    """

    def __init__(self, schedule: Mapping[int, int]):
        if 0 not in schedule:
            raise ValueError(f"expected a schedule that begins at step 0, got {dict(schedule)!r}.")
        for step, chunks in schedule.items():
            if type(step) is not int or step < 0 or type(chunks) is not int or chunks < 1:
                raise ValueError(
                    f"expected steps of at least 0 and chunks of at least 1, got {{{step!r}: {chunks!r}}}."
                )
        self.schedule = dict(sorted(schedule.items()))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        chunks = self.schedule[max(step for step in self.schedule if step <= state.global_step)]
        if getattr(args, "chunks_per_backward", None) != chunks:
            logger.info(f"Step {state.global_step}: gradients span {chunks} chunk(s).")
        args.chunks_per_backward = chunks


def _is_lanes(dataset: Any) -> bool:
    return isinstance(dataset, LaneDataset | StreamingLanes)


__all__ = ["BakaTrainer", "BakaTrainingArguments", "ChunkCurriculum"]
