"""The examples: their parts against naive counterparts, then both run from end to end on a few lines of text."""

import dataclasses
import io
import json
import math
import subprocess
import sys
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import CHECKPOINTING
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from baka_hf import BakaConfig
from baka_hf.results import Result, read_results, write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import ask
import generate
import train

TEXT = "def add(a, b):\n    return a + b\n\n\nclass Tree:\n    def __init__(self):\n        self.leaves = []\n" * 30


def texts(*documents: str) -> Dataset:
    return Dataset.from_dict({"name": [f"{i}" for i in range(len(documents))], "text": documents})


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train.train_tokenizer([TEXT], vocab_size=300)


# ---- train.py ----


def test_every_field_of_the_config_can_be_set() -> None:
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    fields = {field.name for field in dataclasses.fields(BakaConfig)} - inherited
    elsewhere = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache"}
    arguments = {field.name for field in dataclasses.fields(train.ModelArguments)}
    assert arguments == fields - elsewhere
    BakaConfig(vocab_size=300, **dataclasses.asdict(train.ModelArguments()))


def test_standard_library_is_split_by_module() -> None:
    training, validation = train.load_documents(train.DataArguments())
    names = {*training["name"]} | {*validation["name"]}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any("test" in name.split("/")[:-1] for name in names)
    assert {*training["name"]}.isdisjoint(validation["name"])
    assert 0.01 < len(validation) / len(names) < 0.1


def test_text_files_and_lines_are_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"id": i, "body": f"line {i}"}) + "\n" for i in range(3)))
    documents = train.text_files([f"{tmp_path}/*.txt", f"{tmp_path}/*.jsonl"], text_column="body")
    assert documents["name"][:] == ["a.txt:0", "b.jsonl:0", "b.jsonl:1", "b.jsonl:2"]
    assert documents["text"][:] == ["one\n\ntwo\n", "line 0", "line 1", "line 2"]


def test_a_data_set_keeps_its_own_validation_split(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": f"of the {split} split"}) + "\n")
    training, validation = train.load_documents(train.DataArguments(dataset_name=str(tmp_path)))
    assert training["text"][:] == ["of the train split"]
    assert validation["text"][:] == ["of the validation split"]


def test_nothing_found_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file matches .*missing"):
        train.load_documents(train.DataArguments(text_files=[f"{tmp_path}/missing*.txt"]))
    (tmp_path / "one.txt").write_text("alone")
    with pytest.raises(ValueError, match="of 1 documents"):
        train.load_documents(train.DataArguments(text_files=[f"{tmp_path}/one.txt"]))
    (tmp_path / "rows.jsonl").write_text('{"body": "text"}\n')
    with pytest.raises(ValueError, match="no column 'text', but body"):
        train.load_documents(train.DataArguments(text_files=[f"{tmp_path}/rows.jsonl"]))
    with pytest.raises(ValueError, match="not both"):
        train.DataArguments(text_files=["a"], dataset_name="b")
    with pytest.raises(ValueError, match=r"vocab_size must be at least 258 .*, got 100"):
        train.train_tokenizer([TEXT], vocab_size=100)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--chunk_size 0", "`chunk_size` must be an integer of at least 1, got 0."),
        ("--chunks_per_sample 0", "chunks_per_sample: a sample must have two tokens or more, got 0."),
        ("--rope_parameters linear", "`rope_parameters` must be a dict, got 'linear'."),
        ("--validation_fraction 2", "validation_fraction must lie between 0 and 1, got 2.0."),
        ("--text_files nowhere.txt", "text_files: no file matches 'nowhere.txt'."),
    ],
)
def test_bad_arguments_end_training_with_a_message_alone(
    flags: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--output_dir", f"{tmp_path}/out", *flags.split()])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == message and not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "plain", "  indented\n\n\ttabs\r\n", "naïve 🐘 日本語\x00"])
def test_tokenizer_gives_back_every_byte(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """A conversation goes on from the prompt of its answer, token for token, and its answers are marked as such."""
    said = [
        ("system", "be brief"),
        ("user", " who? "),
        ("assistant", "the elephant"),
        ("user", "why"),
        ("assistant", "?"),
    ]
    messages = [dict(role=role, content=content) for role, content in said]
    text = "<|endoftext|>System: be brief\nUser: who?\nAssistant: the elephant<|endoftext|>User: why\nAssistant:"
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
    assert prompt["input_ids"] == tokenizer(text).input_ids
    whole = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    answer = tokenizer(" ?<|endoftext|>").input_ids
    assert whole["input_ids"] == prompt["input_ids"] + answer
    marked = [token for token, mark in zip(whole["input_ids"], whole["assistant_masks"], strict=True) if mark]
    assert marked == tokenizer(" the elephant<|endoftext|>").input_ids + answer


def test_blocks_score_every_token_of_a_text_once(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = train.encode(texts(TEXT, "", "short", TEXT[:200]), tokenizer, "")
    blocks = train.cut(documents, length=16, pad_token_id=tokenizer.pad_token_id)
    targets = []
    for block in blocks:
        assert {len(column) for column in block.values()} == {16}
        real = sum(block["attention_mask"])
        assert block["labels"][:real] == block["input_ids"][:real]
        assert block["labels"][real:] == [train.IGNORED] * (16 - real)
        targets += block["labels"][1:real]
    assert tokenizer.decode(targets) == "".join([TEXT, "short", TEXT[:200]])


def test_samples_are_the_documents_end_to_end(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = train.encode(texts(TEXT, "short", TEXT), tokenizer, "")
    samples = train.pack(documents, length=16)["input_ids"]
    whole = list(chain.from_iterable(documents["input_ids"]))
    assert list(chain.from_iterable(samples)) == whole[: len(whole) // 16 * 16]


def test_bigram_equals_a_naive_count(tokenizer: PreTrainedTokenizerFast) -> None:
    training = train.encode(texts(TEXT, TEXT[50:]), tokenizer, "")
    held_out = train.encode(texts(TEXT[10:300], "unseen words"), tokenizer, "")
    size = len(tokenizer)
    nats, k = train.bigram_nats(training, train.cut(held_out, 16, tokenizer.pad_token_id), size)

    stream = list(chain.from_iterable(training["input_ids"]))
    pairs, contexts = Counter(pairwise(stream)), Counter(stream[:-1])
    expected = -sum(
        math.log((pairs[a, b] + k) / (contexts[a] + k * size))
        for document in held_out["input_ids"]
        for a, b in pairwise(document)
    )
    assert nats == pytest.approx(expected)


def test_scores_state_one_loss_in_three_units() -> None:
    assert train.scores(nats=math.log(2) * 80, tokens=40, num_bytes=100) == pytest.approx(
        {"nats_per_token": 2 * math.log(2), "perplexity": 4.0, "bits_per_byte": 0.8}
    )


# ---- generate.py ----


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_pieces_have_the_tokens_of_the_whole(tokenizer: PreTrainedTokenizerFast, size: int) -> None:
    pieces = list(generate.pieces(io.StringIO(TEXT), size))
    assert "".join(pieces) == TEXT
    assert max(map(len, pieces)) < size + 80  # a line has less than 80 characters
    if size > 80:
        assert list(chain.from_iterable(tokenizer(pieces).input_ids)) == tokenizer(TEXT).input_ids


# ---- both ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A checkpoint of examples/train.py after six steps on a .txt and a .jsonl file, and how to go on with it."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "code.txt").write_text(TEXT)
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": TEXT[i:]}) + "\n" for i in range(20)))
    arguments = (
        f"--text_files {folder}/*.txt {folder}/*.jsonl --validation_fraction 0.2 --vocab_size 300 "
        "--chunks_per_sample 3 --hidden_size 16 --intermediate_size 32 --num_hidden_layers 2 --num_attention_heads 2 "
        "--chunk_size 16 --num_memory_tokens 2 --num_pause_tokens 1 --memory_solidifier glu "
        "--gradient_accumulation_steps 2 --logging_steps 1 --eval_steps 2 --save_steps 2 --max_steps 6 "
        "--save_total_limit 3 --learning_rate 0.01 --warmup_steps 1 "
        f"--per_device_train_batch_size 4 --disable_tqdm true --output_dir {folder}/out"
    ).split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *arguments])
        train.main()
    return SimpleNamespace(folder=folder, output=folder / "out", arguments=arguments)


def history(output: Path) -> list[dict[str, float]]:
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


@pytest.mark.smoke
def test_training_writes_checkpoint_curve_and_card(trained: SimpleNamespace) -> None:
    files = {path.name for path in trained.output.iterdir()}
    code = {"modeling_baka.py", "cache_baka.py", "configuration_baka.py"}
    assert code | {"config.json", "model.safetensors", "tokenizer.json", "checkpoint-6"} <= files
    assert Image.open(trained.output / "training_curve.png").size == (1200, 675)
    card = (trained.output / "README.md").read_text()
    assert "trust_remote_code=True" in card and "{{" not in card and "{%" not in card
    for split in ("validation", "validation in blocks"):
        assert f"| out | 42 | local text files/{split} | " in card
    assert "| bigram, add-" in card and "trained from scratch on local text files (" in card
    losses = [log["loss"] for log in history(trained.output) if "loss" in log]
    assert losses[-1] < losses[0]


@pytest.mark.smoke
def test_resuming_repeats_the_run(trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = load_file(trained.output / "model.safetensors")
    resume = ["--resume_from_checkpoint", f"{trained.output}/checkpoint-4", "--output_dir", f"{trained.folder}/resumed"]
    monkeypatch.setattr(sys, "argv", ["train.py", *trained.arguments, *resume])
    train.main()
    assert_close(load_file(trained.folder / "resumed" / "model.safetensors"), weights)


@pytest.mark.smoke
@pytest.mark.parametrize("flags", ["--bf16 true --use_cpu true", f"--{CHECKPOINTING} true"])
def test_training_flags(trained: SimpleNamespace, flags: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    short = f"{flags} --max_steps 2 --save_strategy no --output_dir {tmp_path}".split()
    monkeypatch.setattr(sys, "argv", ["train.py", *trained.arguments, *short])
    train.main()
    assert math.isfinite(history(tmp_path)[-1]["eval_nats_per_token"])


def test_streaming_carries_memory_and_resumes(
    trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Lanes train to other weights than samples, and a resumed run to the same; results are there to be listed."""
    whole, resumed = ["--streaming", "--output_dir", f"{tmp_path}/whole"], ["--output_dir", f"{tmp_path}/resumed"]
    monkeypatch.setattr(sys, "argv", ["train.py", *trained.arguments, *whole])
    train.main()
    another = Result(run_id="whole", seed=1, dataset="elsewhere", split="test", loss=1.0, num_tokens=1)
    write_result(tmp_path / "all.db", another)
    resume = ["--resume_from_checkpoint", f"{tmp_path}/whole/checkpoint-4"]
    monkeypatch.setattr(
        sys, "argv", ["train.py", *trained.arguments, *whole, *resume, *resumed, "--results_db", f"{tmp_path}/all.db"]
    )
    train.main()
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    assert_close(load_file(tmp_path / "resumed" / "model.safetensors"), weights)
    samples = load_file(trained.output / "model.safetensors")
    assert any(not torch.equal(samples[name], weights[name]) for name in weights)
    assert (tmp_path / "whole" / "checkpoint-4" / "lanes-rank-0" / "baka_cache.safetensors").is_file()
    blocks, result, bigram = read_results(tmp_path / "whole" / "results.db")
    assert (result.run_id, result.steps, result.split) == ("whole", 6, "validation")
    assert blocks.run_id == "whole" and bigram.run_id.startswith("bigram") and bigram.num_tokens == result.num_tokens
    assert math.isfinite(result.loss) and result.loss_by_chunk and result.curves["train"]
    carried = "2 memory vectors, associations and the keys and values of the chunk before carried along"
    assert result.note.endswith(carried)
    shared, own = (
        [dataclasses.replace(each, written=None) for each in read_results(tmp_path / name)]
        for name in ("all.db", "resumed/results.db")
    )
    assert shared == [dataclasses.replace(another, written=None), *own]


def test_two_processes_go_on_where_one_stood(
    trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By `accelerate launch` with the configuration of two GPUs, but on the CPU; then one goes on, in half batches."""
    flags = [*trained.arguments, "--streaming", "--use_cpu", "true", "--gradient_accumulation_steps", "1"]

    def resume(folder: str, checkpoint: str) -> list[str]:
        return [*flags, "--output_dir", f"{tmp_path}/{folder}", "--resume_from_checkpoint", f"{tmp_path}/{checkpoint}"]

    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--output_dir", f"{tmp_path}/whole"])
    train.main()
    examples = Path(train.__file__).parent
    configuration = ["--config_file", str(examples / "accelerate" / "ddp.yaml"), "--main_process_port", "0"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *configuration, "--mixed_precision", "no"]
    two = [str(examples / "train.py"), *resume("two", "whole/checkpoint-2"), "--per_device_train_batch_size", "2"]
    subprocess.run([*launch, *two], check=True)
    assert (tmp_path / "two" / "checkpoint-4" / "lanes-rank-1" / "lanes.json").is_file()
    halves = ["--num_lanes", "4", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    monkeypatch.setattr(sys, "argv", ["train.py", *resume("one", "two/checkpoint-4"), *halves])
    train.main()
    losses = [[log["loss"] for log in history(tmp_path / run) if "loss" in log] for run in ("whole", "two", "one")]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(losses[0], rel=1e-4)


def run_generate(trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, flags: str, stdin: str = "") -> None:
    arguments = ["generate.py", "--model", str(trained.output), "--temperature", "0", "--device", "cpu", *flags.split()]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
    generate.main()


@pytest.mark.smoke
def test_a_saved_state_goes_on_as_if_never_stopped(
    trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Read, save, load, write, save, load, write on: the same text and the same state as in one run."""
    run_generate(trained, monkeypatch, f"--max_new_tokens 60 --save_state {tmp_path}/whole", stdin=TEXT)
    whole = capsys.readouterr().out
    run_generate(trained, monkeypatch, f"--max_new_tokens 0 --save_state {tmp_path}/read", stdin=TEXT)
    run_generate(trained, monkeypatch, f"--max_new_tokens 25 --load_state {tmp_path}/read --save_state {tmp_path}/part")
    run_generate(trained, monkeypatch, f"--max_new_tokens 35 --load_state {tmp_path}/part --save_state {tmp_path}/done")
    assert capsys.readouterr().out.replace("\n", "") == whole.replace("\n", "")
    assert_close(
        load_file(tmp_path / "done" / "baka_cache.safetensors"),
        load_file(tmp_path / "whole" / "baka_cache.safetensors"),
    )
    assert (tmp_path / "done" / generate.LAST_TOKEN).read_text() == (
        tmp_path / "whole" / generate.LAST_TOKEN
    ).read_text()


def test_a_prompt_is_shown_and_continued(
    trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_generate(trained, monkeypatch, "--prompt class --max_new_tokens 50")
    text = capsys.readouterr().out
    assert text.startswith("class") and len(text) > len("class\n")


def test_a_document_is_asked(
    trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each question is answered as if it were the only one, by a document just read or by its state in a file; as
    `generate` answers with the whole text in front of it."""
    (tmp_path / "book.txt").write_text(TEXT[:3000])
    flags = f"--model {trained.output} --temperature 0 --max_new_tokens 12 --form {{}}:".split()
    counts: list[int] = []

    def write(model: Any, tokenizer: Any, state: Any, *others: Any, **options: Any) -> int:
        counts.append(int(state.num_tokens))
        return generate.write(model, tokenizer, state, *others, **options)

    monkeypatch.setattr(ask, "write", write)

    def answers(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["ask.py", *arguments, *flags])
        ask.main()
        return capsys.readouterr().out

    both = answers("class", "import", "--document", f"{tmp_path}/book.txt", "--save_state", f"{tmp_path}/read")
    first, second = (answers(question, "--load_state", f"{tmp_path}/read") for question in ("class", "import"))
    assert (
        both == first + second
        and counts[:2] == counts[2:]
        and first.startswith("class\n")
        and second.startswith("import\n")
    )

    tokenizer = AutoTokenizer.from_pretrained(trained.output)
    model = AutoModelForCausalLM.from_pretrained(trained.output)
    ids = [tokenizer.bos_token_id]
    for text in (TEXT[:3000], "import:"):
        ids += tokenizer(text, add_special_tokens=False).input_ids
    options = dict(do_sample=False, max_new_tokens=12, stop_strings=["\n"], tokenizer=tokenizer)
    output = model.generate(torch.tensor([ids]), **options)
    assert second == "import\n" + tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True) + "\n"


def test_what_is_not_there_is_told_by_a_message_alone(
    trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """No checkpoint, and nobody asks the Hub for one of that name; no document; no state, or one of other weights."""
    with monkeypatch.context() as patch:
        patch.setattr(generate.AutoTokenizer, "from_pretrained", None)
        for folder in ("nowhere", f"{tmp_path}/nowhere", "./nowhere", str(tmp_path)):
            with pytest.raises(SystemExit, match=f"there is no checkpoint in a folder '{folder}'"):
                run_generate(trained, monkeypatch, f"--model {folder}")
        with pytest.raises(TypeError):  # somebody on the Hub may have it
            run_generate(trained, monkeypatch, "--model somebody/baka-small")
    monkeypatch.setattr(sys, "argv", ["ask.py", "class", "--document", f"{tmp_path}/nowhere"])
    with pytest.raises(SystemExit, match="2"):
        ask.main()
    assert f"--document: there is no file '{tmp_path}/nowhere'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"expected a saved state at .*nowhere"):
        run_generate(trained, monkeypatch, f"--load_state {tmp_path}/nowhere")
    run_generate(trained, monkeypatch, f"--max_new_tokens 0 --save_state {tmp_path}/state", stdin=TEXT)
    with pytest.raises(SystemExit, match="read by other weights"):
        run_generate(trained, monkeypatch, f"--model {trained.output}/checkpoint-2 --load_state {tmp_path}/state")
