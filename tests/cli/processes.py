"""``loralens train`` by two processes that find each other as torchrun lets them, forked from one that imported all.

``python -m tests.cli.processes FOLDER`` takes FOLDER/cases.json, options by name, and leaves what each process said and
ended with in FOLDER/NAME.RANK.json.
"""

import json
import os
import socket
import sys
from pathlib import Path

import torch
import transformers
from click.testing import CliRunner

import loralens.training.fitting
import loralens.training.texts.tasks
from loralens.cli.main import main

_IMPORTED = (transformers.BertForSequenceClassification, loralens.training.fitting, loralens.training.texts.tasks)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def begun(rank: int, port: int, options: list[str], said: Path) -> int:
    """The number of a child that runs the command as one of two."""
    pid = os.fork()
    if pid:
        return pid
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()})
    try:
        torch.set_num_threads(1)
        result = CliRunner().invoke(main, ["train", *options])
        record = {"code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr}
        said.write_text(json.dumps(record), encoding="utf-8")
    finally:
        os._exit(0)


def run(folder: Path) -> None:
    for name, options in json.loads((folder / "cases.json").read_text(encoding="utf-8")).items():
        port = free_port()
        for child in [begun(rank, port, options, folder / f"{name}.{rank}.json") for rank in (0, 1)]:
            os.waitpid(child, 0)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
