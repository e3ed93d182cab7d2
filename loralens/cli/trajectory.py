"""``loralens trajectory``: options in, the verb called, its result shown."""

from typing import Unpack

import click

from loralens.cli import options
from loralens.cli.show import Rows, show
from loralens.verbs.inputs.adapters import Reading
from loralens.verbs.trajectory import trajectory


@click.command("trajectory")
@click.argument("adapters", nargs=-1, required=True, metavar="RUN|ADAPTER...")
@options.MODULES
@options.rows(csv="checkpoint", plot="the run over its steps")
@options.reading
def command(adapters: tuple[str, ...], modules: tuple[str, ...], rows: Rows, **reading: Unpack[Reading]) -> None:
    """Follow one run through its checkpoints: how far ΔW went, where it turned, beside the loss.

    RUN is a folder with checkpoint-N folders in it (loralens train, transformers' Trainer) or
    NNNNNNN_adapters.safetensors files (mlx-lm); or give the adapters themselves. They are put in order of steps:
    global_step of the trainer_state.json beside them, else the number in the name. Where one says no step, nothing is
    concluded from their order. The losses are those of the trainer_state.json of the latest step,
    or of the log that loralens train keeps.
    """
    show(trajectory(*adapters, modules=modules, **reading), rows)
