"""BakaLLM, a language model that reads in chunks and remembers, as a Hugging Face model."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .cache_baka import BakaCache
from .configuration_baka import BakaConfig
from .modeling_baka import BakaForCausalLM, BakaForSequenceClassification, BakaModel

__version__ = "0.1.0"

AutoConfig.register(BakaConfig.model_type, BakaConfig)
AutoModel.register(BakaConfig, BakaModel)
AutoModelForCausalLM.register(BakaConfig, BakaForCausalLM)
AutoModelForSequenceClassification.register(BakaConfig, BakaForSequenceClassification)

__all__ = [
    "BakaCache",
    "BakaConfig",
    "BakaForCausalLM",
    "BakaForSequenceClassification",
    "BakaModel",
]
