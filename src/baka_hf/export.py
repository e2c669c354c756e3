"""A token as a program: one step of decoding without Python, for `torch.export` and what runs its programs.

    steps = {kind: program.module() for kind, program in export_steps(model).items()}
    model(prompt, cache=state)
    tensors = tensors_of(state)
    logits, tensors = steps[step_for(model.config, tensors["num_tokens"])](token, tensors)

A step is a function of tensors alone: ids and the state in, logits and the next state out. What differs from token to
token is how many positions there are, since a pause, or a chunk's memory, may come with it. That depends on how many
tokens were read, so whoever counts them knows which program is next, and there is one for each kind.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .cache_baka import BakaCache
from .configuration_baka import BakaConfig
from .decoding_graphs_baka import EDGE, PAUSE, PLAIN, kinds_of_steps, locate
from .functions_baka import rotary_table_of
from .reading_baka import ChunkPass
from .stream_baka import Stream, fixed_pauses

KINDS = {"plain": PLAIN, "pause": PAUSE, "edge": EDGE}


class DecodingStep(nn.Module):
    """Reads one token in each row.

    Args:
        model (`BakaForCausalLM`): whose weights it reads with; on one device, with attention "sdpa" or "eager".
        kind: "plain"; "pause" if a pause may come before the token in some row; "edge" if the token may begin or end a
            chunk in some row. Each also serves those before it, for the price of its positions.

    Raises:
        ValueError: another kind, attention of another kind, or pauses whose places are drawn.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    pauses: torch.Tensor

    def __init__(self, model: Any, kind: str = "edge"):
        super().__init__()
        config: BakaConfig = model.config
        if kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}.")
        if config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(f"expected attention 'sdpa' or 'eager', got {config._attn_implementation!r}.")
        if config.uses_random_pauses:
            raise ValueError("expected `pause_placement` 'fixed', got 'random': such pauses are drawn on the host.")
        self.model, self.config, self.kind = model, config, KINDS[kind]
        self.width = kinds_of_steps(config)[1][self.kind]
        weight = model.model.norm.weight
        cos, sin = rotary_table_of(config, weight.device, weight.dtype)
        pauses = torch.tensor(fixed_pauses(config), dtype=torch.int64, device=weight.device)[None]
        for name, tensor in dict(cos=cos, sin=sin, pauses=pauses).items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(
        self, input_ids: torch.Tensor, state: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Logits [B, vocab_size] after the tokens `input_ids` [B, 1] int64, and the state after them; nothing is
        changed in place. A state is what `tensors_of` makes of one."""
        config, layers = self.config, range(self.config.num_hidden_layers)
        keys, values = ([state[f"layers.{index}.{half}"] for index in layers] for half in ("keys", "values"))
        num_tokens, seeded = state["num_tokens"], state["seeded"]
        table, counts = (self.cos, self.sin), torch.ones_like(num_tokens)
        rows = num_tokens, seeded, counts
        span, layout, view = locate(config, table, self.pauses, *rows, 1, self.width, keys[0].dtype)
        if self.kind != EDGE:
            layout.begins = layout.completes = False
            if view.writers is not None:
                view = view._replace(writers=view.writers._replace(completes=False))
        # A pass takes of a memory what it knows by name, and hands on all else.
        chunk_pass = ChunkPass(self.model.model, len(input_ids))
        passed = chunk_pass.run(span.first, layout, view, input_ids, Stream(state, keys, values))
        after = state | (passed.after.memory or {}) | {"num_tokens": span.num_tokens}
        for index, both in enumerate(zip(passed.after.keys, passed.after.values, strict=True)):
            after[f"layers.{index}.keys"], after[f"layers.{index}.values"] = both
        return self.model.lm_head(passed.states[-1][:, 0]), after


def tensors_of(state: BakaCache) -> dict[str, torch.Tensor]:
    """What a step takes as the state: copies of its tensors, [B, …] each, and on the same device how many tokens each
    row has read, "num_tokens" [B] int64, and whether it began with another stream's memory, "seeded" [B] bool.

    Raises:
        ValueError: the state is torn.
    """
    state.check_whole()
    counts = {"num_tokens": state._num_tokens, "seeded": state._seeded}
    counts = {name: tensor.to(state.device, copy=True) for name, tensor in counts.items()}
    return counts | {name: tensor.detach().clone() for name, tensor in state.tensors().items()}


def step_for(config: BakaConfig, num_tokens: Sequence[int] | torch.Tensor) -> str:
    """The kind of step that reads the next token of rows which have read `num_tokens` [B]."""
    kinds, names = kinds_of_steps(config)[0], list(KINDS)
    return names[max(kinds[int(count) % config.chunk_size] for count in num_tokens)]


def export_steps(model: Any, batch_size: int = 1) -> dict[str, torch.export.ExportedProgram]:
    """A program for each kind of step there is, by its name, of a `BakaForCausalLM` in eval mode.

    Raises:
        ValueError: as `DecodingStep`.
    """
    kinds = {step_for(model.config, [position]) for position in range(model.config.chunk_size)}
    token = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.device)
    state = tensors_of(model.new_cache(batch_size))
    with torch.no_grad():
        return {
            kind: torch.export.export(DecodingStep(model, kind), (token, state), strict=False)
            for kind in KINDS
            if kind in kinds
        }


__all__ = ["DecodingStep", "export_steps", "step_for", "tensors_of"]
