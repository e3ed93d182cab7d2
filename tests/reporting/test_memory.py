"""A report loads nothing that it does not draw with."""

import subprocess
import sys

import pytest

from tests.formats.test_fuzz import packed


def write_adapter(folder, modules):
    """A PEFT adapter of rank 1 and the bytes of its weights."""
    keys = [f"base_model.model.{name}.lora_{half}.weight" for name in modules for half in "AB"]
    weights = packed({key: ("F16", [1, 1]) for key in keys})
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    return len(weights)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [1, 2])
def test_a_page_without_pictures_needs_no_matplotlib(tmp_path, adapters):
    folders = [tmp_path / f"adapter{i}" for i in range(adapters)]
    for folder in folders:
        folder.mkdir()
        write_adapter(folder, [f"layers.{i}.m" for i in range(3)])
    code = (
        "import sys; from loralens.cli.main import main; main(sys.argv[1:], standalone_mode=False);"
        "print(*{'matplotlib', 'scipy', 'torch'} & {*sys.modules})"
    )
    words = ["report", *map(str, folders), "-o", str(tmp_path / "page.html"), "--quiet"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""  # below the conclusion
