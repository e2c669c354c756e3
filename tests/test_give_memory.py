"""examples/give_memory.py: a converted decoder is trained in stages, in full or by adapters, and scored."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from baka_hf import BakaForCausalLM
from baka_hf.convert import add_memory
from baka_hf.data import IGNORED, LaneDataset
from baka_hf.evaluation import evaluate_documents
from baka_hf.texts import load_tokens

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import give_memory

N = 16
TEXT = "def add(a, b):\n    return a + b\n\n\nclass Tree:\n    def __init__(self):\n        self.leaves = []\n" * 3


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> None:
    options = ["--train", f"{folder}/train.jsonl", "--valid", f"{folder}/valid.jsonl", "--output", f"{folder}/out"]
    options += ["--stages", "1", "3", "--steps", "2", "--num_lanes", "2", "--warmup_steps", "1"]
    options += ["--learning_rate", "0.01", "--valid_chars", "90"]
    monkeypatch.setattr(sys, "argv", ["give_memory.py", "--model", str(folder / "model"), *options, *arguments])
    give_memory.main()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A converted decoder with a tokenizer, and texts."""
    tokenizer = byte_tokenizer(bos_token="<|endoftext|>")
    sizes = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    source = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, bos_token_id=tokenizer.bos_token_id))
    fields = dict(memory_update="gate", associative_dim=4, associative_write="tokens")
    model = add_memory(source, chunk_size=N, num_memory_tokens=2, **fields)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    for name, count in (("train", 4), ("valid", 2)):
        lines = [json.dumps({"text": TEXT[7 * i :]}) + "\n" for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.mark.smoke
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_trained_is_what_is_saved(rank: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[dict[str, float]] = []
    make = give_memory.BakaTrainer.create_optimizer

    def watched(trainer: Any, model: Any = None) -> Any:
        optimizer, model = make(trainer, model), trainer.model
        names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
        rates.append({names.pop(id(p)): group["lr"] for group in optimizer.param_groups for p in group["params"]})
        assert not names
        return optimizer

    monkeypatch.setattr(give_memory.BakaTrainer, "create_optimizer", watched)
    peft = pytest.importorskip("peft") if rank else None
    run(monkeypatch, folder, "--lora_rank", str(rank), "--memory_learning_rate", "0.05", "--skip_first_chunk")
    assert len(rates) == 2  # stages
    named = {name.split("model.")[-1].replace("layers.0.", ""): rate for name, rate in rates[0].items()}
    fast = {name.split(".")[0] for name, rate in named.items() if rate == 0.05}
    assert fast == {"memory_tokens", "memory_norm", "memory_update", "pause_token", "association"}
    blocks = {name: rate for name, rate in named.items() if name.startswith(("self_attn", "mlp"))}
    assert set(blocks.values()) == {0.01} and {"lora" in name for name in blocks} == {bool(rank)}

    before = BakaForCausalLM.from_pretrained(folder / "model")
    base = BakaForCausalLM.from_pretrained(folder / "model" if peft else folder / "out")
    model: Any = peft.PeftModel.from_pretrained(base, folder / "out").merge_and_unload() if peft else base
    files = {"train": [f"{folder}/train.jsonl"], "valid": [f"{folder}/valid.jsonl"]}
    tokens = load_tokens(folder / "out" / "tokens.npz", files, f"{folder}/model", num_chars={"valid": 90})
    scores = json.loads((folder / "out" / "scores.json").read_text())
    found = evaluate_documents(model, tokens.documents["valid"])["loss"]
    assert found == pytest.approx(scores["loss"], abs=1e-4)
    assert found < evaluate_documents(before, tokens.documents["valid"])["loss"] - 0.01
    gains = scores["own memory over another document's"]
    assert gains[0]["gain"] == pytest.approx(0, abs=1e-6) and gains[-1]["gain"] != 0
    assert (folder / "out" / "gain_by_depth.png").is_file()


def test_matrices_of_what_remembers_by_muon(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From writes that are weak at first."""
    rates: list[dict[str, float]] = []
    strengths: list[list[float]] = []
    make = give_memory.BakaTrainer.create_optimizer

    def watched(trainer: Any, model: Any = None) -> Any:
        optimizer, names = make(trainer, model), {id(p): name for name, p in trainer.model.named_parameters()}
        rates.append({names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]})
        strengths.append(trainer.model.model.layers[0].association.beta_proj.bias.tolist())
        return optimizer

    monkeypatch.setattr(give_memory.BakaTrainer, "create_optimizer", watched)
    rate = ["--memory_learning_rate", "0.05", "--memory_muon_learning_rate", "0.3"]
    run(monkeypatch, folder, *rate, "--strength_bias", "-2")
    matrices = {f"layers.0.association.{name}_proj.weight" for name in "qkvo"} | {"memory_update.gate_proj.weight"}
    assert {name.removeprefix("model.") for name, rate in rates[0].items() if rate == 0.3} == matrices
    assert sum(rate == 0.05 for rate in rates[0].values()) > len(matrices)
    assert strengths[0] == [-2, -2]


def test_no_loss_where_there_is_nothing_to_remember() -> None:
    documents = [list(range(1, 40)), list(range(50, 75))]
    lanes = LaneDataset(documents, 1, N, 5, shuffle=False)
    rows = [lanes[index] for index in range(len(lanes))]
    batch = give_memory.collate(rows, N)
    kept = sorted(set(batch["shift_labels"].flatten().tolist()) - {IGNORED})
    assert kept == [token for document in documents for token in document[N + 1 :]]
    assert sorted(set(batch["labels"].flatten().tolist()) - {IGNORED}) == kept
    assert torch.equal(give_memory.collate(rows, 0)["shift_labels"], torch.stack([row["shift_labels"] for row in rows]))


def test_a_decoder_that_remembers_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its XL cache alone, with one rate for all."""
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    source = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(byte_tokenizer(bos_token="<|endoftext|>"))))
    model = add_memory(source, chunk_size=N, num_memory_tokens=0, num_pause_tokens=0)
    model.save_pretrained(folder / "model")
    run(monkeypatch, folder)
    scores = json.loads((folder / "out" / "scores.json").read_text())
    assert list(scores) == ["loss", "bits_per_byte", "over itself before training"]
    for option in ("--memory_muon_learning_rate", "--strength_bias"):
        with pytest.raises(SystemExit, match="strength_bias: expected a model with associations"):
            run(monkeypatch, folder, option, "0.02")


def test_bad_arguments_end_with_a_message(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"memory_learning_rate: expected a positive number, got 0\.0"):
        run(monkeypatch, folder, "--memory_learning_rate", "0")
    with pytest.raises(SystemExit, match=r"memory_muon_learning_rate: expected a positive number, or 0, got -1\.0"):
        run(monkeypatch, folder, "--memory_muon_learning_rate", "-1")
    (folder / "valid.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"valid\.jsonl"):
        run(monkeypatch, folder)
