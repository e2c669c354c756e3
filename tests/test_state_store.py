"""A store of states: what was kept is there as it was, until it is too old or too much, for the same weights alone."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import contents, logits_of, random_tokens, tiny_config, tiny_model

from baka_hf import BakaCache, BakaForCausalLM, state_files_baka
from baka_hf.state_files_baka import CACHE_FILE
from baka_hf.state_store import StateStore


def read(model: BakaForCausalLM, seed: int) -> BakaCache:
    state = model.new_cache()
    logits_of(model, random_tokens(model.config, 1, 8 + seed, seed=seed), state)
    return state


def last_used(store: StateStore, seconds_ago: float) -> None:
    """As if all that is there was used at that time."""
    for path in store.folder.glob("*/*.safetensors"):
        os.utime(path, times=(time.time() - seconds_ago,) * 2)


def test_states_by_user(tmp_path: Path) -> None:
    """Bit for bit, whatever the user's name is; the weights are looked at once."""
    model = tiny_model(tiny_config())
    store = StateStore(tmp_path / "new" / "folder", model)
    assert store.load("ada") is None
    states = {name: read(model, seed) for seed, name in enumerate(["ada", "../ada", "", "a/b\0", "Ада", "x" * 999])}
    for name, state in states.items():
        store.save(name, state)
    store.save("ada", states["Ада"])
    found = {name: StateStore(store.folder, model).load(name) for name in states}
    assert [contents(state) for state in found.values()] == [
        contents(states["Ада" if name == "ada" else name]) for name in states
    ]
    assert len(list(tmp_path.glob("new/folder/*/*"))) == len(list(tmp_path.glob("*/*/*"))) == len(states)
    store.delete("ada")
    store.delete("nobody")
    assert store.load("ada") is None and store.load("../ada") is not None


def test_states_of_other_weights_are_refused(tmp_path: Path) -> None:
    model = tiny_model(tiny_config(), torch.float32)
    StateStore(tmp_path, model).save("ada", read(model, 0))
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    store = StateStore(tmp_path, model)
    with pytest.raises(ValueError, match="was read by other weights"):
        store.load("ada")
    with pytest.raises(ValueError, match="expected chunk_size=7, got 5"):
        StateStore(tmp_path, tiny_model(tiny_config(chunk_size=7))).load("ada")
    store.save("ada", read(model, 1))
    other = tiny_model(tiny_config(chunk_size=7), torch.float32)
    for state, message in (
        (read(other, 1), "expected chunk_size=5, got 7"),
        (None, "expected a BakaCache, got NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            store.save("ada", state)
    assert store.load("ada").num_tokens.tolist() == [9]
    read(model, 1).save_pretrained(store._place("ada"))
    with pytest.raises(ValueError, match="does not say which weights"):
        store.load("ada")


def test_old_states_go(tmp_path: Path) -> None:
    """By the time of their last use, which loading is as well."""
    model = tiny_model(tiny_config())
    store = StateStore(tmp_path, model, max_age=100)
    for name in ("ada", "bob"):
        store.save(name, read(model, 0))
    last_used(store, 90)
    assert store.load("ada") is not None
    store.evict()
    assert len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.glob("*/*"):
        os.utime(path, times=(time.time(), path.stat().st_mtime - 20))
    assert store.load("bob") is None and store.load("ada") is not None
    assert len(list(tmp_path.iterdir())) == 1


def test_no_more_than_fits(tmp_path: Path) -> None:
    """Those stay that were used last, as many as the limit has room for."""
    model = tiny_model(tiny_config())
    StateStore(tmp_path, model).save("one", read(model, 0))
    (path,) = tmp_path.glob("*/*")
    store = StateStore(tmp_path, model, max_bytes=int(2.5 * path.stat().st_size))
    for place, name in enumerate(["two", "one", "three", "one", "four"]):
        last_used(store, 10)
        for other in tmp_path.glob("*/*"):
            if other.parent == store._place("one") and place > 1:
                os.utime(other, times=(time.time() - 5,) * 2)
        store.save(name, read(model, place))
    assert [name for name in ("one", "two", "three", "four") if store.load(name) is not None] == ["one", "four"]


def test_two_writers_at_once(tmp_path: Path) -> None:
    """Whoever reads in between finds one of the states, whole."""
    model = tiny_model(tiny_config())
    stores, states = [StateStore(tmp_path, model, max_bytes=10**9) for _ in range(3)], [read(model, s) for s in (0, 1)]
    stores[0].save("ada", states[0])
    threads = [
        threading.Thread(target=lambda store=store, state=state: [store.save("ada", state) for _ in range(20)])
        for store, state in zip(stores, states, strict=False)
    ]
    for thread in threads:
        thread.start()
    known = [contents(state) for state in states]
    while any(thread.is_alive() for thread in threads):
        assert contents(stores[2].load("ada")) in known
    for thread in threads:
        thread.join()
    assert len(list(tmp_path.glob("*/*"))) == 1


def test_deleted_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another process: as if it had been before a load, and before a save."""
    model = tiny_model(tiny_config())
    store, state, utime, replace = StateStore(tmp_path, model), read(model, 0), os.utime, state_files_baka._replace_file
    store.save("ada", state)
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", lambda path: (utime(path), store.delete("ada")))
        assert store.load("ada") is None

    def too_late(path: Path, *parts: Any) -> None:
        monkeypatch.setattr(state_files_baka, "_replace_file", replace)
        path.parent.rmdir()
        replace(path, *parts)

    monkeypatch.setattr(state_files_baka, "_replace_file", too_late)
    store.save("ada", state)
    assert contents(store.load("ada")) == contents(state)

    def gone(path: Path, *parts: Any) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(state_files_baka, "_replace_file", gone)
    with pytest.raises(FileNotFoundError):  # not for ever
        store.save("ada", state)


def test_saved_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another process, while this one finds nothing: as if it had been before."""
    model = tiny_model(tiny_config())
    store, state, utime, mkdir = StateStore(tmp_path, model), read(model, 0), os.utime, os.mkdir

    def too_early(path: Path) -> None:
        try:
            utime(path)
        finally:
            store.save("ada", state)

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", too_early)
        assert contents(store.load("ada")) == contents(state)

    def made_and_taken_away(path: Path, *args: Any) -> None:
        monkeypatch.setattr(os, "mkdir", mkdir)
        raise FileExistsError(path)

    monkeypatch.setattr(os, "mkdir", made_and_taken_away)
    store.save("bob", state)
    assert contents(store.load("bob")) == contents(state)


@pytest.mark.parametrize("is_saved", [False, True])
def test_deleted_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_saved: bool) -> None:
    """And saved again, or not: what is there afterwards is found."""
    model = tiny_model(tiny_config())
    store, states = StateStore(tmp_path, model), [read(model, seed) for seed in (0, 1)]
    store.save("ada", states[0])

    def read_too_late(*args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        store.delete("ada")
        try:
            return store.kind.from_pretrained(*args, **options)
        finally:
            if is_saved:
                store.save("ada", states[1])

    monkeypatch.setattr(store.kind, "from_pretrained", read_too_late)
    found = store.load("ada")
    assert found is None if not is_saved else contents(found) == contents(states[1])


def test_a_damaged_state_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config())
    store, from_pretrained, tries = StateStore(tmp_path, model), BakaCache.from_pretrained, []
    store.save("ada", read(model, 0))
    path = next(tmp_path.glob("*/*"))
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(store.kind, "from_pretrained", lambda *a, **k: (tries.append(a), from_pretrained(*a, **k)))
    with pytest.raises(ValueError):
        store.load("ada")
    assert len(tries) == 1


@pytest.mark.parametrize("look", ["scandir", "stat"])
def test_deleted_while_others_evict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: str) -> None:
    """A folder that is gone when its files are to be listed, or a file that is when it is looked at: all others count,
    and what is beyond the limits goes."""
    model = tiny_model(tiny_config())
    store, other = StateStore(tmp_path, model, max_age=100), StateStore(tmp_path, model)
    for name in ("ada", "bob", "eve"):
        other.save(name, read(model, 0))
    last_used(other, 200)
    other.save("eve", read(model, 1))
    place, looked, original = other._place("ada"), [], getattr(os, look)

    def late(path: Any = ".", *args: Any, **options: Any) -> Any:
        if isinstance(path, str | os.PathLike) and Path(path) == (place if look == "scandir" else place / CACHE_FILE):
            looked.append(path)
            other.delete("ada")
        return original(path, *args, **options)

    monkeypatch.setattr(os, look, late)
    store.evict()
    assert looked and {*tmp_path.iterdir()} == {other._place("eve")}


@pytest.mark.parametrize("use", ["save", "load"])
def test_used_while_others_evict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str) -> None:
    """What was old when the files were listed, but is not any more, stays."""
    model = tiny_model(tiny_config())
    store, other, stat = StateStore(tmp_path, model, max_age=100), StateStore(tmp_path, model), Path.stat
    states = [read(model, seed) for seed in (0, 1)]
    other.save("ada", states[0])
    last_used(other, 200)

    def stat_and_use(path: Path, **options: Any) -> os.stat_result:
        status = stat(path, **options)
        if path.suffix == ".safetensors":
            monkeypatch.setattr(Path, "stat", stat)
            other.save("ada", states[1]) if use == "save" else other.load("ada")
        return status

    monkeypatch.setattr(Path, "stat", stat_and_use)
    store.evict()
    assert Path.stat is stat and contents(store.load("ada")) == contents(states[use == "save"])


def test_partial_files_of_killed_writers_go(tmp_path: Path) -> None:
    """An hour later, and the folder if nothing else is in it; those of writers that may be alive stay."""
    model = tiny_model(tiny_config())
    store, state = StateStore(tmp_path, model, max_bytes=10**9), read(model, 0)
    store.save("ada", state)
    for name, minutes in (("ada", 61), ("bob", 61), ("eve", 59)):
        store._place(name).mkdir(exist_ok=True)
        partial = store._place(name) / ".baka_cache.safetensors.0123456789abcdef"
        partial.write_bytes(b"a part")
        os.utime(partial, times=(time.time() - 60 * minutes,) * 2)
    store.evict()
    assert {path.parent for path in tmp_path.glob("*/.*")} == {store._place("eve")}
    assert {*tmp_path.iterdir()} == {store._place("ada"), store._place("eve")}
    assert contents(store.load("ada")) == contents(state)


def test_a_state_larger_than_the_limit(tmp_path: Path) -> None:
    """It is refused, not saved and evicted at once, and the user's last one stays."""
    model = tiny_model(tiny_config())
    state = read(model, 0)
    StateStore(tmp_path, model).save("ada", state)
    store = StateStore(tmp_path, model, max_bytes=state.nbytes - 1)
    with pytest.raises(ValueError, match=f"`max_bytes`={state.nbytes - 1}, got one of {state.nbytes} bytes"):
        store.save("ada", read(model, 1))
    assert contents(StateStore(tmp_path, model).load("ada")) == contents(state)
    # A file has a header beside the state's bytes: one that takes more with it is the last one used, and stays.
    store = StateStore(tmp_path, model, max_bytes=state.nbytes)
    store.save("ada", second := read(model, 1))
    assert contents(store.load("ada")) == contents(second)


def test_limits_are_above_zero(tmp_path: Path) -> None:
    model = tiny_model(tiny_config())
    for limit in (
        dict(max_age=0),
        dict(max_bytes=-1),
        dict(max_age=float("nan")),
        dict(max_age="1"),
        dict(max_bytes=True),
    ):
        with pytest.raises(ValueError, match=r"expected `max_.*` to be a number above 0, got"):
            StateStore(tmp_path, model, **limit)


@pytest.mark.parametrize("user", [3, None, b"ada"])
def test_names_are_strings(tmp_path: Path, user: Any) -> None:
    store = StateStore(tmp_path, tiny_model(tiny_config()))
    for use in (store.load, store.delete, lambda name: store.save(name, read(store.model, 0))):
        with pytest.raises(ValueError, match=f"expected the user's name to be a string, got {user!r}"):
            use(user)
