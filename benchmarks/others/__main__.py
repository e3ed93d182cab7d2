"""Measure loralens and other tools by turns and print the results, or print the table of kept results.

python -m benchmarks.others                      all parts, as in ``python -m benchmarks others``
python -m benchmarks.others merge [--runs N]     one part
python -m benchmarks.others table                a Markdown table of the last run, from benchmarks/results.json
"""

import argparse
import json
from pathlib import Path

from benchmarks.others.table import markdown
from benchmarks.others.together import MOST, PARTS, run

HERE = Path(__file__).parents[1]


def main() -> None:
    """Print all comparisons, one of them, or the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=[*PARTS, "table"])
    parser.add_argument("--runs", type=int, default=MOST)
    parser.add_argument("--data", type=Path, default=HERE / "data")
    given = parser.parse_args()
    if given.part == "table":
        print(markdown(json.loads((HERE / "results.json").read_text())["others"]))
        return
    found = PARTS[given.part](given.data, given.runs) if given.part else run(given.data, runs=given.runs)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
