"""BakaLLM, a language model that reads in chunks and remembers, as a Hugging Face model.

Nothing is imported before it is used, and transformers' Auto classes know the model all the same.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register

__version__ = "0.1.0"

__all__ = [
    "BakaCache",
    "BakaConfig",
    "BakaForCausalLM",
    "BakaForQuestionAnswering",
    "BakaForSequenceClassification",
    "BakaForTokenClassification",
    "BakaMemoryUpdate",
    "BakaModel",
    "Held",
    "import_parts",
    "register_activation",
    "register_association",
    "register_memory",
    "register_norm",
    "register_solidifier",
]

if TYPE_CHECKING:
    from .associative_baka import register_association
    from .cache_baka import BakaCache
    from .configuration_baka import BakaConfig
    from .functions_baka import register_activation, register_norm
    from .memory_baka import BakaMemoryUpdate, Held, register_memory
    from .modeling_baka import (
        BakaForCausalLM,
        BakaForQuestionAnswering,
        BakaForSequenceClassification,
        BakaForTokenClassification,
        BakaModel,
    )
    from .parts import import_parts
    from .solidifiers_baka import register_solidifier
else:  # a type checker would take any name for one of the package's
    _MODULES = {  # all others are in modeling_baka
        "BakaCache": "cache_baka",
        "BakaConfig": "configuration_baka",
        "BakaMemoryUpdate": "memory_baka",
        "Held": "memory_baka",
        "import_parts": "parts",
        "register_activation": "functions_baka",
        "register_association": "associative_baka",
        "register_memory": "memory_baka",
        "register_norm": "functions_baka",
        "register_solidifier": "solidifiers_baka",
    }

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_MODULES.get(name, 'modeling_baka')}", __name__), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


register()
