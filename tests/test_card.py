"""Model cards say what is known, leave out what is not, and their snippets run."""

import ast
import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONFIGS, random_tokens, snippet, tiny_config
from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerFast

from baka_hf import (
    BakaConfig,
    BakaForCausalLM,
    BakaForSequenceClassification,
    BakaForTokenClassification,
    BakaModel,
)
from baka_hf.data import LaneDataset
from baka_hf.evaluation import evaluate_documents
from baka_hf.hub import model_card, what_is_carried
from baka_hf.results import Result, write_result
from baka_hf.training import BakaTrainer, BakaTrainingArguments

TOKEN = "hf_" + "s3cret" * 6


def result(**values: Any) -> Result:
    return Result(**dict(run_id="tiny", dataset="wiki raw-1", split="test", loss=2.0, num_tokens=10) | values)


def trainer(folder: Path, **arguments: Any) -> BakaTrainer:
    """One that trains two steps on two lanes."""
    torch.manual_seed(0)
    model = BakaForCausalLM(arguments.pop("config", None) or tiny_config())
    others = {name: arguments.pop(name) for name in ("optimizers", "processing_class") if name in arguments}
    documents = [random_tokens(model.config, 40, seed=seed) for seed in range(4)]
    lanes = LaneDataset(documents, num_lanes=2, chunk_size=model.config.chunk_size, chunks_per_step=4)
    defaults = dict(
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    args = BakaTrainingArguments(str(folder), **defaults | arguments)
    return BakaTrainer(model, args, train_dataset=lanes, eval_dataset=lanes, **others)


# What is known


@pytest.mark.smoke
def test_a_card_of_a_model_alone(tmp_path: Path) -> None:
    """No training, no data, no scores, no licence: nothing of them."""
    card = model_card(BakaForCausalLM(tiny_config()), "tiny")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["baka", "recurrent-memory", "long-context"],
    }
    headings = re.findall(r"^#+ (.*)$", str(card), re.MULTILINE)
    assert headings == ["tiny", "Use", "Memory", "Limits"]
    assert "It has 3,156 parameters.\n" in str(card) and "How well it remembers was not measured." in str(card)
    assert not re.search(r"\btrained\b|None|\{\{|\{%|\n\n\n", str(card))


@pytest.mark.parametrize("name", ["rmt_carry", "rmt_without_xl", "xl", "associations_of_tokens", "pristine"])
def test_a_card_tells_what_is_carried(name: str) -> None:
    config = tiny_config(**CONFIGS[name])
    model = BakaForCausalLM(config)
    card = str(model_card(model, "tiny"))
    assert ("2 memory vectors" in card) == bool(config.num_memory_tokens)
    assert ("the keys and values of the chunk before" in card) == config.use_xl_cache
    assert ("hands what it has understood" in card) == (name != "pristine")
    assert ("memory vectors" in card) == bool(config.num_memory_tokens)
    assert ("seen through the associations only" in card) == (name == "associations_of_tokens")
    assert ("taught the associations to keep it" in card) == (name == "associations_of_tokens")
    assert ("Nothing is left of text before" in card) == (name == "pristine")
    assert f"{model.new_cache(1).nbytes:,} bytes a row" in card


@pytest.mark.smoke
def test_scores_are_read_back_as_the_hub_reads_them(tmp_path: Path) -> None:
    """Three metrics of each split in the `model-index`; a data set of the Hub by its name and configuration."""
    scores = [result(bits_per_byte=1.5), result(dataset="my notes", loss=3.0)]
    other = result(run_id="bigram", loss=5.0, note="counts | smoothed")
    model = BakaForCausalLM(tiny_config())
    card = model_card(
        model, "tiny", results=scores, others=[other], datasets="wiki", language="en", license="mit", tags="tests"
    )
    card.save(tmp_path / "README.md")
    found = ModelCard.load(tmp_path / "README.md").data
    assert (found.language, found.license, found.datasets) == (["en"], "mit", ["wiki"])
    assert found.tags[-1] == "tests" and found.model_name == "tiny"
    metrics = [
        (each.dataset_type, each.dataset_config, each.dataset_split, each.metric_type, each.metric_value)
        for each in found.eval_results
    ]
    assert metrics == [
        ("wiki", "raw-1", "test", "loss", 2.0),
        ("wiki", "raw-1", "test", "perplexity", scores[0].perplexity),
        ("wiki", "raw-1", "test", "bits_per_byte", 1.5),
        ("my notes", None, "test", "loss", 3.0),
        ("my notes", None, "test", "perplexity", scores[1].perplexity),
    ]
    rows = [line for line in str(card).splitlines() if re.match(r"\| (tiny|bigram) ", line)]
    assert rows[0] == "| tiny | wiki raw-1/test | 2.0000 | 7.39 | 1.5000 |  |"
    assert rows[-1] == "| bigram | wiki raw-1/test | 5.0000 | 148.41 |  | counts \\| smoothed |"


def test_what_is_no_number_is_in_the_text_alone() -> None:
    card = model_card(BakaForCausalLM(tiny_config()), "tiny", results=[result(loss=float("nan"))])
    assert card.data.eval_results is None and "| tiny | wiki raw-1/test | nan |" in str(card)


def test_losses_by_depth_are_means_over_tokens() -> None:
    chunks = [dict(chunk=c, loss=float(c), num_tokens=c + 1) for c in range(5)]
    card = str(model_card(BakaForCausalLM(tiny_config()), "tiny", results=[result(loss_by_chunk=chunks)]))
    assert (
        "| 0 to 4 | 0.0000 | 1 |\n| 5 to 9 | 1.0000 | 2 |\n| 10 to 19 | 2.5714 | 7 |\n| 20 to 39 | 4.0000 | 5 |" in card
    )
    assert "documents of up to 5 chunks" in card and "was not measured" in card


def test_what_is_no_model_of_ours_and_two_scores_of_one_thing_are_refused() -> None:
    with pytest.raises(ValueError, match="must be a BakaLLM, got Linear"):
        linear = torch.nn.Linear(1, 1)
        linear.config = None  # type: ignore[assignment]
        model_card(linear, "tiny")
    with pytest.raises(ValueError, match=r"one result of each data set and split, got .*'wiki raw-1', 'test'"):
        model_card(BakaForCausalLM(tiny_config()), "tiny", results=[result(), result(steps=1)])


def test_names_of_several_lines_make_no_headings_and_no_rows() -> None:
    """Wherever a name stands in the text: its own, of runs and data, of a training's facts."""
    evil = 'a "b" \\ | c\n\n# Evil\r| x |\u2028```'
    chunks = [{"chunk": 0, "loss": 1.0, "num_tokens": 10}]
    scored = result(run_id=evil, dataset=evil, split=evil, loss_by_chunk=chunks, note=evil)
    card = model_card(
        BakaForCausalLM(tiny_config()),
        evil,
        results=[scored],
        others=[result(run_id=f"other {evil}")],
        training={evil: evil},
        dataset=evil,
        base_model=evil,
    )
    headings = re.findall(r"^#+ (.*)$", card.text, re.MULTILINE)
    assert headings == ['a "b" \\ | c # Evil | x | ```', "Use", "Memory", "Training", "Evaluation", "Limits"]
    rows = [re.sub(r"\\\\|\\\|", "", row) for row in card.text.splitlines() if row.startswith("|")]
    assert sorted({row.count("|") for row in rows}) == [3, 4, 6]  # of training, of depths, of scores
    (name,) = {ast.literal_eval(call) for call in re.findall(r"from_pretrained\((\".*\"), ", snippet(card.text))}
    assert name == evil
    losses = {evil: 1.5}
    card = model_card(BakaForCausalLM(tiny_config()), "tiny", losses=losses)
    assert re.findall(r"^#+ (.*)$", card.text, re.MULTILINE) == ["tiny", "Use", "Memory", "Evaluation", "Limits"]


@pytest.mark.parametrize(
    ("name", "carried"),
    [
        ("pristine", ""),
        ("xl", "the keys and values of the chunk before"),
        ("associations_of_memory", "2 memory vectors, associations and the keys and values of the chunk before"),
        ("rmt_alone", "2 memory vectors"),
    ],
)
def test_what_is_carried(name: str, carried: str) -> None:
    """Where nothing is, the card speaks of none."""
    model = BakaForCausalLM(tiny_config(**CONFIGS[name]))
    chunks = [{"chunk": 0, "loss": 1.0, "num_tokens": 10}]
    text = " ".join(model_card(model, "tiny", results=[result(loss_by_chunk=chunks)]).text.split())
    assert what_is_carried(model.config) == carried
    assert f"each read to its end{f' with {carried} carried along' if carried else ''} (what is deep" in text
    assert ("hands what it has understood from chunk to chunk" in text) == bool(carried)


# What a Trainer knows


def test_results_of_another_seed_are_of_another_model(tmp_path: Path) -> None:
    """They are shown beside the own ones, and the table says which is which."""
    folder = tmp_path / "tiny"
    run = trainer(folder, seed=7)
    run.state.global_step = 2
    for seed, loss in ((7, 1.5), (8, 2.5), (None, 3.5)):
        write_result(folder / "results.db", result(seed=seed, steps=2, loss=loss))
    run.create_model_card()
    card = ModelCard.load(folder / "README.md")
    assert [each.metric_value for each in card.data.eval_results if each.metric_type == "loss"] == [1.5]
    rows = [row.replace(" ", "") for row in card.text.splitlines() if "wiki raw-1/test" in row and row[0] == "|"]
    assert rows == ["|tiny|7|wikiraw-1/test|1.5000|4.48|", "|tiny|8|wikiraw-1/test|2.5000|12.18|"]


@pytest.mark.smoke
def test_a_trainer_tells_of_its_training(tmp_path: Path) -> None:
    """Its own scores are those of its run at its step; those of other runs are shown, but not in the metadata."""
    folder = tmp_path / "tiny"
    run = trainer(folder, learning_rate=0.01, warmup_steps=1, weight_decay=0.1, seed=7, chunks_per_backward=2)
    run.create_model_card()
    assert not re.search(r"\btrained\b", (folder / "README.md").read_text())
    run.train()
    model = run.model
    documents = [random_tokens(model.config, 12)]
    write_result(folder / "results.db", result(split="valid", steps=1, loss=9.0))  # of an earlier step
    write_result(folder / "results.db", result(run_id="bigram", steps=5, loss=8.0))
    scores = evaluate_documents(model, documents)
    about = dict(run_id="tiny", dataset="wiki raw-1", split="test", steps=2, tokens_seen=80, wall_time=61.0)
    write_result(folder / "results.db", Result.of(model, scores, **about))
    run.create_model_card(dataset="numbers", tags=["of a test"], license="mit")
    card = ModelCard.load(folder / "README.md")
    assert "was trained from scratch on numbers." in card.text
    for row in (
        "| Steps | 2, each of 2 rows of 20 tokens |",
        "| Memory | carried on from step to step |",
        "| Gradients | span 2 chunk(s) |",
        "| Tokens read | 80 |",
        "| Optimizer | AdamW, learning rate 0.01, betas 0.9 and 0.999, weight decay 0.1 |",
        "| Schedule | linear, 1 steps of warm-up |",
        "| Precision | float32 weights |",
        "| Seed | 7 |",
        "| Time | 1 min 1 s on cpu |",
    ):
        assert row in card.text
    assert [(each.metric_type, each.metric_value) for each in card.data.eval_results] == [
        ("loss", pytest.approx(scores["loss"])),
        ("perplexity", pytest.approx(scores["perplexity"])),
    ]
    assert "| bigram | wiki raw-1/test | 8.0000 |" in card.text and "9.0000" not in card.text
    assert card.data.tags[3:] == ["of a test", "generated_from_trainer"] and card.data.license == "mit"
    run.create_model_card()  # tags that a card has stay
    assert "of a test" in ModelCard.load(folder / "README.md").data.tags


def test_optimizer_and_schedule_are_those_that_trained(tmp_path: Path) -> None:
    config = tiny_config(bptt_chunks=3)
    run = trainer(tmp_path, config=config, carry_memory=False, bf16=True)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    run.optimizer, run.lr_scheduler = optimizer, schedule
    run.train()
    run.evaluate()
    run.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "| Optimizer | SGD, learning rate 0.5 |" in text and "| Schedule |" not in text
    assert "| Gradients through memory | reach 3 chunk(s) back |" in text
    assert "| Memory | empty at the beginning of every row |" in text
    assert "| Precision | float32 weights, bf16 mixed precision |" in text
    loss = run.state.log_history[-1]["eval_loss"]
    assert f"after the last step: eval loss {loss:.4f}." in text


def test_what_was_loaded_from_a_folder_is_not_called_from_scratch(tmp_path: Path) -> None:
    """And the folder's name is no base model."""
    BakaForCausalLM(tiny_config()).save_pretrained(tmp_path / "base")
    run = trainer(tmp_path / "tuned")
    run.model = run.model_wrapped = BakaForCausalLM.from_pretrained(tmp_path / "base")
    run.train()
    run.create_model_card()
    card = ModelCard.load(tmp_path / "tuned" / "README.md")
    assert "parameters and was trained.\n" in card.text and card.data.base_model is None
    assert str(tmp_path) not in str(card)
    run.create_model_card(finetuned_from="ada/base", dataset=["this", "that"], language="de", tasks="text-generation")
    card = ModelCard.load(tmp_path / "tuned" / "README.md")
    assert "fine-tuned from [ada/base](https://huggingface.co/ada/base) on this and that.\n" in card.text
    assert card.data.base_model == "ada/base" and card.data.language == ["de"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # which PEFT asks for
def test_adapters_have_the_card_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    run = trainer(tmp_path)
    run.model = run.model_wrapped = peft.get_peft_model(run.model, peft.LoraConfig(target_modules=["q_proj"]))
    run.train()
    run.save_model()
    run.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data["library_name"] == "peft" and "lora" in card.data.tags and "BakaLLM" not in card.text


# The snippet


@pytest.mark.smoke
def test_the_snippet_of_a_trained_model_runs(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As it stands in the card, beside the folder. That it runs where the package is missing: test_hub.py."""
    run = trainer(tmp_path / "tiny", processing_class=tokenizer)
    run.train()
    run.save_model()
    run.create_model_card()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()  # what training has printed
    names: dict[str, Any] = {}
    exec(snippet((tmp_path / "tiny" / "README.md").read_text()), names)
    said = names["tokenizer"].decode(names["text"][0, names["prompt"].input_ids.shape[1] :])
    assert isinstance(names["model"], BakaForCausalLM) and said
    assert "".join(capsys.readouterr().out.split()) == "".join(said.split())  # every token once
    assert names["state"].get_seq_length() == names["text"].shape[1] - 1 > 400


@pytest.mark.parametrize(
    "model_class", [BakaForCausalLM, BakaModel, BakaForSequenceClassification, BakaForTokenClassification]
)
@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_other_snippets_run(
    model_class: Any,
    has_tokenizer: bool,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of every class of model, with and without a tokenizer beside it."""
    model = model_class(BakaConfig(**tiny_config(pad_token_id=0, num_labels=3).to_diff_dict() | {"vocab_size": 19}))
    model.save_pretrained(tmp_path / "tiny")
    if has_tokenizer:
        tokenizer.save_pretrained(tmp_path / "tiny")
    card = model_card(model, "A tiny one", repository="tiny", has_tokenizer=has_tokenizer)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet(str(card)), names)
    found = names["judge"].model if "judge" in names else names["model"]
    assert type(found) is model_class and ("judge" in names) == (
        has_tokenizer and model_class is BakaForSequenceClassification
    )


# The token


@pytest.mark.smoke
def test_a_token_is_in_no_file(tmp_path: Path) -> None:
    """Trainer pickles its arguments, with the token that it pushes with, beside the model and into checkpoints."""
    run = trainer(tmp_path, hub_token=TOKEN, save_strategy="steps", save_steps=1)
    assert TOKEN.encode() in pickle.dumps(run.args)  # what would be written
    run.train()
    run.save_model()
    run.create_model_card()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.name == "training_args.bin" for path in files) == 3
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).hub_token is None
    assert run.args.hub_token == copy.deepcopy(run.args).hub_token == TOKEN  # it can still push
