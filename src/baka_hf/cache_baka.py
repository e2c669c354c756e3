"""BakaCache: everything a BakaLLM remembers of a text, in tensors whose size does not depend on its length.

Per block it holds keys and values in two halves of S slots, [batch, key-value heads, 2S, head_dim]: slots 0 … S-1 are
the previous chunk's stream, slots S … 2S-1 the stream of the chunk in progress. When a chunk is full the second half
becomes the first, its keys turned back by S slots, which is exact because RoPE is relative. Beside them stand the
memory vectors and, on the host, what tells one row's phase from another's: how many tokens each row has taken in.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import safe_open, safe_save_file

from .functions_baka import choose_rows
from .stream_baka import Placement

CACHE_FILE = "baka_cache.safetensors"
FORMAT_VERSION = 1

# What two configurations must share for one to go on from the other's state.
SIGNATURE_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rope_theta",
    "chunk_size",
    "num_memory_tokens",
    "memory_write",
    "memory_solidifier",
    "separate_solidifiers",
    "memory_norm",
    "num_pause_tokens",
    "pause_placement",
    "use_xl_cache",
)

# While recording, `crop` may go back this many positions across chunk boundaries.
RECORDED_POSITIONS = 128

# Of each row's text so many ids are kept, from its beginning on: `generate` tells by them a text that begins again.
OPENING = 32

# Multiplier of the polynomial hash of the tokens read, odd and so invertible modulo 2^64 (Knuth's for 64 bits).
HASH_MULTIPLIER = 6364136223846793005
HASH_INVERSE = pow(HASH_MULTIPLIER, -1, 2**64)


class BakaCacheLayer(CacheLayerMixin):
    """Keys and values of one block, [B, num_key_value_heads, 2S, head_dim] (S slots with `use_xl_cache=False`)."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.is_initialized = True
        self.seq_length = 0
        # An autograd graph may hold on to these very tensors: copy before writing in place.
        self.is_shared = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the slots exist from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, placement: Placement, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a span's keys and values [B, H, Q, head_dim] in place; return all that its queries may look at."""
        self.keys, self.values = self._writable(self.keys, key_states), self._writable(self.values, value_states)
        self.is_shared = False
        if placement.slots is None or placement.valid is None:
            self.keys[:, :, placement.start : placement.stop] = key_states
            self.values[:, :, placement.start : placement.stop] = value_states
            visible = slice(placement.first, placement.stop)
            return self.keys[:, :, visible], self.values[:, :, visible]
        index = placement.slots.expand_as(key_states)
        self.keys.scatter_(2, index, torch.where(placement.valid, key_states, self.keys.gather(2, index)))
        self.values.scatter_(2, index, torch.where(placement.valid, value_states, self.values.gather(2, index)))
        return self.keys, self.values

    def _writable(self, buffer: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if buffer.shape[1] != like.shape[1] and self.seq_length == 0:
            # Under tensor parallelism each process has its share of the heads.
            return like.new_zeros(buffer.shape[0], like.shape[1], *buffer.shape[2:])
        if buffer.device != like.device or buffer.dtype != like.dtype:
            return buffer.detach().to(device=like.device, dtype=like.dtype)
        if self.is_shared or buffer.requires_grad or (buffer.is_inference() and not torch.is_inference_mode_enabled()):
            return buffer.detach().clone()
        return buffer

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return self.seq_length

    def get_max_length(self) -> int:
        return -1


class BakaCache(Cache):
    """The recurrent state of a batch of texts. Its size depends on the configuration and the batch alone:

        batch · (num_hidden_layers · 2 · num_key_value_heads · head_dim · 2S + R · hidden_size) numbers, see `nbytes`.

    A model takes it as `past_key_values`, changes it in place and returns it. Rows may be in different phases of their
    chunks. It behaves as any transformers `Cache` does in `generate`.

    Args:
        config (`BakaConfig`): the model's configuration.
        batch_size (`int`): number of texts read side by side.
        device, dtype: where and in what precision; by default PyTorch's default device and the config's dtype.
    """

    def __init__(
        self,
        config: Any,
        batch_size: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")
        self._allocate(signature_of(config), batch_size, device, dtype or config.dtype or torch.get_default_dtype())

    def _allocate(
        self, signature: dict, batch_size: int, device: torch.device | str | None, dtype: torch.dtype
    ) -> None:
        device = torch.get_default_device() if device is None else torch.device(device)
        self.signature = signature
        memories, pauses = signature["num_memory_tokens"], signature["num_pause_tokens"]
        stream_length = 2 * memories + signature["chunk_size"] + pauses
        slots = stream_length * (2 if signature["use_xl_cache"] else 1)
        shape = (batch_size, signature["num_key_value_heads"], slots, signature["head_dim"])
        layers = [BakaCacheLayer(shape, device, dtype) for _ in range(signature["num_hidden_layers"])]
        super().__init__(layers=layers)
        # m_i, before the solidifier, for the chunk in progress; zeros until a first token is read.
        self.memory = torch.zeros(batch_size, memories, signature["hidden_size"], device=device, dtype=dtype)

        # On the host, so that the shape of the next step is known without waiting for the device:
        self._num_tokens = torch.zeros(batch_size, dtype=torch.int64)  # taken in since the row's text began
        self._seeded = torch.zeros(batch_size, dtype=torch.bool)  # rows that began with another stream's memory
        self._pauses = torch.zeros(batch_size, pauses, dtype=torch.int64)  # where those of the chunk in progress stand
        self._aligned = 0  # trailing positions at which every row took a token: `crop` can count back over them

        # For generate: the hash of the tokens read and the first ids of each text (None: unknown, as when embeddings
        # were fed), the rows that met EOS, and the prompt still to be read: how many of its columns are history, and
        # the mask of those that are new. Of its last call, and so not in a file, which is the same however the text was
        # read: the hash of what was new to it, and what it said last.
        self._history: torch.Tensor | None = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._opening: torch.Tensor | None = torch.zeros(batch_size, OPENING, dtype=torch.int64, device=device)
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
    def dtype(self) -> torch.dtype:
        return self.memory.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the recurrent state: keys, values and memory."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    @property
    def is_croppable(self) -> bool:
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions fed so far, padding included: what `generate` slices its input by."""
        return self.layers[0].seq_length

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield self.memory
        for layer in self.layers:
            yield layer.keys
            yield layer.values

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch_size={self.batch_size}, seq_length={self.get_seq_length()}, "
            f"num_tokens={self._num_tokens.tolist()}, nbytes={self.nbytes})"
        )

    # What rows do

    def _apply(self, change: Any, rows: Any = None) -> "BakaCache":
        """Replace each tensor of the state by `change` of it, and each per-row one on the host by `rows` of it."""
        self.memory = change(self.memory)
        for layer in self.layers:
            keys, values = change(layer.keys), change(layer.values)
            layer.is_shared = layer.is_shared and keys is layer.keys
            layer.keys, layer.values = keys, values
        for name in ("_history", "_opening", "_asked", "_said", "_finished", "_recent_ids"):
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))
        if rows is not None:
            self._num_tokens, self._seeded = rows(self._num_tokens), rows(self._seeded)
            self._pauses = rows(self._pauses)
        for boundary in self._boundaries:
            boundary["tensors"] = [change(tensor) for tensor in boundary["tensors"]]
            if rows is not None:
                boundary["num_tokens"] = rows(boundary["num_tokens"])
                boundary["completes"] = rows(boundary["completes"])
                boundary["pauses"] = rows(boundary["pauses"])
        return self

    def _select(self, indices: torch.Tensor) -> None:
        indices = torch.as_tensor(indices, dtype=torch.int64)
        host = indices.cpu()
        if host.ndim != 1 or host.numel() == 0 or host.min() < -self.batch_size or host.max() >= self.batch_size:
            raise ValueError(f"expected row indices below the batch size {self.batch_size}, got {host.tolist()}.")
        host = host % self.batch_size
        self._apply(lambda t: t.index_select(0, host.to(t.device)), lambda t: t.index_select(0, host))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row b becomes what row `beam_idx[b]` was."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, one after the other."""
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise ValueError(f"`repeats` must be an integer of at least 1, got {repeats!r}.")
        self._apply(lambda t: t.repeat_interleave(repeats, 0), lambda t: t.repeat_interleave(repeats, 0))

    @classmethod
    def cat(cls, states: Sequence["BakaCache"]) -> "BakaCache":
        """The rows of several states of the same model, one state after another.

        The states are left as they are. What they recorded of chunk boundaries, and that they were static, does not
        come over.

        Raises:
            ValueError: no state, or states that differ in configuration, device, dtype or the positions fed so far.
        """
        if not states:
            raise ValueError("expected at least one state, got none.")
        kinds = [(state.signature, state.device, state.dtype, state.get_seq_length()) for state in states]
        for kind in kinds:
            check_signature(kind[0], kinds[0][0])
            if kind != kinds[0]:
                raise ValueError(
                    f"expected states on one device, in one dtype, fed as many positions, got {kinds[0][1:]} and "
                    f"{kind[1:]}."
                )
        joined = cls.__new__(cls)
        joined._allocate(states[0].signature, sum(state.batch_size for state in states), "meta", states[0].dtype)
        joined.memory = torch.cat([state.memory for state in states])
        for layer, *layers in zip(joined.layers, *(state.layers for state in states), strict=True):
            layer.keys = torch.cat([each.keys for each in layers])
            layer.values = torch.cat([each.values for each in layers])
            layer.seq_length = layers[0].seq_length
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

    def reset(self) -> None:
        """Forget everything: the state of rows that have read nothing."""
        fresh = type(self).__new__(type(self))
        fresh._allocate(self.signature, self.batch_size, self.device, self.dtype)
        for layer, old in zip(fresh.layers, self.layers, strict=True):
            layer.keys, layer.values = torch.zeros_like(old.keys), torch.zeros_like(old.values)
        fresh.is_static, fresh._reader = self.is_static, self._reader
        self.__dict__ = fresh.__dict__

    def reset_rows(self, mask: torch.Tensor) -> None:
        """Start a new text in the rows where `mask` [B] is True; the others go on.

        Raises:
            ValueError: `mask` is not a boolean vector with one entry for each row.
        """
        mask = torch.as_tensor(mask)
        if mask.dtype != torch.bool or mask.shape != (self.batch_size,):
            raise ValueError(
                f"expected a boolean mask of shape ({self.batch_size},), got {mask.dtype} {tuple(mask.shape)}."
            )
        host = mask.cpu()
        if not host.any():
            return
        self.memory = self.memory.masked_fill(mask.to(self.memory.device)[:, None, None], 0)
        for layer in self.layers:
            on_device = mask.to(layer.keys.device)[:, None, None, None]
            layer.keys = layer.keys.masked_fill(on_device, 0)
            layer.values = layer.values.masked_fill(on_device, 0)
            layer.is_shared = False
        self._num_tokens = self._num_tokens.masked_fill(host, 0)
        self._seeded = self._seeded & ~host
        if self._asked is not None:
            self._asked = self._asked.masked_fill(mask.to(self._asked.device), 0)
        if self._finished is not None:
            self._finished = self._finished & ~mask.to(self._finished.device)
        self._aligned = 0
        self._boundaries.clear()

    def seed_memory(self, memory: torch.Tensor) -> "BakaCache":
        """Begin these texts with the `.memory` of another stream, [R, hidden_size] or [B, R, hidden_size].

        The memory is all that comes over: keys and values of the other stream's last chunk stay behind, and so does
        what it had read of a chunk not yet full.

        Raises:
            ValueError: this stream has read something already, or the shape is another.
        """
        if self.get_seq_length() or self._num_tokens.any():
            raise ValueError(f"a memory can only seed a fresh state, this one has read {self._num_tokens.tolist()}.")
        if self.memory.shape[1] == 0:
            raise ValueError("this model has no memory tokens to seed (num_memory_tokens=0).")
        if memory.shape not in (self.memory.shape, self.memory.shape[1:]):
            raise ValueError(
                f"expected a memory of shape {tuple(self.memory.shape)} or {tuple(self.memory.shape[1:])}, "
                f"got {tuple(memory.shape)}."
            )
        self.memory = memory.to(self.memory).expand_as(self.memory).clone()
        self._seeded = torch.ones_like(self._seeded)
        return self

    # What time does

    def detach_(self) -> "BakaCache":
        """Cut the autograd graph: gradients of later calls end here."""
        self.memory = self.memory.detach()
        for layer in self.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
            layer.is_shared = True
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "BakaCache":
        """Move the state to a device, a floating dtype or both, in place."""
        return self._apply(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def clone(self) -> "BakaCache":
        """A copy that shares nothing with this one (an autograd graph is kept)."""
        other = type(self).__new__(type(self))
        other.__dict__ = dict(self.__dict__)
        other.layers = []
        for layer in self.layers:
            twin = BakaCacheLayer.__new__(BakaCacheLayer)
            twin.__dict__ = dict(layer.__dict__)
            other.layers.append(twin)
        other._boundaries = [dict(boundary) for boundary in self._boundaries]
        other._reader = None
        return other._apply(torch.clone, torch.clone)

    def _release(self) -> None:
        """Let go of what reads these tensors in place: an autograd graph may hold on to them from now on."""
        if self._reader is not None:
            self._reader.give_up()
            self._reader = None

    def __getstate__(self) -> dict[str, Any]:
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
    ) -> None:
        """Count what a call of `num_positions` has read, in the last `num_aligned` of which no row had padding.

        `num_tokens` [B] is what each row has read of its text by now; nobody can crop to before its beginning. If a
        text has `restarted`, the boundaries recorded may be those of the text before.
        """
        for layer in self.layers:
            layer.seq_length += num_positions
        aligned = num_aligned + (self._aligned if num_aligned == num_positions else 0)
        self._aligned = min(aligned, int(num_tokens.min()))
        self._num_tokens, self._seeded, self._pauses = num_tokens, seeded, pauses
        self._boundaries = [
            boundary
            for boundary in self._boundaries
            if not restarted and bool((num_tokens - boundary["num_tokens"] < RECORDED_POSITIONS).any())
        ]

    def _remember_ids(self, input_ids: torch.Tensor, real: torch.Tensor | None) -> None:
        """Take [B, L] token ids into the hash of what was read, those where `real` [B, L] is False left out."""
        self._remember_opening(input_ids, real)
        if self._history is None:
            return
        if self._history.device != input_ids.device:
            self._history = self._history.to(input_ids.device)
        self._history = hash_tokens(input_ids, real, self._history)
        if self._is_recording:
            recent = input_ids if self._recent_ids is None else torch.cat([self._recent_ids, input_ids], dim=1)
            self._recent_ids = recent[:, -RECORDED_POSITIONS:]

    def _remember_opening(self, input_ids: torch.Tensor, real: torch.Tensor | None) -> None:
        """Keep of [B, L] token ids just read, those where `real` is False left out, what a text begins with."""
        if self._opening is None or int(self._num_tokens.min()) - input_ids.shape[1] >= OPENING:
            return
        device = input_ids.device
        real = torch.ones_like(input_ids, dtype=torch.bool) if real is None else real.to(device)
        # Counted from the end: a text may have begun within the call, and what was before it is left out.
        places = self._num_tokens.to(device)[:, None] - real.flip(1).cumsum(1).flip(1)
        places = torch.where(real & (places >= 0) & (places < OPENING), places, OPENING)
        opening = torch.nn.functional.pad(self._opening.to(device), (0, 1))  # one more, for what is left out
        self._opening = opening.scatter(1, places, input_ids.long())[:, :OPENING]

    def activate_past_recording(self) -> None:
        """From now on keep what chunk boundaries overwrite, so that `crop` can go back across them.

        Kept are the boundaries within the last 128 positions, each as large as the state itself.
        """
        self._is_recording = True

    def _record_boundary(self, num_tokens: torch.Tensor, completes: torch.Tensor, pauses: torch.Tensor) -> None:
        """Keep the state just before the chunk of the rows `completes` [B] gives way to the next.

        `num_tokens` [B] are the tokens each row has read by then.
        """
        self._boundaries.append(
            {
                "num_tokens": num_tokens.clone(),
                "completes": completes,
                "pauses": pauses,
                "tensors": [tensor.detach().clone() for tensor in self._tensors()],
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
            ValueError: the number is positive, or goes back over padding, a reset, or a boundary not recorded. The
                state is left as it was.
        """
        count = -int(tokens_to_remove)  # transformers also counts with tensors
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

        for rows, boundary in restore:
            kept = iter(boundary["tensors"])
            self.memory = choose_rows(rows, next(kept), self.memory)
            for layer in self.layers:
                layer.keys = choose_rows(rows, next(kept), layer.keys)
                layer.values = choose_rows(rows, next(kept), layer.values)
                layer.is_shared = False
            self._pauses = torch.where(rows[:, None], boundary["pauses"], self._pauses)
        self._num_tokens = target
        self._asked = self._said = None
        self._aligned -= count
        for layer in self.layers:
            layer.seq_length -= count
        self._boundaries = [b for b in self._boundaries if bool((b["completes"] & (b["num_tokens"] <= target)).any())]
        self._unread_ids(count)

    def _unread_ids(self, count: int) -> None:
        recent = self._recent_ids
        if self._history is None or recent is None or recent.shape[1] < count:
            self._history, self._recent_ids = None, None
            return
        inverse = torch.tensor(_as_int64(HASH_INVERSE), device=recent.device)
        for column in range(1, count + 1):
            self._history = (self._history - recent[:, -column] - 1) * inverse
        self._recent_ids = recent[:, : recent.shape[1] - count]

    @property
    def chunk_size(self) -> int:
        return self.signature["chunk_size"]

    # Files

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write the state to `save_directory`/baka_cache.safetensors; resuming from it is bit-identical.

        The file appears under its name only when it is complete.
        """
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {
            "memory": self.memory,
            "num_tokens": self._num_tokens,
            "seeded": self._seeded,
            "pauses": self._pauses,
        }
        for index, layer in enumerate(self.layers):
            tensors[f"layers.{index}.keys"] = layer.keys
            tensors[f"layers.{index}.values"] = layer.values
        for name in ("history", "opening", "finished"):
            if getattr(self, f"_{name}") is not None:
                tensors[name] = getattr(self, f"_{name}")
        metadata = {
            "format": "pt",
            "baka_cache_version": str(FORMAT_VERSION),
            "seq_length": str(self.get_seq_length()),
            "aligned": str(self._aligned),
            "is_beam_search": str(int(self._is_beam_search)),
            "config": json.dumps(self.signature, sort_keys=True),
        }
        handle, partial = tempfile.mkstemp(dir=directory, prefix=f".{CACHE_FILE}.")
        os.close(handle)
        try:
            safe_save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, partial, metadata=metadata)
            # A temporary file is its owner's alone; what is kept follows the folder's habits.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(partial, 0o666 & ~umask)
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, directory / CACHE_FILE)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise

    @classmethod
    def from_pretrained(
        cls,
        save_directory: str | os.PathLike,
        config: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "BakaCache":
        """Read a state that `save_pretrained` wrote, by default to the CPU and in the dtype it was saved in.

        Args:
            save_directory: the folder.
            config (`BakaConfig`, *optional*): the configuration the state must fit.
            device, dtype (*optional*): where to, in what precision.

        Raises:
            ValueError: no such file, a damaged or foreign one, a newer format, or another configuration's.
        """
        path = Path(save_directory) / CACHE_FILE
        if not path.is_file():
            raise ValueError(f"expected a saved state at {path}, found no such file.")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                # Copies: what the file maps into memory changes with the file, and lies at odd addresses, where
                # vectorized arithmetic may round otherwise.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
        except Exception as error:
            raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
        version = metadata.get("baka_cache_version", "")
        if not version.isdecimal():
            raise ValueError(f"{path} is a safetensors file but not a saved BakaCache.")
        if int(version) > FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {version}, this code reads up to {FORMAT_VERSION}: upgrade baka-hf."
            )
        cache = cls.__new__(cls)
        try:
            signature = json.loads(metadata["config"])
            if config is not None:
                check_signature(signature, signature_of(config))
            memory = tensors["memory"]
            cache._allocate(signature, memory.shape[0], "meta", memory.dtype)
            cache._load(tensors, metadata)
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{path} is damaged, its header or a tensor is not what was saved: {error}.") from error
        return cache.to(device, dtype)

    def _load(self, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        def take(name: str, like: torch.Tensor) -> torch.Tensor:
            tensor = tensors[name]
            if tensor.shape != like.shape or tensor.is_floating_point() != like.is_floating_point():
                raise ValueError(
                    f"the saved state's {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                    f"expected shape {tuple(like.shape)}."
                )
            return tensor

        self.memory = take("memory", self.memory)
        for index, layer in enumerate(self.layers):
            layer.keys = take(f"layers.{index}.keys", layer.keys)
            layer.values = take(f"layers.{index}.values", layer.values)
            layer.seq_length = int(metadata["seq_length"])
        self._num_tokens = take("num_tokens", self._num_tokens)
        self._seeded = take("seeded", self._seeded)
        self._pauses = take("pauses", self._pauses)
        self._history = take("history", self._num_tokens) if "history" in tensors else None
        opening = self._num_tokens[:, None].expand(-1, OPENING)
        self._opening = take("opening", opening) if "opening" in tensors else None
        self._finished = take("finished", self._seeded) if "finished" in tensors else None
        self._aligned = int(metadata["aligned"])
        self._is_beam_search = bool(int(metadata["is_beam_search"]))


def signature_of(config: Any) -> dict[str, Any]:
    """The fields of a `BakaConfig` that a state depends on."""
    values = {name: getattr(config, name, None) for name in SIGNATURE_FIELDS}
    values["rope_theta"] = float(config.rope_parameters["rope_theta"])
    return values


def check_signature(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise a `ValueError` that names the first field in which a state differs from what a model expects."""
    for name in SIGNATURE_FIELDS:
        if found.get(name) != expected[name]:
            raise ValueError(
                f"the state belongs to another configuration: expected {name}={expected[name]!r}, "
                f"got {found.get(name)!r}."
            )


def hash_tokens(input_ids: torch.Tensor, real: torch.Tensor | None, start: torch.Tensor) -> torch.Tensor:
    """Polynomial hash modulo 2^64 of the tokens of each row where `real` [B, L] is True, going on from `start` [B]."""
    length = input_ids.shape[1]
    if length == 1 and real is None:
        return start * HASH_MULTIPLIER + input_ids[:, 0] + 1
    powers = _hash_powers(length, input_ids.device)
    if real is None:
        return start * powers[length] + ((input_ids + 1) * powers[:length].flip(0)).sum(1)
    after = real.flip(1).cumsum(1).flip(1) - real.long()
    return start * powers[real.sum(1)] + ((input_ids + 1) * real * powers[after]).sum(1)


@lru_cache(maxsize=8)
def _hash_powers(length: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        factors = torch.full((length + 1,), HASH_MULTIPLIER, dtype=torch.int64)
        factors[0] = 1
        return factors.cumprod(0).to(device)


def _as_int64(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


__all__ = ["BakaCache"]
