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
    "BakaModel",
]

if TYPE_CHECKING:
    from .cache_baka import BakaCache
    from .configuration_baka import BakaConfig
    from .modeling_baka import (
        BakaForCausalLM,
        BakaForQuestionAnswering,
        BakaForSequenceClassification,
        BakaForTokenClassification,
        BakaModel,
    )
else:  # a type checker would take any name for one of the package's
    _MODULES = {"BakaCache": "cache_baka", "BakaConfig": "configuration_baka"}  # all others are in modeling_baka

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_MODULES.get(name, 'modeling_baka')}", __name__), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


register()
