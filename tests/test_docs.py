"""README and docs are run, not believed: their Python on a small checkpoint, their commands by the scripts' parsers.

The commands with which everything begins, README's first, are run by .ci/run.
"""

import argparse
import ast
import builtins
import dataclasses
import importlib
import importlib.util
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.commands.launch import launch_command_parser
from helpers import LLAMA3, byte_tokenizer
from programs import run_program
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from baka_hf import BakaCache, BakaConfig, BakaForCausalLM
from baka_hf.associative_baka import GATES
from baka_hf.training import BakaTrainingArguments

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
MODULES = [path.stem for path in sorted((ROOT / "src" / "baka_hf").glob("*.py")) if path.stem != "__init__"]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def code_blocks(text: str, language: str) -> list[tuple[int, str]]:
    """The blocks of a language, each with the number of lines before it."""
    return [(text.count("\n", 0, m.start(2)), m[2]) for m in FENCE.finditer(text) if m[1] == language]


def commands(text: str) -> list[str]:
    """The single commands of a page's shell blocks, and those in its text."""
    lines = [line for _, block in code_blocks(text, "bash") for line in block.splitlines()]
    lines += [code for code in sorted(inline_code(text)) if code.startswith("python ")]
    return [part.strip() for line in lines for part in re.split(r"&&|\|", line) if part.strip()]


def prose(text: str) -> str:
    """A page without its blocks of code, fenced or indented."""
    return re.sub(r"^ {4}.*$", "", FENCE.sub("", text), flags=re.MULTILINE)


def inline_code(text: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", prose(text)))


# Python


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What examples/train.py leaves behind, tiny and untrained: a token is a byte."""
    folder = tmp_path_factory.mktemp("docs") / "baka-small"
    tokenizer = byte_tokenizer(bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>")
    config = BakaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        chunk_size=16,
        num_memory_tokens=2,
        num_pause_tokens=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    BakaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(checkpoint: Path) -> Path:
    """A folder as of any Llama, tiny and untrained, with that checkpoint's tokenizer."""
    folder = checkpoint.with_name("my-llama")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, bos_token_id=None)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.smoke
@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if code_blocks(text, "python")])
def test_python_blocks_run_one_after_another(page: str, checkpoint: Path, llama: Path, tmp_path: Path) -> None:
    """Every page alone, in a process of its own; lines of the program are those of the page."""
    lines: list[str] = []
    for before, block in code_blocks(TEXTS[page], "python"):
        if "from peft" in block and importlib.util.find_spec("peft") is None:
            continue
        if file := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / file[1]).write_text(block, encoding="utf-8")
            continue
        lines += [""] * (before - len(lines)) + block.splitlines()
    program = tmp_path / f"{Path(page).stem}.py"
    program.write_text("\n".join(lines), encoding="utf-8")
    for folder in (checkpoint, llama, ROOT / "checkpoints"):
        (tmp_path / folder.name).symlink_to(folder)
    (tmp_path / "book.txt").write_text("A book of some length. " * 60)
    run_program(program, tmp_path)


# Commands


class Parsed(Exception):
    """The script has parsed its command line."""


@pytest.fixture
def only_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts end when they have parsed their command line, whatever they would do next."""
    plain = argparse.ArgumentParser.parse_known_args

    def parse(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = plain(self, args, namespace)
        if args is not None and args != sys.argv[1:]:  # the parser of a subcommand
            return found, unknown
        assert not unknown
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)


STARTS = re.compile(r"(python|accelerate launch) ")
CALLS = sorted({command for text in TEXTS.values() for command in commands(text) if STARTS.match(command)})


@pytest.mark.parametrize("call", CALLS)
def test_scripts_take_the_options_that_are_named(
    call: str, only_parsing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options, choices and numbers, as the script's own parser sees them."""
    words = shlex.split(call)
    if words[0] == "accelerate":
        options = launch_command_parser().parse_args(words[2:])
        assert (ROOT / options.config_file).is_file()
        script, arguments = options.training_script, options.training_script_args
    else:
        script, *arguments = words[1:]
    if script == "-m":
        module, *arguments = arguments
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(Parsed):
            runpy.run_module(module, run_name="__main__")
    else:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        monkeypatch.syspath_prepend((ROOT / script).parent)  # as Python does
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("call", [call for call in commands(TEXTS["docs/ecosystem.md"]) if call.startswith("transf")])
def test_commands_of_transformers_exist(call: str) -> None:
    """`test_serving` runs them where its packages are installed; here the program's own parser sees them."""
    program = importlib.import_module("transformers.cli.transformers").app
    with pytest.raises(SystemExit) as ended:
        program([*shlex.split(call)[1:], "--help"])
    assert ended.value.code == 0


def test_every_command_is_one_that_is_checked() -> None:
    """Nothing in a shell block goes unnoticed by the tests and by .ci/run."""
    others = {command for text in TEXTS.values() for command in commands(text) if not STARTS.match(command)}
    elsewhere = {command for command in others if command.startswith(("curl ", "lm_eval ", "transformers "))}
    assert {command.split()[0] for command in elsewhere} == {"curl", "lm_eval", "transformers"}  # test_serve and others
    assert others - elsewhere == {'pip install -e ".[dev]"', "pytest", "cat examples/*.py"}


def test_ci_runs_the_commands_that_readme_gives() -> None:
    blocks = "".join(block for _, block in code_blocks(TEXTS["README.md"], "bash")).splitlines()
    assert 'pip install -e ".[dev]" && python examples/train.py' in blocks
    assert "pytest" in blocks
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    patterns = re.findall(r"grep -(\w+) '([^']*)' README\.md", script)
    assert [
        subprocess.check_output(["grep", f"-{flags}", pattern, ROOT / "README.md"], text=True)
        for flags, pattern in patterns
    ] == ['pip install -e ".[dev]"\n', "pytest\n"]


# Links


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = HEADING.findall(FENCE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)", prose(TEXTS[page])):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        assert file.is_relative_to(ROOT) and file.is_file(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def test_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", TEXTS["README.md"]))
    assert linked == set(PAGES) - {"README.md"}


# Names


def members_of(thing: Any) -> set[str]:
    """Attributes of a class with what its methods are called with, or the parameters of a function."""
    names = set(dir(thing)) if inspect.isclass(thing) else set()
    functions = [getattr(thing, name) for name in names if not name.startswith("__")] if names else [thing]
    functions += [thing] if names else []
    for function in functions:
        try:
            names |= set(inspect.signature(function).parameters)
        except (TypeError, ValueError):
            continue
    return names


@cache
def known_names() -> set[str]:
    """Names that this package has or that it takes over from transformers and PyTorch."""
    modules = builtins, transformers, torch.nn, torch.optim, torch.utils.data
    names = {name for module in modules for name in dir(module)}
    names |= {"baka_hf", *MODULES} | set(vars(GenerationConfig())) | set(ALL_ATTENTION_FUNCTIONS.valid_keys())
    names |= {field.name for field in dataclasses.fields(BakaTrainingArguments)} | set(GATES)
    for module in (importlib.import_module(f"baka_hf.{name}") for name in MODULES):
        for name, thing in vars(module).items():
            if getattr(thing, "__module__", "") == module.__name__:
                names |= {name} | members_of(thing)
    sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    fields = dict(memory_solidifier="glu", separate_solidifiers=True, memory_update="gate", num_pause_tokens=1)
    config = BakaConfig(**sizes, **fields, rope_parameters=LLAMA3)
    associative = BakaConfig(**sizes, associative_dim=2, associative_write="tokens")
    for model in (LlamaForCausalLM(LlamaConfig(**sizes)), *map(BakaForCausalLM, (config, associative))):
        names |= {part for name, _ in model.named_modules() for part in name.split(".")}
        names |= {part for name, _ in model.named_parameters() for part in name.split(".")}
        names |= set(model.config.rope_parameters)
    for other in (BaseModelOutputWithPast, transformers.PreTrainedModel.from_pretrained, BakaForCausalLM.generate):
        names |= members_of(other)
    return names


# Arguments of PEFT and of Trainer, and what `forward` and transformers' `from_pretrained` find in their `kwargs`.
ELSEWHERE = {
    "target_modules",
    "modules_to_save",
    "merge_and_unload",
    "compute_loss_func",
    "shift_labels",
    "num_items_in_batch",
    "distributed_config",
    "tp_plan",
}
# Arguments of the Hub's client, TRL, lm-eval and torchao or bitsandbytes.
ELSEWHERE |= {
    "code_revision",
    "hub_token",
    "packing_strategy",
    "assistant_only_loss",
    "max_length",
    "max_batch_size",
    "batch_size",
}
ELSEWHERE |= {"max_position_embeddings"}  # of other configurations
ELSEWHERE |= {"lora_rank", "skip_first_chunk", "strength_bias"}  # options of examples/give_memory.py
ELSEWHERE |= {"zero_init"}  # an option of examples/ladder.py
ELSEWHERE |= {"aoti_compile_and_package", "cache_implementation", "layer_norm_epsilon"}
ELSEWHERE |= {  # transformers' shared tests
    "ModelTesterMixin",
    "test_attention_outputs",
    "test_can_capture_specific_layers_hidden_states",
    "test_capture_outputs_decorator",
    "test_generate_compile_model_forward_fullgraph",
    "test_generate_with_static_cache",
    "test_model_rope_scaling_frequencies",
    "test_model_rope_scaling_from_config",
    "test_model_weights_reload_no_missing_tied_weights",
    "test_retain_grad_hidden_states_attentions",
    "test_training_overfit",
}
ELSEWHERE |= {"quantization_config", "device_map", "exist_ok", "disable_dropout"}


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page: str) -> None:
    """Names in backticks that look like a field, an argument or a class; files; and options of scripts."""
    known = known_names() | ELSEWHERE
    files = {path.name for folder in ("src", "examples", "tests") for path in (ROOT / folder).glob("**/*.*")}
    for code in inline_code(TEXTS[page]):
        if code.startswith("python "):  # a command, see above
            continue
        if re.fullmatch(r"\w+(/\w+)*/(\w+\.(py|csv))?", code):
            assert (ROOT / code).exists(), code
            continue
        if re.fullmatch(r"\w+\.(py|yaml)", code):
            assert code in files, code
            continue
        for name in re.findall(r"[A-Za-z]\w*", code):
            if re.fullmatch(r"[a-z]+(_[a-z0-9]+)+|(Baka|[A-Z][a-z]+[A-Z])\w*", name):
                assert name in known, code


# Tables


def table_rows(text: str, header: str) -> list[list[str]]:
    """The cells of the table with that header, row by row."""
    lines = text[text.index(f"\n{header}\n") :].splitlines()[3:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def test_configuration_table_is_the_configuration() -> None:
    """Every field, in order, with its default."""
    rows = table_rows(TEXTS["docs/configuration.md"], "| field | default | what it is |")
    fields = {field.name: field.default for field in dataclasses.fields(BakaConfig)}
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    derived = {"num_key_value_heads", "head_dim", "rope_parameters"}
    table = {name.strip("`"): default.strip("`") for name, default, _ in rows}
    assert set(table) >= fields.keys() - inherited
    for name, default in table.items():
        if name not in derived:
            assert ast.literal_eval(default) == fields[name], name
    config = BakaConfig()
    assert table["num_key_value_heads"] == "query heads" and config.num_key_value_heads == config.num_attention_heads
    assert table["head_dim"] == "D / heads" and config.head_dim == config.hidden_size // config.num_attention_heads
    assert table["rope_parameters"] == "θ = 10000" and config.rope_parameters["rope_theta"] == 10000


def test_table_of_rows_is_what_states_take() -> None:
    """By the page's formula, and by states of these configurations."""
    rows = table_rows(TEXTS["docs/serving.md"], "| differs | dtype | bytes a row | rows in 64 GiB |")
    assert len(rows) > 10
    for differs, dtype, size, count in rows:
        config = BakaConfig(**eval(f"dict({differs.strip('`')})"))
        b, D, d = getattr(torch, dtype).itemsize, config.hidden_size, config.associative_dim
        R, n, blocks = config.num_memory_tokens, config.chunk_size, config.num_hidden_layers
        S = (2 * R + n + config.num_pause_tokens) * (2 if config.use_xl_cache else 1)
        expected = b * blocks * 2 * config.num_key_value_heads * config.head_dim * S
        expected += (max(b, 4) if config.memory_norm else b) * R * D
        if d and config.associative_write == "tokens":
            expected += blocks * (max(b, 4) * config.num_attention_heads * d * config.head_dim + b * n * D)
        elif d:
            expected += blocks * max(b, 4) * 6 * d * (D + 1)
        assert BakaCache(config, 1, "meta", getattr(torch, dtype)).nbytes == expected, differs
        assert (size, count) == (f"{expected:,}", f"{2**36 // expected:,}"), differs


def test_table_of_weights_is_that_of_the_models() -> None:
    """Names and shapes of all models together, no more and no less."""
    sizes = dict(vocab_size=17, hidden_size=12, intermediate_size=20, num_attention_heads=4, num_key_value_heads=2)
    sizes |= dict(head_dim=8, num_hidden_layers=1, num_memory_tokens=3)
    symbols = {"V": 17, "D": 12, "I": 20, "H·d": 32, "K·d": 16, "d": 8, "R": 3, "1": 1, "H": 4, "H·a": 24}
    table = {}
    for name, shape, _ in table_rows(TEXTS["docs/porting.md"], "| name | shape | there is one |"):
        front, endings, back = re.fullmatch(r"`([^{`]*)(?:\{([\w,]+)\})?([^`]*)`", name).groups()
        for ending in (endings or "").split(","):
            table[front + ending + back] = tuple(symbols[symbol] for symbol in shape.strip("[]").split(", "))
    found = {}
    variants = [dict(memory_solidifier=name, qk_norm=False) for name in ("glu", "gelephant", "mlp", "layer")]
    block = dict(parallel_residual=False, qk_norm=True, attention_bias=True, mlp_bias=True)
    block |= dict(associative_dim=6, associative_write="tokens")
    others = dict(memory_update="gate"), dict(num_pause_tokens=2), dict(value_residual=True, num_hidden_layers=2)
    for fields in (*variants, block, *others):
        model = BakaForCausalLM(BakaConfig(**sizes | fields))
        found |= {re.sub(r"\.\d\.", ".N.", name): tuple(weight.shape) for name, weight in model.state_dict().items()}
        assert not list(model.buffers())
    assert table == found
