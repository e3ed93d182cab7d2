"""The names under which modules of different adapters are compared."""

import re
from collections import Counter
from collections.abc import Iterable

from loralens.core.names import normal_form

# The name of a model around its blocks, which depends on the class that loaded it: ``distilbert.transformer.layer.0``
# and ``transformer.layer.0`` are one module. ``encoder``, ``decoder``, ``down_blocks`` and ``up_blocks`` say which
# block is meant, and stay. The name of a class is part of ``transformer_blocks``, which says which block is meant too.
_MODEL = re.compile(
    r"^(?:(?:base_model|model|module|roberta|xlm_roberta|camembert|bert|distilbert|deberta|electra|albert|mpnet"
    r"|transformer(?!_blocks)|gpt_neox|vit|language_model|text_model)_)+"
)


def module_keys(names: Iterable[str]) -> dict[str, str]:
    """Name of a module → its key: the normal form without the name of the model.

    If two modules of an adapter would have the same key, both keep the name of the model.
    """
    forms = {name: normal_form(name) for name in names}
    keys = {name: _MODEL.sub("", form) or form for name, form in forms.items()}
    for longer in (forms, {name: name for name in forms}):
        uses = Counter(keys.values())
        keys = {name: key if uses[key] == 1 else longer[name] for name, key in keys.items()}
    return keys
