"""Read a long document once and ask it many questions.

    python examples/ask.py "Who keeps the key?" "Where is the mill?" --document book.txt --save_state read
    python examples/ask.py "And when was that?" --load_state read

The document is read chunk by chunk into a state of constant size. Each question goes on from a copy of that state: it
costs its own tokens alone, however long the document, and none knows of another. What is answered well is what a model
was trained to keep: see examples/memory_tasks.py and examples/babilong.py for facts that only memory can tell.
"""

import argparse
from itertools import chain
from pathlib import Path

from generate import add_model_arguments, load_model, load_state, pieces, read, save_state, write


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("questions", nargs="*", help="each is answered as if it were the only one")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--document", type=Path, metavar="FILE", help="text to read")
    source.add_argument("--load_state", type=Path, metavar="DIR", help="state of a document that was read before")
    add("--save_state", type=Path, metavar="DIR", help="save the state of the document here")
    add("--form", default="\n\nQuestion: {}\nAnswer:", help="how a question is put (default: %(default)r)")
    add_model_arguments(parser)
    args = parser.parse_args()
    if args.document and not args.document.is_file():
        parser.error(f"--document: there is no file {str(args.document)!r}")
    return args


def main() -> None:
    args = parse_args()
    tokenizer, model = load_model(args)
    if args.load_state:
        state, last = load_state(model, args.load_state)
    else:
        state = model.new_cache(1)
        with args.document.open(encoding="utf-8", errors="replace") as file:
            ids = chain.from_iterable(tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces(file))
            last = read(model, state, chain([tokenizer.bos_token_id], ids))
    if args.save_state:
        save_state(model, state, last, args.save_state)
    for question in args.questions:
        print(question)
        asked = state.clone()
        ids = tokenizer(args.form.format(question), add_special_tokens=False).input_ids
        write(model, tokenizer, asked, read(model, asked, [last, *ids]), args, stop_strings=["\n"])


if __name__ == "__main__":
    main()
