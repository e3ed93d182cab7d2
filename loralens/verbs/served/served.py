"""The verb ``served``, which lists what a server says it has; and whether two names of a server answer differently."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralens.core.messages import progress
from loralens.errors import place
from loralens.exports import checks_keywords
from loralens.serving.interfaces import connect
from loralens.serving.server import Answer, Question, ServedModel
from loralens.tables.numbers import number
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Keys, Table, rows_key
from loralens.verbs.served.predictions import bank

PROMPTS = 5  # of the comparison of two names, each asked three times


@dataclass(frozen=True, slots=True, repr=False)
class ServedResult(Tabular):
    """What a server says it has.

    Attributes
    ----------
    server, kind : str
        The address, and the word of its interface.
    version : str or None
        The version that it states.
    facts : mapping of str to str
        What it says of itself that matters for adapters, such as its largest rank.
    models : sequence of ServedModel
        The names that it answers to.
    """

    server: str
    kind: str
    version: str | None
    facts: Mapping[str, str]
    models: Sequence[ServedModel]

    def conclusion(self) -> list[str]:
        """How many names there are."""
        version = f" {self.version}" if self.version else ""
        names = "1 name" if len(self.models) == 1 else f"{len(self.models)} names"
        return [f"{self.kind}{version} at {self.server} has {names}."]

    def tables(self) -> list[Table[Any]]:
        """The names."""
        return [Table("names", MODELS, self.models)]

    def sentences(self) -> list[str]:
        """What else the server says."""
        return [f"{key}: {value}" for key, value in self.facts.items()]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return ("server", "kind", "version", "facts", rows_key("models", MODELS))


@dataclass(frozen=True, slots=True, repr=False)
class NamesCompared(Tabular):
    """Whether two names of a server answer differently.

    Attributes
    ----------
    server : str
    between : tuple of str
        The two names.
    distance : float
        Root mean square of the difference of their log-probabilities, in nats.
    chance : float
        The same for the first name asked twice.
    requests : int
        How many requests the server answered.
    """

    server: str
    between: tuple[str, str]
    distance: float
    chance: float
    requests: int

    @property
    def answer(self) -> bool:
        """Whether they differ by more than three times the chance level."""
        return self.distance > 3 * self.chance + 1e-6

    def conclusion(self) -> list[str]:
        """Whether the names differ, and that this is all."""
        first, second = self.between
        differ = "answer differently" if self.answer else "give the same answers"
        return [
            f"{first} and {second} {differ}: by {number(self.distance)} nats a token; by chance {number(self.chance)}.",
            "This says nothing of which adapter either of them has: give ADAPTER and --base for that.",
        ]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return ("server", "between", "distance", "chance", "requests")


MODELS: tuple[Column[ServedModel], ...] = (
    Column("name", "name", "name", align="left", priority=ALWAYS),
    Column("parent", "parent", "base", align="left", priority=4),
    Column("scale", "scale", "scale", number, priority=3),
    Column("path", "path", "path", align="left", priority=2),
)


@checks_keywords
def served(server: str, *, interface: str | None = None, timeout: float = 120.0) -> ServedResult:
    """List what a server has: bases, adapters with their parents and scales, and its largest rank.

    Parameters
    ----------
    server : str
        The address of the server, such as http://127.0.0.1:8000. Nothing else is contacted.

        A token is read from the environment variable LORALENS_SERVER_TOKEN.
    interface : str, optional
        The interface of the server: vllm, sglang, llama.cpp, lorax, ollama or openai. [default: the server is asked]
    timeout : float
        The number of seconds after which a request is given up.

    Returns
    -------
    ServedResult

    Raises
    ------
    OptionError
        The server cannot be reached.
    FormatError
        It is none of the known servers.

    Examples
    --------
    $ loralens served http://127.0.0.1:8000
    """
    found = connect(server, kind=interface, timeout=timeout)
    return ServedResult(found.connection.url, found.kind, found.version, found.facts(), found.models())


def compare_names(server: str, between: tuple[str, str], *, interface: str | None, timeout: float) -> NamesCompared:
    """Ask two names of a server for the same texts, the first of them twice; no model is needed here."""
    # Tokens are only compared with each other, so that their bytes will do as numbers.
    found = connect(server, kind=interface, timeout=timeout, token_ids=lambda data: int.from_bytes(data[:32]))
    questions = [Question((), text) for text in bank()[:PROMPTS]]
    first, second = between
    asked: list[list[Answer]] = []
    with place(found.connection.url), progress("asking the server", 3 * PROMPTS) as step:
        for name in (first, second, first):
            asked.append([])
            for question in questions:
                asked[-1].append(found.ask(question, name))
                if step:
                    step(1)
    distance, chance = (
        float(np.sqrt(np.mean(np.concatenate([*map(_differences, asked[0], other)]) ** 2))) for other in asked[1:]
    )
    return NamesCompared(found.connection.url, between, distance, chance, found.requests)


def _differences(one: Answer, other: Answer) -> NDArray[np.float64]:
    """The differences of the log-probabilities that both answers have, and at least one number."""
    pairs = [*zip(() if one.prompt is None else one.prompt, () if other.prompt is None else other.prompt, strict=False)]
    # A token that only one of two lists of the likeliest has is less likely than all of the other list.
    floors = [min(answer.following.values(), default=np.nan) for answer in (one, other)]
    tokens = one.following.keys() | other.following.keys()
    pairs += [(one.following.get(token, floors[0]), other.following.get(token, floors[1])) for token in tokens]
    found = np.array([a - b for a, b in pairs], np.float64)
    found = found[np.isfinite(found)]
    return found if found.size else np.zeros(1)
