"""The commands: each is derived from its function, calls it, shows the result and chooses the exit code."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from shlex import quote
from typing import Any

import click

from loralens.cli.command_table import ROWS, RowOptions
from loralens.cli.derive import EMPTY, Function, derive, read_function
from loralens.cli.show import More, rows_of, show, show_json, tell_written, wrap_sentences
from loralens.cli.terminal import say
from loralens.errors import OptionError
from loralens.exports import homes_of

FAILED, NO, UNDECIDED = 2, 1, 3  # exit codes: an adapter could not be processed, an answer is no, or cannot be told
# Under this key the context of a command says that the user named none, and that `inspect` was chosen for a path.
WITHOUT_VERB = "loralens.without_verb"
# These refuse a missing target themselves, or need one only sometimes.
OWN_TARGETS = ("intruders", "train")
_NUMBER = re.compile(r"[+-]?\d*[.,]?\d+")


@cache
def command_of(name: str) -> click.Command:
    """The command of a verb."""
    module, row = "loralens.cli.demo" if name == "demo" else homes_of("loralens")[name], ROWS[name]
    function = read_function(module, name, row)
    own = {parameter.name for parameter in function.parameters}

    def run(values: dict[str, Any], given: set[str]) -> None:
        rows = rows_of(values)
        for parameter in function.parameters:
            if {"Weighted", "WithStrength"} & parameter.words:
                values[parameter.name] = [split_weight(text) for text in values[parameter.name]]
        # Defaults are left to the function.
        kept = {each: value for each, value in values.items() if each in given}
        RUNNERS.get(name, _run)(Call(name, function, kept), values, rows)

    needs_target = {"output", "dry_run"} <= own and name not in OWN_TARGETS
    return derive(name, function, row, run, needs_target=needs_target)


def split_weight(text: str) -> tuple[str, float]:
    """``ADAPTER:0.7`` as path and weight: the text after the last colon is a weight if it is a number.

    A path that exists has no weight, since names of files may contain colons.
    """
    path, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    if not path:
        raise click.BadParameter(f"{text}: the path before the weight {EMPTY}")
    # If the path before the colon does not exist, the error is about the path, not about the weight.
    from loralens.formats.files.location import existing_path

    existing_path(Path(path))
    return path, weight


class Call:
    """The call of a verb with the values that the user gave."""

    def __init__(self, name: str, function: Function, values: dict[str, Any]) -> None:
        self.name, self.function, self.values = name, function, values

    def __call__(self, **changes: Any) -> Any:
        """What the verb returns."""
        keywords = self.values | changes
        arguments: list[Any] = []
        for parameter in self.function.parameters:
            if parameter.argument:
                value = keywords.pop(parameter.name, () if parameter.star else None)
                arguments += value if parameter.star else [value]
        return getattr(import_module("loralens"), self.name)(*arguments, **keywords)


def _run(call: Call, values: dict[str, Any], rows: RowOptions) -> None:
    """Call a verb and show its answer. Some take several adapters, one after the other."""
    first = call.function.parameters[0]
    if not first.star and "Source" in first.words:
        # Imported here, so that showing the help of a command does not import NumPy.
        from loralens.verbs.batches.batch import is_several

        adapters = values[first.name]
        source = adapters[0] if len(adapters) == 1 else list(adapters)
        # This is refused before any work.
        if rows.plot and is_several(source):
            raise click.UsageError("--plot draws one adapter, and there are several")
        call.values[first.name] = source
    _show_answer(call(), rows, asks=ROWS[call.name].asks)


def _show_answer(result: Any, rows: RowOptions, *, asks: bool = True) -> None:
    """Show a result, and exit with its answer: many have none, which counts as yes; None if nothing was asked."""
    if result is None:  # a file was written in place of an answer
        return
    # Of several adapters.
    details = result.details() if hasattr(result, "details") and rows.verbose else ()
    tables = result.details_of_blocks() if hasattr(result, "details_of_blocks") and rows.verbose else ()
    show(result, rows, More(tables, details))
    if asks:
        _exit(result)


def _exit(result: Any) -> None:
    """Exit with the answer of a result."""
    if getattr(result, "failed", None):
        click.get_current_context().exit(FAILED)
    if getattr(result, "undecided", False):
        click.get_current_context().exit(UNDECIDED)
    if getattr(result, "answer", None) not in (None, True):
        click.get_current_context().exit(NO)


# ---- What single commands do of their own


def _inspect(call: Call, values: dict[str, Any], rows: RowOptions) -> None:
    result = call()
    if rows.as_json or rows.as_csv:
        show(result, rows)
    else:
        # One after the other, so that the findings of an adapter are below its own tables.
        *_, last = result.adapters
        adapter = quote(values["adapters"][0])
        steps = [f"next: loralens doctor {adapter} (is anything wrong?), or spectrum, compress, similarity"]
        for each in result.adapters:
            alone = each is last and WITHOUT_VERB in click.get_current_context().meta
            # On a terminal the conclusion is last, and the tables of the next adapter would follow it at once.
            gap = [""] if each is not last and sys.stdout.isatty() else []
            more = More(each.listing() if rows.verbose else (), (), steps if alone else gap)
            show(each, rows, more, of=len(result.adapters))
    _exit(result)


def _demo(call: Call, values: dict[str, Any], rows: RowOptions) -> None:
    del call, rows
    import_module("loralens.cli.demo").demo(**values)


def _schema(call: Call, values: dict[str, Any], rows: RowOptions) -> None:
    del values, rows
    say(*json.dumps(call(), indent=1, ensure_ascii=False).splitlines())


def _doctor(call: Call, values: dict[str, Any], rows: RowOptions) -> None:
    from loralens.verbs.spectra.doctor import DoctorResult

    result = call()
    if values["sarif"]:
        tell_written(values["sarif"])
    if isinstance(result, DoctorResult):
        # Evidence and remedies are printed as sentences and not as rows, so the result itself applies --top.
        modules_told = None if rows.verbose else result.modules_told
        result = replace(result, causes_told=rows.rows_shown, modules_told=modules_told)
    _show_answer(result, rows)


def _report(call: Call, values: dict[str, Any], rows: RowOptions) -> None:
    missing, fixes = [], []
    if not (values["adapters"] or values["fleet"]):
        missing.append("argument 'ADAPTER...'")
        fixes.append("give adapters, or --fleet HOME")
    # The page is the result; only the numbers can be had without it.
    if values["output"] is None and not rows.as_json:
        missing.append("option '-o'")
        fixes.append("say where to write the page, such as -o report.html, or give --json")
    if missing:
        raise OptionError(f"missing {' and '.join(missing)}", fix="; ".join(fixes))
    result = call()
    if rows.as_json:
        # On standard error, where it does not disturb the JSON.
        for path in result.written:
            tell_written(path)
        show_json(result.record())
        return
    say(*wrap_sentences([*result.conclusion(), *(result.document.summary[1:] if rows.verbose else ())]))


def _survey(call: Call, values: dict[str, Any], rows: RowOptions) -> None:
    show(call(), rows)
    if values["html"]:
        tell_written(values["html"])


def _train(call: Call, values: dict[str, Any], rows: RowOptions) -> None:
    from loralens.cli.train_show import TrainingLine
    from loralens.verbs.runs.run_display import displaying_runs

    del values
    with displaying_runs(TrainingLine):
        result = call()
    # Only the first of several processes under torchrun prints.
    if result.main:
        show(result, rows)


def _merge(call: Call, values: dict[str, Any], rows: RowOptions) -> None:
    # Without a measurement there would be nothing to show as JSON or CSV.
    show(call(measure=values["measure"] or rows.as_json or rows.as_csv), rows)


def _scale(call: Call, values: dict[str, Any], rows: RowOptions) -> None:
    number = next((word for word in values["adapter"] if _NUMBER.fullmatch(word) and not Path(word).exists()), None)
    if number is not None and all(values[name] is None for name in ("by", "preset", "block_weights")):
        fix = f"give the factor with --by: --by {number.replace(',', '.')}"
        raise OptionError(f"{number} is not an adapter", fix=fix)
    _run(call, values, rows)


def _intruders(call: Call, values: dict[str, Any], rows: RowOptions) -> None:
    # --remove without -o would have no effect, and -o without --remove would have nothing to write.
    if (values["remove"] is None) != (values["output"] is None):
        raise click.UsageError("--remove and -o must be given together")
    _run(call, values, rows)


RUNNERS: dict[str, Callable[[Call, dict[str, Any], RowOptions], None]] = {
    "demo": _demo,
    "doctor": _doctor,
    "inspect": _inspect,
    "intruders": _intruders,
    "merge": _merge,
    "report": _report,
    "scale": _scale,
    "schema": _schema,
    "survey": _survey,
    "train": _train,
}
