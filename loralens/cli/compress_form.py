"""The dialect that ``loralens compress`` writes: how large a file of it is, how it is written and read back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import target
from loralens.cli.convert import TARGETS

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.core.adapter import Adapter
    from loralens.core.structured import Update

FEW = "loralens-q"
BITS = {"int8": 8, "int4": 4}

Bits = int | Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Form:
    """A dialect, the options it has, and for loralens-q the bits of its numbers.

    Attributes
    ----------
    name : str
    options : mapping of str to object
    base : str or None
        The base model, which reading GGUF needs.
    bits : int, mapping or None
        None: not in few bits.
    """

    name: str
    options: Mapping[str, Any]
    base: str | None = None
    bits: Bits | None = None

    @classmethod
    def of(cls, adapter: "Adapter", *, to: str | None, base: str | None = None, dtype: str | None = None) -> "Form":
        """The form for an adapter: its own dialect unless another is asked for.

        Raises
        ------
        click.UsageError
            Few bits in a dialect that has none.
        OptionError
            A dialect that is only read; a scale that is not known and has to be said.
        """
        if dtype in BITS and to not in (None, FEW):
            raise click.UsageError(f"--dtype {dtype} is written as {FEW}, not as {to}")
        name = FEW if dtype in BITS else to or adapter.format
        if name not in TARGETS:
            from loralens.errors import OptionError

            raise OptionError(f"{name} is only read, not written", fix=f"give --to: {', '.join(TARGETS)}")
        if name != adapter.format:
            target.check_known(adapter, name)
        bits = BITS.get(dtype or "", 8) if name == FEW else None
        return cls(name, target.of_format(name, Path(base) if base else None), base, bits)

    def with_bits(self, bits: Bits | None) -> "Form":
        """The same dialect with other bits."""
        return replace(self, bits=bits)

    @property
    def one_rank(self) -> bool:
        """Whether its files have one rank for all modules."""
        return self.name == "mlx"

    @property
    def given(self) -> dict[str, Any]:
        """What its writer is given."""
        return {**self.options, **({} if self.bits is None else {"bits": self.bits})}

    def check(
        self, source: str, output: Path, *, overwrite: bool, others: Mapping[str, str | None] | None = None
    ) -> None:
        """Refuse a target that is not apart from source, base and others, or cannot be written, before any work."""
        target.refuse_source(source, output, base=self.base, others=others)
        target.check_writable(output, self.name, overwrite=overwrite)

    def size(self, adapter: "Adapter") -> int:
        """Bytes of the file of weights."""
        from loralens.formats.dialects.sizes import file_size

        return file_size(adapter, self.name, **self.given)

    def cost(self, module: "Update") -> int:
        """Bytes of one direction of a module in as many bits everywhere."""
        from loralens.core.quantised import direction_bytes

        assert isinstance(self.bits, int)
        return direction_bytes(module.shape, self.bits)

    def write(self, adapter: "Adapter", output: Path, *, overwrite: bool) -> "tuple[Adapter, int]":
        """Write ``adapter``; what is read back, and bytes of the file."""
        from loralens.formats import load, save
        from loralens.formats.files.location import adapter_file

        save(adapter, output, format=self.name, overwrite=overwrite, **self.given)
        back = load(output, format=self.name, allow_pickle=True, base=self.base, strict=False)
        return back, adapter_file(output).stat().st_size

    def rehearse(self, adapter: "Adapter") -> "tuple[Adapter, int]":
        """What `write` would find, without the disk."""
        if self.bits is None:
            return adapter, self.size(adapter)
        from loralens.compression.quantise import quantise

        return quantise(adapter, bits=self.bits)[0], self.size(adapter)
