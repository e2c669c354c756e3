"""The code of others' parts in a checkpoint.

A checkpoint gets the files of the parts that its configuration names, and one more, `extended_baka.py`, that imports
them and has the model's classes. `auto_map` leads to these by way of it: who finds the classes knows the parts.
"""

import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from .parts_baka import code_of, parts_of

logger = logging.get_logger(__name__)

ENTRY = "extended_baka"
OPENING = '"""The classes of this checkpoint, and the parts that its configuration names."""'
PACKAGE = __name__.rpartition(".")[0]  # that this code is in, installed or come with a checkpoint
ROOMS = Path(__file__).parent


def described(fields: Mapping[str, Any], config: Any, places: Mapping[str, str]) -> dict[str, Any]:
    """What a file says of a `BakaConfig`: `fields`, and of the parts of others that it names where these are, and so
    where its classes are.

    Args:
        fields: all that the file says otherwise.
        config: the `BakaConfig`.
        places: what its `auto_map` is without parts of others.
    """
    parts = parts_of(config)
    described = {name: value for name, value in fields.items() if name != "parts"}
    if parts:
        described["parts"] = {place: code_of(part) for place, part in parts.items()}
    ours = {_class_in(place): place for place in places.values()}
    leads_by_entry = any(map(is_in_file, parts.values()))
    auto_map = {
        name: f"{ENTRY}.{_class_in(place)}" if leads_by_entry else ours[_class_in(place)]
        for name, place in (fields.get("auto_map") or {}).items()
        if name in places and (place in ours.values() or place.startswith(f"{ENTRY}."))
    }
    return described | ({"auto_map": fields["auto_map"] | auto_map} if auto_map else {})


def is_in_file(part: type[nn.Module]) -> bool:
    """Whether its class can be imported from a file, which no script is."""
    module = sys.modules.get(part.__module__)
    is_there = getattr(module, part.__qualname__, None) is part and getattr(module, "__file__", None) is not None
    return is_there and part.__module__ != "__main__"


def save_parts(config: Any, folder: Any, places: Mapping[str, str]) -> None:
    """Write into a checkpoint the files of the parts that its `BakaConfig` names, and the one that imports them.

    The code of a class in a script or a notebook stays behind, with a warning.

    Args:
        config: the `BakaConfig`.
        folder: of the checkpoint.
        places: what its `auto_map` is without parts of others.

    Raises:
        ValueError: one of these files cannot stand beside those of a checkpoint, see `as_in_checkpoint`.
    """
    parts = {}
    for place, part in parts_of(config).items():
        if is_in_file(part):
            parts[place] = part
        else:
            logger.warning_once(
                f"the code of {part.__name__} ({' '.join(place.split('.', 1))}) does not go with the checkpoint, which "
                "loads only where it has been registered before: it is in no file that can be imported. Put it into "
                "one, and import that."
            )
    if not parts:
        return
    files = as_in_checkpoint(Path(str(sys.modules[part.__module__].__file__)) for part in parts.values())
    codes = sorted({*places.values(), *map(code_of, parts.values())})
    imports = "\n".join(f"from .{code.rpartition('.')[0]} import {_class_in(code)}" for code in codes)
    files[f"{ENTRY}.py"] = f"{OPENING}\n\n{imports}\n\n__all__ = {[_class_in(code) for code in codes]}\n"
    for name, text in files.items():
        Path(folder, name).write_text(text, encoding="utf-8")


def as_in_checkpoint(paths: Iterable[Path]) -> dict[str, str]:
    """The texts of files, and of those beside them that they import, as they stand in a checkpoint, by name.

    There they are all in one folder with this package's. What they import from it or from each other they import from
    a neighbour: `from baka_hf import Held` becomes `from .memory_baka import Held`.

    Raises:
        ValueError: two files have one name, or a file has that of one of ours; or what is imported from this package,
            or from beside a file, is no name from a file that can go along.
    """
    found: dict[str, Path] = {}
    texts: dict[str, str] = {}
    waiting = list(paths)
    while waiting:
        path = waiting.pop()
        if found.setdefault(path.name, path) != path or (path.parent != ROOMS and (ROOMS / path.name).exists()):
            raise ValueError(f"expected a name that no other file of the checkpoint has, got {path}.")
        if path.name in texts:
            continue
        text = path.read_text(encoding="utf-8")
        lines = text.encode().splitlines(keepends=True)
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in sorted(nodes, key=lambda node: node.lineno, reverse=True):  # what is above stays where it is
            names = _neighbours(node, path)
            waiting += {path.parent / f"{file}.py" for file, _, is_ours in names if not is_ours}
            if not names or (isinstance(node, ast.ImportFrom) and node.level):
                continue  # from elsewhere, or from a neighbour already
            first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
            before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
            indent = "\n" + " " * node.col_offset
            imports = indent.join(f"from .{file} import {name}" for file, name, _ in names)
            lines[first : last + 1] = [before + imports.encode() + after]
        texts[path.name] = b"".join(lines).decode()
    return texts


def _neighbours(node: ast.Import | ast.ImportFrom, path: Path) -> list[tuple[str, str, bool]]:
    """What an import in a file takes from its neighbours in a checkpoint: of each name the neighbour's, what follows
    `import`, and whether the neighbour is one of ours."""
    statement = ast.unparse(node)
    refused = ValueError(
        f"expected the code of parts to import from {PACKAGE} names in its files for checkpoints (*_baka.py), and from "
        f"what lies beside it as in `from file import name`, got `{statement}` in {path}."
    )
    if isinstance(node, ast.Import):
        roots = {alias.name.partition(".")[0] for alias in node.names}
        if PACKAGE in roots or any((path.parent / f"{root}.py").is_file() for root in roots):
            raise refused
        return []
    module, names = node.module or "", []
    is_ours = node.level == 0 and module.partition(".")[0] == PACKAGE
    if path.parent != ROOMS and node.level == 1:
        is_ours = (ROOMS / f"{module}.py").is_file()  # this file came with a checkpoint, see `import_parts`
    if not is_ours and node.level == 0 and not (path.parent / f"{module}.py").is_file():
        return []  # somebody else's package
    for alias in node.names:
        file = module
        if is_ours:
            place = getattr(getattr(sys.modules[PACKAGE], alias.name, None), "__module__", "")
            file = (place if module == PACKAGE else module).removeprefix(f"{PACKAGE}.")
        folder = ROOMS if is_ours else path.parent
        if node.level > 1 or not (folder / f"{file}.py").is_file() or (is_ours and not file.endswith("_baka")):
            raise refused
        names.append((file, alias.name + (f" as {alias.asname}" if alias.asname else ""), is_ours))
    return names


def _class_in(place: str) -> str:
    """The class of "file.Class"."""
    return place.rpartition(".")[2]
