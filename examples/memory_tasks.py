"""Train a small BakaLLM on a task that only memory solves, and the same model without memory beside it.

    python examples/memory_tasks.py --compare                            # copy, 9 segments of 8 tokens: 24 symbols
    python examples/memory_tasks.py --compare --num_segments 3 6 9       # a model of each kind for each number
    python examples/memory_tasks.py --task reverse --num_segments 6      # 24 symbols, backwards
    python examples/memory_tasks.py --task associative_retrieval --num_segments 5 --segment_length 2

A segment is a chunk of the model. Without the XL cache, which is off by default, only memory tokens lead from one chunk
to the next. Every training sample is new; accuracy is that on samples which are never trained on. Training ends when
all of them are right, at the latest after --max_steps. Associative retrieval takes many more than the default: at first
a model, with memory or without need of it, learns which values there were, and not yet whose they are.
"""

import copy
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tqdm import tqdm
from transformers import HfArgumentParser, PrinterCallback, ProgressCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from baka_hf import BakaConfig, BakaForCausalLM
from baka_hf.tasks import TaskDataset, answer_accuracy


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
    memory_solidifier: Literal["none", "glu", "gelephant", "mlp", "layer"] = field(
        default="none", metadata={"help": "Network that memory passes between two chunks."}
    )
    memory_norm: bool = field(default=True, metadata={"help": "LayerNorm over the memory that is handed on."})
    num_pause_tokens: int = field(default=0, metadata={"help": "Pause tokens in a chunk; 0: none."})
    use_xl_cache: bool = field(default=False, metadata={"help": "Attend to the previous chunk's keys and values."})
    bptt_chunks: int | None = field(
        default=None, metadata={"help": "Previous chunks that gradients reach; all of the sample's if not given."}
    )

    def describe(self) -> str:
        memory = f"{self.num_memory_tokens} memory tokens" if self.num_memory_tokens else "no memory"
        return f"{memory}, XL cache" if self.use_xl_cache else memory


@dataclass
class TaskArguments:
    task: Literal["copy", "reverse", "associative_retrieval"] = field(
        default="copy", metadata={"help": "What is asked of the source."}
    )
    num_segments: list[int] = field(
        default_factory=lambda: [9],
        metadata={"help": "Segments of a sample; a model is trained for each number given."},
    )
    segment_length: int = field(default=8, metadata={"help": "Tokens of a segment, the model's chunk_size."})
    num_symbols: int = field(default=10, metadata={"help": "Symbols that the source is drawn from."})
    eval_samples: int = field(default=1000, metadata={"help": "Samples that accuracy is taken on."})
    compare: bool = field(default=False, metadata={"help": "Also train the model without its memory tokens."})


@dataclass(repr=False)  # transformers' own hides tokens
class TrainingArguments(transformers.TrainingArguments):
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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        with tqdm.external_write_mode():  # above the bars
            print(
                f"{state.global_step:6} steps {time.perf_counter() - self.start:6.0f} s"
                f"   loss {metrics['eval_loss']:.4f}   tokens right {metrics['eval_token_accuracy']:.4f}"
                f"   answers right {metrics['eval_sequence_accuracy']:.4f}",
                flush=True,
            )
        if metrics["eval_sequence_accuracy"] == 1:
            control.should_training_stop = True


def train(model_args: ModelArguments, task: TaskArguments, num_segments: int, args: TrainingArguments) -> dict:
    """Train one model from scratch: a row of the table."""
    row = {"segments": num_segments, "model": model_args.describe()}
    print(f"\n{task.task}, {num_segments} segments of {task.segment_length}, {row['model']}", flush=True)
    args = copy.copy(args)
    args.output_dir = str(Path(args.output_dir, f"{task.task}-{num_segments}x{task.segment_length}", row["model"]))
    set_seed(args.seed)

    def samples(num_samples: int, seed: int) -> TaskDataset:
        sizes = num_segments, task.segment_length, num_samples
        return TaskDataset(task.task, *sizes, seed=seed, num_symbols=task.num_symbols)

    step_samples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    training = samples(args.max_steps * step_samples, seed=1 + args.seed)
    config = BakaConfig(vocab_size=training.vocab_size, chunk_size=task.segment_length, **asdict(model_args))
    progress = Progress()
    trainer = Trainer(
        BakaForCausalLM(config),
        args,
        train_dataset=training,
        eval_dataset=samples(task.eval_samples, seed=0),
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
    accuracy = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    return row | {
        "source": training.source_length,
        "steps": trainer.state.global_step,
        "seconds": outcome.metrics["train_runtime"],
        **accuracy,
    }


def main() -> None:
    parser = HfArgumentParser((ModelArguments, TaskArguments, TrainingArguments), description=__doc__.split("\n")[0])
    model_args, task, args = parser.parse_args_into_dataclasses()
    models = [model_args]
    if task.compare:
        models.append(replace(model_args, num_memory_tokens=0))
    rows = [train(model, task, num_segments, args) for num_segments in task.num_segments for model in models]

    print(f"\n{task.task}, segments of {task.segment_length}, {task.num_symbols} symbols")
    print(
        f"{'segments':>8}{'source':>8}  {'model':<28}{'steps':>7}{'time':>9}{'tokens right':>14}{'answers right':>15}"
    )
    for row in rows:
        print(
            f"{row['segments']:8}{row['source']:8}  {row['model']:<28}{row['steps']:7}{row['seconds']:7.0f} s"
            f"{row['token_accuracy']:14.4f}{row['sequence_accuracy']:15.4f}"
        )


if __name__ == "__main__":
    main()
