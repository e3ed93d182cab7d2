"""Call: one command as the table of cases means it, whatever the command line calls its parts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

OUT = "OUT"  # stands for the folder that a case writes to, in arguments and in the record


@dataclass(frozen=True)
class Call:
    """A verb, what it works on, and its options by the names that `tests.golden.arguments` knows."""

    verb: str
    inputs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    terminal: Literal["", "plain", "colour"] = ""  # whether it runs on one of 80 × 24, and with colours

    def record(self) -> dict[str, Any]:
        """The call as JSON."""
        on = {"terminal": self.terminal} if self.terminal else {}
        return {"verb": self.verb, "inputs": list(self.inputs), "options": dict(self.options), **on}


@dataclass(frozen=True)
class Case:
    """Calls that run one after the other in a folder of their own; later ones may read what earlier ones wrote."""

    name: str
    calls: tuple[Call, ...]

    @property
    def sources(self) -> set[str]:
        """First parts of the paths that the calls read, such as ``conformance`` or ``minilm``."""
        words = {word for call in self.calls for word in _words((*call.inputs, *call.options.values()))}
        return {word.partition("/")[0].partition(":")[0] for word in words}


def _words(values: Any) -> set[str]:
    if isinstance(values, str):
        return {values}
    return {word for value in values for word in _words(value)} if isinstance(values, list | tuple) else set()


def call(verb: str, *inputs: str, **options: Any) -> Call:
    """A call that prints JSON; ``json=False`` prints what people read. Options that are None or False are left out."""
    chosen = {"json": True} | options
    return Call(
        verb, inputs, {name: value for name, value in chosen.items() if value is not None and value is not False}
    )
