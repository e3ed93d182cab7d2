"""``python -m loralens``."""

from loralens.cli.main import run

if __name__ == "__main__":
    run()
