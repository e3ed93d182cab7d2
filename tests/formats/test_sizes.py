"""The size of a file, known before it is written: to the byte, in every dialect and container."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens.formats import encode_adapter, stored_size
from tests.conftest import small_adapter
from tests.models import low_rank

GGUF = {"base_config": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_attention_heads": 4}}


def adapter(dtype: object, *, mixed: bool) -> loralens.Adapter:
    modules = {
        name: low_rank(6, 4, 1 + (i % 3 if mixed else 1), 0.5 + i * mixed, dtype=dtype)
        for i, name in enumerate(small_adapter())
    }
    return loralens.Adapter(modules=modules, base_model="tiny/base")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("to", ["peft", "kohya", "diffusers", "comfyui", "mlx", "loralib", "gguf"])
def test_every_dialect_to_the_byte(to: str, dtype: object, tmp_path: Path) -> None:
    one = adapter(dtype, mixed=to != "mlx")
    options = GGUF if to == "gguf" else {}
    loralens.save(one, tmp_path / "out", format=to, **options)
    file = tmp_path / "out" / encode_adapter(one, to, **options)[1].weights
    assert stored_size(*encode_adapter(one, to, **options)) == file.stat().st_size
