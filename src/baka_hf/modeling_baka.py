"""BakaLLM: the decoder, and the models that are a decoder and a head.

`BakaModel.forward` checks a call, cuts it into spans, pieces of one chunk (the field also says segment) that are read
in one pass, and has `Reading` read them; everything recurrent goes through `BakaCache`.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Unpack

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .associative_baka import BakaTokenAssociation, associations_held, associative_layers
from .cache_baka import BakaCache
from .calls_baka import CACHE_NAME, BakaCausalLMOutput, BakaModelOutput, Call, Results, close, plan
from .checkpoint_baka import BakaCheckpointMixin
from .compile_baka import on_host, runs_compiled_parts
from .configuration_baka import BakaConfig
from .decoding_graphs_baka import reader_of
from .functions_baka import from_host, get_norm, initialise
from .generation_baka import BakaGenerationMixin
from .heads_baka import QuestionAnswering, SequenceClassification, TokenClassification
from .inputs_baka import (
    ArrayLike,
    check_cache,
    check_kept,
    check_kind,
    check_mask,
    check_targets,
    check_tensors,
    check_text,
    either_name,
    state_among,
)
from .layers_baka import BakaDecoderLayer, BakaPauseDropout
from .loss_baka import IGNORED, BakaHead, loss_by_pieces, share_of_batch, without_padding
from .memory_baka import MEMORY_UPDATES, BakaMemoryUpdate, Memory, check_updated, memory_held
from .parts_baka import is_registered
from .reading_baka import Reading
from .solidifiers_baka import SOLIDIFIERS
from .stream_baka import fixed_pauses
from .training_graphs_baka import forget, recorder_of


class BakaPreTrainedModel(BakaCheckpointMixin, PreTrainedModel):
    config: BakaConfig
    config_class = BakaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BakaDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        reset = getattr(module, "reset_parameters", None)
        if callable(reset) and (isinstance(module, BakaMemoryUpdate | BakaTokenAssociation) or is_registered(module)):
            reset()
        std = getattr(module, "initial_std", None)
        if std is None:
            super()._init_weights(module)
            return
        init.normal_(module.weight, std=std)
        bias = getattr(module, "bias", None)
        if isinstance(bias, torch.Tensor):
            first, last = getattr(module, "initial_bias", (0.0, 0.0))
            init.copy_(bias, torch.linspace(first, last, len(bias)))

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # In custom code transformers passes over modules without parameters of their own. All in here go by what
        # `transformers.initialization` knows of each parameter.
        super()._initialize_weights(module)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if issubclass(cls, BakaGenerationMixin):
            # Trainer finds by a class's name, and here, whether label smoothing has to shift labels.
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[cls.__name__] = cls.__name__

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        """Gradient checkpointing, and one argument more: `gradient_checkpointing_kwargs={"granularity": "chunk"}`.

        "layer", the default, keeps each block's input of every chunk and computes a block again in the backward pass.
        "chunk" keeps what a chunk began with (memory, keys and values of the one before) and computes all blocks of
        the chunk again: beside these states, activation memory is that of one chunk, however many a call has.
        """
        arguments = dict(getattr(gradient_checkpointing_func, "keywords", {}))
        granularity = arguments.pop("granularity", "layer")
        if granularity not in ("layer", "chunk"):
            raise ValueError(
                f"`granularity` of gradient checkpointing must be 'layer' or 'chunk', got {granularity!r}."
            )
        by_chunk = granularity == "chunk"
        if arguments.setdefault("use_reentrant", False) and by_chunk:
            raise ValueError("checkpointing with granularity='chunk' needs use_reentrant=False, got True.")
        if arguments["use_reentrant"] and self.config.associative_dim:  # no gradients would come back through them
            raise ValueError("checkpointing of blocks with associations needs use_reentrant=False, got True.")
        if isinstance(gradient_checkpointing_func, partial):
            gradient_checkpointing_func = partial(gradient_checkpointing_func.func, **arguments)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)
        for module in self.modules():
            if isinstance(module, BakaModel):
                module.checkpoints_chunks = enable and by_chunk
            elif by_chunk and isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = False

    def cuda_graphs_enable(self, enable: bool = True) -> None:
        """Record training calls as CUDA graphs (`training_graphs_baka`); or stop doing so, and free what they hold.

        A call's blocks are some thousand kernels, many of a few microseconds, and asking for one after another keeps a
        GPU waiting when rows are few. The first call of each kind (rows, tokens, with or without a state) runs as it
        would anyway, the second is recorded, and the blocks of all later ones are launched at once, forward and
        backward. Activation memory stays reserved for that. Only with gradients, on a CUDA device, without an
        `attention_mask`, in models of plain modules without hooks, adapters, shards, shared weights, checkpointing or
        random pauses; whatever else comes is read as ever. One thread at a time may train a model.
        """
        for module in self.modules():
            if isinstance(module, BakaModel):
                module.records_training = enable
                if not enable:
                    forget(module)

    @runs_compiled_parts  # compilers do not look into what catches errors
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A call is all or nothing, hooks included: whatever is raised, the state goes back to what it was before."""
        state = state_among(args, kwargs)
        if state is None:
            return super().__call__(*args, **kwargs)
        before = state.__dict__
        try:
            return super().__call__(*args, **kwargs)
        except BaseException:
            state.go_back(before)
            raise

    def new_cache(self, batch_size: int = 1, memory: torch.Tensor | None = None, static: bool = False) -> BakaCache:
        """An empty state of this model's own class, device and dtype.

        Args:
            batch_size: number of texts to read side by side.
            memory: the `.memory` of another stream, [R, D] or [batch_size, R, D], for these texts to begin with. What
                that stream held in keys and values, and of a chunk not yet full, does not come over.
            static: on a CUDA device keep the state's tensors where they are, changed in place, and read whole chunks
                and single tokens by CUDA graphs (`decoding_graphs_baka`). Their kernels are compiled when first met,
                and forward hooks are not called. What is not so simple is read as from any other state.
        """
        # Weights that are offloaded have no device; the state follows the blocks' to where they compute.
        device = None if self.device.type == "meta" else self.device
        cache = BakaCache(self.config, batch_size, device, self.dtype)
        cache.is_static = static
        return cache if memory is None else cache.seed_memory(memory)


class BakaModel(BakaPreTrainedModel):
    """The decoder without a head. Its parameters are the union of what the configuration asks for."""

    records_training = False  # see `cuda_graphs_enable`

    def __init__(self, config: BakaConfig):
        super().__init__(config)
        config.validate_architecture()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.num_pause_tokens:
            self.pause_token = nn.Embedding(1, config.hidden_size)
        if config.num_memory_tokens:
            self.memory_tokens = nn.Embedding(config.num_memory_tokens, config.hidden_size)
            self.memory_update = MEMORY_UPDATES[config.memory_update](config)
            if self.memory_update.needs_norm:
                initialise(1.0, self.memory_tokens)
            if config.memory_norm:
                self.memory_norm = get_norm(config, wide=True)
            if config.separate_solidifiers:
                self.read_solidifier = SOLIDIFIERS[config.memory_solidifier](config)
                self.write_solidifier = SOLIDIFIERS[config.memory_solidifier](config)
            elif config.memory_solidifier != "none":
                self.solidifier = SOLIDIFIERS[config.memory_solidifier](config)
        if config.uses_random_pauses:
            self.pause_dropout = BakaPauseDropout()
        has_association = set(associative_layers(config))
        self.layers = nn.ModuleList(
            [
                BakaDecoderLayer(config, index in has_association, config.value_residual and index > 0)
                for index in range(config.num_hidden_layers)
            ]
        )
        self.norm = get_norm(config)
        self.gradient_checkpointing = False
        self.checkpoints_chunks = False
        self.num_plans = 0  # calls that were more than a token from a static state; weights may change between them
        self.post_init()

    @can_return_tuple
    @runs_compiled_parts
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: ArrayLike | None = None,
        past_key_values: BakaCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        output_memories: bool = False,
        cache: BakaCache | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]  # its types are not followed
    ) -> BakaModelOutput:
        """Read text, from its beginning or on from a state.

        Args:
            input_ids: [B, L] int64 token ids; or `inputs_embeds`, [B, L, D]. With a state ids, and always the mask, may
                also lie on the host.
            attention_mask: [B, L], or [B, P + L] after P positions fed to the state, of 1 and 0; 0 means "not in the
                stream", wherever it stands. Other values are refused where they are looked at, not in training on a
                GPU, where they are 1.
            position_ids: [B, L]. A real token whose position does not go on from the one before, and 0 never does,
                begins a new text there; a row's first one in this call does not. They may be an array of numpy:
                for a tensor on a GPU, and always with a mask, the host waits to know of such texts.
            past_key_values, cache: the state to go on from, under either of its names. It is changed in place.
            use_cache: return the state; by default `config.use_cache`, and no when training. False with a state is
                refused: it goes forward.
            output_hidden_states: also return the embeddings and each block's output over the text, [B, L, D] each,
                the last one normed; or only those that an index or a list of indices names, and None for the others.
                (0 alone is False, as in transformers; `[0]` names the embeddings.)
            output_attentions: also return each block's weights (eager attention only), [B, heads, L, 2S]: over
                the slots of the previous chunk's stream, then over those of the own one.
            output_memories: also return the memories that full chunks have read and left, see `BakaModelOutput`.

        Returns:
            `last_hidden_state` [B, L, D], zero where `attention_mask` is 0 (with `num_last_states=k` among `kwargs` the
            last k columns at least, and whatever else came with their chunks), and the state.

        Raises:
            ValueError: an argument does not fit the others, the model or the state, which is left as it was.
        """
        cache = either_name(past_key_values, cache)
        check_tensors(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds)
        check_kind(cache, use_cache)
        for name in ("cu_seq_lens_q", "seq_idx"):
            if position_ids is None and kwargs.get(name) is not None:
                raise ValueError(
                    f"expected `position_ids` that restart at 0 where a packed text begins, got `{name}` alone (PEFT's "
                    "prompt learning drops `position_ids`: give it samples that are not packed)."
                )
        outputs = output_hidden_states, output_attentions
        kwargs["output_memories"] = output_memories
        if inputs_embeds is None:
            states = self.read_token(input_ids, attention_mask, cache, *outputs, **kwargs)
            if states is not None:
                return BakaModelOutput(last_hidden_state=states, **{CACHE_NAME: cache})
        self.num_plans += 1
        recomputes = self.checkpoints_chunks and self.training and torch.is_grad_enabled()
        embeds = torch.is_grad_enabled() and not recomputes
        text = input_ids, attention_mask, position_ids, cache, inputs_embeds
        call = plan(self, *text, use_cache, *outputs, embeds=embeds, **kwargs)
        call, reader = self._open(call)
        beside = None if call.beside is None else self._read(call.beside.call, None, recomputes)
        return close(self, call, self._read(call, reader, recomputes), beside)

    @on_host
    def _open(self, call: Call) -> tuple[Call, Any]:
        """The call with a draft of its state, and what reads whole chunks of it by graphs, if anything does."""
        reader = None
        if not (call.text.is_floating_point() or call.with_states or call.with_weights or call.with_memories):
            reader = self._static_reader(call.state)
        return call.on_draft(), reader

    @runs_compiled_parts
    def _read(self, call: Call, reader: Any, recomputes: bool) -> Results:
        """Read a call in one of three ways: recorded, as training calls are; by graphs of whole chunks, as a `reader`
        of static states does; or span by span."""
        recorder = recorder_of(self, call) if self.records_training else None
        turn = None if recorder is None else recorder.find(self, call)
        if turn is not None:
            return turn.graph.read(self, call, turn)
        # What autocast keeps while recording would be found, and be stale, when all else is read. Programs are compiled
        # for the one or the other, so the first call of a kind does without as well.
        reading = Reading(self, call, reader, recomputes, keeps_casts=recorder is None)
        reading.read()
        return reading.results()

    @on_host
    def read_token(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        cache: BakaCache | None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        within_beam_search: bool = False,
        output_memories: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """Read one token in each row from a static state: its states [B, 1, D]; None if it is not so simple.

        It is what `forward` does, with as little as possible to do on the host.
        """
        config = self.config
        if cache is None or not getattr(cache, "is_static", False) or input_ids is None or input_ids.shape[-1] != 1:
            return None
        if output_hidden_states or output_attentions or config.output_hidden_states or config.output_attentions:
            return None
        if output_memories:
            return None
        batch_size, _ = check_text(config, input_ids, None)
        check_cache(self, cache, batch_size, within_beam_search)
        input_ids = from_host(cache.device, input_ids)
        real = check_mask(attention_mask, batch_size, 1, cache.get_seq_length())
        reads = torch.ones(batch_size, dtype=torch.bool) if real is None else real[:, 0].cpu()
        if config.uses_random_pauses and not bool((cache._pauses == torch.tensor(fixed_pauses(config))).all()):
            return None
        reader = self._static_reader(cache) if bool(reads.any()) else None
        if reader is None:
            return None
        following = cache.draft(with_layers=False)
        cache._is_torn = True  # its tensors change where they are
        states = reader.read_token(cache, input_ids, reads)
        num_aligned, num_tokens = int(bool(reads.all())), cache._num_tokens + reads
        following._advance(1, num_tokens, cache._seeded, cache._pauses, num_aligned, False, within_beam_search)
        following._remember_opening(input_ids, real)
        cache.go_on(following)
        return states

    def _static_reader(self, cache: BakaCache | None) -> Any:
        """What reads a static state by graphs, see `decoding_graphs_baka`; None where that is not possible."""
        if cache is None or not getattr(cache, "is_static", False) or torch.is_grad_enabled():
            return None
        return reader_of(self, cache)

    # What a chunk is made of

    def learned_memory(self, like: torch.Tensor) -> torch.Tensor:
        """m_0, [R, D], in the dtype and on the device of `like`."""
        return self.memory_tokens(torch.arange(self.config.num_memory_tokens, device=like.device)).to(like)

    def learned_pause(self, like: torch.Tensor) -> torch.Tensor:
        """The pause vector, [1, D], in the dtype and on the device of `like`."""
        return self.pause_token(torch.zeros(1, dtype=torch.int64, device=like.device)).to(like)

    def solidify(self, memory: torch.Tensor, to: str) -> torch.Tensor:
        """f_read (`to="read"`) or f_write (`to="write"`) of a memory [B, R, D]."""
        if self.config.memory_solidifier == "none":
            return memory
        solidifier = getattr(self, f"{to}_solidifier") if self.config.separate_solidifiers else self.solidifier
        solid = solidifier(memory)
        if solid.shape != memory.shape:
            name = type(solidifier).__name__
            raise ValueError(f"expected {name} to give a memory {list(memory.shape)}, got {list(solid.shape)}.")
        return solid.to(memory.device)  # a device map may have put it elsewhere

    def update_memory(self, memory: Memory, written: torch.Tensor) -> Memory:
        """What the next chunk finds, of the memory that a chunk has read and what it has written, [B, R, D]."""
        if self.config.memory_norm:
            written = self.memory_norm(written)
        memory = {name: x.to(written.device) for name, x in memory.items()}  # a device map may have put it elsewhere
        updated = self.memory_update(memory, written.to(memory["memory"]))
        check_updated(self.memory_update, memory, updated)
        return {name: x.to(memory[name]) for name, x in updated.items()}

    def empty_memory(self, like: torch.Tensor, batch_size: int) -> Memory:
        """The memory of rows that have read nothing, on the device of `like` and for a model of its dtype: zeros."""
        held = memory_held(self.config) | associations_held(self.config)
        return {name: each.zeros(batch_size, like.device, like.dtype) for name, each in held.items()}

    def anchor(self, like: torch.Tensor) -> torch.Tensor:
        """Zero, but it depends on every recurrent parameter, so that each gets a gradient even in a text of one chunk.

        Distributed training waits for the gradient of every parameter.
        """
        total = like.new_zeros(())
        if self.config.num_pause_tokens:
            total = total + self.learned_pause(like).sum()
        if self.config.num_memory_tokens:
            learned = self.learned_memory(like)[None]
            for to in ("read", "write"):
                total = total + self.solidify(learned, to).sum().to(like)
            empty = {name: x.zeros(1, like.device, like.dtype) for name, x in memory_held(self.config).items()}
            updated = self.update_memory(empty | {"memory": learned.to(empty["memory"])}, learned)
            total = total + sum(held.sum().to(like) for held in updated.values())
        return 0 * total


class BakaForCausalLM(BakaPreTrainedModel, BakaGenerationMixin):
    """BakaLLM with a language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: BakaConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # also of a subclass with another name: by it Trainer counts targets
        self.model = BakaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = BakaHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: ArrayLike | None = None,
        past_key_values: BakaCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        cache: BakaCache | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]  # its types are not followed
    ) -> BakaCausalLMOutput:
        """Logits and loss; arguments as in `BakaModel.forward`, and

        Args:
            labels: [B, L] int64 token ids, -100 where there is no target; they are shifted here.
            logits_to_keep: only compute logits of the last so many positions (0: all), or of a 1-D tensor of positions.
            skip_logits: compute the loss alone, piece by piece: [B, L, vocab_size] never exists and `logits` is None.
            kwargs: among them `shift_labels` [B, L] int64, the target of each position itself, which counts instead of
                `labels`: so the last position of a call can have one. Where `attention_mask` is 0 nothing is read, and
                nothing predicted: the first token after padding has no loss.

        Returns:
            `loss` (if there are labels; in training with `associative_write_cost` times `write_strength`), `logits`
            [B, L, vocab_size], the state.

        Raises:
            ValueError: as `BakaModel.forward`; or labels have another shape than the text; or `skip_logits` has
                none or, on a CPU, one that is no token id.
        """
        # No parameter of its own: transformers takes every one with "label" in its name for one that must be there.
        shift_labels = kwargs.get("shift_labels")
        check_tensors(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            shift_labels=shift_labels,
        )
        text = input_ids if input_ids is not None else inputs_embeds
        for name, targets in (("labels", labels), ("shift_labels", shift_labels)):
            if targets is not None and text is not None and targets.shape != text.shape[:2]:
                raise ValueError(f"expected `{name}` of shape {list(text.shape[:2])}, got {list(targets.shape)}.")
            if targets is not None and (skip_logits or self.loss_function is ForCausalLMLoss):
                check_targets(targets, self.config.vocab_size, kwargs.get("ignore_index", IGNORED))
        if shift_labels is not None:
            shift_labels = kwargs["shift_labels"] = shift_labels.long().contiguous()
        elif labels is not None:
            labels = labels.long()
        elif skip_logits:
            raise ValueError("expected `labels` or `shift_labels` with `skip_logits=True`: there is nothing to return.")
        if text is not None and text.ndim > 1:
            check_kept(logits_to_keep, text.shape[1])
        if labels is None and shift_labels is None and isinstance(logits_to_keep, int) and logits_to_keep:
            kwargs["num_last_states"] = logits_to_keep
        cache = either_name(past_key_values, cache)
        check_kind(cache, use_cache)
        outputs = None
        hidden_states = None
        if cache is not None and inputs_embeds is None:
            hidden_states = self.model.read_token(input_ids, attention_mask, cache, **kwargs)
        if hidden_states is None:
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
            hidden_states, cache = outputs.last_hidden_state, getattr(outputs, CACHE_NAME)
        if attention_mask is not None:
            ignored = kwargs.get("ignore_index", IGNORED)
            labels, shift_labels = without_padding(labels, shift_labels, attention_mask, ignored)
            if shift_labels is not None:
                kwargs["shift_labels"] = shift_labels
        logits = loss = None
        if skip_logits:
            targets = shift_labels
            if targets is None and labels is not None:
                targets = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
            if targets is not None and "ignore_index" in kwargs:
                targets = targets.masked_fill(targets == kwargs["ignore_index"], IGNORED)
            loss = loss_by_pieces(
                self.lm_head, hidden_states, targets, self.loss_function, kwargs.get("num_items_in_batch")
            )
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            if labels is None and shift_labels is None:
                logits = self.lm_head(hidden_states[:, kept])
            else:  # the loss is that of all positions
                logits = self.lm_head(hidden_states)
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
                logits = logits[:, kept]
        strength = None if outputs is None else outputs.write_strength
        if loss is not None and strength is not None:
            cost = self.config.associative_write_cost * strength.to(loss.device)
            loss = loss + cost * share_of_batch(labels, device=cost.device, **kwargs)
        return BakaCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: cache},
            hidden_states=None if outputs is None else outputs.hidden_states,
            attentions=None if outputs is None else outputs.attentions,
            memories=None if outputs is None else outputs.memories,
            write_strength=strength,
        )

    # `generate` asks for it in every step, and to find it out takes longer than all else that is done here on the host.
    forward.__signature__ = inspect.signature(forward)


class BakaForSequenceClassification(SequenceClassification, BakaPreTrainedModel):
    """BakaLLM that reads a document of any length, memory carried through, and judges it at its last token."""

    def __init__(self, config: BakaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = BakaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class BakaForTokenClassification(TokenClassification, BakaPreTrainedModel):
    """BakaLLM that labels each token of a document of any length, by it and by what stands before it."""

    def __init__(self, config: BakaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = BakaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class BakaForQuestionAnswering(QuestionAnswering, BakaPreTrainedModel):
    """BakaLLM that reads a question and a document of any length, and finds where the answer starts and ends."""

    def __init__(self, config: BakaConfig):
        super().__init__(config)
        self.model = BakaModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2, bias=False)
        self.post_init()


BakaModel.register_for_auto_class("AutoModel")
BakaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
BakaForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
BakaForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
BakaForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")

__all__ = [
    "BakaForCausalLM",
    "BakaForQuestionAnswering",
    "BakaForSequenceClassification",
    "BakaForTokenClassification",
    "BakaModel",
    "BakaPreTrainedModel",
]
