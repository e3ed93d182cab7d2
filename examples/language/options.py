"""The command line of the studies of a language model."""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


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
    given = parser.parse_args(arguments)
    given.runs = given.runs or Path(f"{folder}-full" if given.full else folder)
    return given


@contextmanager
def shown_progress() -> Iterator[None]:
    """Within the context, what loralens says about its runs is printed, such as the end of each run of a grid."""
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
