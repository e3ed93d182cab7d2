"""The examples are scripts: what lies beside them is imported from their own folder."""

import sys
from pathlib import Path

EXAMPLES = str(Path(__file__).parents[2] / "examples")

if EXAMPLES not in sys.path:
    sys.path.insert(0, EXAMPLES)
