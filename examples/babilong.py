"""Train a BakaLLM to answer bAbI questions whose facts are scattered over books, and ask it over up to 1 M tokens.

    python examples/babilong.py --babi en-10k --books train.jsonl.xz --test_books valid.jsonl.xz \\
        --tokenizer tokenizer.json.xz --tasks qa1 --curriculum 1 2 4 8 --lengths 0 4000 16000 --max_steps 4000

After BABILong (arXiv 2406.10149). Training samples fill so many chunks as --curriculum says, one stage after another,
each for an equal share of --max_steps. All answers of a story are targets in training, each asked where it stands in
the story; in tests the last one alone. It is right if greedy search gives all of its tokens. A sample is read in a
single pass, a piece at a time with the state carried, so memory stays the same and so does the time of a token: both
are in the table.

--model goes on from a checkpoint, whose tokenizer and sizes it takes; --max_steps 0 tests alone. On a GPU there are
--bf16 true, --torch_compile true and --cuda_graphs true, and --hours ends training whatever is left of the steps.
--associative_write_cost, with a gate that can close, makes associations outlast more books than were trained on.
The table, babilong.csv and babilong.png are written to the output folder, with the figures that were published beside.
"""

import csv
import sys
import time
from bisect import bisect_right
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer
from torch.utils.data import ConcatDataset
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    TrainerCallback,
    default_data_collator,
    set_seed,
)

from baka_hf import BakaConfig, BakaForCausalLM
from baka_hf.tasks import BabiInBooksDataset, BabiQuestion, Books, read_babi, streamed_accuracy, tokenize_books
from baka_hf.texts import read_documents
from baka_hf.training import BakaTrainer, BakaTrainingArguments


@dataclass
class ModelArguments:
    model: str | None = field(default=None, metadata={"help": "Folder or name of a checkpoint to go on from."})
    hidden_size: int = field(default=384, metadata={"help": "From scratch: width D of the residual stream."})
    intermediate_size: int = field(default=1024, metadata={"help": "From scratch: width of the gated MLPs."})
    num_hidden_layers: int = field(default=6, metadata={"help": "From scratch: blocks."})
    num_attention_heads: int = field(default=6, metadata={"help": "From scratch: heads of a block."})
    chunk_size: int = field(default=512, metadata={"help": "From scratch: tokens of a chunk."})
    num_memory_tokens: int = field(default=16, metadata={"help": "From scratch: memory vectors; 0: none."})
    memory_update: str | None = field(default=None, metadata={"help": "From scratch: replace or gate."})
    associative_dim: int = field(default=0, metadata={"help": "From scratch: width of associations' keys; 0: none."})
    associative_write: str | None = field(default=None, metadata={"help": "From scratch: memory or tokens."})
    associative_gate: str | None = field(default=None, metadata={"help": "From scratch: sigmoid or hard_sigmoid."})
    associative_write_cost: float | None = field(
        default=None, metadata={"help": "Of the mean strength of writes, in the loss; a checkpoint's own if not given."}
    )
    num_pause_tokens: int = field(default=0, metadata={"help": "From scratch: pause tokens in a chunk; 0: none."})
    use_xl_cache: bool = field(default=True, metadata={"help": "From scratch: attend to the previous chunk."})
    tie_word_embeddings: bool = field(default=True, metadata={"help": "From scratch: one matrix for both ends."})

    def load(self, vocab_size: int) -> BakaForCausalLM:
        if self.model is not None:
            cost = self.associative_write_cost
            options = {} if cost is None else {"associative_write_cost": cost}
            return BakaForCausalLM.from_pretrained(self.model, dtype=torch.float32, **options)
        chosen = {name: value for name, value in asdict(self).items() if value is not None}
        return BakaForCausalLM(BakaConfig(vocab_size=vocab_size, **chosen))


@dataclass
class TaskArguments:
    babi: str = field(metadata={"help": "Folder of bAbI files, qa1_…_train.txt and qa1_…_test.txt."})
    books: str = field(metadata={"help": "Books of the training samples: .jsonl, a book a line, or text; also .xz."})
    test_books: str = field(metadata={"help": "Books of the tests, other ones."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "tokenizer.json, also .xz, or the name of a fast one. --model has its own."}
    )
    tasks: list[str] = field(default_factory=lambda: ["qa1"], metadata={"help": "Trained together, tested one by one."})
    curriculum: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8], metadata={"help": "Chunks of a training sample, stage by stage."}
    )
    free_chunks: int = field(
        default=3,
        metadata={
            "help": "While samples have no more chunks, writes cost nothing, lest gates close before what they let in "
            "is read."
        },
    )
    ask_all: bool = field(
        default=True, metadata={"help": "Train on all questions of a story in their places, not on the last one alone."}
    )
    lengths: list[int] = field(
        default_factory=lambda: [0, 4000, 8000, 16000, 32000, 64000, 128_000, 512_000, 1_000_000],
        metadata={"help": "Tokens of the samples of each test; 0: facts and question alone."},
    )
    test_samples: int = field(default=100, metadata={"help": "Samples of each test."})
    test_tokens: int = field(default=64_000, metadata={"help": "Tokens read at once in tests, over all samples."})
    hours: float | None = field(default=None, metadata={"help": "Training ends after so long, whatever --max_steps."})


@dataclass(repr=False)  # transformers' own hides tokens
class TrainingArguments(BakaTrainingArguments):
    """The Trainer's own, with defaults that suit the task."""

    output_dir: str | None = field(default="baka-babilong", metadata={"help": "Tokens, model, table and plot."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Samples of a step on each device."})
    max_steps: int = field(default=4000, metadata={"help": "Steps of all stages together; 0: tests alone."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: float = field(default=100, metadata={"help": "Steps of linear warm-up."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between two lines of the log."})
    save_strategy: str = field(default="no", metadata={"help": "When to write a checkpoint to resume from."})
    report_to: str = field(default="none", metadata={"help": "Where to report to."})
    # Samples are drawn independently, and stages have to come in their order.
    train_sampling_strategy: str = field(default="sequential", metadata={"help": "Order of the training samples."})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "Pin memory of batches."})


# Right answers of a hundred by length, the mean of qa1 to qa5, of GPT-2 (137 M) with each memory, fine-tuned.
LENGTHS = (0, 4000, 8000, 16_000, 32_000, 64_000, 128_000, 512_000, 1_000_000)
SOURCE = "qa1-5, GPT-2 137 M; arXiv 2406.10149 and 2407.04841"
PUBLISHED = {
    "RMT": dict(zip(LENGTHS, (99, 92, 90, 86, 78, 70, 59, 46, 43), strict=True)),
    "ARMT": dict(zip(LENGTHS, (99, 98, 98, 98, 98, 98, 97, 95, 93), strict=True)),
}


class Deadline(TrainerCallback):
    """The end of training after so many hours."""

    def __init__(self, hours: float):
        self.end = time.monotonic() + 3600 * hours

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= time.monotonic() > self.end


def stage_ends(curriculum: list[int], max_steps: int) -> list[int]:
    """The step that each stage ends before; all have an equal share."""
    return [max_steps * number // len(curriculum) for number in range(1, len(curriculum) + 1)]


class FreeAtFirst(TrainerCallback):
    """Writes to associations cost nothing while samples are short."""

    def __init__(self, config: BakaConfig, task: TaskArguments, max_steps: int):
        self.config, self.cost, self.task, self.max_steps = config, config.associative_write_cost, task, max_steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        curriculum = self.task.curriculum
        stage = bisect_right(stage_ends(curriculum, self.max_steps), state.global_step)
        chunks = curriculum[stage]
        self.config.associative_write_cost = self.cost if chunks > self.task.free_chunks else 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.config.associative_write_cost = self.cost  # as it is saved


def load_tokenizer(path: str) -> Any:
    if path.removesuffix(".xz").endswith(".json"):
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(*read_documents(path)))
    return AutoTokenizer.from_pretrained(path)


def questions_of(folder: str, task: str, split: str) -> list[BabiQuestion]:
    """Those of the one file of a task, such as qa1_single-supporting-fact_train.txt."""
    files = sorted(Path(folder).glob(f"{task}_*_{split}.txt"))
    if len(files) != 1:
        raise ValueError(f"babi: expected one file {task}_…_{split}.txt in {folder}, found {len(files)}.")
    return read_babi(files[0])


def training_samples(
    task: TaskArguments, tokenizer: Any, books: Books, chunk_size: int, max_steps: int, step_samples: int, seed: int
) -> ConcatDataset:
    """Samples of as many chunks as the curriculum says, stage by stage, an equal share of the steps each."""
    by_task = [questions_of(task.babi, name, "train") for name in task.tasks]
    generator = np.random.default_rng(seed)
    # All tasks have as many questions, in an order that is no story's: the samples of a step have little in common.
    most = max(map(len, by_task))
    questions = [some[index % len(some)] for some in by_task for index in range(most)]
    questions = [questions[index] for index in generator.permutation(len(questions))]
    ends = stage_ends(task.curriculum, max_steps)
    stages = [
        BabiInBooksDataset(
            tokenizer,
            questions,
            books,
            chunks * chunk_size,
            num_samples=(end - begin) * step_samples,
            ask_all=task.ask_all,
            seed=seed + number,
        )
        for number, (chunks, begin, end) in enumerate(zip(task.curriculum, [0, *ends], ends, strict=False))
        if end > begin
    ]
    return ConcatDataset(stages)


def guess_places(questions: list[BabiQuestion]) -> float:
    """What is right without knowing who is where: the answer that was told last, or the most frequent one."""
    answers = Counter(asked.answer for asked in questions)
    told_last = 0
    for asked in questions:
        words = [word.strip(".") for fact in asked.facts for word in fact.split()]
        told_last += next((word for word in reversed(words) if word in answers), None) == asked.answer
    return max(told_last, *answers.values()) / len(questions)


def test(
    model: BakaForCausalLM, task: TaskArguments, tokenizer: Any, books: Books, name: str, length: int
) -> dict[str, Any]:
    """A row of the table."""
    questions = questions_of(task.babi, name, "test")
    dataset = BabiInBooksDataset(tokenizer, questions, books, length, num_samples=task.test_samples, seed=1_000_000)
    device, chunk_size = model.device, model.config.chunk_size
    chunks = min(16, -(-max(length, 1) // chunk_size))
    batch_size = max(1, min(task.test_samples, task.test_tokens // (chunks * chunk_size)))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    scores = streamed_accuracy(model, dataset, batch_size, chunks_per_call=chunks)
    seconds = time.perf_counter() - start
    num_tokens = task.test_samples * length if length else sum(len(sample["input_ids"]) for sample in dataset)
    return {
        "task": name,
        "length": length,
        "samples": task.test_samples,
        "accuracy": scores["sequence_accuracy"],
        "guessing": guess_places(dataset.questions),
        "state bytes": model.new_cache(1).nbytes,
        "microseconds a token": 1e6 * seconds / num_tokens,
        "rows": batch_size,
        "peak memory": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def short(length: int) -> str:
    return "1 M" if length == 1_000_000 else f"{length // 1000} k"


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'task':<6}{'length':>9}{'right':>8}{'guessing':>10}{'state bytes':>13}{'µs a token':>12}{'peak MiB':>10}")
    for row in rows:
        peak = "" if row["peak memory"] is None else f"{row['peak memory'] / 2**20:.0f}"
        print(
            f"{row['task']:<6}{row['length']:9}{row['accuracy']:8.3f}{row['guessing']:10.3f}{row['state bytes']:13}"
            f"{row['microseconds a token']:12.2f}{peak:>10}"
        )
    tasks, lengths = ({row[name]: None for row in rows} for name in ("task", "length"))
    print(f"\nright of 100 by length; published: {SOURCE}")
    print(f"{'':<14}" + "".join(f"{short(length):>8}" for length in lengths))
    own = {task: {row["length"]: 100 * row["accuracy"] for row in rows if row["task"] == task} for task in tasks}
    if len(own) > 1:
        own["mean"] = {length: float(np.mean([own[task][length] for task in tasks])) for length in lengths}
    for name, line in (own | PUBLISHED).items():
        print(f"{name:<14}" + "".join(f"{line[length]:8.1f}" if length in line else f"{'':8}" for length in lengths))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Right answers by length, published ones dashed; lengths in their order, since one of them is 0."""
    figure = Figure(figsize=(10, 5.625), dpi=192, layout="constrained")
    axes = figure.add_subplot()
    ticks = sorted({row["length"] for row in rows} | {*LENGTHS})
    places = {length: place for place, length in enumerate(ticks)}
    for task in {row["task"]: None for row in rows}:
        line = sorted((places[row["length"]], 100 * row["accuracy"]) for row in rows if row["task"] == task)
        axes.plot(*zip(*line, strict=True), marker="o", label=f"BakaLLM, {task}")
    for name, line in PUBLISHED.items():
        axes.plot([places[length] for length in line], [*line.values()], "--", marker=".", label=name)
    axes.set_xticks([*places.values()], [short(length) for length in places])
    axes.set(xlabel="tokens", ylabel="right answers of 100", ylim=(0, 102), title=f"Published: {SOURCE}")
    axes.grid(axis="y", color="#DDDDDD")
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = HfArgumentParser((ModelArguments, TaskArguments, TrainingArguments), description=__doc__.split("\n")[0])
    model_args, task, args = parser.parse_args_into_dataclasses()
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    try:
        if (source := task.tokenizer or model_args.model) is None:
            raise ValueError("tokenizer: expected one for a model from scratch, got none.")
        tokenizer = load_tokenizer(source)
        model = model_args.load(len(tokenizer))
        books = tokenize_books(tokenizer, task.books, output / "books.npz")
        test_books = tokenize_books(tokenizer, task.test_books, output / "test_books.npz")
        if args.max_steps > 0:
            step_samples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            sizes = model.config.chunk_size, args.max_steps, step_samples
            samples = training_samples(task, tokenizer, books, *sizes, args.seed)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

    if args.max_steps > 0:
        callbacks: list[TrainerCallback] = [FreeAtFirst(model.config, task, args.max_steps)]
        callbacks += [] if task.hours is None else [Deadline(task.hours)]
        trainer = BakaTrainer(model, args, default_data_collator, samples, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        model.config.use_cache = True  # the Trainer switches it off
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
    model.to(args.device, torch.bfloat16 if args.bf16 else None)  # under autocast no graphs would read
    rows: list[dict[str, Any]] = []
    with open(output / "babilong.csv", "w", newline="", encoding="utf-8") as file:
        for length in task.lengths:
            for name in task.tasks:
                rows.append(test(model, task, tokenizer, test_books, name, length))
                if len(rows) == 1:
                    writer = csv.DictWriter(file, rows[0])
                    writer.writeheader()
                writer.writerow(rows[-1])
                file.flush()
                print(f"{name} at {short(length)}: {rows[-1]['accuracy']:.3f}", flush=True)
    print_table(rows)
    plot(rows, output / "babilong.png")


if __name__ == "__main__":
    main()
