"""The verb ``served``: what a server says it has, and whether two of its names answer differently."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loralens.core.messages import progress
from loralens.errors import OptionError
from loralens.serving.interfaces import connect
from loralens.serving.server import Question, ServedModel
from loralens.tables.numbers import number
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Keys, Table, rows_key

PROMPTS, LENGTH = 6, 24  # of the comparison of two names
# Ids that nearly every vocabulary has, so that no tokenizer is needed.
LOWEST, HIGHEST = 300, 20_000


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
    between : tuple of str
        The two names that were compared; empty without ``between``.
    distance, repeated : float or None
        Root mean square of the difference of their log-probabilities, and of those of one name that was asked twice, in
        nats.
    """

    server: str
    kind: str
    version: str | None
    facts: Mapping[str, str]
    models: Sequence[ServedModel]
    between: tuple[str, ...] = ()
    distance: float | None = None
    repeated: float | None = None

    @property
    def answer(self) -> bool:
        """Whether the two names answer differently; True if none were compared."""
        return self.distance is None or self.distance > 3 * (self.repeated or 0.0) + 1e-6

    def conclusion(self) -> list[str]:
        """How many names there are; of two names, whether they differ."""
        version = f" {self.version}" if self.version else ""
        if self.distance is not None:
            first, second = self.between
            how = f"{number(self.distance)} nats a token; one name asked twice: {number(self.repeated)}"
            differ = "answer differently" if self.answer else "give the same answers"
            return [
                f"{first} and {second} {differ} ({how}).",
                "This says nothing about which adapter either of them has.",
            ]
        return [f"{self.kind}{version} at {self.server} has {len(self.models)} names."]

    def tables(self) -> list[Table[Any]]:
        """The names."""
        return [Table("names", MODELS, self.models)]

    def sentences(self) -> list[str]:
        """What else the server says."""
        return [f"{key}: {value}" for key, value in self.facts.items()]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "server", "kind", "version", "facts", rows_key("models", MODELS), "between", "distance",
            Column("repeated_distance", "repeated"),
        )  # fmt: skip


MODELS: tuple[Column[ServedModel], ...] = (
    Column("name", "name", "name", align="left", priority=ALWAYS),
    Column("parent", "parent", "base", align="left", priority=4),
    Column("scale", "scale", "scale", number, priority=3),
    Column("path", "path", "path", align="left", priority=2),
)


def served(
    server: str, *, between: Sequence[str] = (), interface: str | None = None, timeout: float = 120.0
) -> ServedResult:
    """List what a server has: bases, adapters with their parents and scales, and its largest rank.

    With ``between`` it also tells whether two names answer differently, which needs no local model. This is all that it
    tells: `prove` says whether an adapter is live. The exit code is then 1 if they give the same answers.

    Parameters
    ----------
    server : str
        The address of the server, such as http://127.0.0.1:8000. Nothing else is contacted.

        A token is read from the environment variable LORALENS_SERVER_TOKEN.
    between : sequence of str
        Two names of the server to compare.
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
        The server cannot be reached; not two names are given.
    FormatError
        It is none of the known servers, or gives no log-probabilities.

    Examples
    --------
    $ loralens served http://127.0.0.1:8000
    """
    if between and len(between) != 2:
        raise OptionError(f"{len(between)} names are given to compare", fix="give two: --between NAME1 NAME2")
    found = connect(server, kind=interface, timeout=timeout)
    distance = repeated = None
    if between:
        drawn = np.random.default_rng(0).integers(LOWEST, HIGHEST, (PROMPTS, LENGTH))
        text = "The train to the coast leaves at nine. Please bring the figures of the last quarter"
        questions = [Question(tuple(map(int, ids)), text, tuple(range(1000, 1020))) for ids in drawn]
        first, second = between
        with progress("asking the server", 3 * PROMPTS) as step:
            answers = []
            for name in (first, second, first):
                rows = []
                for question in questions:
                    rows.append(found.ask(question, name).numbers(question))
                    if step:
                        step(1)
                answers.append(np.concatenate(rows))
        distance, repeated = (float(np.sqrt(np.nanmean((answers[0] - other) ** 2))) for other in answers[1:])
    return ServedResult(
        found.connection.url,
        found.kind,
        found.version,
        found.facts(),
        found.models(),
        tuple(between),
        distance,
        repeated,
    )
