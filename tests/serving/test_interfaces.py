"""`prove` and `served` against servers in a thread: every interface, hostile answers, and what is sent where."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens.serving.interfaces import connect
from loralens.serving.server import TOKEN, Question
from tests import models
from tests.cli.command import Command
from tests.marks import when_used
from tests.serving.fake import KINDS, NAMES, NOTHING, Engine, Reply, served, speaks

torch = when_used("torch")
TEXTS = [" ".join(np.random.default_rng(seed).choice(models.WORDS, 12)) for seed in range(8)]
SECRET = "s3cret-token"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an adapter of its attention and its MLP."""
    path = tmp_path_factory.mktemp("served")
    models.folder(models.llama(), path / "base")
    models.saved(made(), path / "adapter")
    return path


def made(seed: int = 0) -> loralens.Adapter:
    return models.adapter(models.llama(), ("q_proj", "v_proj", "down_proj"), seed=seed, rank=4, scale=1.0)


def prove(folder: Path, url: str, **options: Any) -> Any:
    kind = {"model": "my-adapter", "data": TEXTS} | options
    return loralens.prove(folder / "adapter", base=folder / "base", server=url, **kind)


@pytest.mark.parametrize("kind", KINDS)
def test_every_interface_tells_a_live_adapter_from_one_that_is_ignored(folder: Path, kind: str) -> None:
    base = {"base_name": "base"} if kind in ("lorax", "openai") else {}
    with served(speaks(kind, Engine(made()))) as (url, _):
        live = prove(folder, url, **base)
    assert live.where.startswith(kind)
    assert live.verdict == "live", live.headline
    assert live.requests <= 16
    assert live.served == pytest.approx(live.predicted, rel=1e-3)
    with served(speaks(kind, Engine(None))) as (url, _):
        ignored = prove(folder, url, **base)
    assert ignored.verdict == "ignored", ignored.headline
    assert ignored.served == 0


@pytest.mark.parametrize("kind", KINDS)
def test_two_names_of_a_server_are_told_apart_without_a_model(kind: str) -> None:
    for applied in (made(), None):
        engine = Engine(applied)
        answer = speaks(kind, engine)

        def ask(method: str, path: str, body: Any, engine: Any = engine, answer: Any = answer) -> Reply:
            # The texts are those of a bank, of which the tiny tokenizer knows no word.
            for key in {"prompt", "inputs", "text"} & set(body or ()):
                text = TEXTS[len(body[key]) % len(TEXTS)]
                body[key] = engine.ids(text) if kind == "openai" else text
            return answer(method, path, body)

        with served(ask) as (url, _):
            found = loralens.prove(server=url, between=NAMES)
        assert found.answer is (applied is not None)
        assert (found.distance > 0.01) is (applied is not None)
        assert found.chance == 0


def test_served_lists_names_with_parents_and_scales() -> None:
    for kind, names in {"vllm": NAMES, "sglang": NAMES, "llama.cpp": ("0", "default", "base"), "ollama": NAMES}.items():
        with served(speaks(kind, Engine(None))) as (url, _):
            found = loralens.served(url)
        assert {one.name for one in found.models} == set(names)
        assert {one.parent for one in found.models if one.name in ("my-adapter", "0")} == {"base"}
        assert found.kind == kind
    with served(speaks("sglang", Engine(None))) as (url, _):
        assert loralens.served(url).facts["max_lora_rank"] == "64"


def test_llama_cpp_is_asked_at_the_scale_that_it_states_or_at_one_that_is_given() -> None:
    bodies = []

    def ask(method: str, path: str, body: Any) -> Reply:
        if path == "/lora-adapters":
            return 200, [{"id": 0, "path": "a.gguf", "scale": 0.25}, {"id": 1, "path": "/x/b.gguf", "scale": 0}]
        bodies.append(body)
        return 200, {"completion_probabilities": [{"top_logprobs": [{"id": 3, "logprob": -1.0}]}]}

    with served(ask) as (url, _):
        server = connect(url, kind="llama.cpp")
        for name in ("0", "a.gguf", "b.gguf", "1=0.5", "base", "default"):
            server.ask(Question((1, 2), "", (3,)), name)
        with pytest.raises(loralens.LoraLensError, match=r"no adapter c\.gguf"):
            server.ask(Question((1, 2), "", (3,)), "c.gguf")
    scales = [[one["scale"] for one in body["lora"]] if "lora" in body else None for body in bodies]
    assert scales == [[0.25, 0], [0.25, 0], [0, 0], [0, 0.5], [0, 0], None]


# ---- Hostile servers


def _stream(handler: Any) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.02)


def _large(handler: Any) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" " * (1 << 20))


def _hang(handler: Any) -> None:
    time.sleep(3)


NOT_KNOWN = "is none of"
HOSTILE: dict[str, tuple[Reply, str]] = {
    "stream": ((200, _stream), "gave no answer within"),
    "large": ((200, _large), "MiB"),
    "hang": ((200, _hang), "gave no answer within"),
    "deep": ((200, b'{"choices":' + b"[" * 100_000), "JSON"),
    "list": ((200, b"[1, 2"), "JSON"),
    "bytes": ((200, b"\xff\xfe\x00"), "JSON"),
    "empty": ((200, {}), "answers for 0 tokens"),
    "short": ((200, {"choices": [{"prompt_logprobs": [None]}]}), "answers for 1 tokens"),
    "nan": ((200, b'{"choices": [{"prompt_logprobs": [null, {"2": {"logprob": NaN}}]}]}'), ""),
    "strings": ((200, {"choices": [{"prompt_logprobs": [None, {"2": {"logprob": "-1"}}]}]}), "no log-probabilities"),
    "huge": ((200, b'{"choices": [{"prompt_logprobs": [null, {"2": {"logprob": 1' + b"0" * 400 + b"}}]}]}"), ""),
    "types": ((200, {"choices": {"prompt_logprobs": 3}}), "answers for 0 tokens"),
    "401": ((401, {"error": f"wrong token {SECRET}"}), TOKEN),
    "404": ((404, {"error": {"message": "no such model\x1b[2J"}}), r"\x1b[2J"),
    "500": ((500, f"broken {SECRET}".encode()), "answers 500: broken …"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_answers_are_one_message(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reply, message = HOSTILE[case]
    monkeypatch.setenv(TOKEN, SECRET)
    with served(lambda *_: reply) as (url, _):
        server = connect(url, kind="vllm", timeout=20 if case == "large" else 0.3)
        with pytest.raises(loralens.LoraLensError) as caught:
            server.ask(Question((1, 2), "", ()), "x")
    error: BaseException | None = caught.value
    assert message in str(error)
    while error:  # a traceback shows the causes too
        assert SECRET not in f"{error}{error!r}{getattr(error, 'fix', '')}"
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("junk", [None, 3, "x", [], [[]], [{}], {"a": 1}, [None, [None]]], ids=repr)
def test_fields_of_other_types_are_one_message(kind: str, junk: Any) -> None:
    keys = (
        "data", "choices", "meta_info", "list", "completion_probabilities", "details", "logprobs", "models",
        "lora_paths", "served_model_name", "version", "vllm_config",
    )  # fmt: skip
    with served(lambda *_: (200, dict.fromkeys(keys, junk))) as (url, _):
        server = connect(url, kind=kind, timeout=5)
        server.models(), server.facts()
        with pytest.raises(loralens.LoraLensError):
            server.ask(Question((1, 2), "x y", (3,)), "base")


def test_names_with_control_characters_are_not_listed() -> None:
    reply = {"data": [{"id": "a\x1b[2J", "owned_by": "vllm"}, {"id": "b", "owned_by": "vllm", "parent": "\u202e"}]}
    with served(lambda _, path, __: (200, reply) if path == "/v1/models" else NOTHING) as (url, _):
        assert [(one.name, one.parent) for one in loralens.served(url).models] == [("b", None)]


def test_a_server_that_is_none_or_still_loads_is_said() -> None:
    for reply, message in ((NOTHING, NOT_KNOWN), ((503, {"error": {"message": "Loading model"}}), "Loading model")):
        with served(lambda *_, reply=reply: reply) as (url, _), pytest.raises(loralens.LoraLensError, match=message):
            loralens.served(url)


# ---- What is sent, and where


def test_a_redirect_to_another_host_is_named_and_not_followed() -> None:
    with served(lambda *_: NOTHING) as (other, seen):

        def send(handler: Any) -> None:
            handler.send_response(302)
            handler.send_header("Location", f"{other}/v1/models")
            handler.end_headers()

        with served(lambda *_: (302, send)) as (url, _), pytest.raises(loralens.LoraLensError, match="redirects to"):
            loralens.served(url)
    assert not seen


def test_the_token_is_sent_and_nothing_but_the_address_is_contacted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(TOKEN, SECRET)
    caplog.set_level("DEBUG")
    with served(lambda *_: NOTHING) as (proxy, asked), served(speaks("vllm", Engine(None))) as (url, seen):
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy)
        monkeypatch.setenv("NO_PROXY", "")
        done = Command("served").good(url, "--json")
    assert json.loads(done.stdout)["kind"] == "vllm"
    assert not asked
    assert {headers["Authorization"] for _, _, headers in seen} == {f"Bearer {SECRET}"}
    assert SECRET not in done.stdout + done.stderr + caplog.text


@pytest.mark.parametrize("token", ["a\nb", "a b", "ü"])
def test_a_token_that_no_header_can_hold_is_not_shown(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, token)
    with pytest.raises(loralens.LoraLensError) as caught:
        connect("http://127.0.0.1:9")
    assert TOKEN in str(caught.value)
    assert token not in str(caught.value)
