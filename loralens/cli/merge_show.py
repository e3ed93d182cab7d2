"""What a merge says when it is done: a table of what arrived, and advice where too little did."""

from typing import Any

from loralens.cli import table
from loralens.cli.table import Column, Table, number
from loralens.cli.terminal import say

SWALLOWED = 0.95  # gain below which a merge is said to lose too much
DAMAGED = 0.2  # and relative error above which


def show(content: dict[str, Any], what: str, *, measured: bool) -> None:
    """The certificate as a table."""
    modules, total = content["modules"], content["total"]
    title = f"{what}: {total['tensors']} tensors changed"
    if not measured or not modules:
        say(title + ("" if measured else "; nothing was measured without a certificate"))
        return
    title += f", {len(modules)} updates, gain {total['gain']:.4f}, error {number(total['relative_error'])}"
    rows = [
        [
            module["name"],
            f"{module['gain']:.4f}",
            number(module["relative_error"]),
            "" if module["subspace_error"] is None else number(module["subspace_error"]),
            f"{module['unmoved']:.1%}",
            f"{module['surviving']} of {module['directions']}" if module["directions"] else "",
        ]
        for module in modules
    ]
    heads = ("gain", "error", "error in its inputs", "unmoved", "above noise")
    table.show(Table(title, [Column("module", "left"), *map(Column, heads)], rows))
    if total["undo_bytes"] is not None:
        bits = total["undo_bits_per_weight"]
        say(f"undo patch: {total['undo_bytes']:,} bytes, {bits:.2f} bits for each changed weight")


def advise(content: dict[str, Any], *, dtype: str, rounding: str) -> None:
    """Say it where rounding swallows an update or a weight overflows, and what to do."""
    modules = content["modules"]
    lost = sum(module["overflowed"] for module in modules)
    if lost:
        say(f"warning: {lost:,} weights became infinite: {dtype} does not reach so far", err=True)
        short = dtype not in ("float32", "bfloat16")
        fix = "write --dtype f32 (or bf16)" if short else "check the adapter's α and scale with loralens doctor"
        say(f"  fix: {fix}", err=True)
    bad = [m for m in modules if m["gain"] < SWALLOWED or m["relative_error"] > DAMAGED]
    if not bad or dtype == "float32":
        return
    worst = max(bad, key=lambda module: module["relative_error"])
    say(
        f"warning: rounding to {dtype} damages {len(bad)} of {len(modules)} updates; worst is {worst['name']}: "
        f"gain {worst['gain']:.2f}, error {worst['relative_error']:.2f}",
        err=True,
    )
    ways = ["write --dtype f32" + (" (or f16, where the model runs in it)" if dtype == "bfloat16" else "")]
    ways.append("serve the adapter unmerged")
    if rounding == "nearest" and any(module["gain"] < SWALLOWED for module in bad):
        ways.append("take --rounding stochastic: full strength at the price of noise")
    say(f"  fix: {', '.join(ways[:-1])}, or {ways[-1]}", err=True)
