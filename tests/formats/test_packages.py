"""Models inside installed packages: found by the record of the package, which is never imported."""

import sys
from pathlib import Path

import pytest

from loralens import OptionError
from loralens.formats.files.location import existing_path, is_installed, is_package_name, model_folder
from tests.formats.blobs import blob
from tests.formats.files import find_adapter, shapes

MODEL = ("config.json", "model.safetensors")


class Site:
    """A folder on ``sys.path`` to which packages are installed that break when they are imported."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def install(self, name: str, *files: str, record: bool = True, lost: tuple[str, ...] = ()) -> Path:
        """A package with these files; those ``lost`` are recorded and not there."""
        folder = name.replace("-", "_")
        for file in (f"{folder}/__init__.py", *files):
            path = self.root / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"raise RuntimeError" if path.suffix == ".py" else blob({}))
        info = self.root / f"{folder}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        if record:
            (info / "RECORD").write_text("".join(f"{file},,\n" for file in (f"{folder}/__init__.py", *files, *lost)))
        return self.root


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    root = tmp_path / "site"
    root.mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.syspath_prepend(str(root))
    return Site(root)


@pytest.mark.parametrize(
    ("files", "folder"),
    [
        (["one/model/config.json", "one/model/model.safetensors"], "one/model"),
        (["one/config.json", "one/pytorch_model.bin", "one/vocab.txt"], "one"),
        (["one/m/config.json", "one/m/model-00001-of-00002.safetensors"], "one/m"),
        (["one/m/config.json", "one/m/pytorch_model-00002-of-00002.bin"], "one/m"),
        (["one/m/config.json", "one/m/model.safetensors", "one/m/1_Pooling/config.json"], "one/m"),
        (["one/m/model.safetensors"], None),
        (["one/m/config.json", "one/n/model.safetensors"], None),
        (["one/m/config.json", "one/m/adapter_model.safetensors"], None),
        (["one/m/config.json", "one/m/remodel.safetensors"], None),
        ([], None),
    ],
)
def test_which_folder_is_a_model(files: list[str], folder: str | None, site: Site) -> None:
    root = site.install("one", *files)
    assert model_folder("one") == (root / folder if folder else None)


@pytest.mark.parametrize("name", ["my-tiny-base", "my_tiny_base", "My.Tiny.Base", "MY-TINY_BASE"])
def test_names_are_as_pip_takes_them(name: str, site: Site) -> None:
    root = site.install("my-tiny-base", *(f"my_tiny_base/{file}" for file in MODEL))
    assert is_installed(name)
    assert model_folder(name) == root / "my_tiny_base"


def test_the_package_is_not_imported(site: Site) -> None:
    site.install("breaks-on-import", *(f"breaks_on_import/{file}" for file in MODEL))
    assert existing_path(Path("breaks-on-import")).name == "breaks_on_import"
    assert "breaks_on_import" not in sys.modules


def test_a_package_without_a_record_or_without_its_files(site: Site) -> None:
    site.install("one", *(f"one/{file}" for file in MODEL), record=False)
    site.install("two", lost=("two/config.json", "two/model.safetensors"))
    for name in ("one", "two"):
        assert is_installed(name)
        assert model_folder(name) is None


def test_several_models_are_told_and_none_is_taken(site: Site) -> None:
    root = site.install("zoo", *(f"zoo/{size}/{file}" for size in ("small", "large") for file in MODEL))
    with pytest.raises(OptionError) as caught:
        existing_path(Path("zoo"))
    assert caught.value.what == f"zoo: the installed package holds several models: {root}/zoo/large, {root}/zoo/small"
    assert existing_path(root / "zoo" / "large") == root / "zoo" / "large"


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "-a", "a-", ".", "..", "a/b", "a\\b", "C:\\a", "~", "ä", "a\nb", "\udcff"]
)
def test_what_names_no_package(name: str, site: Site) -> None:
    assert not is_package_name(name)
    assert not is_installed(name)
    assert model_folder(name) is None


def test_a_path_outranks_a_package(site: Site) -> None:
    site.install("base", *(f"base/{file}" for file in MODEL))
    assert existing_path(Path("base")).is_absolute()
    Path("base").mkdir()
    assert existing_path(Path("base")) == Path("base")


@pytest.mark.parametrize(
    ("path", "tried"),
    [
        ("bare", ", and the installed package bare holds no transformers model"),
        ("nobody", ", and no package of this name is installed"),
        ("nobody/bare", ", and the local Hub cache has no snapshot of it"),
        ("a/nobody/bare", ""),
        ("bare.safetensors", ""),
    ],
)
def test_what_was_tried_is_told(path: str, tried: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(site.root / "nothing"))
    site.install("bare", "bare/readme.txt")
    for reads in (existing_path, find_adapter, shapes):
        with pytest.raises(OptionError) as caught:
            reads(Path(path))
        what, comma, found = caught.value.what.partition(",")
        assert what.startswith(f"{path}: ")
        assert comma + found == tried
        assert "check the path" in caught.value.fix
