"""The tools around a model: loggers of the Trainer, pipelines, classification of long texts, progress bars."""

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from saving import byte_tokenizer, save_checkpoint
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

from baka_hf.calls_baka import CACHE_NAME
from baka_hf.data import StreamingLanes
from baka_hf.tasks import BabiInBooksDataset

# ---- loggers ----

# In a process of its own: trackio reads its environment when it is imported.
TRAIN = """
import json, sys
from pathlib import Path
from saving import save_checkpoint
from baka_hf.data import LaneDataset
from baka_hf.training import BakaTrainer, BakaTrainingArguments
folder = Path(sys.argv[1])
lanes = LaneDataset([[5 + i % 7 for i in range(60)]] * 4, num_lanes=2, chunk_size=5, chunks_per_step=2)
args = BakaTrainingArguments(
    str(folder), run_name="first", project="lanes", report_to=["tensorboard", "trackio"],
    per_device_train_batch_size=2, per_device_eval_batch_size=2, max_steps=6, logging_steps=2,
    eval_strategy="steps", eval_steps=3, save_strategy="no", use_cpu=True, disable_tqdm=True,
    dataloader_pin_memory=False,
)
trainer = BakaTrainer(save_checkpoint(folder / "checkpoint"), args, train_dataset=lanes, eval_dataset=lanes)
trainer.train()
(folder / "history.json").write_text(json.dumps(trainer.state.log_history))
"""


def test_tensorboard_and_trackio(tmp_path: Path) -> None:
    """Both hold the losses that the Trainer itself keeps, in local files; trackio is asked by its own command."""
    pytest.importorskip("tensorboard")
    pytest.importorskip("trackio")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def run(*arguments: str) -> str:
        variables = {"PYTHONPATH": os.pathsep.join(sys.path), "TRACKIO_DIR": str(tmp_path / "trackio")}
        command, environment = [sys.executable, *arguments], os.environ | variables
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("-c", TRAIN, str(tmp_path))
    history = json.loads((tmp_path / "history.json").read_text())
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for name, tag, steps in (("loss", "train/loss", [2, 4, 6]), ("eval_loss", "eval/loss", [3, 6])):
        losses = [log[name] for log in history if name in log]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == [
            (step, pytest.approx(loss)) for step, loss in zip(steps, losses, strict=True)
        ]
        asked = run("-m", "trackio.cli", *f"get metric --project lanes --run first --metric {tag} --json".split())
        values = [point["value"] for point in json.loads(asked[asked.index("{") :])["values"]]
        assert values == pytest.approx(losses)


# ---- pipelines ----

PROMPTS = ["The river runs by the mill", "Where?", "The miller's daughter keeps the key of the gate"]


@contextmanager
def caught() -> Iterator[list[str]]:
    """Warnings of Python and of transformers' loggers, also those that are given once in a process."""
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler, logger = Handler(logging.WARNING), logging.getLogger("transformers")
    transformers.utils.logging.warning_once.cache_clear()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as python:
            warnings.simplefilter("always")
            yield found
        found += [str(warning.message) for warning in python]
    finally:
        logger.removeHandler(handler)


def speak(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """What a checkpoint's pipeline says to the prompts one by one and in a batch, and what it warns of."""
    options = dict(max_new_tokens=24, do_sample=False, return_full_text=False)
    with caught() as found:
        generator = pipeline("text-generation", model=str(folder), device="cpu", trust_remote_code=True)
        alone = [generator(prompt, **options)[0]["generated_text"] for prompt in PROMPTS]
        batched = [answer[0]["generated_text"] for answer in generator(PROMPTS, batch_size=3, **options)]
        generator(PROMPTS[0])
    return alone, batched, found


@pytest.mark.smoke
def test_text_generation(tmp_path: Path) -> None:
    """Single and batched, what `generate` says, without a warning."""
    model = save_checkpoint(tmp_path)
    alone, batched, found = speak(tmp_path)
    tokenizer = byte_tokenizer()
    for prompt, *answers in zip(PROMPTS, alone, batched, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        assert answers == [tokenizer.decode(output[0, inputs.input_ids.shape[1] :])] * 2
    if CACHE_NAME == "cache":
        assert found == []
    else:
        # Older pipelines warn of what they do themselves, whatever the model.
        sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        config = LlamaConfig(vocab_size=len(tokenizer), **sizes, **special_ids(tokenizer))
        LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
        tokenizer.save_pretrained(tmp_path / "llama")
        assert found == speak(tmp_path / "llama")[2]


def special_ids(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[str, int]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


@pytest.mark.smoke
def test_a_batch_without_padding_is_warned_of(tmp_path: Path) -> None:
    """A checkpoint must have a `pad_token_id` of its own lest `generate` warns of a batch without a mask."""
    tokens = torch.tensor([[5, 6], [7, 8]])
    for pad_token_id, warns in ((None, True), (0, True), (1, False)):
        model = save_checkpoint(tmp_path, pad_token_id=pad_token_id)
        with caught() as found:
            model.generate(tokens, max_new_tokens=2)
        assert bool(found) == warns and all("attention mask" in message for message in found)


# ---- classification ----


@pytest.mark.parametrize("num_memory_tokens", [2, 0])
def test_long_texts_are_classified_by_how_they_begin(num_memory_tokens: int, tmp_path: Path) -> None:
    """A language model's checkpoint is fine-tuned with the stock Trainer, saved with its tokenizer, and read back by a
    pipeline. The label stands in the first of seven chunks and more, and only memory leads to the last."""
    tokenizer, generator = byte_tokenizer(), torch.Generator().manual_seed(0)
    sizes = dict(hidden_size=24, intermediate_size=48, use_xl_cache=False, num_memory_tokens=num_memory_tokens)
    save_checkpoint(tmp_path / "language", **sizes)
    names, texts = ["glad", "sad"], []
    for index in range(576):
        length = int(torch.randint(32, 40, (), generator=generator))
        letters = torch.randint(ord("a"), ord("z") + 1, (length,), generator=generator)
        texts.append("+-"[index % 2] + "".join(map(chr, letters)))
    samples = [{**tokenizer(text), "label": index % 2} for index, text in enumerate(texts)]
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "language", num_labels=2, id2label=dict(enumerate(names))
    )
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=16,
        num_train_epochs=5,
        learning_rate=5e-3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    collator = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(model, args, train_dataset=samples[:512], processing_class=tokenizer, data_collator=collator)
    trainer.train()
    trainer.save_model(tmp_path / "classifier")

    with caught() as found:
        classify = pipeline("text-classification", model=str(tmp_path / "classifier"), device="cpu")
        verdicts = [verdict["label"] for verdict in classify(texts[512:], batch_size=8)]
    assert found == []
    right = sum(verdict == names[index % 2] for index, verdict in enumerate(verdicts)) / len(verdicts)
    assert right > 0.9 if num_memory_tokens else right < 0.75
    predictions = trainer.predict(samples[512:]).predictions.argmax(-1)
    assert verdicts == [names[prediction] for prediction in predictions]


# ---- progress bars ----


def test_what_takes_long_shows_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Tokenizing books, and passing over the documents that a resumed stream has read."""
    monkeypatch.setattr("baka_hf.tasks.SECONDS_UNTIL_PROGRESS", 0.0)
    monkeypatch.setattr("baka_hf.data.SECONDS_UNTIL_PROGRESS", 0.0)
    (tmp_path / "qa.txt").write_text("1 Mary is here.\n2 Where is Mary? \there\t1\n")
    BabiInBooksDataset(byte_tokenizer(), tmp_path / "qa.txt", ["One. Two. Three. " * 20] * 3, length=100)
    error = capsys.readouterr().err
    assert "Tokenizing: 100%" in error and " 3/3 " in error

    lanes = StreamingLanes([[1, 2, 3]] * 9, num_lanes=1, chunk_size=2)
    lanes.resume(torch.tensor([[6, 2]]))
    assert next(iter(lanes))["input_ids"].tolist()[0] == 3
    assert "Skipping documents: 100%" in capsys.readouterr().err
