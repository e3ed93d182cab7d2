"""The verb ``calibrate``: measures the second moments of real inputs in the modules of an adapter."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loralens.compression.calibration import label_loss, measure_moments, next_token_loss
from loralens.core.adapter import Adapter
from loralens.core.attached import Attachment
from loralens.core.lowrank import LowRank
from loralens.core.messages import progress, warn
from loralens.core.names import some
from loralens.core.stored import Moments
from loralens.errors import OptionError, place
from loralens.exports import takes_options
from loralens.formats.records.results import check_moments_target, save_moments
from loralens.tables.numbers import count
from loralens.tables.result import Tabular
from loralens.tables.table import Column, Keys, Table, label_column, plain, rows_key
from loralens.verbs.files.output import Target
from loralens.verbs.models.loaded import Loaded
from loralens.verbs.models.models import Running, load_model, model_label, restore_settings
from loralens.verbs.models.texts import InputText, read_texts, text_label
from loralens.verbs.models.tokens import Cut, count_cut
from loralens.verbs.shared.adapters import AdapterSource, labels, read_adapter
from loralens.verbs.shared.options import Reading


@dataclass(frozen=True, slots=True, repr=False)
class CalibrateResult(Tabular):
    """The second moments of real inputs in the modules of an adapter.

    Attributes
    ----------
    adapter, model, data : str
        Their labels: their paths, if they were read from files.
    texts : int
        The number of texts.
    cut : Cut
        The number of texts that were longer than ``length``, and of the tokens that were left out.
    hooked : sequence of str
        The modules that are measured.
    moments : Moments or None
        The moments, which `compress` and `curve` take as ``activations``; None in a dry run.
    output : Path or None
        The file that was written, or that would be.
    """

    adapter: str
    model: str
    data: str
    texts: int
    cut: Cut
    hooked: Sequence[str]
    moments: Moments | None = None
    output: Path | None = None

    def listing(self) -> list[Table[str]]:
        """The modules that were measured, or would be, one module per row."""
        columns: list[Column[str]] = [label_column("name", "module", str)]
        rows, moments = list(self.hooked), self.moments
        if moments is not None:
            rows = list(moments)
            columns += [
                Column("rank", lambda name: len(moments[name].K), "r", priority=7),
                Column("count", lambda name: moments[name].count, "positions", "{:,}".format, priority=8),
            ]
        return [Table(f"{self.adapter} on {self.texts} texts of {self.data}", columns, rows)]

    @property
    def positions(self) -> int:
        """The number of inputs of the modules that all inputs reached; 0 in a dry run."""
        # The largest count: modules that only some inputs reach have fewer.
        return max((moment.count for _, moment in self.moments.items()), default=0) if self.moments else 0

    def tables(self) -> list[Table[str]]:
        """The modules; those that saw all inputs are summed up in one sentence, so that the others stand out."""
        (table,) = self.listing()
        moments, positions = self.moments, self.positions
        if moments is None:
            return [replace(table, uneventful=bool, sum_up=lambda _: "")]

        def sum_up(modules: int) -> str:
            # Where every module saw all inputs, the conclusion has said so.
            every = modules == len(moments)
            return "" if every else f"{count(modules, 'module')} saw all {positions:,} positions"

        return [replace(table, uneventful=lambda name: moments[name].count == positions, sum_up=sum_up)]

    def conclusion(self) -> list[str]:
        """How much was measured, and where the moments were written."""
        texts = count(self.texts, "text")
        if self.moments is None:
            what = f"the moments of {count(len(self.hooked), 'module')} on {texts}"
            return [f"Would write {self.output}: {what}." if self.output else f"Would measure {what}."]
        measured = f"the moments of {count(len(self.moments), 'module')} over {self.positions:,} positions of {texts}"
        return [f"Wrote {self.output}: {measured}." if self.output else f"Measured {measured}."]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            Column(
                "target",
                lambda result: None if result.moments is None or result.output is None else str(result.output),
                type=str | None,
            ),
            Column("texts", lambda result: result.texts if result.moments is None else ..., type=int, may_lack=True),
            *(_measured(key, kind) for key, kind in (("fingerprint", str), ("source", dict[str, Any]))),
            "cut",
            rows_key(
                "modules",
                (
                    Column("name", type=str),
                    Column("rank", type=int, may_lack=True),
                    Column("count", type=int, may_lack=True),
                ),
                source=lambda result: result.listing()[0],
            ),
            *(_measured(key, kind) for key, kind in (("unreached", list[str]), ("unmeasured", dict[str, str]))),
        )


def _measured(key: str, kind: Any) -> Column[CalibrateResult]:
    """What the moments say, which a dry run has not measured."""
    return Column(
        key,
        lambda result: ... if result.moments is None else plain(getattr(result.moments, key)),
        type=kind,
        may_lack=True,
    )


@takes_options
def calibrate(
    adapter: AdapterSource,
    *,
    target: Target,
    running: Running,
    out_side: bool = False,
    reading: Reading,
) -> CalibrateResult:
    """Measure the second moments of real inputs in every module of an adapter.

    For each module this is the r × r matrix K = E[z zᵀ], z = A x. The model runs with the adapter switched on, so x are
    the inputs that its modules will see. `loralens.compress` takes the file as --activations, and keeps the directions
    that matter on such inputs. A few hundred texts like those of later use are enough. The same call on the same
    machine gives the same bytes.

    Parameters
    ----------
    adapter : path, Adapter or model
        The adapter: a file, a folder, or a Hub id.
    output : path, optional
        The .safetensors file to write.
    target : Target
        The options ``output``, ``overwrite``, ``dry_run``.
    out_side : bool
        Also measure the gradients at the outputs of every module, which takes a loss and a backward pass.
    running : Running
        The options ``model``, ``data``, ``limit``, ``batch``, ``length``, ``device``, ``dtype``, ``threads``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        An unknown device or dtype; no such file; a target that exists; ``out_side`` for a model without a loss; torch
        is not installed.
    FormatError
        An adapter, a model or texts that cannot be read.
    MismatchError
        The adapter does not fit the model.

    Examples
    --------
    $ loralens calibrate --adapter adapter --model model --data texts.txt -o moments.safetensors
    """
    running.check()
    model, data = running.model, running.data
    # The target is checked before the texts are read and the model runs, which may take minutes.
    if target.output is not None:
        check_moments_target(target.output, overwrite=target.overwrite)
    examples = read_texts(data, limit=running.limit)
    (name,) = labels([adapter])
    base = None if isinstance(model, tuple) else model  # a loaded model has no path to read the base from
    adapter_in_full = read_adapter(adapter, reading, base=base, applies_all=True, label=name)
    # A model that was given as an object is set back, as its owner goes on using it.
    with restore_settings(model):
        loaded = load_model(model, device=running.device, dtype=running.dtype, threads=running.threads)
        cut = count_cut(loaded, [text.text for text in examples], length=running.length)
        cut.warn(text_label(data))  # before the work, so that the user can stop it
        loss = _objective(loaded, examples) if out_side else None
        hooked = _measured_modules(loaded, adapter_in_full, name, model_label(model))
        # Only a model that was loaded, also in a dry run, shows whether the adapter fits.
        # Without the folder of the data, so that the file has the same bytes wherever it is made.
        name_of_data = Path(text_label(data)).name
        source = {"texts": len(examples), "length": running.length, "dtype": running.dtype, "data": name_of_data}
        moments = None
        if not target.dry_run:
            moments = _measure(loaded, adapter_in_full, examples, loss, batch=running.batch, source=source)
    if moments is not None:
        if target.output is not None:
            save_moments(moments, target.output, overwrite=target.overwrite)
        _tell_unmeasured(moments)
    return CalibrateResult(
        name, model_label(model), text_label(data), len(examples), cut, hooked, moments, target.output
    )


def _measure(
    loaded: Loaded, adapter: Adapter, texts: Sequence[InputText], loss: Any, *, batch: int, source: dict[str, Any]
) -> Moments:
    """Run the model on the texts; with a loss, also backwards."""
    with progress("running the model", len(texts)) as step:
        batches: Any = loaded.batches(texts, batch=batch, length=source["length"], step=step)
        if loss is not None and loaded.head == "classifier":
            batches = _add_labels(loaded, texts, batches, batch)
        return measure_moments(
            loaded.model, batches, adapter=adapter, out_side=loss is not None, loss=loss, source=source
        )


def _measured_modules(loaded: Loaded, adapter: Adapter, name: str, model: str) -> Sequence[str]:
    """The modules that can be measured; warnings name the tensors that the model has no place for."""
    # PEFT's model carries the adapter itself, and applies all of it.
    if hasattr(loaded.model, "peft_config"):
        return [module_name for module_name, module in adapter.items() if isinstance(module, LowRank)]
    with place(model):
        attachment = Attachment(loaded.model, adapter)
    # Their effect on deeper inputs is missing in the moments, so the user should know.
    for key, why in attachment.left_out.items():
        warn(f"{name}: {key} is not applied ({why})")
    return attachment.hooked


def _objective(loaded: Loaded, texts: Sequence[InputText]) -> Any:
    """The loss that fits the head of the model.

    Raises
    ------
    OptionError
        The model has no such head, or texts for a classifier have no labels.
    """
    if loaded.head == "causal":
        return next_token_loss
    # One text without a label would leave its batch without a loss.
    if loaded.head == "classifier" and all(text.label is not None for text in texts):
        return label_loss
    # The loss of a masked language model would need masks, which are random.
    needs = 'texts with a "label" each' if loaded.head == "classifier" else "a causal language model or a classifier"
    raise OptionError(f"--out-side differentiates a loss, and for that needs {needs}", fix="leave out --out-side")


def _add_labels(
    loaded: Loaded, texts: Sequence[InputText], batches: Iterator[dict[str, Any]], size: int
) -> Iterator[dict[str, Any]]:
    """The batches with the numbers of their labels in the configuration of the model."""
    import torch

    config: Any = loaded.model.config
    names = {name: number for number, name in config.id2label.items()}
    # A file of texts may give labels by name or by number.
    numbers = names | {str(number): number for number in range(config.num_labels)}
    # Batches come in the order of the texts, so their labels are found by counting.
    for i, inputs in enumerate(batches):
        part = [str(text.label) for text in texts[i * size : (i + 1) * size]]
        unknown = [name for name in part if name not in numbers]
        if unknown:
            raise OptionError(f"the model knows no label {unknown[0]!r}", fix=f"use its own: {', '.join(names)}")
        yield {**inputs, "labels": torch.tensor([numbers[name] for name in part])}


def _tell_unmeasured(moments: Moments) -> None:
    """Warn of modules without moments."""
    unmeasured = [f"{key} ({why})" for key, why in moments.unmeasured.items()]
    for names, what in ((unmeasured, "cannot be measured"), (moments.unreached, "were reached by no input")):
        if names:
            warn(f"{len(names)} modules {what}: {some(names)}", "compress truncates these by their weights alone")
