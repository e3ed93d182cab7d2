"""The dialect that a verb writes: the size of its files, and writing and reading them back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Self

from loralens.compression.quantise import quantise
from loralens.core.adapter import Adapter
from loralens.core.quantised import direction_bytes
from loralens.core.structured import Update
from loralens.errors import OptionError
from loralens.formats import load, save
from loralens.formats.dialects.sizes import file_size
from loralens.formats.dialects.table import GGUF, QUANTISED, WriterOptions
from loralens.formats.files.location import adapter_file
from loralens.formats.models.checkpoint import model_config
from loralens.verbs.inputs.adapters import AdapterSource
from loralens.verbs.inputs.choices import (
    FLOAT_TYPES,
    INTEGER_TYPES,
    TARGET_FORMATS,
    FloatType,
    IntegerType,
    TargetFormat,
    check_choice,
)
from loralens.verbs.outputs.target import Inputs, Target

PLAIN_BITS = 8  # of a number of loralens-q, unless others are asked for

Bits = int | Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """A dialect, the options of its writer, and for loralens-q the bits of its numbers.

    Attributes
    ----------
    options : WriterOptions
        Of the writer, but for ``bits``.
    base : path or None
        The base model, which reading GGUF needs.
    bits : int, mapping or None
        Of all numbers, or of each direction by module; None: not in few bits.
    """

    name: str
    options: WriterOptions
    base: str | PathLike[str] | None = None
    bits: Bits | None = None

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        *,
        to: TargetFormat | str | None = None,
        base: str | PathLike[str] | None = None,
        dtype: FloatType | IntegerType | str | None = None,
    ) -> Self:
        """The form for an adapter: its own dialect unless another is asked for.

        Raises
        ------
        OptionError
            A dialect or a dtype that is none; few bits in a dialect that has none; a dialect that is only read; a scale
            that is not known and has to be stated.
        """
        check_choice("to", to, TARGET_FORMATS)
        check_choice("dtype", dtype, (*FLOAT_TYPES, *INTEGER_TYPES))
        if dtype in INTEGER_TYPES and to not in (None, QUANTISED):
            raise OptionError(f"dtype {dtype} is written as {QUANTISED}, not as {to}", fix=f"give --to {QUANTISED}")
        name = QUANTISED if dtype in INTEGER_TYPES else to or adapter.format
        if name not in TARGET_FORMATS:
            raise OptionError(f"{name} is only read, not written", fix=f"give --to: {', '.join(TARGET_FORMATS)}")
        if name != adapter.format:
            check_known(adapter, name)
        bits = INTEGER_TYPES.get(dtype or "", PLAIN_BITS) if name == QUANTISED else None
        return cls(name, writer_options(name, base), base, bits)

    def with_bits(self, bits: Bits | None) -> Self:
        """The same dialect with other bits."""
        return replace(self, bits=bits)

    @property
    def one_rank(self) -> bool:
        """Whether its files have one rank for all modules."""
        return self.name == "mlx"

    @property
    def writer_options(self) -> WriterOptions:
        """What its writer is given."""
        return self.options if self.bits is None else {**self.options, "bits": self.bits}

    def check_target(self, target: Target, source: AdapterSource, *, other_inputs: Inputs | None = None) -> None:
        """Refuse, before any work, a target that overlaps the source, the base or other inputs, or is not writable."""
        target.check_source(source, base=self.base, other_inputs=other_inputs)
        target.check_format(self.name)

    def size(self, adapter: Adapter) -> int:
        """Bytes of the file of weights."""
        return file_size(adapter, self.name, **self.writer_options)

    def cost(self, module: Update) -> int:
        """Bytes of one direction of a module in as many bits everywhere."""
        assert isinstance(self.bits, int)
        return direction_bytes(module.shape, self.bits)

    def write(self, adapter: Adapter, target: Target) -> tuple[Adapter, int]:
        """Write ``adapter``; what is read back, and bytes of the file. Where nothing is written, what that would be."""
        output = target.written
        if output is None:
            return self.rehearse(adapter)
        save(adapter, output, format=self.name, overwrite=target.overwrite, **self.writer_options)
        back = load(output, format=self.name, allow_pickle=True, base=self.base, strict=False)
        return back, adapter_file(output).stat().st_size

    def rehearse(self, adapter: Adapter) -> tuple[Adapter, int]:
        """What `write` would give, without the disk."""
        if self.bits is None:
            return adapter, self.size(adapter)
        return quantise(adapter, bits=self.bits), self.size(adapter)


def check_known(adapter: Adapter, to: str) -> None:
    """Refuse to carry on what is not known: a strength that the target has to state, an order of rows."""
    if to != GGUF and any(finding.code == "rows-permuted" for finding in adapter.findings):
        raise OptionError(
            "rows of q and k are in llama.cpp's order, and the file does not say the head counts", fix="give --base DIR"
        )
    unknown = any(finding.code == "alpha-unknown" for finding in adapter.findings)
    if unknown and to != "loralib":
        raise OptionError(
            f"the file does not say its α, and {to} has to", fix="give --alpha or --scale, as the training code has it"
        )


def writer_options(name: str, base: str | PathLike[str] | None, arch: str | None = None) -> WriterOptions:
    """Options that only the writer of one dialect has."""
    if name not in (GGUF, "mlx"):
        return {}
    config = model_config(Path(base)) if base else None
    return {"arch": arch, "base_config": config} if name == GGUF else {"base_config": config}


def source_bytes(source: AdapterSource, adapter: Adapter, form: OutputFormat) -> int:
    """Bytes of the file that was read; of an adapter that was not, bytes of a file of its own dialect."""
    if not isinstance(source, Adapter):
        return adapter_file(Path(source)).stat().st_size
    if adapter.format not in TARGET_FORMATS:
        return form.with_bits(None).size(adapter)
    return OutputFormat(adapter.format, writer_options(adapter.format, form.base)).size(adapter)
