"""The verb ``train``: trains LoRA layers of a local model on texts, and writes the adapter."""

from os import PathLike

from loralens.errors import OptionError
from loralens.exports import takes_options
from loralens.verbs.models.models import restore_settings
from loralens.verbs.runs.grid import GridResult, train_grid
from loralens.verbs.runs.grid_axes import Grid
from loralens.verbs.runs.run_file import reads_run_files
from loralens.verbs.runs.train_adapter import train_adapter
from loralens.verbs.runs.training_options import TrainingOptions, fill_in
from loralens.verbs.runs.training_result import TrainPlan, TrainResult


@reads_run_files
@takes_options
def train(
    run_file: str | PathLike[str] | None,
    *,
    options: TrainingOptions,
    demo: bool = False,
    like: str | PathLike[str] | None = None,
    grid: Grid = (),
    jobs: int | None = None,
) -> TrainResult | TrainPlan | GridResult:
    """Train LoRA layers on texts, and write the adapter.

    Texts are one JSON object per line with "text" and, for classification, "label"; or a table with columns of these
    names; or plain lines. For causal-lm an object may have "prompt" and "completion", or "messages" with roles and
    contents, which the chat template of the tokenizer puts together; also the records of ShareGPT and Alpaca. For dpo
    it has "prompt", "chosen" and "rejected".

    Options also have the names of PEFT and TRL: --target-modules, --lora-alpha, --learning-rate, --num-train-epochs …

    During the run its files are in OUT.unfinished: the log, the snapshots, and the state from which ``resume``
    continues. On one machine, a run that was killed and resumed ends with the same bytes.

    Every run writes its settings to run.toml: --like first --rank 16 -o second is the run first with another rank.

    With ``grid``, OUT is a folder of runs. Values are separated by commas, globs of one value by plus signs
    (--grid targets=all-linear,q_proj+v_proj), and 0..4 are the numbers from 0 to 4. Runs that are done are not
    repeated; runs.csv in OUT has a row for each, with every setting and result.

    On several GPUs: torchrun --nproc-per-node N -m loralens train …

    Parameters
    ----------
    run_file : path, optional
        A TOML file of options by their names, such as the run.toml that every run writes. What is given beside it
        counts more.
    options : TrainingOptions
        The options of one run, in groups.
    like : path, optional
        The folder of a run, whose settings are those of this run where no other is given.
    demo : bool
        Train on Reuters R8 with MiniLM; fills in every option that is not given. Its texts are in out/texts, where
        `make demo` of a clone writes them.
    grid : str, mapping, or sequence of these
        Train an adapter for every combination of values: --grid rank=1,8 --grid seed=0..4 (see below).

        In Python also ``{"rank": [1, 8], "seed": range(5)}``. Several mappings are several grids in one folder. The
        result is a `GridResult`.
    jobs : int, optional
        The number of runs of a grid at a time, each with a model in memory. [default: 1]

    Raises
    ------
    OptionError
        A value that makes no sense, a file that is not there, an output that is in the way; torch is not installed.
    FormatError
        A model or texts that cannot be read.
    MismatchError
        The task does not fit the model; ``resume`` with other options than the run has.
    DivergenceError
        The loss is no longer finite: its texts and the last good snapshot are named.

    Examples
    --------
    $ loralens train --demo -o first
    $ loralens train --model model --task causal-lm --data texts.txt -o first
    """
    del run_file, like  # `reads_run_files` has read them
    if grid:
        return train_grid(options, grid, jobs=jobs, demo=demo)
    if jobs is not None:
        raise OptionError("--jobs is the number of runs of a grid at a time", fix="leave it out, or give --grid")
    run = fill_in(options, demo=demo)
    run.check()
    # The settings of torch and transformers, and a model that was given as an object, belong to the caller.
    with restore_settings(run.model):
        return train_adapter(run)
