"""Processes forked from one that has done the imports, which take longer than all that tests do in them."""

import os
import runpy
import sys
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any


def forkserver() -> ForkServerContext:
    context = get_context("forkserver")
    context.set_forkserver_preload(["baka_hf.training"])
    return context


def run_program(path: Path, folder: Path, *arguments: Any) -> str:
    """Run a script in a folder, as a command would, and return what it prints."""
    files = folder / "stdout.txt", folder / "stderr.txt"
    process = forkserver().Process(target=_run, args=(path, folder, list(map(str, arguments)), files))
    process.start()
    process.join()
    output, errors = (file.read_text(encoding="utf-8") for file in files)
    assert process.exitcode == 0, errors
    return output


def _run(path: Path, folder: Path, arguments: list[str], files: tuple[Path, ...]) -> None:
    os.chdir(folder)
    for stream, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")
