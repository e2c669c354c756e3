"""README is run, not believed: its Python on a small checkpoint, its commands by .ci/run."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import byte_tokenizer
from transformers import PreTrainedConfig

from baka_hf import BakaConfig, BakaForCausalLM

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What examples/train.py leaves behind, tiny and untrained: a token is a byte."""
    tokenizer = byte_tokenizer()
    config = BakaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        chunk_size=8,
        num_memory_tokens=2,
        num_pause_tokens=1,
    )
    BakaForCausalLM(config).save_pretrained(tmp_path / "baka-small")
    tokenizer.save_pretrained(tmp_path / "baka-small")
    return tmp_path / "baka-small"


@pytest.mark.smoke
def test_python_blocks_run_one_after_another(checkpoint: Path) -> None:
    blocks = code_blocks("python")
    assert blocks
    subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=checkpoint.parent, check=True)


def test_ci_runs_the_commands_that_readme_gives() -> None:
    commands = "".join(code_blocks("bash")).splitlines()
    assert 'pip install -e ".[dev]" && python examples/train.py' in commands
    assert "pytest" in commands
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    patterns = re.findall(r"grep -(\w+) '([^']*)' README\.md", script)
    assert [
        subprocess.check_output(["grep", f"-{flags}", pattern, ROOT / "README.md"], text=True)
        for flags, pattern in patterns
    ] == ['pip install -e ".[dev]"\n', "pytest\n"]


def test_configuration_table_has_every_field() -> None:
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    fields = {field.name for field in dataclasses.fields(BakaConfig)} - inherited
    assert fields <= set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))


def test_every_relative_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
