"""``python -m tests.started COMMAND …`` starts a command: from a warm process, a command of Python is warm too."""

import subprocess
import sys

if __name__ == "__main__":
    sys.exit(subprocess.run(sys.argv[1:], check=False).returncode)
