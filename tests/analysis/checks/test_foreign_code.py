"""Code that a configuration names is never imported, and doctor warns of it."""

import subprocess
import sys

import pytest

import loralens
from tests.analysis.checks.patients import diagnose
from tests.bases import edit_config
from tests.conftest import small_adapter


def codes(config):
    adapter = small_adapter()
    sick = loralens.Adapter(modules=adapter.modules, config=config, format="peft")
    return [one.evidence for one in diagnose({"it": sick}) if one.code == "foreign-code"]


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"auto_mapping": {"base_model_class": "M", "parent_library": "evil.code"}}, "auto_mapping.parent_library"),
        ({"auto_mapping": {"parent_library": "\x1b[2J"}}, "auto_mapping.parent_library"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "megatron_core"),
        ({"auto_map": {"AutoModel": "modeling.M"}}, "auto_map"),
        ({"trust_remote_code": True}, "trust_remote_code"),
    ],
)
def test_code_of_others_is_warned_of(config, field):
    (evidence,) = codes(config)
    assert evidence.startswith(f"{field} is ")
    assert "\x1b" not in evidence


@pytest.mark.parametrize(
    "config",
    [
        None,
        {"auto_mapping": None},
        {"auto_mapping": {"base_model_class": "BertModel", "parent_library": "transformers.models.bert.modeling_bert"}},
        {"megatron_config": {"a": 1}, "megatron_core": "megatron.core"},
        {"trust_remote_code": False},
    ],
)
def test_what_peft_itself_writes_is_well(config):
    assert not codes(config)


def test_no_command_imports_it(tmp_path):
    loralens.save(small_adapter(), tmp_path / "a")
    named = {
        "auto_mapping": {"base_model_class": "M", "parent_library": "evil_code"},
        "megatron_config": {"a": 1},
        "megatron_core": "evil_code",
        "auto_map": {"AutoModel": "evil_code.M"},
        "trust_remote_code": True,
    }
    edit_config(tmp_path / "a", **named)
    for folder in (tmp_path, tmp_path / "a"):
        (folder / "evil_code.py").write_text("open('ran', 'w').close()\nraise SystemExit(3)\n")
    verbs = [
        ["inspect", "a"],
        ["doctor", "a"],
        ["survey", ".", "--content"],
        ["compress", "a", "--rank", "1", "-o", "b"],
    ]
    script = (
        "import sys; sys.path[:0] = ['.', 'a']\n"
        "from click.testing import CliRunner\n"
        "from loralens.cli.main import main\n"
        f"outcomes = [CliRunner().invoke(main, words) for words in {verbs!r}]\n"
        "assert all(one.exit_code == 0 for one in outcomes), outcomes\n"
        "assert 'foreign-code' in outcomes[1].output\n"
        "assert not [name for name in sys.modules if 'evil' in name]\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("ran"))
