"""The command ``loralens trajectory``: declares its options, calls the verb and shows the result."""

from typing import Any

import click

import loralens
from loralens.cli import options
from loralens.cli.show import RowOptions, row_options, show


@click.command("trajectory")
@click.argument("adapters", nargs=-1, required=True, metavar="RUN|LOG|ADAPTER...")
@options.modules
@row_options(csv="checkpoint", plot="the run over its steps")
@options.reading
def command(adapters: tuple[str, ...], rows: RowOptions, **keywords: Any) -> None:
    """Follow one run through its checkpoints: how far ΔW has moved, where it turned, and the loss.

    RUN is a folder with checkpoint-N folders (loralens train, the Trainer of transformers) or with
    NNNNNNN_adapters.safetensors files (mlx-lm); the adapters can also be named one by one. They are ordered by step:
    the global_step in the trainer_state.json beside them, else the number in the name. If one of them states no step,
    nothing is concluded from their order. Losses are read from the trainer_state.json of the latest step, or from the
    log of loralens train.

    LOG is the .jsonl file that a Watcher or a callback of loralens.watching wrote while another program trained; it
    needs no checkpoints.
    """
    show(loralens.trajectory(*adapters, **keywords), rows)
