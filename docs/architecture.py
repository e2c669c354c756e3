"""Draws the rooms of the package into docs/architecture.md: one file each, and an arrow from each to what it imports.

    python docs/architecture.py

An arrow that a longer way implies is left out. tests/test_architecture.py fails when page and code part.
"""

import argparse
import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "baka_hf"
PAGE = ROOT / "docs" / "architecture.md"
FIGURE = re.compile(r"(?<=<!-- figure -->\n).*?(?=<!-- end of figure -->)", re.DOTALL)


def imports_of(path: Path) -> set[str]:
    """The files of the package that a file imports, by name, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names |= {node.module} if node.module else {alias.name for alias in node.names}
    return names


def rooms() -> dict[str, set[str]]:
    """Every file of the package but `__init__`, and what it imports of the others."""
    found = {path.stem: imports_of(path) for path in sorted(PACKAGE.glob("*.py")) if path.stem != "__init__"}
    return {name: imported & found.keys() for name, imported in found.items()}


def reachable(graph: dict[str, set[str]], name: str) -> set[str]:
    """All that a room leads to, itself only if it is in a circle."""
    found: set[str] = set()
    ahead = list(graph[name])
    while ahead:
        room = ahead.pop()
        if room not in found:
            found.add(room)
            ahead += graph[room]
    return found


def figure() -> str:
    """The rooms as a Mermaid flowchart, what is installed around the model above what comes with every checkpoint."""
    graph = rooms()
    lines = ["```mermaid", "flowchart TD"]
    for title, is_inside in (("the package around it", False), ("the model, copied with a checkpoint", True)):
        lines.append(f'    subgraph "{title}"')
        lines += [f"        {name}" for name in graph if name.endswith("_baka") is is_inside]
        lines.append("    end")
    for name, imported in graph.items():
        implied = set().union(*(reachable(graph, other) for other in imported))
        lines += [f"    {name} --> {other}" for other in sorted(imported - implied)]
    return "\n".join([*lines, "```", ""])


def headings() -> str:
    """What each room says it is."""
    lines = ["| room | what is in it |", "| --- | --- |"]
    for name in rooms():
        doc = ast.get_docstring(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))) or ""
        paragraph = doc.partition("\n\n")[0]
        lines.append(f"| `{name}` | {' '.join(paragraph.split())} |")
    return "\n".join([*lines, ""])


def drawn(page: str) -> str:
    """The page with today's figure."""
    return FIGURE.sub(lambda _: f"{figure()}\n{headings()}", page)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(drawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
