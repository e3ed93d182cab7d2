"""Damaged adapters: loading and reading all of one gives an adapter or a LoraLensError. Nothing else, ever."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

import loralens
from loralens import LoraLensError
from loralens.formats.files.container import DTYPES
from tests.formats.blobs import HARMFUL, blob, damaged, entry, limits
from tests.marks import examples

pytestmark = pytest.mark.slow

MIB = 1 << 20
fuzz = examples(250, suppress_health_check=[HealthCheck.too_slow])

PREFIX = "base_model.model.model.layers.0"
TENSORS = {  # one of each kind that the reader knows
    f"{PREFIX}.q_proj.lora_A.weight": ("F32", [2, 6]),
    f"{PREFIX}.q_proj.lora_B.weight": ("F32", [4, 2]),
    f"{PREFIX}.q_proj.lora_magnitude_vector": ("F32", [4]),
    f"{PREFIX}.conv.lora_A.weight": ("F16", [2, 3, 3, 3]),
    f"{PREFIX}.conv.lora_B.weight": ("F16", [4, 1, 1, 1]),
    f"{PREFIX}.c_attn.lora_A.weight": ("BF16", [4, 5]),
    f"{PREFIX}.c_attn.lora_B.weight": ("BF16", [6, 2, 1]),
    f"{PREFIX}.experts.lora_A.weight": ("BF16", [4, 5]),
    f"{PREFIX}.experts.lora_B.weight": ("BF16", [3, 4]),
    f"{PREFIX}.experts.base_layer.lora_A.weight": ("BF16", [4, 5]),
    f"{PREFIX}.experts.base_layer.lora_B.weight": ("BF16", [3, 4]),
    "base_model.model.model.embed.lora_embedding_A": ("F32", [2, 7]),
    "base_model.model.model.embed.lora_embedding_B": ("F32", [3, 2]),
    "base_model.model.score.weight": ("F32", [2, 3]),
    f"{PREFIX}.q_proj.bias": ("F64", [4]),
}
CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 8,
    "base_model_name_or_path": "org/base",
    "target_modules": ["q_proj", "conv", "c_attn", "embed"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    "modules_to_save": ["score"],
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 4.0, "layers.0.conv": 16},
    "enable_lora": [True, False, True],
    "use_rslora": False,
    "use_dora": True,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "task_type": "SEQ_CLS",
    "bias": "all",
    "layer_replication": None,
    "kasa_config": None,
    "lora_B_layout": None,
    "use_bdlora": None,
}


def packed(tensors, **metadata):
    """A file with tensors of these dtypes and shapes, every number 1.0 where bytes allow."""
    header, data = {"__metadata__": {"format": "pt", **metadata}}, b""
    for key, (dtype, shape) in tensors.items():
        array = np.ones(shape, DTYPES[dtype])
        header[key] = entry(shape, len(data), len(data) + array.nbytes, dtype)
        data += array.tobytes()
    return blob(header, data)


GOOD = packed(TENSORS)
for dialect in loralens.formats.FORMATS:
    dialect._module("reader")  # else the first example pays for its import, and no limit of memory fits it


def read_everything(adapter):
    """Every number of an adapter, and its summary."""
    for name, module in adapter.items():
        assert module.B.shape == (module.shape[0], module.rank), name
        assert module.A.shape == (module.rank, module.shape[1]), name
    for extra in adapter.extra.values():
        extra.tensor.read()
    assert adapter.parameters >= 0
    assert repr(adapter)


def outcome(weights, config=None, **options):
    """The adapter, or the LoraLensError it ends with, within time and memory that fit the file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "adapter_model.safetensors").write_bytes(weights)
        if config is not None:
            (folder / "adapter_config.json").write_bytes(config)
        with limits(10, 20 * (len(weights) + len(config or b"")) + MIB):
            try:
                adapter = loralens.load(folder, **options)
                read_everything(adapter)
            except LoraLensError as error:
                assert not HARMFUL.search(str(error))  # noqa: PT017
                return error
            return adapter


def dumped(config):
    return json.dumps(config).encode()


@fuzz
@given(damaged(GOOD), st.booleans())
def test_damaged_weights(weights, configured):
    outcome(weights, dumped(CONFIG) if configured else None)


@fuzz
@given(damaged(GOOD[8 : -sum(np.ones(s, DTYPES[d]).nbytes for d, s in TENSORS.values())]))
def test_a_damaged_header_of_the_right_length(header):
    """The length before it fits, so that the damage is met further in; what we accept, the library accepts."""
    weights = blob(header, bytes(len(GOOD) - GOOD.rindex(b"}") - 1))
    if isinstance(outcome(weights, dumped(CONFIG)), loralens.Adapter):
        safetensors.deserialize(weights)


@fuzz
@given(damaged(dumped(CONFIG)))
def test_a_damaged_configuration(config):
    outcome(GOOD, config)


dims = st.lists(st.integers(0, 4), max_size=4)
dtypes = st.sampled_from(["F32", "F16", "BF16", "F8_E4M3", "I64", "BOOL", "C64"])


@fuzz
@given(
    st.dictionaries(st.sampled_from(list(TENSORS)), st.tuples(dtypes, dims), max_size=4),
    st.sets(st.sampled_from(list(TENSORS)), max_size=3),
)
def test_wrong_dtypes_and_shapes(changed, missing):
    tensors = {key: spec for key, spec in {**TENSORS, **changed}.items() if key not in missing}
    outcome(packed(tensors), dumped(CONFIG), strict=False)


@pytest.mark.parametrize("name", ["target_parameters", "target_modules", "modules_to_save", "base_model_name_or_path"])
@pytest.mark.parametrize("harm", ["\x1b]0;title\x07", "\x9b2J", "a\nb", "\u202e", "\ud800"])
def test_no_word_of_a_configuration_reaches_the_terminal_as_a_command(name, harm):
    text = f"org/{harm}" if name.startswith("base") else [f"q_proj{harm}"]
    error = outcome(GOOD, dumped({**CONFIG, name: text}), strict=False)
    assert "holds control characters" in str(error)
