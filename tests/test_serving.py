"""`transformers serve`, the real program on a port of this machine, speaks as the model itself does."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from saving import byte_tokenizer, save_checkpoint
from transformers import GenerationConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
if not hasattr(transformers, "AutoModelForDecision"):
    pytest.skip("transformers serve reads a checkpoint's own code since 5.24", allow_module_level=True)

# The commands of the docs, as they stand there.
DOCS = (Path(__file__).parents[1] / "docs" / "ecosystem.md").read_text(encoding="utf-8")
SERVE, CHAT = (shlex.split(call) for call in re.findall(r"^transformers (.*)$", DOCS, re.MULTILINE))
# The command-line program, where `import baka_hf` fails: it has nothing but the checkpoint.
PROGRAM = "import sys; sys.modules['baka_hf'] = None; from transformers.cli.transformers import main; main()"
TOKENIZER = byte_tokenizer()
TEXT = "The river runs by the mill, and the miller's daughter keeps the key of the gate."
PROMPTS = [TEXT, TEXT[4:9], TEXT[30:71], TEXT[::-1], "?", TEXT * 3]  # 1 to 48 chunks
NEW_TOKENS = 30
SECONDS = 120  # for whatever the server is asked


def start(*arguments: str, **options: object) -> subprocess.Popen[str]:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables["NO_PROXY"] = "localhost,127.0.0.1"
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.Popen(command, text=True, env=variables | options.pop("env", {}), **options)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("serving")
    model = save_checkpoint(folder / "baka-small", train.CHAT_TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log"
    with log.open("w") as file:
        # The model as an argument: it is loaded before the port opens, and never unloaded.
        arguments = f"--device cpu --host 127.0.0.1 --port {port}".split()
        process = start(*SERVE, *arguments, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
        try:
            wait_for(port, process, log)
            client = openai.OpenAI(
                base_url=f"http://127.0.0.1:{port}/v1",
                api_key="none",
                max_retries=0,
                timeout=SECONDS,
                http_client=openai.DefaultHttpxClient(trust_env=False),  # past any proxy
            )
            yield SimpleNamespace(folder=folder, model=model, port=port, client=client, log=log)
            client.close()
            process.terminate()
            assert process.wait(30) in (0, -15), log.read_text()
        finally:
            process.kill()
            process.wait()


def wait_for(port: int, process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"the server did not start:\n{log.read_text()}")


def expected(server: SimpleNamespace, prompt: str) -> str:
    inputs = TOKENIZER(prompt, return_tensors="pt")
    output = server.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return TOKENIZER.decode(output[0, inputs.input_ids.shape[1] :])


def complete(server: SimpleNamespace, prompt: str) -> str:
    answer = server.client.completions.create(
        model="baka-small", prompt=prompt, max_tokens=NEW_TOKENS, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].text for chunk in answer]
    assert len(pieces) > NEW_TOKENS / 2  # a token at a time
    return "".join(pieces)


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_completion(server: SimpleNamespace, prompt: str) -> None:
    answer = server.client.completions.create(model="baka-small", prompt=prompt, max_tokens=NEW_TOKENS, temperature=0)
    assert answer.choices[0].text == expected(server, prompt)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(prompt)


def test_concurrent_streams_do_not_mix(server: SimpleNamespace) -> None:
    """Every stream, twice at a time, is what it is alone."""
    with ThreadPoolExecutor(2 * len(PROMPTS)) as pool:
        found = list(pool.map(lambda prompt: complete(server, prompt), PROMPTS * 2))
    assert found == [expected(server, prompt) for prompt in PROMPTS] * 2
    assert len(set(found)) == len(PROMPTS)


def test_chat(server: SimpleNamespace) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    messages.append({"role": "user", "content": "go on"})
    answer = server.client.chat.completions.create(
        model="baka-small", messages=messages, max_tokens=NEW_TOKENS, temperature=0
    )
    prompt = "<|endoftext|>User: hello\nAssistant: yes<|endoftext|>User: go on\nAssistant:"
    assert answer.choices[0].message.content == expected(server, prompt)


def test_chat_program(server: SimpleNamespace) -> None:
    """`transformers chat`, told two things and to end."""
    arguments = f"http://127.0.0.1:{server.port} max_new_tokens={NEW_TOKENS} do_sample=False".split()
    process = start(
        *CHAT,
        *arguments,
        env={"HF_HUB_OFFLINE": "0", "COLUMNS": "200"},  # offline, this client refuses even this machine's server
        cwd=server.folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        said, _ = process.communicate("hello\nn\n!clear\nwell\nn\n!exit\n", timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, said
    for message in ("hello", "well"):
        answer = expected(server, f"<|endoftext|>User: {message}\nAssistant:")
        # It shows answers as Markdown, which letters and digits survive.
        assert len(letters(answer)) > 5 and letters(answer) in letters(said)


def letters(text: str) -> str:
    return "".join(character for character in text if character.isalnum())


def test_decisions(server: SimpleNamespace) -> None:
    """The probabilities of typed answers are those of the labels' logits, as the pipeline finds them."""
    question = {"type": "choice", "instructions": "Who keeps the key?", "criteria": {"miller": "he", "daughter": "she"}}
    request = {"state": TEXT, "questions": {"key": question}}
    body = json.dumps(request | {"model": "baka-small"}).encode()
    call = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/systemone", body, {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(call, timeout=SECONDS) as response:
        found = json.load(response)["answers"]
    decide = transformers.pipeline("decision", model=str(server.folder / "baka-small"), device="cpu")
    assert found == decide(request)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_cache_options_of_a_request(server: SimpleNamespace, implementation: str) -> None:
    """`serve --compile` asks for a static cache."""
    config = dict(cache_implementation=implementation, max_new_tokens=NEW_TOKENS, do_sample=False)
    answer = server.client.completions.create(
        model="baka-small", prompt=TEXT, extra_body={"generation_config": json.dumps(config)}
    )
    assert answer.choices[0].text == expected(server, TEXT)


def test_other_caches_are_refused(server: SimpleNamespace) -> None:
    """With a message that reaches who asked; the server goes on."""
    config = dict(cache_implementation="quantized", max_new_tokens=NEW_TOKENS)
    stream = server.client.completions.create(
        model="baka-small", prompt=TEXT, stream=True, extra_body={"generation_config": json.dumps(config)}
    )
    with pytest.raises(openai.APIError) as raised:
        list(stream)
    assert "expected `cache_implementation` to be None, 'dynamic' or 'static'" in str(raised.value.body)
    assert complete(server, TEXT) == expected(server, TEXT)


def test_continuous_batching_is_refused(server: SimpleNamespace) -> None:
    """`serve --continuous-batching` warns and answers requests one by one; whoever asks the model itself is told."""
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import GenerationState

    modality = ModelManager.get_model_modality(server.model, TOKENIZER)
    assert not GenerationState(continuous_batching=True).use_continuous_batching(server.model, modality)
    with pytest.raises(ValueError, match="got continuous batching"):
        server.model.generate_batch([[5, 6]], generation_config=GenerationConfig(max_new_tokens=2, eos_token_id=0))
    with pytest.raises(ValueError, match="got continuous batching"):
        server.model.generate(torch.tensor([[5, 6]]), cache_implementation="paged", max_new_tokens=2)
