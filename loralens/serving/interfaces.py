"""The interfaces of servers of language models, one class each, and the table by which `connect` recognises them.

Run against vLLM 0.32.0 and llama.cpp as in llama-cpp-python 0.3.36. The others follow their sources: SGLang
(``http_server.py``, ``io_struct.py`` of 2026), LoRAX at a7394ba (``router/src``), Ollama at fb30760 (``api/types.go``).
"""

from collections.abc import Callable, Mapping
from secrets import token_hex
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from loralens.core.messages import note
from loralens.errors import FormatError, OptionError, visible
from loralens.formats.files.json_text import finite_number
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
    if question.ids and len(values) != len(question.ids):
        raise FormatError(
            f"{kind} answers for {len(values)} tokens, and {len(question.ids)} were asked",
            fix="see that the server has the tokenizer of --base, and adds no token to a prompt",
        )
    return np.array(values[1:], np.float64)


def _openai_models(connection: Connection) -> list[ServedModel]:
    """What ``/v1/models`` lists; ``parent`` and ``root`` are in the answers of vLLM and SGLang."""
    return [
        ServedModel(name, text_of(model.get("parent")), text_of(model.get("root")))
        for model in map(mapping, rows(mapping(connection.try_get("v1/models")).get("data")))
        if (name := text_of(model.get("id")))
    ]


@final
class VLLM(Server):
    """vLLM's completions: token ids as the prompt, and ``prompt_logprobs``."""

    kind = "vllm"

    def __init__(self, connection: Connection, version: str | None = None) -> None:
        super().__init__(connection, version)
        self._by_id = True  # whether it takes `logprob_token_ids`, which older releases refuse or ignore
        # Cached prefixes of another state of the adapter would answer for this one, those of earlier runs too.
        self._salt = f"loralens-{token_hex(8)}"

    @classmethod
    def recognise(cls, connection: Connection) -> "VLLM | None":
        """By the owner of its models."""
        listed = rows(mapping(connection.try_get("v1/models")).get("data"))
        if not any(mapping(model).get("owned_by") == "vllm" for model in listed):
            return None
        return cls(connection, text_of(mapping(connection.try_get("version")).get("version")))

    def models(self) -> list[ServedModel]:  # noqa: D102
        return _openai_models(self.connection)

    def facts(self) -> dict[str, str]:  # noqa: D102
        # vLLM answers this only if it was started with VLLM_SERVER_DEV_MODE=1.
        found = mapping(mapping(self.connection.try_get("server_info?config_format=json")).get("vllm_config"))
        return _named(mapping(found.get("lora_config")), "max_lora_rank", "max_loras", "lora_dtype")

    def _ask(self, question: Question, name: str) -> Answer:
        content: dict[str, Any] = {
            "model": name,
            "prompt": list(question.ids) or question.text,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
            "logprobs": TOP,
            "return_tokens_as_token_ids": True,
            "cache_salt": f"{self._salt}-{self.requests}",
        }
        if question.next_ids and self._by_id:
            content["logprob_token_ids"] = list(question.next_ids[:TOP])
        try:
            answer = self.connection.post("v1/completions", content)
        except RefusedError as error:
            if error.status not in (400, 422) or not self._by_id or not question.next_ids:
                raise
            self._by_id = False
            return self._ask(question, name)
        choice = mapping(next(iter(rows(answer.get("choices"))), None))
        prompt = [mapping(row) for row in rows(choice.get("prompt_logprobs"))]
        # A row names its token by the id; of a text, whose ids are not known, it has no other entry.
        ids = [str(one) for one in question.ids] or [next(iter(row), "") for row in prompt]
        if len(prompt) != len(ids):
            ids = [""] * len(prompt)  # refused below
        values = [log_probability(mapping(row.get(key)).get("logprob")) for key, row in zip(ids, prompt, strict=True)]
        tops = rows(mapping(choice.get("logprobs")).get("top_logprobs"))
        following = {
            int(key.removeprefix("token_id:")): log_probability(value)
            for key, value in mapping(tops[0] if tops else None).items()
            if key.removeprefix("token_id:").isdecimal()
        }
        return Answer(_prompt(values, question, self.kind), following)


@final
class SGLang(Server):
    """SGLang's ``/generate``: ``return_logprob``, and adapters by ``lora_path``."""

    kind = "sglang"
    _base: tuple[str, ...] = ()  # the names of its base

    @classmethod
    def recognise(cls, connection: Connection) -> "SGLang | None":
        """By its own answer about the model."""
        for path in ("model_info", "get_model_info"):
            found = mapping(connection.try_get(path))
            if "model_path" in found and "is_generation" in found:
                return cls(connection, text_of(_sglang_facts(connection).get("version")))
        return None

    def models(self) -> list[ServedModel]:  # noqa: D102
        # It lists adapters that were loaded later too; older releases list the base alone.
        listed = _openai_models(self.connection)
        if any(one.parent for one in listed):
            return listed
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
        found = _sglang_facts(self.connection)
        return _named(found, "max_lora_rank", "lora_target_modules", "max_loras_per_batch", "lora_backend")

    def _ask(self, question: Question, name: str) -> Answer:
        self._base = self._base or ("base", *(one.name for one in self.models() if not one.parent))
        content: dict[str, Any] = {
            **({"input_ids": list(question.ids)} if question.ids else {"text": question.text}),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "token_ids_logprob": list(question.next_ids) or None,
        }
        if name not in self._base:
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


def _named(found: Mapping[str, Any], *keys: str) -> dict[str, str]:
    return {key: printable(found[key]) for key in keys if found.get(key) is not None}


def _sglang_facts(connection: Connection) -> Mapping[str, Any]:
    return mapping(connection.try_get("server_info") or connection.try_get("get_server_info"))


@final
class LlamaCpp(Server):
    """llama.cpp's own server: the whole distribution of the next token, and adapters by number with a scale.

    A name is ``base``, the number or the path of an adapter as ``/lora-adapters`` lists it, such a name with a scale
    (``0=0.5``), or ``default``: what requests get that name no adapter. It gives nothing for the tokens of a prompt, so
    a request answers for one position.
    """

    kind = "llama.cpp"
    gives_prompt: ClassVar[bool] = False
    _told = False  # that an adapter has scale 0

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
            ServedModel("default", "base"),
            *(ServedModel(str(number), "base", place, scale) for number, place, scale in self._adapters()),
        ]

    def _adapters(self) -> list[tuple[int, str | None, float]]:
        return [
            (token_id(one.get("id")), text_of(one.get("path")), finite_number(one.get("scale")) or 0.0)
            for one in map(mapping, rows(self.connection.get("lora-adapters").get("list")))
            if token_id(one.get("id")) >= 0
        ]

    def _scales(self, name: str) -> dict[int, float]:
        """The scale of every adapter for a name."""
        adapters = self._adapters()
        scales = {number: 0.0 for number, _, _ in adapters}
        if name == "base":
            return scales
        own, _, asked = name.rpartition("=")
        for number, place, scale in adapters:
            called = {str(number), place, (place or "").replace("\\", "/").rpartition("/")[2]}
            if name in called:
                scales[number] = scale
                if not scale and not self._told:
                    self._told = True
                    note(
                        f"the server has adapter {number} at scale 0",
                        fix=f"to ask for scale 1, give --model {number}=1",
                    )
                return scales
            if own in called and (wanted := _number(asked)) is not None:
                return scales | {number: wanted}
        # An unknown number would answer as the base.
        names = ", ".join(f"{number} ({place})" for number, place, _ in adapters) or "no adapter"
        raise OptionError(f"llama.cpp has no adapter {visible(name)}", fix=f"give default, base, or one of: {names}")

    def _ask(self, question: Question, name: str) -> Answer:
        content: dict[str, Any] = {
            "prompt": list(question.ids) or question.text,
            "n_predict": 1,
            "n_probs": 1 << 20,
            "temperature": 0,
            "cache_prompt": False,
            "post_sampling_probs": False,
        }
        # An empty list would mean the scales of the start, so every adapter is named.
        if name != "default" and (scales := self._scales(name)):
            content["lora"] = [{"id": number, "scale": scale} for number, scale in scales.items()]
        answer = self.connection.post("completion", content)
        first = mapping(next(iter(rows(answer.get("completion_probabilities"))), None))
        return Answer(
            None,
            {
                token_id(one.get("id")): log_probability(one.get("logprob"))
                for one in map(mapping, rows(first.get("top_logprobs")))
            },
        )


def _number(text: str) -> float | None:
    try:
        return finite_number(float(text))
    except ValueError:
        return None


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
        if question.ids and ids != question.ids:
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
        if question.ids and type(counted) is int and counted > len(question.ids) + 1:
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
        return _openai_models(self.connection)

    def _ask(self, question: Question, name: str) -> Answer:
        content = {
            "model": name,
            "prompt": list(question.ids) or question.text,
            "max_tokens": 1,
            "temperature": 0,
            "echo": True,
            "logprobs": 1,
        }
        try:
            answer = self.connection.post("v1/completions", content)
        except RefusedError:
            # Servers of texts alone, such as llama_cpp.server, fail on ids.
            answer = self.connection.post("v1/completions", content | {"prompt": question.text})
        choice = mapping(next(iter(rows(answer.get("choices"))), None))
        values = [log_probability(value) for value in rows(mapping(choice.get("logprobs")).get("token_logprobs"))]
        if len(values) < max(len(question.ids), 2):
            raise FormatError(
                "the server does not give log-probabilities of the tokens of a prompt (echo with logprobs)",
                fix="say with --interface which server it is, or record the answers and give --outputs FILE",
            )
        # The generated token comes last.
        return Answer(_prompt(values[: len(question.ids) or -1], question, self.kind))


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
