"""BakaCache: everything a BakaLLM remembers of a text, in tensors whose size does not depend on its length.

Per block it holds keys and values in two halves of S slots, [batch, key-value heads, 2S, head_dim]: slots 0 … S-1 are
the previous chunk's stream, slots S … 2S-1 the stream of the chunk in progress. When a chunk is full the second half
becomes the first, its keys under the angles of S slots earlier, which is exact because RoPE is relative. Beside them
stand the memory vectors and, on the host, what tells one row's phase from another's: how many tokens each row has
taken in.
"""

import operator
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache

from .cache_layer_baka import BakaCacheLayer
from .configuration_baka import check_integers
from .functions_baka import as_tensor, choose_rows, put_on
from .history_baka import hash_before, hash_of_nothing, hash_tokens, opening_of_nothing, opening_with
from .state_files_baka import (
    CACHE_FILE,
    OPENING,
    SavedState,
    check_signature,
    check_state,
    fingerprint_of,
    read_state,
    rows_known,
    signature_of,
    tensors_held,
    write_state,
)

# While recording, `crop` may go back this many positions across chunk boundaries.
RECORDED_POSITIONS = 128


class BakaCache(Cache):
    """The recurrent state of a batch of texts. Its size depends on the configuration and the batch alone:

        batch · (num_hidden_layers · 2 · num_key_value_heads · head_dim · 2S + R · hidden_size) numbers, see `nbytes`,

    and what else a `memory_update` and associations hold (docs/memory.md), in float32 where all else may not be.

    A model takes it as `past_key_values`, changes it in place and returns it. Rows may be in different phases of their
    chunks. It behaves as any transformers `Cache` does in `generate`.

    Args:
        config (`BakaConfig`): the model's configuration.
        batch_size (`int`): number of texts read side by side.
        device, dtype: where and in what precision; by default PyTorch's default device and the config's dtype. What its
            memory keeps in float32 is never in less.
    """

    memory: torch.Tensor  # m_i, before the solidifier, for the chunk in progress; zeros until a first token is read

    def __init__(
        self,
        config: Any,
        batch_size: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_integers(batch_size=batch_size)
        signature, dtype = signature_of(config), _floating(dtype or config.dtype or torch.get_default_dtype())
        held = tensors_held(signature)
        self._begin(signature, {name: each.zeros(batch_size, device, dtype) for name, each in held.items()})

    def _begin(self, signature: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Be a state of these tensors whose rows have read nothing."""
        super().__init__(layers=[BakaCacheLayer() for _ in range(signature["num_hidden_layers"])])
        self.signature, self._held = signature, tensors_held(signature)
        self._put(tensors)
        batch_size = self.memory.shape[0]
        self._seq_length = 0  # positions fed
        self._is_torn = False  # in the middle of a call that changes its tensors, see `go_on`

        # On the host, so that the shape of the next step is known without waiting for the device:
        self._num_tokens = torch.zeros(batch_size, dtype=torch.int64)  # taken in since the row's text began
        self._seeded = torch.zeros(batch_size, dtype=torch.bool)  # rows that began with another stream's memory
        pauses = signature["num_pause_tokens"]
        self._pauses = torch.zeros(batch_size, pauses, dtype=torch.int64)  # where those of the chunk in progress stand
        self._aligned = 0  # trailing positions at which every row took a token: `crop` can count back over them

        # For generate: the hash of the tokens read and the first ids of each text (None: unknown, as when embeddings
        # were fed), the rows that met EOS, and the prompt still to be read: how many of its columns are history, and
        # the mask of those that are new. Of its last call, and so not in a file, which is the same however the text was
        # read: the hash of what was new to it, and what it said last.
        self._history: torch.Tensor | None = hash_of_nothing(batch_size, self.device)
        self._opening: torch.Tensor | None = opening_of_nothing(batch_size, self.device)
        self._asked: torch.Tensor | None = None
        self._said: torch.Tensor | None = None
        self._finished: torch.Tensor | None = None
        self._prompt: tuple[int, torch.Tensor | None] | None = None
        self._is_beam_search = False

        self.is_static = False  # read by CUDA graphs where there are any, see `new_cache`
        self._reader: Any = None  # what does so, once it has

        self._is_recording = False
        self._boundaries: list[dict[str, Any]] = []
        self._recent_ids: torch.Tensor | None = None

    # What there is to know

    @property
    def carried(self) -> dict[str, torch.Tensor]:
        """What its memory holds, as `memory_baka` has it."""
        return {name: getattr(self, name) for name in self._held if "." not in name}

    @carried.setter
    def carried(self, tensors: dict[str, torch.Tensor]) -> None:
        self._put(tensors)

    @property
    def batch_size(self) -> int:
        return self._num_tokens.shape[0]

    @property
    def num_tokens(self) -> torch.Tensor:
        """[B] int64 on the CPU: text tokens each row has taken in since its text began, padding not counted."""
        return self._num_tokens.clone()

    @property
    def device(self) -> torch.device:
        return self.memory.device

    @property
    def nbytes(self) -> int:
        """Bytes of the recurrent state: keys, values and memory."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions fed so far, padding included: what `generate` slices its input by."""
        return self._seq_length

    def tensors(self) -> dict[str, torch.Tensor]:
        """The recurrent state, [B, …] each, by the names of `tensors_held`."""
        return {name: getattr(*self._place_of(name)) for name in self._held}

    def _put(self, tensors: dict[str, torch.Tensor]) -> None:
        """Replace the tensors of the recurrent state by these."""
        places = [(*self._place_of(name), tensor) for name, tensor in tensors.items()]
        kept = [id(holder) for holder, name, tensor in places if getattr(holder, name, None) is tensor]
        for layer in self.layers:
            layer.is_shared = layer.is_shared and id(layer) in kept
        for holder, name, tensor in places:
            setattr(holder, name, tensor)

    def _place_of(self, name: str) -> tuple[Any, str]:
        """What holds the tensor "memory" or "layers.0.keys", and under which attribute."""
        *path, attribute = name.split(".")
        return self.layers[int(path[1])] if path else self, attribute

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch_size={self.batch_size}, seq_length={self.get_seq_length()}, "
            f"num_tokens={self._num_tokens.tolist()}, nbytes={self.nbytes})"
        )

    # What rows do

    def _apply(self, change: Callable, rows: Callable | None = None) -> "BakaCache":
        """Replace each tensor of the state by `change` of it and its name; those on the host, of rows, by `rows` of it.

        Nothing is replaced before all is there: whatever is raised in between leaves the state as it was.
        """
        self.check_whole()
        on_host = rows or (lambda tensor: tensor)
        tensors = {name: change(tensor, name) for name, tensor in self.tensors().items()}
        others = {name: on_host(getattr(self, name)) for name in ("_num_tokens", "_seeded", "_pauses")}
        for name in ("_history", "_opening", "_asked", "_said", "_finished", "_recent_ids"):
            if getattr(self, name) is not None:
                others[name] = change(getattr(self, name), name)
        boundaries = []
        for boundary in self._boundaries:
            kept = {name: change(tensor, name) for name, tensor in boundary["tensors"].items()}
            counts = {name: on_host(boundary[name]) for name in ("num_tokens", "completes", "pauses")}
            boundaries.append({"tensors": kept, **counts})
        changed = self.draft()
        changed._put(tensors)
        changed.__dict__.update(others, _boundaries=boundaries)
        self.go_on(changed)
        return self

    def _select(self, indices: torch.Tensor) -> None:
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise ValueError(f"expected row indices, integers, got {indices.dtype} {indices.tolist()}.")
        host = indices.to("cpu", torch.int64)
        if host.ndim != 1 or host.numel() == 0 or host.min() < -self.batch_size or host.max() >= self.batch_size:
            raise ValueError(f"expected row indices below the batch size {self.batch_size}, got {host.tolist()}.")
        host = host % self.batch_size
        self._apply(lambda t, name: t.index_select(0, host.to(t.device)), lambda t: t.index_select(0, host))

    def _as_mask(self, mask: Any) -> torch.Tensor:
        mask = as_tensor(mask, "a boolean mask")
        if mask.dtype != torch.bool or mask.shape != (self.batch_size,):
            raise ValueError(
                f"expected a boolean mask of shape ({self.batch_size},), got {mask.dtype} {tuple(mask.shape)}."
            )
        return mask.cpu()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row b becomes what row `beam_idx[b]` was."""
        self._select(as_tensor(beam_idx, "row indices"))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order; or those where `indices` [B], if it is boolean, is True.

        Raises:
            ValueError: no row, one that is not there, or neither indices nor a mask with one entry for each row.
        """
        indices = as_tensor(indices, "row indices, or a boolean mask")
        self._select(self._as_mask(indices).nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, one after the other."""
        check_integers(repeats=repeats)
        self._apply(lambda t, name: t.repeat_interleave(repeats, 0), lambda t: t.repeat_interleave(repeats, 0))

    @classmethod
    def cat(cls, states: Sequence["BakaCache"]) -> "BakaCache":
        """The rows of several states of the same model, one state after another, whatever each has read.

        Of rows that were fed fewer positions than others the rest counts as padding on the left. The states are left
        as they are. What they recorded of chunk boundaries, and that they were static, does not come over.

        Raises:
            ValueError: no state, something else, or states that differ in configuration, device or dtype.
        """
        if not states:
            raise ValueError("expected at least one state, got none.")
        for state in states:
            check_state("each state", state)
            state.check_whole()
        kinds = [(state.signature, state.device, state.layers[0].keys.dtype) for state in states]
        for kind in kinds:
            check_signature(kind[0], kinds[0][0])
            if kind != kinds[0]:
                raise ValueError(f"expected states on one device and in one dtype, got {kinds[0][1:]} and {kind[1:]}.")
        joined = cls.__new__(cls)
        parts = [state.tensors() for state in states]
        joined._begin(states[0].signature, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        joined._seq_length = max(state._seq_length for state in states)
        joined._num_tokens = torch.cat([state._num_tokens for state in states])
        joined._seeded = torch.cat([state._seeded for state in states])
        joined._pauses = torch.cat([state._pauses for state in states])
        for name in ("_history", "_opening", "_asked", "_said"):
            known = [getattr(state, name) for state in states if getattr(state, name) is not None]
            setattr(joined, name, torch.cat(known) if len(known) == len(states) else None)
        if any(state._finished is not None for state in states):
            no = [torch.zeros_like(state._seeded, device=state.device) for state in states]
            finished = [state._finished for state in states]
            joined._finished = torch.cat([n if f is None else f for n, f in zip(no, finished, strict=True)])
        joined._aligned = min(state._aligned for state in states)
        joined._is_beam_search = any(state._is_beam_search for state in states)
        return joined

    def __getitem__(self, row: int) -> "BakaCache":
        """A copy of one row, a state of batch size 1 to which the padding before its text does not count as fed.

        `len` is not the number of rows, which is `batch_size`: it is that of blocks, as in every `Cache`.

        Raises:
            IndexError: there is no such row.
        """
        row = range(self.batch_size)[row]
        alone = self.draft()
        alone._reader = None
        alone._select(torch.tensor([row]))
        alone._seq_length = int(alone._num_tokens)
        return alone

    def split(self) -> list["BakaCache"]:
        """The rows one by one, as `state[row]` gives them: what `cat` puts together again."""
        return [self[row] for row in range(self.batch_size)]

    def put_row(self, row: int, state: "BakaCache") -> None:
        """Row `row` becomes the text of `state`, which has one row; see `put_rows`."""
        self.put_rows([row], state)

    @torch.no_grad()
    def put_rows(self, rows: Sequence[int], state: "BakaCache", of: Sequence[int] | None = None) -> None:
        """Rows `rows` become texts of `state`, which is left as it is; the others go on.

        Nothing but these rows is written, where they are: graphs of a static state stay as they were recorded. `crop`
        does not go back over it, and an autograd graph does not either.

        Args:
            rows: which ones, each at most once.
            state: a state on any device and in any dtype.
            of: for each of `rows` the row of `state` that it becomes; by default all of them in their order.

        Raises:
            ValueError: no row, one named twice, another number of them in `of`, no state, or another configuration's.
            IndexError: there is no such row, here or there.
        """
        check_state("`state`", state)
        rows = [range(self.batch_size)[row] for row in rows]
        of = [range(state.batch_size)[row] for row in (range(state.batch_size) if of is None else of)]
        self.check_whole()
        state.check_whole()
        check_signature(state.signature, self.signature)
        if len(rows) != len(of) or len(set(rows)) != len(rows) or not rows:
            raise ValueError(f"expected as many rows, each once, as texts to put there, got {rows} and {of}.")
        changed = self.draft()
        for layer in changed.layers:
            layer.make_writable(layer.keys)
        # Nobody but its reader holds on to the reader's tensors. In others rows may be views of one.
        held = {} if self._reader is None else self._reader.memory
        carried = self.carried.items()
        changed.carried = {name: x if x is held.get(name) else x.detach().clone() for name, x in carried}
        where, whence = torch.tensor(rows), torch.tensor(of)
        for name in ("_num_tokens", "_seeded", "_pauses", "_history", "_opening"):
            own, other = getattr(self, name), getattr(state, name)
            if own is not None and other is not None:
                own = own.index_copy(0, put_on(own.device, where), other[put_on(other.device, whence)].to(own))
            setattr(changed, name, None if other is None else own)  # unknown in one row, unknown in all
        changed._asked = changed._said = changed._finished = changed._prompt = changed._recent_ids = None
        changed._seq_length, changed._aligned = max(self._seq_length, int(state._num_tokens[of].max())), 0
        changed._is_beam_search, changed._boundaries = self._is_beam_search or state._is_beam_search, []
        self._is_torn = True  # its tensors change where they are
        put, where, whence = state.tensors(), put_on(self.device, where), put_on(state.device, whence)
        for name, tensor in changed.tensors().items():
            tensor.index_copy_(0, where, put[name].index_select(0, whence).to(tensor))
        self.go_on(changed)

    def reset(self) -> None:
        """Forget everything: the state of rows that have read nothing. What was asked of it (to be static, to record
        for `crop`) it goes on doing."""
        fresh = type(self).__new__(type(self))
        fresh._begin(self.signature, {name: torch.zeros_like(tensor) for name, tensor in self.tensors().items()})
        fresh.is_static, fresh._reader, fresh._is_recording = self.is_static, self._reader, self._is_recording
        self.go_on(fresh)

    def reset_rows(self, mask: torch.Tensor) -> None:
        """Start a new text in the rows where `mask` [B] is True; the others go on.

        Raises:
            ValueError: `mask` is not a boolean vector with one entry for each row.
        """
        rows = self._as_mask(mask)
        if not rows.any():
            return
        if not rows.all():
            self.check_whole()
        anew = self.draft()
        anew._put({name: without_rows(tensor, rows) for name, tensor in self.tensors().items()})
        anew._num_tokens = self._num_tokens.masked_fill(rows, 0)
        anew._seeded = self._seeded & ~rows
        for name in ("_finished", "_asked"):
            if getattr(self, name) is not None:
                setattr(anew, name, without_rows(getattr(self, name), rows))
        if self._is_torn:
            anew._history, anew._opening, anew._is_torn = None, None, False
        anew._aligned = 0
        anew._boundaries = []
        self.go_on(anew)

    def seed_memory(self, memory: torch.Tensor) -> "BakaCache":
        """Begin these texts with the `.memory` of another stream, [R, hidden_size] or [B, R, hidden_size].

        The memory is all that comes over: keys and values of the other stream's last chunk stay behind, and so does
        what it had read of a chunk not yet full.

        Raises:
            ValueError: this stream has read something already, or the shape is another.
        """
        if self.get_seq_length() or self._num_tokens.any():
            raise ValueError(f"a memory can only seed a fresh state, this one has read {self._num_tokens.tolist()}.")
        if self.memory.shape[1] == 0 and len(self.carried) == 1:
            raise ValueError("this model has no memory tokens to seed (num_memory_tokens=0).")
        if memory.shape not in (self.memory.shape, self.memory.shape[1:]):
            raise ValueError(
                f"expected a memory of shape {tuple(self.memory.shape)} or {tuple(self.memory.shape[1:])}, "
                f"got {tuple(memory.shape)}."
            )
        self.check_whole()
        seeded = self.draft()
        seeded.memory = memory.to(self.memory).expand_as(self.memory).clone()
        seeded._seeded = torch.ones_like(self._seeded)
        self.go_on(seeded)
        return self

    # What time does

    def detach_(self) -> "BakaCache":
        """Cut the autograd graph: gradients of later calls end here."""
        self.check_whole()
        detached = self.draft()
        detached._put({name: tensor.detach() for name, tensor in self.tensors().items()})
        for layer in detached.layers:
            layer.is_shared = True  # its tensors are views
        self.go_on(detached)
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "BakaCache":
        """Move the state to a device, a floating dtype or both, in place; what is kept in float32 at least stays so.

        Raises:
            ValueError: another kind of dtype.
        """
        dtypes = {} if dtype is None else {name: held.dtype_in(_floating(dtype)) for name, held in self._held.items()}
        return self._apply(lambda t, name: t.to(device=device, dtype=dtypes.get(name)))

    def clone(self) -> "BakaCache":
        """A copy that shares nothing with this one (an autograd graph is kept)."""
        other = self.draft()
        other._reader = None
        return other._apply(lambda t, name: t.clone(), torch.clone)

    # All or nothing: whatever changes a state changes a draft of it, and the state becomes that in one statement. Until
    # then it is what it was. A call writes into slots that are seen from there on only; what cannot wait, since tensors
    # must stay where they are, is done while the state that they belong to says that it is torn.

    def draft(self, with_layers: bool = True) -> "BakaCache":
        """A twin of this state that has its tensors; `with_layers` it can be given others there as well."""
        twin = type(self).__new__(type(self))
        twin.__dict__ = self.__dict__ | {"_boundaries": list(self._boundaries)}
        if with_layers:
            twin.layers = []
            for layer in self.layers:
                twin.layers.append(BakaCacheLayer.__new__(BakaCacheLayer))
                twin.layers[-1].__dict__ = layer.__dict__.copy()
        return twin

    def go_on(self, draft: "BakaCache") -> None:
        """Become what `draft` is."""
        self.__dict__ = draft.__dict__

    def go_back(self, before: dict[str, Any]) -> None:
        """Become what this state was when its `__dict__` was `before`; torn, if its tensors may have changed."""
        may_have = self._is_torn or self._seq_length != before["_seq_length"]
        self.__dict__ = before | {"_is_torn": before["_is_torn"] or (before["_reader"] is not None and may_have)}

    def check_whole(self) -> None:
        """Raise a `ValueError` if a call has left this state torn."""
        if self._is_torn:
            raise ValueError(
                "expected a state between two calls, got one in the middle of a call that was interrupted or has "
                "failed, after a part of its tensors had changed: `reset` it, or go on from a `clone` or a saved state."
            )

    def _release(self) -> None:
        """Let go of what reads these tensors in place: an autograd graph may hold on to them from now on."""
        if self._reader is not None:
            self._reader.give_up()
            self._reader = None

    def __getstate__(self) -> dict[str, Any]:
        self.check_whole()
        return self.__dict__ | {"_reader": None}

    def __deepcopy__(self, memo: dict) -> "BakaCache":
        return self.clone().detach_()

    def _advance(
        self,
        num_positions: int,
        num_tokens: torch.Tensor,
        seeded: torch.Tensor,
        pauses: torch.Tensor,
        num_aligned: int,
        restarted: bool,
        within_beam_search: bool,
    ) -> None:
        """Count what a call of `num_positions` has read, in the last `num_aligned` of which no row had padding.

        `num_tokens` [B] is what each row has read of its text by now; nobody can crop to before its beginning. If a
        text has `restarted`, the boundaries recorded may be those of the text before.
        """
        self._seq_length += num_positions
        aligned = num_aligned + (self._aligned if num_aligned == num_positions else 0)
        self._aligned = min(aligned, int(num_tokens.min()))
        self._num_tokens, self._seeded, self._pauses = num_tokens, seeded, pauses
        self._is_beam_search = within_beam_search
        self._forget_what_was_not_read()
        self._boundaries = [
            boundary
            for boundary in self._boundaries
            if not restarted and bool((num_tokens - boundary["num_tokens"] < RECORDED_POSITIONS).any())
        ]

    def _forget_what_was_not_read(self) -> None:
        """A row that has read nothing has no memory yet, whatever it was given beside others that have."""
        if not self._num_tokens.all():
            self.memory = without_rows(self.memory, (self._num_tokens == 0) & ~self._seeded)

    def _remember_ids(self, input_ids: torch.Tensor, real: torch.Tensor | None) -> None:
        """Take [B, L] token ids into the hash of what was read, those where `real` [B, L] is False left out."""
        self._remember_opening(input_ids, real)
        if self._history is None:
            return
        self._history = hash_tokens(input_ids, real, self._history.to(input_ids.device))
        if self._is_recording:
            recent = input_ids if self._recent_ids is None else torch.cat([self._recent_ids, input_ids], dim=1)
            self._recent_ids = recent[:, -RECORDED_POSITIONS:]

    def _remember_opening(self, input_ids: torch.Tensor, real: torch.Tensor | None) -> None:
        """Keep of [B, L] token ids just read, those where `real` is False left out, what a text begins with."""
        # Most tokens come long after the beginning.
        if self._opening is not None and int(self._num_tokens.min()) - input_ids.shape[1] < OPENING:
            self._opening = opening_with(self._opening, self._num_tokens, input_ids, real)

    def activate_past_recording(self) -> None:
        """From now on keep what chunk boundaries overwrite, so that `crop` can go back across them.

        Kept are the boundaries within the last 128 positions, each as large as the state itself.
        """
        self._is_recording = True

    def deactivate_past_recording(self) -> None:
        """Stop doing so, and forget what was kept."""
        self._is_recording, self._boundaries, self._recent_ids = False, [], None

    def _record_boundary(self, num_tokens: torch.Tensor, completes: torch.Tensor, pauses: torch.Tensor) -> None:
        """Keep the state just before the chunk of the rows `completes` [B] gives way to the next.

        `num_tokens` [B] are the tokens each row has read by then, and `pauses` [B, P] where its pauses stand, int64.
        """
        self._boundaries.append(
            {
                "num_tokens": num_tokens.clone(),
                "completes": completes,
                "pauses": pauses,
                "tensors": {name: tensor.detach().clone() for name, tensor in self.tensors().items()},
            }
        )
        while len(self._boundaries) > 1 and bool(
            (num_tokens - self._boundaries[0]["num_tokens"] >= RECORDED_POSITIONS).all()
        ):
            self._boundaries.pop(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions (a negative number, as transformers counts).

        Free within the chunk in progress; across chunk boundaries it takes `activate_past_recording`.

        Raises:
            ValueError: no integer, a positive one, or one that goes back over padding, a reset, or a boundary not
                recorded. The state is left as it was.
        """
        try:
            count = -operator.index(tokens_to_remove)  # transformers also counts with tensors
        except TypeError:
            raise ValueError(f"`crop` takes an integer number of positions, got {tokens_to_remove!r}.") from None
        self.check_whole()
        if count == 0:
            return
        if count < 0:
            raise ValueError(f"`crop` takes a negative number of positions to remove, got {tokens_to_remove}.")
        if count > self._aligned:
            raise ValueError(
                f"cannot crop {count} positions: only the last {self._aligned} were tokens read without padding, "
                "reset or restart in any row."
            )
        target = self._num_tokens - count
        missing = target < self._num_tokens // self.chunk_size * self.chunk_size
        restore: list[tuple[torch.Tensor, dict[str, Any]]] = []
        for boundary in reversed(self._boundaries):
            rows = boundary["completes"] & (boundary["num_tokens"] > target)
            if rows.any():
                restore.append((rows, boundary))
                earliest = (boundary["num_tokens"] - self.chunk_size) <= target
                missing = missing & ~(rows & earliest)
        if missing.any():
            raise ValueError(
                f"cannot crop {count} positions: that goes back past a chunk boundary (every {self.chunk_size} tokens) "
                f"that was not recorded; call `activate_past_recording` before reading on, it keeps "
                f"{RECORDED_POSITIONS} positions."
            )

        tensors, pauses = self.tensors(), self._pauses
        for rows, boundary in restore:
            tensors = {name: choose_rows(rows, boundary["tensors"][name], tensor) for name, tensor in tensors.items()}
            pauses = torch.where(rows[:, None], boundary["pauses"], pauses)
        cropped = self.draft()
        cropped._put(tensors)
        cropped._pauses = pauses
        cropped._num_tokens = target
        cropped._asked = cropped._said = None
        cropped._forget_what_was_not_read()
        cropped._aligned -= count
        cropped._seq_length -= count
        cropped._boundaries = [b for b in self._boundaries if (b["completes"] & (b["num_tokens"] <= target)).any()]
        cropped._unread_ids(count)
        self.go_on(cropped)

    def _unread_ids(self, count: int) -> None:
        recent = self._recent_ids
        if self._history is None or recent is None or recent.shape[1] < count:
            self._history, self._recent_ids = None, None
            return
        self._history = hash_before(self._history, recent[:, recent.shape[1] - count :])
        self._recent_ids = recent[:, : recent.shape[1] - count]

    @property
    def chunk_size(self) -> int:
        return self.signature["chunk_size"]

    # Files

    def save_pretrained(
        self, save_directory: str | os.PathLike, model: Any = None, fingerprint: str | None = None
    ) -> None:
        """Write the state to `save_directory`/baka_cache.safetensors; resuming from it is bit-identical.

        The file appears under its name only when it is complete.

        Args:
            save_directory: the folder.
            model (*optional*): the model that has read the texts. The file then has a fingerprint of its weights, see
                `fingerprint_of`, by which `from_pretrained` can tell other weights.
            fingerprint (*optional*): that fingerprint, where it is known: to take it all weights are read.

        Raises:
            ValueError: the state is one process's share of another, or the weights are not whole and plain.
        """
        self.check_whole()
        known = {name: getattr(self, f"_{name}") for name in rows_known(self.signature)}
        rows = {name: tensor for name, tensor in known.items() if tensor is not None}
        numbers = self.get_seq_length(), self._aligned, int(self._is_beam_search)
        state = SavedState(self.signature, self.tensors(), rows, *numbers)
        if fingerprint is None and model is not None:
            fingerprint = fingerprint_of(model)
        write_state(Path(save_directory), state, fingerprint)

    @classmethod
    def from_pretrained(
        cls,
        save_directory: str | os.PathLike,
        config: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        model: Any = None,
        fingerprint: str | None = None,
    ) -> "BakaCache":
        """Read a state that `save_pretrained` wrote, by default to the CPU and in the dtype it was saved in.

        Args:
            save_directory: the folder.
            config (`BakaConfig`, *optional*): the configuration the state must fit.
            device, dtype (*optional*): where to, in what precision.
            model (*optional*): the model whose configuration and weights the state must be of. It takes a file that was
                saved with `model`.
            fingerprint (*optional*): that of the weights which must have read it, where it is known.

        Raises:
            ValueError: no such file, a damaged or foreign one, a newer format, another configuration's, or another
                model's.
        """
        dtype = None if dtype is None else _floating(dtype)
        path = Path(save_directory) / CACHE_FILE

        def check(signature: dict[str, Any], found: str | None) -> None:
            for each in (config, None if model is None else model.config):
                if each is not None:
                    check_signature(signature, signature_of(each))
            if model is None and fingerprint is None:
                return
            if found is None:
                raise ValueError(
                    f"{path} does not say which weights read it: save it with `model`, or load it without."
                )
            if found != (fingerprint or fingerprint_of(model)):
                raise ValueError(f"the state in {path} was read by other weights than those of `model`.")

        saved = read_state(path, check)
        state = cls.__new__(cls)
        state._begin(saved.signature, saved.tensors)
        state._seq_length = saved.seq_length
        for name in rows_known(saved.signature):
            setattr(state, f"_{name}", saved.rows.get(name))
        state._aligned, state._is_beam_search = saved.aligned, bool(saved.is_beam_search)
        return state.to(device, dtype)


def _floating(dtype: Any) -> torch.dtype:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"expected a floating dtype for a state, got {dtype}.")
    return dtype


def without_rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`tensor` [B, …] with zeros in the rows where `rows` [B] is True."""
    return tensor.masked_fill(rows.to(tensor.device).view(-1, *[1] * (tensor.ndim - 1)), 0)


__all__ = ["BakaCache"]
