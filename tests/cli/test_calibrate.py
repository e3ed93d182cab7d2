"""``loralens calibrate``: what it writes, says and refuses."""

from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens import load_moments
from loralens.compression import measure_moments
from tests import models
from tests.cli.command import Command
from tests.tolerances import MOMENTS_32

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("quiet_torch")


CALL = Command("calibrate", "--threads", "1")
run, good, refused = CALL.run, CALL.good, CALL.refused


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, quiet_torch: None) -> Path:
    """A causal language model, an encoder, a classifier, adapters for them, and texts."""
    home = tmp_path_factory.mktemp("home")
    made = {
        "llama": models.llama(),
        "bert": models.bert(),
        "classifier": models.bert("BertForSequenceClassification", num_labels=2, id2label={0: "cat", 1: "dog"}),
    }
    for name, model in made.items():
        models.folder(model, home / name)
        models.saved(models.adapter(model, ("q_proj", "down_proj", "query")), home / f"{name}-adapter")
    models.jsonl(home / "texts.jsonl", label=["cat", "dog", 1, "cat"])
    (home / "texts.txt").write_text("\n".join(models.TEXTS), encoding="utf-8")
    return home


def arguments(home: Path, name: str, target: Path, *more: object) -> list[object]:
    files = ["--model", home / name, "--adapter", home / f"{name}-adapter", "--data", home / "texts.jsonl"]
    return [*files, "-o", target, *more]


@pytest.mark.parametrize(("name", "count"), [("llama", 4), ("bert", 2)])
def test_the_file_holds_the_moments(name: str, count: int, home: Path, tmp_path: Path) -> None:
    target = tmp_path / "stats.safetensors"
    result = run(*arguments(home, name, target))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"Wrote {target}: the moments of {count} modules over 25 positions of 4 texts.\n"
    moments, adapter = load_moments(target), loralens.load(home / f"{name}-adapter")
    moments.check(adapter)
    assert dict(moments.source) == {
        "batches": 1, "texts": 4, "length": 256, "dtype": "f32", "data": "texts.jsonl"
    }  # fmt: skip
    inputs = dict(models.tokenizer()(list(models.TEXTS), padding=True, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    model = models.llama() if name == "llama" else models.bert()
    expected = measure_moments(model, [inputs], adapter=adapter)
    for name, moment in moments.items():
        assert moment.count == expected[name].count == 25
        np.testing.assert_allclose(moment.K, expected[name].K, rtol=MOMENTS_32, atol=MOMENTS_32)


def test_batches_make_no_difference_and_two_runs_none_at_all(home: Path, tmp_path: Path) -> None:
    whole, again, small = (tmp_path / f"{name}.safetensors" for name in ("whole", "again", "small"))
    for target, more in ((whole, ()), (again, ()), (small, ("--batch", "1"))):
        good(*arguments(home, "llama", target, "--out-side", *more))
    assert whole.read_bytes() == again.read_bytes()
    one, other = load_moments(whole), load_moments(small)
    for name, moment in one.items():
        np.testing.assert_allclose(other[name].K, moment.K, rtol=1e-4, atol=1e-5)
        assert moment.G is not None
        assert moment.G.any()
        np.testing.assert_allclose(other[name].G, moment.G, rtol=1e-3, atol=1e-4 * np.abs(moment.G).max())


def test_a_classifier_with_labels(home: Path, tmp_path: Path) -> None:
    target = tmp_path / "stats.safetensors"
    good(*arguments(home, "classifier", target, "--out-side"))
    assert all(moment.G is not None and moment.G.any() for _, moment in load_moments(target).items())
    odd = models.jsonl(tmp_path / "odd.jsonl", label=["cat", "cow", 1, "cat"])
    args = arguments(home, "classifier", tmp_path / "odd.safetensors", "--out-side")
    args[args.index("--data") + 1] = odd
    said = refused(*args)
    assert "knows no label 'cow'" in said
    assert "cat, dog" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "nowhere"}, "nowhere: "),
        ({"--adapter": "bert-adapter"}, "query"),
        ({"-o": "stats.bin"}, ".safetensors"),
        ({"--device": "nonsense"}, "--device nonsense"),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_message(home: Path, changes: dict[str, str], message: str) -> None:
    args = arguments(home, "llama", home / "never.safetensors", "--device", "cpu")
    for option, value in changes.items():
        args[args.index(option) + 1] = value if option == "--device" else home / value
    said = refused(*args)
    assert message in said
    assert "\n  fix: " in said
    assert not (home / "never.safetensors").exists()


def test_an_existing_target_is_left_alone(home: Path, tmp_path: Path) -> None:
    target = tmp_path / "stats.safetensors"
    target.write_bytes(b"mine")
    result = run(*arguments(home, "llama", target))
    assert (result.exit_code, target.read_bytes()) == (2, b"mine")
    result = run(*arguments(home, "llama", target, "--overwrite"))
    assert (result.exit_code, target.read_bytes()) == (2, b"mine")  # no moments: nothing that this command made
    assert "holds no moments" in result.stderr
    target.unlink()
    good(*arguments(home, "llama", target))
    good(*arguments(home, "llama", target, "--overwrite"))


def test_an_encoder_has_no_loss(home: Path, tmp_path: Path) -> None:
    assert "needs a causal language model or a classifier" in refused(
        *arguments(home, "bert", tmp_path / "stats.safetensors", "--out-side")
    )
