"""The table of all methods that combine adapters, one row each, and what a row says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, final

from loralens.choices import Space
from loralens.errors import OptionError

# The command line lists methods without importing NumPy; a rule is imported when it is used.
if TYPE_CHECKING:
    from loralens.arithmetic.elementwise import Fused
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
        # All methods with their descriptions are a screen of text, which a misspelt name does not need.
        choices = "; ".join(f"{row.name} ({row.text})" for row in methods.values())
        raise OptionError(f"there is no method {name!r}", fix=f"choose one of: {choices}")
    return methods[name]


# The defaults are those of the papers or of their authors' code; the docstrings of the rules say which.
_RANK = Option("rank", 0, "the number of directions; 0 takes the default of the method", low=0, whole=True)
_BETA = Option("beta", 0.25, "the share of the differences in norm that stays, in [0, 1]", low=0, high=1)
_COMMON = Option("common", 0.8, "the share of the directions that is common to all updates, in [0, 1]", low=0, high=1)
_MU = Option("mu", inf, "how strictly the other adapters are kept out: 0 not at all, inf fully", low=0, infinite=True)
_WHOLE_TEXT = "1 keeps the largest entries of the whole adapter, 0 those of every module"
_WHOLE = Option("whole", 1, _WHOLE_TEXT, low=0, high=1, whole=True)
_GAMMA = Option("gamma", 0.006, "the share of the largest entries that is dropped, in [0, 1]", low=0, high=1)
_EPSILON = Option("epsilon", 0.07, "how far the probability of an entry may lie from the density", low=0)


def _elementwise(name: str, text: str, paper: str, density: float, *options: Option, **row: Any) -> CombiningMethod:
    """A method that looks at single entries: it has a density, and its result depends on the space in which it acts."""
    options = (LAM, replace(DENSITY, default=density), *options)
    return CombiningMethod(name, text, paper, options, home="elementwise_methods", spaces=SPACES, **row)


_whole_update = partial(CombiningMethod, home="whole_update_methods")
_subspace = partial(CombiningMethod, home="subspace_methods")


# Methods that do not depend on the space come first, the plain ones before those that act on singular vectors; then the
# elementwise ones. Messages list them in this order.
_ROWS = (
    CombiningMethod(
        "sum", "task arithmetic: the exact sum Σ w·ΔW",
        "Ilharco et al. 2023, arXiv 2212.04089", linear=True,
        home="whole_update_methods:task_arithmetic",
    ),
    _whole_update(
        "average", "the exact mean Σ w·ΔW / Σ w",
        "Wortsman et al. 2022, arXiv 2203.05482", linear=True,
    ),
    # Means on the sphere, and means that depend on how far the updates agree.
    _whole_update(
        "slerp", "a point on the arc between two updates, at t = w₂/(w₁ + w₂)", "Shoemake 1985", adapters=2,
    ),
    _whole_update(
        "karcher", "the mean direction on the sphere, at the mean length", "Karcher 1977",
    ),
    _whole_update(
        "model-stock", "the average, shrunk towards 0 where updates disagree", "Jang et al. 2024, arXiv 2403.19522",
    ),
    _whole_update(
        "equal-norms", "the sum of updates that are scaled to one norm",
        "He et al. 2026, arXiv 2606.03723, its first step", (LAM, replace(_BETA, default=0.0)),
    ),
    # Rules on singular vectors and subspaces.
    _subspace(
        "cart", "the mean, and the low-rank part of every deviation from it",
        "Choi et al. 2024, arXiv 2412.12153", (LAM, _RANK),
    ),
    _subspace(
        "tsv-m", "the singular vectors of all updates, made orthogonal to each other",
        "Gargiulo et al. 2025, arXiv 2412.00081",
    ),
    _subspace(
        "iso-c", "the sum with all singular values made equal",
        "Marczak et al. 2025, arXiv 2502.04959",
    ),
    _subspace(
        "iso-cts", "iso-c with further directions that only one update has",
        "Marczak et al. 2025, arXiv 2502.04959", (LAM, _COMMON),
    ),
    CombiningMethod(
        "ctm", "Compress-then-Merge: the sum within two subspaces of one adapter's rank that all updates share",
        "He et al. 2026, arXiv 2606.03723", (LAM, _RANK, _BETA),
        home="subspace_methods:compress_then_merge",
    ),
    _whole_update(
        "null-space", "NP-LoRA: the others are kept out of the input directions of the first",
        "Chen et al. 2025, arXiv 2511.11051", (LAM, _MU, _RANK),
    ),
    _subspace(
        "pico", "the sum, in which output directions that many updates share are weakened",
        "Tang & Yang 2026, arXiv 2604.16826",
    ),
    _subspace(
        "knots", "the sum in a common basis of the outputs, which equals sum", "Stoica et al. 2025, arXiv 2410.19735",
    ),
    # Elementwise rules. Their densities are those of the papers, which combine full fine-tunes.
    _elementwise(
        "magnitude", "the sum of the largest entries of each update", "Han et al. 2015, arXiv 1506.02626", 0.2,
    ),
    _elementwise(
        "ties", "trim each update to its largest entries, elect a sign for every entry, average the updates that agree",
        "Yadav et al. 2023, arXiv 2306.01708", 0.2, _WHOLE, looks="prepare_cutoffs",
    ),
    _elementwise(
        "dare", "drop entries at random, rescale the others and add them; unbiased before it is cut to a rank",
        "Yu et al. 2024, arXiv 2311.03099", 0.1, seeded=True,
    ),
    _elementwise(
        "dare-ties", "dare, but elect a sign for every entry and average the updates that agree",
        "Yu et al. 2024, arXiv 2311.03099", 0.1, seeded=True,
    ),
    _elementwise(
        "della", "dare-ties, but drop small entries with a higher probability",
        "Deep et al. 2024, arXiv 2406.11617", 0.7, _EPSILON, seeded=True,
    ),
    _elementwise(
        "breadcrumbs", "the sum without the largest entries and without the small ones",
        "Davari & Belilovsky 2024, arXiv 2312.06795", 0.15, _GAMMA,
    ),
    _elementwise(
        "sce", "keep the entries where updates vary most, elect a sign, average those that agree, weighted by energy",
        "Wan et al. 2024, arXiv 2408.07990", 1.0,
    ),
)  # fmt: skip

# By name, and still in the order of the rows, in which messages list them.
METHODS = {row.name: row for row in _ROWS}
