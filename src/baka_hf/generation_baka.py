"""What `generate` asks of a recurrent model."""

from collections.abc import Callable
from difflib import SequenceMatcher
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.generation import GenerationMixin

from .cache_baka import BakaCache
from .calls_baka import CACHE_NAME
from .history_baka import hash_tokens
from .inputs_baka import check_cache, check_ids, check_tensors, either_name, positions_of, state_among
from .state_files_baka import OPENING
from .stopping_baka import stopping_late


def padded_left(decode: Callable) -> Callable:
    """A decoding method of transformers', given a prompt's padding on the left wherever it stands.

    The next token is said after the last column, and processors and assistants look at the last ones. What comes back
    has the prompt in the columns in which it was given.
    """

    @wraps(decode)
    def decode_padded_left(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE_NAME)
        num_read, mask = (0, kwargs.get("attention_mask")) if cache is None else cache._prompt
        if mask is None or bool(mask[:, -1].all()):
            return decode(self, input_ids, *args, **kwargs)
        order = padding_first(mask)
        for name in ("attention_mask", "position_ids", "inputs_embeds"):
            if kwargs.get(name) is not None:
                kwargs[name] = reorder(kwargs[name], order, kwargs[name].shape[1] - order.shape[1])
        if cache is not None:
            cache._prompt = num_read, reorder(mask, order)
        turned = reorder(input_ids, order, num_read) if kwargs.get("inputs_embeds") is None else input_ids
        output = decode(self, turned, *args, **kwargs)

        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        rows = torch.arange(len(sequences), device=input_ids.device) * len(input_ids) // len(sequences)
        sequences[:, : input_ids.shape[1]] = input_ids[rows]
        back = order.argsort(dim=1)
        for name, dim in (("hidden_states", 1), ("attentions", 2)):
            steps = getattr(output, name, None)
            if steps is not None:  # of the prompt the first step, or all without a state
                given = [tuple(t if t.shape[dim] == 1 else reorder(t, back, dim=dim) for t in step) for step in steps]
                setattr(output, name, tuple(given))
        return output

    return decode_padded_left


def padding_first(mask: torch.Tensor) -> torch.Tensor:
    """[B, N] index that puts the columns where `mask` [B, N] is 0 before the others, each in their order."""
    return (mask != 0).to(torch.uint8).argsort(dim=1, stable=True)


def reorder(tensor: torch.Tensor, order: torch.Tensor, first: int = 0, dim: int = 1) -> torch.Tensor:
    """`tensor` [B, …] with N columns of dimension `dim`, from the `first` on, in an `order` [B, N] of their own."""
    count = order.shape[1]
    index = order.to(tensor.device).reshape(len(order), *[1] * (dim - 1), count, *[1] * (tensor.ndim - dim - 1))
    tensor = tensor.expand(len(order), *tensor.shape[1:])
    return tensor.slice_scatter(tensor.narrow(dim, first, count).take_along_dim(index, dim), dim, first, first + count)


def remembered(decode: Callable) -> Callable:
    """A decoding method of transformers', after which the state knows what was asked and what was said last."""

    @wraps(decode)
    def decode_remembered(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE_NAME)
        if cache is None:
            return decode(self, input_ids, *args, **kwargs)
        is_recording, (num_read, mask) = cache._is_recording, cache._prompt
        asked = hash_of(input_ids[:, num_read:], mask) if kwargs.get("inputs_embeds") is None else None
        output = decode(self, input_ids, *args, **kwargs)
        if not is_recording:
            cache.deactivate_past_recording()  # speculation, which crops, has activated it
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        cache._asked = asked
        cache._said = sequences[:, -1].clone() if len(sequences) == cache.batch_size else None
        return output

    return decode_remembered


def hash_of(input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[B, 3] hash of the ids [B, L] where `mask` is not 0."""
    return hash_tokens(input_ids, None if mask is None else mask != 0)


def is_same(found: torch.Tensor, known: torch.Tensor | None) -> bool:
    """Whether [B, …] values are those that a state knows of its rows, which may be several to each of them."""
    if known is None or len(known) % len(found):
        return False
    return torch.equal(found.repeat_interleave(len(known) // len(found), 0).cpu(), known.cpu())


def begins_like(text: list[int], opening: list[int]) -> bool:
    """Whether a text begins as another does; of 8 tokens and more up to a quarter may have been lost or added."""
    count = min(len(text), len(opening))
    text, opening = text[:count], opening[:count]
    if count < 8 or text == opening:
        return count > 0 and text == opening
    changes = SequenceMatcher(None, opening, text, autojunk=False).get_opcodes()
    kept = sum(stop - start for change, start, stop, *_ in changes if change == "equal")
    return 4 * kept >= 3 * count and all(change != "replace" for change, *_ in changes[:-1])


class BakaGenerationMixin(GenerationMixin):
    """A `GenerationMixin` whose state is a `BakaCache`.

    `generate` gets the tokens new to the state or the whole history, and tells them apart by the length of the mask: as
    long as the tokens for the whole history, longer by what was fed before for new tokens. Without a mask, or with one
    for the tokens alone, the state itself knows what it has read.
    """

    @wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        given = kwargs | ({"inputs": args[0]} if args else {})
        check_tensors(**{name: given.get(name) for name in ("inputs", "input_ids", "attention_mask", "inputs_embeds")})
        for name in ("inputs", "input_ids"):
            if given.get(name) is not None:
                check_ids(given[name])
        state = state_among((), kwargs)
        if state is None:
            return super().generate(*args, **kwargs)
        if len(args) < 2 and kwargs.get("generation_config") is None and kwargs.get("use_cache") is None:
            kwargs["use_cache"] = True  # whatever the configuration says, which Trainer changes
        # All or nothing, as a call is.
        draft, before = state.draft(), state.__dict__
        try:
            state.go_on(draft)
            return super().generate(*args, **kwargs)
        except BaseException:
            state.go_back(before)
            raise

    _sample = remembered(padded_left(stopping_late(GenerationMixin._sample)))
    _beam_search = remembered(padded_left(GenerationMixin._beam_search))
    _assisted_decoding = remembered(padded_left(GenerationMixin._assisted_decoding))

    def _prepare_model_inputs(
        self, inputs: torch.Tensor | None, bos_token_id: torch.Tensor | None, model_kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, str | None, dict[str, Any]]:
        cache = either_name(model_kwargs.pop("past_key_values", None), model_kwargs.pop("cache", None))
        if cache is not None:
            model_kwargs[CACHE_NAME] = cache
        inputs, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        if model_kwargs.get("position_ids") is not None:  # transformers goes on counting in a tensor of all rows
            model_kwargs["position_ids"] = positions_of(model_kwargs["position_ids"], inputs.shape[0])
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
        if inputs_tensor.ndim == 2:
            fed = cache.get_seq_length()
            read = torch.ones_like(mask[:, :fed])
            is_whole = self._is_history(cache, inputs_tensor[:, :fed], read)
            if is_whole:
                mask = torch.cat([read, mask[:, fed:]], dim=1)
            # Nor was the last one said, which is still to be read, unless it fills up a row that had ended.
            new = inputs_tensor[:, fed:] if is_whole else inputs_tensor
            has_ended = cache._finished is not None and bool(cache._finished.any())
            is_last = new.shape[1] > 0 if is_whole else new.shape[1] == 1
            if is_last and not has_ended and is_same(new[:, 0], cache._said):
                mask[:, inputs_tensor.shape[1] - new.shape[1]] = 1
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
        if self._begins_again(cache, inputs, mask):
            raise ValueError(
                f"these {length} tokens are what `generate` was last given, or begin as what the state has read does: "
                f"it cannot be told whether they are to be read again. {advice} To answer anew go on from a `clone` of "
                "the state as it was before, or from a fresh one."
            )
        return torch.cat([mask.new_ones(mask.shape[0], fed), mask], dim=1)

    def _is_history(self, cache: BakaCache, input_ids: torch.Tensor, mask: torch.Tensor) -> bool:
        """Whether these are the tokens that the state has read, as far as their hash can tell."""
        return input_ids.shape[1] == cache.get_seq_length() and is_same(hash_of(input_ids, mask), cache._history)

    def _begins_again(self, cache: BakaCache, input_ids: torch.Tensor, mask: torch.Tensor) -> bool:
        """Whether all rows may be texts that the state has read before."""
        if input_ids.shape[1] == 1 and is_same(input_ids[:, 0], cache._said):
            return False  # said, and not read yet
        if is_same(hash_of(input_ids, mask), cache._asked):
            return True
        if cache._opening is None or cache.batch_size % len(input_ids):
            return False
        texts = [ids[keep][:OPENING].tolist() for ids, keep in zip(input_ids, mask != 0, strict=True)]
        num_answers = cache.batch_size // len(input_ids)
        return all(
            begins_like(texts[row // num_answers], opening[:num_tokens])
            for row, (opening, num_tokens) in enumerate(
                zip(cache._opening.tolist(), cache._num_tokens.tolist(), strict=True)
            )
        )

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
        new, num_read = model_kwargs.get("attention_mask"), 0
        if cache is not None:
            new = None if new is None else new[:, cache.get_seq_length() :]
            num_read = 0 if cache._prompt is None else cache._prompt[0]
            cache._prompt = None
        if new is not None and not bool(new.any(dim=1).all()):
            raise ValueError(
                "expected a token in every row that its state has not read, got an `attention_mask` that leaves none "
                f"in the rows {(~new.any(dim=1)).nonzero().flatten().tolist()}."
            )
        if generation_config.use_cache is False:
            if cache is not None:
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

        # With the mask of the prompt's new tokens. transformers crops and extends its own as the text grows, and not
        # every mode of generation cuts off the history: `prepare_inputs_for_generation` gets this for its first call.
        cache._prompt = (num_read, new)
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

    def _get_logits_processor(
        self,
        *args: Any,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if negative_prompt_ids is not None and negative_prompt_attention_mask is not None:
            order = padding_first(negative_prompt_attention_mask)
            negative_prompt_ids = reorder(negative_prompt_ids, order)
            negative_prompt_attention_mask = reorder(negative_prompt_attention_mask, order)
        return super()._get_logits_processor(
            *args,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            **kwargs,
        )

    def _get_candidate_generator(
        self, generation_config: Any, input_ids: torch.Tensor, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "expected `assistant_early_exit` to be None: the state of a text that some layers have not read is no "
                f"state to go on from, got {generation_config.assistant_early_exit!r}."
            )
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(generation_config, name) and generation_config.return_dict_in_generate:
                raise ValueError(
                    f"expected no `{name}=True` in speculation: of what a call gives, transformers cuts attention "
                    "weights at the length of the text and takes hidden states from the prompt. Call the model on the "
                    "text that was said."
                )
        # An assistant reads no more than these ids, which may come after what the state has read.
        for name in ("attention_mask", "position_ids"):
            if (whole := model_kwargs.get(name)) is not None:
                model_kwargs = model_kwargs | {name: whole[:, whole.shape[1] - input_ids.shape[1] :]}
        return super()._get_candidate_generator(
            generation_config, input_ids, *args, model_kwargs=model_kwargs, **kwargs
        )

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
        if is_first_iteration:
            mask = attention_mask if cache is None or cache._prompt is None else cache._prompt[1]
            if mask is not None and not bool(mask[:, -1].all()):  # for loops that are not transformers' own
                raise ValueError("expected padding on the left, got an `attention_mask` that ends in 0.")
        if cache is not None and cache._prompt is not None:
            # The prompt's new tokens, and those that an assistant has drafted after it.
            (num_read, attention_mask), cache._prompt = cache._prompt, None
            prompt = inputs_embeds if inputs_embeds is not None and is_first_iteration else input_ids
            next_sequence_length = prompt.shape[1] - num_read
            if attention_mask is not None and cache._is_recording:
                # Speculation: drafted tokens are text.
                drafted = next_sequence_length - attention_mask.shape[1]
                attention_mask = nn.functional.pad(attention_mask, (0, drafted), value=1)
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
