"""States as files: what they say, what is refused, and that they are written whole or not at all."""

import json
import os
import pickle
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_tokens, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from test_cache import contents, every_state, forget_and_go_on, logits_of, rows_out_of_phase, state_at
from torch import Tensor

from baka_hf import BakaCache, BakaForCausalLM

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


@every_state
def test_resume_of_every_kind_of_state(overrides: dict[str, Any], tmp_path: Path) -> None:
    """States with little in them (no memory, no keys of a previous chunk) or random pauses are files as well."""
    model = tiny_model(tiny_config(**overrides))
    model.train()  # where pauses are random
    _, cache = rows_out_of_phase(model, 4, 13)
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
    assert metadata["format"] == "pt" and metadata["baka_cache_version"] == "1"
    assert json.loads(metadata["config"]) == dict(
        hidden_size=12,
        num_hidden_layers=2,
        num_key_value_heads=2,
        head_dim=6,
        hidden_act="elephant",
        rope_theta=50.0,
        chunk_size=5,
        num_memory_tokens=2,
        memory_write="carry",
        memory_solidifier="glu",
        separate_solidifiers=False,
        memory_norm=False,
        num_pause_tokens=2,
        pause_placement="fixed",
        use_xl_cache=True,
    )
    layers = {f"layers.{layer}.{name}" for layer in (0, 1) for name in ("keys", "values")}
    assert {"memory", "num_tokens", *layers} <= header.keys()
    assert header["memory"]["dtype"] == "F64" and header["memory"]["shape"] == [2, 2, 12]
    assert header["layers.1.keys"]["shape"] == [2, 2, 2 * (2 + 5 + 2 + 2), 6]


def saved(directory: Path) -> tuple[BakaForCausalLM, Path]:
    model = tiny_model(tiny_config())
    state_at(model, "mid-chunk").save_pretrained(directory)
    return model, directory / FILE


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    """The file again, after `change` of its tensors and metadata."""
    tensors, metadata = load_file(path), header_of(path)["__metadata__"]
    change(tensors, metadata)
    save_file(tensors, path, metadata)


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
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        BakaCache.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [bytes(range(256)) * 40, b"{}", pickle.dumps({"memory": 0})])
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
    rewritten(path, lambda tensors, metadata: metadata.update(baka_cache_version="2"))
    with pytest.raises(ValueError, match="format version 2, this code reads up to 1: upgrade baka-hf"):
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
    with pytest.raises(ValueError, match=f"the saved state's {name} is "):
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


def half_written(tensors: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
    Path(path).write_bytes(b"half")
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
            patch.setattr(cache_baka, "safe_save_file", half_written)
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
