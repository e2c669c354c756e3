"""The norm of a model: one place makes it, below all that has one."""

from typing import Any

from torch import nn


def get_norm(config: Any) -> nn.Module:  # of a BakaConfig
    """A norm of vectors [..., D]."""
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
