"""Train a small BakaLLM on a task that only memory solves, and other memories, or none, beside it.

    python examples/memory_tasks.py --compare                            # copy, 9 segments of 8 tokens: 24 symbols
    python examples/memory_tasks.py --compare --num_segments 3 6 9       # models of each kind for each number
    python examples/memory_tasks.py --task reverse --num_segments 6      # 24 symbols, backwards
    python examples/memory_tasks.py --task associative_retrieval --num_segments 5 --segment_length 2 --curriculum 2 3 4
    python examples/memory_tasks.py --task recall --num_pairs 4 --num_segments 4 --test_longer 2 8 32    # over distance
    python examples/memory_tasks.py --task recall --num_pairs 4 8 16 32 --segment_length 32 --compare    # capacity

A segment is a chunk of the model. Without the XL cache, which is off by default, only memory leads from one chunk to
the next. Every training sample is new; accuracy is that on samples which are never trained on. Training ends when all
of them are right, at the latest after --max_steps. Beside each accuracy stands what is right for a model that knows
which symbols there were, but neither their order nor whose they are: one that stays there has learned no more.
"""

import copy
import csv
import time
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import ConcatDataset
from tqdm import tqdm
from transformers import HfArgumentParser, PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from baka_hf import BakaConfig, BakaForCausalLM
from baka_hf.tasks import RecallDataset, TaskDataset, answer_accuracy, guessing_accuracy, streamed_accuracy
from baka_hf.training import BakaTrainer, BakaTrainingArguments

RECALLED = 0.95  # of the answers: as many pairs are a memory's capacity


@dataclass
class ModelArguments:
    """Fields of BakaConfig."""

    hidden_size: int = field(default=128, metadata={"help": "Width D of the residual stream."})
    intermediate_size: int = field(default=256, metadata={"help": "Width of the gated MLPs."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Blocks."})
    num_attention_heads: int = field(default=4, metadata={"help": "Heads of a block."})
    hidden_act: str = field(default="silu", metadata={"help": "Gate of the MLPs: elephant or any ACT2FN name."})
    num_memory_tokens: int = field(default=8, metadata={"help": "Memory vectors handed from chunk to chunk; 0: none."})
    memory_write: Literal["carry", "tokens"] = field(
        default="carry", metadata={"help": "What a chunk's write positions start from: the memory read, or m_0."}
    )
    memory_update: str = field(default="replace", metadata={"help": "How a memory is updated: replace or gate."})
    memory_solidifier: Literal["none", "glu", "gelephant", "mlp", "layer"] = field(
        default="none", metadata={"help": "Network that memory passes between two chunks."}
    )
    memory_norm: bool = field(default=True, metadata={"help": "Norm over the memory that is handed on."})
    associative_dim: int = field(
        default=0, metadata={"help": "Width of an associative memory's keys; 0: none, 16 where --compare needs one."}
    )
    associative_write: Literal["memory", "tokens"] = field(
        default="tokens", metadata={"help": "What writes to it: the memory vectors or every token."}
    )
    associative_gate: Literal["sigmoid", "hard_sigmoid"] = field(
        default="sigmoid", metadata={"help": "What makes the strength of a write; a hard one can be 0."}
    )
    associative_write_cost: float = field(
        default=0.0, metadata={"help": "What writes add to the loss, times their mean strength."}
    )
    num_pause_tokens: int = field(default=0, metadata={"help": "Pause tokens in a chunk; 0: none."})
    use_xl_cache: bool = field(default=False, metadata={"help": "Attend to the previous chunk's keys and values."})
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of the initial weights."})
    bptt_chunks: int | None = field(
        default=None, metadata={"help": "Previous chunks that gradients reach; all of the sample's if not given."}
    )

    def describe(self) -> str:
        vectors = f"{self.num_memory_tokens} memory tokens" if self.num_memory_tokens else ""
        associative = f"associative {self.associative_dim}" if self.associative_dim else ""
        memory = ", ".join(filter(None, (vectors, associative))) or "no memory"
        return f"{memory}, XL cache" if self.use_xl_cache else memory

    def configure(self, **fields: Any) -> BakaConfig:
        """What speaks of a memory that there is not keeps its default."""
        own = asdict(self)
        without = (
            [] if self.num_memory_tokens else ["memory_write", "memory_update", "memory_solidifier", "memory_norm"]
        )
        without += [] if self.associative_dim else [name for name in own if name.startswith("associative_")]
        return BakaConfig(**{name: value for name, value in own.items() if name not in without} | fields)

    def others(self) -> list["ModelArguments"]:
        """What --compare holds it against: vectors, associations, both, the XL cache alone, nothing."""
        dim, vectors = self.associative_dim or 16, self.num_memory_tokens or 8
        kinds = [(vectors, 0, False), (0, dim, False), (vectors, dim, False), (0, 0, True), (0, 0, False)]
        names = ("num_memory_tokens", "associative_dim", "use_xl_cache")
        models = [replace(self, **dict(zip(names, kind, strict=True))) for kind in kinds]
        return [model for model in models if model != self]


@dataclass
class TaskArguments:
    task: Literal["copy", "reverse", "associative_retrieval", "recall"] = field(
        default="copy", metadata={"help": "What is asked of the source; recall: all pairs, anywhere later."}
    )
    num_segments: list[int] = field(
        default_factory=lambda: [9],
        metadata={"help": "Segments of a sample; a model is trained for each number given."},
    )
    segment_length: int = field(default=8, metadata={"help": "Tokens of a segment, the model's chunk_size."})
    num_symbols: int = field(default=10, metadata={"help": "Symbols that the source is drawn from."})
    num_pairs: list[int] = field(
        default_factory=lambda: [4], metadata={"help": "Recall: pairs; a model is trained for each number given."}
    )
    num_keys: int = field(default=26, metadata={"help": "Recall: keys to draw from."})
    told: Literal["first", "anywhere"] = field(
        default="first", metadata={"help": "Recall: where pairs are told in training. For accuracy it is first."}
    )
    cut: bool = field(default=False, metadata={"help": "Recall: let segments end within pairs, in half the samples."})
    retold: float = field(
        default=0.5,
        metadata={
            "help": "Recall: share of the training samples in which all pairs are told again, keys as targets too, in "
            "the place of questions. 0 where --told anywhere."
        },
    )
    curriculum: list[int] = field(
        default_factory=list,
        metadata={
            "help": "What training begins with: fewer segments, for recall fewer pairs; the task itself comes last."
        },
    )
    curriculum_steps: int = field(default=200, metadata={"help": "Steps of each of these, a part of --max_steps."})
    test_longer: list[int] = field(
        default_factory=list, metadata={"help": "Recall: also take accuracy over so many times the segments."}
    )
    eval_samples: int = field(default=1000, metadata={"help": "Samples that accuracy is taken on."})
    seeds: list[int] = field(default_factory=list, metadata={"help": "Train with each of these; else with --seed."})
    compare: bool = field(
        default=False, metadata={"help": "Also train the other kinds: vectors, associative, both, XL cache, no memory."}
    )
    csv: str | None = field(default=None, metadata={"help": "File that the rows of the table are added to."})

    def samples(self, size: tuple[int, int], num_samples: int, seed: int, **options: Any) -> Any:
        """A data set of (segments, pairs); the task defines the pairs of all but recall."""
        (num_segments, num_pairs), known = size, dict(seed=seed, num_symbols=self.num_symbols)
        if self.task != "recall":
            return TaskDataset(self.task, num_segments, self.segment_length, num_samples, **known)
        known |= dict(num_keys=self.num_keys, cut=self.cut)
        return RecallDataset(num_pairs, num_segments, self.segment_length, num_samples, **known, **options)

    def training_samples(self, size: tuple[int, int], max_steps: int, step_samples: int, seed: int) -> Any:
        """One size after another, the task's own last."""
        num_segments, num_pairs = size
        recalls = self.task == "recall"
        stages = [(num_segments, less) if recalls else (less, num_pairs) for less in self.curriculum]
        steps = [*[self.curriculum_steps] * len(stages), max_steps - self.curriculum_steps * len(stages)]
        if steps[-1] < 1:
            raise ValueError(
                f"max_steps: expected more than the {max_steps - steps[-1]} of the curriculum, got {max_steps}."
            )
        options = dict(told=self.told, retold=self.retold * (self.told == "first")) if recalls else {}
        return ConcatDataset(
            [
                self.samples(stage, count * step_samples, seed + 1000 * number, **options)
                for number, (stage, count) in enumerate(zip([*stages, size], steps, strict=True))
            ]
        )


@dataclass(repr=False)  # transformers' own hides tokens
class TrainingArguments(BakaTrainingArguments):
    """The Trainer's own, with defaults that suit the default task."""

    output_dir: str | None = field(default="baka-tasks", metadata={"help": "Where checkpoints are written, if any."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Samples of a step on each device."})
    per_device_eval_batch_size: int = field(default=250, metadata={"help": "Samples read at once for accuracy."})
    max_steps: int = field(
        default=1000, metadata={"help": "Optimizer steps, if accuracy does not end training before."}
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: float = field(default=100, metadata={"help": "Steps, or share of all steps, of linear warm-up."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to take accuracy while training."})
    eval_steps: float | None = field(default=100, metadata={"help": "Steps between two evaluations."})
    save_strategy: str = field(default="no", metadata={"help": "When to write a checkpoint to resume from."})
    # Samples are drawn independently: in their own order they are as good as shuffled.
    train_sampling_strategy: str = field(default="sequential", metadata={"help": "Order of the training samples."})
    # Pinning without an accelerator does nothing but warn.
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "Pin memory of batches."})


class ProgressBars(ProgressCallback):
    """The Trainer's, without its log between them."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


class Progress(TrainerCallback):
    """A line for each evaluation, and the end of training once every answer is right."""

    def __init__(self, guess: float):
        self.guess = guess

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        with tqdm.external_write_mode():  # above the bars
            print(
                f"{state.global_step:6} steps {time.perf_counter() - self.start:6.0f} s"
                f"   loss {metrics['eval_loss']:.4f}"
                f"   tokens right {metrics['eval_token_accuracy']:.4f} (guessing {self.guess:.4f})"
                f"   answers right {metrics['eval_sequence_accuracy']:.4f}",
                flush=True,
            )
        if metrics["eval_sequence_accuracy"] == 1:
            control.should_training_stop = True


def train(
    model_args: ModelArguments, task: TaskArguments, size: tuple[int, int], args: TrainingArguments, seed: int
) -> list[dict[str, Any]]:
    """Train one model from scratch: a row of the table, and one for each longer distance."""
    num_segments, num_pairs = size
    args = copy.copy(args)
    args.seed = seed
    training = task.training_samples(
        size, args.max_steps, args.train_batch_size * args.gradient_accumulation_steps * args.world_size, 1 + seed
    )
    testing = task.samples(size, task.eval_samples, seed=0)
    row = {"model": model_args.describe(), "segments": num_segments}
    if task.task == "recall":
        what, row["source"] = f"recall of {num_pairs} pairs", num_pairs
    else:
        what, row["source"] = task.task, testing.source_length
    print(f"\n{what}, {num_segments} segments of {task.segment_length}, {row['model']}, seed {seed}", flush=True)
    folder = f"{what.replace(' ', '-')}-{num_segments}x{task.segment_length}"
    args.output_dir = str(Path(args.output_dir, folder, f"{row['model']}, seed {seed}"))
    set_seed(seed)

    model = BakaForCausalLM(model_args.configure(vocab_size=testing.vocab_size, chunk_size=task.segment_length))
    guess = guessing_accuracy(testing)
    progress = Progress(guess)
    trainer = BakaTrainer(
        model,
        args,
        train_dataset=training,
        eval_dataset=testing,
        compute_metrics=lambda evaluation: answer_accuracy(*evaluation),
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(ProgressBars)
    resume = args.resume_from_checkpoint
    if resume == "last":
        resume = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    outcome = trainer.train(resume_from_checkpoint=resume)
    trainer.remove_callback(progress)
    row |= {
        "state bytes": model.new_cache(1).nbytes,
        "seed": seed,
        "steps": trainer.state.global_step,
        "seconds": round(outcome.metrics["train_runtime"], 1),
    }
    rows = []
    for times in (1, *task.test_longer):
        samples = task.samples((times * num_segments, num_pairs), task.eval_samples, seed=0)
        # A piece of a longer sample is as long as a sample in training.
        accuracy = streamed_accuracy(model, samples, args.per_device_eval_batch_size, chunks_per_call=num_segments)
        rows.append(row | {"tested": times * num_segments, "guessing": guess} | accuracy)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'segments':>8}{'tested':>8}{'source':>8}  {'model':<36}{'state bytes':>11}{'seed':>6}{'steps':>7}{'time':>9}"
        f"{'guessing':>10}{'tokens right':>14}{'answers right':>15}"
    )
    for row in rows:
        print(
            f"{row['segments']:8}{row['tested']:8}{row['source']:8}  {row['model']:<36}{row['state bytes']:11}"
            f"{row['seed']:6}{row['steps']:7}{row['seconds']:7.0f} s"
            f"{row['guessing']:10.4f}{row['token_accuracy']:14.4f}{row['sequence_accuracy']:15.4f}"
        )


def capacities(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each model and seed the most pairs of which it recalls enough, over the segments it was trained with."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["source"]):
        if row["tested"] == row["segments"]:
            capacity = found.setdefault((row["model"], row["state bytes"], row["seed"]), {"pairs": 0})
            if row["token_accuracy"] >= RECALLED:
                capacity["pairs"] = row["source"]
    return [dict(model=model, nbytes=nbytes, seed=seed) | found[model, nbytes, seed] for model, nbytes, seed in found]


def write_csv(path: str, rows: list[dict[str, Any]]) -> None:
    """Add rows to a file; a new one begins with the names of the columns."""
    is_new = not Path(path).exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = HfArgumentParser((ModelArguments, TaskArguments, TrainingArguments), description=__doc__.split("\n")[0])
    model_args, task, args = parser.parse_args_into_dataclasses()
    models = [model_args, *(model_args.others() if task.compare else ())]
    recalls = task.task == "recall"
    pairs = task.num_pairs if recalls else task.num_pairs[:1]
    about = {"task": task.task, "segment_length": task.segment_length, "retold": task.retold if recalls else None}
    rows = []
    for size in product(task.num_segments, pairs):
        for seed in task.seeds or [args.seed]:
            for model in models:
                done = train(model, task, size, args, seed)
                if task.csv:
                    write_csv(task.csv, [about | row for row in done])
                rows += done
    if recalls and len(pairs) > 1:
        print(f"\nmost pairs of which {RECALLED} are recalled")
        for found in capacities(rows):
            print(f"{found['model']:<36}{found['nbytes']:9} bytes, seed {found['seed']}: {found['pairs']:4} pairs")
    print(f"\n{task.task}, segments of {task.segment_length}, {task.num_symbols} symbols")
    print_table(rows)


if __name__ == "__main__":
    main()
