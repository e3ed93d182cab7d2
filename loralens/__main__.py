"""The entry point of the command ``loralens`` and of ``python -m loralens``."""

import os


def start_commands() -> None:
    """Import the command line and run it; a Ctrl-C in the meantime ends the process with one word, not a traceback."""
    # The import takes longer than everything before it, and a short command.
    try:
        from loralens.cli.main import run
    except KeyboardInterrupt:
        os.write(2, b"interrupted\n")
        os._exit(130)  # 128 and the number of the signal, as shells count it; nothing has begun that needs a clean-up
    run()


if __name__ == "__main__":
    start_commands()
