"""Checkpoints: what is saved is what will be loaded, and what is loaded is all that was saved; or else an error."""

import copy
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.dynamic_module_utils import custom_object_save, get_relative_import_files

from .configuration_baka import AUTO_MAP
from .part_files_baka import ENTRY

# The classes whose code comes with a checkpoint.
CLASSES = {code.rpartition(".")[2] for code in AUTO_MAP.values()}
# What a checkpoint of another of these classes may hold beyond what a model has a place for.
HEADS = ("lm_head", "score", "qa_outputs")


class BakaCheckpointMixin:
    """`from_pretrained` and `save_pretrained` of every model, and what they refuse."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("torch."):
            # FSDP2 gives a sharded model a class of its own. What is saved with it is the code of the model's.
            model_class = next(base for base in cls.__mro__[1:] if not base.__module__.startswith("torch."))
            cls.__module__, cls.__name__ = model_class.__module__, model_class.__name__
        else:
            cls._auto_class = None  # type: ignore[attr-defined]  # no class is registered because its base is

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As of every model, whose documentation has the arguments.

        Raises:
            ValueError: the checkpoint is of another architecture, or of a class with code of its own; or it holds
                learned parameters that the configuration has no place for, as with `num_memory_tokens=0` among the
                arguments.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        code = {name: place.rpartition("--")[2] for name, place in model.config.auto_map.items() if name in AUTO_MAP}
        ours = {*AUTO_MAP.values()} | {f"{ENTRY}.{name}" for name in CLASSES}
        owners = {*(model.config.architectures or ())} - CLASSES | {*code.values()} - ours
        if owners and cls.__name__ in CLASSES:
            raise ValueError(
                f"expected a checkpoint of {cls.__name__}, got one of {', '.join(sorted(owners))}, which is another "
                "class with code of its own. Load it with that class, or, if its code is in the checkpoint, with "
                "trust_remote_code=True in a process that has not imported baka_hf."
            )
        others = tuple(f"{head}." for head in HEADS if not hasattr(model, head))
        lost = sorted(name for name in info["unexpected_keys"] if not name.startswith(others))
        if lost:
            names = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
            raise ValueError(
                f"expected no learned parameters but those that the configuration asks for, got {names}. "
                "Load the checkpoint with the fields that it was saved with. To leave something out on purpose, make a "
                f"{cls.__name__} of a configuration without it, and give the rest to `load_state_dict`."
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        """As of every model.

        Raises:
            ValueError: a part of the model is not the one that its configuration asks for, like an activation that was
                put in by hand. Or its class is registered for an Auto class, and its code does not bring this along.
        """
        if type(self).__name__ in CLASSES:
            self._check_parts()
        elif type(self)._auto_class is not None:  # type: ignore[attr-defined]
            self._check_code()
        elif is_main_process:
            # For whoever loads it without knowing this class: its base refuses, and says what it is.
            os.makedirs(save_directory, exist_ok=True)
            custom_object_save(next(base for base in type(self).__mro__ if base.__name__ in CLASSES), save_directory)
        if is_main_process:
            for path in Path(save_directory).glob("*_baka.py"):
                if path.is_symlink():
                    path.unlink()  # code of the package: a copy takes its place
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)  # type: ignore[misc]

    def _check_parts(self) -> None:
        """Compare each module with what would be built on loading. Linear layers may be quantized."""
        if getattr(self, "_hf_peft_config_loaded", False):
            return  # nothing is saved but the adapter
        with torch.device("meta"):
            built: Any = type(self)(copy.deepcopy(self.config))  # type: ignore[attr-defined, call-arg]
        modules = dict(self.named_modules())  # type: ignore[attr-defined]
        for name, module in built.named_modules():
            found = modules.get(name)
            if not isinstance(module, nn.Linear | nn.Embedding) and not _is_of(type(found), type(module)):
                raise ValueError(
                    f"expected `{name}` to be a {type(module).__name__}, as the configuration says, got a "
                    f"{type(found).__name__}, which would not be there after loading. Choose it in the configuration, "
                    "or write a class of model that builds it."
                )

    def _check_code(self) -> None:
        name, module = type(self).__name__, type(self).__module__
        files = [] if module == "__main__" else get_relative_import_files(str(sys.modules[module].__file__))
        if os.path.basename(__file__) not in map(os.path.basename, files):
            raise ValueError(
                f"expected the code of {name} to bring along what it is built on, since it is registered for "
                f"{type(self)._auto_class}, got none in {module}. "  # type: ignore[attr-defined]
                "Put it into a file beside baka_hf's files for checkpoints (*_baka.py) that imports from them as in "
                "`from .modeling_baka import BakaForCausalLM`. Or do not register it: its own class loads it."
            )


def _is_of(found: type, expected: type) -> bool:
    """Whether modules of class `found` are what `expected` builds: PyTorch's own subclasses of it are, as shards have
    them, but nobody else's, of which a checkpoint would know nothing."""
    if (found.__module__, found.__name__) == (expected.__module__, expected.__name__):
        return True
    return issubclass(found, expected) and found.__module__.startswith("torch.")
