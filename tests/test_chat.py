"""examples/chat.py: a conversation is one text, in however many runs it is held."""

import io
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from saving import END_OF_TEXT, byte_tokenizer, save_checkpoint
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import chat
import generate
import train

TEMPLATE = (  # the first turn has a system prompt of its own
    "{% if messages[0].role == 'user' %}[system]be brief{{ eos_token }}{% endif %}"
    "{% for message in messages %}[{{ message.role }}]{{ message.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# How the template, or what stands in for none, writes a conversation: its beginning, and what follows an answer.
WRITTEN = {
    "template": (
        TEMPLATE,
        "[system]be brief<|endoftext|>[user]{}<|endoftext|>[assistant]",
        "<|endoftext|>[user]{}<|endoftext|>[assistant]",
    ),
    "example": (
        train.CHAT_TEMPLATE,
        "<|endoftext|>User: {}\nAssistant:",
        "<|endoftext|>User: {}\nAssistant:",
    ),
    "lines": (None, "<|endoftext|>User: {}\nAssistant:", "\nUser: {}\nAssistant:"),
}
MESSAGES = ["Who keeps the key?", "And the gate", "Go on."]
NEW_TOKENS = 23


def talk(
    folder: Path, state: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch, temperature: float = 0
) -> None:
    flags = f"--model {folder} --state {state} --temperature {temperature} --device cpu --max_new_tokens {NEW_TOKENS}"
    monkeypatch.setattr(sys, "argv", ["chat.py", *flags.split()])
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(message + "\n" for message in messages)))
    chat.main()


@pytest.mark.smoke
@pytest.mark.parametrize("how", WRITTEN)
def test_runs_make_one_conversation(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Three runs say what one says, and both what `generate` makes of the whole conversation so far, turn by turn; in
    the end the state has read every token of it but the last, once."""
    template, begin, follow = WRITTEN[how]
    save_checkpoint(tmp_path / "checkpoint", template)
    talk(tmp_path / "checkpoint", tmp_path / "whole", MESSAGES, monkeypatch)
    whole = capsys.readouterr().out
    for message in MESSAGES:
        talk(tmp_path / "checkpoint", tmp_path / "parts", [message], monkeypatch)
    assert capsys.readouterr().out == whole

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint"), byte_tokenizer()
    text, said = "", ""
    for number, message in enumerate(MESSAGES):
        text += (follow if number else begin).format(message)
        inputs = tokenizer(text, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :])
        text, said = text + answer, said + answer + "\n"
    assert whole == said

    last, states = [], []
    for folder in (tmp_path / "whole", tmp_path / "parts"):
        state, token = generate.load_state(model, folder)
        assert state.get_seq_length() == len(tokenizer(text).input_ids) - 1
        last.append(token)
        states.append(load_file(folder / "baka_cache.safetensors"))
    assert last == [tokenizer(text).input_ids[-1]] * 2
    assert_close(*states, rtol=0, atol=0)


def test_sampled_answers_do_not_depend_on_the_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "checkpoint")
    messages = ["Go on."] * 3
    talk(tmp_path / "checkpoint", tmp_path / "whole", messages, monkeypatch, temperature=5)
    whole = capsys.readouterr().out
    for message in messages:
        talk(tmp_path / "checkpoint", tmp_path / "parts", [message], monkeypatch, temperature=5)
    assert capsys.readouterr().out == whole
    assert len({*whole.split("\n")}) > 3


ANSWERS = {  # the end of an answer, and what is to be read of it before the next turn
    "cut short": ("a", "a"),
    "at the end of a line": ("\n", "\n"),
    "ended by the model": (END_OF_TEXT, ""),
}


@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.parametrize(("end", "read"), ANSWERS.values(), ids=ANSWERS)
def test_a_turn_follows_however_the_answer_ended(how: str, end: str, read: str) -> None:
    template, _, follow = WRITTEN[how]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template or chat.LINES
    (last,) = tokenizer(end).input_ids
    expected = read + follow.format("well")
    if read == "\n":
        expected = read + follow.format("well").removeprefix("\n")  # a line ends once
    assert tokenizer.decode(chat.turn(tokenizer, "well", last)) == expected


def test_an_answer_without_a_template_is_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`generate` is told to stop there; a template knows its own end."""
    stops = []

    def write(*arguments: object) -> int:
        stops.append(arguments[-1])
        return 5

    monkeypatch.setattr(chat, "write", write)
    for how, (template, _, _) in WRITTEN.items():
        save_checkpoint(tmp_path / how, template)
        talk(tmp_path / how, tmp_path / f"{how}-state", ["well"], monkeypatch)
    assert stops == [None, None, ["\n"]]
