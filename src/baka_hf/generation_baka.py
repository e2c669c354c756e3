"""What `generate` asks of a recurrent model."""

from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.generation import GenerationMixin

from .cache_baka import BakaCache
from .calls_baka import CACHE_NAME
from .history_baka import hash_tokens
from .inputs_baka import check_cache, either_name, state_among


class BakaGenerationMixin(GenerationMixin):
    """A `GenerationMixin` whose state is a `BakaCache`.

    `generate` gets the tokens new to the state or the whole history, and tells them apart by the length of the mask: as
    long as the tokens for the whole history, longer by what was fed before for new tokens. Without a mask, or with one
    for the tokens alone, the state itself knows what it has read.
    """

    @wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        state = state_among((), kwargs)
        if state is None:
            return super().generate(*args, **kwargs)
        # All or nothing, as a call is.
        draft, before = state.draft(), state.__dict__
        try:
            state.go_on(draft)
            return super().generate(*args, **kwargs)
        except BaseException:
            state.go_back(before)
            raise

    def _prepare_model_inputs(
        self, inputs: torch.Tensor | None, bos_token_id: torch.Tensor | None, model_kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, str | None, dict[str, Any]]:
        cache = either_name(model_kwargs.pop("past_key_values", None), model_kwargs.pop("cache", None))
        if cache is not None:
            model_kwargs[CACHE_NAME] = cache
        inputs, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        if cache is not None:
            check_cache(self.model, cache, getattr(cache, "batch_size", 0))
            if mask is not None:
                model_kwargs["attention_mask"] = self._complete_mask(cache, inputs, mask)
        return inputs, name, model_kwargs

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        mask = super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)
        cache = model_kwargs.get(CACHE_NAME)
        # transformers takes pad tokens for padding. An assistant without a mask has a text without padding, and pad
        # tokens that a state has read as text, having been generated, were none.
        if getattr(generation_config, "is_assistant", False):
            mask = torch.ones_like(mask)
        if cache is None:
            return mask
        fed = cache.get_seq_length()
        if inputs_tensor.ndim == 2 and self._is_history(cache, inputs_tensor[:, :fed], torch.ones_like(mask[:, :fed])):
            mask = torch.cat([torch.ones_like(mask[:, :fed]), mask[:, fed:]], dim=1)
        return self._complete_mask(cache, inputs_tensor, mask)

    def _complete_mask(self, cache: BakaCache, inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """A mask over all that `inputs` stands for: [B, L] if it is the whole history, [B, P + L] if it is new.

        Raises:
            ValueError: it cannot be told which, or nothing in it is new.
        """
        fed, length = cache.get_seq_length(), inputs.shape[1]
        cache._prompt = None  # how many columns of `inputs` the state has read, for `_prepare_cache_for_generation`
        if mask.ndim != 2 or mask.shape[0] != inputs.shape[0] or mask.shape[1] not in (length, fed + length):
            raise ValueError(
                f"expected an `attention_mask` of shape {[inputs.shape[0], length]} or "
                f"{[inputs.shape[0], fed + length]} for {length} tokens after the {fed} that the state has read, "
                f"got {list(mask.shape)}."
            )
        if fed == 0 or mask.shape[1] == fed + length:
            return mask
        advice = (
            f"For new tokens pass an `attention_mask` of shape {[inputs.shape[0], fed + length]}, ones for the {fed} "
            "positions read before it."
        )
        if inputs.ndim == 3:
            # Embeddings leave no trace to compare. transformers takes them for the whole history.
            if length <= fed:
                raise ValueError(
                    f"expected `inputs_embeds` of the whole history, more than the {fed} positions that the state has "
                    f"read, got {length}. {advice}"
                )
            cache._prompt = (fed, None)
            return mask
        if self._is_history(cache, inputs[:, :fed], mask[:, :fed]):
            if length == fed:
                raise ValueError(f"the state has read all of these {length} tokens: nothing is new. {advice}")
            cache._prompt = (fed, None)
            return mask
        if length > fed:
            raise ValueError(
                f"expected the whole history or new tokens, got {length} tokens of which the first {fed} are not "
                f"what the state has read. {advice}"
            )
        return torch.cat([mask.new_ones(mask.shape[0], fed), mask], dim=1)

    def _is_history(self, cache: BakaCache, input_ids: torch.Tensor, mask: torch.Tensor) -> bool:
        """Whether these are the tokens that the state has read, as far as their hash can tell."""
        if input_ids.shape[1] != cache.get_seq_length() or cache._history is None:
            return False
        if cache.batch_size % input_ids.shape[0]:
            return False
        found = hash_tokens(input_ids, mask != 0)
        found = found.repeat_interleave(cache.batch_size // input_ids.shape[0], 0)
        return bool((found.cpu() == cache._history.cpu()).all())

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, *args: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic", "static"):
            raise ValueError(
                "expected `cache_implementation` to be None, 'dynamic' or 'static' (the state is a BakaCache in any "
                f"case), got {generation_config.cache_implementation!r}."
            )
        is_static = generation_config.cache_implementation == "static"
        generation_config.prefill_chunk_size = None  # a prompt is read chunk by chunk as it is
        cache = model_kwargs.get(CACHE_NAME)
        if generation_config.use_cache is False:
            if cache is not None:
                cache._prompt = None
                raise ValueError(f"expected no `{CACHE_NAME}` with `use_cache=False`: a state can only go forward.")
            return
        # PEFT puts its own method in the place of this model's, but for prompt learning alone on this very object.
        wrapper = getattr(self.prepare_inputs_for_generation, "__self__", self)
        if getattr(getattr(wrapper, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                "expected `use_cache=False` in `generate` with PEFT's prompt learning, which would feed its virtual "
                "tokens to the state in every step. To carry a state, let `get_base_model()` generate from "
                "`inputs_embeds`, the virtual tokens of `get_prompt(batch_size)` first."
            )
        if cache is None:
            batch_size *= max(generation_config.num_beams, generation_config.num_return_sequences)
            cache = model_kwargs[CACHE_NAME] = self.new_cache(batch_size, static=is_static)
        else:
            cache._is_user_defined = True
            cache.is_static = cache.is_static or is_static
        if getattr(generation_config, "is_assistant", False):
            cache.activate_past_recording()  # a draft that is refused is cropped, by the model that it was made for
        if generation_config.num_beams > 1:
            model_kwargs["within_beam_search"] = True
        elif cache.batch_size > 1:
            model_kwargs["stop_token_ids"] = generation_config._eos_token_tensor

        # The mask of the prompt's new tokens. transformers crops and extends its own as the text grows, and not every
        # mode of generation cuts off the history: `prepare_inputs_for_generation` gets this for its first call.
        mask, num_read = model_kwargs.get("attention_mask"), 0 if cache._prompt is None else cache._prompt[0]
        cache._prompt = (num_read, None if mask is None else mask[:, cache.get_seq_length() :])
        cache._finished = None

    # Continuous batching pages the keys and values of many texts, and a state has no pages.

    @property
    def init_continuous_batching(self) -> Any:
        # A server asks by `hasattr`, warns, and goes on with `generate`, request by request.
        raise AttributeError("init_continuous_batching")

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "expected `generate`, got continuous batching (`generate_batch` or cache_implementation='paged'): it pages "
            "keys and values, and the state of a BakaLLM, of constant size, has no pages."
        )

    def _get_candidate_generator(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "expected `assistant_early_exit` to be None: the state of a text that some layers have not read is no "
                f"state to go on from, got {generation_config.assistant_early_exit!r}."
            )
        return super()._get_candidate_generator(generation_config, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: BakaCache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        stop_token_ids: torch.Tensor | None = None,
        cache: BakaCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        cache = either_name(past_key_values, cache)
        if cache is not None and cache._prompt is not None:
            # The prompt's new tokens, and those that an assistant has drafted after it.
            (num_read, attention_mask), cache._prompt = cache._prompt, None
            prompt = inputs_embeds if inputs_embeds is not None and is_first_iteration else input_ids
            next_sequence_length = prompt.shape[1] - num_read
            if attention_mask is not None and cache._is_recording:
                # Speculation: drafted tokens are text, and an assistant that starts late has the text's mask from then.
                drafted = max(0, next_sequence_length - attention_mask.shape[1])
                attention_mask = nn.functional.pad(attention_mask, (0, drafted), value=1)[:, -next_sequence_length:]
        elif cache is not None:
            # What was generated is in the stream, except that a row which has met EOS takes nothing any more: its
            # state is that before its last token, as it is for the row that ends last.
            attention_mask = None
            kwargs.pop("position_ids", None)
            if stop_token_ids is not None:
                ended = torch.isin(input_ids[:, -1], stop_token_ids.to(input_ids.device))
                cache._finished = ended if cache._finished is None else cache._finished | ended
                attention_mask = ~cache._finished[:, None]
            if next_sequence_length == 1 and not is_first_iteration and input_ids.device == cache.device:
                # A step of one token, by far the most frequent: there is nothing else to prepare.
                token = input_ids[:, -1:].clone(memory_format=torch.contiguous_format)
                inputs = {"input_ids": token, "attention_mask": attention_mask, CACHE_NAME: cache}
                return inputs | {key: value for key, value in kwargs.items() if key != "labels"}
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE_NAME: cache},
            **kwargs,
        )
