"""States as files: what they say, what is refused, and that they are written whole or not at all."""

import copy
import json
import os
import pickle
import stat
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    contents,
    every_state,
    forget_and_go_on,
    logits_of,
    random_tokens,
    rows_out_of_phase,
    state_at,
    tiny_config,
    tiny_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from baka_hf import BakaCache, BakaForCausalLM, BakaForSequenceClassification
from baka_hf.state_files_baka import fingerprint_of

FILE = "baka_cache.safetensors"


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stage", ["fresh", "seeded", "mid-chunk", "boundary", "left-padded"])
def test_resume_from_a_file_is_bit_identical(dtype: torch.dtype, stage: str, tmp_path: Path) -> None:
    """Logits and state after resuming equal those of never having stopped; saving changes nothing."""
    model = tiny_model(tiny_config(memory_solidifier="glu"), dtype)
    cache = state_at(model, stage)
    before = contents(cache)
    cache.save_pretrained(tmp_path)
    assert contents(cache) == before
    resumed = BakaCache.from_pretrained(tmp_path)
    assert contents(resumed) == before
    for length in (1, 9, 1):
        tokens = random_tokens(model.config, 2, length, seed=length)
        assert torch.equal(logits_of(model, tokens, resumed), logits_of(model, tokens, cache))
    assert contents(resumed) == contents(cache)


def test_a_memory_that_was_kept_in_less(tmp_path: Path) -> None:
    """A normed memory was in the model's dtype once: such a file goes on as its numbers in float32 do."""
    model = tiny_model(tiny_config(memory_norm=True), torch.bfloat16)
    cache = state_at(model, "mid-chunk")
    cache.memory = cache.memory.bfloat16().float()
    cache.save_pretrained(tmp_path)
    rewritten(tmp_path / FILE, lambda tensors, metadata: tensors.update(memory=tensors["memory"].bfloat16()))
    assert contents(BakaCache.from_pretrained(tmp_path)) == contents(cache)


@every_state
def test_resume_of_every_kind_of_state(overrides: dict[str, Any], tmp_path: Path) -> None:
    """States with little in them (no memory, no keys of a previous chunk) or random pauses are files as well."""
    model = tiny_model(tiny_config(**overrides))
    _, cache = rows_out_of_phase(model, 4, 13)
    model.train()(random_tokens(model.config, 2, 8), cache=cache, use_cache=True)  # where pauses are random
    cache.detach_()
    cache.save_pretrained(str(tmp_path / "deep" / "er"))
    resumed = BakaCache.from_pretrained(str(tmp_path / "deep" / "er"), config=model.config)
    assert contents(resumed) == contents(cache)
    tokens = random_tokens(model.config, 2, 7, seed=7)
    model.eval()
    assert torch.equal(logits_of(model, tokens, resumed), logits_of(model, tokens, cache))


def test_a_resumed_state_has_left_its_file(tmp_path: Path) -> None:
    """Writing over the file in place does not change a state that was read from it."""
    _, path = saved(tmp_path)
    resumed = BakaCache.from_pretrained(tmp_path)
    before = contents(resumed)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert contents(resumed) == before


def test_a_resumed_state_can_go_back(tmp_path: Path) -> None:
    """Within the chunk in progress; what was recorded of earlier ones is not in the file."""
    model = tiny_model(tiny_config())
    tokens = random_tokens(model.config, 1, 13)
    cache = model.new_cache()
    cache.activate_past_recording()
    logits_of(model, tokens, cache)
    cache.save_pretrained(tmp_path)
    forget_and_go_on(model, list(tokens), BakaCache.from_pretrained(tmp_path), 3)
    with pytest.raises(ValueError, match="not recorded"):
        BakaCache.from_pretrained(tmp_path).crop(-4)


def test_resume_in_another_precision(tmp_path: Path) -> None:
    """`dtype` and `device` of from_pretrained; a float64 state read in float32 is that state rounded."""
    model = tiny_model(tiny_config())
    cache = state_at(model, "mid-chunk")
    cache.save_pretrained(tmp_path)
    resumed = BakaCache.from_pretrained(tmp_path, device="cpu", dtype=torch.float32)
    assert contents(resumed) == contents(cache.clone().to(dtype=torch.float32))


def test_a_state_with_a_graph_is_saved(tmp_path: Path) -> None:
    """In the middle of training too; the graph stays usable, the file holds values only."""
    model = tiny_model(tiny_config())
    outputs = model(random_tokens(model.config, 1, 8), use_cache=True)
    outputs.past_key_values.save_pretrained(tmp_path)
    assert contents(BakaCache.from_pretrained(tmp_path)) == contents(outputs.past_key_values)
    outputs.past_key_values.memory.sum().backward()
    assert model.model.embed_tokens.weight.grad.any()


def header_of(path: Path) -> dict[str, Any]:
    """A safetensors header, read by the format's definition: its length in 8 bytes, then JSON."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    assert max(ends) == len(data) - 8 - length  # and nothing behind the tensors
    return header


def test_what_a_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain tensors, with the format's version and the fields of the config in the metadata; nothing is pickled."""
    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    model = tiny_model(tiny_config(memory_solidifier="glu", rope_parameters={"rope_theta": 50.0}))
    state_at(model, "left-padded").save_pretrained(tmp_path)
    BakaCache.from_pretrained(tmp_path)
    header = header_of(tmp_path / FILE)
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "pt" and metadata["baka_cache_version"] == "2"
    assert metadata["digest"] == digest_of(tmp_path / FILE) and "weights" not in metadata
    assert json.loads(metadata["config"]) == dict(
        hidden_size=12,
        num_hidden_layers=2,
        num_key_value_heads=2,
        head_dim=6,
        hidden_act="elephant",
        norm_type="layernorm",
        parallel_residual=True,
        qk_norm=False,
        value_residual=False,
        rope_theta=50.0,
        rope_scaling={"rope_type": "default"},
        chunk_size=5,
        num_memory_tokens=2,
        memory_write="carry",
        memory_update="replace",
        memory_solidifier="glu",
        separate_solidifiers=False,
        memory_norm=False,
        associative_dim=0,
        associative_write="memory",
        associative_gate="sigmoid",
        associative_layer_interval=1,
        num_associative_heads=0,
        num_pause_tokens=2,
        pause_placement="fixed",
        use_xl_cache=True,
    )
    layers = {f"layers.{layer}.{name}" for layer in (0, 1) for name in ("keys", "values")}
    assert {"memory", "num_tokens", *layers} <= header.keys()
    assert header["memory"]["dtype"] == "F64" and header["memory"]["shape"] == [2, 2, 12]
    assert header["layers.1.keys"]["shape"] == [2, 2, 2 * (2 + 5 + 2 + 2), 6]
    assert header["history"]["dtype"] == "I64" and header["history"]["shape"] == [2, 3]
    # By the format's rules: other programs read it, and find each tensor where its kind may lie.
    assert load_file(tmp_path / FILE).keys() == header.keys()
    sizes = {"F64": 8, "I64": 8, "BOOL": 1}
    for tensor in header.values():
        assert tensor["data_offsets"][0] % sizes[tensor["dtype"]] == 0


def saved(directory: Path) -> tuple[BakaForCausalLM, Path]:
    model = tiny_model(tiny_config())
    state_at(model, "mid-chunk").save_pretrained(directory)
    return model, directory / FILE


def digest_of(path: Path) -> str:
    """SHA-256 of the file with 64 zeros in the place of the digest."""
    digest = header_of(path)["__metadata__"]["digest"]
    return sha256(path.read_bytes().replace(digest.encode(), b"0" * 64)).hexdigest()


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    """The file again, after `change` of its tensors and metadata, with a digest that is right."""
    tensors, metadata = load_file(path), header_of(path)["__metadata__"]
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    old, new = metadata["digest"], digest_of(path)
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))


def test_a_file_that_was_written_again_as_it_was(tmp_path: Path) -> None:
    """What other tests change is all that is refused."""
    _, path = saved(tmp_path)
    before = contents(BakaCache.from_pretrained(tmp_path))
    rewritten(path, lambda tensors, metadata: None)
    assert contents(BakaCache.from_pretrained(tmp_path)) == before


def test_a_file_written_before_there_was_a_choice(tmp_path: Path) -> None:
    """It lacks fields that came later, and is a state of what models were then; of no others."""
    model, path = saved(tmp_path)
    later = ("memory_update", "norm_type", "parallel_residual", "qk_norm", "value_residual", "rope_scaling")

    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        fields = json.loads(metadata["config"])
        metadata["config"] = json.dumps({name: value for name, value in fields.items() if name not in later})

    rewritten(path, change)
    assert BakaCache.from_pretrained(tmp_path, config=model.config).signature == model.new_cache().signature
    other = tiny_config(norm_type="rmsnorm")
    with pytest.raises(ValueError, match="expected norm_type='rmsnorm', got 'layernorm'"):
        BakaCache.from_pretrained(tmp_path, config=other)


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    """Wherever it is: the length of the header, the header, the spaces behind it, or a tensor."""
    _, path = saved(tmp_path)
    data = path.read_bytes()
    generator, header = torch.Generator().manual_seed(0), 8 + int.from_bytes(data[:8], "little")
    everywhere = torch.randint(8 * len(data), (900,), generator=generator)
    within = torch.randint(8 * header, (600,), generator=generator)
    with open(path, "r+b", buffering=0) as file:
        for bit in [*everywhere.tolist(), *within.tolist()]:
            byte = data[bit // 8]
            for value in (byte ^ 1 << bit % 8, byte):
                file.seek(bit // 8)
                file.write(bytes([value]))
                if value != byte:
                    with pytest.raises(ValueError):
                        BakaCache.from_pretrained(tmp_path)
    BakaCache.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "claim", [dict(num_hidden_layers=10**6), dict(num_hidden_layers=10**30), dict(chunk_size=10**15)], ids=str
)
def test_a_file_that_claims_much_is_refused_at_once(claim: dict[str, int], tmp_path: Path) -> None:
    """Its tensors are compared with what it claims before there is a list of so many, or room for one so large."""
    _, path = saved(tmp_path)

    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | claim)

    rewritten(path, change)
    before = time.perf_counter()
    with pytest.raises(ValueError, match="is damaged"):
        BakaCache.from_pretrained(tmp_path)
    assert time.perf_counter() - before < 0.1


def test_a_header_that_claims_many_rows_is_refused_at_once(tmp_path: Path) -> None:
    """All of it fits together, but for the size of the file."""
    _, path = saved(tmp_path)
    header = header_of(path)
    for name in header.keys() - {"__metadata__"}:
        header[name]["shape"][0] *= 10**12
        header[name]["data_offsets"] = [10**12 * offset for offset in header[name]["data_offsets"]]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(1000))
    with pytest.raises(ValueError, match=r"is damaged, .* bytes, expected 1000"):
        BakaCache.from_pretrained(tmp_path)


def tensors_with(**changed: Any) -> Callable:
    return lambda tensors, metadata: tensors.update({key: change(tensors[key]) for key, change in changed.items()})


def numbers_with(**changed: Any) -> Callable:
    return lambda tensors, metadata: metadata.update({name: str(value) for name, value in changed.items()})


NONSENSE = {
    "negative counts": tensors_with(num_tokens=lambda t: t - 13),
    "more tokens than positions": tensors_with(num_tokens=lambda t: t + 1),
    "less tokens than can be cropped": tensors_with(num_tokens=lambda t: t - 1),
    "counts of another dtype": tensors_with(num_tokens=lambda t: t.int()),
    "pauses behind the chunk": tensors_with(pauses=lambda t: t + 3),
    "pauses before the chunk": tensors_with(pauses=lambda t: t - 1),
    "seeded as numbers": tensors_with(seeded=lambda t: t.long()),
    "seeded neither true nor false": tensors_with(
        seeded=lambda t: torch.full((2,), 2, dtype=torch.uint8).view(t.dtype)
    ),
    "a negative history": tensors_with(history=lambda t: -1 - t),
    "a history of 64 bits": tensors_with(history=lambda t: t + 2**40),
    "an old history": tensors_with(history=lambda t: t[:, 0].clone()),
    "a memory of integers": tensors_with(memory=lambda t: t.long()),
    "keys of eight bits": tensors_with(**{"layers.0.keys": lambda t: t.to(torch.float8_e4m3fn)}),
    "no rows": lambda tensors, metadata: tensors.update({name: tensor[:0] for name, tensor in tensors.items()}),
    "a tensor more": lambda tensors, metadata: tensors.update({"layers.2.keys": tensors["layers.1.keys"].clone()}),
    "a length with a sign": numbers_with(seq_length="+12"),
    "a length that is a fraction": numbers_with(seq_length=12.5),
    "too few positions": numbers_with(seq_length=11),
    "more to crop than was read": numbers_with(aligned=13),
    "a flag of two": numbers_with(is_beam_search=2),
    "no layers": numbers_with(config='{"num_hidden_layers": 0}'),
    "nested without end": numbers_with(config="[" * 100_000),
}


@pytest.mark.parametrize("change", NONSENSE.values(), ids=NONSENSE)
def test_refuses_what_no_reading_leads_to(change: Callable, tmp_path: Path) -> None:
    """Dtypes, shapes and ranges, though the digest is right."""
    _, path = saved(tmp_path)
    rewritten(path, change)
    with pytest.raises(ValueError, match="is damaged"):
        BakaCache.from_pretrained(tmp_path)


def first_format(path: Path, state: BakaCache, **metadata: str) -> None:
    """`state` as a file of format 1, byte for byte by its definition: no digest, and a history of one number a row."""
    tensors = {"memory": state.memory, "num_tokens": state.num_tokens, "pauses": torch.tensor([[0, 2]] * 2)}
    tensors |= {
        f"layers.{i}.{name}": getattr(x, name) for i, x in enumerate(state.layers) for name in ("keys", "values")
    }
    tensors |= {"history": torch.tensor([-3, 2**62]), "seeded": torch.tensor([False, False])}
    names = {torch.float64: "F64", torch.int64: "I64", torch.bool: "BOOL"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "baka_cache_version": "1", **metadata}}
    data = b""
    for name, tensor in tensors.items():
        end = len(data) + tensor.nbytes
        header[name] = dict(dtype=names[tensor.dtype], shape=list(tensor.shape), data_offsets=[len(data), end])
        data += tensor.contiguous().numpy().tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_a_file_of_the_first_format(tmp_path: Path) -> None:
    """It loads, bit for bit; but what its rows have read is not known any more, so a whole history is refused."""
    model = tiny_model(tiny_config())
    tokens, cache = random_tokens(model.config, 2, 15), model.new_cache(2)
    logits_of(model, tokens[:, :12], cache)
    numbers = dict(seq_length="12", aligned="12", is_beam_search="0", config=json.dumps(cache.signature))
    first_format(tmp_path / FILE, cache, **numbers)
    resumed = BakaCache.from_pretrained(tmp_path, config=model.config)
    cache._history = cache._opening = None
    assert contents(resumed) == contents(cache)
    with pytest.raises(ValueError, match="not what the state has read"):
        model.generate(tokens, cache=resumed.clone(), max_new_tokens=1)
    resumed.save_pretrained(tmp_path)  # in the format of today
    assert contents(BakaCache.from_pretrained(tmp_path)) == contents(cache)
    first_format(tmp_path / FILE, cache, **numbers | dict(aligned="13"))
    with pytest.raises(ValueError, match="is damaged"):
        BakaCache.from_pretrained(tmp_path)


def test_refuses_a_missing_file(tmp_path: Path) -> None:
    """The message names the path that was looked for."""
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"expected a saved state at .*{FILE}, found no such file"):
            BakaCache.from_pretrained(directory)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_refuses_a_truncated_file(kept: int, tmp_path: Path) -> None:
    """Wherever it was cut off."""
    _, path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="is damaged"):
        BakaCache.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content", [bytes(range(256)) * 40, b"{}", pickle.dumps({"memory": 0}), b"\2" + bytes(7) + b"[]"]
)
def test_refuses_random_bytes(content: bytes, tmp_path: Path) -> None:
    """Anything else that stands under the name, a pickle too."""
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        BakaCache.from_pretrained(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"baka_cache_version": "new"}], ids=str)
def test_refuses_foreign_tensors(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    """A safetensors file that is no state, for instance a model's weights."""
    save_file({"memory": torch.zeros(1, 2, 12)}, tmp_path / FILE, metadata)
    with pytest.raises(ValueError, match="is a safetensors file but not a saved BakaCache"):
        BakaCache.from_pretrained(tmp_path)


def test_refuses_a_newer_format(tmp_path: Path) -> None:
    """A file from the future says so, and what to do."""
    _, path = saved(tmp_path)
    rewritten(path, lambda tensors, metadata: metadata.update(baka_cache_version="3"))
    with pytest.raises(ValueError, match="format version 3, this code reads 1 and 2: upgrade baka-hf"):
        BakaCache.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["memory", "num_tokens", "layers.0.keys", "layers.1.values"])
def test_refuses_a_file_without_one_of_its_tensors(name: str, tmp_path: Path) -> None:
    """The message names the tensor."""
    _, path = saved(tmp_path)
    rewritten(path, lambda tensors, metadata: tensors.pop(name))
    with pytest.raises(ValueError, match=f"is damaged, .*'{name}'"):
        BakaCache.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["memory", "num_tokens", "layers.0.keys", "layers.1.values"])
def test_refuses_tensors_of_another_shape(name: str, tmp_path: Path) -> None:
    """A state that would not fit its own metadata."""
    _, path = saved(tmp_path)
    rewritten(path, lambda tensors, metadata: tensors.update({name: torch.cat([tensors[name]] * 2, dim=-1)}))
    with pytest.raises(ValueError, match=f"is damaged, .*the state's {name} is "):
        BakaCache.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config", "seq_length", "aligned"])
@pytest.mark.parametrize("value", [None, "?", "[]"])
def test_refuses_metadata_that_is_damaged(name: str, value: str | None, tmp_path: Path) -> None:
    """Missing or nonsensical: a ValueError, no other error."""
    _, path = saved(tmp_path)

    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        metadata.pop(name)
        if value is not None:
            metadata[name] = value

    rewritten(path, change)
    with pytest.raises(ValueError):
        BakaCache.from_pretrained(tmp_path)


def test_refuses_another_configs_state(tmp_path: Path) -> None:
    """With `config`, when reading the file; without, when the state is used. The message names the field."""
    model, _ = saved(tmp_path)
    other = tiny_model(tiny_config(chunk_size=6))
    assert BakaCache.from_pretrained(tmp_path, config=model.config).batch_size == 2
    with pytest.raises(ValueError, match="another configuration: expected chunk_size=6, got 5"):
        BakaCache.from_pretrained(tmp_path, config=other.config)
    with pytest.raises(ValueError, match="another configuration: expected chunk_size=6, got 5"):
        logits_of(other, torch.ones(2, 1, dtype=torch.int64), BakaCache.from_pretrained(tmp_path))


def no_space(*arguments: Any) -> None:
    raise OSError("no space left on device")


def interrupted(*paths: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("crash", ["while writing", "before renaming"])
def test_a_crash_leaves_the_old_file(crash: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the final name stands the old state or the new one, whole; and nothing else is left lying about."""
    model, path = saved(tmp_path)
    old = path.read_bytes()
    cache = BakaCache.from_pretrained(tmp_path)
    logits_of(model, random_tokens(model.config, 2, 4), cache)
    with monkeypatch.context() as patch:
        if crash == "while writing":
            patch.setattr(os, "fsync", no_space)
        else:
            patch.setattr(os, "replace", interrupted)
        with pytest.raises((OSError, KeyboardInterrupt)):
            cache.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == [FILE] and path.read_bytes() == old
    cache.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == [FILE] and contents(BakaCache.from_pretrained(tmp_path)) == contents(cache)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX systems")
def test_a_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    """Not those of the temporary file it was written as: whoever may read the folder may read the state."""
    _, path = saved(tmp_path)
    other = tmp_path / "other"
    other.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_the_mask_of_the_process_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can only be asked for by setting it, for all threads."""
    monkeypatch.setattr(os, "umask", None)
    saved(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX systems")
def test_partial_files_of_killed_writers_go(tmp_path: Path) -> None:
    """The next save removes them, and none that is being written, or about to be."""
    fcntl = pytest.importorskip("fcntl")
    _, path = saved(tmp_path)
    left, busy, new, foreign = (tmp_path / f".{FILE}.{name}" for name in ("a8fk2_x1", "b" * 16, "c" * 16, "d" * 16))
    for partial in (left, busy):
        partial.write_bytes(b"half")
    new.touch()
    foreign.mkdir()  # whatever that is
    with open(busy, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        saved(tmp_path)
        assert set(os.listdir(tmp_path)) == {path.name, busy.name, new.name, foreign.name}
    saved(tmp_path)
    assert set(os.listdir(tmp_path)) == {path.name, new.name, foreign.name}


def test_writers_side_by_side(tmp_path: Path) -> None:
    """None takes another's partial file for one that was left; what stands there in the end is one of their states."""
    model = tiny_model(tiny_config())
    states = [model.new_cache() for _ in range(4)]
    for seed, state in enumerate(states):
        logits_of(model, random_tokens(model.config, 1, 5 + seed), state)

    def save(state: BakaCache) -> None:
        for _ in range(20):
            state.save_pretrained(tmp_path)
            BakaCache.from_pretrained(tmp_path)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(save, states))
    assert os.listdir(tmp_path) == [FILE]
    assert contents(BakaCache.from_pretrained(tmp_path)) in [contents(state) for state in states]


def test_a_share_of_a_state_is_not_written(tmp_path: Path) -> None:
    """A tensor parallel process has some of the heads: nobody could read such a file again."""
    cache = tiny_model(tiny_config()).new_cache()
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :1], layer.values[:, :1]
    with pytest.raises(
        ValueError, match=r"layers.0.keys is torch.float64 \[1, 1, 22, 6\], expected .* \[1, 2, 22, 6\]"
    ):
        cache.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == []


def test_what_a_dtype_should_be_is_said_once(tmp_path: Path) -> None:
    cache = tiny_model(tiny_config()).new_cache()
    cache._num_tokens = cache._num_tokens.int()
    with pytest.raises(ValueError, match=r"num_tokens is torch.int32 \[1\], expected torch.int64 \[1\]"):
        cache.save_pretrained(tmp_path)


# Whose weights


def test_a_state_of_other_weights(tmp_path: Path) -> None:
    """Asked for, a fingerprint tells one changed weight of the decoder, whatever the head."""
    model = tiny_model(tiny_config())
    cache = state_at(model, "mid-chunk")
    cache.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not say which weights read it"):
        BakaCache.from_pretrained(tmp_path, model=model)
    cache.save_pretrained(tmp_path, model=model)
    model.lm_head.weight.data.zero_()  # has no part in a state
    for reader in (model, model.model, BakaForSequenceClassification(model.config)):
        reader.base_model.load_state_dict(model.model.state_dict())
        assert contents(BakaCache.from_pretrained(tmp_path, model=reader)) == contents(cache)
    model.model.layers[1].mlp.up_proj.weight.data[3, 2] += 0.01
    with pytest.raises(ValueError, match="read by other weights"):
        BakaCache.from_pretrained(tmp_path, model=model)
    with pytest.raises(ValueError, match="another configuration: expected chunk_size=6, got 5"):
        BakaCache.from_pretrained(tmp_path, model=tiny_model(tiny_config(chunk_size=6)))
    assert BakaCache.from_pretrained(tmp_path).batch_size == 2  # nobody asked


def test_a_fingerprint_is_that_of_the_checkpoint() -> None:
    """In float32 and bfloat16 alike, as one would load it; and another for every change of names, shapes or places."""
    model = tiny_model(tiny_config(), torch.float32)
    fingerprint = fingerprint_of(model)
    assert len(fingerprint) == 64 and fingerprint_of(copy.deepcopy(model).to(torch.bfloat16)) == fingerprint
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.roll(1, 0)
    assert fingerprint_of(model) != fingerprint
    weight.data = weight.data.roll(-1, 0)
    assert fingerprint_of(model) == fingerprint


def offloaded(model: BakaForCausalLM) -> None:
    model.model.norm.to("meta")


def quantized(model: BakaForCausalLM) -> None:
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.data.to(torch.int8), requires_grad=False)


def a_share(model: BakaForCausalLM) -> None:
    model._tp_size = 2


@pytest.mark.parametrize("made", [offloaded, quantized, a_share], ids=lambda f: f.__name__)
def test_weights_without_a_fingerprint(made: Callable, tmp_path: Path) -> None:
    """Their values are not at hand: a `ValueError`, and no file."""
    model = tiny_model(tiny_config())
    cache = model.new_cache()
    made(model)
    with pytest.raises(ValueError, match="to take a fingerprint of"):
        cache.save_pretrained(tmp_path, model=model)
    assert os.listdir(tmp_path) == []
