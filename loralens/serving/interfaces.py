"""The interfaces of servers of language models, one class each, and the table by which `connect` recognises them.

What was seen on real servers: vLLM 0.32.0, llama.cpp as in llama-cpp-python 0.3.36. SGLang, LoRAX and Ollama follow
their documents.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from loralens.errors import FormatError, LoraLensError, OptionError
from loralens.serving.server import (
    TOP,
    Answer,
    Connection,
    Question,
    RefusedError,
    ServedModel,
    Server,
    log_probability,
    mapping,
    printable,
    rows,
    text_of,
    token_id,
)

TokenIds = Callable[[bytes], int | None]  # the id of a token from its bytes; None if the tokenizer has no such token


def _prompt(values: list[float], question: Question, kind: str) -> NDArray[np.float64]:
    """The log-probabilities of the tokens after the first; they must be as many as were asked for."""
    if len(values) != len(question.ids):
        raise FormatError(
            f"{kind} answers for {len(values)} tokens, and {len(question.ids)} were asked",
            fix="see that the server has the tokenizer of --base, and adds no token to a prompt",
        )
    return np.array(values[1:], np.float64)


@final
class VLLM(Server):
    """vLLM's completions: token ids as the prompt, and ``prompt_logprobs``."""

    kind = "vllm"
    _by_id = True  # whether it takes `logprob_token_ids`, which older releases refuse

    @classmethod
    def recognise(cls, connection: Connection) -> "VLLM | None":
        """By the owner of its models."""
        listed = rows(mapping(connection.try_get("v1/models")).get("data"))
        if not any(mapping(model).get("owned_by") == "vllm" for model in listed):
            return None
        return cls(connection, text_of(mapping(connection.try_get("version")).get("version")))

    def models(self) -> list[ServedModel]:  # noqa: D102
        return [
            ServedModel(name, text_of(model.get("parent")), text_of(model.get("root")))
            for model in map(mapping, rows(self.connection.get("v1/models").get("data")))
            if (name := text_of(model.get("id")))
        ]

    def _ask(self, question: Question, name: str) -> Answer:
        content: dict[str, Any] = {
            "model": name,
            "prompt": list(question.ids),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
            "return_tokens_as_token_ids": True,
            # An entry of the prefix cache that another state of the adapter left would answer for this one.
            "cache_salt": f"loralens-{self.requests}",
        }
        if question.next_ids:
            chosen = {"logprob_token_ids": list(question.next_ids[:TOP])} if self._by_id else {"logprobs": TOP}
            content |= chosen
        try:
            answer = self.connection.post("v1/completions", content)
        except RefusedError as error:
            if error.status not in (400, 422) or not self._by_id or not question.next_ids:
                raise
            self._by_id = False
            return self._ask(question, name)
        choice = mapping(next(iter(rows(answer.get("choices"))), None))
        values = []
        for token, row in zip(question.ids, rows(choice.get("prompt_logprobs")), strict=False):
            values.append(log_probability(mapping(mapping(row).get(str(token))).get("logprob")))
        tops = rows(mapping(choice.get("logprobs")).get("top_logprobs"))
        following = {
            int(key.removeprefix("token_id:")): log_probability(value)
            for key, value in mapping(tops[0] if tops else None).items()
            if key.removeprefix("token_id:").isdecimal()
        }
        if self._by_id and question.next_ids and not following:
            self._by_id = False  # accepted, and ignored
            return self._ask(question, name)
        return Answer(_prompt(values, question, self.kind), following)


@final
class SGLang(Server):
    """SGLang's ``/generate``: ``return_logprob``, and adapters by ``lora_path``."""

    kind = "sglang"
    _base = ""

    @classmethod
    def recognise(cls, connection: Connection) -> "SGLang | None":
        """By its own answer about the model."""
        for path in ("model_info", "get_model_info"):
            found = mapping(connection.try_get(path))
            if "model_path" in found and "is_generation" in found:
                return cls(connection, text_of(_sglang_facts(connection).get("version")))
        return None

    def models(self) -> list[ServedModel]:  # noqa: D102
        facts = _sglang_facts(self.connection)
        base = text_of(facts.get("served_model_name")) or text_of(facts.get("model_path")) or "base"
        loaded = facts.get("lora_paths") or []
        named = (
            [(name, path) for name, path in loaded.items()]
            if isinstance(loaded, dict)
            else [
                (one.get("lora_name"), one.get("lora_path")) if isinstance(one, dict) else (one, one)
                for one in rows(loaded)
            ]
        )
        adapters = [ServedModel(own, base, text_of(path)) for name, path in named if (own := text_of(name))]
        return [ServedModel(base, None, text_of(facts.get("model_path"))), *adapters]

    def facts(self) -> dict[str, str]:  # noqa: D102
        keys = ("max_lora_rank", "lora_target_modules", "max_loras_per_batch", "lora_backend")
        found = _sglang_facts(self.connection)
        return {key: printable(found[key]) for key in keys if found.get(key) is not None}

    def _ask(self, question: Question, name: str) -> Answer:
        self._base = self._base or self.models()[0].name
        content: dict[str, Any] = {
            "input_ids": list(question.ids),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "token_ids_logprob": list(question.next_ids) or None,
        }
        if name not in (self._base, "base"):
            content["lora_path"] = name
        info = mapping(self.connection.post("generate", content).get("meta_info"))
        values = [log_probability((rows(row) or [None])[0]) for row in rows(info.get("input_token_logprobs"))]
        chosen = rows(info.get("output_token_ids_logprobs"))
        following = {
            token_id(row[1]): log_probability(row[0])
            for row in rows(chosen[0] if chosen else None)
            if len(rows(row)) >= 2
        }
        return Answer(_prompt(values, question, self.kind), following)


def _sglang_facts(connection: Connection) -> Mapping[str, Any]:
    return mapping(connection.try_get("server_info") or connection.try_get("get_server_info"))


@final
class LlamaCpp(Server):
    """llama.cpp's own server: the whole distribution of the next token, and adapters by number with a scale.

    A name is ``base``, or the number or the path of an adapter as ``/lora-adapters`` lists it. It gives nothing for the
    tokens of a prompt, so a request answers for one position.
    """

    kind = "llama.cpp"
    gives_prompt: ClassVar[bool] = False

    @classmethod
    def recognise(cls, connection: Connection) -> "LlamaCpp | None":
        """By its properties."""
        found = mapping(connection.try_get("props"))
        if "default_generation_settings" not in found:
            return None
        return cls(connection, text_of(found.get("build_info")))

    def models(self) -> list[ServedModel]:  # noqa: D102
        path = text_of(mapping(self.connection.try_get("props")).get("model_path"))
        return [
            ServedModel("base", None, path),
            *(ServedModel(str(number), "base", place, scale) for number, place, scale in self._adapters()),
        ]

    def _adapters(self) -> list[tuple[int, str | None, float]]:
        return [
            (token_id(one.get("id")), text_of(one.get("path")), float(one.get("scale") or 0.0))
            for one in map(mapping, rows(self.connection.get("lora-adapters").get("list")))
            if token_id(one.get("id")) >= 0
        ]

    def _ask(self, question: Question, name: str) -> Answer:
        adapters = self._adapters()
        found = [
            (number, scale)
            for number, place, scale in adapters
            if name in (str(number), place) or (place and place.replace("\\", "/").endswith("/" + name))
        ]
        # An unknown number would answer as the base.
        if name != "base" and not found:
            names = ", ".join(f"{number} ({place})" for number, place, _ in adapters) or "no adapter"
            raise OptionError(f"llama.cpp has no adapter {name!r}", fix=f"give base, or one of: {names}")
        # An empty list would mean the scales of the start, so every adapter is named.
        scales = [
            {"id": number, "scale": (scale or 1.0) if (number, scale) in found else 0.0}
            for number, _, scale in adapters
        ]
        content: dict[str, Any] = {
            "prompt": list(question.ids),
            "n_predict": 1,
            "n_probs": 1 << 20,
            "temperature": 0,
            "cache_prompt": False,
            "post_sampling_probs": False,
        }
        if scales:
            content["lora"] = scales
        answer = self.connection.post("completion", content)
        first = mapping(next(iter(rows(answer.get("completion_probabilities"))), None))
        return Answer(
            None,
            {
                token_id(one.get("id")): log_probability(one.get("logprob"))
                for one in map(mapping, rows(first.get("top_logprobs")))
            },
        )


@final
class Lorax(Server):
    """LoRAX's ``/generate``: texts as prompts, ``decoder_input_details``, and adapters by ``adapter_id``."""

    kind = "lorax"
    chooses_next: ClassVar[bool] = False

    @classmethod
    def recognise(cls, connection: Connection) -> "Lorax | None":
        """By its own answer about the model."""
        found = mapping(connection.try_get("info"))
        if "model_id" not in found or "max_concurrent_requests" not in found:
            return None
        return cls(connection, text_of(found.get("version")))

    def models(self) -> list[ServedModel]:  # noqa: D102
        # It loads adapters when they are asked for, and lists none.
        found = mapping(self.connection.get("info"))
        return [ServedModel("base", None, text_of(found.get("model_id")))]

    def _ask(self, question: Question, name: str) -> Answer:
        parameters: dict[str, Any] = {
            "max_new_tokens": 1,
            "details": True,
            "decoder_input_details": True,
            "return_k_alternatives": TOP,
        }
        if name != "base":
            parameters["adapter_id"] = name
        answer = self.connection.post("generate", {"inputs": question.text, "parameters": parameters})
        details = mapping(answer.get("details"))
        prefill = [mapping(one) for one in rows(details.get("prefill"))]
        ids = tuple(token_id(one.get("id")) for one in prefill)
        if ids != question.ids:
            raise FormatError(
                "lorax divides a prompt into other tokens than the tokenizer of --base",
                fix="give the base that the server has",
            )
        values = [log_probability(one.get("logprob")) for one in prefill]
        first = mapping(next(iter(rows(details.get("tokens"))), None))
        following = {
            token_id(one.get("id")): log_probability(one.get("logprob"))
            for one in map(mapping, [*rows(first.get("alternative_tokens")), first])
        }
        return Answer(_prompt(values, question, self.kind), following)


@final
class Ollama(Server):
    """Ollama's ``/api/generate``: texts as prompts, and the likeliest tokens of the next position."""

    kind = "ollama"
    gives_prompt: ClassVar[bool] = False
    chooses_next: ClassVar[bool] = False
    token_ids: TokenIds | None = None

    @classmethod
    def recognise(cls, connection: Connection) -> "Ollama | None":
        """By its own paths."""
        found = mapping(connection.try_get("api/version"))
        if "version" not in found or "models" not in mapping(connection.try_get("api/tags")):
            return None
        return cls(connection, text_of(found.get("version")))

    def models(self) -> list[ServedModel]:  # noqa: D102
        return [
            ServedModel(name, text_of(mapping(one.get("details")).get("parent_model")) or None)
            for one in map(mapping, rows(self.connection.get("api/tags").get("models")))
            if (name := text_of(one.get("name")))
        ]

    def _ask(self, question: Question, name: str) -> Answer:
        answer = self.connection.post(
            "api/generate",
            {
                "model": name,
                "prompt": question.text,
                "raw": True,
                "stream": False,
                "logprobs": True,
                "top_logprobs": TOP,
                "options": {"num_predict": 1, "temperature": 0},
            },
        )
        counted = answer.get("prompt_eval_count")
        if type(counted) is int and counted > len(question.ids) + 1:
            raise FormatError(
                f"ollama divides a prompt into {counted} tokens, and the tokenizer of --base into {len(question.ids)}",
                fix="give the base that the server has",
            )
        first = mapping(next(iter(rows(answer.get("logprobs"))), None))
        following: dict[int, float] = {}
        for one in map(mapping, [first, *rows(first.get("top_logprobs"))]):
            raw = one.get("bytes")
            data = bytes(raw) if isinstance(raw, list) and all(type(b) is int and 0 <= b < 256 for b in raw) else b""
            found = self.token_ids(data or str(one.get("token", "")).encode()) if self.token_ids else None
            if found is not None:
                following[found] = log_probability(one.get("logprob"))
        return Answer(None, following)


@final
class OpenAI(Server):
    """Any other server with OpenAI's completions: ``echo`` with ``logprobs``, where it supports them."""

    kind = "openai"
    chooses_next: ClassVar[bool] = False

    @classmethod
    def recognise(cls, connection: Connection) -> "OpenAI | None":
        """By a list of models."""
        listed = mapping(connection.try_get("v1/models"))
        if any(mapping(model).get("owned_by") == "me" for model in rows(listed.get("data"))):
            raise FormatError(
                "llama_cpp.server gives the probability of each token at the position after it, which says nothing",
                fix="serve the model with llama-server of llama.cpp",
            )
        return cls(connection) if "data" in listed else None

    def models(self) -> list[ServedModel]:  # noqa: D102
        return [
            ServedModel(name, text_of(model.get("parent")), text_of(model.get("root")))
            for model in map(mapping, rows(self.connection.get("v1/models").get("data")))
            if (name := text_of(model.get("id")))
        ]

    def _ask(self, question: Question, name: str) -> Answer:
        content = {
            "model": name,
            "prompt": list(question.ids),
            "max_tokens": 1,
            "temperature": 0,
            "echo": True,
            "logprobs": 1,
        }
        try:
            answer = self.connection.post("v1/completions", content)
        except LoraLensError:
            # Servers of texts alone, such as llama_cpp.server, fail on ids.
            answer = self.connection.post("v1/completions", content | {"prompt": question.text})
        choice = mapping(next(iter(rows(answer.get("choices"))), None))
        values = [log_probability(value) for value in rows(mapping(choice.get("logprobs")).get("token_logprobs"))]
        # The generated token comes last.
        return Answer(_prompt(values[: len(question.ids)], question, self.kind))


INTERFACES: tuple[type[Server], ...] = (VLLM, SGLang, LlamaCpp, Lorax, Ollama, OpenAI)  # the general one last


def connect(url: str, *, kind: str | None = None, timeout: float = 120.0, token_ids: TokenIds | None = None) -> Server:
    """The server at an address.

    Parameters
    ----------
    url : str
        Such as ``http://127.0.0.1:8000``. Nothing but this address is contacted.
    kind : str, optional
        The interface, if the server should not be asked which one it has.
    timeout : float
        Seconds after which a request is given up.
    token_ids : callable, optional
        The id of a token from its bytes, for servers that give tokens as texts.

    Raises
    ------
    OptionError
        The address cannot be reached, or there is no such interface.
    FormatError
        What answers is none of the known servers.
    """
    known = {interface.kind: interface for interface in INTERFACES}
    if kind is not None and kind not in known:
        raise OptionError(f"there is no interface {kind!r}", fix=f"give one of {', '.join(known)}")
    connection = Connection(url, timeout=timeout)
    for interface in INTERFACES if kind is None else (known[kind],):
        server = interface.recognise(connection) if kind is None else interface(connection)
        if server is not None:
            if isinstance(server, Ollama):
                server.token_ids = token_ids
            return server
    raise FormatError(
        f"{connection.url} is none of {', '.join(known)}", fix="check the address, or say with --interface which it is"
    )
