"""examples/ladder.py: runs and peers on the same tokens, each once, and all figures in the database."""

import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from helpers import byte_tokenizer
from transformers import LlamaForCausalLM, Qwen3ForCausalLM

from baka_hf import BakaConfig, BakaForCausalLM
from baka_hf.evaluation import evaluate_documents
from baka_hf.results import differences, read_results
from baka_hf.texts import load_tokens

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import ladder

TEXT = "def add(a, b):\n    return a + b\n\n\nclass Tree:\n    def __init__(self):\n        self.leaves = []\n" * 10
SMALL = "memory=carry:num_memory_tokens=2,num_pause_tokens=1"
RUNS = [SMALL, "xl:chunk_size=8,weight_decay=0.5,associative_dim=4,associative_write=tokens", "qwen3:context=32"]


def run(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["ladder.py", *arguments])
    ladder.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Three runs of three steps, two seeds each; and what was trained."""
    folder = tmp_path_factory.mktemp("ladder")
    for name, documents in (("train", [TEXT[i:] for i in range(8)]), ("valid", [TEXT[: 200 * i] for i in range(1, 4)])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    byte_tokenizer(bos_token="<|endoftext|>").backend_tokenizer.save(str(folder / "tokenizer.json"))
    common = (
        f"--train {folder}/train.jsonl --valid code={folder}/valid.jsonl --tokenizer {folder}/tokenizer.json "
        "--worth code --hidden_size 16 --intermediate_size 32 --num_hidden_layers 1 --num_attention_heads 2 "
        "--chunk_size 16 --num_lanes 2 --chunks_per_step 2 --max_steps 3 --warmup_steps 1 --valid_chars 500 "
        f"--learning_rate 0.01 --output {folder}/out --results_db {folder}/all.db"
    ).split()
    models: dict[tuple[str, int], tuple[Any, dict[str, torch.Tensor]]] = {}
    train = ladder.BakaTrainer.train

    def watched(self: Any) -> Any:
        first = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        models[len(models) % 3, self.args.seed] = self, first
        return train(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder.BakaTrainer, "train", watched)
        run(patch, [*common, "--runs", *RUNS, "--seeds", "0", "1", "--save"])
    database = folder / "all.db"
    return SimpleNamespace(folder=folder, common=common, models=models, database=database)


@pytest.mark.smoke
def test_every_figure_is_in_the_database(trained: SimpleNamespace) -> None:
    """Scored again by the models that were trained; chunks of losses are those of the setting for a peer."""
    results = read_results(trained.database)
    names = ["memory", RUNS[1], RUNS[2]]
    places = [(run, "valid") for run in names] + [(names[2], "valid, sliding")]
    assert [(r.run_id, r.split, r.seed) for r in results] == [(*place, seed) for seed in (0, 1) for place in places]
    files = {"train": [f"{trained.folder}/train.jsonl"], "code": [f"{trained.folder}/valid.jsonl"]}
    tokens = load_tokens(
        trained.folder / "out" / "tokens.npz",
        files,
        f"{trained.folder}/tokenizer.json",
        num_chars={"code": 500},
    )
    for result in results:
        trainer, _ = trained.models[names.index(result.run_id), result.seed]
        assert (result.dataset, result.steps, result.num_tokens) == ("code", 3, 200 + 400 + 500)
        assert result.num_parameters == trainer.model.num_parameters()
        assert len(result.curves["train"]) == 3 and result.wall_time > 0
        assert result.bits_per_byte == pytest.approx(result.loss / math.log(2))
        assert result.training["tokens_per_second"] == pytest.approx(
            result.tokens_seen / 3 / result.training["step_time"]
        )
        assert sum(chunk["num_tokens"] for chunk in result.loss_by_chunk) == 1100
        assert len(result.loss_by_chunk) == math.ceil(500 / result.model["chunk_size"])
        if result.run_id != names[2]:
            assert result.loss == pytest.approx(evaluate_documents(trainer.model, tokens.documents["code"])["loss"])
    assert [list(result.gains) for result in results[:4]] == [
        ["memory exchanged", "memory learned", "keys exchanged"],
        ["memory exchanged", "memory learned", "keys exchanged"],  # its memory are associations
        [],
        [],
    ]
    for past in ("memory exchanged", "memory learned", "keys exchanged"):
        ranges = results[0].gains[past]
        assert ranges[0]["gain"] == ranges[0]["standard_error"] == 0 and ranges[0]["first_chunk"] == 0
        assert [(r["first_chunk"], r["last_chunk"]) for r in ranges] == [
            (0, 0),
            (1, 1),
            (2, 3),
            (4, 7),
            (8, 15),
            (16, 31),
            (8, None),
        ]
    assert differences(results)["memory, code/valid, keys exchanged"][0] == (0, 0.0, 0.0)


def test_models_are_kept(trained: SimpleNamespace) -> None:
    models = trained.folder / "out" / "models"
    assert len(list(models.iterdir())) == 6
    for index, load in ((0, BakaForCausalLM), (2, Qwen3ForCausalLM)):
        folder = models / ["memory_seed_1", "", "qwen3_context=32_seed_1"][index]
        kept, (trainer, _) = load.from_pretrained(folder).state_dict(), trained.models[index, 1]
        torch.testing.assert_close(kept, dict(trainer.model.state_dict()), rtol=0, atol=0)


@pytest.mark.smoke
def test_runs_are_what_they_are_called(trained: SimpleNamespace) -> None:
    """The same recipe for all, but for what a run says; o_proj and down_proj of all of them begin as zeros."""
    (memory, _), (xl, _), (peer, _) = (trained.models[index, 0] for index in range(3))
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, chunk_size=16)
    sizes |= dict(vocab_size=257, bos_token_id=256, eos_token_id=256)
    expected = BakaConfig.rung("carry", **sizes, num_memory_tokens=2, num_pause_tokens=1)
    found = memory.model.config.to_dict()
    assert found == expected.to_dict() | {"dtype": found["dtype"], "architectures": ["BakaForCausalLM"]}  # it was saved
    assert xl.model.config.chunk_size == 8 and not xl.model.config.num_memory_tokens
    assert isinstance(peer.model, Qwen3ForCausalLM) and peer.model.config.head_dim == 8
    assert xl.train_dataset.row_length == memory.train_dataset.row_length == 32 == len(peer.train_dataset[0]["labels"])
    assert [trainer.args.weight_decay for trainer in (memory, xl, peer)] == [0.1, 0.5, 0.1]
    for (_, seed), (trainer, first) in trained.models.items():
        assert (trainer.args.per_device_train_batch_size, trainer.args.max_steps, trainer.args.seed) == (2, 3, seed)
        rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
        assert rates == pytest.approx([0, 0.01, 0.005])  # warm-up, and linear decay in the last half
        for name, weight in first.items():
            if "association" in name:
                continue
            assert name.endswith(("o_proj.weight", "down_proj.weight")) == (not weight.any() and weight.ndim == 2)


@pytest.mark.smoke
def test_what_is_there_or_taken_is_not_run(
    trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is a run for which there is no time; one that fails does not keep the others from being run."""
    begun: list[tuple[str, int]] = []

    def fail(run: ladder.Run, seed: int, *args: Any) -> None:
        begun.append((run.name, seed))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ladder, "train", fail)
    run(monkeypatch, [*trained.common, "--runs", *RUNS, "--seeds", "0", "1"])
    assert begun == [] and "memory" in capsys.readouterr().out
    runs = ["--runs", RUNS[0], "pristine", "default:num_pause_tokens=1", "--seeds", "2"]
    with pytest.raises(SystemExit, match="error: failed were memory, seed 2; pristine, seed 2; default:num_pause_to"):
        run(monkeypatch, [*trained.common, *runs])
    assert begun == [("memory", 2), ("pristine", 2), ("default:num_pause_tokens=1", 2)]
    begun.clear()
    locks = {path.name for path in (trained.folder / "out" / "locks").iterdir()}
    assert len(locks) == 9  # of each run and seed there was one
    monkeypatch.setattr(ladder.hashlib, "sha256", lambda name: SimpleNamespace(hexdigest=lambda: "taken"))
    with FileLock(trained.folder / "out" / "locks" / "taken.lock"):
        run(monkeypatch, [*trained.common, *runs])
    run(monkeypatch, [*trained.common, *runs, "--deadline", "0"])
    assert begun == [] and "pristine, seed 2: no time is left for it" in capsys.readouterr().out


def test_what_ends_while_scores_are_made(trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is kept, and so is what was scored; the run counts as one that is still to be made."""
    evaluate, made = ladder.evaluate_windows, []

    def broken(model: Any, documents: Any, context: int, stride: int | None = None, **options: Any) -> Any:
        if stride is not None and len(made) == 1:
            raise RuntimeError("out of memory")
        made.append(stride)
        return evaluate(model, documents, context, stride, **options)

    monkeypatch.setattr(ladder, "evaluate_windows", broken)
    folder = trained.folder / "cut"
    places = ["--output", str(folder), "--results_db", str(folder / "all.db")]
    arguments = [*trained.common, *places, "--runs", "cut=llama:context=32", "--save"]
    for splits in (["valid"], ["valid", "valid, sliding"]):
        with pytest.raises(SystemExit) if len(splits) == 1 else nullcontext():
            run(monkeypatch, arguments)
        assert [result.split for result in read_results(folder / "all.db")] == splits
        assert (folder / "models" / "cut_seed_0").is_dir()
    run(monkeypatch, arguments)
    assert made == [None, None, 16]  # nothing was made again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", SMALL, "--learning_rate", "1"], "run 'memory', seed 0, is in .* learning_rate=0.01, not 1.0"),
        (["--runs", SMALL, "--pack", "20"], "run 'memory', seed 0, is in .* with pack=None, not 20"),
        (["--runs", SMALL.replace("=2", "=3")], "run 'memory', seed 0, is in .* with num_memory_tokens=2, not 3"),
        (["--runs", "big"], "expected one of default, pristine, .*, llama, qwen3 in 'big', got 'big'"),
        (["--runs", "xl:memory=2"], "'memory' in 'xl:memory=2' is no field"),
        (["--runs", "default:hidden_act=gelephant"], "`hidden_act` must be 'elephant' or a name"),
        (["--runs", "llama:context=65"], "a window of 'llama:context=65' has more tokens than a step"),
        (["--runs", "xl", "--worth", "wiki"], "expected NAME=FILE for every held-out text, got none for wiki"),
        (["--runs", "xl", "--valid_chars", "10"], "expected tokens made of "),
    ],
)
def test_bad_arguments_end_with_a_message_alone(
    trained: SimpleNamespace, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        run(monkeypatch, [*trained.common, *arguments])


def test_options_of_a_run() -> None:
    """Literals, a dict with its commas among them; more chunks fit a step when they are smaller."""
    rope = "rope_parameters={'rope_type': 'default', 'rope_theta': 5e5}"
    text = f"llama:{rope},muon_learning_rate=0.02,lr_scheduler_type=cosine"
    peer = ladder.Run.parse(f"{text},context=512", ladder.Setting())
    assert peer.name == f"{text},context=512" and peer.rows == 16 * 4
    assert isinstance(ladder.PEERS[peer.base][1](peer.configure(99, 0)), LlamaForCausalLM)
    assert peer.configure(99, 0).rope_parameters["rope_theta"] == 5e5
    assert peer.setting.muon_learning_rate == 0.02 and peer.training == {"lr_scheduler_type": "cosine"}
    short = ladder.Run.parse("short=default:chunk_size=128,use_xl_cache=False", ladder.Setting())
    assert short.name == "short" and short.setting.chunks_per_step == 16
    config = short.configure(99, 0)
    assert config.chunk_size == 128 and not config.use_xl_cache


def test_no_more_tokens_than_asked_for(tmp_path: Path) -> None:
    """Whole documents alone."""
    documents = [torch.arange(length).numpy() for length in (40, 50, 30)]
    tokens = ladder.Tokens(257, 256, {"train": documents}, {"train": 0})
    for most, seen in ((90, 90), (89, 40)):
        setting = ladder.Setting(8, 8, 1, 1, chunk_size=10, num_lanes=1, chunks_per_step=1, max_tokens=most)
        _, about = ladder.train(ladder.Run.parse("xl", setting), 0, tokens, str(tmp_path))
        assert about["tokens_seen"] == seen


def test_documents_are_packed(tmp_path: Path) -> None:
    """12 of 5 tokens in chunks of 10 take 12 chunks, and 6 when put together."""
    tokens = ladder.Tokens(257, 256, {"train": [torch.arange(5).numpy()] * 12}, {"train": 0})
    setting = ladder.Setting(8, 8, 1, 1, chunk_size=10, num_lanes=1, chunks_per_step=1)
    for run, steps in (("xl", 12), ("xl:pack=20", 6)):
        _, about = ladder.train(ladder.Run.parse(run, setting), 0, tokens, str(tmp_path))
        assert (about["steps"], about["tokens_seen"]) == (steps, 60)
