"""loralens beside the tools that do some of the same: adaptersentry, mergekit and PEFT, in turns in one run.

Rivals are installed where the data lie (``benchmarks/data/others``), PEFT is that of the development environment.
Tools that no registry has are not run.

    python -m benchmarks.others [--runs N]
"""

import argparse
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from benchmarks import others_combine, others_extract, others_spectrum
from benchmarks.rivals import REQUIREMENTS, rival

MOST = 3  # runs of what takes seconds


def run(data: Path, *, runs: int) -> dict[str, object]:
    """Every comparison; where a rival cannot be had, its row says so."""
    home, few = data / "others", min(runs, MOST)
    home.mkdir(parents=True, exist_ok=True)
    rivals = {name: rival(name, home) for name in REQUIREMENTS}
    versions = {name: one.missing or one.requirement for name, one in rivals.items()}
    return {
        "versions": versions | {"peft": version("peft") if find_spec("peft") else "not installed"},
        "spectrum": others_spectrum.run(data, rivals["adaptersentry"], runs=few),
        "extract": others_extract.run(home, rivals["mergekit"], runs=few),
        "combine": others_combine.run(home, runs=few),
    }


def main() -> None:
    """These comparisons alone, printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=MOST)
    print(json.dumps(run(Path(__file__).parent / "data", runs=parser.parse_args().runs), indent=2))


if __name__ == "__main__":
    main()
