"""What ``loralens combine`` says it did: as tables, and as JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli.terminal import say

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.arithmetic.combine import Combination
    from loralens.arithmetic.quality import Total
    from loralens.cli.rounding import Rounding
    from loralens.cli.table import Table
    from loralens.core.adapter import Adapter
    from loralens.core.recipe import Recipe

EXACT = 1e-12  # a relative error below this is rounding


@dataclass(frozen=True, slots=True)
class Report:
    """A combination, and what was written of it.

    Attributes
    ----------
    recipe : Recipe
    found : Combination
    ranks : mapping of str to int
        That its modules were cut to; empty where they were not.
    nominal : mapping of str to list of int
        Ranks of each module in every adapter, 0 where it has none.
    adapter : Adapter
        What was written.
    format : str
    size : int
        Bytes of the file of weights.
    rounding : Rounding or None
        What rounding its factors cost; None where it was not measured.
    """

    recipe: "Recipe"
    found: "Combination"
    ranks: Mapping[str, int]
    nominal: Mapping[str, list[int]]
    adapter: "Adapter"
    format: str
    size: int
    rounding: "Rounding | None" = None

    def say(self, written: Path | None, output: Path | None, *, as_json: bool) -> None:
        """Print it; ``written`` is None where nothing was."""
        if as_json:
            click.echo(json.dumps({"target": None if written is None else str(written), **self._record()}))
            return
        self._show()
        what = "wrote" if written else "would write"
        where = f" {output}" if output else ""
        say(f"{what}{where}: {self.format}, {len(self.adapter)} modules")

    def _record(self) -> dict[str, Any]:
        total = self.found.total(self.ranks)
        return {
            "format": self.format,
            "method": self.recipe.method,
            "space": self.recipe.space or "core",
            "adapters": [
                {
                    **one.record(),
                    "retained": share.retained,
                    "gain": share.gain,
                    "interference": {"before": share.interference_before, "after": share.interference_after},
                }
                for one, share in zip(self.recipe.adapters, total.shares, strict=True)
            ],
            "modules": [
                {
                    "name": name,
                    "shape": list(self.adapter[name].shape) if name in self.adapter else None,
                    "ranks_before": self.nominal[name],
                    "rank": self._rank(name),
                    "error_to_sum": quality.error_to_sum(self.ranks.get(name)),
                    "truncation": self.found.truncated(name, self.ranks.get(name)),
                }
                for name, quality in self.found.modules.items()
            ],
            "total": {
                "error_to_sum": total.error_to_sum,
                "truncation": total.truncation,
                "rounding": self.rounding.record() if self.rounding else None,
                "modules": len(self.adapter),
                "parameters": self.adapter.parameters,
                "bytes": self.size,
            },
            "recipe": self._recipe(),
            "notes": list(self.found.notes),
        }

    def _recipe(self) -> dict[str, Any]:
        """As it is written into the adapter, but for an option that is infinite, which is null."""
        said = self.recipe.record()
        if "options" in said:
            said["options"] = {name: value if isfinite(value) else None for name, value in said["options"].items()}
        return said

    def _rank(self, name: str) -> int:
        """As written; 0 where the module was left out."""
        return self.adapter[name].rank if name in self.adapter else 0

    def _show(self) -> None:
        from loralens.cli.table import show, size

        total = self.found.total(self.ranks)
        cut = total.truncation >= EXACT
        show(self._modules_table(cut=cut), self._adapters_table(total))
        error = _error(total.error_to_sum)
        say(f"error       ‖R−Σw·ΔW‖/‖Σw·ΔW‖ = {error} over all modules, before the factors are rounded")
        if cut:
            lost = _error(total.truncation)
            say(f"truncation  ‖F−R‖/‖F‖ = {lost} over all modules: what of the method's own result F was cut off")
        if self.rounding and self.rounding.worst:
            say(str(self.rounding))
        say(f"parameters  {self.adapter.parameters:,}")
        say(f"file        {size(self.size)} ({self.size:,} bytes)")

    def _modules_table(self, *, cut: bool) -> "Table":
        """Ranks and errors; with ``cut`` also what truncation lost."""
        from loralens.cli.table import Column, Table

        rows = [
            [
                name,
                " × ".join(map(str, self.adapter[name].shape)) if name in self.adapter else "",
                " + ".join(str(rank) if rank else "–" for rank in self.nominal[name]),
                str(self._rank(name) or "gone"),
                *([_error(self.found.truncated(name, self.ranks.get(name)))] if cut else []),
                _error(quality.error_to_sum(self.ranks.get(name))),
            ]
            for name, quality in self.found.modules.items()
        ]
        space = f", in the {self.recipe.space} space" if self.recipe.space else ""
        told = "truncation, error to the exact sum" if cut else "error to the exact sum"
        title = f"{self.recipe.method}{space}: {len(rows)} modules, r before and r' after, {told}"
        columns = ["out × in", "r", "r'", *(["truncation"] if cut else []), "error"]
        return Table(title, [Column("module", "left"), *map(Column, columns)], rows)

    def _adapters_table(self, total: "Total") -> "Table":
        """What became of every adapter."""
        from loralens.cli.compress_report import percent
        from loralens.cli.table import Column, Table

        weights = [one.strength for one in self.recipe.adapters]
        shares = [
            [
                one.path,
                f"{one.strength.weight:g}" + (" *" if one.strength.modules else ""),
                "" if share.retained is None else percent(share.retained),
                _signed(share.gain),
                _signed(share.interference_before),
                _signed(share.interference_after),
            ]
            for one, share in zip(self.recipe.adapters, total.shares, strict=True)
        ]
        summed = sum(weight.weight for weight in weights)
        title = f"{len(shares)} adapters, weights add up to {summed:g}"
        if any(weight.modules for weight in weights):
            title += " (*: others in some modules)"
        heads = ("weight", "retained", "gain", "interference in the sum", "in the result")
        return Table(title, [Column("adapter", "left"), *map(Column, heads)], shares)


def _error(value: float | None) -> str:
    from loralens.cli.compress_report import percent

    return "sum is 0" if value is None else "0" if value < EXACT else percent(value)


def _signed(value: float | None) -> str:
    return "" if value is None else f"{round(value, 3) + 0.0:.3f}"
