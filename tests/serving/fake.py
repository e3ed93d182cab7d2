"""Servers in a thread that speak the interfaces of real ones, with the tiny Llama of `tests.models` behind them."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from loralens import Adapter
from loralens.core import Attachment
from tests import models

Reply = tuple[int, Any]  # status and body: JSON, or bytes as they are
Ask = Callable[[str, str, Any], Reply]  # method, path, body
NOTHING: Reply = (404, {"error": "not found"})
KINDS = ("vllm", "sglang", "llama.cpp", "lorax", "ollama", "openai")
NAMES = ("my-adapter", "base")  # of the servers; llama.cpp calls the adapter by its file


@contextmanager
def served(ask: Ask) -> Iterator[tuple[str, list[tuple[str, str, dict[str, str]]]]]:
    """The address of a server in a thread, and a list of its requests: method, path, headers."""
    seen: list[tuple[str, str, dict[str, str]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            seen.append((self.command, self.path, dict(self.headers)))
            status, answer = ask(self.command, self.path.partition("?")[0], body)
            if callable(answer):
                answer(self)
                return
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up are meant to
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


class Engine:
    """The tiny Llama, and the adapter that it has; None applies nothing, as servers do that ignore it."""

    def __init__(self, applied: Adapter | None) -> None:
        self.model, self.tokenizer, self.applied = models.llama(), models.tokenizer(), applied
        self.lock = threading.Lock()

    def logs(self, ids: list[int], name: str) -> np.ndarray:
        """Log-probabilities of every next token, shape (tokens, vocabulary)."""
        import torch

        plain = self.applied is None or name == "base"
        with self.lock, torch.no_grad(), nullcontext() if plain else Attachment(self.model, self.applied).on():
            return self.model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()

    def ids(self, text: str | list[int]) -> list[int]:
        return text if isinstance(text, list) else list(self.tokenizer(text)["input_ids"])

    def prompt(self, ids: list[int], name: str) -> list[float | None]:
        logs = self.logs(ids, name)
        return [None, *(float(logs[i, token]) for i, token in enumerate(ids[1:]))]

    def best(self, ids: list[int], name: str, count: int = 20) -> list[tuple[int, float]]:
        last = self.logs(ids, name)[-1]
        return [(int(token), float(last[token])) for token in np.argsort(-last)[:count]]


def speaks(kind: str, engine: Engine) -> Ask:  # noqa: C901  # a small server for each interface
    """What a server of one interface answers, with the fields that its own source writes."""

    def listed(owner: str) -> Reply:
        base = {"id": "base", "owned_by": owner, "root": "/models/base", "parent": None}
        return 200, {"data": [base, {**base, "id": "my-adapter", "root": "/adapters/a", "parent": "base"}]}

    def top(ids: list[int], name: str, count: int = 20) -> list[dict[str, Any]]:
        return [{"id": token, "logprob": value} for token, value in engine.best(ids, name, count)]

    def vllm(method: str, path: str, body: Any) -> Reply:
        if path == "/v1/models":
            return listed("vllm")
        if path == "/version":
            return 200, {"version": "0.32.0"}
        if path != "/v1/completions":
            return NOTHING
        if body["model"] not in NAMES:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if body.get("logprob_token_ids") and body.get("logprobs") is None:
            return 400, {"error": {"message": "when using `logprob_token_ids`, `logprobs` must be set."}}
        ids = engine.ids(body["prompt"])
        values = engine.prompt(ids, body["model"])
        rows = [None if v is None else {str(t): {"logprob": v}} for t, v in zip(ids, values, strict=True)]
        last = engine.logs(ids, body["model"])[-1]
        wanted = body.get("logprob_token_ids") or [token for token, _ in engine.best(ids, body["model"])]
        best = {f"token_id:{token}": float(last[token]) for token in wanted}
        return 200, {"choices": [{"prompt_logprobs": rows, "logprobs": {"top_logprobs": [best]}}]}

    def sglang(method: str, path: str, body: Any) -> Reply:
        if path == "/model_info":
            return 200, {"model_path": "/models/base", "is_generation": True}
        if path == "/server_info":
            return 200, {"version": "0.5.6", "max_lora_rank": 64, "lora_target_modules": ["q_proj"]}
        if path == "/v1/models":
            return listed("sglang")
        if path != "/generate":
            return NOTHING
        name = body.get("lora_path", "base")
        ids = body.get("input_ids") or engine.ids(body["text"])
        last = engine.logs(ids, name)[-1]
        chosen = [[float(last[token]), token, None] for token in body["token_ids_logprob"] or ()]
        rows = [[value, token, None] for value, token in zip(engine.prompt(ids, name), ids, strict=True)]
        return 200, {"meta_info": {"input_token_logprobs": rows, "output_token_ids_logprobs": [chosen]}}

    def llama(method: str, path: str, body: Any) -> Reply:
        if path == "/props":
            return 200, {"default_generation_settings": {}, "build_info": "b9000", "model_path": "/models/base.gguf"}
        if path == "/lora-adapters":
            return 200, [{"id": 0, "path": "/adapters/my-adapter", "scale": 1.0}]
        if path != "/completion":
            return NOTHING
        name = "base" if any(one == {"id": 0, "scale": 0.0} for one in body.get("lora", ())) else "my-adapter"
        ids = engine.ids(body["prompt"])
        best = top(ids, name, body["n_probs"])
        return 200, {"completion_probabilities": [{**best[0], "top_logprobs": best}]}

    def lorax(method: str, path: str, body: Any) -> Reply:
        if path == "/info":
            return 200, {"model_id": "base", "max_concurrent_requests": 128, "version": "0.12.1"}
        if path != "/generate":
            return NOTHING
        name, ids = body["parameters"].get("adapter_id", "base"), engine.ids(body["inputs"])
        prefill = [{"id": token, "logprob": value} for token, value in zip(ids, engine.prompt(ids, name), strict=True)]
        best = top(ids, name)
        return 200, {"details": {"prefill": prefill, "tokens": [{**best[0], "alternative_tokens": best}]}}

    def ollama(method: str, path: str, body: Any) -> Reply:
        if path == "/api/version":
            return 200, {"version": "0.13.0"}
        if path == "/api/tags":
            one = {"name": "my-adapter", "details": {"parent_model": "base"}}
            return 200, {"models": [{"name": "base", "details": {"parent_model": ""}}, one]}
        if path != "/api/generate":
            return NOTHING
        ids = engine.ids(body["prompt"])
        best = []
        for token, value in engine.best(ids, body["model"]):
            text = engine.tokenizer.decode([token])
            best.append({"token": text, "bytes": list(text.encode()), "logprob": value})
        return 200, {"prompt_eval_count": len(ids), "logprobs": [{**best[0], "top_logprobs": best}]}

    def openai(method: str, path: str, body: Any) -> Reply:
        if path == "/v1/models":
            return 200, {"data": [{"id": "base", "owned_by": "me too"}, {"id": "my-adapter", "owned_by": "me too"}]}
        if path != "/v1/completions":
            return NOTHING
        if not isinstance(body["prompt"], list):
            return 500, {"error": "ids only"}
        values = [*engine.prompt(body["prompt"], body["model"]), -1.0]
        return 200, {"choices": [{"logprobs": {"token_logprobs": values}}]}

    return dict(zip(KINDS, (vllm, sglang, llama, lorax, ollama, openai), strict=True))[kind]
