"""Many texts, one model: a batch that texts join and leave while it is running.

What a text has read is a state of constant size, so a batch is a table of rows, and whoever joins takes a row that is
free. Each step reads one token in every row that is taken, whatever its text is at; between two steps waiting prompts
are read, a chunk of each at most, so that nobody is held up for longer than that. A row says what it would say alone.

A GPU is asked for a step before the tokens of the step before are looked at, so that it never waits for the host: what
has been said comes a step later, and a text that ends has read a token too many, in a row that is free then anyway. A
state that is kept has to read the last token as it is.
"""

import secrets
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .configuration_baka import check_integers
from .functions_baka import as_tensor, put_on, sent_to_host
from .inputs_baka import check_cache, check_text

# Up to so many rows one prompt is read at a time: then a chunk takes about as long as a step.
ROWS_PER_PROMPT = 32
# A prompt waits for others to begin with it, and a text at the end of its chunk for others there, so many times as many
# steps as prompts are read at a time. One that goes on with its next chunk waits once as many.
PATIENCE = 2
DRAWS = 64  # that a text makes at once
LATE = ("cuda",)  # devices whose tokens are looked at a step late


class Sampling(NamedTuple):
    """How the next token is chosen: the likeliest if `temperature` is 0, else drawn from the probabilities."""

    temperature: float
    top_k: int | None
    top_p: float | None

    def processors(self) -> list[LogitsProcessor]:
        """transformers' own, in its order.

        Raises:
            ValueError: a value is no number, or out of its range.
        """
        for name, value in (("temperature", self.temperature), ("top_p", 0 if self.top_p is None else self.top_p)):
            if not isinstance(value, Real):
                raise ValueError(f"expected `{name}` to be a number, got {value!r}.")
        found: list[LogitsProcessor] = []
        if self.temperature:
            found.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            found.append(TopPLogitsWarper(self.top_p))
        return found


@dataclass(eq=False)
class Request:
    """A text that is read and said on, as `Batcher.add` makes it.

    `tokens` grows with every step. When all is over `finish_reason` is "stop" (an EOS token, which is the last of
    `tokens`), "length", "cancelled" or "error"; and `state`, if it was asked for, has read all of the prompt and of
    `tokens` after "stop" and "length". `error` is what one of its processors has raised, or the step that it was in, as
    Python prints it.
    """

    input_ids: list[int]
    max_new_tokens: int
    sampling: Sampling
    eos_token_ids: frozenset[int]
    seed: int
    logits_processor: tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], ...]
    keep_state: bool
    given: Any = field(repr=False)  # the state it goes on from
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    state: Any = field(default=None, repr=False)  # a `BakaCache` of one row
    num_read: int = 0  # tokens that were read, of the prompt and of its own
    num_chosen: int = 0  # tokens that were chosen, though the device alone may know them yet
    is_said: bool = False  # there is nothing more to say
    is_known: bool = True  # which tokens its state has read: not, if embeddings were fed to the one that was given

    @cached_property
    def _draws(self) -> Iterator[float]:
        """Numbers from 0 to 1, its own: they depend on its seed alone."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.rand(DRAWS, generator=generator).tolist()

    def draw(self) -> float:
        """The next of its random numbers, from 0 to 1 exclusive."""
        return next(self._draws)

    def fail(self, error: BaseException) -> None:
        """End it, unless it is over."""
        if self.finish_reason is None:
            # As text: a traceback would keep alive what its frames hold, such as the batcher and its rows.
            self.finish_reason, self.error = "error", "".join(traceback.format_exception(error))


class Sent(NamedTuple):
    """Tokens on their way to the host."""

    requests: list[Request | None]
    tokens: Callable[[], torch.Tensor]  # [len(requests)]

    def said(self) -> list[tuple[Request, int]]:
        pairs = zip(self.requests, self.tokens().tolist(), strict=True)
        return [(request, token) for request, token in pairs if request is not None]


class Batcher:
    """A batch that texts join and leave step by step.

        batcher = Batcher(model, num_rows=256)
        request = batcher.add(tokenizer("Once upon a time").input_ids, max_new_tokens=50)
        for request, token in batcher.run():
            ...

    On a CUDA device steps and prompts are read by the graphs of static states (`decoding_graphs_baka`). A step takes as
    long for one text as for `num_rows`. Steps are for one thread; `add` and `cancel` may come from any.

    Args:
        model (`BakaForCausalLM`): the model, which is put into eval mode.
        num_rows: texts that are said on at the same time. Each takes a state's memory (docs/serving.md).
        num_prompts: texts whose prompts are read at the same time, by default one for every 32 rows. They are read
            when so many have come, or after twice as many steps (as many for the chunks after the first). So are the
            last tokens of chunks while texts are said.

    Raises:
        ValueError: a number is less than 1, or the model has no language modelling head.
    """

    def __init__(self, model: Any, num_rows: int = 16, num_prompts: int | None = None):
        check_integers(num_rows=num_rows, num_prompts=1 if num_prompts is None else num_prompts)
        if model.get_output_embeddings() is None:
            raise ValueError(f"expected a model with a language modelling head, got {type(model).__name__}.")
        num_prompts = num_prompts or max(1, num_rows // ROWS_PER_PROMPT)
        self.model, self.decoder, self.head = model.eval(), model.get_decoder(), model.get_output_embeddings()
        self.num_rows, self.num_prompts, self.chunk_size = num_rows, num_prompts, model.config.chunk_size
        self.state, self.fresh = model.new_cache(num_rows, static=True), model.new_cache(1)
        self.reading_state = model.new_cache(num_prompts, static=True)
        self.waiting: deque[Request] = deque()
        self.reading: list[Request | None] = [None] * num_prompts  # prompts, by their rows of `reading_state`
        self.saying: list[Request | None] = [None] * num_rows  # by their rows of `state`
        self.last = torch.zeros(num_rows, dtype=torch.int64, device=model.device)  # tokens, to be read next
        self.sent: list[Sent] = []
        self.is_late = model.device.type in LATE
        # Steps that prompts have waited for others to be read with them, and texts for others to end a chunk with.
        self._delay = self._end_delay = 0
        self._is_torn = False  # in the middle of a step, or of one that has failed

    def add(
        self,
        input_ids: Sequence[int] | torch.Tensor,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        logits_processor: Sequence[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = (),
        state: Any = None,
        keep_state: bool = False,
    ) -> Request:
        """A text to be read and said on; it joins when a row is free, first come, first served.

        Args:
            input_ids: its prompt, token ids [L], at least one. After a `state` those that it has not read.
            max_new_tokens: tokens to say at most, at least 1.
            temperature, top_k, top_p: how they are chosen, as in `generate`; greedily at temperature 0.
            seed: of its draws, which depend on nothing else; by default another one for every text.
            eos_token_id: tokens that end it, by default those of the model's `generation_config`; `()` for none.
            logits_processor: called with the ids so far [1, T] (of this call: what a `state` has read is not among
                them) and float32 scores [1, vocab_size], before temperature; they give other scores.
            state (`BakaCache`): of one row, to go on from. It is copied.
            keep_state: have the request keep the state after all that was read and said. It takes one step more.

        Raises:
            ValueError: any of this is not what it should be.
        """
        config = self.model.config
        ids = as_tensor(input_ids, "`input_ids` to be token ids")
        if ids.ndim != 1 or len(ids) == 0 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(
                f"expected `input_ids` to be at least one token id, integers of shape [length], got {ids.dtype} of "
                f"shape {list(ids.shape)}."
            )
        check_text(config, ids[None].cpu(), None)  # looked at on the host
        check_integers(max_new_tokens=max_new_tokens)
        seed = secrets.randbits(63) if seed is None else seed
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"expected `seed` to be an integer from 0 to 2**63 - 1, got {seed!r}.")
        sampling = Sampling(temperature, top_k, top_p)
        sampling.processors()
        is_default, default = eos_token_id is None, self.model.generation_config.eos_token_id
        eos_token_id = default if is_default else eos_token_id
        ends = [eos_token_id] if isinstance(eos_token_id, int) else () if eos_token_id is None else eos_token_id
        is_end = lambda end: isinstance(end, int) and 0 <= end < config.vocab_size  # noqa: E731
        if not is_default and not (isinstance(ends, Sequence) and all(map(is_end, ends))):
            raise ValueError(
                f"expected `eos_token_id` to be a token id from 0 to {config.vocab_size - 1} or a sequence of some, "
                f"got {eos_token_id!r}."
            )
        if not isinstance(logits_processor, Sequence) or not all(map(callable, logits_processor)):
            raise ValueError(f"expected `logits_processor` to be a sequence of functions, got {logits_processor!r}.")
        is_known = True
        if state is not None:
            check_cache(self.decoder, state, 1)
            state = state[0]
            is_known = state._history is not None and state._opening is not None
            if not is_known:  # one row of which it is not known what it has read would be taken for all
                state._history, state._opening = self.fresh._history, self.fresh._opening
        processors = tuple(logits_processor)
        request = Request(ids.tolist(), max_new_tokens, sampling, frozenset(ends), seed, processors, keep_state, state)
        request.is_known = is_known
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Have a text leave at the next step; one that is over stays as it is."""
        request.finish_reason = request.finish_reason or "cancelled"

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing."""
        return not (self.waiting or any(self.reading) or any(self.saying))

    def run(self) -> Iterator[tuple[Request, int | None]]:
        """Step after step until all texts are over, also those added on the way."""
        while not self.is_idle:
            yield from self.step()

    @torch.no_grad()
    def step(self) -> list[tuple[Request, int | None]]:
        """Read on by a step: what each text has said, in order, and None after the last token of one that is over.

        Raises:
            ValueError: a step before was interrupted or has failed. What its rows have read is not known then: add
                their texts to another batcher. All that were not over are by then, with what was raised as `error`.
        """
        try:
            if self._is_torn:
                raise ValueError(
                    "expected a batcher between two steps, got one whose last step was interrupted or failed."
                )
            self._is_torn = True
            said = self._step()
            self._is_torn = False
            return said
        except BaseException as error:
            for request in filter(None, [*self.waiting, *self.reading, *self.saying]):
                request.fail(error)
            raise

    def _step(self) -> list[tuple[Request, int | None]]:
        # `before` are tokens that were chosen in the step before, `self.sent` those of this one. Late, a first token
        # after a prompt is not read in the same step: of its own tokens a text knows all but the last when it reads.
        said, before = self._let_go(), self._take_sent()
        self._read_prompts()
        texts_matter = any(request is not None and request.logits_processor for request in self.saying)
        if texts_matter or not self.is_late:
            said += self._look_at(before + self._take_sent())
            before = []
        said += self._say()
        if not self.is_late:
            before += self._take_sent()
        return said + self._look_at(before)

    def _take_sent(self) -> list[Sent]:
        sent, self.sent = self.sent, []
        return sent

    def _let_go(self) -> list[tuple[Request, int | None]]:
        """Who was cancelled, or whose processors have failed, leaves."""
        left = [request for request in list(self.waiting) if request.finish_reason]
        for gone in left:
            self.waiting.remove(gone)
        for places in (self.reading, self.saying):
            for place, request in enumerate(places):
                if request is not None and request.finish_reason:
                    places[place] = None
                    left.append(request)
        return [(request, None) for request in left]

    def _admit(self) -> None:
        """Who waits takes a place among those who are read, if there will be a row to go on in."""
        num_free = self.saying.count(None) - sum(request is not None for request in self.reading)
        free = [slot for slot, request in enumerate(self.reading) if request is None]
        for slot in free[: max(0, min(num_free, len(self.waiting)))]:
            self.reading[slot] = self.waiting.popleft()

    def _begin(self) -> None:
        """Prompts of which nothing was read begin: at once, as to put many rows takes no longer than to put one."""
        new = [(slot, request) for slot, request in enumerate(self.reading) if request and not request.num_read]
        fresh = [slot for slot, request in new if request.given is None]
        if fresh:
            self.reading_state.put_rows(fresh, self.fresh, [0] * len(fresh))
        for slot, request in new:
            if request.given is not None:
                self.reading_state.put_row(slot, request.given)
                request.given = None

    def _read_prompts(self) -> None:
        """Read on in the prompts, up to the end of a chunk, and choose the first tokens after those that end."""
        self._admit()
        if not any(self.reading):
            return
        self._delay += 1
        goes_on = any(request is not None and request.num_read for request in self.reading)
        patience = self.num_prompts if goes_on else PATIENCE * self.num_prompts
        if not all(self.reading) and any(self.saying) and self._delay < patience:
            return
        self._delay = 0
        self._begin()
        pieces: list[list[int]] = []
        for request, num_tokens in zip(self.reading, self.reading_state.num_tokens.tolist(), strict=True):
            room = self.chunk_size - num_tokens % self.chunk_size
            pieces.append([] if request is None else request.input_ids[request.num_read : request.num_read + room])
        ids = torch.zeros(self.num_prompts, max(map(len, pieces)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, piece in enumerate(pieces):
            ids[row, : len(piece)], mask[row, : len(piece)] = torch.tensor(piece, dtype=torch.int64), 1
        states = self.decoder(
            input_ids=ids,  # looked at and checked on the host
            attention_mask=mask,
            cache=self.reading_state,
            use_cache=True,
        ).last_hidden_state
        ended: list[int] = []
        for slot, (request, piece) in enumerate(zip(self.reading, pieces, strict=True)):
            if request is not None:
                request.num_read += len(piece)
                if request.num_read == len(request.input_ids):
                    ended.append(slot)
        if not ended:
            return
        free = [row for row, request in enumerate(self.saying) if request is None][: len(ended)]
        self.state.put_rows(free, self.reading_state, ended)
        requests = [self.reading[slot] for slot in ended]
        for row, slot in zip(free, ended, strict=True):
            self.saying[row], self.reading[slot] = self.reading[slot], None
        ends = [[row, slot, len(pieces[slot]) - 1] for row, slot in zip(free, ended, strict=True)]
        where, slots, columns = put_on(states.device, torch.tensor(ends)).unbind(1)
        self.last[where] = self._choose(requests, self.head(states[slots, columns]))

    def _say(self) -> list[tuple[Request, int | None]]:
        """One token more in every row but those that wait for others; and whose state is complete."""
        reads = self._who_reads()
        if not any(reads):
            return []
        mask = None if all(reads) else torch.tensor([request is not None for request in reads])
        logits = self.model(
            input_ids=self.last[:, None],
            attention_mask=None if mask is None else mask[:, None],
            cache=self.state,
            use_cache=True,
        ).logits[:, 0]
        over: list[tuple[Request, int | None]] = []
        for row, request in enumerate(reads):
            if request is None:
                continue
            request.num_read += 1
            if request.is_said:  # its last token was read, for the state that it keeps
                over.append(self._end(request, row))
            if request.is_said or request.num_chosen == request.max_new_tokens:
                reads[row] = None
        if any(reads):
            tokens = self._choose(reads, logits)
            is_new = put_on(tokens.device, torch.tensor([request is not None for request in reads]))
            self.last = torch.where(is_new, tokens, self.last)
        return over

    def _who_reads(self) -> list[Request | None]:
        """The texts, by their rows, that read a token in this step.

        To end a chunk takes longer than all else, so those that will wait a few steps for others to do it with them.
        """
        unknown = {request for sent in self.sent for request in sent.requests}
        wanted = [
            request is not None and request not in unknown and self._has_to_read(request) for request in self.saying
        ]
        before_end = self.state.num_tokens % self.chunk_size == self.chunk_size - 1
        waits = [want and end for want, end in zip(wanted, before_end.tolist(), strict=True)]
        self._end_delay = self._end_delay + 1 if any(waits) else 0
        enough = min(self.num_prompts, sum(map(bool, self.saying)))
        if self._end_delay >= PATIENCE * self.num_prompts or sum(waits) >= enough:
            self._end_delay = 0
            waits = [False] * self.num_rows
        rows = zip(self.saying, wanted, waits, strict=True)
        return [request if want and not wait else None for request, want, wait in rows]

    @staticmethod
    def _has_to_read(request: Request) -> bool:
        """Whether there is a token that it has not read, and that it needs to read: to say more, or for its state."""
        if request.finish_reason:
            return False
        if not request.is_said and request.num_chosen < request.max_new_tokens:
            return True
        return request.keep_state and request.num_read < len(request.input_ids) + request.num_chosen

    def _look_at(self, sent: list[Sent]) -> list[tuple[Request, int | None]]:
        """Take the tokens that have come, and see who has said all."""
        said: list[tuple[Request, int | None]] = []
        for request, token in (pair for each in sent for pair in each.said()):
            if request.finish_reason or request.is_said:  # cancelled meanwhile, or it had ended before this one
                continue
            request.tokens.append(token)
            said.append((request, token))
            if token in request.eos_token_ids or len(request.tokens) == request.max_new_tokens:
                request.is_said = True
                if not request.keep_state or request.num_read == len(request.input_ids) + len(request.tokens):
                    said.append(self._end(request, self.saying.index(request)))
        return said

    def _end(self, request: Request, row: int) -> tuple[Request, None]:
        if request.keep_state:
            request.state = self.state[row]
            if not request.is_known:
                request.state._history = request.state._opening = None
        reason = "stop" if request.tokens[-1] in request.eos_token_ids else "length"
        request.finish_reason = request.finish_reason or reason
        self.saying[row] = None
        return request, None

    def _choose(self, requests: list[Request | None], logits: torch.Tensor) -> torch.Tensor:
        """The next token of each text [K], by logits [K, vocab_size], sent off too. Texts that are sampled alike share
        the work, and each has its own draw."""
        scores = logits.float()
        groups: dict[Sampling, list[int]] = {}
        for index, request in enumerate(requests):
            if request is None:
                continue
            request.num_chosen += 1
            if request.logits_processor:
                ids = torch.tensor([request.input_ids + request.tokens], device=scores.device)
                try:
                    for processor in request.logits_processor:
                        scores[index : index + 1] = processor(ids, scores[index : index + 1])
                except Exception as error:  # it ends this text, and nobody else's
                    request.fail(error)
            if request.sampling.temperature:
                groups.setdefault(request.sampling, []).append(index)
        chosen = scores.argmax(dim=-1)
        for sampling, indices in groups.items():
            rows = torch.tensor(indices, device=scores.device)
            part = scores[rows].double()
            part -= part.amax(dim=-1, keepdim=True)  # any temperature divides 0 by a number that is none
            for processor in sampling.processors():
                part = processor(None, part)
            sums = part.softmax(dim=-1).cumsum(dim=-1)
            draws = sums.new_tensor([requests[index].draw() for index in indices])  # type: ignore[union-attr]
            # The first token up to which the probabilities make more than the draw, so none of probability zero.
            tokens = torch.searchsorted(sums, (draws * sums[:, -1])[:, None], right=True)[:, 0]
            # Where processors left no number there is one all the same: nobody else's batch ends by that.
            chosen[rows] = tokens.clamp(max=scores.shape[1] - 1)
        self.sent.append(Sent(requests, sent_to_host(chosen)))
        return chosen


__all__ = ["Batcher", "Request", "Sampling"]
