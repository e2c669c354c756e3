"""Model cards: the README.md of a checkpoint, filled in with what is known of it and with nothing else.

    results = read_results("results.db")
    card = model_card(model, "baka-small", results=[r for r in results if r.run_id == "baka-small"])
    card.save("baka-small/README.md")

`BakaTrainer` writes one whenever it pushes, or when its `create_model_card` is called: what it knows of the training it
tells by itself, scores it finds in `results.db` in its output folder. A fact that is missing is left out of the card.

The template is `model_card.md` at the top of the repository, a copy of which lies in the installed package.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.modelcard import TrainingSummary

from .data import LaneDataset, StreamingLanes
from .results import Result, curves_of, one_line, read_results, results_table, to_markdown

RESULTS_FILE = "results.db"  # in a Trainer's output folder
TAGS = ("baka", "recurrent-memory", "long-context")
SCORE_COLUMNS = ("run", "seed", "data", "loss", "perplexity", "bits/byte", "note")  # of `results_table`
# The last part of a model's class name, its Auto class and the Hub's name of what it does.
TASKS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "Model": ("AutoModel", "feature-extraction"),
}


def what_is_carried(config: Any) -> str:
    """What a chunk hands to the next, in words; none if every chunk is read by itself."""
    carried = [f"{config.num_memory_tokens} memory vectors"] if config.num_memory_tokens else []
    carried += ["associations"] if config.associative_dim else []
    carried += ["the keys and values of the chunk before"] if config.use_xl_cache else []
    *others, last = carried or [""]
    return f"{', '.join(others)} and {last}" if others else last


def model_card(
    model: Any,
    name: str,
    *,
    repository: str | None = None,
    results: Sequence[Result] = (),
    others: Sequence[Result] = (),
    losses: Mapping[str, float] | None = None,
    training: Mapping[str, str] | None = None,
    has_tokenizer: bool = True,
    dataset: str | Sequence[str] | None = None,
    datasets: str | Sequence[str] | None = None,
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    base_model: str | None = None,
    task: str | None = None,
    tags: str | Sequence[str] | None = None,
) -> ModelCard:
    """The card of a model. Its scores also stand in the metadata, as the `model-index` that the Hub shows.

    Args:
        model: a BakaLLM, or one that a checkpoint brought with its own code.
        name: what to call it.
        repository: where the snippet loads it from, "user/name" or a folder; `name` if not given.
        results: the model's own scores.
        others: scores of other models, shown beside them.
        losses: of evaluations while training, by split.
        training: what else is known of the training: rows of a table.
        has_tokenizer: whether a tokenizer lies beside the model.
        dataset: what it was trained on, in words.
        datasets: names of data sets on the Hub that it was trained on. A result whose `dataset` is one of them, alone
            or before a space and the name of a configuration, is linked to it.
        language, license, base_model, task, tags: as the Hub calls them. The task follows from the class if not given.

    Raises:
        ValueError: `model` is no BakaLLM, or two of `results` are of the same data set and split.
    """
    if getattr(model.config, "model_type", None) != "baka" or not hasattr(model, "new_cache"):
        raise ValueError(f"`model` must be a BakaLLM, got {type(model).__name__}.")
    places = [(result.dataset, result.split) for result in results]
    if len(set(places)) < len(places):
        raise ValueError(f"`results` must hold one result of each data set and split, got {places!r}.")
    found = (TASKS[end] for end in TASKS if type(model).__name__.endswith(end))
    auto_class, own_task = next(found, ("AutoModel", "feature-extraction"))
    config, datasets = model.config, _listed(datasets)
    measured = max((result for result in results if result.loss_by_chunk), key=_depth, default=None)
    scores = [score for result in results for score in _eval_results(result, task or own_task, datasets)]
    card_data = ModelCardData(
        language=_listed(language) or None,
        license=license,
        library_name="transformers",
        pipeline_tag=task or own_task,
        base_model=base_model,
        datasets=datasets or None,
        tags=[*TAGS, *_listed(tags)],
        model_name=name if scores else None,
        eval_results=scores or None,  # an empty list would be an index without results
    )
    origin = None
    if base_model:
        base = one_line(base_model)
        origin = f"fine-tuned from [{base}](https://huggingface.co/{base})"
    elif training:
        origin = "trained" if config.name_or_path else "trained from scratch"
    return ModelCard.from_template(
        card_data,
        template_path=str(template_path()),
        name=one_line(name),
        repository=json.dumps(repository or name, ensure_ascii=False),  # a string of Python's as well
        config=config,
        auto_class=auto_class,
        task=own_task,
        has_tokenizer=has_tokenizer,
        carried=what_is_carried(config),
        origin=origin,
        dataset=one_line(" and ".join(_listed(dataset))),
        num_parameters=model.num_parameters(),
        state_bytes=model.new_cache(1).nbytes,
        dtype=str(model.dtype).removeprefix("torch."),
        depths=_depths_table(measured, config.chunk_size) if measured else None,
        depths_of=one_line(f"{measured.dataset}/{measured.split}") if measured else None,
        deepest=_depth(measured) if measured else None,
        training={_cell(label): _cell(value) for label, value in (training or {}).items()},
        scores=_scores_table([*results, *others]),
        losses={one_line(split): loss for split, loss in (losses or {}).items()},
    )


def trainer_card(
    trainer: Any,
    *,
    model_name: str | None = None,
    dataset: str | Sequence[str] | None = None,
    dataset_tags: str | Sequence[str] | None = None,
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | Sequence[str] | None = None,
    tags: str | Sequence[str] | None = None,
) -> ModelCard:
    """The card of what a `Trainer` trains, now; the arguments are those of `Trainer.create_model_card`.

    Scores are those in `results.db` of the output folder whose run has the name of the folder or of `args.run_name`,
    this seed or none, and as many steps as the Trainer has taken, and so are this model's. Last scores of all other
    runs in the file are shown beside them.

    Args:
        finetuned_from: the model that training began with; if not given, the repository that it was loaded from.
        license: if not given, the one that the Hub says that model has.
    """
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    folder, step = Path(args.output_dir).absolute(), trainer.state.global_step
    own, others = _results_of(folder / RESULTS_FILE, {folder.name, args.run_name}, args.seed, step)
    losses = {
        split.replace("_", " "): points[-1][1]
        for split, points in curves_of(trainer.state.log_history).items()
        if split != "train" and points[-1][0] == step
    }
    base = finetuned_from or _repository_of(model)
    # Trainer's own default is the last part of the repository's name.
    name = model_name or (trainer.hub_model_id or folder.name).rpartition("/")[2]
    return model_card(
        model,
        name,
        repository=trainer.hub_model_id,
        results=own,
        others=others,
        losses=losses,
        training=_facts_of(trainer, model, own) if step else None,
        has_tokenizer=trainer.processing_class is not None,
        dataset=dataset or _listed(dataset_tags) or None,
        datasets=dataset_tags,
        language=language,
        # Asks the Hub, if it can.
        license=TrainingSummary(name, license=license, finetuned_from=base).license,
        base_model=base,
        task=next(iter(_listed(tasks)), None),
        tags=list(dict.fromkeys([*_listed(tags), *_tags_in(folder / "README.md"), "generated_from_trainer"])),
    )


def template_path() -> Path:
    """The template of the cards, in an installed package or in a checkout of the repository."""
    installed = Path(__file__).with_name("model_card.md")
    return installed if installed.is_file() else Path(__file__).resolve().parents[2] / "model_card.md"


# What a Trainer knows


def _facts_of(trainer: Any, model: Any, results: Sequence[Result]) -> dict[str, str]:
    """The training as the Trainer's own objects tell it: optimizer and schedule may be others than those of `args`."""
    args, state, lanes = trainer.args, trainer.state, trainer.train_dataset
    facts = {}
    processes = 1 if trainer.accelerator.split_batches else args.world_size
    rows = args.train_batch_size * args.gradient_accumulation_steps * processes
    facts["Steps"] = f"{state.global_step:,}, each of {rows:,} rows"
    if isinstance(lanes, LaneDataset | StreamingLanes):
        facts["Steps"] += f" of {lanes.row_length:,} tokens"
    if isinstance(lanes, LaneDataset | StreamingLanes) and what_is_carried(model.config):
        carries = getattr(trainer, "_carries", False)
        facts["Memory"] = "carried on from step to step" if carries else "empty at the beginning of every row"
    chunks = getattr(args, "chunks_per_backward", None)
    if chunks is not None:
        facts["Gradients"] = f"span {chunks} chunk(s)"
    if model.config.bptt_chunks is not None:
        facts["Gradients through memory"] = f"reach {model.config.bptt_chunks} chunk(s) back"
    tokens = next((result.tokens_seen for result in results if result.tokens_seen), None)
    tokens = tokens or state.num_input_tokens_seen
    if tokens:
        facts["Tokens read"] = f"{tokens:,}"
    if trainer.optimizer is not None:
        facts["Optimizer"] = _optimizer(getattr(trainer.optimizer, "optimizer", trainer.optimizer))
    if trainer._created_lr_scheduler:
        warmup = args.get_warmup_steps(args.max_steps if args.max_steps > 0 else state.max_steps)
        facts["Schedule"] = args.lr_scheduler_type.value + (f", {warmup:,} steps of warm-up" if warmup else "")
    mixed = next((f", {name} mixed precision" for name in ("bf16", "fp16") if getattr(args, name)), "")
    facts["Precision"] = f"{str(model.dtype).removeprefix('torch.')} weights{mixed}"
    facts["Seed"] = str(args.seed)
    for result in results:
        if result.wall_time:
            minutes, seconds = divmod(round(result.wall_time), 60)
            facts["Time"] = f"{minutes} min {seconds} s" + (f" on {result.device}" if result.device else "")
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    facts["Software"] = ", ".join(f"{package} {version}" for package, version in versions.items())
    return facts


def _optimizer(optimizer: Any) -> str:
    """Its class and what its parameter groups say; a scheduler keeps the peak learning rate as the initial one."""
    groups = optimizer.param_groups
    told = [f"learning rate {max(group.get('initial_lr', group['lr']) for group in groups):g}"]
    if "betas" in groups[0]:
        told.append("betas {:g} and {:g}".format(*groups[0]["betas"]))
    decay = max(group.get("weight_decay", 0) for group in groups)
    if decay:
        told.append(f"weight decay {decay:g}")
    return ", ".join([type(optimizer).__name__, *told])


def _results_of(path: Path, runs: set[str | None], seed: int, step: int) -> tuple[list[Result], list[Result]]:
    """The results in a file, if there is one, of this model, and the last ones of other runs and seeds."""
    if not path.is_file():
        return [], []
    own: dict[tuple[str, str], Result] = {}
    others: dict[tuple[str, int | None, str, str], Result] = {}
    # Of two results of this model, one that tells no seed comes first and is replaced.
    for result in sorted(read_results(path), key=lambda result: (result.steps, result.seed is not None)):
        if result.run_id not in runs or result.seed not in (None, seed):
            others[result.run_id, result.seed, result.dataset, result.split] = result
        elif result.steps == step:
            own[result.dataset, result.split] = result
    return list(own.values()), list(others.values()) if own else []


def _repository_of(model: Any) -> str | None:
    """The repository on the Hub that a model was loaded from. A folder of this machine is nobody else's business."""
    name = model.config.name_or_path
    if not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _tags_in(path: Path) -> list[str]:
    """The tags of a card that is there already."""
    return _listed(ModelCard.load(path, ignore_metadata_errors=True).data.get("tags")) if path.is_file() else []


# Scores


def _eval_results(result: Result, task: str, datasets: Sequence[str]) -> list[EvalResult]:
    """For the `model-index`. NaN and ∞ are no numbers in it."""
    name, _, config = result.dataset.partition(" ")
    is_known = name in datasets
    metrics = {
        "loss": ("Loss (nats per token)", result.loss),
        "perplexity": ("Perplexity", result.perplexity),
        "bits_per_byte": ("Bits per byte", result.bits_per_byte),
    }
    return [
        EvalResult(
            task_type=task,
            dataset_type=name if is_known else result.dataset,
            dataset_name=result.dataset,
            dataset_config=config if is_known and config else None,
            dataset_split=result.split,
            metric_type=metric,
            metric_name=label,
            metric_value=float(value),
        )
        for metric, (label, value) in metrics.items()
        if value is not None and math.isfinite(value)
    ]


def _scores_table(results: Sequence[Result]) -> str | None:
    if not results:
        return None
    table = results_table(results)
    columns = [index for index, column in enumerate(table[0]) if column in SCORE_COLUMNS]
    return to_markdown([[row[index] for index in columns] for row in table]).rstrip()


def _depth(result: Result) -> int:
    """How many chunks into a document tokens were scored."""
    return max((entry["chunk"] for entry in result.loss_by_chunk), default=-1) + 1


def _depths_table(result: Result, chunk_size: int) -> str:
    """Mean losses of chunks 0, 1, 2 to 3, 4 to 7, …"""
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for entry in result.loss_by_chunk:
        groups.setdefault(entry["chunk"].bit_length(), []).append(entry)
    table = [["tokens read before", "loss", "tokens scored"]]
    for level, group in sorted(groups.items()):
        first, last = (1 << level) // 2, (1 << level) - 1
        count = sum(entry["num_tokens"] for entry in group)
        loss = sum(entry["loss"] * entry["num_tokens"] for entry in group) / count
        table.append([f"{first * chunk_size:,} to {(last + 1) * chunk_size - 1:,}", f"{loss:.4f}", f"{count:,}"])
    return to_markdown(table).rstrip()


def _cell(text: str) -> str:
    return one_line(text).replace("|", "\\|")


def _listed(values: str | Sequence[str] | None) -> list[str]:
    return [values] if isinstance(values, str) else [value for value in values or () if value]


__all__ = ["model_card", "template_path", "trainer_card"]
