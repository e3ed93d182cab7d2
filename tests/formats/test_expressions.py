"""Expressions out of a configuration match what PEFT matches, and end in a bounded time whatever they are."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loralens import FormatError
from loralens.formats.dialects.peft.config import Clock, Expression, Pattern, PeftConfig
from tests.formats.blobs import limits

MODULES = [  # of models as transformers and diffusers name them
    *(f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1, 10, 31) for p in "qkvo"),
    *(f"model.layers.{i}.mlp.{p}_proj" for i in (0, 11) for p in ("gate", "up", "down")),
    *(f"transformer.h.{i}.{p}" for i in (0, 11) for p in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")),
    *(f"bert.encoder.layer.{i}.attention.self.{p}" for i in (0, 9) for p in ("query", "key", "value")),
    "model.decoder.layers.0.encoder_attn.k_proj",
    "base_model.model.model.layers.3.block_sparse_moe.experts.7.w1",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "single_transformer_blocks.37.proj_out",
    "model.vision_tower.vision_model.encoder.layers.2.self_attn.q_proj",
    "model.language_model.layers.2.mlp.down_proj",
    "lm_head",
    "model.embed_tokens",
]
UNSLOTH = (  # the kind of expression that a trainer writes for a model of text and images
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:q_proj|k_proj))"
)
ORDINARY = [
    r"model\.layers\.\d+\.self_attn\.q_proj",
    "^model.decoder.layers.0.encoder_attn.k_proj",
    r".*\.(q|k|v|o)_proj",
    r"layers\.(0|1|10)\.self_attn\.(q_proj|k_proj)",
    r".*attn.*",
    r"[a-z_]+_proj$",
    r"layer\.\d+\.attention\.self\.(query|key)",
    r".*\.layers\.([0-9]|1[0-9])\..*_proj",
    r"(?!.*vision).*q_proj",
    r"(?:model\.)?lm_head",
]
HOSTILE = [
    ("(a+)+b", "a" * 40),
    ("(a{1,99999}){1,99999}b", "a" * 40),
    (r"(.*)\1\1\1x", "a" * 60),
    ("a?" * 30 + "a" * 30, "a" * 29),
    ("(.*)*(.*)*(.*)*[^a]", "a" * 40),
    ("((a?){9}){9}b", "a" * 60),
]


def by_peft(keys: list[str], path: str) -> str | None:
    """What PEFT's own function finds."""
    other = pytest.importorskip("peft.utils.other")
    missing = f"{path} is no key"
    key: str = other.get_pattern_key([*keys, re.escape(path) + r"()"], path)
    return None if key in (missing, re.escape(path) + r"()") else key


LITERAL = re.compile(r"\^?(?:[\w.-]|\\[^\w\s])+\$?")
literals = st.sampled_from(["a", "q", "_proj", "layers", r"\.", r"\d", ".", "[a-z]", r"\w", "0", "model", r"\b", "_"])
pieces = st.recursive(
    literals,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "{1,3}", "{2}", "{0,40}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.lists(inner, min_size=2, max_size=3).map("".join),
        inner.map(lambda piece: f"(?={piece})"),
        inner.map(lambda piece: f"^{piece}"),
        inner.map(lambda piece: f"{piece}$"),
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.lists(st.sampled_from(ORDINARY) | pieces, min_size=1, max_size=4, unique=True))
def test_patterns_find_the_key_that_peft_finds(keys: list[str]) -> None:
    pattern = Pattern({key: place for place, key in enumerate(keys)}, clock=Clock(60))
    # The dots of a key that is no expression otherwise are those of a name.
    named = {re.sub(r"(?<!\\)\.", r"\.", key) if LITERAL.fullmatch(key) else key: key for key in reversed(keys)}
    named = dict(reversed(named.items()))
    for path in MODULES:
        found = by_peft(list(named), path)
        assert pattern.find(path, None)[1] == (None if found is None else named[found]), path


@settings(deadline=None)
@given(st.sampled_from([*ORDINARY, UNSLOTH]) | pieces)
def test_target_modules_cover_what_peft_covers(text: str) -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = peft.LoraConfig(target_modules=text)
    ours = PeftConfig({"target_modules": text}, Clock(60))
    for path in MODULES:
        assert ours.targets(path) == bool(check_target_module_exists(theirs, path)), path


@settings(deadline=None)
@given(pieces)
def test_an_expression_matches_what_python_s_own_engine_matches(text: str) -> None:
    expression = Expression(text, "target_modules", Clock(60))
    for path in MODULES:
        assert expression.matches(path) == (re.fullmatch(text, path) is not None)


@settings(deadline=None)
@given(st.text(max_size=30))
def test_a_name_that_was_escaped_matches_itself(name: str) -> None:
    assert Expression(re.escape(name), "rank_pattern", Clock(60)).matches(name)


def first_error(fields, paths):
    """What a configuration raises when it is asked about these modules; None where nothing."""
    try:
        config = PeftConfig(fields, Clock(0.2))
        for path in paths:
            config.scaling(path)
            config.targets(path)
    except FormatError as error:
        return error
    return None


@pytest.mark.some(3)
@pytest.mark.parametrize(("text", "path"), HOSTILE, ids=[text[:20] for text, _ in HOSTILE])
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules"])
def test_an_expression_that_would_not_end_ends(field, text, path):
    """Either it is matched quickly after all, or the message names it."""
    value = text if field == "target_modules" else {text: 2}
    with limits(20, 50 << 20):
        error = first_error({field: value}, [f"{path}{i}" for i in range(50)])
    assert error is None or f"{field} {text!r:.8}" in str(error)


@pytest.mark.parametrize("text", ["(a{1,9}){1,999}b", "(a?){4000}a{4000}"])
def test_the_limit_is_one_for_all_names_and_expressions_of_an_adapter(text):
    config = PeftConfig({"rank_pattern": {text: 2}}, Clock(0.1))
    with limits(20, 50 << 20), pytest.raises(FormatError, match=r"within 0\.1 s of computing"):
        config.scaling("a" * 4000)
    with limits(1, 1 << 20), pytest.raises(FormatError, match="rank_pattern"):
        config.scaling("a" * 3999)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 20 + "a+" + ")+" * 20,
        "(" * 90 + "a" + ")+" * 90,
        "(?:a?){40000000}b",  # for this one `regex` does not look at its clock, either
        r"(?:(?:\b){4000}){400}a",
    ],
    ids=["repeats", "deep", "count", "nothing"],
)
def test_an_expression_that_would_fill_the_memory_when_it_is_compiled_is_refused(text):
    """`regex` copies what is repeated: 62 letters took more than 1.4 GB."""
    with limits(20, 50 << 20), pytest.raises(FormatError, match="repeats too much"):
        PeftConfig({"rank_pattern": {text: 2}}).scaling("a" * 300)


@pytest.mark.parametrize("text", ["(a+)+{e<=1}b", "([[:alpha:]]+)+b", "(a+)+{,"])
def test_what_the_two_engines_read_differently_is_refused_where_it_matters(text):
    with pytest.raises(FormatError, match="target_modules"):
        PeftConfig({"target_modules": text}).targets("a" * 40)
