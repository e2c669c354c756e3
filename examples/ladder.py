"""Train models one after another on the same tokens by the same recipe, and keep every figure in a database.

    python examples/ladder.py --train train.jsonl.xz --valid enwiki=valid.jsonl.xz books=books.jsonl.xz \\
        --tokenizer tokenizer.json.xz --worth books --seeds 0 1 --output baka-ladder \\
        --runs pristine xl carry default default:num_memory_tokens=64 silu=carry:hidden_act=silu qwen3:context=2048

A run is NAME, NAME:field=value,field=value or LABEL=NAME:field=value; results know it by its label, or else by all of
this. NAME is a rung of the diary's ladder ("pristine" to "carry"), "default", or a peer, "llama" or "qwen3" (Llama with
QK-norm), which sees windows of `context` tokens. A field is one of the configuration, of `BakaTrainingArguments`, or an
option below that says "run".

Several processes with the same output folder, one for each GPU (CUDA_VISIBLE_DEVICES), share tokens and take runs from
the list, each run once. What is in the database already is not run again; a run that was cut short is, even if some of
its scores are there. The folder then holds results.db; look at it by
`python -m baka_hf.results baka-ladder/results.db summary`.
"""

import ast
import gc
import hashlib
import re
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
    default_data_collator,
    set_seed,
)

from baka_hf import BakaConfig, BakaForCausalLM
from baka_hf.configuration_baka import RUNGS
from baka_hf.data import LaneDataset, pack_documents
from baka_hf.evaluation import evaluate_documents, evaluate_windows, gain_by_depth
from baka_hf.results import Result, curves_of, facts_about, read_results, summarize, to_table, to_text, write_result
from baka_hf.texts import Tokens, WindowDataset, load_tokens
from baka_hf.training import BakaTrainer, BakaTrainingArguments

PEERS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
WORTH_FROM = 8  # chunks from which on a document has a past worth asking for


@dataclass
class Arguments:
    train: list[str] = field(
        metadata={"help": 'Training text: .jsonl (a document a line, in "text") or text files, also .xz.'}
    )
    valid: list[str] = field(metadata={"help": "Held-out text, NAME=FILE each."})
    tokenizer: str = field(metadata={"help": "tokenizer.json, also .xz, or the folder or name of a fast tokenizer."})
    runs: list[str] = field(metadata={"help": "What is trained, see above."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Each run is trained with each of them."})
    output: str = field(default="baka-ladder", metadata={"help": "Folder of results.db, and of locks and tokens."})
    results_db: str | None = field(default=None, metadata={"help": "File of the results. results.db of the output."})
    tokens: str | None = field(
        default=None, metadata={"help": "File that keeps the tokens; made if there is none. tokens.npz of the output."}
    )
    end_of_text: str = field(default="<|endoftext|>", metadata={"help": "Token that stands before every document."})
    valid_chars: int = field(default=200_000, metadata={"help": "Characters that are read of a held-out document."})
    eval_batch_size: int = field(default=16, metadata={"help": "Held-out documents read side by side."})
    worth: list[str] = field(
        default_factory=list, metadata={"help": "Held-out text on which it is measured what the past is worth."}
    )
    save: bool = field(
        default=False, metadata={"help": "Keep every trained model, in models/ of the output, before it is scored."}
    )
    deadline: float | None = field(
        default=None, metadata={"help": "Seconds from the start by which to end: take no run that would last longer."}
    )


@dataclass
class Setting:
    """What all runs share, unless one says otherwise."""

    hidden_size: int = field(default=512, metadata={"help": "Run: width D of the residual stream."})
    intermediate_size: int = field(default=2048, metadata={"help": "Run: width of the gated MLPs."})
    num_hidden_layers: int = field(default=8, metadata={"help": "Run: blocks."})
    num_attention_heads: int = field(default=8, metadata={"help": "Run: heads of a block."})
    chunk_size: int = field(default=512, metadata={"help": "Run: tokens of a chunk; the tokens of a step stay."})
    num_lanes: int = field(default=16, metadata={"help": "Run: lanes of a step."})
    chunks_per_step: int = field(default=4, metadata={"help": "Run: chunks of each lane in a step."})
    pack: int | None = field(
        default=None, metadata={"help": "Run: documents are put together until they have so many tokens, for lanes."}
    )
    context: int = field(default=2048, metadata={"help": "Run: tokens that a peer sees; the tokens of a step stay."})
    num_epochs: int = field(default=1, metadata={"help": "Run: passes over the training text."})
    max_tokens: int | None = field(default=None, metadata={"help": "Run: no more tokens of text than this."})
    max_steps: int | None = field(default=None, metadata={"help": "Run: no more optimizer steps than this."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Run: peak learning rate of AdamW."})
    muon_learning_rate: float | None = field(default=None, metadata={"help": "Run: peak rate of Muon, if it is used."})
    warmup_steps: int = field(default=50, metadata={"help": "Run: steps of linear warm-up."})
    decay: float = field(default=0.5, metadata={"help": "Run: last share of the steps in which the rate falls to 0."})
    zero_init: bool = field(default=True, metadata={"help": "Run: o_proj and down_proj of all blocks begin as zeros."})


# ---- runs ----


@dataclass
class Run:
    name: str  # in the results
    base: str  # a rung, "default" or a peer
    setting: Setting
    config: dict[str, Any]  # fields that differ
    training: dict[str, Any]  # of BakaTrainingArguments

    @classmethod
    def parse(cls, text: str, common: Setting) -> "Run":
        head, _, changes = text.partition(":")
        label, _, base = head.rpartition("=")
        if base not in (known := ("default", *RUNGS, *PEERS)):
            raise ValueError(f"runs: expected one of {', '.join(known)} in {text!r}, got {base!r}.")
        configuration = PEERS[base][0] if base in PEERS else BakaConfig
        kinds = {"setting": Setting, "config": configuration, "training": BakaTrainingArguments}
        found: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
        for change in re.split(r",(?=\w+=)", changes) if changes else ():
            name, _, value = change.partition("=")
            kind = next((k for k, owner in kinds.items() if name in {f.name for f in fields(owner)}), None)
            if kind is None:
                raise ValueError(f"runs: {name!r} in {text!r} is no field of a configuration, nor an option of a run.")
            try:
                found[kind][name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                found[kind][name] = value
        setting = replace(common, **found["setting"])
        if "chunk_size" in found["setting"] and "chunks_per_step" not in found["setting"]:
            setting.chunks_per_step = common.chunks_per_step * common.chunk_size // setting.chunk_size
        run = cls(label or text, base, setting, found["config"], found["training"])
        run.configure(vocab_size=2, end=0)  # what no model can have is refused before any text is read
        if not run.rows:
            raise ValueError(f"runs: a window of {text!r} has more tokens than a step.")
        return run

    @property
    def rows(self) -> int:
        """Of a batch. A step has the same number of tokens for lanes and windows."""
        setting = self.setting
        if self.base in PEERS:
            return setting.num_lanes * setting.chunks_per_step * setting.chunk_size // setting.context
        return setting.num_lanes

    @property
    def splits(self) -> dict[str, int | None]:
        """Names of the ways in which held-out text is read, with how far a peer's window moves on in each."""
        return {"valid": None} | ({"valid, sliding": self.setting.context // 2} if self.base in PEERS else {})

    def configure(self, vocab_size: int, end: int) -> Any:
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        fields = {name: getattr(self.setting, name) for name in sizes}
        fields |= dict(vocab_size=vocab_size, bos_token_id=end, eos_token_id=end)
        if self.base in PEERS:
            heads, context = self.setting.num_attention_heads, self.setting.context
            fields |= dict(head_dim=self.setting.hidden_size // heads, num_key_value_heads=heads)
            return PEERS[self.base][0](**fields | dict(max_position_embeddings=context) | self.config)
        fields |= dict(chunk_size=self.setting.chunk_size)
        if self.base == "default":
            return BakaConfig(**fields | self.config)
        return BakaConfig.from_dict(BakaConfig.rung(self.base, **fields).to_dict() | self.config)

    def is_done(self, seed: int, tokens: Tokens, database: Path) -> bool:
        """Whether it is among the results; a ValueError if what has its name there was made otherwise."""
        results = read_results(database) if database.exists() else []
        found = [result for result in results if (result.run_id, result.seed) == (self.name, seed)]
        for result in found:
            model = facts_about(self.configure(tokens.vocab_size, tokens.end_of_text_id))["model"]
            known = asdict(Setting()) | result.training | result.model  # an older record lacks newer options
            wanted = asdict(self.setting) | self.training | model
            for name in wanted.keys() & known.keys():
                if known[name] != wanted[name]:
                    raise ValueError(
                        f"run {self.name!r}, seed {seed}, is in {database} with {name}={known[name]!r}, not "
                        f"{wanted[name]!r}: give it another label or write to another folder."
                    )
        scored = {(result.dataset, result.split) for result in found}
        return all((name, split) in scored for name in tokens.documents if name != "train" for split in self.splits)


# ---- training and scores ----


class Stopwatch(TrainerCallback):
    """The mean time of a step, without the first ones, which compile and record."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == min(20, state.max_steps // 2):
            self.first, self.begin = state.global_step, clock()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_time = (clock() - self.begin) / (state.global_step - self.first)


def clock() -> float:
    """Seconds, when the device has done what it was told to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def train(run: Run, seed: int, tokens: Tokens, output: str) -> tuple[Any, dict[str, Any]]:
    """The model, and what a `Result` says of its training."""
    on_gpu, setting = torch.cuda.is_available(), run.setting
    documents = tokens.documents["train"]
    if setting.max_tokens is not None:
        ends = np.cumsum([len(document) for document in documents])
        documents = documents[: max(1, ends.searchsorted(setting.max_tokens, side="right"))]
    set_seed(seed)
    config = run.configure(tokens.vocab_size, tokens.end_of_text_id)
    model: Any
    dataset: LaneDataset | WindowDataset
    if run.base in PEERS:
        model = PEERS[run.base][1](config)
        dataset = WindowDataset(documents, setting.context, seed, setting.num_epochs)
    else:
        model = BakaForCausalLM(config)
        sizes = setting.num_lanes, setting.chunk_size, setting.chunks_per_step
        packed = documents if setting.pack is None else pack_documents(documents, setting.pack)
        dataset = LaneDataset(packed, *sizes, seed=seed, num_epochs=setting.num_epochs)
    if setting.zero_init:
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                torch.nn.init.zeros_(weight)
    steps = min(len(dataset) // run.rows, setting.max_steps or sys.maxsize)
    if not steps:
        raise ValueError(f"run {run.name!r}: the training text is shorter than a step.")
    decay = round(setting.decay * steps)
    options: dict[str, Any] = dict(
        per_device_train_batch_size=run.rows,
        max_steps=steps,
        learning_rate=setting.learning_rate,
        weight_decay=0.1,
        adam_beta2=0.95,
        warmup_steps=min(setting.warmup_steps, steps - decay),
        lr_scheduler_type="warmup_stable_decay",
        bf16=on_gpu,
        tf32=on_gpu or None,  # what is kept in float32: associations
        torch_compile=on_gpu,
        cuda_graphs=on_gpu,
        seed=seed,
        train_sampling_strategy="sequential",
        logging_steps=max(1, steps // 100),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
    )
    if "lr_scheduler_type" not in run.training:
        options["lr_scheduler_kwargs"] = dict(num_decay_steps=decay, decay_type="linear")
    if setting.muon_learning_rate is not None:
        options["muon_learning_rate"] = setting.muon_learning_rate
    arguments, watch = BakaTrainingArguments(output, **options | run.training), Stopwatch()
    trainer = BakaTrainer(model, arguments, default_data_collator, dataset, callbacks=[watch])  # of windows: a Trainer
    trainer.remove_callback(PrinterCallback)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    outcome = trainer.train()
    if isinstance(dataset, LaneDataset):  # of which a part is padding
        tokens_seen = round(dataset.stats.num_tokens * steps / dataset.num_steps)
    else:
        tokens_seen = steps * run.rows * setting.context
    model.config.use_cache = True  # the Trainer switches it off
    measured = {"step_time": watch.step_time, "tokens_per_second": tokens_seen / steps / watch.step_time}
    if on_gpu:
        measured["peak_memory"] = torch.cuda.max_memory_allocated()
    wall_time, curves = outcome.metrics["train_runtime"], curves_of(trainer.state.log_history)
    training = asdict(setting) | run.training | measured
    about = dict(seed=seed, steps=steps, tokens_seen=tokens_seen, wall_time=wall_time)
    return model, about | dict(curves=curves, training=training)


def score(run: Run, model: Any, tokens: Tokens, args: Arguments, **about: Any) -> Iterator[Result]:
    """Results on every held-out text, with what the past is worth where it is asked for."""
    for dataset in [name for name in tokens.documents if name != "train"]:
        documents, num_bytes = tokens.documents[dataset], tokens.num_bytes[dataset]
        about |= dict(run_id=run.name, dataset=dataset)
        if run.base in PEERS:
            size, context = run.setting.chunk_size, run.setting.context
            options = dict(chunk_size=size, batch_size=max(1, args.eval_batch_size * size // context))
            for split, stride in run.splits.items():
                scores = evaluate_windows(model, documents, context, stride, num_bytes=num_bytes, **options)
                result = Result.of(model, scores, split=split, **about)
                yield replace(result, model=result.model | {"chunk_size": size})  # of its losses by depth
            continue
        options = dict(batch_size=args.eval_batch_size, progress=False, by_document=True)
        own, gains, pasts = evaluate_documents(model, documents, num_bytes=num_bytes, **options), {}, []
        if dataset in args.worth:
            has_memory = model.config.num_memory_tokens or model.config.associative_dim
            pasts += [("memory", "exchanged"), ("memory", "learned")] if has_memory else []
            pasts += [("keys", "exchanged")] if model.config.use_xl_cache else []
        for part, past in pasts:
            other = evaluate_documents(model, documents, **options, **{part: past})
            gains[f"{part} {past}"] = gain_by_depth(own, other) + gain_by_depth(own, other, (WORTH_FROM,))
        yield Result.of(model, own, split="valid", gains=gains, **about)


def main() -> None:
    begin = time.perf_counter()
    parser = HfArgumentParser((Arguments, Setting), description=__doc__.split("\n")[0])
    args, setting = parser.parse_args_into_dataclasses()
    try:
        valid = dict(text.partition("=")[::2] for text in args.valid)
        if missing := [name for name in (*valid, *args.worth) if not valid.get(name) or name == "train"]:
            raise ValueError(f"valid: expected NAME=FILE for every held-out text, got none for {', '.join(missing)}.")
        runs = [Run.parse(text, setting) for text in args.runs]
        locks, database = Path(args.output, "locks"), Path(args.results_db or Path(args.output, "results.db"))
        locks.mkdir(parents=True, exist_ok=True)
        tokens = load_tokens(
            args.tokens or Path(args.output, "tokens.npz"),
            {"train": args.train} | {name: [path] for name, path in valid.items()},
            args.tokenizer,
            end_of_text=args.end_of_text,
            num_chars=dict.fromkeys(valid, args.valid_chars),
        )
        todo = [(run, seed) for seed in args.seeds for run in runs if not run.is_done(seed, tokens, database)]
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

    lasted, failed = 0.0, []
    for run, seed in todo:
        name, start = f"{run.name}, seed {seed}", time.perf_counter()
        if args.deadline is not None and start - begin + lasted > args.deadline:
            print(f"{name}: no time is left for it", flush=True)
            continue
        try:
            with FileLock(locks / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock", timeout=0):
                if run.is_done(seed, tokens, database):
                    continue
                model, about = train(run, seed, tokens, args.output)
                if args.save:
                    model.save_pretrained(Path(args.output, "models", re.sub(r"[^\w.=-]+", "_", name)))
                results = []
                with torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()):
                    for result in score(run, model, tokens, args, **about):
                        write_result(database, result)  # at once: what ends the program takes no others
                        results.append(result)
        except Timeout:
            continue  # another process has it
        except Exception:  # the others go on
            traceback.print_exc()
            failed.append(name)
            continue
        finally:  # nothing of this model is left when the next one is measured
            model = None
            torch.compiler.reset()
            if torch.cuda.is_available():
                gc.collect()
                torch.cuda.empty_cache()
        lasted = time.perf_counter() - start
        losses = ", ".join(f"{result.dataset}/{result.split} {result.loss:.4f}" for result in results)
        print(f"{name}: {lasted:.0f} s, of which {results[0].wall_time:.0f} in training; {losses}", flush=True)
    if database.exists():
        print("\n" + to_text(to_table(summarize(read_results(database)))), end="")
    if failed:
        sys.exit(f"error: failed were {'; '.join(failed)}")


if __name__ == "__main__":
    main()
