"""What every command prints with ``--json`` has the schema that ``loralens schema`` prints."""

import json
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator

import loralens
from loralens.verbs import VERBS
from loralens.verbs.pages.schema import ANSWERS
from tests.cli.command import Command, main
from tests.conftest import ROOT

NAMES = [*(verb for verb in VERBS if verb != "schema"), *(f"fleet {answer}" for answer in ANSWERS)]
# In the folder that docs/playground.py makes, one after the other.
COMMANDS = """
inspect chat --json
convert chat -o chat-kohya --to kohya --json
equal chat chat --json
spectrum chat --base base --json
similarity poems terse --phi --json
similarity chat --json
similarity chat poems terse --json
trajectory run --json
trajectory watch.jsonl --json
survey . --json
fleet index . --json
fleet empty --json
fleet stats --json
fleet rows "SELECT name, rank FROM adapters" --json
fleet near chat --json
fleet copies --json
fleet runs --json
fleet families --json
fleet bases --json
fleet explain --base base --json
amplify chat --base base --json
scale poems --by 20 -o loud
intruders loud --base base --no-cache --remove 0 -o quiet --json
doctor wide faint --json
compress wide -o wide-r16 --rank 16 --json
curve chat --json
calibrate --model base --adapter chat --data texts.txt -o stats.safetensors --json
combine chat:0.7 code:0.3 -o both --json
drop chat -m k_proj -o fewer --json
merge chat --base base -o merged --json
unmerge merged -o restored --json
verify merged --base base --adapter chat --json
prove chat --base base --data texts.txt --against merged --json
explain chat --base base --samples 0 --json
verify merged --json
extract --base base --tuned merged -o back --rank 8 --json
behave chat poems --model base --data held.txt --json
report chat poems --base base --no-intruders -o both.html --json
report --fleet . --json
train --model base --task causal-lm --data texts.txt --targets q_proj,v_proj --rank 4 --steps 2 -o mine --json
train --model base --task causal-lm --data texts.txt --targets q_proj --steps 2 --grid rank=2,4 -o swept --json
evaluate chat poems --model base --task causal-lm --data held.txt --json
compress chat code -o small --rank 4 --json
convert chat code -o kohya --to kohya --json
scale chat code --by 0.5 -o softer --json
doctor chat wide -o findings --json
negate chat -o negated --json
scale chat --by 0.5 -o half --json
subtract chat code -o less --json
interpolate chat code --at 0.5 -o between --json
compress chat --rank 4 --dry-run --json
calibrate --model base --adapter chat --data texts.txt --dry-run --json
report --fleet . --json
"""


@pytest.mark.slow
def test_real_output_has_its_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, ROOT / "docs/playground.py", tmp_path / "here"], check=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen, broken = set(), []
    for line in COMMANDS.strip().splitlines():
        words = shlex.split(line)
        done = CliRunner().invoke(main, words, prog_name="loralens")
        # This adapter is too weak to be explained, which is an answer too.
        assert done.exit_code == (3 if words[0] == "explain" else 0), f"{line}: {done.output}"
        if "--json" not in words:
            continue
        name = " ".join(words[: 1 + (words[0] == "fleet")])
        seen.add(name)
        for error in Draft202012Validator(loralens.schema(name)).iter_errors(json.loads(done.stdout)):
            deepest = min(error.context or [error], key=lambda each: -len(each.path))
            broken.append(f"{line}: {deepest.json_path}: {deepest.message[:150]}")
    assert not broken, "\n".join(broken)
    assert seen == set(NAMES) - {"served"}  # tests/serving has servers


@pytest.mark.parametrize(
    "name", [*(verb for verb in VERBS if verb != "schema"), *(f"fleet {each}" for each in ANSWERS)]
)
def test_every_schema_is_one_and_says_what_the_values_are(name: str) -> None:
    schema = loralens.schema(name)
    Draft202012Validator.check_schema(schema)
    for each in schema.get("anyOf", [schema]):
        assert next(iter(each["properties"])) == "loralens"
        assert {} not in each["properties"].values(), "a key whose type is not declared"


def test_a_result_is_a_line_a_sequence_and_can_be_pickled(small: Path) -> None:
    result = loralens.compress(small, rank=1)
    again = pickle.loads(pickle.dumps(result))
    assert again.record() == result.record()
    assert repr(again) == f"CompressResult({' '.join(result.conclusion())})"
    spectrum = loralens.spectrum(small)
    assert list(spectrum) == list(spectrum.only)
    assert len(spectrum) == len(spectrum.only)


def test_a_command_that_prints_no_json_is_refused() -> None:
    done = Command().run("schema", "demo")
    assert done.exit_code == 2
    assert (
        Command().run("schema", "fleet", "near").output
        == json.dumps(loralens.schema("fleet near"), indent=1, ensure_ascii=False) + "\n"
    )
