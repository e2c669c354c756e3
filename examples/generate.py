"""Read a text of any length with a BakaLLM checkpoint and stream what comes next.

    python examples/generate.py --prompt "def main("
    cat *.py | python examples/generate.py --save_state state        # standard input, read piece by piece
    python examples/generate.py --load_state state                   # goes on where the state was saved

The text is read chunk by chunk into a state of constant size, so the memory needed does not grow with its length.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)

LAST_TOKEN = "last_token.json"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", help="text to go on from (default: what is piped into standard input, if anything is)")
    add("--load_state", type=Path, metavar="DIR", help="go on from this saved state")
    add("--save_state", type=Path, metavar="DIR", help="save the state here when done")
    add_model_arguments(parser)
    return parser.parse_args()


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="baka-small", help="folder or Hub id of a checkpoint (default: %(default)s)")
    add("--max_new_tokens", type=int, default=400, help="0: only read (default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: %(default)s)")
    add("--top_k", type=int, default=50, help="sample from the likeliest so many (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--dtype", default="auto", help="float32, bfloat16, ... (default: the checkpoint's)")


def load_model(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    folder = Path(args.model)
    # A Hub id is user/name; what stands in a folder that there is, is meant to be a folder.
    is_hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", args.model) and not folder.parent.is_dir()
    if not (folder / "config.json").is_file() and not is_hub_id:
        sys.exit(
            f"--model: there is no checkpoint in a folder {args.model!r} (examples/train.py writes one), "
            "and a Hub id is user/name."
        )
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True, dtype=args.dtype)
    return tokenizer, model.to(args.device)


def load_state(model: PreTrainedModel, folder: Path) -> tuple[Cache, int]:
    try:
        state = type(model.new_cache(1)).from_pretrained(folder, model=model, device=model.device)
    except ValueError as error:
        sys.exit(str(error))
    return state, json.loads((folder / LAST_TOKEN).read_text())


def save_state(model: PreTrainedModel, state: Cache, last: int, folder: Path) -> None:
    state.save_pretrained(folder, model=model)
    # The last token was drawn but never read: the next run begins with it.
    (folder / LAST_TOKEN).write_text(json.dumps(last))


def pieces(stream: TextIO, size: int = 1 << 16) -> Iterator[str]:
    """The stream's text in pieces of bounded size, cut before the white space that ends a line. Byte-level BPE merges
    nothing across that place, so the pieces have the tokens of the whole; only a line longer than a piece is cut."""
    rest = ""
    while block := stream.read(size):
        rest += block
        piece = rest.rpartition("\n")[0].rstrip() or rest
        yield piece
        rest = rest[len(piece) :]
    yield rest


@torch.no_grad()
def read(model: PreTrainedModel, state: Cache, tokens: Iterable[int]) -> int:
    """Feed all tokens but the last, which is returned: a continuation begins with the prediction made from it."""
    span: list[int] = []
    with tqdm(desc="Reading", unit=" tokens", unit_scale=True, delay=1) as progress:
        for token in tokens:
            if len(span) == model.config.chunk_size:
                model(torch.tensor([span], device=model.device), cache=state, logits_to_keep=1)
                progress.update(len(span))
                span = []
            span.append(token)
        *span, last = span
        if span:
            model(torch.tensor([span], device=model.device), cache=state, logits_to_keep=1)
            progress.update(len(span))
    return last


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: Cache,
    last: int,
    args: argparse.Namespace,
    stop_strings: list[str] | None = None,
) -> int:
    """Stream what comes after the last token, and return the last token of that."""
    if not args.max_new_tokens:
        return last
    sampling = dict(do_sample=True, temperature=args.temperature, top_k=args.top_k)
    greedy = dict(do_sample=False)
    new = torch.tensor([[last]], device=model.device)
    output = model.generate(
        new,
        # As long as all that was read: this says that `new` comes after the state, and is not the whole history.
        attention_mask=new.new_ones(1, state.get_seq_length() + 1),
        cache=state,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        max_new_tokens=args.max_new_tokens,
        **(sampling if args.temperature else greedy),
        stop_strings=stop_strings,
        tokenizer=tokenizer,
    )
    return output[0, -1].item()


def main() -> None:
    args = parse_args()
    tokenizer, model = load_model(args)
    if args.load_state:
        state, last = load_state(model, args.load_state)
    else:
        state, last = model.new_cache(1), tokenizer.bos_token_id  # what stands before every document

    text: Iterable[str] = ()
    if args.prompt is not None:
        print(args.prompt, end="", flush=True)
        text = [args.prompt]
    elif not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        text = pieces(sys.stdin)
    ids = chain.from_iterable(tokenizer(piece, add_special_tokens=False).input_ids for piece in text)
    last = read(model, state, chain([last], ids))

    last = write(model, tokenizer, state, last, args)
    if args.save_state:
        save_state(model, state, last, args.save_state)


if __name__ == "__main__":
    main()
