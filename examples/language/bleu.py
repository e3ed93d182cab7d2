"""BLEU of sentences with several references each, by sacrebleu."""

import json
import logging
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from loralens.errors import OptionError

RESAMPLED = 1000  # draws of the bootstrap


def bleu(sentences: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """``bleu``; ``interval``: half of the 95 % interval of a bootstrap over the sentences; ``signature``.

    A sentence may have any number of references.
    """
    metric = new_metric()
    # sacrebleu takes the first references of all sentences, then the second ones …; an empty one is none.
    streams = [list(stream) for stream in zip_longest(*references, fillvalue="")]
    logging.getLogger("sacrebleu").setLevel(logging.ERROR)
    score = metric.corpus_score(list(sentences), streams, n_bootstrap=RESAMPLED)
    signature = str(metric.get_signature())
    told = json.loads(score.format(width=4, signature=signature, is_json=True))
    return {"bleu": score.score, "interval": float(told.get("confidence_var", 0.0)), "signature": signature}


def new_metric() -> Any:
    """BLEU as sacrebleu computes it by default.

    Raises
    ------
    OptionError
        sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise OptionError(f"BLEU needs sacrebleu ({error})", fix="pip install sacrebleu") from error
    return BLEU(force=True)  # the sentences of E2E NLG are tokens with spaces between them
