"""The house keeps its order: imports run downward, none is hidden, rooms stay small, and the figure shows them.

Nor do tests lead to tests.
"""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "baka_hf"
FILES = sorted(PACKAGE.glob("*.py"))
MOST_LINES = {"modeling_baka": 600}

_spec = importlib.util.spec_from_file_location("architecture", ROOT / "docs" / "architecture.py")
assert _spec is not None and _spec.loader is not None
architecture = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(architecture)


def is_ours(node: ast.AST) -> bool:
    """Whether it imports something of the package."""
    if isinstance(node, ast.ImportFrom):
        return node.level > 0 or (node.module or "").split(".")[0] == "baka_hf"
    return isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "baka_hf" for alias in node.names)


def test_no_room_leads_back_to_itself() -> None:
    graph = architecture.rooms()
    assert all(name not in architecture.reachable(graph, name) for name in graph)


def test_the_model_imports_nothing_of_the_package_around_it() -> None:
    graph = architecture.rooms()
    assert all(
        other.endswith("_baka") for name, imported in graph.items() if name.endswith("_baka") for other in imported
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_are_at_the_top_and_of_public_names(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            assert path.stem == "__init__" or not any(map(is_ours, ast.walk(function))), function.name
    for node in filter(is_ours, ast.walk(tree)):
        assert isinstance(node, ast.ImportFrom), "the package's own files are imported as `from .file import name`"
        assert not any(re.match("_[^_]", alias.name) for alias in node.names), [alias.name for alias in node.names]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rooms_are_small_and_say_what_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES.get(path.stem, 700)
    assert ast.get_docstring(ast.parse(text))


def test_the_figure_shows_the_rooms() -> None:
    page = architecture.PAGE.read_text(encoding="utf-8")
    assert architecture.drawn(page) == page, "run `python docs/architecture.py`"


def test_no_test_file_imports_another() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")}
    assert [name for name, text in texts.items() if re.search(r"^\s*(from|import) test_", text, re.MULTILINE)] == []
