"""Tokens per second of many users who join and leave, beside users who begin and end together and beside one by one.

    python benchmarks/serving.py                       # on a GPU: 1, 16 and 256 users
    python benchmarks/serving.py --users 64 --prompt 2048 --answer 128
    python benchmarks/serving.py --device cpu --users 1 4

A `Batcher` has a row for each user. Whoever has said all leaves, and another joins with a prompt and an answer of other
lengths, drawn evenly from an eighth to fifteen eighths of `--prompt` and `--answer`. Tokens are counted over `--steps`
steps once all is compiled and every user has come; reading the prompts is in their time. Together, the same batcher
reads prompts that are all of the mean length and says answers that are; one by one, stock `generate` does, from a
static cache.

Afterwards each text that has ended, one of every row at least, is read alone, and what it said compared with what its
own logits say: how many tokens are the likeliest there too, and by how much the logits of the others fall short. In
half precision neighbours in a batch change roundings, so nearly equal logits may change places; more is a mistake.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from side_by_side import Comparison, arguments, new_baka, random_tokens, seconds, settle, wait_for

from baka_hf import BakaForCausalLM
from baka_hf.serving import Batcher, Request

OURS = "joining and leaving"


def parse_args() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--users", type=int, nargs="+", help="rows of the batch (default: 1 16 256)")
    parser.add_argument("--prompt", type=int, help="mean length of prompts (default: 256)")
    parser.add_argument("--answer", type=int, help="mean length of answers (default: 512)")
    parser.add_argument("--steps", type=int, help="steps that are timed (default: 512)")
    parser.add_argument("--num_prompts", type=int, help="prompts that are read at once (default: the batcher's)")
    args = settle(parser.parse_args())
    args.users = args.users or ([1, 3] if args.quick else [1, 16, 256])
    args.prompt = args.prompt or (8 if args.quick else 256)
    args.answer = args.answer or (8 if args.quick else 512)
    args.steps = args.steps or (40 if args.quick else 512)
    return args


class Users:
    """As many users as the batcher has rows: for each that leaves another one joins."""

    def __init__(self, batcher: Batcher, args: argparse.Namespace):
        self.batcher, self.args, self.dice = batcher, args, random.Random(0)
        self.vocabulary = range(batcher.model.config.vocab_size)
        self.ended: list[Request] = []
        for _ in range(batcher.num_rows):
            self.join()

    def join(self) -> None:
        prompt, answer = (max(1, mean * self.dice.randint(1, 15) // 8) for mean in (self.args.prompt, self.args.answer))
        ids = self.dice.choices(self.vocabulary, k=prompt)
        self.batcher.add(ids, answer, eos_token_id=())

    def step(self) -> int:
        """Tokens that all together have said in a step."""
        said = self.batcher.step()
        for request, token in said:
            if token is None:
                self.ended.append(request)
                self.join()
        return sum(token is not None for _, token in said)


def join_and_leave(model: BakaForCausalLM, num_users: int, args: argparse.Namespace) -> tuple[dict[str, float], Users]:
    users = Users(Batcher(model, num_users, args.num_prompts), args)
    while len(users.ended) < max(num_users, 4):  # until then programs are compiled, recorded, and phases mixed
        users.step()
    users.ended.clear()
    times, said = [], 0
    for _ in range(args.steps):
        start = time.perf_counter()
        said += users.step()
        times.append(1000 * (time.perf_counter() - start))
    figures = {"tokens/s": 1000 * said / sum(times), "median ms/step": statistics.median(times), "worst ms": max(times)}
    present = {request for request in users.batcher.saying if request is not None}
    while not present <= set(users.ended):
        users.step()
    return figures, users


def together(model: BakaForCausalLM, num_users: int, args: argparse.Namespace) -> Callable[[], None]:
    batcher = Batcher(model, num_users, args.num_prompts)
    prompts = random_tokens(model, num_users, args.prompt).tolist()

    def run() -> None:
        for prompt in prompts:
            batcher.add(prompt, args.answer, eos_token_id=())
        list(batcher.run())

    return run


def one_by_one(model: BakaForCausalLM, args: argparse.Namespace) -> Callable[[], None]:
    prompt = random_tokens(model, 1, args.prompt)
    options: dict[str, Any] = dict(max_new_tokens=args.answer, do_sample=False)
    if args.device != "cpu":
        options["cache_implementation"] = "static"
    return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


@torch.no_grad()
def compare_alone(model: BakaForCausalLM, ended: list[Request]) -> dict[str, float]:
    """What was said beside others, by the logits of each text read alone."""
    shares, gaps, spreads = [], [], []
    for request in ended:
        ids = torch.tensor([request.input_ids + request.tokens[:-1]], device=model.device)
        states = model.model(ids, cache=model.new_cache(1, static=True)).last_hidden_state
        logits = model.lm_head(states[0, -len(request.tokens) :]).float()
        said = torch.tensor(request.tokens, device=model.device)
        gap = logits.max(dim=-1).values - logits.gather(1, said[:, None])[:, 0]
        shares.append((gap == 0).float().mean())
        gaps.append(gap.max())
        spreads.append(logits.std(dim=-1).mean())
    return {
        "texts": len(ended),
        "tokens": sum(len(request.tokens) for request in ended),
        "likeliest alone": float(torch.stack(shares).mean()),
        "largest gap": float(torch.stack(gaps).max()),
        "std of logits": float(torch.stack(spreads).mean()),
    }


@torch.no_grad()
def main() -> None:
    args = parse_args()
    comparison = Comparison(args, "serving")
    model = new_baka(args)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    run = one_by_one(model, args)
    for _ in range(3):
        run()
    single = args.answer / min(seconds(run, args.device) for _ in range(2))
    alone = []
    for num_users in args.users:
        work = f"{num_users} user" + "s" * (num_users > 1)
        figures, users = join_and_leave(model, num_users, args)
        comparison.add(work, OURS, **figures)
        compared = compare_alone(model, users.ended)
        comparison.note(work=work, **compared)
        alone.append([work, *compared.values()])
        del users
        run = together(model, num_users, args)
        run()
        wait_for(args.device)
        comparison.add(work, "together", **{"tokens/s": num_users * args.answer / seconds(run, args.device)})
        del run
        comparison.add(work, "generate, one by one", **{"tokens/s": single})
    comparison.finish(OURS, ("tokens/s", "median ms/step", "worst ms"))
    print(f"| {' | '.join(['read alone', *compared])} |\n|{' --- |' * (1 + len(compared))}")
    for work, *values in alone:
        print(f"| {work} | {' | '.join(f'{value:.6g}' for value in values)} |")


if __name__ == "__main__":
    main()
