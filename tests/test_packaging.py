"""What the package promises beyond its behaviour: imports, typing marker, licence."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "baka_hf"
REMOTE_CODE = ["configuration_baka", "cache_baka", "modeling_baka", "graphs_baka"]


@pytest.mark.parametrize("module", REMOTE_CODE)
def test_remote_code_imports_only_torch_transformers_and_its_siblings(module: str) -> None:
    """These files are copied flat beside a checkpoint and loaded where nothing else is sure to be installed."""
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
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
    subprocess.run([sys.executable, "-W", "error", "-c", "import baka_hf"], check=True)


def test_wheel_has_all_modules_the_card_template_the_typing_marker_and_the_licence(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("baka_hf-*.whl")
    files = zipfile.ZipFile(wheel)
    names = set(files.namelist())
    assert {f"baka_hf/{module}.py" for module in ("__init__", *REMOTE_CODE)} | {"baka_hf/py.typed"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert files.read("baka_hf/model_card.md") == (ROOT / "model_card.md").read_bytes()


def test_an_installed_wheel_writes_cards(tmp_path: Path) -> None:
    """From the template in the package, where there is no checkout around it."""
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("baka_hf-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    script = (
        "from baka_hf.hub import template_path; import baka_hf; "
        "print(template_path().parent == __import__('pathlib').Path(baka_hf.__file__).parent)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
