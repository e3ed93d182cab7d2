"""The combination of every module by one method: the small matrices of several modules are computed together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
from numpy.typing import DTypeLike

from loralens.arithmetic.method import CombiningMethod
from loralens.arithmetic.quality import Quality
from loralens.core.joint import Core, Joint, JointFactors, Lift, decompose_cores, joint_spaces
from loralens.core.lowrank import LowRank
from loralens.core.structured import Update
from loralens.core.threads import Step, in_threads
from loralens.core.together import Row, check_combinable, keep_modules, single_module
from loralens.errors import place
from loralens.linalg.factor import Floats

if TYPE_CHECKING:
    from loralens.arithmetic.dora import DoraCombination

# The small matrices of several modules go through each call of NumPy together, since the calls take longer than the
# arithmetic of one module. More of them save nothing, and leave less to divide among threads.
TOGETHER = 16
NUMBERS = 1 << 18  # of the cores of a chunk: 2 MiB, which fit into a cache


@dataclass(slots=True)
class CombiningWork:
    """The combination of every module, with the settings that all of them share."""

    row: CombiningMethod
    settings: Mapping[str, Any]
    rows: Mapping[str, Row]
    weights: Mapping[str, Sequence[float]]
    labels: Sequence[str]
    seed: int
    dtype: DTypeLike | None
    dora: "DoraCombination | None"
    width: int
    stay: Mapping[str, Update] = field(default_factory=dict)
    truncation: dict[str, float] = field(default_factory=dict)
    h: dict[str, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # In a plain sum a module of one adapter keeps its stored factors; DoRA factors change with the stretch.
        if self.row.name == "sum" and self.settings["lam"] == 1 and not self.dora:
            pairs = {name: single_module(row, self.weights[name], self.dtype) for name, row in self.rows.items()}
            self.stay = keep_modules(self.rows, pairs)

    @property
    def stretched(self) -> set[str]:
        """Names of the modules whose combination stretches the base weight."""
        return {name for name, h in self.h.items() if h.any()}

    def combine_all(self, threads: int, step: Step | None) -> dict[str, tuple[Lift, Quality]]:
        """Combine every module. A method with `CombiningMethod.prepare` looks at all of them before."""
        if self.row.prepare:
            from loralens.arithmetic.elementwise import Modules  # elementwise methods take 10 ms to import

            shapes = [next(update.shape for update in row if update is not None) for row in self.rows.values()]
            modules = Modules(list(self.rows), self.joint, sum(map(prod, shapes)), threads, step)
            self.settings = {**self.settings, **self.row.prepare(modules, **self.settings)}
        results: dict[str, tuple[Lift, Quality]] = {}
        for combined in in_threads(partial(self.combine_chunk, step=step), self._chunks(), threads, few=2).values():
            results |= combined
        if self.row.spaces:
            from loralens.linalg.sketch import forget_panels

            forget_panels()
        return {name: results[name] for name in self.rows}

    def _chunks(self) -> list[tuple[str, ...]]:
        """The modules that are combined together: with the same ranks, and few enough for their small matrices."""
        if self.row.spaces:
            # Results of an elementwise method have tall factors in float64, so only one is in memory at a time.
            return [(name,) for name in self.rows]
        alike: dict[tuple[int, ...], list[str]] = {}
        for name, row in self.rows.items():
            alike.setdefault(tuple(0 if update is None else update.rank for update in row), []).append(name)
        chunks = []
        for ranks, names in alike.items():
            size = max(1, min(TOGETHER, NUMBERS // max(1, len(ranks) * sum(ranks) ** 2)))
            chunks += [tuple(names[i : i + size]) for i in range(0, len(names), size)]
        return chunks

    # Huge updates overflow in float32 products. The result is checked, so a warning of NumPy would only come twice.
    @np.errstate(over="ignore", invalid="ignore")
    def combine_chunk(self, names: Sequence[str], *, step: Step | None = None) -> dict[str, tuple[Lift, Quality]]:
        """Return the combinations of some modules with the same ranks, and their qualities."""
        joints, matrices = [], []
        for name, space in zip(names, self._spaces(names), strict=True):
            with place(name):
                # Of a module that stays, the core is computed for the quality only.
                joint, matrix = (space, space.total()) if name in self.stay else self._apply_rule(name, space)
            joints.append(joint)
            matrices.append(matrix)
        cores = decompose_cores(joints, matrices)
        qualities = Quality.many(joints, cores, len(self.labels))
        results = {}
        for name, joint, core, quality in zip(names, joints, cores, qualities, strict=True):
            with place(name):
                whole = self._add_stretches(name, joint, core, quality) if self.dora else quality
                results[name] = joint.to_lift(core), whole
            if step:
                step(1)
        return results

    def _add_stretches(self, name: str, joint: Joint, core: Core, quality: Quality) -> Quality:
        """The quality of a DoRA module with its stretch, which is noted."""
        from loralens.arithmetic.dora import add_stretches  # only DoRA needs it

        assert self.dora
        row_changes = self.dora.row_changes(name, joint.shape[0])
        # The rule is linear, so it combines the stretches as it combines the cores.
        h = self.row.rule(replace(joint, cores=row_changes[:, None, :]), **self.settings)
        assert isinstance(h, np.ndarray)
        self.h[name] = h[0]
        return add_stretches(quality, joint, core, row_changes, h[0], self.dora.weight(name))

    def _spaces(self, names: Sequence[str]) -> list[Joint]:
        """The joint spaces of some modules with the same ranks."""
        if len(names) == 1:
            return [self.joint(names[0])]
        factors = [self._factors(name) for name in names]
        spaces = []
        for name, module, space in zip(names, factors, joint_spaces(factors), strict=True):
            with place(name):
                spaces.append(replace(space or module.joint(), width=self.width))
        return spaces

    def joint(self, name: str) -> Joint:
        """Return the joint space of one module."""
        # Made again for every pass and not kept: the joint spaces of a large adapter would fill the memory.
        with place(name):
            return replace(self._factors(name).joint(), width=self.width)

    def _factors(self, name: str) -> JointFactors:
        """Read the factors of one module."""
        # A module that stays as it is may be of a kind that cannot be combined, such as LoKr.
        if name not in self.stay:
            check_combinable(name, self.rows[name], self.labels)
        with place(name):
            return JointFactors.of(self.rows[name], self.weights[name])

    def _apply_rule(self, name: str, joint: Joint) -> tuple[Joint, Floats | Core]:
        """The joint space in which the result of the rule on one module lies, and the result as a core matrix."""
        # The seed depends on the name, so a module draws the same numbers whichever others are combined.
        seed = {"seed": np.random.SeedSequence([self.seed, crc32(name.encode())])} if self.row.seeded else {}
        result = self.row.rule(joint, **self.settings, **seed)
        # Rules return cores, an SVD, an update, or an update with its error: see `CombiningMethod.rule`.
        # What remains is a `Fused`, whose room is imported by the elementwise methods alone.
        if not isinstance(result, np.ndarray | Core | LowRank):
            self.truncation[name], result = result.truncation, result.update
        if not isinstance(result, LowRank):
            return joint, result
        # The result is outside the space of the updates. A joint space of both is needed to compare them.
        wider = Joint.of([*self.rows[name], result], [*self.weights[name], 0.0])
        return wider, wider.cores[-1]
