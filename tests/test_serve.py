"""examples/serve.py speaks as the model does, to many at once and from states, with OpenAI's own client."""

import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from saving import byte_tokenizer, save_checkpoint

from baka_hf.state_store import StateStore

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train

openai, uvicorn, _ = map(pytest.importorskip, ("openai", "uvicorn", "fastapi"))
serve = pytest.importorskip("serve")

TEXT = "The river runs by the mill, and the miller's daughter keeps the key of the gate."
PROMPTS = [TEXT, TEXT[4:9], TEXT[30:71], "?", TEXT * 3]
NEW_TOKENS = 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("serve")
    model, tokenizer = save_checkpoint(folder / "baka-small"), byte_tokenizer()
    tokenizer.chat_template = train.CHAT_TEMPLATE
    app = serve.new_app(model, tokenizer, "baka-small", 3, StateStore(folder / "states", model))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=running.run)
    thread.start()
    deadline = time.monotonic() + 60
    while not running.started and time.monotonic() < deadline:
        time.sleep(0.02)
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1",
        api_key="none",
        max_retries=0,
        timeout=60,
        http_client=openai.DefaultHttpxClient(trust_env=False),  # past any proxy
    ) as client:
        yield SimpleNamespace(client=client, model=model, tokenizer=tokenizer)
    running.should_exit = True
    thread.join()


def test_requests_of_the_docs_are_valid() -> None:
    calls = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8").splitlines()
    requests = [shlex.split(call)[-1] for call in calls if call.startswith("curl ")]
    assert [serve.Completion.model_validate_json(request).stream for request in requests] == [False, True, False]


def expected(server: SimpleNamespace, prompt: str, new_tokens: int = NEW_TOKENS) -> str:
    inputs = server.tokenizer(prompt, return_tensors="pt")
    output = server.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return server.tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def asked(prompt: str, **more: object) -> dict[str, object]:
    return dict(model="baka-small", prompt=prompt, max_tokens=NEW_TOKENS, temperature=0) | more


def test_many_at_once(server: SimpleNamespace) -> None:
    """More than there are rows, in one piece and token by token."""

    def streamed(prompt: str) -> str:
        pieces = list(server.client.completions.create(**asked(prompt, stream=True)))
        assert len(pieces) > NEW_TOKENS / 2
        assert {piece.choices[0].finish_reason for piece in pieces[:-1]} == {None}
        assert pieces[-1].choices[0].finish_reason == "length"
        return "".join(piece.choices[0].text for piece in pieces)

    def whole(prompt: str) -> str:
        answer = server.client.completions.create(**asked(prompt))
        assert answer.choices[0].finish_reason == "length"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), NEW_TOKENS)
        return answer.choices[0].text

    with ThreadPoolExecutor(2 * len(PROMPTS)) as pool:
        found = [list(pool.map(say, PROMPTS)) for say in (streamed, whole)]
    assert found == [[expected(server, prompt) for prompt in PROMPTS]] * 2


def test_chat(server: SimpleNamespace) -> None:
    assert [model.id for model in server.client.models.list()] == ["baka-small"]
    options = dict(model="baka-small", max_tokens=NEW_TOKENS, temperature=0)
    options["messages"] = [{"role": "user", "content": "hello"}]
    told = expected(server, "<|endoftext|>User: hello\nAssistant:")
    answer = server.client.chat.completions.create(**options).choices[0]
    assert (answer.message.role, answer.message.content, answer.finish_reason) == ("assistant", told, "length")
    pieces = list(server.client.chat.completions.create(stream=True, **options))
    assert "".join(piece.choices[0].delta.content for piece in pieces) == told


def test_completions_of_a_user_go_on(server: SimpleNamespace) -> None:
    text = ""
    for turn, prompt in enumerate(("One. ", "Two, and more. ", "Three. ")):
        text += prompt
        stream = server.client.completions.create(**asked(prompt, user="ada", stream=turn == 1, max_tokens=7))
        pieces = stream if turn == 1 else [stream]
        said = "".join(piece.choices[0].text for piece in pieces)
        assert said == expected(server, text, 7)
        text += said


def test_sampling_has_a_seed(server: SimpleNamespace) -> None:
    texts = [server.client.completions.create(**asked("a", temperature=1, seed=seed)).choices[0].text for seed in "112"]
    assert texts[0] == texts[1] != texts[2]


def test_bad_requests_are_told(server: SimpleNamespace) -> None:
    for more, message in (
        (dict(temperature=-1), "temperature"),
        (dict(max_tokens=0), "`max_new_tokens` must be an integer of at least 1, got 0"),
        (dict(prompt=""), "at least one token id"),
        (dict(extra_body=dict(best_of_all=3)), "best_of_all: Extra inputs are not permitted"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            server.client.completions.create(**asked("a") | more)
    kind = {"Content-Type": "application/json"}
    for path, body, message in (  # what no client of Python's would send
        ("completions", rb'{"prompt": "\ud800"}', "surrogates not allowed"),
        ("chat/completions", rb'{"messages": [{"role": "user", "content": "\ud800"}]}', "surrogates not allowed"),
    ):
        answer = httpx.post(f"{server.client.base_url}{path}", content=body, headers=kind, trust_env=False)
        assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    assert server.client.completions.create(**asked("?")).choices[0].text == expected(server, "?")


def test_who_stops_listening_makes_room(server: SimpleNamespace) -> None:
    streams = [server.client.completions.create(**asked(TEXT, stream=True, max_tokens=10**6)) for _ in range(3)]
    for stream in streams:
        next(iter(stream))
        stream.close()
    assert server.client.completions.create(**asked("?")).choices[0].text == expected(server, "?")
