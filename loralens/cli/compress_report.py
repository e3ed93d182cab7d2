"""What ``loralens compress`` says it did: as a table, and as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loralens.cli.terminal import say

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.compression.loss import Loss
    from loralens.core.adapter import Adapter


@dataclass(frozen=True, slots=True)
class Report:
    """What became of an adapter.

    Attributes
    ----------
    before, after : Adapter
    losses : mapping of str to Loss
        Of every module, measured on what was written.
    on_data : mapping of str to Loss
        The same on the data of the moments, of the modules that were measured; empty without moments.
    sizes : tuple of int
        Bytes of the file of weights, before and after.
    notes : list of str
        What else there is to say.
    """

    before: "Adapter"
    after: "Adapter"
    losses: "Mapping[str, Loss]"
    on_data: "Mapping[str, Loss]"
    sizes: tuple[int, int]
    notes: list[str]

    def record(self) -> dict[str, Any]:
        """As a JSON object."""
        from loralens.compression.loss import total_error

        return {
            "modules": [
                {
                    "name": name,
                    "rank_before": loss.rank_before,
                    "rank_after": loss.rank_after,
                    "relative_error": loss.relative_error,
                    "spectral_error": loss.spectral_error,
                    "energy_kept": loss.energy_kept,
                    **({"data_error": self._data_error(name)} if self.on_data else {}),
                }
                for name, loss in self.losses.items()
            ],
            "total": {
                "relative_error": total_error(self.losses),
                **({"data_error": total_error(self.on_data)} if self.on_data else {}),
                "modules_before": len(self.before),
                "modules_after": len(self.after),
                "parameters_before": self.before.parameters,
                "parameters_after": self.after.parameters,
                "bytes_before": self.sizes[0],
                "bytes_after": self.sizes[1],
            },
            "notes": self.notes,
        }

    def _data_error(self, name: str) -> float | None:
        return self.on_data[name].relative_error if name in self.on_data else None

    def show(self, source: str) -> None:
        """Print it."""
        from loralens.cli.table import Column, Table, show
        from loralens.compression.loss import total_error

        heads = ("out × in", "r", "r'", "error", "spectral", "energy kept", *(["on data"] if self.on_data else []))
        rows = [
            [
                name,
                " × ".join(map(str, self.before[name].shape)),
                str(loss.rank_before),
                str(loss.rank_after) if loss.rank_after else "gone",
                percent(loss.relative_error),
                percent(loss.spectral_error),
                f"{loss.energy_kept:.2%}",
                *([percent(self._data_error(name))] if self.on_data else []),
            ]
            for name, loss in self.losses.items()
        ]
        title = f"{source}: {len(self.before)} modules, r before and r' after"
        show(Table(title, [Column("module", "left"), *map(Column, heads)], rows))
        say(f"error       ‖ΔW−ΔW'‖/‖ΔW‖ = {percent(total_error(self.losses))} over all modules")
        if self.on_data:
            what = f"{percent(total_error(self.on_data))} over the {len(self.on_data)} modules measured"
            say(f"on data     √(E‖(ΔW−ΔW')x‖² / E‖ΔWx‖²) = {what}")
        say(f"parameters  {_change(self.before.parameters, self.after.parameters, '{:,}'.format)}")
        say(f"file        {_change(*self.sizes, _bytes)}")
        for line in self.notes:
            say(line)


def percent(error: float | None) -> str:
    """An error in percent, to three digits; small ones as powers of ten; nothing where it is not known."""
    if error is None:
        return ""
    return "0" if error == 0 else f"{100 * error:.3g} %" if error >= 1e-5 else f"{error:.1e}"


def _bytes(count: int) -> str:
    from loralens.cli.table import size

    return f"{size(count)} ({count:,} bytes)"


def _change(before: int, after: int, text: Any) -> str:
    share = f", {after / before:.1%} of it" if before else ""
    return f"{text(before)} → {text(after)}{share}"
