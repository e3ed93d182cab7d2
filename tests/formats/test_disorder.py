"""Files of every dialect with tensors in disorder give an adapter or an error of ours, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from loralens import LoraLensError, LowRank
from loralens.core import LazyArray
from loralens.formats import FORMATS
from loralens.formats.files.container import read_json
from loralens.formats.files.location import config_beside
from tests.conformance.test_conformance import CASES, adapter_path
from tests.formats.files import read_gguf, read_safetensors
from tests.formats.stores import from_pickle
from tests.marks import examples

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:invalid value encountered in cast")]

DTYPES = st.sampled_from([np.float32, np.float16, np.int64, np.bool_, np.complex64])
SHAPES = st.lists(st.integers(0, 4), max_size=4)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([10**400, 1e308, float("inf"), float("nan"), "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["scale", "rank"]), inner, max_size=2),
    max_leaves=4,
)
FIELDS = ["enable_lora", "n_head", "head_size", "lora_query", "r", "lora_alpha"]
FIELDS += ["fine_tune_type", "lora_parameters", "target_modules"]


@pytest.mark.parametrize("case", CASES)
@examples(60, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_tensors_in_disorder_give_an_adapter_or_an_error_of_ours(case: str, data: st.DataObject) -> None:
    path = adapter_path(case)
    reads = {".safetensors": read_safetensors, ".bin": from_pickle, ".gguf": read_gguf}
    sound = reads[path.suffix](path)
    tensors, keys = dict(sound.tensors), st.sampled_from(sorted(sound.tensors))
    for _ in range(data.draw(st.integers(1, 3))):
        key, other = data.draw(keys), data.draw(keys)
        change = data.draw(st.sampled_from(["leave out", "exchange", "rename", "replace"]))
        if change == "leave out":
            tensors.pop(key, None)
        elif change == "exchange":
            tensors[key] = sound.tensors[other]
        elif change == "rename":  # the module of one key with the leaf of another
            tensors[f"{key.split('.')[0]}.{other.rpartition('.')[2]}"] = sound.tensors[key]
        else:
            number = data.draw(st.sampled_from([1, 0, -2, 1e30, np.nan, np.inf]))
            with np.errstate(all="ignore"):
                array = np.full(data.draw(SHAPES), number).astype(data.draw(DTYPES))
            tensors[key] = LazyArray.of(array)
    config = config_beside(path)
    said = (read_json(config) if config else {}) | data.draw(
        st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2)
    )
    stored = replace(sound, tensors=tensors, config=said or None)
    for form in FORMATS:
        form.detect(stored)
        try:
            adapter = form.read(stored)
            for module in adapter.modules.values():
                if isinstance(module, LowRank):
                    assert module.B.shape == (module.shape[0], module.rank)
                    assert module.A.shape == (module.rank, module.shape[1])
            if form.writer and form.name == adapter.format:
                form.write(adapter)
        except LoraLensError:
            continue
