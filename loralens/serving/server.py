"""`Server`: what every server of language models is asked for, and the connection to the one address of the user."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, ClassVar, final
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from loralens.core.stored import parse_json
from loralens.errors import FormatError, LoraLensError, OptionError, visible
from loralens.formats.files.json_text import MOST_MEMORY, finite_number, is_safe_text, parsed_size, plain_text
from loralens.tables.table import Recorded

TOKEN = "LORALENS_SERVER_TOKEN"  # noqa: S105  # the environment variable with the token of the server, which is never shown
LARGEST_ANSWER = 64 << 20  # bytes; llama.cpp gives 18 MB for a vocabulary of 150,000 tokens
TOP = 20  # log-probabilities of the next token that servers give at most by default


@final
@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and the tokens whose probabilities as the next token are wanted.

    Attributes
    ----------
    ids : tuple of int
        The tokens of the prompt; empty if only the text is known, which the tokenizer of the server then divides.
    text : str
        The prompt for servers that take no token ids; the tokenizer makes ``ids`` of it.
    next_ids : tuple of int
        Tokens, the most interesting first: servers with a limit get only so many.
    """

    ids: tuple[int, ...]
    text: str
    next_ids: tuple[int, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """Log-probabilities in nats; NaN where the server has no number.

    Attributes
    ----------
    prompt : ndarray of float64, shape (tokens − 1,), or None
        log p(ids[i + 1] | ids[: i + 1]); None if the server does not give them.
    following : mapping of int to float
        Token → its log-probability as the next token, for all tokens that the server names.
    """

    prompt: NDArray[np.float64] | None
    following: Mapping[int, float] = field(default_factory=dict)

    def numbers(self, question: Question) -> NDArray[np.float64]:
        """All log-probabilities that the question asks for, shape (tokens − 1 + next_ids,); NaN where there is none."""
        prompt = np.full(len(question.ids) - 1, np.nan) if self.prompt is None else self.prompt
        following = [self.following.get(token, np.nan) for token in question.next_ids]
        return np.concatenate([prompt, np.array(following, np.float64)])


@final
@dataclass(frozen=True, slots=True)
class ServedModel(Recorded):
    """A name that a server answers to.

    Attributes
    ----------
    name : str
    parent : str or None
        The name of the base, if this is an adapter; None for a base, and where the server does not say.
    path : str or None
        Where the server has it from, as it says.
    scale : float or None
        The strength of an adapter that the server states.
    """

    name: str
    parent: str | None = None
    path: str | None = None
    scale: float | None = None


class Server(ABC):
    """One server. Each interface is a subclass, which says what it can give.

    Attributes
    ----------
    kind : str
        The word of the interface: ``vllm``, ``sglang``, ``llama.cpp`` …
    gives_prompt : bool
        Whether it gives log-probabilities of the tokens of a prompt, so that one request answers for all of them.
    chooses_next : bool
        Whether it gives the log-probabilities of any tokens as the next one, and not only of the likeliest.
    """

    kind: ClassVar[str]
    gives_prompt: ClassVar[bool] = True
    chooses_next: ClassVar[bool] = True

    def __init__(self, connection: "Connection", version: str | None = None) -> None:
        self.connection = connection
        self.version = version
        self.requests = 0  # questions that were asked

    @classmethod
    @abstractmethod
    def recognise(cls, connection: "Connection") -> "Server | None":
        """The server behind a connection, if it has this interface."""

    @abstractmethod
    def models(self) -> list[ServedModel]:
        """The names that the server answers to, bases and adapters."""

    def facts(self) -> dict[str, str]:
        """What else the server says of itself that matters for adapters, such as its largest rank."""
        return {}

    def ask(self, question: Question, name: str) -> Answer:
        """The log-probabilities that the model of a name gives to a question."""
        self.requests += 1
        answer = self._ask(question, name)
        if question.ids:
            numbers = answer.numbers(question)
        else:
            numbers = np.array([*(() if answer.prompt is None else answer.prompt), *answer.following.values()])
        if not np.isfinite(numbers).any():
            raise FormatError(
                f"{self.kind} gave no log-probabilities for {visible(name)}",
                fix="see that the server gives them: --max-logprobs of vLLM, a recent version of the others",
            )
        return answer

    @abstractmethod
    def _ask(self, question: Question, name: str) -> Answer: ...


class RefusedError(FormatError):
    """The server answered with a status that is an error or a redirect: its number, and whether to another host."""

    def __init__(self, what: str, *, fix: str, status: int = 0, elsewhere: bool = False) -> None:
        super().__init__(what, fix=fix)
        self.status, self.elsewhere = status, elsewhere


class Connection:
    """HTTP to the one address that the user gave.

    No proxy of the environment is used and no other host is asked: a redirect is an error that names its target.

    Parameters
    ----------
    url : str
        Such as ``http://127.0.0.1:8000``, or with the path ``/v1``, which is taken off.
    timeout : float
        Seconds after which a request is given up.

    Raises
    ------
    OptionError
        The address is none of HTTP.
    """

    def __init__(self, url: str, *, timeout: float = 120.0) -> None:
        import httpx

        try:
            parsed = httpx.URL(url if "://" in url else f"http://{url}")
        except (httpx.InvalidURL, TypeError) as error:
            raise OptionError(f"{visible(str(url))} is not an address", fix="give http://HOST:PORT") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise OptionError(f"{visible(str(url))} is not an address of HTTP", fix="give http://HOST:PORT")
        if parsed.userinfo:
            # It would be in messages, and in the list of processes.
            raise OptionError("the address holds a password", fix=f"put the token into the variable {TOKEN}")
        path = parsed.path.rstrip("/").removesuffix("/v1")
        self.url = str(parsed.copy_with(path=path + "/", query=None, fragment=None))
        self.timeout = timeout
        self._token = os.environ.get(TOKEN, "").strip()
        # httpx would show the header in its message.
        if not (self._token.isascii() and self._token.isprintable()) or " " in self._token:
            raise OptionError(f"{TOKEN} holds characters that no token has", fix="set it again")
        self._client = httpx.Client(
            base_url=self.url,
            timeout=timeout,
            headers={"Authorization": f"Bearer {self._token}"} if self._token else {},
            follow_redirects=False,
            trust_env=False,
            # No connection stays open, so that nothing has to be closed.
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path."""
        return self._request("GET", path, None)

    def post(self, path: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object that answers a request."""
        return self._request("POST", path, content)

    def try_get(self, path: str) -> dict[str, Any] | None:
        """The JSON object at a path; None if the server has nothing there.

        A missing token, a redirect to another host, and a server that is still loading are errors all the same.
        """
        try:
            return self.get(path)
        except RefusedError as error:
            if error.status in (401, 403, 502, 503, 504) or error.elsewhere:
                raise
            return None
        except FormatError:
            return None

    def _request(self, method: str, path: str, content: Mapping[str, Any] | None) -> dict[str, Any]:
        import httpx

        end = monotonic() + self.timeout  # the timeout of httpx begins anew with every byte
        try:
            with self._client.stream(method, path, json=content) as response:
                data = bytearray()
                for part in response.iter_bytes():
                    data += part
                    if monotonic() > end:
                        raise httpx.ReadTimeout("")
                    if len(data) > LARGEST_ANSWER:
                        raise FormatError(
                            f"{self.url}{path} answers with more than {LARGEST_ANSWER >> 20} MiB",
                            fix="check the address",
                        )
                status, location = response.status_code, response.headers.get("location", "")
        except httpx.TimeoutException as error:
            what = f"{self.url} gave no answer within {self.timeout:g} seconds"
            raise OptionError(what, fix="see whether the server runs, or give a longer --timeout") from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            what = f"{self.url} cannot be reached: {visible(str(error))[:160] or type(error).__name__}"
            raise OptionError(what, fix="check the address, and that the server runs") from error
        if 300 <= status < 400:
            what = f"{self.url}{path} redirects to {self._shown(location)[:160]}, which was not given as --server"
            raise RefusedError(
                what, fix="give the address that the server has", status=status, elsewhere=self._is_elsewhere(location)
            )
        if status >= 400:
            raise RefusedError(
                f"{self.url}{path} answers {status}: {self._shown(_reason(bytes(data)))[:240]}",
                fix=_advice(status),
                status=status,
            )
        # A list, as llama.cpp gives one, gets a key, so that all answers are objects.
        text = bytes(data)
        if text.lstrip()[:1] == b"[":
            text = b'{"list":' + text + b"}"
        return _parse(text, f"the answer of {self.url}{path}")

    def _is_elsewhere(self, location: str) -> bool:
        try:
            return urlsplit(location).netloc not in ("", urlsplit(self.url).netloc)
        except ValueError:
            return True

    def _shown(self, text: str) -> str:
        """A text of the server that can be shown: it may repeat the token."""
        return visible(text.replace(self._token, "…") if self._token else text)


def _parse(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object of a server; its keys may be tokens, which no other object of ours has as names."""
    fix = "check that this is the address of a server of language models"
    if parsed_size(data) > MOST_MEMORY:
        raise FormatError(f"{what} has too many values", fix=fix)
    try:
        value = parse_json(data)
    except ValueError as error:
        raise FormatError(f"{what} is not JSON", fix=fix) from error
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not a JSON object", fix=fix)
    return value


def _reason(data: bytes) -> str:
    """The message of an error in the words of the server, on one line."""
    try:
        answer: Any = _parse(data, "")
    except LoraLensError:
        return " ".join(data[:2000].decode("utf-8", "replace").split()) or "without a reason"
    inner = answer.get("error", answer.get("detail", answer))
    message = inner.get("message", inner) if isinstance(inner, dict) else inner
    return " ".join(str(message).split())


def _advice(status: int) -> str:
    if status in (401, 403):
        return f"put the token of the server into the environment variable {TOKEN}"
    if status == 404:
        return "see the names that the server has: loralens served URL"
    if status in (502, 503, 504):
        return "wait until the server has loaded its model, and try again"
    return "see the log of the server"


def log_probability(value: Any) -> float:
    """A log-probability of a server; NaN if it is none. −9999 and the like mean 'very small'."""
    number = finite_number(value)
    return number if number is not None and -1000 < number < 1e-3 else float("nan")


def text_of(value: Any) -> str | None:
    """A name that a server gives, if it can be shown."""
    return plain_text(value)


def token_id(value: Any) -> int:
    """The id of a token that a server gives; −1 if it is none."""
    return value if type(value) is int and 0 <= value < 1 << 31 else -1


def rows(value: Any) -> Sequence[Any]:
    """A list of a server's answer; empty if it is none."""
    return value if isinstance(value, list) else ()


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping of a server's answer; empty if it is none."""
    return value if isinstance(value, dict) else {}


def printable(value: Any) -> str:
    """Any value of a server as text that can be shown."""
    return str(value)[:200] if is_safe_text(str(value)) else visible(str(value))[:200]
