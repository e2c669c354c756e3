"""What a state holds, which configurations share states, and the file that keeps one.

The file is in the safetensors format: names and shapes are those of `tensors_held` and `rows_known`, and the metadata
has the numbers, the configuration's part in it and a digest of the whole file. It is read by hand, so that nothing is
believed, or room made for, before it was checked, and nothing is used but the bytes that the digest was taken of.
How a state changes is never in here.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import nn

from .associative_baka import associations_held, associative_layers
from .memory_baka import MEMORY_UPDATES, Held, memory_held

try:
    import fcntl
except ImportError:  # Windows, where partial files of killed writers are left to their owner
    fcntl = None  # type: ignore[assignment]

CACHE_FILE = "baka_cache.safetensors"

# Version 1 has no digest, and its history is a hash that is not used any more: such a state's history is unknown.
FORMAT_VERSION = 2
VERSIONS = ("1", "2")

DIGEST_LENGTH = 64  # of SHA-256 in hexadecimal digits
UNSIGNED = "0" * DIGEST_LENGTH  # what stands in the digest's place while it is taken
MAX_HEADER = 2**22  # bytes; a layer takes some 250

# What two configurations must share for one to go on from the other's state, and what kind of value it is.
SIGNATURE_FIELDS: dict[str, type] = {
    "hidden_size": int,
    "num_hidden_layers": int,
    "num_key_value_heads": int,
    "head_dim": int,
    "hidden_act": str,
    "norm_type": str,
    "parallel_residual": bool,
    "qk_norm": bool,
    "value_residual": bool,
    "rope_theta": float,
    "rope_scaling": dict,
    "chunk_size": int,
    "num_memory_tokens": int,
    "memory_write": str,
    "memory_update": str,
    "memory_solidifier": str,
    "separate_solidifiers": bool,
    "memory_norm": bool,
    "associative_dim": int,
    "associative_write": str,
    "associative_gate": str,
    "associative_layer_interval": int,
    "num_associative_heads": int,
    "num_pause_tokens": int,
    "pause_placement": str,
    "use_xl_cache": bool,
}
# What a file means that lacks a field, for it was written before there was a choice.
ORIGINALLY = {
    "memory_update": "replace",
    "associative_dim": 0,
    "associative_write": "memory",
    "associative_gate": "sigmoid",
    "associative_layer_interval": 1,
    "num_associative_heads": 0,
    "norm_type": "layernorm",
    "parallel_residual": True,
    "qk_norm": False,
    "value_residual": False,
    "rope_scaling": {"rope_type": "default"},
}
MAY_BE_ZERO = ("num_memory_tokens", "num_pause_tokens", "associative_dim", "num_associative_heads")

NUM_HASHES = 3  # numbers that stand for what a row has read, see `hash_tokens`
OPENING = 32  # first ids of a row's text that are kept: `generate` tells by them a text that begins again

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = tuple(dtype for dtype in NAMES if dtype.is_floating_point)
OPTIONAL = {"history", "opening", "finished"}  # unknown, or nothing to say


class SavedState(NamedTuple):
    """All of a state that a file keeps."""

    signature: dict[str, Any]
    tensors: dict[str, torch.Tensor]  # those of `tensors_held`
    rows: dict[str, torch.Tensor]  # those of `rows_known`
    seq_length: int  # positions fed
    aligned: int  # trailing positions at which every row took a token
    is_beam_search: int  # 0 or 1


# What a state is


def signature_of(config: Any) -> dict[str, Any]:
    """The fields of a `BakaConfig` that a state depends on.

    Biases are not among them: a bias of zero changes nothing, and what weights a state is of, its signature never says.
    """
    fields = vars(config)  # a config is slow to ask, and every token asks
    values = {name: fields[name] if name in fields else getattr(config, name, None) for name in SIGNATURE_FIELDS}
    rope_type, values["rope_theta"], scaling = config.rope
    return values | {"rope_scaling": {"rope_type": rope_type, **scaling}}


def check_state(name: str, state: Any) -> None:
    """Raise a `ValueError` if what is named so is no state.

    By its own account, not by isinstance: a checkpoint's remote code has a class of its own.
    """
    if getattr(state, "signature", None) is None or not hasattr(state, "memory"):
        raise ValueError(f"expected {name} to be a BakaCache (see `new_cache`), got {type(state).__name__}.")


def check_signature(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise a `ValueError` that names the first field in which a state differs from what a model expects."""
    for name in SIGNATURE_FIELDS:
        if found.get(name) != expected[name]:
            raise ValueError(
                f"the state belongs to another configuration: expected {name}={expected[name]!r}, "
                f"got {found.get(name)!r}."
            )


def tensors_held(signature: dict[str, Any]) -> dict[str, Held]:
    """What the recurrent state of a configuration with this signature holds: floating tensors, all zero at first.

    What its memory declares, "memory" [B, R, D] first, associations, and of each block "layers.0.keys" and
    "layers.0.values" [B, H_kv, 2S, head_dim] (S slots without the XL cache). Where tokens write associations, also
    "layers.0.inputs" [B, n, D]: what of the chunk in progress will be written. It is the one list: states are made by
    it, and files are checked by it.
    """
    memories = signature["num_memory_tokens"]
    stream_length = 2 * memories + signature["chunk_size"] + signature["num_pause_tokens"]
    slots = stream_length * (2 if signature["use_xl_cache"] else 1)
    config = SimpleNamespace(**signature)
    held = memory_held(config) | associations_held(config)
    for layer in range(signature["num_hidden_layers"]):
        for name in ("keys", "values"):
            shape = (signature["num_key_value_heads"], slots, signature["head_dim"])
            held[f"layers.{layer}.{name}"] = Held(shape)
    for layer in associative_layers(config) if config.num_associative_heads else ():
        held[f"layers.{layer}.inputs"] = Held((config.chunk_size, config.hidden_size))
    return held


def rows_known(signature: dict[str, Any]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What is known of each row beside that, counts, flags and hashes of what it has read: dtype, and shape of one."""
    return {
        "num_tokens": (torch.int64, ()),
        "seeded": (torch.bool, ()),
        "pauses": (torch.int64, (signature["num_pause_tokens"],)),
        "history": (torch.int64, (NUM_HASHES,)),
        "opening": (torch.int64, (OPENING,)),
        "finished": (torch.bool, ()),
    }


def fingerprint_of(model: Any) -> str:
    """A SHA-256 of the weights that make a state, those of the decoder: names, shapes and values rounded to bfloat16.

    It is the same on any device, for a model with any head, and for a checkpoint in float32 or bfloat16 loaded in
    either. float16 and float64 are rounded otherwise on the way, so these count as other weights. All weights are read
    once.

    Raises:
        ValueError: a weight is not here as a whole (offloaded, sharded) or not a plain number (quantized).
    """
    if getattr(model, "tp_size", None) not in (None, 1):
        raise ValueError(f"expected whole weights to take a fingerprint of, got a share of {model.tp_size} processes.")
    digest = sha256()
    for name, weight in sorted(model.get_decoder().named_parameters()):
        if type(weight) is not nn.Parameter or weight.is_meta or not weight.is_floating_point():
            raise ValueError(
                "expected whole, plain weights to take a fingerprint of (not offloaded, sharded or quantized), got "
                f"{name} as {type(weight).__name__} of {weight.dtype} on {weight.device}."
            )
        digest.update(f"{name} {list(weight.shape)}\n".encode())
        digest.update(_bytes_of(weight.detach().to(torch.bfloat16).cpu().contiguous()))
    return digest.hexdigest()


# Writing


def write_state(directory: Path, state: SavedState, fingerprint: str | None) -> None:
    """Write `state` to `directory`/baka_cache.safetensors, whole or not at all.

    Raises:
        ValueError: it could not be read again: it is the share of one of several tensor parallel processes.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in (state.tensors | state.rows).items()}
    batch_size = len(state.rows["num_tokens"])
    expected = _expected_of(state.signature, batch_size, str(FORMAT_VERSION))
    _check_layout({name: (t.dtype, list(t.shape)) for name, t in tensors.items()}, expected)
    _check_ranges(state)
    metadata = {
        "digest": UNSIGNED,
        "format": "pt",
        "baka_cache_version": str(FORMAT_VERSION),
        "seq_length": str(state.seq_length),
        "aligned": str(state.aligned),
        "is_beam_search": str(int(state.is_beam_search)),
        "config": json.dumps(state.signature, sort_keys=True),
    }
    if fingerprint is not None:
        metadata["weights"] = fingerprint
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())  # so that all are aligned
    for name in names:
        dtype, shape, size = NAMES[tensors[name].dtype], list(tensors[name].shape), tensors[name].nbytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header)
    text += " " * (-len(text) % 8)
    start, parts = len(text).to_bytes(8, "little"), [_bytes_of(tensors[name]) for name in names]
    digest = _digest_of(start, text.encode(), *parts)
    directory.mkdir(parents=True, exist_ok=True)
    _replace_file(directory / CACHE_FILE, start, text.replace(UNSIGNED, digest, 1).encode(), *parts)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, to be read or written."""
    return tensor.flatten().view(torch.uint8).numpy().data


def _digest_of(*parts: bytes | memoryview) -> str:
    digest = sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _replace_file(path: Path, *parts: bytes | memoryview) -> None:
    """Put `parts` under the name `path`, where the old content stands or all of the new, whenever a writer is killed.

    A writer holds a lock on its partial file before there is anything in it. So one that is not empty and not locked
    was left by a writer that was killed.
    """
    if fcntl is not None:
        for leftover in path.parent.glob(f".{path.name}.*"):
            with suppress(OSError), open(leftover, "r+b") as file:  # locked, gone by now, or another user's
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file.fileno()).st_size:
                    leftover.unlink()
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(partial, "xb") as file:
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks, on which nobody takes this one for left over
                    fcntl.flock(file, fcntl.LOCK_EX)
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows gives no open file another name
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


# Reading


def read_state(path: Path, check: Callable[[dict[str, Any], str | None], None]) -> SavedState:
    """Read what `write_state` wrote, to the CPU.

    Args:
        path: the file.
        check: is called with the signature, and with the fingerprint of the weights if there is one, before tensors are
            read, to raise a `ValueError` if the state is another's.

    Raises:
        ValueError: no such file, a damaged or foreign one, or another version's.
    """
    if not path.is_file():
        raise ValueError(f"expected a saved state at {path}, found no such file.")
    with open(path, "rb") as file:
        with _naming(path, "is damaged or not a safetensors file"):
            start, text, header = _read_header(file)
        metadata = header.pop("__metadata__", None)
        version = metadata.get("baka_cache_version") if isinstance(metadata, dict) else None
        if not isinstance(version, str) or not version.isdecimal():
            raise ValueError(f"{path} is a safetensors file but not a saved BakaCache.")
        if version not in VERSIONS:
            advice = "upgrade baka-hf" if int(version) > FORMAT_VERSION else "it is damaged"
            raise ValueError(
                f"{path} has format version {version}, this code reads {' and '.join(VERSIONS)}: {advice}."
            )
        with _naming(path, "is damaged, its header or a tensor is not what was saved"):
            signature = _signature_in(metadata)
        if signature["memory_update"] not in MEMORY_UPDATES:
            raise ValueError(
                f"{path} has the state of a memory_update that is not here: {signature['memory_update']!r}. "
                "Import the file that registers it before."
            )
        check(signature, metadata.get("weights"))
        with _naming(path, "is damaged, its header or a tensor is not what was saved"):
            numbers = [_number_in(metadata, name) for name in ("seq_length", "aligned", "is_beam_search")]
            tensors = _make_room(signature, header, version, os.fstat(file.fileno()).st_size - file.tell())
            for name, tensor in tensors.items():
                if file.readinto(_bytes_of(tensor)) != tensor.nbytes:
                    raise ValueError(f"it ends within {name}")
            if version != "1" or "digest" in metadata:
                digest = metadata["digest"]
                unsigned = text.replace(digest.encode(), UNSIGNED.encode(), 1)
                if _digest_of(start, unsigned, *map(_bytes_of, tensors.values())) != digest:
                    raise ValueError("its digest is another")
            if version == "1":
                tensors.pop("history", None)
            rows = {name: tensors.pop(name) for name in rows_known(signature) if name in tensors}
            held = tensors_held(signature)  # what it keeps in float32 may have been kept in less before
            tensors = {name: tensor.to(held[name].dtype_in(tensor.dtype)) for name, tensor in tensors.items()}
            state = SavedState(signature, tensors, rows, *numbers)
            _check_ranges(state)
    return state


@contextmanager
def _naming(path: Path, trouble: str) -> Iterator[None]:
    """Whatever a file with nonsense in it makes checks trip over becomes a `ValueError` that names the file."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} {trouble}: {error}.") from error


def _read_header(file: BinaryIO) -> tuple[bytes, bytes, dict[str, Any]]:
    """The length of the header in 8 bytes, the header, and what it says."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > MAX_HEADER:
        raise ValueError(f"expected a header of at most {MAX_HEADER} bytes, got {length}")
    text = file.read(length)
    header = json.loads(text)
    if len(text) < length or not isinstance(header, dict):
        raise ValueError("expected a header that is an object")
    return start, text, header


def _signature_in(metadata: dict[str, Any]) -> dict[str, Any]:
    found = ORIGINALLY | json.loads(metadata["config"])
    signature: dict[str, Any] = {name: found[name] for name in SIGNATURE_FIELDS}
    for name, value in signature.items():
        if type(value) is not SIGNATURE_FIELDS[name] or (type(value) is int and value < (name not in MAY_BE_ZERO)):
            raise ValueError(f"{name} is {value!r}")
    return signature


def _number_in(metadata: dict[str, Any], name: str) -> int:
    text = metadata[name]
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{name} is {text!r}")
    return int(text)


def _make_room(signature: dict[str, Any], header: dict[str, Any], version: str, size: int) -> dict[str, torch.Tensor]:
    """Empty tensors for what a file of this header holds in `size` bytes, one after the other, once all is checked."""
    if signature["num_hidden_layers"] > len(header):  # or else a list of so many shapes could be long
        raise ValueError(f"it holds {len(header)} tensors for {signature['num_hidden_layers']} layers")
    batch_size = header["memory"]["shape"][0]
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"its batch size is {batch_size!r}")
    expected = _expected_of(signature, batch_size, version)
    found = {name: (DTYPES[entry["dtype"]], entry["shape"]) for name, entry in header.items()}
    _check_layout(found, expected)
    names, offset = sorted(header, key=lambda name: header[name]["data_offsets"]), 0
    for name in names:
        stop = offset + prod(expected[name][1]) * found[name][0].itemsize
        if header[name]["data_offsets"] != [offset, stop]:
            raise ValueError(f"{name} lies at {header[name]['data_offsets']}, expected {[offset, stop]}")
        offset = stop
    if offset != size:
        raise ValueError(f"its tensors take {offset} bytes, expected {size}")
    return {name: torch.empty(expected[name][1], dtype=found[name][0], device="cpu") for name in names}


def _expected_of(signature: dict[str, Any], batch_size: int, version: str) -> dict[str, Any]:
    """What a file of `version` may hold: of each tensor the dtypes it may have, and its shape."""
    expected: dict[str, Any] = {}
    for name, held in tensors_held(signature).items():
        expected[name] = set(FLOATS), [batch_size, *held.shape]
    for name, (dtype, shape) in rows_known(signature).items():
        expected[name] = {dtype}, [batch_size, *shape]
    if version == "1":
        expected["history"] = {torch.int64}, [batch_size]
    return expected


def _check_layout(found: dict[str, tuple[torch.dtype, Any]], expected: dict[str, Any]) -> None:
    """Raise a `ValueError` if tensors of these dtypes and shapes are not those of a state."""
    for name in expected.keys() - OPTIONAL - found.keys() or found.keys() - expected.keys():
        raise ValueError(f"expected the tensors of a state, got {'no' if name in expected else 'also'} {name!r}")
    for name, (dtype, shape) in found.items():
        dtypes, right = expected[name]
        if dtype not in dtypes or shape != right:
            names = " or ".join(str(each) for each in NAMES if each in dtypes)
            raise ValueError(f"the state's {name} is {dtype} {shape}, expected {names} {right}")


def _check_ranges(state: SavedState) -> None:
    """Raise a `ValueError` if a number is not one that reading a text can lead to."""
    num_tokens, pauses = state.rows["num_tokens"], state.rows["pauses"]
    least, most = int(num_tokens.min()), int(num_tokens.max())
    if least < 0 or most > state.seq_length:
        raise ValueError(f"its rows have read {num_tokens.tolist()} tokens at {state.seq_length} positions")
    if not 0 <= state.aligned <= least:
        raise ValueError(f"aligned is {state.aligned} where a row has read {least} tokens")
    if state.is_beam_search not in (0, 1):
        raise ValueError(f"is_beam_search is {state.is_beam_search}")
    if bool((pauses < 0).any()) or bool((pauses >= state.signature["chunk_size"]).any()):
        raise ValueError(f"its pauses stand at {pauses.tolist()}")
    history = state.rows.get("history")
    if history is not None and (bool((history < 0).any()) or bool((history >= 2**31).any())):
        raise ValueError(f"its history is {history.tolist()}")
    for name in ("seeded", "finished"):
        if name in state.rows and bool((state.rows[name].view(torch.uint8) > 1).any()):
            raise ValueError(f"{name} is not true or false in every row")
