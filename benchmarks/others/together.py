"""The comparisons: which there are, and one run of all of them.

Tools of a package index are installed under ``others`` in the folder of data, and PEFT is the one of the development
environment. Environment variables name the rest (`benchmarks.rivals`).
"""

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from benchmarks.others import compress, cut_sum, extract, gguf, merge, spectrum
from benchmarks.rivals import CHECKOUTS, REQUIREMENTS, checkout, llama_export_lora, rival

MOST = 3  # runs at most
MOST_OF_LONG = 2  # the slowest commands take ten seconds and more, and vary less

Part = Callable[[Path, int], dict[str, object]]
PARTS: dict[str, Part] = {
    "spectrum": lambda data, runs: spectrum.run(data, rival("adaptersentry", data / "others"), runs=runs),
    "merge": lambda data, runs: merge.run(
        data, checkout("axolotl"), rival("mergekit", data / "others"), runs=min(runs, MOST_OF_LONG)
    ),
    "gguf": lambda data, runs: gguf.run(data, llama_export_lora(), runs=min(runs, MOST_OF_LONG)),
    "extract": lambda data, runs: extract.run(
        data / "others", rival("mergekit", data / "others"), runs=min(runs, MOST_OF_LONG)
    ),
    "compress": lambda data, runs: compress.run(data / "others", checkout("sd-scripts"), runs=min(runs, MOST_OF_LONG)),
    "sum": lambda data, runs: cut_sum.run(data / "others", checkout("sd-scripts"), runs=min(runs, MOST_OF_LONG)),
}


def run(data: Path, *, runs: int) -> dict[str, object]:
    """Every comparison; the row of a rival that is not there says so."""
    return {"versions": versions(data)} | {name: part(data, min(runs, MOST)) for name, part in PARTS.items()}


def versions(data: Path) -> dict[str, str]:
    """Rival → its version, or why it is not measured."""
    installed = {name: rival(name, data / "others") for name in REQUIREMENTS}
    found = {name: one.missing or one.requirement for name, one in installed.items()}
    sources = {name: checkout(name) for name in CHECKOUTS}
    found |= {name: one.missing or one.version for name, one in sources.items()}
    program = llama_export_lora()
    found["llama-export-lora"] = program.missing or program.version
    found["peft"] = f"peft=={version('peft')}" if find_spec("peft") else "not measured: peft is not installed"
    return found
