"""SARIF 2.1.0: the parts of the schema that hosts rely on, checked by hand."""

import json
import os
from pathlib import Path

from loralens.formats.records.results import sarif, write_sarif

FINDINGS = [
    {
        "level": "error",
        "code": "non-finite",
        "adapter": "a b/é.safetensors",
        "module": "m.0",
        "evidence": "NaN",
        "fix": "f",
    },
    {"level": "note", "code": "dora", "adapter": "/root/x/y", "module": None, "evidence": "text", "fix": ""},
    {
        "level": "warning",
        "code": "non-finite",
        "adapter": "/elsewhere/y",
        "module": "m.1",
        "evidence": "Inf",
        "fix": "",
    },
]
RULES = {"non-finite": "A tensor holds NaN.", "unused": "Never said."}


def made(**changes):
    return sarif(FINDINGS, **{"rules": RULES, "root": Path("/root"), **changes})


def check(log):
    """What sarif-schema-2.1.0.json requires of the parts that are used."""
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-2.1.0.json")
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    ids = [rule["id"] for rule in driver["rules"]]
    for result in run["results"]:
        assert result["level"] in ("none", "note", "warning", "error")
        assert ids[result["ruleIndex"]] == result["ruleId"]
        assert result["message"]["text"]
        (location,) = result["locations"]
        uri = location["physicalLocation"]["artifactLocation"]["uri"]
        assert uri.isascii()
        assert not set(uri) & set(' \\"<>')
        assert not uri.startswith("/")


def test_the_structure_is_that_of_the_schema():
    log = json.loads(made())
    check(log)
    run = log["runs"][0]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == ["dora", "non-finite"]
    assert [result["ruleIndex"] for result in run["results"]] == [1, 0, 1]
    assert run["tool"]["driver"]["rules"][1]["help"]["text"] == "A tensor holds NaN."
    assert [result["message"]["text"] for result in run["results"]] == ["m.0: NaN\nFix: f", "text", "m.1: Inf"]
    uris = [r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in run["results"]]
    assert uris == ["a%20b/%C3%A9.safetensors", "x/y", "../elsewhere/y"]
    assert "logicalLocations" not in run["results"][1]["locations"][0]


def test_a_name_that_is_no_unicode(tmp_path: Path) -> None:
    odd = os.fsdecode(b"a/\xff.safetensors")
    write_sarif(sarif([{**FINDINGS[0], "adapter": odd, "evidence": odd}], rules=RULES, root=tmp_path), tmp_path / "x")
    log = json.loads((tmp_path / "x").read_bytes())
    check(log)
    (result,) = log["runs"][0]["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "a/%FF.safetensors"
