"""Heads over the decoder's states: a verdict on a text, a label for each token, the span that answers a question.

`modeling_baka` has the models. Here are their calls, which take a model's decoder, `model`, and the layer of its head.
"""

from typing import Any, Unpack

import torch
from transformers.loss.loss_utils import (
    ForQuestionAnsweringLoss,
    ForSequenceClassificationLoss,
    ForTokenClassification,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .cache_baka import BakaCache
from .calls_baka import CACHE_NAME
from .inputs_baka import ArrayLike, check_positions, check_targets, check_tensors, either_name
from .loss_baka import IGNORED


class SequenceClassification:
    """One verdict on a text."""

    accepts_loss_kwargs = False  # its loss is a mean, so Trainer has to divide by the number of accumulated batches
    config: Any
    model: Any
    score: Any
    loss_function: Any

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
        cache: BakaCache | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]  # its types are not followed
    ) -> SequenceClassifierOutputWithPast:
        """Logits [B, num_labels] at each row's last real token; arguments as in `BakaModel.forward`, and `labels` [B].

        The last real token is found by `attention_mask`, else by `config.pad_token_id`, else it is the last column.

        Raises:
            ValueError: as `BakaModel.forward`; or, on a CPU, a label is no class.
        """
        if labels is not None and self.loss_function is ForSequenceClassificationLoss:
            # As transformers tells classes from values, which have a loss of their own.
            kind, is_number = self.config.problem_type, labels.dtype in (torch.int32, torch.int64)
            if kind == "single_label_classification" or (kind is None and self.config.num_labels > 1 and is_number):
                check_targets(labels, self.config.num_labels, IGNORED)
                labels = labels.long()
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=either_name(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)
        batch_size, length = logits.shape[:2]
        real = None
        if attention_mask is not None:
            real = attention_mask[:, -length:] != 0
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        columns = torch.arange(length, device=logits.device)
        last = columns[-1:].expand(batch_size) if real is None else (columns * real.to(logits.device)).argmax(1)
        pooled = logits[torch.arange(batch_size, device=logits.device), last]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=pooled, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=pooled,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class TokenClassification:
    """A label for each token."""

    config: Any
    model: Any
    score: Any
    loss_function: Any

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
        cache: BakaCache | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]  # its types are not followed
    ) -> TokenClassifierOutput:
        """Logits [B, L, num_labels]; arguments as in `BakaModel.forward`, and `labels` [B, L], -100 for none.

        The loss is the mean over labels, or with `num_items_in_batch` their sum divided by it, as Trainer wants it. A
        state that is passed goes forward, and is not among the outputs.

        Raises:
            ValueError: as `BakaModel.forward`; or labels have another shape than the text or, on a CPU, one is no
                class.
        """
        check_tensors(input_ids=input_ids, inputs_embeds=inputs_embeds, labels=labels)
        text = input_ids if input_ids is not None else inputs_embeds
        if labels is not None:
            if text is not None and labels.shape != text.shape[:2]:
                raise ValueError(f"expected `labels` of shape {list(text.shape[:2])}, got {list(labels.shape)}.")
            if self.loss_function is ForTokenClassification:
                check_targets(labels, self.config.num_labels, IGNORED)
                labels = labels.long()
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=either_name(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=kwargs.get("num_items_in_batch"))
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class QuestionAnswering:
    """The span of a text that answers a question."""

    accepts_loss_kwargs = False  # its loss is a mean, so Trainer has to divide by the number of accumulated batches
    model: Any
    qa_outputs: Any
    loss_function: Any

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: ArrayLike | None = None,
        past_key_values: BakaCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: BakaCache | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]  # its types are not followed
    ) -> QuestionAnsweringModelOutput:
        """Logits [B, L] of where the answer starts and where it ends, the lowest number where `attention_mask` is 0.

        A token sees what stands before it: put the question before the text. A state that is passed goes forward, and
        is not among the outputs.

        Args:
            start_positions, end_positions: [B] integers, columns of the text. One beyond the last column is not
                scored, and a loss of nothing else is NaN.

        The other arguments are those of `BakaModel.forward`.

        Raises:
            ValueError: as `BakaModel.forward`; or of the two positions there is one, or they have another shape, or,
                on a CPU, one is negative.
        """
        check_tensors(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            start_positions=start_positions,
            end_positions=end_positions,
        )
        text = input_ids if input_ids is not None else inputs_embeds
        if text is not None and self.loss_function is ForQuestionAnsweringLoss:
            check_positions(text.shape[0], start_positions=start_positions, end_positions=end_positions)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=either_name(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.qa_outputs(outputs.last_hidden_state)
        if attention_mask is not None:
            padding = attention_mask[:, -logits.shape[1] :, None].to(logits.device) == 0
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        start_logits, end_logits = (each.contiguous() for each in logits.unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions.long(), end_positions.long())
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
