"""States of many users on disk: a file of constant size for each, found by name, the oldest forgotten first."""

import os
import time
from contextlib import suppress
from glob import glob
from hashlib import sha256
from pathlib import Path
from typing import Any

from .state_files_baka import CACHE_FILE, check_signature, fingerprint_of, signature_of

TRIES = 10  # to save or load a state that others delete or replace meanwhile
PARTIAL_AGE = 3600  # seconds after which a partial file is no writer's any more


class StateStore:
    """What each user's text has left, kept between runs and shared by processes.

        store = StateStore("states", model, max_age=7 * 24 * 3600)
        state = store.load("ada")                          # None at first
        request = batcher.add(new_ids, state=state, keep_state=True)
        ...
        store.save("ada", request.state)

    A user's state is a folder with one safetensors file, replaced as a whole or not at all. It knows which weights
    have read it. These are looked at once, when the store is made.

    Args:
        folder: where states are. Nothing else should be there.
        model (`BakaForCausalLM`): the model that reads them.
        max_age (*optional*): seconds after which a state that was neither saved nor loaded is deleted.
        max_bytes (*optional*): how much all files may take: beyond that those go that were not used for the longest
            time, but not the last one. A state that takes more by itself is refused.

    With either limit partial files go too, an hour after their writers were killed.

    Raises:
        ValueError: a limit is no number above 0, or the model's weights are not whole and plain (`fingerprint_of`).
    """

    def __init__(
        self, folder: str | os.PathLike, model: Any, max_age: float | None = None, max_bytes: int | None = None
    ):
        for name, limit in (("max_age", max_age), ("max_bytes", max_bytes)):
            is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
            if limit is not None and not (is_number and limit > 0):
                raise ValueError(f"expected `{name}` to be a number above 0, got {limit!r}.")
        self.folder, self.model, self.max_age, self.max_bytes = Path(folder), model, max_age, max_bytes
        self.fingerprint = fingerprint_of(model)
        self.kind = type(model.new_cache())  # a checkpoint with remote code has its own

    def _place(self, user: str) -> Path:
        if not isinstance(user, str):
            raise ValueError(f"expected the user's name to be a string, got {user!r}.")
        # A hash, because a name may hold what a file system does not take, or a way out of the folder.
        return self.folder / sha256(user.encode()).hexdigest()

    def save(self, user: str, state: Any) -> None:
        """Keep a state (`BakaCache`) in the place of the user's last one, and delete what is beyond the limits.

        Raises:
            ValueError: `user` is no string; or it is no state, or of another configuration, takes more than
                `max_bytes`, or cannot be saved (`BakaCache.save_pretrained`). The user's last one is still there.
            FileNotFoundError: there is no place for its folder, or others go on taking it away.
        """
        if getattr(state, "signature", None) is None:
            raise ValueError(
                f"expected a BakaCache, got {type(state).__name__} (a request has one if added with `keep_state=True`)."
            )
        check_signature(state.signature, signature_of(self.model.config))
        if self.max_bytes is not None and state.nbytes > self.max_bytes:
            raise ValueError(
                f"expected a state of at most `max_bytes`={self.max_bytes}, got one of {state.nbytes} bytes."
            )
        for attempt in range(TRIES):
            try:
                state.save_pretrained(self._place(user), fingerprint=self.fingerprint)
                break
            except (FileNotFoundError, FileExistsError):  # others, deleting or saving, took the folder away or made it
                if attempt + 1 == TRIES:
                    raise
        self.evict()

    def load(self, user: str) -> Any:
        """The user's state, on the model's device and in its dtype; None if there is none.

        Raises:
            ValueError: `user` is no string, or the state was read by other weights or is damaged.
        """
        self.evict()
        file = self._place(user) / CACHE_FILE
        options = dict(config=self.model.config, fingerprint=self.fingerprint)
        for attempt in range(TRIES):
            with suppress(FileNotFoundError):
                os.utime(file)
            version = _version_of(file)
            if version is None:
                return None
            try:
                return self.kind.from_pretrained(
                    file.parent, device=self.model.device, dtype=self.model.dtype, **options
                )
            except (FileNotFoundError, ValueError):
                if attempt + 1 == TRIES or _version_of(file) == version:
                    raise

    def delete(self, user: str) -> None:
        """Forget a user's state, if there is one."""
        self._remove(self._place(user))

    def _remove(self, place: Path) -> None:
        with suppress(OSError):  # another process was faster, or has just begun to write a new one
            (place / CACHE_FILE).unlink()
            place.rmdir()

    def evict(self) -> None:
        """Delete what is beyond the limits."""
        if self.max_age is None and self.max_bytes is None:
            return
        now, found = time.time(), []
        # Before Python 3.13 `Path.glob` raises where a folder that it has found is gone; this one passes over it.
        for name in glob(f"*/*{CACHE_FILE}*", root_dir=self.folder, include_hidden=True):
            path = self.folder / name
            with suppress(OSError):  # another process was faster
                status = path.stat()
                if path.name == CACHE_FILE:
                    found.append((status.st_mtime, status.st_size, path))
                elif now - status.st_mtime > PARTIAL_AGE:
                    path.unlink()
                    path.parent.rmdir()  # if nothing else is there
        total = 0
        for place, (used, size, path) in enumerate(sorted(found, reverse=True)):
            total += size
            is_old = self.max_age is not None and now - used > self.max_age
            if is_old or (self.max_bytes is not None and total > self.max_bytes and place > 0):
                total -= size
                with suppress(OSError):
                    if path.stat().st_mtime == used:  # or else it has been saved or loaded meanwhile
                        self._remove(path.parent)


def _version_of(file: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced or used; None if there is none."""
    with suppress(FileNotFoundError):
        status = file.stat()
        return status.st_ino, status.st_mtime_ns
    return None


__all__ = ["StateStore"]
