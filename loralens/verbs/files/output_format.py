"""The dialect that a verb writes, with the size of its files, and with writing and reading them back."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

from loralens.analysis.diagnosis import Examination, Saving
from loralens.choices import FLOAT_TYPES, TARGET_FORMATS, FloatType, TargetFormat
from loralens.compression.plan import TruncationPlan
from loralens.core.adapter import Adapter
from loralens.core.ranks import Rule
from loralens.errors import LoraLensError, OptionError
from loralens.formats import encode_adapter, load, save, stored_size
from loralens.formats.dialects.table import GGUF
from loralens.formats.files.container import Files, Stored
from loralens.formats.files.location import find_adapter
from loralens.verbs.files.target import Inputs, Target
from loralens.verbs.shared.adapters import AdapterSource
from loralens.verbs.shared.option_values import check_choice


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """A dialect, and the options of its writer.

    Attributes
    ----------
    arch, base_config
        What the writers of GGUF and mlx are told about the base model.
    base : path or None
        The base model, which is needed to read GGUF back.
    """

    name: str
    base: str | PathLike[str] | None = None
    arch: str | None = None
    base_config: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        *,
        to: TargetFormat | str | None = None,
        base: str | PathLike[str] | None = None,
        dtype: FloatType | str | None = None,
    ) -> Self:
        """The form in which an adapter is written: in its own dialect unless another is asked for.

        Raises
        ------
        OptionError
            The dialect or the dtype is unknown, the dialect is only read, or it has to state a scale that the adapter's
            file does not give.
        """
        check_choice("to", to, TARGET_FORMATS)
        check_choice("dtype", dtype, FLOAT_TYPES)
        name = to or adapter.format
        if name not in TARGET_FORMATS:
            raise OptionError(f"{name} is only read, not written", fix=f"give --to: {', '.join(TARGET_FORMATS)}")
        # Within one dialect, what the file leaves open may stay open.
        if name != adapter.format:
            check_known(adapter, name)
        return cls.with_base(name, base)

    @classmethod
    def with_base(cls, name: str, base: str | PathLike[str] | None, arch: str | None = None) -> Self:
        """A dialect and the options that its writer takes from the base model.

        The configuration of the base gives GGUF the architecture and the numbers of heads, and mlx the experts' names.
        """
        # The other writers take everything from the adapter.
        if base is None or name not in (GGUF, "mlx"):
            return cls(name, base, arch if name == GGUF else None)
        from loralens.formats.models.checkpoint import model_config  # most adapters are written without a base

        return cls(name, base, arch if name == GGUF else None, model_config(Path(base)))

    @property
    def one_rank(self) -> bool:
        """Whether all modules of a file have the same rank."""
        # mlx-lm reads one ``rank`` for all layers from adapter_config.json.
        return self.name == "mlx"

    def check_target(self, target: Target, source: AdapterSource, *, other_inputs: Inputs | None = None) -> None:
        """Refuse, before any work, a target that overlaps with an input or that the dialect cannot be written to."""
        target.check_source(source, base=self.base, other_inputs=other_inputs)
        target.check_format(self.name)

    def encode(self, adapter: Adapter) -> tuple[Stored, Files]:
        """The tensors and header of the file, and the names of the files that belong to the dialect."""
        return encode_adapter(adapter, self.name, arch=self.arch, base_config=self.base_config)

    def size(self, adapter: Adapter) -> int:
        """The size of the file of weights in bytes, from its header alone."""
        return stored_size(*self.encode(adapter))

    def write(self, adapter: Adapter, target: Target) -> tuple[Adapter, int]:
        """Write an adapter, and return the adapter that is read back and the size of its file of weights in bytes.

        If nothing is to be written, the adapter itself is returned: factors are read back as they are.
        """
        output = target.written
        if output is None:
            return adapter, self.size(adapter)
        save(
            adapter, output, format=self.name, overwrite=target.overwrite, arch=self.arch, base_config=self.base_config
        )
        # strict=False, since an adapter that was loaded so would be refused here, after it was written.
        found = find_adapter(output)
        return load(found, format=self.name, base=self.base, strict=False), found.file.stat().st_size


def check_known(adapter: Adapter, to: str) -> None:
    """Refuse to write an adapter in the dialect ``to`` if its file leaves the scale or the order of rows open.

    Raises
    ------
    OptionError
        The message says which option gives what is missing.
    """
    # GGUF itself stores q and k in this order, so there it need not be undone.
    if to != GGUF and any(finding.code == "rows-permuted" for finding in adapter.findings):
        raise OptionError(
            "the rows of q and k are in llama.cpp's order, and the file does not state the numbers of heads",
            fix="give --base DIR",
        )
    unknown = any(finding.code == "alpha-unknown" for finding in adapter.findings)
    # A loralib checkpoint stores no α at all: the training code has it.
    if unknown and to != "loralib":
        raise OptionError(
            f"the file does not state its α, which {to} needs", fix="give the --alpha or --scale of the training code"
        )


def source_bytes(source: AdapterSource, adapter: Adapter, form: OutputFormat) -> int:
    """The size in bytes of the file that was read. For an object, it is the size of a file of its own dialect."""
    if not isinstance(source, Adapter):
        return find_adapter(source).file.stat().st_size
    # A dialect without a writer has no size that could be computed, so that of the result stands in for it.
    if adapter.format not in TARGET_FORMATS:
        return form.size(adapter)
    return OutputFormat.with_base(adapter.format, form.base).size(adapter)


def file_saving(sources: Mapping[str, AdapterSource], base: str | PathLike[str] | None) -> Saving:
    """The function from an examined adapter to what `compress` to a share of the energy would save of its file.

    ``sources`` has every adapter by its label. The sizes are those of `OutputFormat.size`, as in `compress` itself.
    """

    def saving(exam: Examination, energy: float) -> float | None:
        # The command makes all modules smaller, and only those that were chosen are known.
        if len(exam.spectra) < len(exam.adapter):
            return None
        try:
            form = OutputFormat.of(exam.adapter, to=exam.to or None, base=base)
            plan = TruncationPlan.of_values(exam.adapter, {name: one.s for name, one in exam.spectra.items()})
            ranks = plan.ranks(Rule("energy", energy), one_rank=exam.needs_one_rank)
            before = source_bytes(sources[exam.path], exam.adapter, form)
            return max(0.0, 1 - form.size(plan.at(ranks)) / before)
        except LoraLensError:  # an adapter that its dialect cannot hold, such as GGUF's without a base
            return None

    return saving
