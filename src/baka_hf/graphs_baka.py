"""What graphs of decoding and of training share: whether a model is still what it was recorded with."""

import threading
from itertools import repeat
from operator import attrgetter, contains, is_
from typing import Any

import torch
from torch import nn

from .parts_baka import is_registered, registered_from

recording = threading.Lock()  # one thread at a time compiles and records

PLAIN = (nn.Embedding, nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.ModuleList)
# In a block one of these would stand for something else; a part that was registered knows what it is made of.
PLAIN_IN_PARTS = (nn.GRUCell, nn.LSTMCell, nn.Sequential)

_version_of = attrgetter("_version")


class PlainWeights:
    """The weights that graphs are recorded with, and whether they are still all that the model is made of.

    Adapters, quantization, offloading, hooks and shards are more than weights of plain modules: the plain path knows
    them all. A look is taken before every token, so it is a few passes over lists.
    """

    def __init__(self, model: Any):
        modules = list(model.modules())
        # Whatever could be put in another's place: the dictionary that has it, its name, and what it is.
        places = [(module._modules, *item) for module in modules for item in module._modules.items()]
        places += [(module._parameters, *item) for module in modules for item in module._parameters.items()]
        self.holders, self.names, self.held = zip(*places, strict=True)
        self.hooks = [hooks for x in modules for hooks in (x._forward_hooks, x._forward_pre_hooks)]
        self.hooks += [hooks for x in modules for hooks in (x._backward_hooks, x._backward_pre_hooks)]
        self.attributes = [module.__dict__ for module in modules]
        self.tensors = [it for it in self.held if isinstance(it, torch.Tensor)]
        own = {"torch.nn.modules.activation", "transformers.activations", type(model).__module__, *registered_from()}
        in_parts = {inner for module in modules if is_registered(module) for inner in module.modules()}
        rooms = __name__.rpartition(".")[0]  # where all modules of this code are, installed or come with a checkpoint
        are_known = all(
            type(module) in PLAIN
            or (type(module) in PLAIN_IN_PARTS and module in in_parts)
            or type(module).__module__ in own
            or type(module).__module__.rpartition(".")[0] == rooms
            for module in modules
        )
        self.are_plain = are_known and all(type(it) is nn.Parameter for it in self.tensors)
        if self.are_plain:  # shards have no address
            self.addresses = list(map(torch.Tensor.data_ptr, self.tensors))
            self.counted = [tensor for tensor in self.tensors if not tensor.is_inference()]
            self.versions = list(map(_version_of, self.counted))
            self.are_plain = self.are_as_they_were()

    def are_as_they_were(self) -> bool:
        """Whether they are the same, and have the same values, as far as PyTorch has counted changes."""
        return self.are_in_place() and list(map(_version_of, self.counted)) == self.versions

    def are_in_place(self) -> bool:
        """Whether they are the same, whatever their values."""
        return (
            all(map(is_, map(dict.get, self.holders, self.names), self.held))
            and not any(self.hooks)
            and not any(map(contains, self.attributes, repeat("forward")))
            and list(map(torch.Tensor.data_ptr, self.tensors)) == self.addresses
        )
