"""Damaged undo files, certificates, moments, indices, recipes and run folders: an answer, or a LoraLensError."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import loralens
from loralens import LoraLensError, Moments, load_moments, save_moments
from loralens.core import Moment
from loralens.formats.models.model_files import weight_files
from loralens.formats.records.results import read_recipe
from loralens.formats.records.training import read_run
from tests.bases import sharded, tensors
from tests.cli.command import Command
from tests.conftest import small_adapter
from tests.formats.blobs import HARMFUL, damaged, limits
from tests.marks import examples

pytestmark = pytest.mark.slow

fuzz = examples(40, suppress_health_check=[HealthCheck.too_slow])
ODD = [None, True, False, 0, -1, 1.5, 2**63, 10**400, 1e308, -1e999, "", "x", "\x1b[2J", "../x", "/x", "f4", [], {}]
ODD += [[None], {"a": {}}, [1, 2], [-1, 2], [2**40, 2**40], "int64", "object", "V8", "<f4,<f4", "9" * 5000]
odd = st.sampled_from(ODD) | st.floats(allow_nan=False) | st.integers(-5, 5)


def places(value, path=()):
    """Where something stands in JSON: every path of keys and numbers."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


def put(value, path, new):
    """A copy with something else at a path; taken out where ``new`` is ``...``."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and new is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = put(copy[path[0]], path[1:], new)
    return copy


@st.composite
def confused(draw, good):
    """JSON in which one to three values are others, or gone."""
    value = good
    for _ in range(draw(st.integers(1, 3))):
        known = list(places(value))
        value = put(value, draw(st.sampled_from(known[1:] or known)), draw(odd | st.just(...)))
        if not isinstance(value, dict) or not value:
            break
    return value


def check(work, *words):
    """Nothing but a LoraLensError that harms no terminal comes out of work, within time and memory."""
    try:
        with limits(20, 64 << 20):
            work(*words)
    except LoraLensError as error:
        assert not HARMFUL.search(str(error).replace("\n", ""))  # noqa: PT017


class Made:
    """A merge, its undo file taken apart, made once."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp())
        loralens.save(small_adapter(), self.folder / "adapter")
        sharded(self.folder / "base", tensors(size=2.0))
        words = ["merge", self.folder / "adapter", "--base", self.folder / "base", "-o", self.folder / "out"]
        assert Command().run(*words).exit_code == 0
        self.undo = self.folder / "out" / "undo.loralens"
        self.bytes = self.undo.read_bytes()
        length = int.from_bytes(self.bytes[:8], "little")
        self.header = json.loads(self.bytes[8 : 8 + length])
        self.data = self.bytes[8 + length :]
        self.content = json.loads(self.header["__metadata__"]["loralens_undo"])

    def packed(self, content, header=None):
        header = {**(header or self.header), "__metadata__": {"loralens_undo": json.dumps(content)}}
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + self.data

    def unmerge(self, undo):
        """Whether the command takes this undo file; the base is there afterwards, or nothing and one message."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            file, back = Path(name) / "undo.loralens", Path(name) / "back"
            file.write_bytes(undo)
            words = ["unmerge", self.folder / "out", "--undo", file, "-o", back]
            with limits(20, 64 << 20):
                done = Command().run(*words)
            assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
            assert not HARMFUL.search(done.output)
            if done.exit_code:
                assert done.output.count("error:") == 1, done.output
                assert not back.exists()
            else:
                for path in (self.folder / "base").glob("*.safetensors"):
                    assert (back / path.name).read_bytes() == path.read_bytes()
            return not done.exit_code


MADE = Made()


def test_the_undamaged_undo_file_unmerges():
    assert MADE.unmerge(MADE.bytes)
    assert MADE.unmerge(MADE.packed(MADE.content))


@fuzz
@given(data=st.data())
def test_a_damaged_undo_file(data):
    MADE.unmerge(data.draw(damaged(MADE.bytes)))


@settings(fuzz, max_examples=25)
@given(data=st.data())
def test_an_undo_file_that_says_something_else(data):
    MADE.unmerge(MADE.packed(data.draw(confused(MADE.content))))


MOMENTS = {f"layers.{i}.q": Moment(np.eye(2), 5, np.eye(2), trace=4.0) for i in range(2)}


def moments_file():
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "m.safetensors"
        save_moments(Moments(modules=MOMENTS, fingerprint="ab", unmeasured={"x": "y"}, source={"model": "m"}), file)
        return file.read_bytes()


GOOD_MOMENTS = moments_file()
LENGTH = int.from_bytes(GOOD_MOMENTS[:8], "little")
MOMENTS_HEADER = json.loads(GOOD_MOMENTS[8 : 8 + LENGTH])
MOMENTS_RECORD = json.loads(MOMENTS_HEADER["__metadata__"]["loralens.moments"])


def read_moments(data):
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "m.safetensors"
        file.write_bytes(data)
        moments = load_moments(file)
        for moment in (moment for _, moment in moments.items()):
            assert np.isfinite(moment.K).all()
            assert moment.trace is None or moment.trace >= 0
        assert repr(moments.source)


@fuzz
@given(damaged(GOOD_MOMENTS))
def test_damaged_moments(data):
    check(read_moments, data)


@settings(fuzz, max_examples=25)
@given(confused(MOMENTS_RECORD))
@example(MOMENTS_RECORD | {"traces": {"layers.0.q": "", "layers.1.q": 4.0}})
@example(MOMENTS_RECORD | {"traces": {"layers.0.q": -1e999, "layers.1.q": 4.0}})
def test_moments_that_say_something_else(record):
    header = {**MOMENTS_HEADER, "__metadata__": {"loralens.moments": json.dumps(record)}}
    text = json.dumps(header).encode()
    check(read_moments, len(text).to_bytes(8, "little") + text + GOOD_MOMENTS[8 + LENGTH :])


INDEX = json.loads((MADE.folder / "base" / "model.safetensors.index.json").read_text())


def read_base(text, changed="model.safetensors.index.json"):
    with tempfile.TemporaryDirectory(dir=MADE.folder) as name:
        for file in (MADE.folder / "base").iterdir():
            (Path(name) / file.name).symlink_to(file)
        file = Path(name) / changed
        file.unlink()
        file.write_bytes(text)
        weight_files(Path(name))
        words = ["merge", MADE.folder / "adapter", "--base", name, "-o", f"{name}/../merged", "--overwrite"]
        done = Command().run(*words)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info


@settings(fuzz, max_examples=25)
@given(confused(INDEX))
def test_an_index_that_says_something_else(content):
    check(read_base, json.dumps(content).encode())


CONFIG = {
    "model_type": "bert", "architectures": ["BertForMaskedLM"], "tie_word_embeddings": True, "num_attention_heads": 2,
    "text_config": {"model_type": "llama", "num_hidden_layers": 2}, "quantization_config": {"quant_method": "gptq"},
}  # fmt: skip


@settings(fuzz, max_examples=25)
@given(confused(CONFIG))
def test_a_configuration_of_the_base_that_says_something_else(content):
    check(read_base, json.dumps(content).encode(), "config.json")


MARK = "\ufeff".encode()  # of UTF-8, as editors of Windows put it before a text


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_a_mark_before_a_text_of_the_base(name, tmp_path):
    """Such a file is read, so that what is merged with it is unmerged with it."""
    base, out = sharded(tmp_path / "base", tensors(size=2.0)), tmp_path / "out"
    (base / name).write_bytes(MARK + (base / name).read_bytes())
    untied = tmp_path / "untied"  # a merge that changes config.json too
    for words in (
        ["merge", MADE.folder / "adapter", "--base", base, "-o", out],
        ["unmerge", out, "-o", tmp_path / "back"],
        ["merge", MADE.folder / "adapter", "--base", base, "--dtype", "f32", "-o", untied],
        ["unmerge", untied, "-o", tmp_path / "again"],
    ):
        done = Command().run(*words)
        assert done.exit_code == 0, done.output
    for back in ("back", "again"):
        assert {path.name: path.read_bytes() for path in (tmp_path / back).iterdir()} == {
            path.name: path.read_bytes() for path in base.iterdir()
        }


RECIPE = """method = "ties"
options = { density = 0.2 }
space = "union"
seed = 3
modules = ["q_proj"]
truncate = { rank = 2 }
[[adapters]]
path = "ADAPTER"
weight = 0.7
modules = { "*v_proj" = 0.3 }
[[adapters]]
path = "ADAPTER"
"""


def combine(text):
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "r.toml"
        file.write_bytes(text)
        done = Command().run("combine", "--recipe", file, "-o", f"{name}/out", "--dry-run")
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
        read_recipe(file)


@fuzz
@given(damaged(RECIPE.replace("ADAPTER", str(MADE.folder / "adapter")).encode()))
def test_a_damaged_recipe(text):
    check(combine, text)


@pytest.mark.parametrize(
    "text",
    ['{"q_proj": ' + "9" * 400 + "}", '{"q_proj": ' + "9" * 5000 + "}", "[" * 100_000, '{"q_proj": NaN}', "[1]", "\xff",
     '{"q_proj": true}', '{"\x1b[2J": 2}', '{"q_proj": -1}', '{"q_proj": {}}'],
    ids=range(10),
)  # fmt: skip
def test_a_file_of_weights_that_says_something_else(text, tmp_path):
    file = tmp_path / "w.json"
    file.write_bytes(text.encode("latin-1"))
    words = ["compress", MADE.folder / "adapter", "--parameters", 0.5, "--weights", file, "-o", tmp_path / "out"]
    done = Command().run(*words)
    assert done.exit_code == 2, done.exception
    assert done.output.count("error:") == 1
    assert not HARMFUL.search(done.output)
    assert len(done.output) < 1000
    assert not (tmp_path / "out").exists()


STATE = {"global_step": 20, "log_history": [{"loss": 1.5, "step": 10}, {"eval_loss": 1.0, "step": 20}]}


def trajectory(text, name):
    with tempfile.TemporaryDirectory() as folder:
        for step in (10, 20):
            shutil.copytree(MADE.folder / "adapter", Path(folder) / f"checkpoint-{step}")
        (Path(folder) / name).write_bytes(text)
        read_run([Path(folder)])
        for words in (["trajectory", folder], ["trajectory", folder, "--json"]):
            done = Command().run(*words)
            assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info


@settings(fuzz, max_examples=12)
@given(confused(STATE), st.sampled_from(["checkpoint-20/trainer_state.json", "trainer_state.json", "log.jsonl"]))
def test_a_run_folder_that_says_something_else(state, name):
    check(trajectory, json.dumps(state).encode(), name)
