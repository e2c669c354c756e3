"""Talk with a BakaLLM checkpoint. The conversation is kept as a state of constant size and goes on in the next run.

    python examples/chat.py                                            # a line is a turn; Ctrl-D ends
    echo "And what came then?" | python examples/chat.py --state state # goes on where the state was saved

A turn feeds its own tokens alone, however long the conversation: what was said before is in the state and is never read
again. Turns are written by the tokenizer's chat template; one without has lines of "User:" and "Assistant:".
"""

import argparse
import sys
from pathlib import Path

from generate import add_model_arguments, load_model, load_state, read, save_state, write
from transformers import PreTrainedTokenizerBase, set_seed

LINES = (
    "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
SAID_BEFORE = "⟨said before⟩"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--state",
        type=Path,
        default=Path("conversation"),
        metavar="DIR",
        help="where the conversation is kept; another folder, another conversation (default: %(default)s)",
    )
    add_model_arguments(parser)
    return parser.parse_args()


def turn(tokenizer: PreTrainedTokenizerBase, message: str, last: int | None) -> list[int]:
    """The tokens to read before the answer, from `last` on, the last token of the answer before, if there was one."""
    # A template may treat the first turn in its own way: a later one is what it writes after an answer.
    before = [] if last is None else [{"role": role, "content": SAID_BEFORE} for role in ("user", "assistant")]
    messages = [*before, {"role": "user", "content": message}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = text.split(SAID_BEFORE, len(before))[-1]

    ending = "" if last is None else tokenizer.decode([last], skip_special_tokens=True)
    if ending.endswith("\n"):
        text = text.removeprefix("\n")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return [last, *ids] if ending else ids  # after a special token the template ends the answer by itself


def main() -> None:
    args = parse_args()
    tokenizer, model = load_model(args)
    stop_strings = None
    if tokenizer.chat_template is None:
        tokenizer.chat_template = LINES
        stop_strings = ["\n"]

    state, last = model.new_cache(1), None
    if args.state.exists():
        state, last = load_state(model, args.state)
    while True:
        try:
            message = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            break
        last = read(model, state, turn(tokenizer, message, last))
        set_seed(args.seed + state.get_seq_length())  # the same draws in one run and in many, other ones in every turn
        last = write(model, tokenizer, state, last, args, stop_strings)
        save_state(model, state, last, args.state)


if __name__ == "__main__":
    main()
