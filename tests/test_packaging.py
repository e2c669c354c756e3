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
REMOTE_CODE = sorted(path.stem for path in PACKAGE.glob("*_baka.py"))


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
    modules = ", ".join(f"baka_hf.{path.stem}" for path in PACKAGE.glob("[a-z]*.py"))
    subprocess.run([sys.executable, "-W", "error", "-c", f"import baka_hf, {modules}"], check=True)


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
