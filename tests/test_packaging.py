"""What the package promises beyond its behaviour: imports, typing marker, licence."""

import ast
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.dynamic_module_utils import get_imports
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import baka_hf
from baka_hf import (
    BakaConfig,
    BakaForCausalLM,
    BakaForQuestionAnswering,
    BakaForSequenceClassification,
    BakaForTokenClassification,
    BakaModel,
)
from baka_hf.registration import register

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "baka_hf"
REMOTE_CODE = sorted(path.stem for path in PACKAGE.glob("*_baka.py"))


@pytest.mark.parametrize("module", REMOTE_CODE)
def test_remote_code_imports_only_torch_transformers_and_its_siblings(module: str) -> None:
    """These files are copied flat beside a checkpoint and loaded where nothing else is sure to be installed."""
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    assert {*get_imports(PACKAGE / f"{module}.py")} <= allowed  # what transformers asks for before it loads a file
    allowed.add("triton")  # tried for, and done without
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None and node.module.partition(".")[0] in allowed
        elif isinstance(node, ast.ImportFrom):
            # `from . import x` and deeper paths are not copied by `save_pretrained`.
            assert node.level == 1 and node.module in REMOTE_CODE


@pytest.mark.smoke
def test_importing_the_package_warns_of_nothing() -> None:
    modules = ", ".join(f"baka_hf.{path.stem}" for path in PACKAGE.glob("[a-z]*.py"))
    subprocess.run([sys.executable, "-W", "error", "-c", f"import baka_hf, {modules}"], check=True)


QUICK = """
import sys
import baka_hf
heavy = {"torch", "transformers", "torchao", "datasets", "accelerate", "pyarrow"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert set(baka_hf.__all__) < set(dir(baka_hf))
import torch, transformers
before = set(sys.modules)
del sys.modules["baka_hf"], sys.modules["baka_hf.registration"]
import baka_hf
assert not {name for name in set(sys.modules) - before if not name.startswith("baka_hf")}
"""


@pytest.mark.smoke
def test_importing_the_package_imports_and_prints_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", QUICK], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_results_are_looked_at_without_torch() -> None:
    script = "import sys, runpy; sys.argv[1:] = ['--help']; runpy.run_module('baka_hf.results', run_name='__main__')"
    check = f"try:\n    {script}\nexcept SystemExit:\n    assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)


# The Auto classes are imported after the package, in parts, and know it as soon as they are there.
AUTO = """
import sys
import baka_hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig
assert "baka" in CONFIG_MAPPING and not {n for n in sys.modules if n.startswith("baka_hf.") and n.endswith("_baka")}
import transformers.modeling_layers  # imports the Auto classes while what our own models import is half there
from transformers import AutoModelForCausalLM
config = AutoConfig.for_model("baka", vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
assert type(config) is baka_hf.BakaConfig
assert type(AutoModelForCausalLM.from_config(config)) is baka_hf.BakaForCausalLM
"""


@pytest.mark.smoke
def test_auto_classes_that_are_imported_later_know_the_model() -> None:
    subprocess.run([sys.executable, "-c", AUTO], check=True)


@pytest.mark.smoke
def test_auto_classes_that_were_imported_before_know_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = {AutoModel: BakaModel, AutoModelForCausalLM: BakaForCausalLM}
    auto |= {AutoModelForSequenceClassification: BakaForSequenceClassification}
    auto |= {AutoModelForTokenClassification: BakaForTokenClassification}
    auto |= {AutoModelForQuestionAnswering: BakaForQuestionAnswering}
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.delitem(CONFIG_MAPPING_NAMES, "baka")
    for auto_class in auto:
        monkeypatch.delitem(auto_class._model_mapping._model_mapping, "baka")
        monkeypatch.delitem(auto_class._model_mapping._reverse_config_mapping, "BakaConfig")
    assert "baka" not in CONFIG_MAPPING and BakaConfig not in AutoModel._model_mapping
    register()
    assert CONFIG_MAPPING["baka"] is BakaConfig
    assert {auto_class: auto_class._model_mapping[BakaConfig] for auto_class in auto} == auto
    assert "BakaForCausalLM" in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()  # as pipelines and the Trainer ask


def test_the_package_has_its_public_names_and_no_others() -> None:
    names: dict[str, object] = {}
    exec("from baka_hf import *", names)
    assert {name for name in names if name != "__builtins__"} == set(baka_hf.__all__)
    for name in baka_hf.__all__:
        assert names[name] is getattr(baka_hf, name) and pickle.loads(pickle.dumps(names[name])) is names[name]
    with pytest.raises(AttributeError, match="module 'baka_hf' has no attribute 'BakaTokenizer'"):
        _ = baka_hf.BakaTokenizer  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("baka_hf-*.whl")
    return zipfile.ZipFile(path)


def test_wheel_has_all_modules_the_typing_marker_and_the_licence(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {f"baka_hf/{path.name}" for path in PACKAGE.glob("*.py")} | {"baka_hf/py.typed"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_a_package_without_its_checkout_has_the_template_of_cards(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    script = "from baka_hf.hub import template_path; print(template_path())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    found = Path(done.stdout.strip())
    assert found.is_relative_to(tmp_path) and found.read_bytes() == (ROOT / "model_card.md").read_bytes()
