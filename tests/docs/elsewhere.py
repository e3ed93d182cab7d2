"""``python -m tests.docs.elsewhere FOLDER WORDS``: the command ``loralens WORDS``, with FOLDER as working directory."""

import os
import sys

from loralens.cli.main import main

if __name__ == "__main__":
    os.chdir(sys.argv[1])
    main(sys.argv[2:], prog_name="loralens")
