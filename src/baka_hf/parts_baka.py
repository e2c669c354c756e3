"""Parts of others: what their code adds to the choices of a configuration.

A part is a class of modules, chosen by name in a field of the configuration. Each kind has its `register_…` beside the
classes of its kind: `register_memory` in `memory_baka`, `register_solidifier` in `solidifiers_baka`, and so on. How
its code goes with a checkpoint is in `part_files_baka`.
"""

from collections.abc import Callable, Collection
from typing import Any, TypeVar

from torch import nn

# The fields whose choices may grow, and what has been added to each, by name.
REGISTERED: dict[str, dict[str, type[nn.Module]]] = {
    "hidden_act": {},
    "norm_type": {},
    "memory_update": {},
    "memory_solidifier": {},
    "associative_write": {},
}

Part = TypeVar("Part", bound=type[nn.Module])


def register(
    field: str, name: str, table: dict[str, Any], bases: tuple[type, ...], taken: Collection[str] = ()
) -> Callable[[Part], Part]:
    """A decorator for a class that the value `name` of a configuration's `field` stands for from then on.

    Args:
        field: of `REGISTERED`.
        name: of the part. Its class may be registered again, as when its file is read anew.
        table: where the model finds parts of this kind, by name.
        bases: the classes of one of which it must be a subclass.
        taken: names beside those in `table` that mean something already.

    Raises:
        ValueError: `name` is no string or is taken, or what is decorated is not such a class, or has no `forward`.
    """

    def enter(part: Part) -> Part:
        if not isinstance(name, str) or not name:
            raise ValueError(f"expected a name for a {field}, a string that is not empty, got {name!r}.")
        kinds = " or ".join(base.__name__ for base in bases)
        is_one = isinstance(part, type) and issubclass(part, bases)
        if not is_one or (nn.Module in bases and part.forward is nn.Module.forward):
            raise ValueError(f"expected a subclass of {kinds} that has a `forward` for {field}={name!r}, got {part!r}.")
        former = REGISTERED[field].get(name)
        if name in taken or (name in table and (former is None or code_of(former) != code_of(part))):
            others = ", ".join(dict.fromkeys([*table, *taken]))
            raise ValueError(f"expected a name for a {field} that is none of {others}, got {name!r}.")
        table[name] = REGISTERED[field][name] = part
        return part

    return enter


def code_of(part: type) -> str:
    """Where its class is, as in `auto_map`: "file.Class"."""
    return f"{part.__module__.rpartition('.')[2]}.{part.__qualname__}"


def is_registered(module: nn.Module) -> bool:
    """Whether its class is a part that was registered."""
    return any(type(module) in parts.values() for parts in REGISTERED.values())


def registered_from() -> set[str]:
    """The modules, by their names in Python, that parts were registered from."""
    return {part.__module__ for parts in REGISTERED.values() for part in parts.values()}


def parts_of(config: Any) -> dict[str, type[nn.Module]]:
    """The parts of others that a `BakaConfig` names, by "field.name"."""
    named = {field: getattr(config, field) for field in REGISTERED}
    return {f"{field}.{name}": REGISTERED[field][name] for field, name in named.items() if name in REGISTERED[field]}


def check_parts(config: Any) -> None:
    """Raise a `ValueError` if a `BakaConfig` was saved with a part of others that is not here, or not the same."""
    for place, code in (getattr(config, "parts", None) or {}).items():
        field, _, name = place.partition(".")
        if getattr(config, field, None) != name:
            continue  # another was chosen since
        file, _, class_name = code.partition(".")
        part = REGISTERED[field].get(name)
        if part is None or part.__qualname__ != class_name:  # the file may be called otherwise by now
            found = "nothing" if part is None else f"{code_of(part)} under that name"
            raise ValueError(
                f"`{field}` {name!r} of this checkpoint is the class {class_name} of {file}.py, expected it to be "
                f"registered, got {found}. Import {file} before loading. If it lies in the checkpoint, and you trust "
                "it: baka_hf.import_parts(checkpoint), or trust_remote_code=True where baka_hf is not imported."
            )
