"""A report takes memory in proportion to its adapters, and loads nothing that it does not draw with."""

import subprocess
import sys

import pytest

from loralens.cli.main import main
from tests.formats.blobs import limits
from tests.formats.test_fuzz import packed
from tests.formats.test_long_names import LETTERS, MIB, names


def write_adapter(folder, modules):
    """A PEFT adapter of rank 1 and the bytes of its weights."""
    keys = [f"base_model.model.{name}.lora_{half}.weight" for name in modules for half in "AB"]
    weights = packed({key: ("F16", [1, 1]) for key in keys})
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    return len(weights)


@pytest.mark.slow
def test_the_page_of_long_names_takes_ten_times_the_file(tmp_path):
    (tmp_path / "short").mkdir()
    write_adapter(tmp_path / "short", [f"layers.{i}.m" for i in range(8)])
    words = ["report", "-o", str(tmp_path / "page.html"), "--overwrite"]
    main([*words, str(tmp_path / "short")], standalone_mode=False)  # imports
    size = write_adapter(tmp_path, names(LETTERS)[:8])
    with limits(60, 10 * size + 5 * MIB // 4):
        main([*words, str(tmp_path)], standalone_mode=False)


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


def many(count):
    """Names of 470 letters, so that a file consists of names."""
    return [f"model.{'x' * 434}.layers.{i}.q_proj" for i in range(count)]


@pytest.mark.slow
def test_the_page_of_many_modules_takes_ten_times_the_file(tmp_path):
    (tmp_path / "short").mkdir()
    write_adapter(tmp_path / "short", [f"layers.{i}.m" for i in range(20)])
    words = ["report", "-o", str(tmp_path / "page.html"), "--overwrite"]
    main([*words, str(tmp_path / "short")], standalone_mode=False)  # imports
    size = write_adapter(tmp_path, many(150))
    with limits(60, 14 * size + MIB):
        main([*words, str(tmp_path)], standalone_mode=False)


def test_a_merge_of_many_modules_takes_ten_times_the_file(tmp_path):
    (tmp_path / "short").mkdir()
    write_adapter(tmp_path / "short", ["m"])
    (tmp_path / "one.safetensors").write_bytes(packed({"m.weight": ("F16", [1, 1])}))
    main(
        ["merge", str(tmp_path / "short"), "--base", str(tmp_path / "one.safetensors"), "-o",
         str(tmp_path / "out.safetensors")], standalone_mode=False,
    )  # imports  # fmt: skip
    size = write_adapter(tmp_path, many(150))
    (tmp_path / "base.safetensors").write_bytes(packed({f"{name}.weight": ("F16", [1, 1]) for name in many(150)}))
    words = [
        "merge",
        str(tmp_path),
        "--base",
        str(tmp_path / "base.safetensors"),
        "-o",
        str(tmp_path / "b.safetensors"),
    ]
    with limits(60, 10 * size + MIB):
        main(words, standalone_mode=False)


def test_a_conversion_of_many_modules_takes_ten_times_the_file(tmp_path):
    (tmp_path / "short").mkdir()
    write_adapter(tmp_path / "short", ["m"])
    words = ["--to", "kohya", "-o", str(tmp_path / "out.safetensors"), "--overwrite"]
    main(["convert", str(tmp_path / "short"), *words], standalone_mode=False)  # imports
    size = write_adapter(tmp_path, many(150))
    with limits(60, 10 * size + MIB):
        main(["convert", str(tmp_path), *words], standalone_mode=False)
