"""Makes the classes known to transformers' Auto classes without importing anything.

transformers finds its own models by name: its tables say which classes a type of model has, and a class is imported
when it is asked for. BakaLLM's names go into the same tables. `AutoModel.register` takes classes alone, and any model's
class brings `transformers.modeling_utils` with all quantizers, and so torchao, which takes its time and prints: that is
the price of a model, not of `import baka_hf`.

The tables themselves lie in modules that transformers imports late. Where one is not there yet, the names are entered
as soon as it is.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

MODEL_TYPE = "baka"
CONFIGURATION = "BakaConfig"
MODELS = {
    "MODEL_MAPPING": "BakaModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING": "BakaForCausalLM",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING": "BakaForQuestionAnswering",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": "BakaForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING": "BakaForTokenClassification",
}


def register() -> None:
    """Enter the names into the tables that are there, and into the others when they come."""
    for name, enter in TABLES.items():
        if name in sys.modules:
            enter(sys.modules[name])
    sys.meta_path.insert(0, _Finder())


def _enter_configuration(tables: Any) -> None:
    tables.CONFIG_MAPPING_NAMES[MODEL_TYPE] = CONFIGURATION
    tables.CONFIG_MAPPING._modules[MODEL_TYPE] = sys.modules[__package__]


def _enter_models(tables: Any) -> None:
    for name, model in MODELS.items():
        mapping = getattr(tables, name)
        mapping._model_mapping[MODEL_TYPE] = model
        # A copy of the names of configurations, which may be older than ours.
        mapping._reverse_config_mapping[CONFIGURATION] = MODEL_TYPE
        mapping._modules[MODEL_TYPE] = sys.modules[__package__]


TABLES = {
    "transformers.models.auto.configuration_auto": _enter_configuration,
    "transformers.models.auto.modeling_auto": _enter_models,
}


class _Finder(MetaPathFinder):
    """Finds the modules of the tables where they are, and has our names entered."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in TABLES else None
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        TABLES[module.__name__](module)


__all__ = ["register"]
