"""Training on lanes is reading every document by itself, with its memory carried: same losses, same gradients."""

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils.launch import prepare_multi_gpu_env
from helpers import CHECKPOINTING, random_tokens, tiny_config, tiny_model
from torch import Tensor
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from torch.nn import functional as F
from torch.testing import assert_close
from train_worker import (
    LENGTHS,
    Record,
    ShardingTrainer,
    Texts,
    Weights,
    assert_moved_alike,
    assert_resumed,
    assert_same,
    documents,
    in_processes,
    launched,
    train,
    trainer,
    weights_of,
)
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.testing_utils import CaptureLogger

from baka_hf import BakaCache, BakaForCausalLM, BakaForSequenceClassification, training
from baka_hf.data import LaneDataset
from baka_hf.evaluation import evaluate_documents
from baka_hf.training import BakaTrainer, BakaTrainingArguments, ChunkCurriculum, _about_lanes

Row = dict[str, Tensor]
# A solidifier's gradients have few directions; in all others Muon's steps are nothing but rounding.
MUON: dict[str, Any] = dict(
    lanes=4,
    muon_learning_rate=0.02,
    weight_decay=0.5,
    max_steps=4,
    lr_scheduler_type="linear",
    model=dict(memory_solidifier="none"),
)
EXACT = dict(rtol=1e-5, atol=1e-6)  # of float64: transformers takes losses in float32


class NaiveReader:
    """Reads lanes one document at a time, chunk by chunk and without padding, each with a state of its own."""

    def __init__(self, model: BakaForCausalLM, num_lanes: int, smoothing: float = 0):
        self.model, self.smoothing = model.train(), smoothing
        self.states: list[BakaCache] = [model.new_cache() for _ in range(num_lanes)]

    def read(self, lane: int, row: Row, span: int) -> tuple[Tensor, int]:
        """The sum of the losses of a row, in which gradients reach back over `span` chunks at most; its targets."""
        size, total, count = self.model.config.chunk_size, torch.zeros((), dtype=torch.float64), 0
        for chunk, start in enumerate(range(0, len(row["labels"]), size)):
            part = slice(start, start + size)
            real = row["labels"][part] >= 0
            if row["position_ids"][start] == 0:
                self.states[lane] = self.model.new_cache()
            elif chunk % span == 0:
                self.states[lane].detach_()
            if real.any():
                ids, targets = row["input_ids"][part][real], row["shift_labels"][part][real]
                logits = self.model(input_ids=ids[None], cache=self.states[lane], use_cache=True).logits
                total = total + F.cross_entropy(logits[0], targets, reduction="sum", label_smoothing=self.smoothing)
                count += int((targets >= 0).sum())
        return total, count

    def step(self, rows: Sequence[Row], span: int) -> tuple[float, Weights]:
        """Loss and gradients of an optimizer step that reads `rows`, one of each lane in turn."""
        read = [self.read(index % len(self.states), row, span) for index, row in enumerate(rows)]
        loss = torch.stack([total for total, _ in read]).sum() / max(sum(count for _, count in read), 1)
        parameters = dict(self.model.named_parameters())
        nothing = sum(parameter.sum() for parameter in parameters.values()) * 0  # a step may have no targets
        gradients = torch.autograd.grad(loss + nothing, list(parameters.values()))
        return loss.item(), dict(zip(parameters, gradients, strict=True))


def steps_of(dataset: LaneDataset, epochs: int, accumulation: int) -> Iterator[list[Row]]:
    """The rows of each optimizer step."""
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        rows, number = [dataset[index] for index in range(len(dataset))], dataset.num_lanes * accumulation
        yield from (rows[start : start + number] for start in range(0, len(rows), number))


def assert_is_naive(
    record: Record,
    lanes: int,
    *,
    chunks_per_step: int = 2,
    accumulation: int = 1,
    epochs: int = 1,
    spans: Iterable[int] | None = None,
    carries: bool = True,
    smoothing: float = 0,
) -> None:
    """Step by step, losses and gradients of the recorded weights are those of naive reading; `spans` for each step."""
    dataset = LaneDataset(documents(), lanes, 5, chunks_per_step)
    model = tiny_model(tiny_config(memory_solidifier="glu"))
    reader = NaiveReader(model, lanes, smoothing)
    steps = list(steps_of(dataset, epochs, accumulation))
    assert len(record.losses) == len(record.gradients) == len(steps)
    spans = [chunks_per_step] * len(steps) if spans is None else spans
    for rows, span, weights, loss, gradients in zip(
        steps, spans, record.weights, record.losses, record.gradients, strict=True
    ):
        model.load_state_dict(weights)
        if not carries:
            reader.states = [model.new_cache() for _ in range(lanes)]
        expected_loss, expected = reader.step(rows, span)
        assert loss == pytest.approx(expected_loss, rel=1e-6)  # Trainer adds up in float32
        assert_same(gradients, expected, **EXACT)


# Lanes are documents


@pytest.mark.parametrize(
    ("lanes", "accumulation"), [(1, 4), pytest.param(3, 1, marks=pytest.mark.smoke), (3, 4), (8, 1)]
)
def test_lanes_are_documents_read_one_by_one(tmp_path: Path, lanes: int, accumulation: int) -> None:
    """Over two epochs, with weights that change; also where lanes idle."""
    record = train(tmp_path, lanes=lanes, gradient_accumulation_steps=accumulation, num_train_epochs=2)
    assert_is_naive(record, lanes, accumulation=accumulation, epochs=2)


def test_steps_without_targets(tmp_path: Path) -> None:
    """A step that reads the last token of a document and nothing else changes nothing."""
    record = train(tmp_path, lanes=1, chunks_per_step=1, logging_nan_inf_filter=False)
    assert 0 in record.losses
    assert_is_naive(record, 1, chunks_per_step=1)


def test_a_tokenizer_does_not_touch_lanes(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """With one, Trainer would collate with padding and a mask."""
    trained = trainer(tmp_path, Record(), processing_class=tokenizer, max_steps=1)
    keys: list[set[str]] = []
    trained.model.register_forward_pre_hook(lambda *call: keys.append(set(call[2])), with_kwargs=True)
    trained.train()
    assert keys and all("attention_mask" not in names for names in keys)


def test_lanes_of_two_processes(tmp_path: Path) -> None:
    runs = {
        tmp_path / "1": dict(lanes=2, gradient_accumulation_steps=4),
        tmp_path / "3": dict(lanes=6, cuda_graphs=True),
        tmp_path / "pieces": dict(
            lanes=6, gradient_accumulation_steps=2, chunks_per_step=4, chunks_per_backward=3, eval_strategy="epoch"
        ),
        tmp_path / "local": dict(lanes=2, average_tokens_across_devices=False, eval_strategy="epoch"),
        tmp_path / "muon": MUON,
    }
    one, three, pieces, local, muon = in_processes(2, runs)
    assert_is_naive(one, 2, accumulation=4)
    assert_is_naive(three, 6)
    assert three.num_graphs == 1 and one.num_graphs == 0
    assert_is_naive(pieces, 6, accumulation=2, chunks_per_step=4, spans=[3] * len(pieces.losses))
    for record in (pieces, local):
        model = tiny_model(tiny_config(memory_solidifier="glu"))
        model.load_state_dict(record.final)
        scored = evaluate_documents(model, documents(), progress=False)
        assert record.eval_losses == [pytest.approx(scored["loss"], rel=1e-6)]
    assert_moved_alike(muon, train(tmp_path / "alone", **MUON))


# Killed and resumed

LANES: dict[str, dict[str, Any]] = {
    "random_pauses": dict(num_train_epochs=2, model=dict(pause_placement="random")),
    "accumulation": dict(num_train_epochs=4, gradient_accumulation_steps=2, max_grad_norm=1.0),
    "curriculum": dict(num_train_epochs=3, schedule={0: 1, 2: 2, 6: 4}, chunks_per_step=3),
}
STREAM: dict[str, Any] = dict(stream=True, max_steps=11, model=dict(pause_placement="random"))


@pytest.mark.parametrize(
    ("name", "step"), [("random_pauses", 3), ("accumulation", 9), ("curriculum", 4), ("stream", 8)]
)
def test_killed_and_resumed(tmp_path: Path, name: str, step: int) -> None:
    """Killed without warning in the first or a later epoch, two steps after the last checkpoint."""
    settings = (LANES | {"stream": STREAM})[name]
    saving = settings | dict(save_strategy="steps", save_steps=step)
    with pytest.raises(ProcessExitedException) as caught:
        in_processes(1, {tmp_path: saving | dict(kill_at=step + 2)})
    assert caught.value.signal_name == "SIGKILL"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    resumed = train(tmp_path, tmp_path / f"checkpoint-{step}", **saving)
    uninterrupted = train(tmp_path, **settings)
    assert len(resumed.losses) == len(uninterrupted.losses) - step
    assert_resumed(resumed, uninterrupted)


@pytest.mark.parametrize(("accumulation", "steps"), [(1, (1, 7, 8)), (2, (3, 4))])
def test_a_stream_resumes_after_any_step(tmp_path: Path, accumulation: int, steps: Sequence[int]) -> None:
    """Also after the last one of an epoch, the 7th; and only the documents in progress are tokenized again."""
    settings = STREAM | dict(gradient_accumulation_steps=accumulation)
    uninterrupted = train(tmp_path, save_strategy="steps", save_steps=1, **settings)
    assert len(uninterrupted.tokenized) > len(LENGTHS)  # there is a second epoch
    for step in steps:
        checkpoint = tmp_path / f"checkpoint-{step}"
        resumed = train(tmp_path / "resumed", checkpoint, **settings)
        assert_resumed(resumed, uninterrupted)
        about = json.loads((checkpoint / "lanes-rank-0" / "lanes.json").read_text())
        texts = Texts()
        texts.set_epoch(about["epoch"])
        taken = [document for document, _ in about["places"] if document >= 0]
        again = [text for document, text in enumerate(texts) if document in taken or document > max(taken)]
        assert resumed.tokenized[: len(again)] == again[: len(resumed.tokenized)]


@pytest.mark.parametrize("text", ["", '{"num_lanes": 4', "{}", "[]", "\udcff"])
def test_places_that_are_damaged_are_refused(tmp_path: Path, text: str) -> None:
    """As a full disk or a writer that was killed leaves them."""
    folder = tmp_path / "lanes-rank-0"
    folder.mkdir()
    (folder / "lanes.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=r"lanes\.json is damaged: resume from an earlier checkpoint\."):
        _about_lanes(str(tmp_path), 0)


def test_two_processes_killed_and_resumed(tmp_path: Path) -> None:
    lanes = dict(lanes=6, chunks_per_step=1, num_train_epochs=2, model=dict(pause_placement="random"))
    stream = STREAM | dict(lanes=6, chunks_per_step=1, max_steps=14, gradient_accumulation_steps=2)
    sharded = stream | dict(accelerator_config=dict(dispatch_batches=False))
    saving = dict(save_strategy="steps", save_steps=5)
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        in_processes(2, {tmp_path / "lanes": lanes | saving | dict(kill_at=7)})
    checkpoint = tmp_path / "lanes" / "checkpoint-5"
    assert {path.name for path in checkpoint.glob("lanes-*")} == {"lanes-rank-0", "lanes-rank-1"}
    runs = {
        "lanes": lanes | saving | dict(resume=checkpoint),
        "lanes-whole": lanes,
        "stream-whole": stream | saving,
        "stream": stream | dict(resume=tmp_path / "stream-whole" / "checkpoint-5"),
        "sharded-whole": sharded | saving,
        "sharded": sharded | dict(resume=tmp_path / "sharded-whole" / "checkpoint-10"),
    }
    records = dict(zip(runs, in_processes(2, {tmp_path / name: run for name, run in runs.items()}), strict=True))
    for name in ("lanes", "stream", "sharded"):
        assert_resumed(records[name], records[f"{name}-whole"])
    assert records["stream-whole"].losses == records["sharded-whole"].losses


# Evaluation


def test_evaluation_between_steps_changes_nothing(tmp_path: Path) -> None:
    plain = train(tmp_path)
    evaluated = train(tmp_path, eval_strategy="steps", eval_steps=1)
    assert len(evaluated.eval_losses) == len(plain.losses) == len(evaluated.losses)
    assert_same(evaluated.final, plain.final)


@pytest.mark.parametrize("lanes", [1, pytest.param(3, marks=pytest.mark.smoke), 8])
@pytest.mark.parametrize("carries", [True, False])
def test_evaluation_is_that_of_whole_documents(tmp_path: Path, lanes: int, carries: bool) -> None:
    """The mean over all tokens, with memory from the first to the last, unless memory is not to be carried."""
    evaluation = trainer(tmp_path, Record(), lanes=lanes, carry_memory=carries, chunks_per_step=3)
    expected = evaluate_documents(evaluation.model, documents(), progress=False)["loss"]
    for _ in range(2):
        found = evaluation.evaluate()["eval_loss"]
        assert (found == pytest.approx(expected, rel=1e-6)) is carries


def samples(number: int = 6, length: int = 13) -> list[Row]:
    texts = random_tokens(tiny_config(), number, length, seed=3)
    return [dict(input_ids=text, labels=text) for text in texts]


def test_evaluation_of_lanes_and_of_ordinary_samples(tmp_path: Path) -> None:
    """Side by side, between steps of lanes; and with logits that a metric can see."""
    evaluation = trainer(tmp_path, Record(), eval_strategy="steps", eval_steps=2, max_steps=4)
    evaluation.eval_dataset = {"lanes": evaluation.eval_dataset, "samples": samples()}
    evaluation.train()
    assert_same(weights_of(evaluation.model), train(tmp_path, max_steps=4).final)

    found = evaluation.evaluate()
    texts = torch.stack([sample["input_ids"] for sample in samples()])
    with torch.no_grad():
        logits = evaluation.model(texts).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), texts[:, 1:].flatten())
    assert found["eval_samples_loss"] == pytest.approx(loss.item(), rel=1e-6)
    scored = evaluate_documents(evaluation.model, documents(), progress=False)
    assert found["eval_lanes_loss"] == pytest.approx(scored["loss"], rel=1e-6)

    predicted = evaluation.predict(samples())
    assert_close(torch.from_numpy(predicted.predictions), logits)
    assert predicted.label_ids.tolist() == texts.tolist()


# Without memory from step to step


def test_memory_that_is_not_carried(tmp_path: Path) -> None:
    """Each step begins with an empty state."""
    assert_is_naive(train(tmp_path, carry_memory=False), 3, carries=False)


@pytest.mark.parametrize("chunks", [None, 1, 3])
def test_memory_that_is_not_carried_still_goes_from_piece_to_piece(tmp_path: Path, chunks: int | None) -> None:
    record = train(tmp_path, carry_memory=False, chunks_per_step=5, chunks_per_backward=chunks)
    assert_is_naive(record, 3, chunks_per_step=5, carries=False, spans=[chunks or 5] * len(record.losses))


def test_the_stock_trainer_reads_lanes_too(tmp_path: Path) -> None:
    record = train(tmp_path, trainer_class=Trainer, remove_unused_columns=False, train_sampling_strategy="sequential")
    assert_is_naive(record, 3, carries=False)


# Gradients over a part of the step


@pytest.mark.parametrize("chunks", [1, pytest.param(3, marks=pytest.mark.smoke), 4, 9])
def test_chunks_per_backward(tmp_path: Path, chunks: int) -> None:
    record = train(tmp_path, chunks_per_step=4, chunks_per_backward=chunks, gradient_accumulation_steps=2)
    spans = [chunks] * len(record.losses)
    assert_is_naive(record, 3, chunks_per_step=4, accumulation=2, spans=spans)


def test_a_curriculum(tmp_path: Path) -> None:
    """Each step at its level, also in a resumed run; as many steps on the same tokens as without."""
    schedule = {3: 2, 0: 1, 5: 3}
    settings = dict(chunks_per_step=3, num_train_epochs=2, save_strategy="steps", save_steps=4)
    record = train(tmp_path, schedule=schedule, **settings)
    assert_is_naive(record, 3, chunks_per_step=3, epochs=2, spans=[1, 1, 1, 2, 2, 3, 3, 3, 3, 3])
    resumed = train(tmp_path / "resumed", tmp_path / "checkpoint-4", schedule=schedule, **settings)
    assert_resumed(resumed, record)


SMOOTHING = 0.3


def shifting_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss as Trainer's documentation has it, from labels that are not shifted."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=SMOOTHING)
    return total / ((targets >= 0).sum() if num_items_in_batch is None else num_items_in_batch)


# The same loss in two ways: the settings of a trainer.
SMOOTHED: dict[str, dict[str, Any]] = {
    "smoothing": dict(label_smoothing_factor=SMOOTHING),
    "function": dict(trainer_class=partial(BakaTrainer, compute_loss_func=shifting_loss)),
}


@pytest.mark.parametrize(
    ("loss", "padded", "chunks"),
    [("plain", padded, chunks) for padded in (False, True) for chunks in (1, 2, 3, None)]
    + [(loss, *rest) for loss in SMOOTHED for rest in ((False, 1), (True, 2), (True, None))],
)
def test_chunks_per_backward_of_ordinary_samples(tmp_path: Path, loss: str, padded: bool, chunks: int | None) -> None:
    """Samples with labels alone, or padded left: the gradients of each read alone, cut where the batch is."""
    settings, smoothing = SMOOTHED.get(loss, {}), SMOOTHING * (loss != "plain")
    batch, lengths = [], (13, 4, 9, 13, 11, 7)
    for sample, length in zip(samples(), lengths if padded else [13] * 6, strict=True):
        padding = torch.arange(13) < 13 - length
        ids, first = sample["input_ids"], 13 - length
        labels = ids.masked_fill(padding, -100).index_fill(0, torch.tensor([first]), -100)  # nothing predicts the first
        mask = dict(attention_mask=(~padding).long()) if padded else {}
        batch.append(dict(input_ids=ids, labels=labels, **mask))
    record = Record()
    settings = settings | dict(max_steps=2, per_device_train_batch_size=3)
    trained = trainer(tmp_path, record, chunks_per_backward=chunks, **settings)
    trained.train_dataset, trained.args.train_sampling_strategy = batch, "sequential"
    trained.train()

    model = tiny_model(tiny_config(memory_solidifier="glu")).train()
    for step, (weights, gradients) in enumerate(zip(record.weights, record.gradients, strict=True)):
        model.load_state_dict(weights)
        total, count = torch.zeros((), dtype=torch.float64), 0
        for sample in batch[3 * step : 3 * step + 3]:
            state, targets = model.new_cache(), F.pad(sample["labels"], (0, 1), value=-100)[1:]
            real = sample.get("attention_mask", torch.ones(13)) > 0
            for start in range(0, 13, 5 * chunks if chunks else 13):
                part = slice(start, start + 5 * chunks if chunks else 13)
                if real[part].any():
                    ids = sample["input_ids"][part][real[part]]
                    logits = model(input_ids=ids[None], cache=state.detach_(), use_cache=True).logits[0]
                    expected = targets[part][real[part]]
                    total = total + F.cross_entropy(logits, expected, reduction="sum", label_smoothing=smoothing)
            count += int((targets >= 0).sum())
        found = torch.autograd.grad(total / count, list(model.parameters()))
        names = [name for name, _ in model.named_parameters()]
        assert_same(gradients, dict(zip(names, found, strict=True)), **EXACT)


@pytest.mark.parametrize("chunks", [None, 1])
@pytest.mark.parametrize("loss", SMOOTHED)
def test_smoothed_losses_of_lanes(tmp_path: Path, chunks: int | None, loss: str) -> None:
    """Over targets that may lie in the next piece or the next step, and never in the next document."""
    record = train(tmp_path, chunks_per_backward=chunks, gradient_accumulation_steps=2, **SMOOTHED[loss])
    spans = [chunks or 2] * len(record.losses)
    assert_is_naive(record, 3, accumulation=2, spans=spans, smoothing=SMOOTHING)


@pytest.mark.parametrize("loss", SMOOTHED)
def test_smoothed_evaluation_of_lanes(tmp_path: Path, loss: str) -> None:
    evaluated = trainer(tmp_path, Record(), **SMOOTHED[loss])
    total, count, model = 0.0, 0, evaluated.model
    with torch.no_grad():
        for document in documents():
            ids = torch.tensor(document)
            logits = model(ids[None]).logits[0, :-1]
            total += F.cross_entropy(logits, ids[1:], reduction="sum", label_smoothing=SMOOTHING).item()
            count += len(ids) - 1
    assert evaluated.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("chunks", [None, 1])
@pytest.mark.parametrize("loss", ["plain", *SMOOTHED])
def test_targets_without_labels(tmp_path: Path, chunks: int | None, loss: str) -> None:
    """`shift_labels` alone are counted over all batches of a step, as labels are."""
    batch = [{"input_ids": row["input_ids"], "shift_labels": row["labels"].roll(-1)} for row in samples()]
    batch[0]["shift_labels"][3:] = -100
    record, settings = Record(), dict(per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=1)
    settings |= dict(chunks_per_backward=chunks, remove_unused_columns=False) | SMOOTHED.get(loss, {})
    trained = trainer(tmp_path, record, **settings)
    trained.train_dataset = batch
    ids, targets = (torch.stack([sample[name] for sample in batch]) for name in ("input_ids", "shift_labels"))
    with torch.no_grad():
        logits = trained.model(ids).logits.flatten(0, 1)
    smoothing = SMOOTHING * (loss != "plain")
    trained.train()
    assert record.losses[0] == pytest.approx(
        F.cross_entropy(logits, targets.flatten(), label_smoothing=smoothing).item(), rel=1e-6
    )


@pytest.mark.parametrize("chunks", [1, 2])
def test_pieces_of_a_classifier(tmp_path: Path, chunks: int) -> None:
    """Its loss comes once a text, wherever that ends: not in every piece."""
    model = BakaForSequenceClassification(tiny_config())
    rows = [dict(input_ids=sample["input_ids"], labels=torch.tensor(1)) for sample in samples()]
    args = BakaTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], chunks_per_backward=chunks)
    message = f"a target at every token for chunks_per_backward={chunks}, got BakaForSequenceClassification"
    with pytest.raises(ValueError, match=message):
        BakaTrainer(model, args, train_dataset=rows).train()


def test_a_packed_document_that_begins_with_a_piece(tmp_path: Path) -> None:
    """Two documents of two chunks in a sample: in pieces of two chunks the gradient is that of the whole."""
    ids, positions = random_tokens(tiny_config(), 20), torch.arange(20) % 10
    targets = ids.roll(-1).index_fill(0, torch.tensor([9, 19]), -100)
    sample = dict(input_ids=ids, labels=ids, position_ids=positions, shift_labels=targets)
    records = []
    for chunks in (None, 2):
        records.append(Record())
        trained = trainer(tmp_path, records[-1], chunks_per_backward=chunks, max_steps=1, per_device_train_batch_size=1)
        trained.train_dataset = [sample]
        trained.train()
    assert_same(records[1].gradients[0], records[0].gradients[0], rtol=1e-5, atol=1e-6)


def test_tokens_are_not_shown(tmp_path: Path) -> None:
    arguments = BakaTrainingArguments(str(tmp_path), hub_token="hf_secret")
    assert "hf_secret" not in repr(arguments) + str(arguments) and "hub_token=<HUB_TOKEN>" in repr(arguments)


@pytest.mark.parametrize("chunks", [0, -1, 1.0, True, "2"])
def test_bad_chunks_per_backward(tmp_path: Path, chunks: Any) -> None:
    with pytest.raises(ValueError, match=f"`chunks_per_backward` must be an integer of at least 1, got {chunks!r}"):
        BakaTrainingArguments(str(tmp_path), chunks_per_backward=chunks)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({}, "a schedule that begins at step 0, got {}"),
        ({1: 1}, "a schedule that begins at step 0, got {1: 1}"),
        ({0: 1, -1: 2}, "got {-1: 2}"),
        ({0: 0}, "chunks of at least 1, got {0: 0}"),
        ({0: 1, 10: 1.5}, "got {10: 1.5}"),
        ({0: 1, 0.5: 2}, "got {0.5: 2}"),
        ({0: 1, 5: True}, "got {5: True}"),
    ],
)
def test_bad_schedules(schedule: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChunkCurriculum(schedule)


@pytest.mark.parametrize("stream", [False, True])
def test_where_documents_begin_is_known_on_the_host(tmp_path: Path, stream: bool) -> None:
    """In training it is found in batches that are not yet on the device, but for those that accelerate deals out."""
    known = []

    class Watching(BakaTrainer):
        def _state_for(self, inputs: dict[str, Any], positions: Any) -> Any:
            assert positions is None or (positions == inputs["position_ids"].numpy()).all()
            known.append((self.model.training, positions is not None))
            return super()._state_for(inputs, positions)

    settings = dict(trainer_class=Watching, chunks_per_backward=1, max_steps=7)
    watching = trainer(tmp_path, Record(), stream=stream, **settings)
    assert stream or watching.get_train_dataloader().device is None
    watching.train()
    assert len(known) > 10 and all(is_known for is_training, is_known in known if is_training)


# Memory and precision


@pytest.mark.parametrize("granularity", [pytest.param("chunk", marks=pytest.mark.smoke), "layer"])
@pytest.mark.parametrize("chunks", [None, 2])
def test_gradient_checkpointing(tmp_path: Path, granularity: str, chunks: int | None) -> None:
    settings = dict(chunks_per_step=3, chunks_per_backward=chunks)
    arguments = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"granularity": granularity}}
    checkpointed = trainer(tmp_path, Record(), **settings, **arguments)
    checkpointed.train()
    assert checkpointed.model.model.checkpoints_chunks is (granularity == "chunk")
    assert checkpointed.model.model.layers[0].gradient_checkpointing is (granularity == "layer")
    assert_same(weights_of(checkpointed.model), train(tmp_path, **settings).final, rtol=1e-6, atol=1e-8)


def test_bf16(tmp_path: Path) -> None:
    """Mixed precision stays finite and learns, with a state that is carried; the weights stay float32."""
    record = train(tmp_path, bf16=True, dtype=torch.float32, num_train_epochs=4)
    exact = train(tmp_path, dtype=torch.float32, num_train_epochs=4)
    assert all(math.isfinite(loss) for loss in record.losses)
    assert sum(record.losses[-7:]) < 0.9 * sum(record.losses[:7])
    assert record.losses != exact.losses and record.losses == pytest.approx(exact.losses, rel=0.1)
    for name, tensor in record.final.items():
        assert tensor.dtype == torch.float32 and torch.isfinite(tensor).all(), name


@pytest.mark.smoke
def test_no_logits_while_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and the evaluation of losses never hold the logits of a batch."""
    shapes = []
    trained = trainer(tmp_path, Record(), eval_strategy="epoch")
    trained.model.register_forward_hook(lambda model, inputs, outputs: shapes.append(outputs.logits))
    trained.train()
    assert shapes and all(logits is None for logits in shapes)


# Sharded


@pytest.mark.parametrize("policy", ["TRANSFORMER_BASED_WRAP", "NO_WRAP"])
def test_sharded_by_the_example_configuration(tmp_path: Path, policy: str) -> None:
    """Two processes with FSDP2: weights and losses of one process; saved whole, and resumed."""
    options = launched("fsdp2.yaml")
    options.fsdp_auto_wrap_policy = policy
    options.mixed_precision = "no"
    environment = {name: value for name, value in prepare_multi_gpu_env(options).items() if "FSDP" in name}
    assert environment["FSDP_VERSION"] == "2" and environment["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "BakaDecoderLayer"
    whole = dict(lanes=2, save_strategy="steps", save_steps=5, max_grad_norm=1.0)
    pieces = dict(lanes=6, gradient_accumulation_steps=2, chunks_per_step=4, chunks_per_backward=3, max_grad_norm=1.0)
    pieces |= dict(eval_strategy="epoch", num_train_epochs=2)
    recomputed = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"granularity": "chunk"}}
    runs = {
        "whole": whole,
        "resumed": whole | dict(resume=tmp_path / "whole" / "checkpoint-5", cuda_graphs=True),  # of shards are none
        "pieces": pieces | recomputed,
        "compiled": whole | dict(torch_compile=True, torch_compile_backend="aot_eager"),
        "muon": MUON | dict(save_strategy="steps", save_steps=3),
        "muon-resumed": MUON | dict(resume=tmp_path / "muon" / "checkpoint-3"),
    }
    runs = {name: run | dict(trainer_class=ShardingTrainer) for name, run in runs.items()}
    sharded = dict(
        zip(runs, in_processes(2, {tmp_path / name: run for name, run in runs.items()}, environment), strict=True)
    )

    assert_resumed(sharded["resumed"], sharded["whole"])
    assert_resumed(sharded["muon-resumed"], sharded["muon"])
    assert_moved_alike(sharded["muon"], train(tmp_path / "alone", **MUON))
    assert sharded["compiled"].num_in_parts > 0 == sharded["whole"].num_in_parts
    for name, settings in (("whole", whole), ("pieces", pieces), ("compiled", whole)):
        expected = train(tmp_path / "one", **settings)
        assert sharded[name].losses == pytest.approx(expected.losses, rel=1e-6)
        assert sharded[name].eval_losses == pytest.approx(expected.eval_losses, rel=1e-6)
        assert_same(sharded[name].final, expected.final, rtol=1e-6, atol=1e-8)
    checkpoint = tmp_path / "whole" / "checkpoint-10"
    assert_same(weights_of(BakaForCausalLM.from_pretrained(checkpoint)), sharded["whole"].final)
    code = {path.name for path in (Path(__file__).parents[1] / "src" / "baka_hf").glob("*_baka.py")}
    assert {path.name for path in checkpoint.glob("*.py")} == code
    auto_map = json.loads((checkpoint / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_baka.BakaForCausalLM"


def test_the_example_configurations() -> None:
    """They leave nothing to ask for: two GPUs of one machine, in bf16."""
    plain, sharded = launched("ddp.yaml"), launched("fsdp2.yaml")
    for options in (plain, sharded):
        assert (options.num_processes, options.num_machines, options.mixed_precision) == (2, 1, "bf16")
        assert not options.use_cpu
    assert plain.multi_gpu and not plain.use_fsdp
    assert sharded.use_fsdp and int(sharded.fsdp_version) == 2 and not sharded.multi_gpu
    assert sharded.fsdp_state_dict_type == "FULL_STATE_DICT"  # what `from_pretrained` can read


# What does not fit


@pytest.mark.parametrize("stream", [False, True])
def test_lanes_cut_for_another_model(tmp_path: Path, stream: bool) -> None:
    other = trainer(tmp_path, Record(), stream=stream, max_steps=1, model=dict(chunk_size=7))
    trained = trainer(tmp_path, Record())
    message = "cut for the model's chunk_size=5, got chunk_size=7"
    with pytest.raises(ValueError, match=message):
        trained.evaluate(other.eval_dataset)
    trained.train_dataset = other.train_dataset
    with pytest.raises(ValueError, match=message):
        trained.train()


@dataclass
class Spoil(TrainerCallback):
    """Puts NaN into the memory of a lane before a step."""

    trained: BakaTrainer
    step: int
    lane: int

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.trained._groups[0].state.memory[self.lane] = math.nan


@pytest.mark.parametrize(("step", "tokens"), [(2, 10), (4, 30)])
def test_a_state_that_is_not_finite(tmp_path: Path, step: int, tokens: int) -> None:
    """The step stops, with weights and optimizer as they were, and says where; also if the document ends in it."""
    record = Record()
    trained = trainer(tmp_path, record)
    trained.add_callback(Spoil(trained, step, lane=1))
    with pytest.raises(
        ValueError, match=rf"infinity in lane 1 in document 5 after {tokens} tokens\. Nothing was learned"
    ):
        trained.train()
    assert trained.state.global_step == len(record.losses) == step
    assert all(weight.isfinite().all() for weight in weights_of(trained.model).values())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chunks", [None, 1])
def test_a_text_that_overflows(tmp_path: Path, stream: bool, chunks: int | None) -> None:
    """A token of one document that gives infinity, in the very step that reads it, and in evaluation."""
    trained = trainer(tmp_path, Record(), stream=stream, chunks_per_backward=chunks, max_steps=9)
    with torch.no_grad():
        trained.model.model.embed_tokens.weight[18] = math.inf
    before = weights_of(trained.model)
    for read in (trained.train, trained.evaluate):
        with pytest.raises(ValueError, match=r"expected finite memory.* got NaN or infinity in lane \d in document "):
            read()
    assert_same(weights_of(trained.model), before)


@pytest.mark.parametrize("chunks", [None, 1])
def test_a_loss_that_is_not_finite(tmp_path: Path, chunks: int | None) -> None:
    """A document that overflows and ends within the step leaves a finite state, for the next one has begun."""
    trained = trainer(tmp_path, Record(), lanes=1, chunks_per_backward=chunks, max_steps=2)
    trained.train_dataset = LaneDataset([[3, 4, 18, 5, 6], [3, 4, 5, 6, 7]], 1, 5, 2, shuffle=False)
    with torch.no_grad():
        trained.model.model.embed_tokens.weight[18] = math.inf
    before = weights_of(trained.model)
    expected = "expected a finite loss, got NaN or infinity from lanes 0. Nothing was learned"
    with pytest.raises(ValueError, match=expected if chunks is None else "expected finite memory.* in lane 0"):
        trained.train()
    assert_same(weights_of(trained.model), before)


@pytest.mark.parametrize(
    ("lengths", "place"),
    [
        ([5, 5], "in or before document 1"),  # another has begun
        ([5], "in or before document 0"),  # the lane idles
        ([10], "in document 0 after 10 tokens"),
    ],
    ids=str,
)
def test_a_piece_of_a_step_that_overflows(tmp_path: Path, lengths: list[int], place: str) -> None:
    """The document in which the lane stands after the step is named for what it is."""
    trained = trainer(tmp_path, Record(), lanes=1, chunks_per_backward=1, max_steps=2)
    documents = [[3] * length for length in lengths]
    documents[0][2] = 18
    trained.train_dataset = LaneDataset(documents, 1, 5, 2, shuffle=False)
    with torch.no_grad():
        trained.model.model.embed_tokens.weight[18] = math.inf
    with pytest.raises(ValueError, match=rf"infinity in lane 0 {place}\. Nothing was learned"):
        trained.train()


@pytest.mark.parametrize("carries", [True, False])
def test_losses_are_looked_at_once(tmp_path: Path, carries: bool) -> None:
    """Trainer's own look at each is for what no lane refuses."""
    trained = trainer(tmp_path, Record(), max_steps=1, carry_memory=carries)
    assert trained.args.logging_nan_inf_filter
    trained.train()
    assert trained.args.logging_nan_inf_filter != carries


def test_code_of_a_checkpoint_is_given_tensors(tmp_path: Path) -> None:
    """It may be older than this package; our own code is given positions where it looks at them, on the host."""
    tiny_model(tiny_config()).save_pretrained(tmp_path / "model")
    remote = get_class_from_dynamic_module("modeling_baka.BakaForCausalLM", str(tmp_path / "model"))
    given: list[Any] = []
    for model_class, kind in ((BakaForCausalLM, np.ndarray), (remote, Tensor)):
        model = model_class.from_pretrained(tmp_path / "model")
        given.clear()
        model.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs["position_ids"]), with_kwargs=True)
        arguments = BakaTrainingArguments(tmp_path, per_device_train_batch_size=2, max_steps=2, report_to="none")
        BakaTrainer(model, arguments, train_dataset=LaneDataset(documents(), 2, 5, 2)).train()
        assert len(given) == 2 and all(isinstance(positions, kind) for positions in given)


def test_as_many_lanes_as_rows(tmp_path: Path) -> None:
    for rows, message in (
        (2, "expected 2 lanes, one for each of the 2 rows of 1 process.*got num_lanes=3"),
        (4, "4 l"),
    ):
        sizes = dict(per_device_train_batch_size=rows, per_device_eval_batch_size=rows)
        for stream in (False, True):
            with pytest.raises(ValueError, match=message):
                train(tmp_path, stream=stream, max_steps=2, **sizes)
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, Record(), **sizes).evaluate()
    several = trainer(tmp_path, Record())
    several.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"expected one device per process, got 2 \(nn.DataParallel\)"):
        several.train()


@pytest.mark.parametrize("stream", [False, True])
def test_checkpoints_of_other_lanes_or_without_a_state(tmp_path: Path, stream: bool) -> None:
    settings = dict(stream=stream, max_steps=2, save_strategy="steps", save_steps=1)
    train(tmp_path, **settings)
    checkpoint = tmp_path / "checkpoint-1"
    with pytest.raises(ValueError, match=r"expected a checkpoint of 2 lanes, .*checkpoint-1 was saved with 3"):
        train(tmp_path / "2", checkpoint, lanes=2, **settings)
    (checkpoint / "lanes-rank-0").rename(checkpoint / "lanes-rank-1")  # what another process would find
    with pytest.raises(ValueError, match=r"the state of lanes in .*lanes-rank-0, found none: .* not saved by a BakaT"):
        train(tmp_path / "2", checkpoint, **settings)
    train(tmp_path / "2", checkpoint, carry_memory=False, **settings)  # needs none


class Stopped(BakaTrainer):
    """Is killed as it writes its third checkpoint, the lanes' state being there."""

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        super().save_model(*args, **kwargs)


def test_killed_while_it_saves(tmp_path: Path) -> None:
    """The last complete checkpoint is found, and one that is not is named if asked for."""
    settings = dict(max_steps=5, save_strategy="steps", save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, Record(), trainer_class=Stopped, **settings).train()
    torn = tmp_path / "checkpoint-3"
    assert [path.name for path in torn.iterdir()] == ["lanes-rank-0"]
    with pytest.raises(ValueError, match=r"expected a complete checkpoint, got .*checkpoint-3 without"):
        train(tmp_path, torn, **settings)
    record = Record()
    with CaptureLogger(training.logger) as log:
        trainer(tmp_path, record, **settings).train(resume_from_checkpoint=True)
    assert "checkpoint-3 is not complete" in log.out and "checkpoint-2 is" not in log.out
    assert record.losses == train(tmp_path / "whole", max_steps=5).losses[2:]

    (torn / "trainer_state.json").write_text("{")  # half of it
    for path in tmp_path.glob("checkpoint-*"):
        if path != torn:
            shutil.rmtree(path)
    with pytest.raises(ValueError, match=r"expected a complete checkpoint in .*, found none"):
        trainer(tmp_path, Record(), **settings).train(resume_from_checkpoint=True)


def test_a_checkpoint_written_over_is_not_complete(tmp_path: Path) -> None:
    """A run in the folder of an earlier one, whose third checkpoint is complete."""
    settings = dict(max_steps=3, save_strategy="steps", save_steps=3)
    train(tmp_path, **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, Record(), trainer_class=Stopped, **settings).train()
    with pytest.raises(ValueError, match=r"expected a complete checkpoint in .*, found none"):
        trainer(tmp_path, Record(), **settings).train(resume_from_checkpoint=True)


def test_lanes_where_writing_costs(tmp_path: Path) -> None:
    """The first step's loss is that of lanes where it costs nothing, and the cost of what was written."""
    losses = []
    for cost in (0.0, 0.5):
        model = tiny_model(tiny_config(associative_dim=3, associative_write_cost=cost), torch.float32)
        lanes = LaneDataset([random_tokens(model.config, 40, seed=seed).tolist() for seed in range(4)], 2, 5, 2)
        args = BakaTrainingArguments(str(tmp_path), 2, max_steps=1, logging_steps=1, report_to="none", use_cpu=True)
        trained = BakaTrainer(model, args, train_dataset=lanes)
        strengths: list[Tensor] = []
        model.register_forward_hook(lambda module, inputs, outputs, kept=strengths: kept.append(outputs.write_strength))
        trained.train()
        losses.append(trained.state.log_history[0]["loss"])
    assert losses[1] - losses[0] == pytest.approx(0.5 * strengths[0].item(), abs=1e-3)


def test_rows_of_embeddings(tmp_path: Path) -> None:
    """Rows without a state are the stock Trainer's, ids or not."""
    losses = []
    for kind, arguments in ((Trainer, TrainingArguments), (BakaTrainer, BakaTrainingArguments)):
        model = tiny_model(tiny_config(), torch.float32)
        torch.manual_seed(0)
        tokens = random_tokens(model.config, 4, 9)
        rows = [dict(inputs_embeds=torch.randn(9, model.config.hidden_size), labels=row) for row in tokens]
        args = arguments(str(tmp_path), max_steps=2, logging_steps=1, report_to="none", use_cpu=True)
        trained = kind(model, args, train_dataset=rows)
        trained.train()
        losses.append([entry["loss"] for entry in trained.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 2
