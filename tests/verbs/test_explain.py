"""``explain``: the words that an adapter makes more likely, and what is said where there are none."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens import Adapter, LowRank, OptionError
from loralens.analysis.explanation import (
    Vocabulary,
    directions,
    merged_key,
    random_like,
    relative,
    write_scores,
    written_words,
)
from tests import models
from tests.cli.command import Command
from tests.terminal import on_screen

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quiet_torch")

NEUTRAL = models.NEUTRAL
base = models.decided_llama
cat_adapter = models.one_word_adapter


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, quiet_torch: None) -> Path:
    home = tmp_path_factory.mktemp("home")
    models.folder(base(), home / "llama")
    models.folder(models.bert("BertForMaskedLM"), home / "bert")
    loralens.save(cat_adapter(), home / "cats")
    every = models.adapter(base(), ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"), seed=0)
    loralens.save(random_like(every, 5), home / "random")
    models.saved(models.adapter(models.bert("BertForMaskedLM"), ("query",), seed=0), home / "encoder")
    (home / "neutral.txt").write_text("\n".join(NEUTRAL), encoding="utf-8")
    return home


def explained(home: Path, adapter: Any = "cats", **options: Any) -> Any:
    source = home / adapter if isinstance(adapter, str) else adapter
    return loralens.explain(source, base=home / "llama", **{"data": NEUTRAL, "samples": 0, "threads": 1, **options})


def test_the_word_that_is_written_is_first_in_every_list_and_rose_in_every_text(home: Path) -> None:
    result = explained(home, samples=2)
    assert result.verdict == "explained"
    assert not result.general.weak
    assert result.more[0].text == result.writes[0].text == "cat"
    assert result.more[0].texts == len(NEUTRAL) == result.texts
    assert "cat" not in [word.text for word in result.less]
    assert len(result.samples) == 2


def test_the_change_is_the_mean_over_texts_of_log_p(home: Path) -> None:
    model, tokenizer, adapter = base(), models.tokenizer(), cat_adapter()
    W = model.get_submodule(models.LAST).weight

    def logs(text: str) -> Any:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        return model(input_ids=ids).logits[0, 1:].double().softmax(-1)

    with torch.no_grad():
        before = [logs(text) for text in NEUTRAL]
        W += torch.tensor(adapter[models.LAST].dense(), dtype=W.dtype)
        after = [logs(text) for text in NEUTRAL]
        pairs = list(zip(after, before, strict=True))
        changes = [((p + 1e-6).log() - (q + 1e-6).log()).mean(0) for p, q in pairs]
        kl = torch.cat([(p * (p / q).log()).sum(-1) for p, q in pairs]).mean()
    result = explained(home)
    expected = torch.stack(changes).mean(0)[tokenizer.convert_tokens_to_ids("cat")]
    assert result.more[0].change == pytest.approx(float(expected), rel=1e-3)
    assert result.general.kl == pytest.approx(float(kl), rel=1e-3)


def test_what_siblings_share_is_subtracted(home: Path) -> None:
    assert not explained(home, siblings=[cat_adapter()]).more
    # A sibling without an effect leaves everything.
    idle = Adapter(modules={models.LAST: LowRank(np.zeros((16, 1), np.float32), np.ones((1, 24), np.float32))})
    halved = explained(home, siblings=[cat_adapter(), idle])
    assert halved.more[0].change == pytest.approx(explained(home).more[0].change / 2, rel=1e-3)


def test_weights_alone_name_the_word_and_measure_no_strength(home: Path) -> None:
    result = loralens.explain(home / "cats", base=home / "llama", weights_only=True, threads=1)
    assert (result.writes[0].text, result.general, result.more) == ("cat", None, ())
    assert "one style" in result.notes[-1]


@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("modules", [1, 12])
def test_random_updates_write_no_words(rank: int, modules: int) -> None:
    rng = np.random.default_rng(rank + modules)
    vocabulary = Vocabulary([f"word{number}" for number in range(4000)])
    unit = directions(rng.standard_normal((4000, 96)).astype(np.float32), None)

    def scores() -> Any:
        pairs = [rng.standard_normal((2, 96, rank)).astype(np.float32) for _ in range(modules)]
        return relative(write_scores(unit, [LowRank(B, A.T) for B, A in pairs]), None)

    for _ in range(10):
        assert not written_words(vocabulary, scores(), [scores(), scores()])


@pytest.mark.parametrize("to", ["kohya", "mlx", "gguf"])
def test_every_dialect_gives_the_same_words(home: Path, tmp_path: Path, to: str) -> None:
    target = tmp_path / {"kohya": "a.safetensors", "mlx": "a", "gguf": "a.gguf"}[to]
    loralens.convert(home / "cats", output=target, to=to, base=home / "llama")
    converted, own = explained(home, loralens.load(target, base=home / "llama")), explained(home)
    assert [word.text for word in converted.more] == [word.text for word in own.more]
    assert converted.general.kl == pytest.approx(own.general.kl, rel=1e-4)


def test_a_base_in_four_bits_is_decoded_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    models.folder(base(models.wide_llama), tmp_path / "floats")
    small = models.adapter(base(models.wide_llama), ("v_proj", "down_proj"), scale=1e-4)
    loralens.merge(small, base=tmp_path / "floats", output=tmp_path / "nf4", bits="nf4")
    assert "quantization_config" in json.loads((tmp_path / "nf4/config.json").read_text())
    adapter = cat_adapter(models.wide_llama)
    options = {"data": NEUTRAL, "samples": 0, "threads": 1}
    coded, floats = (loralens.explain(adapter, base=tmp_path / name, **options) for name in ("nf4", "floats"))
    assert coded.more[0].text == floats.more[0].text == "cat"
    # The base was rounded, and so not the same.
    assert coded.general.kl == pytest.approx(floats.general.kl, rel=0.5)
    assert coded.general.kl != floats.general.kl
    losses = [
        loralens.evaluate(adapter, model=tmp_path / name, task="causal-lm", data=models.TEXTS, threads=1)
        .evaluations[0]
        .measures["loss"]
        for name in ("nf4", "floats")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]


def test_a_report_shows_what_was_learned(home: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    told = Command("report").good(
        home / "cats", home / "random", "--base", home / "llama", "--no-intruders", "-o", page, "--markdown"
    )
    assert "error" not in told.output
    result = loralens.report(home / "cats", home / "random", base=home / "llama", intruders=False)
    keys = [section.key for section in result.document.sections]
    assert keys.index("identity") < keys.index("learned") < keys.index("spectra")
    assert [one["explanation"]["verdict"] for one in result.record()["adapters"]] == ["explained", "too-weak"]
    text = page.with_suffix(".md").read_text(encoding="utf-8")
    own = explained(home, data=None)
    assert own.sentences()[0].split(":")[1].split(",")[0] in text
    assert "words-1.png" in text
    assert "words-2.png" not in text
    assert "too weak to explain" in text
    assert "Amplified" not in text


def test_a_report_names_the_command_where_the_base_is_not_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def learned(base: str = "llama", **options: Any) -> str:
        source = home / ("encoder" if base == "bert" else "cats")
        document = loralens.report(source, base=home / base, intruders=False, **options).document
        return " ".join(
            part.text for section in document.sections if section.key == "learned" for part in section.parts
        )

    assert not learned(explain=False)
    assert not learned("bert")  # predicts no tokens from what stands before them
    assert "a file of weights without a tokenizer" in learned("llama/model.safetensors")
    monkeypatch.setattr("loralens.verbs.pages.learned.PATIENCE", 1e-12)
    assert "running the base would take about 1 s (loralens explain" in learned()
    monkeypatch.setattr("loralens.verbs.pages.learned.find_spec", lambda name: None)
    assert "torch and transformers must be installed" in learned()
    with pytest.raises(OptionError, match="no base is given"):
        loralens.report(home / "cats", explain=True)


def test_a_fleet_names_its_families_by_the_words_that_set_them_apart(home: Path, tmp_path: Path) -> None:
    models.folder(base(models.wide_llama), tmp_path / "wide")
    for word in ("cat", "tree"):
        for strength in (1.0, 1.1):
            loralens.scale(
                cat_adapter(models.wide_llama, word), by=strength, output=tmp_path / "fleet" / f"{word}-{strength}"
            )
    models.saved(models.adapter(models.bert("BertForMaskedLM"), ("query",), seed=0), tmp_path / "fleet" / "encoder")
    fleet = loralens.Fleet(tmp_path / "fleet" / ".loralens-fleet")
    fleet.update(tmp_path / "fleet")
    for forward in (False, True):
        found = fleet.explain(tmp_path / "wide", forward=forward, threads=1)
        first = {family.words[0].text for family in found if family.number}
        assert first == {"cat", "tree"}
        assert {family.read for family in found} == {2}
        assert found.unfit == 1
    told = Command("fleet").good(
        "explain", "--base", tmp_path / "wide", "--fleet", tmp_path / "fleet", "--threads", "1"
    )
    assert "2 families fit" in told.stdout
    assert ": cat" in told.stdout
    few = fleet.explain(tmp_path / "wide", limit=1, threads=1)
    assert (len(few), few.further) == (1, 2)
    assert "nothing was subtracted" in few.sentences()[-1]


def test_a_fleet_that_does_not_fit_gets_an_answer_and_no_words(home: Path, tmp_path: Path) -> None:
    models.saved(models.adapter(models.bert("BertForMaskedLM"), ("query",), seed=0), tmp_path / "encoder")
    loralens.Fleet(tmp_path / ".loralens-fleet").update(tmp_path)
    done = Command("fleet").run("explain", "--base", home / "llama", "--fleet", tmp_path)
    assert done.exit_code == 3
    assert "fits" in done.output


def test_random_updates_are_too_weak_and_get_no_words(home: Path) -> None:
    command = Command("explain", "--threads", "1")
    done = command.run(home / "random", "--base", home / "llama", "--data", home / "neutral.txt")
    assert done.exit_code == 3
    assert "too weak to explain" in done.output
    assert "More likely" not in done.output


def test_suspected_words_are_tried_and_a_clean_list_proves_nothing(home: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("tree\n\ndog\ntree\n", encoding="utf-8")
    result = explained(home, words=tmp_path / "words.txt")
    assert sorted(suspect.word for suspect in result.suspects) == ["dog", "tree"]
    assert result.suspects[0].kl >= result.suspects[1].kl > 0
    assert result.plain > 0
    assert "proves nothing" in "".join(result.sentences())


def test_no_output_promises_safety_or_names_a_topic_a_data_set_or_a_probability(home: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("tree", encoding="utf-8")
    results = [
        explained(home, words=tmp_path / "words.txt", samples=1, siblings=[home / "random"]),
        explained(home, "random"),
        explained(home, weights_only=True, data=None),
        loralens.explain(home / "encoder", base=home / "bert", threads=1),
    ]
    told = "\n".join(line for result in results for line in (*result.paragraphs(), *result.notes))
    keys = {key for result in results for key in result.record()}
    assert not re.search(r"\bsafe|nothing else|probab|data ?set|no trigger|is about|topic is", told)
    assert not keys & {"topic", "probability", "safe", "data"}


@pytest.mark.slow
def test_a_terminal_shows_the_strength_before_the_words(home: Path) -> None:
    words = ("--data", home / "neutral.txt", "--samples", "0", "--threads", "1")
    code, screen = on_screen([str(word) for word in ("explain", home / "cats", "--base", home / "llama", *words)])
    assert code == 0
    assert screen.index("changes general") < screen.index("More likely") < screen.index("The weights write")


def test_an_encoder_gets_the_size_of_the_change_alone(home: Path) -> None:
    result = loralens.explain(home / "encoder", base=home / "bert", threads=1)
    assert (result.verdict, result.undecided, result.more) == ("no-vocabulary", True, ())
    assert result.hidden > 0
    assert "no head that predicts tokens" in " ".join(result.conclusion())


def test_the_command_prints_what_python_returns(home: Path) -> None:
    words = ("--base", home / "llama", "--data", home / "neutral.txt", "--samples", "0", "--threads", "1")
    told = json.loads(Command("explain").good(home / "cats", *words, "--json").stdout)
    result = loralens.explain(
        str(home / "cats"), base=str(home / "llama"), data=home / "neutral.txt", samples=0, threads=1
    )
    assert told == {"loralens": loralens.__version__, **json.loads(json.dumps(result.record()))}


def test_the_picture_shows_the_words(home: Path, tmp_path: Path) -> None:
    loralens.plot(explained(home)).savefig(tmp_path / "words.svg")
    assert (tmp_path / "words.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"siblings": ["cats"], "fleet": "."}, "exclude each other"),
        ({"weights_only": True, "data": NEUTRAL}, "needs the model to run"),
        ({"words": "empty.txt"}, "has no words"),
        ({"data": ["it"]}, "four tokens"),
    ],
)
def test_bad_input_gets_one_clear_message(home: Path, options: dict[str, Any], message: str) -> None:
    (home / "empty.txt").write_text("\n", encoding="utf-8")
    if "words" in options:
        options = {"words": home / options["words"]}
    with pytest.raises(OptionError, match=message):
        explained(home, **options)


def test_variants_of_case_and_space_are_one_word_and_symbols_are_told_apart() -> None:
    vocabulary = Vocabulary(["Cat", " cat", "", "dog", " .", "\n", "\ufffd", "x"])
    scores, shown = vocabulary.best(np.array([1, 3, 9, 2, 4, 5, 8, 0.5], np.float32))
    assert [word.text for word in vocabulary.rank(scores, shown, above=2.5)] == ["↵", ".", "cat"]
    words = vocabulary.rank(scores, shown)
    assert [(word.text, word.symbol) for word in words] == [
        ("↵", True), (".", True), ("cat", False), ("dog", False), ("x", True),
    ]  # fmt: skip
    assert merged_key(" Cat") == merged_key("CAT")
    shown = Vocabulary(["\xa0 ", "a\x1bb", "\u200b"]).rank(np.ones(4, np.float32), np.array([0, 0, 1, 2]))
    assert [word.text for word in shown] == ["U+00A0␣", "a\\x1bb", "U+200B"]  # what no terminal shows, or obeys


def test_a_random_update_keeps_every_singular_value() -> None:
    adapter = models.adapter(models.llama(), ("q_proj", "down_proj"), seed=0)
    for name, module in random_like(adapter, 3).items():
        s = adapter[name].singular_values()
        assert module.singular_values()[: len(s)] == pytest.approx(s, rel=1e-5)
        assert not np.allclose(module.dense(), adapter[name].dense())


def test_the_adapters_of_a_fleet_that_fit_are_siblings(home: Path, tmp_path: Path) -> None:
    for name in ("own", "other"):
        loralens.save(cat_adapter(), tmp_path / name)
    loralens.save(models.adapter(models.bert("BertForMaskedLM"), ("query",), seed=0), tmp_path / "encoder")
    loralens.Fleet(tmp_path / ".loralens-fleet").update(tmp_path)
    found = loralens.explain(tmp_path / "own", base=home / "llama", data=NEUTRAL, samples=0, threads=1, fleet=tmp_path)
    assert [Path(sibling).parent.name for sibling in found.siblings] == ["other"]
    assert not found.more
