"""Serve a BakaLLM checkpoint to many users at once, over an API like OpenAI's.

    python examples/serve.py --num_rows 64                       # on a GPU: so many texts are said at the same time
    python examples/serve.py --states states --max_age 86400     # completions of a user go on from one another
    curl localhost:8000/v1/completions --json '{"prompt": "def main(", "max_tokens": 50}'

Texts join and leave a running batch (`baka_hf.serving`). A chat is read anew with every request, as OpenAI's is. With
`--states` a completion that names a `user` goes on from all that this user's completions have read and said before: its
prompt is what is new. It takes `pip install -e ".[serving]"`.
"""

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from generate import load_model
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baka_hf.serving import Batcher, Request
from baka_hf.state_store import StateStore


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="baka-small", help="folder or Hub id of a checkpoint (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--dtype", default="auto", help="float32, bfloat16, ... (default: the checkpoint's)")
    add("--num_rows", type=int, default=16, help="texts that are said at the same time (default: %(default)s)")
    add("--states", type=Path, metavar="DIR", help="keep what a user's completions have read and said here")
    add("--max_age", type=float, help="seconds after which a user's state is deleted if it is not used")
    add("--max_bytes", type=int, help="what all states may take; those that were not used for longest go first")
    add("--host", default="127.0.0.1", help="default: %(default)s")
    add("--port", type=int, default=8000, help="default: %(default)s")
    args = parser.parse_args()
    args.seed = 0
    return args


class Asked(BaseModel):
    """What both kinds of requests may say; anything else is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stream: bool = False
    user: str | None = None


class Completion(Asked):
    prompt: str


class Chat(Asked):
    messages: list[dict[str, str]]


class Engine:
    """A batcher whose steps are made in a thread of their own for as long as there is anything to do."""

    def __init__(self, model: PreTrainedModel, num_rows: int):
        self.model, self.num_rows = model, num_rows
        self.batcher = Batcher(model, num_rows)
        self.said: dict[Request, asyncio.Queue] = {}
        self.wake = asyncio.Event()

    def add(self, **arguments: Any) -> Request:
        request = self.batcher.add(**arguments)
        self.said[request] = asyncio.Queue()
        self.wake.set()
        return request

    async def tokens(self, request: Request) -> AsyncIterator[int]:
        """What a text says, as it says it. Whoever stops listening has it cancelled."""
        try:
            while (token := await self.said[request].get()) is not None:
                if isinstance(token, Exception):
                    raise RuntimeError("the batch that this text was in has failed") from token
                yield token
        finally:
            self.batcher.cancel(request)
            del self.said[request]

    async def run(self) -> None:
        loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1)
        while True:
            await self.wake.wait()
            self.wake.clear()
            while not self.batcher.is_idle:
                try:
                    said: Any = await loop.run_in_executor(thread, self.batcher.step)
                except Exception as error:  # those who are in it are told, and others begin anew
                    said = [(request, error) for request in self.said]
                    self.batcher = Batcher(self.model, self.num_rows)
                for request, token in said:
                    if request in self.said:
                        self.said[request].put_nowait(token)


def new_app(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    num_rows: int = 16,
    store: StateStore | None = None,
) -> FastAPI:
    engines: list[Engine] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engines.append(Engine(model, num_rows))
        task = asyncio.create_task(engines[0].run())
        yield
        task.cancel()

    app = FastAPI(title="BakaLLM", lifespan=lifespan)

    @app.exception_handler(RequestValidationError)
    async def refuse_fields(_: Any, error: RequestValidationError) -> JSONResponse:
        return await refuse(_, ValueError("; ".join(f"{each['loc'][-1]}: {each['msg']}" for each in error.errors())))

    @app.exception_handler(TemplateError)  # a chat as its template does not want it
    @app.exception_handler(ValueError)
    async def refuse(_: Any, error: Exception) -> JSONResponse:
        return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, 400)

    def ids_of(text: str, add_special_tokens: bool) -> list[int]:
        text.encode()  # a ValueError where half a character stands alone, which JSON may say
        return tokenizer(text, add_special_tokens=add_special_tokens).input_ids

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "baka-hf"}]}

    @app.post("/v1/completions")
    async def complete(asked: Completion) -> Any:
        state = None
        if asked.user is not None:
            if store is None:
                raise ValueError("expected no `user`: this server keeps no states (--states).")
            state = await asyncio.to_thread(store.load, asked.user)
        ids = ids_of(asked.prompt, add_special_tokens=state is None)
        return await answer(asked, ids, "text_completion", lambda text: {"text": text}, state)

    @app.post("/v1/chat/completions")
    async def chat(asked: Chat) -> Any:
        text = tokenizer.apply_chat_template(asked.messages, tokenize=False, add_generation_prompt=True)
        ids = ids_of(text, add_special_tokens=False)
        kind = "chat.completion.chunk" if asked.stream else "chat.completion"
        place = "delta" if asked.stream else "message"
        return await answer(asked, ids, kind, lambda text: {place: {"role": "assistant", "content": text}})

    async def answer(asked: Asked, ids: list[int], kind: str, content: Any, state: Any = None) -> Any:
        keeps = isinstance(asked, Completion) and asked.user is not None
        options = asked.model_dump(include={"temperature", "top_k", "top_p", "seed"})
        options |= dict(max_new_tokens=asked.max_tokens, state=state, keep_state=keeps)
        request = engines[0].add(input_ids=ids, **options)
        head = {"id": f"cmpl-{uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}

        def message(text: str, reason: str | None) -> dict[str, Any]:
            return head | {"choices": [{"index": 0, "finish_reason": reason} | content(text)]}

        async def end() -> None:
            if keeps and store is not None and request.state is not None:
                await asyncio.to_thread(store.save, asked.user, request.state)

        async def events() -> AsyncIterator[str]:
            decoder = DecodeStream(skip_special_tokens=True)
            async for token in engines[0].tokens(request):
                text = decoder.step(tokenizer.backend_tokenizer, token)
                if text:
                    yield f"data: {json.dumps(message(text, None))}\n\n"
            await end()
            yield f"data: {json.dumps(message('', request.finish_reason))}\n\ndata: [DONE]\n\n"

        if asked.stream:
            return StreamingResponse(events(), media_type="text/event-stream")
        tokens = [token async for token in engines[0].tokens(request)]
        await end()
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(tokens), "total_tokens": len(ids) + len(tokens)}
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        return message(text, request.finish_reason) | {"usage": usage}

    return app


def main() -> None:
    args = parse_args()
    tokenizer, model = load_model(args)
    store = None if args.states is None else StateStore(args.states, model, args.max_age, args.max_bytes)
    app = new_app(model, tokenizer, args.model, args.num_rows, store)
    uvicorn.run(app, host=args.host, port=args.port)


if __name__ == "__main__":
    main()
