"""Train a BakaLLM from scratch with the Hugging Face Trainer and hold it against a bigram model.

    python examples/train.py                                              # the sources of Python's standard library
    python examples/train.py --streaming                                  # memory goes on from step to step
    python examples/train.py --text_files "notes/*.txt" "wiki/*.jsonl"    # own text
    python examples/train.py --dataset_name wikitext --dataset_config_name wikitext-103-raw-v1

A byte-level BPE tokenizer is trained on the training part, the model on samples of several chunks; with --streaming
on whole documents, in lanes that carry memory from step to step. The model and an add-k smoothed bigram model are
scored on held-out documents, the model both in blocks of several chunks, each read with an empty memory, and in whole
documents. The output folder then holds the checkpoint with its tokenizer, its code and its model card, the training
curve, and the results for `python -m baka_hf.results`.
"""

import glob
import hashlib
import json
import math
import platform
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from matplotlib.figure import Figure
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    default_data_collator,
    set_seed,
)

from baka_hf import BakaConfig, BakaForCausalLM
from baka_hf.data import LaneDataset
from baka_hf.evaluation import evaluate_documents
from baka_hf.hub import what_is_carried
from baka_hf.results import Result, curves_of, write_result
from baka_hf.training import BakaTrainer, BakaTrainingArguments

END_OF_TEXT = "<|endoftext|>"  # stands before every document: its first token is predicted from this one
PADDING = "<|pad|>"
# A conversation, for the tokenizer trained here: lines of "User:" and "Assistant:", an answer ends as a document does.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}:"
    "{% if message.role == 'assistant' %}"
    "{% generation %} {{ message.content | trim }}{{ eos_token }}{% endgeneration %}"
    "{% else %} {{ message.content | trim }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
IGNORED = -100


@dataclass
class ModelArguments:
    """BakaConfig's fields, but for vocab_size and token ids (the tokenizer's) and use_cache (TrainingArguments')."""

    hidden_size: int = field(default=192, metadata={"help": "Width D of the residual stream."})
    intermediate_size: int = field(default=576, metadata={"help": "Width of the gated MLPs."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Blocks."})
    num_attention_heads: int = field(default=4, metadata={"help": "Query heads of a block."})
    num_key_value_heads: int | None = field(
        default=None, metadata={"help": "Key and value heads of a block; fewer than query heads is GQA."}
    )
    head_dim: int | None = field(default=None, metadata={"help": "Width of a head, if not hidden_size / heads."})
    hidden_act: str = field(default="silu", metadata={"help": "Gate of the MLPs: elephant or any ACT2FN name."})
    norm_type: Literal["layernorm", "rmsnorm"] = field(default="layernorm", metadata={"help": "Kind of all norms."})
    layer_norm_eps: float = field(default=1e-5, metadata={"help": "Epsilon of the norms."})
    parallel_residual: bool = field(
        default=True, metadata={"help": "Attention and MLP side by side after one norm; if not, in turn, as in Llama."}
    )
    qk_norm: bool = field(default=True, metadata={"help": "RMSNorm of queries and keys."})
    value_residual: bool = field(default=True, metadata={"help": "Blocks mix in the first one's values."})
    attention_bias: bool = field(default=False, metadata={"help": "Biases in attention."})
    mlp_bias: bool = field(default=False, metadata={"help": "Biases in the MLPs."})
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of the initial weights."})
    residual_initializer_range: float | None = field(
        default=0.0, metadata={"help": "That of o_proj and down_proj; 0: blocks begin as the identity."}
    )
    rope_parameters: dict | str | None = field(
        default=None, metadata={"help": 'As JSON; if not given, {"rope_type": "default", "rope_theta": 10000.0}.'}
    )
    chunk_size: int = field(default=64, metadata={"help": "Tokens of text in a chunk."})
    num_memory_tokens: int = field(default=8, metadata={"help": "Memory vectors handed from chunk to chunk; 0: none."})
    memory_write: Literal["carry", "tokens"] = field(
        default="carry", metadata={"help": "What a chunk's write positions start from: the memory read, or m_0."}
    )
    memory_update: str = field(default="replace", metadata={"help": "What becomes of a memory: `MEMORY_UPDATES`."})
    memory_solidifier: Literal["none", "glu", "gelephant", "mlp", "layer"] = field(
        default="none", metadata={"help": "Network that memory passes between two chunks."}
    )
    separate_solidifiers: bool = field(default=False, metadata={"help": "One solidifier to read, one to write."})
    memory_norm: bool = field(default=True, metadata={"help": "Norm over the memory that is handed on."})
    associative_dim: int = field(default=48, metadata={"help": "Width of an associative memory's keys; 0: none."})
    associative_write: Literal["memory", "tokens"] = field(
        default="tokens", metadata={"help": "What writes to it: the memory vectors or every token."}
    )
    associative_gate: Literal["sigmoid", "hard_sigmoid"] = field(
        default="sigmoid", metadata={"help": "What makes the strength of a write; a hard one can be 0."}
    )
    associative_write_cost: float = field(
        default=0.0, metadata={"help": "What writes add to the loss, times their mean strength."}
    )
    associative_layer_interval: int = field(default=1, metadata={"help": "Every so many blocks one has it."})
    num_pause_tokens: int = field(default=0, metadata={"help": "Pause tokens in a chunk; 0: none."})
    pause_placement: Literal["fixed", "random"] = field(
        default="fixed", metadata={"help": "Where pauses stand while training."}
    )
    use_xl_cache: bool = field(default=True, metadata={"help": "Attend to the previous chunk's keys and values."})
    bptt_chunks: int | None = field(
        default=None, metadata={"help": "Previous chunks that gradients reach; all of the sample's if not given."}
    )
    tie_word_embeddings: bool = field(default=False, metadata={"help": "Use the embedding matrix as the head."})

    def __post_init__(self) -> None:
        if isinstance(self.rope_parameters, str):
            with suppress(json.JSONDecodeError):  # what is no JSON is no dict either, which is told below
                self.rope_parameters = json.loads(self.rope_parameters)
        if not self.associative_dim:
            self.associative_write = "memory"  # as it has to be where nothing is written
        BakaConfig(**asdict(self))  # what no model can have is refused before any text is read


@dataclass
class DataArguments:
    text_files: list[str] | None = field(
        default=None,
        metadata={
            "help": 'Paths or globs: .jsonl or .json (a document a line, in "text"), else text (a document a file).'
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Data set of the Hub, or a local folder of one."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    text_column: str = field(default="text", metadata={"help": "Column of .jsonl files or the data set with the text."})
    validation_fraction: float = field(
        default=0.04, metadata={"help": "Share of the documents held out, chosen by a hash of their names."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Fast tokenizer to use instead of training one."}
    )
    vocab_size: int = field(default=4096, metadata={"help": "Vocabulary of the tokenizer that is trained."})
    chunks_per_sample: int = field(default=4, metadata={"help": "Chunks of a training sample, and of a scored block."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Train on documents in lanes, with memory carried from step to step, not on samples."},
    )
    num_lanes: int | None = field(
        default=None,
        metadata={
            "help": "Lanes of all processes, k times as many as the rows of a batch if gradients are accumulated over "
            "a multiple of k batches. One for each row if not given. To resume takes as many lanes as before."
        },
    )

    def __post_init__(self) -> None:
        if self.text_files and self.dataset_name:
            raise ValueError("Give text_files or dataset_name, not both.")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}.")

    @property
    def hub_name(self) -> str | None:
        """The data set's name on the Hub, if it is from there."""
        return self.dataset_name if self.dataset_name and not Path(self.dataset_name).exists() else None

    def describe(self) -> str:
        if self.dataset_name:
            name = self.hub_name or Path(self.dataset_name).name  # where it lies on this machine is told nobody
            return " ".join(filter(None, (name, self.dataset_config_name)))
        if self.text_files:
            return "local text files"
        return f"the sources of the standard library of Python {platform.python_version()}"


@dataclass(repr=False)  # transformers' own hides tokens
class TrainingArguments(BakaTrainingArguments):
    """The Trainer's own, with defaults that suit the default model and data on two CPU cores."""

    output_dir: str | None = field(default="baka-small", metadata={"help": "Where checkpoint and curve are written."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Samples of a step on each device."})
    max_steps: int = field(default=800, metadata={"help": "Optimizer steps; -1: num_train_epochs decides."})
    muon_learning_rate: float | None = field(
        default=0.02, metadata={"help": "Peak learning rate of Muon, for the blocks' matrices; 0: AdamW for all."}
    )
    learning_rate: float = field(default=8e-3, metadata={"help": "Peak learning rate of AdamW, for all else."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=40, metadata={"help": "Steps, or share of all steps, of linear warm-up."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of both."})
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW's second momentum."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between two points of the training loss."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate while training."})
    eval_steps: float | None = field(default=250, metadata={"help": "Steps between two evaluations."})
    save_steps: float = field(default=250, metadata={"help": "Steps between two checkpoints to resume from."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept."})
    results_db: str | None = field(
        default=None, metadata={"help": "File of the results of many runs, to which those of this one are added too."}
    )
    # Pinning without an accelerator does nothing but warn.
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "Pin memory of batches."})

    def __post_init__(self) -> None:
        self.muon_learning_rate = self.muon_learning_rate or None  # which no command line can say
        super().__post_init__()


# ---- documents: data sets with the columns "name" and "text" ----


def standard_library() -> Dataset:
    """The modules of Python's standard library, without tests and the generated tables of two packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    tests, generated = {"test", "tests", "idle_test"}, {"encodings", "pydoc_data"}
    left_out = tests | generated | {"site-packages", "dist-packages", "__pycache__"}

    def modules() -> Iterator[dict[str, str]]:
        for path in sorted(root.rglob("*.py")):
            module = path.relative_to(root)
            if left_out.isdisjoint(module.parts):
                with tokenize.open(path) as source:  # heeds the encoding that a source file declares
                    yield {"name": module.as_posix(), "text": source.read()}

    return Dataset.from_list(list(modules()))


def text_files(patterns: list[str], text_column: str) -> Dataset:
    """One document per text file, or per line of a .jsonl file."""
    documents = []
    for pattern in patterns:
        files = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
        if not files:
            raise ValueError(f"text_files: no file matches {pattern!r}.")
        for file in files:
            if Path(file).suffix in (".jsonl", ".json"):
                part = load_dataset("json", data_files=file, split="train")
            else:
                part = load_dataset("text", data_files=file, sample_by="document", split="train")
                part = part.rename_columns({"text": text_column} if text_column != "text" else {})
            documents.append(named(part, Path(file).name, text_column))
    return concatenate_datasets(documents)


def named(documents: Dataset, source: str, text_column: str) -> Dataset:
    """The text column as "text", beside a "name" made of the source and the row."""
    if text_column not in documents.column_names:
        raise ValueError(f"{source} has no column {text_column!r}, but {', '.join(documents.column_names)}.")
    return documents.map(
        lambda text, row: {"name": f"{source}:{row}", "text": text},
        input_columns=text_column,
        with_indices=True,
        remove_columns=documents.column_names,
        desc=f"Reading {source}",
    )


def is_held_out(name: str, fraction: float) -> bool:
    """Decided by the name alone, so that other documents coming or going move none to the other part."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def load_documents(data: DataArguments) -> tuple[Dataset, Dataset]:
    """Training and validation documents. A Hub data set's own validation split is taken if it has one."""
    if data.dataset_name:
        splits = load_dataset(data.dataset_name, data.dataset_config_name)
        if "train" not in splits:
            raise ValueError(f"dataset_name: {data.dataset_name!r} has no split 'train', but {', '.join(splits)}.")
        parts = {name: named(splits[name], data.dataset_name, data.text_column) for name in splits if name != "test"}
        if "validation" in parts:
            return parts["train"], parts["validation"]
        documents = parts["train"]
    elif data.text_files:
        documents = text_files(data.text_files, data.text_column)
    else:
        documents = standard_library()

    held_out = [is_held_out(name, data.validation_fraction) for name in documents["name"]]
    training = documents.select(np.flatnonzero(~np.array(held_out)))
    validation = documents.select(np.flatnonzero(held_out))
    for part, name in ((training, "training"), (validation, "validation")):
        if not any(part["text"]):
            raise ValueError(
                f"No text is left for {name}: of {len(documents)} documents, {sum(held_out)} are held out by "
                f"validation_fraction={data.validation_fraction}. Give more documents or another fraction."
            )
    return training, validation


# ---- tokens ----


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text has tokens, and the tokens give back every byte."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise ValueError(f"vocab_size must be at least {len(alphabet) + 2} (bytes, special tokens), got {vocab_size}.")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT, PADDING], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode(documents: Dataset, tokenizer: PreTrainedTokenizerBase, desc: str) -> Dataset:
    """A row per document: the end-of-text token, then the document's own."""
    return documents.map(
        lambda texts: {
            "input_ids": [
                [tokenizer.eos_token_id, *ids] for ids in tokenizer(texts, add_special_tokens=False).input_ids
            ]
        },
        input_columns="text",
        batched=True,
        remove_columns=documents.column_names,
        desc=desc,
    )


def pack(documents: Dataset, length: int) -> Dataset:
    """Training samples: documents end to end, cut every `length` tokens; the rest of a batch of them is dropped."""

    def samples(documents: list[list[int]]) -> dict[str, list[list[int]]]:
        tokens = list(chain.from_iterable(documents))
        cut = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
        return {"input_ids": cut, "labels": cut}

    return documents.map(samples, input_columns="input_ids", batched=True, desc="Packing")


def cut(documents: Dataset, length: int, pad_token_id: int) -> Dataset:
    """Blocks to score, each of one document. Each repeats the last token of the one before: all tokens of a text have
    exactly one prediction."""

    def blocks(documents: list[list[int]]) -> dict[str, list[list[int]]]:
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for tokens in documents:
            for start in range(0, len(tokens) - 1, length - 1):
                block = tokens[start : start + length]
                padding = length - len(block)
                rows["input_ids"].append(block + [pad_token_id] * padding)
                rows["attention_mask"].append([1] * len(block) + [0] * padding)
                rows["labels"].append(block + [IGNORED] * padding)
        return rows

    return documents.map(blocks, input_columns="input_ids", batched=True, remove_columns=["input_ids"], desc="Cutting")


# ---- scores ----


def scores(nats: float, tokens: int, num_bytes: int) -> dict[str, float]:
    """The three usual ways to state a total loss; only bits per byte do not depend on the tokenizer."""
    return {
        "nats_per_token": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / num_bytes,
    }


def bigram_nats(training: Dataset, validation: Dataset, vocab_size: int) -> tuple[float, float]:
    """Total loss on the validation blocks of p(b|a) = (count(a, b) + k) / (count(a) + k·V), and the k.

    The counts are those of the training documents. k is the power of ten that is best for them by leave-one-out: every
    pair predicted from the counts of all others.
    """
    documents = tqdm(training["input_ids"], desc="Counting pairs of tokens", delay=2)
    tokens = np.fromiter(chain.from_iterable(documents), np.int64)
    pairs, counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
    contexts = np.bincount(tokens[:-1], minlength=vocab_size)

    def leave_one_out(k: float) -> float:
        return -np.sum(counts * np.log((counts - 1 + k) / (contexts[pairs // vocab_size] - 1 + k * vocab_size)))

    k = min((1.0, 0.1, 0.01, 0.001, 0.0001), key=leave_one_out)

    blocks = validation.with_format("numpy")
    labels = np.stack(blocks["labels"][:])
    scored = labels[:, 1:] != IGNORED
    previous, following = labels[:, :-1][scored], labels[:, 1:][scored]
    keys = previous * vocab_size + following
    places = np.searchsorted(pairs, keys).clip(max=len(pairs) - 1)
    seen = np.where(pairs[places] == keys, counts[places], 0)
    return float(-np.sum(np.log((seen + k) / (contexts[previous] + k * vocab_size)))), k


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[B, T-1] cross entropies instead of [B, T, V] logits, which would fill the memory; 0 where labels are ignored."""
    targets = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(targets)


# ---- what is written ----


def draw_curve(history: list[dict[str, float]], floor: float, path: Path) -> None:
    """Training and validation loss over the steps, with the bigram model's as a line."""
    training = [(log["step"], log["loss"]) for log in history if "loss" in log]
    validation = [(log["step"], log["eval_nats_per_token"]) for log in history if "eval_nats_per_token" in log]
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*training, strict=True), color="#9db4d3", label="training")
    axes.plot(*zip(*validation, strict=True), color="#1f4e8c", marker="o", linewidth=2, label="validation")
    axes.axhline(floor, color="#c4552d", linestyle="--", label="bigram model, validation")
    axes.annotate(f"{validation[-1][1]:.2f}", validation[-1], (0, 8), textcoords="offset points", ha="center")
    axes.annotate(f"{floor:.2f}", (validation[-1][0], floor), (0, 5), textcoords="offset points", ha="center")
    axes.set(title="BakaLLM against a bigram model", xlabel="optimizer steps", ylabel="loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments), description=__doc__.split("\n")[0])
    try:
        model_args, data, args = parser.parse_args_into_dataclasses()
        length = data.chunks_per_sample * model_args.chunk_size
        if length < 2:
            raise ValueError(f"chunks_per_sample: a sample must have two tokens or more, got {length}.")
        set_seed(args.seed)
        training_texts, validation_texts = load_documents(data)
        if data.tokenizer_name:
            tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_name)
        else:
            tokenizer = train_tokenizer(training_texts["text"], data.vocab_size)
    except ValueError as error:
        sys.exit(str(error))
    training_tokens = encode(training_texts, tokenizer, "Tokenizing the training part")
    validation_tokens = encode(validation_texts, tokenizer, "Tokenizing the validation part")
    if data.streaming:
        training = LaneDataset(
            training_tokens,
            num_lanes=data.num_lanes or args.train_batch_size * args.world_size,
            chunk_size=model_args.chunk_size,
            chunks_per_step=data.chunks_per_sample,
            seed=args.seed,
            pad_token_id=tokenizer.pad_token_id,
        )
    else:
        training = pack(training_tokens, length)
    validation = cut(validation_tokens, length, tokenizer.pad_token_id)
    if not len(training):
        sys.exit(f"The training text is shorter than one sample of {length} tokens.")
    num_tokens = sum(len(tokens) - 1 for tokens in validation_tokens["input_ids"])
    num_bytes = sum(len(text.encode()) for text in validation_texts["text"])

    model = BakaForCausalLM(
        BakaConfig(
            **asdict(model_args),
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    nats, k = bigram_nats(training_tokens, validation, len(tokenizer))
    bigram = scores(nats, num_tokens, num_bytes)
    if args.process_index == 0:
        print(
            f"{len(training_texts):,} training documents in {len(training):,} "
            f"{'steps of a lane' if data.streaming else 'samples'} of {length:,} tokens; "
            f"{len(validation_texts):,} validation documents, {num_tokens:,} tokens, {num_bytes:,} bytes; "
            f"{model.num_parameters():,} parameters"
        )

    trainer = BakaTrainer(
        model,
        args,
        data_collator=default_data_collator,
        train_dataset=training,
        eval_dataset=validation,
        processing_class=tokenizer,
        compute_metrics=lambda losses: scores(losses.predictions.sum(dtype=np.float64), num_tokens, num_bytes),
        preprocess_logits_for_metrics=token_losses,
    )
    resume = args.resume_from_checkpoint
    outcome = trainer.train(resume_from_checkpoint=True if resume == "last" else resume)
    metrics = trainer.evaluate()
    model.config.use_cache = True  # the Trainer switches it off; whoever loads the checkpoint wants it
    trainer.save_model()
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        output = Path(args.output_dir)
        steps, rows = trainer.state.global_step, args.train_batch_size * args.gradient_accumulation_steps
        about = dict(
            run_id=output.resolve().name,
            dataset=data.describe(),
            steps=steps,
            seed=args.seed,
            # Lanes have padding among their tokens, and of a resumed run only the last part was timed.
            tokens_seen=None if data.streaming else steps * rows * args.world_size * length,
            wall_time=None if resume else outcome.metrics["train_runtime"],
            curves=curves_of(trainer.state.log_history),
        )
        blocks = {"loss": metrics["eval_nats_per_token"], "bits_per_byte": metrics["eval_bits_per_byte"]}
        blocks_note = f"in blocks of {length:,} tokens, each read with an empty memory"
        results = [
            Result.of(model, blocks, num_tokens=num_tokens, split="validation in blocks", note=blocks_note, **about)
        ]
        if args.world_size == 1:
            whole = evaluate_documents(model, list(validation_tokens["input_ids"]), num_bytes=num_bytes)
            carried = what_is_carried(model.config) or "nothing"
            whole_note = f"{len(validation_texts):,} whole documents, {carried} carried along"
            results.append(Result.of(model, whole, split="validation", note=whole_note, **about))
        results.append(
            Result(
                run_id=f"bigram, add-{k:g}",
                dataset=data.describe(),
                split="validation",
                loss=bigram["nats_per_token"],
                bits_per_byte=bigram["bits_per_byte"],
                num_tokens=num_tokens,
                note="of the same tokens, counted in the same training text",
            )
        )
        for database in {output / "results.db", Path(args.results_db or output / "results.db")}:
            for result in results:
                write_result(database, result)
        draw_curve(trainer.state.log_history, bigram["nats_per_token"], output / "training_curve.png")
        print(f"\n{'held-out text':<44}{'nats per token':>16}{'perplexity':>14}{'bits per byte':>16}")
        for result in results:
            print(
                f"{result.run_id + ', ' + result.split:<44}{result.loss:16.4f}{result.perplexity:14.2f}"
                f"{result.bits_per_byte:16.4f}"
            )
        print(f"Checkpoint, results, training curve and model card: {output}/")
    # With those results; all processes push, as all may hold a part of the model.
    card: dict[str, Any] = {
        "dataset": f"{data.describe()} ({len(training_texts):,} documents)",
        "dataset_tags": data.hub_name,
    }
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
