"""Similarity of two adapters, module by module: φ(i, j), principal angles, cosine and CKA, with chance levels."""

from collections.abc import ItemsView, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import final

import numpy as np

from loralens.analysis.compare.module_similarity import ComparedPair, ComparedUpdate, Similarity, measure_similarities
from loralens.choices import Of, Side
from loralens.core.adapter import Adapter
from loralens.core.names import some
from loralens.core.naming.matching import same_modules
from loralens.core.naming.selection import select
from loralens.core.threads import Step, in_threads
from loralens.core.together import check_same_rows
from loralens.errors import MismatchError, OptionError, place
from loralens.linalg.chance import cosine_spread
from loralens.linalg.factor import Floats
from loralens.linalg.measures import frobenius


@final
@dataclass(frozen=True, slots=True)
class Comparison:
    """Two adapters compared module by module: a mapping from module names of the first to `Similarity`.

    Attributes
    ----------
    modules : mapping of str to Similarity
        The modules that both have, in the order of the first.
    alone : tuple of tuple of str
        The modules that only the first has, and those that only the second has.
    misfits : tuple of str
        The modules that cannot be compared because their shapes differ.
    """

    modules: Mapping[str, Similarity]
    alone: tuple[tuple[str, ...], tuple[str, ...]]
    misfits: tuple[str, ...]

    def __getitem__(self, name: str) -> Similarity:
        return self.modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def items(self) -> ItemsView[str, Similarity]:
        """Pairs of name and `Similarity`."""
        return self.modules.items()

    @property
    def zero(self) -> bool:
        """Whether one of the two updates is 0 in all common modules."""
        return not all(any(norms) for norms in zip(*(one.norms for one in self.modules.values()), strict=True))

    @property
    def cosine(self) -> float:
        """Cosine of the two whole updates over their common modules, in [−1, 1]; 0 if one of them is 0."""
        first, second, cosines = self._arrays()
        # If all modules are equal, the cosine is exactly 1, which a sum of rounded terms would miss.
        same = np.array_equal(first, second) and first.any() and (cosines[first > 0] == 1).all()
        return 1.0 if same else float(np.clip(np.sum(first * second * cosines), -1.0, 1.0))

    @property
    def cosine_z(self) -> float:
        """`cosine` in standard deviations of its null; 0 if one of the updates is 0.

        Under the null the norms stay and the directions are random in every module. Its variance is
        Σ‖ΔW₁‖²‖ΔW₂‖²/(out·in) over the product of the two sums of squared norms.
        """
        first, second, _ = self._arrays()
        spreads = np.array([cosine_spread(one.shape) for one in self.modules.values()])
        # Directions of different modules are independent, so the variances of the terms add up.
        spread = sqrt(np.sum((first * second * spreads) ** 2))
        return self.cosine / spread if spread else 0.0

    def _arrays(self) -> tuple[Floats, Floats, Floats]:
        """The norms of the modules of both adapters, relative to the whole updates, and the cosines of the modules."""
        first, second = np.array([one.norms for one in self.modules.values()]).T
        cosines = np.array([one.cosine for one in self.modules.values()])
        # An update that is 0 in all common modules keeps its norms of 0, and its cosine is 0.
        return first / (frobenius(first) or 1.0), second / (frobenius(second) or 1.0), cosines


def compare_subspaces(
    first: Adapter,
    second: Adapter,
    *,
    of: Of = "update",
    side: Side | None = None,
    modules: Sequence[str] = (),
    phi_rank: int | None = None,
    labels: tuple[str, str] = ("the first", "the second"),
    threads: int = 1,
    step: Step | None = None,
) -> Comparison:
    """Compare two adapters in every module that both have.

    Parameters
    ----------
    first, second : Adapter
        Read one module at a time, each factor once. Modules are matched by name, else by normal form.
    of : str
        The directions that φ and the angles compare. ``update``: the singular directions of ΔW = scale·B·A on both
        sides, which do not change under re-factoring (B G, G⁻¹ A). ``A``: the right singular vectors of A, on the in
        side, as in Hu et al. 2021 §7.2. ``B``: the left singular vectors of B, on the out side. Cosine and CKA are
        always of ΔW.
    side : str, optional
        The side of `Similarity.overlap`: see `side_of`. For the update both sides are measured.
    modules : sequence of str
        Globs over module names or kinds; all where empty.
    phi_rank : int, optional
        The largest number of leading directions that φ and the angles compare; by default all.
    labels : tuple of str
        The names of the two adapters in error messages.
    threads : int
        Modules worked on at a time. More than one pays only where BLAS itself uses one thread.
    step : callable, optional
        Called with 1 after every module.

    Returns
    -------
    Comparison

    Raises
    ------
    OptionError
        A glob matches nothing, or A or B does not have this side.
    MismatchError
        The adapters have no module of one shape in common, rows of one are in the order of llama.cpp, or A or B is
        asked of an update without factors.
    FormatError
        A module holds NaN or Inf.

    Notes
    -----
    No ΔW is formed: the work is O((out + in)(r1 + r2)²) a module. Directions count if their singular value is above
    rounding, σ₁ · max(out, in) · ε. An update of 0 has none, and its φ is empty. φ and the cosine are exact to 1e-12.
    """
    side = side_of(of, side)  # checked before anything is read
    pairs = same_modules(first, second)
    matched = set(pairs.values())
    # Globs may also name modules that only the second has, which are then listed as such.
    chosen = select([*first, *(name for name in second if name not in matched)], modules)
    common = {name: pairs[name] for name in chosen if name in pairs}
    fitting = {name: other for name, other in common.items() if first[name].shape == second[other].shape}
    if not fitting:
        raise _nothing_to_compare(first, second, chosen, common)
    for name, other in fitting.items():
        check_same_rows(name, (first[name], second[other]))

    def measure(name: str) -> Similarity:
        other = fitting[name]
        with place(labels[0]), place(name):
            a = ComparedUpdate.of(first[name], of)
        with place(labels[1]), place(other):
            b = ComparedUpdate.of(second[other], of)
        return measure_similarities([ComparedPair(a, b, other)], side, phi_rank)[0]

    return Comparison(
        in_threads(measure, list(fitting), threads, step),
        (
            tuple(name for name in chosen if name not in pairs and name in first),
            tuple(name for name in chosen if name not in pairs and name not in first),
        ),
        tuple(name for name in common if name not in fitting),
    )


def side_of(of: Of, side: Side | None = None) -> Side:
    """The side to compare: by default ``out``, and ``in`` for A; A and B have no other side.

    The in side of ΔW mostly shows the random start of A. Among the adapters in examples/adapters, two tasks with one
    seed share more of it (φ of all directions 0.34 to 0.42) than one task with two seeds (0.07). On the out side the
    order is right: 0.05 to 0.06 for two tasks with one seed, 0.12 for one task with two seeds. Chance gives 0.02.

    Raises
    ------
    OptionError
        A or B does not have this side.
    """
    if (of, side) in (("A", "out"), ("B", "in")):
        raise OptionError(f"{of} has no {side} side", fix="A is the in side of an update and B the out side")
    return side or ("in" if of == "A" else "out")


def _nothing_to_compare(
    first: Adapter, second: Adapter, chosen: Sequence[str], common: Mapping[str, str]
) -> MismatchError:
    fix = "compare adapters of one base model; `loralens inspect` shows names and shapes"
    for name, other in common.items():  # the first module is enough to show that the bases differ
        first_base, second_base = (adapter.base_model or "a model it does not name" for adapter in (first, second))
        shapes = f"{name} is {first[name].shape} in the first, which adapts {first_base}"
        shapes += f", and {second[other].shape} in the second, which adapts {second_base}"
        return MismatchError(shapes, fix=fix)
    if same_modules(first, second):
        return MismatchError(f"only one of the two adapters has {some(chosen, 1)}", fix="choose others with --modules")
    return MismatchError(f"no module in common: the first has {some(first, 1)}, the second {some(second, 1)}", fix=fix)
