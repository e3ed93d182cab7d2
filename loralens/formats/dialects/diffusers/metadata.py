"""``lora_adapter_metadata``: the LoraConfig of every component of a diffusers file, as JSON in its header.

One flat object: ``{"unet.r": 8, "unet.lora_alpha": 16, "text_encoder.r": 4 …}``; without a component where a model, not
a pipeline, saved it. Where it is there, diffusers takes rank and α from it and from nowhere else.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from loralens.core.adapter import Finding
from loralens.core.scaling import Scaling
from loralens.errors import FormatError, place
from loralens.formats.dialects.peft.config import PeftConfig
from loralens.formats.files.container import check_printable
from loralens.formats.files.expressions import Allowance

KEY = "lora_adapter_metadata"
_FIX = "save the adapter again, or take this entry out of the header: diffusers then takes scale 1"


@final
@dataclass(frozen=True, slots=True)
class Configs:
    """The configuration of each component, by its name; empty where the header says nothing."""

    by_component: Mapping[str, PeftConfig]

    @classmethod
    def of(cls, metadata: Mapping[str, str] | None) -> "Configs":
        """What a header says.

        Raises
        ------
        FormatError
            It is no JSON object, or holds values that make no sense.
        """
        fields: dict[str, dict[str, Any]] = {}
        with place(KEY):
            for key, value in _object((metadata or {}).get(KEY)).items():
                check_printable(key)
                component, _, name = key.rpartition(".")
                fields.setdefault(component, {})[name] = value
            allowance = Allowance()
            return cls({component: PeftConfig(said, allowance) for component, said in fields.items()})

    def component(self, name: str) -> str | None:
        """The component whose configuration covers a module; None where none does."""
        owner = name
        while self.by_component and owner:
            owner = owner.rpartition(".")[0]
            if owner in self.by_component:
                return owner
        return None

    def scaling(self, name: str) -> Scaling | None:
        """α, r and rule of a module; None where no configuration covers it."""
        component = self.component(name)
        if component is None:
            return None
        path = name.removeprefix(f"{component}.") if component else name
        scaling = self.by_component[component].scaling(path)
        return replace(scaling, origin=scaling.origin.replace("adapter_config.json", KEY))

    def is_dora(self, name: str) -> bool:
        """Whether the component of a module is DoRA."""
        component = self.component(name)
        return component is not None and bool(self.by_component[component].fields.get("use_dora"))

    def findings(self) -> list[Finding]:
        """What makes a component more, or other, than scale·B·A on the original base."""
        return [
            replace(finding, text=f"{component}: {finding.text}" if component else finding.text)
            for component, config in self.by_component.items()
            for finding in config.variants()
            if finding.code != "use-dora"  # told by the magnitudes themselves
        ]


def _object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError("is not valid JSON", fix=_FIX) from error
    if not isinstance(value, dict):
        raise FormatError("is not a JSON object", fix=_FIX)
    return value


def dumps(fields: Mapping[str, Mapping[str, Any]]) -> str:
    """Component → fields as diffusers writes them; but a pattern keeps its order, which PEFT goes by."""
    flat = {f"{part}.{name}" if part else name: value for part, said in fields.items() for name, value in said.items()}
    return json.dumps(dict(sorted(flat.items())), indent=2)
