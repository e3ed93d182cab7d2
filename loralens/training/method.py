"""The methods of LoRA training, as data: one row each in `METHODS`."""

from dataclasses import dataclass
from typing import final

from loralens.core.names import row_named
from loralens.core.scaling import Rule


@final
@dataclass(frozen=True, slots=True)
class TrainingMethod:
    """What sets one kind of LoRA training apart from another; everything else they share.

    Attributes
    ----------
    name, text, paper : str
        What it is called, what it does in one line, and where it comes from.
    rule : str
        How the scale follows from α and r.
    magnitude : bool
        A trained length for every output: W' = m · (W + ΔW)/‖W + ΔW‖, see `loralens.training.dora`.
    principal : bool
        The pair begins as the leading directions of W, see `loralens.training.pissa`.
    frozen : bool
        The factor that is drawn (A; of embeddings B) stays as it was drawn.
    ratio : float
        Learning rate of B over that of A.
    """

    name: str
    text: str
    paper: str
    rule: Rule = "alpha/r"
    magnitude: bool = False
    principal: bool = False
    frozen: bool = False
    ratio: float = 1.0


METHODS: tuple[TrainingMethod, ...] = (
    TrainingMethod("lora", "W + (α/r)·B·A", "Hu et al. 2021, arXiv:2106.09685"),
    TrainingMethod("rslora", "the scale is α/√r", "Kalajdzievski 2023, arXiv:2312.03732", rule="alpha/sqrt(r)"),
    TrainingMethod("lora+", "B learns 16 times as fast as A", "Hayou et al. 2024, arXiv:2402.12354", ratio=16.0),
    TrainingMethod(
        "dora", "the length of every output is trained apart", "Liu et al. 2024, arXiv:2402.09353", magnitude=True
    ),
    TrainingMethod(
        "pissa", "begins as the leading directions of W", "Meng et al. 2024, arXiv:2404.02948", principal=True
    ),
    TrainingMethod("frozen-a", "only B is trained", "Zhang et al. 2023, arXiv:2308.03303", frozen=True),
)


def training_method(name: str) -> TrainingMethod:
    """The row of that name.

    Raises
    ------
    OptionError
        There is none.
    """
    return row_named(name if isinstance(name, str) else repr(name), METHODS, "training method")
