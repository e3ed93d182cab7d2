"""``lora_adapter_metadata``: the LoraConfig of every component of a diffusers file, as JSON in its header.

It is one flat object: ``{"unet.r": 8, "unet.lora_alpha": 16, "text_encoder.r": 4 …}``. The names have no component if a
model and not a pipeline was saved. If the header has this object, diffusers takes rank and α only from it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from loralens.core.adapter import Finding
from loralens.core.lowrank import Scaling
from loralens.core.stored import parse_json
from loralens.errors import FormatError, place
from loralens.formats.dialects.peft.config import PeftConfig
from loralens.formats.files.expressions import Clock
from loralens.formats.files.json_text import check_printable

KEY = "lora_adapter_metadata"
_FIX = "save the adapter again, or take this entry out of the header: diffusers then takes scale 1"


@final
@dataclass(frozen=True, slots=True)
class Configs:
    """The configuration of each component by its name; empty if the header has none."""

    by_component: Mapping[str, PeftConfig]

    @classmethod
    def of(cls, metadata: Mapping[str, str] | None) -> "Configs":
        """Read the configurations in a header.

        Raises
        ------
        FormatError
            The entry is not a JSON object, or holds values that are not allowed.
        """
        fields: dict[str, dict[str, Any]] = {}
        with place(KEY):
            try:
                # Most files have no such entry.
                entry = parse_json((metadata or {}).get(KEY, "{}"))
            except ValueError as error:
                raise FormatError("is not valid JSON", fix=_FIX) from error
            if not isinstance(entry, dict):
                raise FormatError("is not a JSON object", fix=_FIX)
            for key, value in entry.items():
                check_printable(key)
                component, _, name = key.rpartition(".")
                fields.setdefault(component, {})[name] = value
            # All components share one time limit for their expressions, so that many of them cannot add up.
            clock = Clock()
            return cls({component: PeftConfig(said, clock) for component, said in fields.items()})

    def component(self, name: str) -> str | None:
        """The component whose configuration applies to a module; None if there is none."""
        # The longest prefix that is a component decides.
        owner = name
        while self.by_component and owner:
            owner = owner.rpartition(".")[0]
            if owner in self.by_component:
                return owner
        return None

    def scaling(self, name: str) -> Scaling | None:
        """α, r and formula of a module; None if no configuration applies to it."""
        component = self.component(name)
        if component is None:
            return None
        # PEFT's patterns are for the paths inside of the component's model.
        path = name.removeprefix(f"{component}.") if component else name
        scaling = self.by_component[component].scaling(path)
        return replace(scaling, origin=scaling.origin.replace("adapter_config.json", KEY))

    def is_dora(self, name: str) -> bool:
        """Whether the component of a module is DoRA."""
        component = self.component(name)
        return component is not None and bool(self.by_component[component].fields.get("use_dora"))

    def findings(self) -> list[Finding]:
        """Findings about settings that make the update of a component differ from scale·B·A on the original base."""
        return [
            replace(finding, text=f"{component}: {finding.text}" if component else finding.text)
            for component, config in self.by_component.items()
            for finding in config.variants()
            if finding.code != "use-dora"  # the reader finds DoRA by the magnitudes
        ]


def dump_configs(fields: Mapping[str, Mapping[str, Any]]) -> str:
    """The fields of all components as diffusers writes them, except that patterns keep their order.

    diffusers sorts the keys of patterns too, but PEFT takes the first key that matches.
    """
    flat = {f"{part}.{name}" if part else name: value for part, said in fields.items() for name, value in said.items()}
    return json.dumps(dict(sorted(flat.items())), indent=2)
