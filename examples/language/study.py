"""The command of the studies of a language model, and what their numbers say about the plan."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from language.texts import FOLDER, read_pairs

from loralens.errors import LoraLensError


def run_study(
    arguments: Sequence[str] | None,
    text: str | None,
    *,
    script: str,
    report: str,
    folder: str,
    plans: Mapping[str, Any],
    measure: Callable[..., dict[str, Any]],
) -> None:
    """Train what is missing, judge it, and write the page; with ``--report`` draw the page again.

    Parameters
    ----------
    arguments : sequence of str, optional
        The words of the command line.
    text : str, optional
        The help: the docstring of the script.
    script, report : str
        The names of the script in ``examples``, and of the module in ``language`` that reads and writes its page.
    folder : str
        Where runs are kept.
    plans : mapping of str to plan
        The plan without ``--full``, as ``quick``, and the one with it, as ``full``.
    measure : callable
        Plan, `Bench` and folder → everything that the page shows, as plain numbers. It trains and judges what is
        missing in the folder.
    """
    options = read_options(arguments, text, folder)
    page = import_module(f"language.{report}")
    try:
        if options.report:
            print(page.write(page.read(options.reports), options.reports))
            return
        from language.bench import Bench

        plan = plans["full" if options.full else "quick"]
        pairs = read_pairs(plan.recipe.characters)
        machine = {"device": options.device, "threads": options.threads, "jobs": options.jobs}
        bench = Bench(plan.model, pairs, plan.recipe, only_done=options.so_far, **machine)
        with shown_progress():
            numbers = measure(plan, bench, options.runs)
        texts = f"{FOLDER}=FOLDER " if os.environ.get(FOLDER) else ""
        numbers["command"] = f"{texts}python examples/{script}.py" + (" --full" if options.full else "")
        print(page.write(numbers, options.reports))
    except LoraLensError as error:
        sys.exit(str(error))


def read_options(arguments: Sequence[str] | None, text: str | None, folder: str) -> argparse.Namespace:
    """The options of a study of a language model."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    doing = parser.add_mutually_exclusive_group()
    doing.add_argument("--report", action="store_true", help="draw the page again from its numbers")
    doing.add_argument("--so-far", action="store_true", help="train nothing: the page of the runs that are done")
    parser.add_argument("--full", action="store_true", help="all texts and many steps: for a GPU")
    parser.add_argument("--runs", type=Path, help=f"where runs are kept [{folder}; full: {folder}-full]")
    parser.add_argument("--reports", type=Path, default=Path("reports"), help="where the page goes [reports]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda … [cpu]")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU [1]")
    parser.add_argument("--jobs", type=int, default=1, help="runs of LoRA at a time [1]")
    options = parser.parse_args(arguments)
    options.runs = options.runs or Path(f"{folder}-full" if options.full else folder)
    return options


@contextmanager
def shown_progress() -> Iterator[None]:
    """Within the context, messages of loralens about its runs are printed, such as the end of each run of a grid."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("  %(message)s"))
    logger, level = logging.getLogger("loralens"), logging.getLogger("loralens").level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def plan_facts(plan: Any, bench: Any, **own: Any) -> dict[str, Any]:
    """The plan as the numbers of a study hold it; ``own`` are the facts that only this study has."""
    common = {"seeds": list(plan.seeds), "model": plan.model, "device": bench.device}
    return {"plan": {"recipe": asdict(plan.recipe), **own, **common}}
