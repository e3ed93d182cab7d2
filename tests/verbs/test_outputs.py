"""What verbs write: targets, forms and rules as they are shared."""

from pathlib import Path

import pytest

import loralens
from loralens.choices import TARGET_FORMATS
from loralens.core.ranks import Rule
from loralens.errors import OptionError
from loralens.formats.dialects.table import FORMATS
from loralens.verbs.files.output_format import OutputFormat
from loralens.verbs.files.target import Target
from loralens.verbs.shared.options import RankRules
from loralens.verbs.shared.rank_rules import rank_notes


def test_target_formats_are_those_with_a_writer() -> None:
    assert set(TARGET_FORMATS) == {form.name for form in FORMATS if form.writer}


def test_without_an_output_nothing_is_checked_and_nothing_written(small: Path) -> None:
    target = Target.of(None, overwrite=True, dry_run=False)
    target.check_source(small, base="nowhere")
    target.check_inputs({"the base": "nowhere"})
    target.check_format("peft")
    assert target.written is None
    assert Target.of("out", dry_run=True).written is None
    assert Target.of("out").written == Path("out")


def test_one_sentence_says_what_is_written() -> None:
    assert Target.of("out").sentences("peft") == ["wrote out: peft"]
    assert Target.of("out", dry_run=True).sentences("peft") == ["would write out: peft"]
    assert Target.of(None, dry_run=True).sentences("peft") == ["would write: peft"]
    assert Target.of(None).sentences("peft") == []
    assert (Target.of("out").record(), Target.of("out", dry_run=True).record()) == ("out", None)


def test_a_target_is_not_the_source_nor_an_input(small: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is where the source is"):
        Target(small, overwrite=True).check_source(small)
    with pytest.raises(OptionError, match="is the base itself"):
        Target(small, overwrite=True).check_source(loralens.load(small), base=small)
    with pytest.raises(OptionError, match="lies within the moments"):
        Target(small / "x").check_inputs({"the base": None, "the moments": small})
    with pytest.raises(OptionError, match=r"not written to \.bin files"):
        Target(tmp_path / "x.bin").check_format("peft")


def test_a_form_is_the_own_one_or_the_one_asked_for(small: Path) -> None:
    adapter = loralens.load(small)
    assert OutputFormat.of(adapter).name == "peft"
    assert OutputFormat.of(adapter, to="mlx").one_rank
    for options, message in (
        ({"to": "lycoris"}, "choose one of peft"),
        ({"dtype": "f64"}, "choose one of f32"),
    ):
        with pytest.raises(OptionError) as refusal:
            OutputFormat.of(adapter, **options)
        assert message in str(refusal.value)


def test_one_rule_of_ranks() -> None:
    assert RankRules().optional() is None
    assert RankRules(rank=8).required() == Rule("rank", 8)
    assert RankRules(sv_ratio=2.0).required() == Rule("sv-ratio", 2.0)
    assert RankRules(size="20MB").required() == Rule("bytes", 20_000_000)
    assert isinstance(RankRules(rank=8.0).required().value, int)  # type: ignore[arg-type]
    assert isinstance(RankRules(energy=1.0).required().value, float)
    with pytest.raises(OptionError, match="how to choose the ranks"):
        RankRules().required()
    with pytest.raises(OptionError, match="--rank, --size exclude each other"):
        RankRules(rank=8, size=100).required()


def test_a_rank_above_all_directions_is_said() -> None:
    assert rank_notes(8, {"a": 8, "b": 8}) == []
    assert rank_notes(None, {"a": 2}) == []
    assert rank_notes(8, {"a": 2, "b": 4}) == ["2 of 2 modules have at most 4 directions, not 8: all of them are kept"]
