"""The description of a combining method: its name, its source, its rule and the options of that rule."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, final

from loralens.choices import Space
from loralens.errors import OptionError

# The command line lists methods without importing NumPy; a rule is imported when it is used.
if TYPE_CHECKING:
    from loralens.arithmetic.entries import Fused
    from loralens.core.joint import Core
    from loralens.core.lowrank import LowRank
    from loralens.linalg.factor import Floats

# The default comes first: ΔW itself, for which the papers define the elementwise rules.
SPACES: tuple[Space, ...] = ("full", "knots", "core")


@final
@dataclass(frozen=True, slots=True)
class Option:
    """A numeric option of a combining method.

    Attributes
    ----------
    name : str
        The keyword argument of the rule.
    text : str
        What the option does, in a few words.
    low, high : float
        The smallest and the largest value that is allowed.
    open_low : bool
        Whether ``low`` itself is excluded.
    whole : bool
        Whether only whole numbers are allowed.
    infinite : bool
        Whether ∞ is allowed, if it lies between ``low`` and ``high``.
    """

    name: str
    default: float
    text: str
    low: float = -inf
    high: float = inf
    open_low: bool = False
    whole: bool = False
    infinite: bool = False

    def check(self, value: float) -> float:
        """Return ``value`` if it is allowed, or raise an OptionError that states the allowed range."""
        # NaN is outside every range, as no comparison with it holds.
        inside = self.low <= value <= self.high and not (self.open_low and value == self.low)
        number = isfinite(value) or self.infinite
        if inside and number and (not self.whole or float(value).is_integer()):
            return int(value) if self.whole else value
        # Brackets as in mathematics: a round one excludes the end.
        opening = "(" if self.open_low or self.low == -inf else "["
        closing = ")" if self.high == inf and not self.infinite else "]"
        span = f"{opening}{self.low:g}, {self.high:g}{closing}"
        kind = "a whole number" if self.whole else "a number"
        raise OptionError(f"{self.name} {value:g} is not {kind} in {span}", fix=f"{self.name}: {self.text}")


# Options that several methods have; a method replaces the default of the density. λ has no limits: with a negative one
# the result is the opposite of the combination.
LAM = Option("lam", 1.0, "λ, the strength of the result")
DENSITY = Option("density", 1.0, "the share of the entries that is kept, in (0, 1]", low=0.0, high=1.0, open_low=True)


@final
@dataclass(frozen=True, slots=True)
class CombiningMethod:
    """A method that combines adapters, which is a row of `loralens.arithmetic.methods.METHODS`.

    Attributes
    ----------
    text : str
        One line for a list of methods.
    paper : str
        The publication that defines the method.
    options : tuple of Option
    home : str
        The module of its `rule`, below `loralens.arithmetic`, and after a colon the function, if that has another name
        than the method.
    spaces : tuple of str
        The spaces in which an elementwise rule can act, the default first. Empty for a rule that commutes with
        rotations of inputs and outputs: the space makes no difference to it.
    seeded : bool
        Whether the rule draws random numbers.
    adapters : int
        The number of adapters it takes; 0 for any number.
    looks : str
        The name of its `prepare` in that module; empty if it has none.
    linear : bool
        Whether the result is a sum of multiples of the updates, with factors that do not depend on the updates and are
        the same in every module. Only such methods combine DoRA adapters.
    """

    name: str
    text: str
    paper: str
    options: tuple[Option, ...] = (LAM,)
    home: str = ""
    spaces: tuple[Space, ...] = ()
    seeded: bool = False
    adapters: int = 0
    looks: str = ""
    linear: bool = False

    @property
    def rule(self) -> "Callable[..., Floats | Core | LowRank | Fused]":
        """The pure function ``rule(joint, **options)`` that combines one module.

        It returns the core matrix of the result, float64, shape (p, q), or an SVD of it whose order is kept; either is
        lifted to its numerical rank. Where the result leaves the joint space, it returns a `LowRank` of float64
        factors, or a `Fused`, which also states the error. Its keyword arguments are the options of the row, ``space``
        if the row has ``spaces``, and ``seed`` if it is ``seeded``: a `numpy.random.SeedSequence` of its own for every
        module.
        """
        return _import_function(self.home, self.name.replace("-", "_"))

    @property
    def prepare(self) -> Callable[..., Mapping[str, Any]] | None:
        """The function that looks at all modules before the first is combined, if the method needs one.

        ``prepare(modules, **options)`` gets the `loralens.arithmetic.elementwise.Modules` and returns further keyword
        arguments of the rule.
        """
        return _import_function(self.home, self.looks) if self.looks else None

    def settings(self, options: Mapping[str, float | None], space: Space | None = None) -> dict[str, Any]:
        """Return the keyword arguments of the rule: the given values, and the defaults of all other options.

        Raises
        ------
        OptionError
            The method has no such option or space, or a value is out of range.
        """
        by_name = {option.name: option for option in self.options}
        # None stands for an option that was not given: the command line passes every option.
        chosen = {name: value for name, value in options.items() if value is not None}
        for name in chosen:
            if name not in by_name:
                has = ", ".join(by_name) or "none"
                raise OptionError(f"the method {self.name} has no option {name}", fix=f"its options are: {has}")
        values: dict[str, Any] = {o.name: o.check(chosen.get(o.name, o.default)) for o in self.options}
        if self.spaces:
            values["space"] = space or self.spaces[0]
            if values["space"] not in self.spaces:
                raise OptionError(
                    f"the method {self.name} does not work in the space {space}",
                    fix=f"give one of {', '.join(self.spaces)}",
                )
        # Any space that exists is accepted by other methods, as it makes no difference to them.
        elif space is not None and space not in SPACES:
            raise OptionError(f"there is no space {space!r}", fix=f"give one of {', '.join(SPACES)}")
        return values


def _import_function(home: str, name: str) -> Callable[..., Any]:
    module, _, other_name = home.partition(":")
    function: Callable[..., Any] = getattr(import_module(f"loralens.arithmetic.{module}"), other_name or name)
    return function


def find_combining_method(name: str, methods: Mapping[str, CombiningMethod]) -> CombiningMethod:
    """Return the method of this name, or raise an OptionError that lists all of them."""
    if name not in methods:
        from difflib import get_close_matches  # only when something is wrong

        if near := get_close_matches(name, methods, 1):
            raise OptionError(
                f"there is no method {name!r}", fix=f"the nearest name is {near[0]}, of {', '.join(methods)}"
            )
        # 21 methods with their descriptions are a screen of text, which a misspelt name does not need.
        choices = "; ".join(f"{row.name} ({row.text})" for row in methods.values())
        raise OptionError(f"there is no method {name!r}", fix=f"choose one of: {choices}")
    return methods[name]
