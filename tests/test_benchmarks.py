"""Benchmarks run: two sides, a line and a ratio for each measurement, a picture. Their figures mean nothing here."""

import importlib.util
import json
from pathlib import Path

import pytest
from programs import run_program

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
    assert works and all(len(sides) == 2 and "BakaLLM" in sides for sides in works.values())
    for figure in FIGURES[name]:
        assert {row[figure] > 0 for row in rows if figure in row} == {True}

    _, _, *table = (tmp_path / f"{name}.md").read_text().splitlines()
    assert len(table) >= len(works)
    assert all(float(row.split("|")[-2]) >= 0 for row in table)
    assert (tmp_path / f"{name}.png").is_file() == (name != "peers")
    sizes = [line for line in lines if "by_formula" in line]
    assert all(line["state_bytes_a_row"] == line["by_formula"] for line in sizes)
    assert len(sizes) == (4 if name == "long_context" else 0)


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
