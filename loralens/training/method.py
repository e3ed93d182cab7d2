"""The methods of LoRA training, as data: one row each in `METHODS`."""

from dataclasses import dataclass
from typing import final

from loralens.choices import MethodName
from loralens.core.names import row_named
from loralens.core.scaling import ScaleFormula


@final
@dataclass(frozen=True, slots=True)
class TrainingMethod:
    """What distinguishes one method of LoRA training from the others.

    Attributes
    ----------
    name, text, paper : str
        The name of the method, what it does in one line, and the paper that describes it.
    formula : str
        How the scale follows from α and r.
    magnitude : bool
        Whether every output has a trained length: W' = m · (W + ΔW)/‖W + ΔW‖, see `loralens.training.layers.dora`.
    principal : bool
        Whether the pair starts as the leading singular directions of W, see `loralens.training.layers.pissa`.
    frozen : bool
        Whether the factor that is drawn at random (A; for embeddings B) is not trained.
    ratio : float
        The learning rate of B divided by that of A.
    """

    name: MethodName
    text: str
    paper: str
    formula: ScaleFormula = "alpha/r"
    magnitude: bool = False
    principal: bool = False
    frozen: bool = False
    ratio: float = 1.0


METHODS: tuple[TrainingMethod, ...] = (
    TrainingMethod("lora", "W + (α/r)·B·A", "Hu et al. 2021, arXiv:2106.09685"),
    TrainingMethod("rslora", "the scale is α/√r", "Kalajdzievski 2023, arXiv:2312.03732", formula="alpha/sqrt(r)"),
    # 2⁴ is the ratio that the paper suggests as a default.
    TrainingMethod("lora+", "B learns 16 times as fast as A", "Hayou et al. 2024, arXiv:2402.12354", ratio=16.0),
    TrainingMethod(
        "dora", "the length of every output is trained separately", "Liu et al. 2024, arXiv:2402.09353", magnitude=True
    ),
    TrainingMethod(
        "pissa",
        "the pair starts as the leading singular directions of W",
        "Meng et al. 2024, arXiv:2404.02948",
        principal=True,
    ),
    TrainingMethod("frozen-a", "only B is trained", "Zhang et al. 2023, arXiv:2308.03303", frozen=True),
)


def training_method(name: str) -> TrainingMethod:
    """The row of a name.

    Raises
    ------
    OptionError
        There is no such method.
    """
    # Python may pass anything; the error message quotes it.
    return row_named(name if isinstance(name, str) else repr(name), METHODS, "training method")
