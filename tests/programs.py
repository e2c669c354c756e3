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
    output = folder / "output.txt"
    process = forkserver().Process(target=_run, args=(path, folder, list(map(str, arguments)), output))
    process.start()
    process.join()
    text = output.read_text(encoding="utf-8")
    assert process.exitcode == 0, text
    return text


def _run(path: Path, folder: Path, arguments: list[str], output: Path) -> None:
    os.chdir(folder)
    with output.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")
