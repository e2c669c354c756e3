"""Benchmarks run: two sides, a line and a ratio for each measurement, a picture. Their figures mean nothing here."""

import importlib
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from helpers import byte_tokenizer, tiny_config
from programs import run_program
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from baka_hf import BakaForCausalLM
from baka_hf.decoding_graphs_baka import Joined, one_product

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FIGURES = {
    "training": {"tokens/s"},
    "generation": {"ms/token"},
    "long_context": {"tokens/s", "ms/step", "worst ms"},
    "peers": {"tokens/s", "ms/token"},
}


@pytest.mark.parametrize("name", FIGURES)
def test_both_sides_are_measured(name: str, tmp_path: Path) -> None:
    if name == "peers" and importlib.util.find_spec("recurrent_memory_transformer_pytorch") is None:
        pytest.skip("recurrent-memory-transformer-pytorch is not installed")
    run_program(BENCHMARKS / f"{name}.py", tmp_path, "--device", "cpu", "--quick", "--out", tmp_path)

    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    rows = [line for line in lines if "work" in line]
    works = {work: {row["side"] for row in rows if row["work"] == work} for work in (row["work"] for row in rows)}
    number = 3 if name == "training" else 2  # there the diary's blocks are measured too
    assert works and all(len(sides) == number and "BakaLLM" in sides for sides in works.values())
    for figure in FIGURES[name]:
        assert {row[figure] > 0 for row in rows if figure in row} == {True}

    _, _, *table = (tmp_path / f"{name}.md").read_text().splitlines()
    assert len(table) >= len(works)
    assert all(float(row.split("|")[-2]) >= 0 for row in table)
    assert (tmp_path / f"{name}.png").is_file() == (name != "peers")
    sizes = [line for line in lines if "by_formula" in line]
    assert all(line["state_bytes_a_row"] == line["by_formula"] for line in sizes)
    assert len(sizes) == (4 if name == "long_context" else 0)


@pytest.mark.parametrize(
    ("name", "options", "ours", "others"),
    [
        ("options", ["--options", "associative / 4", "XL alone"], "default", {"associative / 4", "XL alone"}),
        ("optimizers", [], "Muon and AdamW", {"torch.optim.Muon and AdamW", "AdamW"}),
    ],
)
def test_choices_are_measured(name: str, options: list[str], ours: str, others: set[str], tmp_path: Path) -> None:
    output = run_program(BENCHMARKS / f"{name}.py", tmp_path, "--device", "cpu", "--quick", *options)
    header, _, *rows = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("|")]
    assert header[2] == ours and {row[3] for row in rows} == others
    assert all(float(row[-1]) > 0 for row in rows)
    models = [json.loads(line) for line in output.splitlines() if '"option"' in line]
    assert len({model["parameters"] for model in models}) == len(models) == (3 if options else 0)


def test_serving_is_measured(tmp_path: Path) -> None:
    """And in float32 every text says what it says alone."""
    output = run_program(BENCHMARKS / "serving.py", tmp_path, "--device", "cpu", "--quick", "--steps", "12")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows if row[1] == "tokens/s"] == ["1 user"] * 2 + ["3 users"] * 2
    assert all(float(row[-1]) > 0 for row in rows if row[1] == "tokens/s")
    assert [row[0] for row in rows[-2:]] == ["1 user", "3 users"]
    assert all(row[3] == "1" and float(row[4]) < 1e-6 < float(row[5]) for row in rows[-2:])


def test_paths_that_are_left_out(tmp_path: Path) -> None:
    """What is put in their places still does the work; the product of layers that are joined, on any device."""
    output = run_program(BENCHMARKS / "fast_paths.py", tmp_path, "--device", "cpu", "--quick")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("|")]
    speeds = {row[3]: float(row[2].replace(",", "")) for row in rows if row[1] == "tokens/s"}
    assert len(speeds) == 13 and all(speed > 0 for speed in speeds.values())


@pytest.mark.parametrize("biases", [(False, False), (True, False), (True, True)], ids=str)
def test_products_apart(biases: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    products_apart = importlib.import_module("fast_paths").products_apart
    linears = [nn.Linear(5, size, bias, dtype=torch.float64) for size, bias in zip((3, 7), biases, strict=True)]
    joined, inputs = Joined.of(linears), torch.randn(2, 4, 5, dtype=torch.float64)
    for product in (products_apart, one_product):
        for found, linear in zip(product(joined, inputs), linears, strict=True):
            torch.testing.assert_close(found, linear(inputs))


def test_linear_attention_beside_ours(tmp_path: Path) -> None:
    """Ours alone: their library needs a GPU."""
    options = ["--train", "2x32", "--reads", "1x24", "--batches", "1", "2", "--context", "9", "--only", "BakaLLM"]
    output = run_program(BENCHMARKS / "linear.py", tmp_path, "--device", "cpu", "--quick", *options)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("|")]
    works = ["train 2 x 32", "read 1 x 24", "step, batch 1, after 9", "step, batch 2, after 9"]
    assert [row[0] for row in rows[2:]] == works and all(float(row[2].replace(",", "")) > 0 for row in rows[2:])


def test_training_on_lanes_is_measured(tmp_path: Path) -> None:
    *_, line = run_program(BENCHMARKS / "lanes.py", tmp_path, "--device", "cpu", "--quick").splitlines()
    row = json.loads(line)
    assert (row["processes"], row["lanes"]) == (1, 2) and row["tokens/s"] > 0


def test_gradients_are_compared(tmp_path: Path) -> None:
    """Those of compiled training are as near to float32's as bfloat16 allows, whatever was trained on before."""
    options = ("--device", "cpu", "--quick", "--ways", "compiled", "eager")
    output = run_program(BENCHMARKS / "gradients.py", tmp_path, *options)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("|")]
    assert [row[:2] for row in rows[2:]] == [
        [way, kind] for way in ("compiled", "eager") for kind in ("plain", "lanes", "plain")
    ]
    assert all(0 < float(mean) <= float(worst) < 0.05 for _, _, mean, worst in rows[2:])


def test_what_interruptions_cost_is_measured(tmp_path: Path) -> None:
    output = run_program(BENCHMARKS / "interruption.py", tmp_path, "--device", "cpu", "--quick")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("|")]
    steps = [row for row in rows if len(row) == 4][2:]
    assert [row[0].split(" of ")[0] for row in steps] == [
        f"{work}, {name}" for work in ("a token", "a chunk") for name in ("mean", "median")
    ]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in steps)


def test_memory_is_followed_over_a_text(tmp_path: Path) -> None:
    model = BakaForCausalLM(tiny_config(vocab_size=256, memory_update="gate", memory_norm=True))
    for part in (model, byte_tokenizer()):
        part.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("All that is read, and what is left of it. " * 4)
    command = [BENCHMARKS / "memory.py", tmp_path, "--checkpoint", tmp_path, "--text_file", tmp_path / "text.txt"]
    command += ["--device", "cpu", "--out", tmp_path, "--chunks"]
    output = run_program(*command, 30)
    assert (tmp_path / "memory.md").read_text() in output and (tmp_path / "memory.png").is_file()
    assert len(output.splitlines()) == 2 + 2 * 10 + 1
    rows = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    assert [(row["dtype"], row["chunk"]) for row in rows] == [
        (t, i) for t in ("float32", "bfloat16") for i in range(30)
    ]
    tokens = torch.tensor([byte_tokenizer()((tmp_path / "text.txt").read_text()).input_ids[:151]])
    out = model.eval()(tokens[:, :150], use_cache=True)
    losses = torch.nn.functional.cross_entropy(out.logits[0], tokens[0, 1:], reduction="none").view(30, 5).mean(1)
    assert [row["loss"] for row in rows[:30]] == pytest.approx(losses.tolist(), abs=1e-5)
    assert rows[29]["norm"] == pytest.approx(out.past_key_values.memory.norm(dim=-1).mean().item(), rel=1e-4)
    with pytest.raises(AssertionError, match="expected `chunks` from 1 to 33 for"):
        run_program(*command, 34)


def test_what_a_conversion_costs_is_measured(tmp_path: Path) -> None:
    """The source's loss on the first chunk is that of the model without memory and pauses, and no other."""
    sizes = dict(vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.5))
    for part in (model, byte_tokenizer()):
        part.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("All that is read, and what is left of it. " * 4)
    options = ["--source", tmp_path, "--text_file", tmp_path / "text.txt", "--device", "cpu", "--out", tmp_path]
    options += ["--chunk_size", 20, "--chunks", 4, "--num_memory_tokens", 2]
    output = run_program(BENCHMARKS / "convert.py", tmp_path, *options)
    assert output == (tmp_path / "convert.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines()[2:]]
    assert len(rows) == 6 and {len(row) for row in rows} == {7}
    assert rows[0][1:3] == rows[1][1:3] == rows[2][1:3] and rows[0][3:] != rows[2][3:]
    assert rows[2][1] != rows[3][1] != rows[4][1]
    text = torch.tensor([byte_tokenizer()((tmp_path / "text.txt").read_text()).input_ids[:81]])
    losses = torch.nn.functional.cross_entropy(model.eval()(text[:, :-1]).logits[0], text[0, 1:], reduction="none")
    assert [float(loss) for loss in rows[0][1:5]] == pytest.approx(losses.view(4, 20).mean(1).tolist(), abs=1e-3)
    assert float(rows[0][5]) == pytest.approx(losses[20:].mean().item(), abs=1e-3)
    assert float(rows[0][6]) == pytest.approx(losses.mean().item() / math.log(2), abs=1e-3)  # a token is a byte
    window = torch.nn.functional.cross_entropy(model(text[:, 40:80]).logits[0, 20:], text[0, 61:])
    assert float(rows[1][4]) == pytest.approx(window.item(), abs=1e-3)
    ranges = run_program(BENCHMARKS / "convert.py", tmp_path, *options, "--depths", 0, 2)
    row = [float(cell) for cell in ranges.splitlines()[2].split("|")[2:-1]]
    assert row[:2] == pytest.approx([losses[:40].mean().item(), losses[40:].mean().item()], abs=1e-3)
    assert row[2:] == [float(cell) for cell in rows[0][5:]]
    with pytest.raises(AssertionError, match="--depths: expected ascending numbers from 0 to 3"):
        run_program(BENCHMARKS / "convert.py", tmp_path, *options, "--depths", 0, 4)
    options = ["--source", tmp_path, "--device", "cpu", "--quick", "--reads", "--contexts", 600, "--batches", 1]
    output = run_program(BENCHMARKS / "long_context.py", tmp_path, *options)
    assert "| step, batch 1, after 600 | ms/step |" in output
    sizes = [json.loads(line) for line in output.splitlines() if '"by_formula"' in line]
    assert sizes and all(line["state_bytes_a_row"] == line["by_formula"] for line in sizes)


def test_steps_of_other_blocks(tmp_path: Path) -> None:
    """A rung of the diary's ladder in the default's place, and ours without what Llama's block lacks."""
    options = ["--device", "cpu", "--quick", "--reads", "--contexts", 20, "--batches", 1, "--plain_block"]
    output = run_program(BENCHMARKS / "long_context.py", tmp_path, *options, "--rung", "xl")
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert {line["side"] for line in lines if "work" in line} == {"BakaLLM", "BakaLLM, plain block", "Llama"}
    state = 2 * 2 * 2 * 8 * 16 * 4  # keys and values of 2 blocks and 2 chunks of 8 tokens, of width 16 in float32
    assert [line["state_bytes_a_row"] for line in lines if "by_formula" in line] == [state]
