"""What the benchmarks share: models of one size, time and memory of both sides in one run, tables and pictures.

A figure counts beside its peer's of the same run, because machines are shared and noisy: the tables give ratios.
"""

import argparse
import gc
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from baka_hf import BakaConfig, BakaForCausalLM
from baka_hf.calls_baka import CACHE_NAME
from baka_hf.configuration_baka import RUNGS
from baka_hf.convert import add_memory

# 190 million parameters, of which 77 are embedding and head; 9 million; and something that runs in a moment.
SIZES: dict[str, dict[str, int]] = {
    "reference": dict(
        vocab_size=50277, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    ),
    "small": dict(vocab_size=4096, hidden_size=320, intermediate_size=960, num_hidden_layers=5, num_attention_heads=5),
    "quick": dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2),
}
QUICK_CHUNK = dict(chunk_size=8, num_memory_tokens=2, num_pause_tokens=1)


def arguments(description: str | None, takes_source: bool = False) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu (default: %(default)s)")
    add("--size", choices=list(SIZES), help="default: reference on a GPU, small on a CPU")
    add("--rung", choices=list(RUNGS), help="ours is a rung of the diary's ladder, not today's default")
    if takes_source:
        add("--source", help="a decoder, folder or name: it is Llama, ours is made of it, chunks of 512, no vectors")
    add("--dtype", help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--repeats", type=int, help="timed runs, of which the median counts (default: 5 on a GPU, 3 on a CPU)")
    add("--only", nargs="+", metavar="NAME", help="run these sides alone, as named in the tables")
    add("--profile", action="store_true", help="also print what kernels each side spends its time in")
    add("--out", type=Path, help="folder for results.jsonl, the table and the picture")
    add("--quick", action="store_true", help="a tiny model and short texts: does it run? Its figures mean nothing")
    return parser


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on the device."""
    on_gpu = args.device != "cpu"
    args.size = "quick" if args.quick else args.size or ("reference" if on_gpu else "small")
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    args.repeats = args.repeats or (1 if args.quick else 5 if on_gpu else 3)
    return args


def new_baka(args: argparse.Namespace, **fields: Any) -> BakaForCausalLM:
    if getattr(args, "source", None):
        source = AutoModelForCausalLM.from_pretrained(args.source)
        return _placed(add_memory(source, chunk_size=512, num_memory_tokens=0, **fields), args)
    rung = RUNGS[args.rung] if args.rung else {}
    chunk = {name: number for name, number in QUICK_CHUNK.items() if args.size == "quick" and name not in rung}
    fields = SIZES[args.size] | chunk | fields
    return _placed(BakaForCausalLM(BakaConfig.rung(args.rung, **fields) if rung else BakaConfig(**fields)), args)


def new_llama(args: argparse.Namespace) -> Any:
    """Llama of the same width, depth, heads and vocabulary, whose texts may be of any length; or the source."""
    if getattr(args, "source", None):
        return _placed(AutoModelForCausalLM.from_pretrained(args.source), args)
    return _placed(LlamaForCausalLM(LlamaConfig(**SIZES[args.size], max_position_embeddings=2**21)), args)


def _placed(model: Any, args: argparse.Namespace) -> Any:
    return model.to(args.device, args.dtype).eval()


def state_of(outputs: Any) -> Any:
    """The state in a model's outputs, whatever transformers calls it."""
    return getattr(outputs, CACHE_NAME)


def random_tokens(model: PreTrainedModel, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)


def wait_for(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], device: str) -> float:
    """Time of a run, without Python's garbage collector, as `timeit` measures too."""
    gc.disable()
    try:
        wait_for(device)
        start = time.perf_counter()
        run()
        wait_for(device)
        return time.perf_counter() - start
    finally:
        gc.enable()


class Comparison:
    """Sides that do the same work, the first of them ours.

    On a CPU all sides exist at once and take turns, so that what slows the machine slows all of them. On a GPU, where
    memory counts, one exists at a time.
    """

    def __init__(self, args: argparse.Namespace, title: str):
        self.args, self.title = args, title
        self.rows: list[dict[str, Any]] = []
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
        self.note(
            device=torch.cuda.get_device_name() if args.device != "cpu" else processor_name(),
            threads=torch.get_num_threads(),
            size=getattr(args, "source", None) or args.size,
            dtype=str(args.dtype).removeprefix("torch."),
            torch=torch.__version__,
            transformers=transformers.__version__,
        )

    def note(self, **facts: Any) -> None:
        """Print facts as one JSON line, and keep them."""
        line = json.dumps({"benchmark": self.title} | facts)
        print(line, flush=True)
        if self.args.out:
            with open(self.args.out / "results.jsonl", "a") as file:
                file.write(line + "\n")

    def add(self, work: str, side: str, **figures: float) -> None:
        """What one side needed for some work."""
        row = {"work": work, "side": side} | {name: round(value, 6) for name, value in figures.items()}
        self.rows.append(row)
        self.note(**row)

    def chosen(self, sides: dict[str, Any]) -> dict[str, Any]:
        return {name: side for name, side in sides.items() if not self.args.only or name in self.args.only}

    def measure(
        self,
        work: str,
        tokens: int,
        sides: dict[str, Callable[[], Callable[[], Any]]],
        per_token: bool = False,
        warm_ups: int = 0,
        in_a_row: float = 0,
        **facts: float,
    ) -> None:
        """Time `tokens` tokens of work: each side is a function that gets everything ready and returns the run.

        The first run, which may have to compile, is timed by itself; then come `warm_ups` more, and those that count:
        one at a time, or as many as take `in_a_row` seconds, as a program asks a GPU for the next step while it is
        still at the last one.
        """
        device, repeats = self.args.device, self.args.repeats
        sides = self.chosen(sides)
        groups = [sides] if device == "cpu" else [{name: side} for name, side in sides.items()]
        for group in groups:
            if device != "cpu":
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            run = None
            try:
                runs = {name: prepare() for name, prepare in group.items()}
                first = {name: seconds(run, device) for name, run in runs.items()}
                for _ in range(warm_ups):
                    for run in runs.values():
                        run()
                counts = {
                    name: math.ceil(in_a_row / seconds(run, device)) if in_a_row else 1 for name, run in runs.items()
                }
                times: dict[str, list[float]] = {name: [] for name in runs}
                for _ in range(repeats):
                    for name, run in runs.items():
                        times[name].append(seconds(partial(_repeat, run, counts[name]), device) / counts[name])
                if self.args.profile:
                    for name, run in runs.items():
                        self.profile(f"{work}, {name}", run)
            except torch.OutOfMemoryError:
                self.note(work=work, side=next(iter(group)), out_of_memory=True)
                continue
            finally:
                runs, run = {}, None  # nothing of this side is left when the next one is measured
            for name, measured in times.items():
                taken = statistics.median(measured)
                figures = {"ms/token": 1e3 * taken / tokens} if per_token else {"tokens/s": tokens / taken}
                if device != "cpu":
                    figures["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
                self.add(work, name, **figures, **{"first run s": first[name]}, **facts)

    def profile(self, name: str, run: Callable[[], Any]) -> None:
        """Print the kernels of a run, those that take longest first."""
        kind = "cpu" if self.args.device == "cpu" else "cuda"
        with torch.profiler.profile() as profiler:
            run()
            wait_for(self.args.device)
        table = profiler.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=25, max_name_column_width=90)
        print(f"{name}\n{table}", flush=True)
        if self.args.out:
            with open(self.args.out / f"{self.title}.profile.txt", "a") as file:
                file.write(f"{name}\n{table}\n")

    def finish(self, ours: str, figures: tuple[str, ...]) -> None:
        """Print the table, and write it if there is a folder."""
        table = self.table(ours, figures)
        print(f"\n{table}", flush=True)
        if self.args.out:
            (self.args.out / f"{self.title}.md").write_text(table)

    def table(self, ours: str, figures: tuple[str, ...]) -> str:
        """Markdown: for each work and figure our value beside each peer's, and ours over theirs."""
        lines = [f"| {self.title} | figure | {ours} | peer | | ratio |", "| --- | --- | ---: | --- | ---: | ---: |"]
        for work in dict.fromkeys(row["work"] for row in self.rows):
            rows = {row["side"]: row for row in self.rows if row["work"] == work}
            own = rows.pop(ours, {})
            for figure in figures:
                peers = [(name, row[figure]) for name, row in rows.items() if figure in row]
                for name, value in peers or [("", None)]:
                    if figure not in own and value is None:
                        continue
                    ratio = f"{own[figure] / value:.2f}" if figure in own and value else ""
                    cells = [work, figure, _readable(own.get(figure)), name, _readable(value), ratio]
                    lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def save(self, draw: Callable[["Comparison"], Any]) -> None:
        """Write the matplotlib figure that `draw` makes, if there is a folder and anything to draw."""
        if self.args.out and self.rows:
            draw(self).savefig(self.args.out / f"{self.title}.png", dpi=150)


def _readable(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _repeat(run: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        run()


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
