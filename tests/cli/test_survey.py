"""``loralens FOLDER``: one line for each file from its header, copies, the gallery, and the numbers with --content."""

import base64
import html
import io
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import loralens
from loralens.core import LazyArray
from tests.cli.command import Command
from tests.conftest import small_adapter
from tests.formats.test_training_notes import SD_SCRIPTS

CALL = Command("survey")
run, told, good = CALL.run, CALL.told, CALL.good
LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"  # 320 × 768 in SD 1.5 alone


@pytest.fixture
def folder(small: Path, tmp_path: Path) -> Path:
    shutil.copytree(small, tmp_path / "a")
    shutil.copytree(small, tmp_path / "b" / "copy")
    shutil.copytree(small, tmp_path / ".hidden" / "a")
    for name in ("a/optimizer.pt", "a/rng_state_0.pth"):
        (tmp_path / name).write_bytes(b"PK\3\4 state")
    near = small_adapter().map(lambda m: loralens.LowRank(m.B * np.float32(1.003), m.A, m.scale))
    loralens.save(near, tmp_path / "c")
    (tmp_path / "bad.safetensors").write_bytes(b"{}")
    (tmp_path / "old.bin").write_bytes(b"PK\3\4 and more")
    save_file({"model.embed.weight": np.ones((300, 2), np.float32)}, tmp_path / "model.safetensors")
    nan = small_adapter().map(lambda m: loralens.LowRank(m.B * np.float32(np.nan), m.A, m.scale))
    loralens.save(nan, tmp_path / "nan")
    return tmp_path


def image_lora(path: Path, rank: int = 4, alpha: float | None = None, **metadata: str) -> Path:
    """An adapter of SD 1.5, as kohya's trainer writes it."""
    rng = np.random.default_rng(rank)
    down, up = rng.standard_normal((rank, 768)), rng.standard_normal((320, rank))
    tensors = {
        f"{LAYER}.lora_down.weight": down,
        f"{LAYER}.lora_up.weight": up,
        f"{LAYER}.alpha": np.array(alpha or rank),
    }
    save_file({name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}, path, metadata or None)
    return path


def picture(kind: str = "PNG", size: tuple[int, int] = (900, 600)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(stream, kind)
    return stream.getvalue()


def verdicts(folder: Path, *options: str) -> dict[str, str]:
    """Name in the folder → verdict."""
    record = told(*options, folder)
    rows = [*record["adapters"], *record["unreadable"]]
    found = {str(Path(row["path"]).relative_to(folder)): row.get("verdict", row.get("reason")) for row in rows}
    return {name.removesuffix("/adapter_model.safetensors"): text for name, text in found.items()}


def test_one_line_for_each_file(folder: Path) -> None:
    (folder / "e").mkdir()
    image_lora(folder / "e" / "dog.safetensors", **SD_SCRIPTS)
    lines = good(folder).stdout.replace(str(folder), "FOLDER").splitlines()
    assert lines[0] == "FOLDER: 6 adapters: 4 fine, 1 copy, 1 not opened; 1 file that cannot be read."
    rows = {line.split()[0]: " ".join(line.split()) for line in lines if line}
    size = f"{(folder / 'a' / 'adapter_model.safetensors').stat().st_size / 1000:.1f} kB"
    assert rows["a"] == f"a – 2 {size} base fine: vllm, sglang, tensorrt-llm, lorax, peft"
    assert rows["b/copy"].endswith(" copy of a")
    assert rows["bad"] == "bad – – 2 B – unreadable: 2 bytes are too few for any tensor file"
    # From a header nobody can tell that a number is NaN.
    assert rows["nan"].endswith(" fine: vllm, sglang, tensorrt-llm, lorax, peft")
    assert rows["old.bin"].endswith(" torch file, not opened")
    assert rows["e"].startswith("e SD 1.5 4 ")
    assert rows["e"].endswith(" sks dog sd_xl_base_1.0 fine: comfyui, sd-scripts, diffusers")
    assert "no adapters: 1 file of 2." in rows["no"]


def test_a_folder_in_place_of_a_command(folder: Path) -> None:
    """A folder of several adapters is surveyed; that of one, or a folder beside other paths, is inspected."""
    loose = Command()
    assert loose.good(folder).stdout == good(folder).stdout
    assert loose.told(folder)["folder"] == str(folder)
    assert "6 modules" in loose.good(folder / "a").stdout
    several = loose.run(folder, folder / "a").stderr
    assert f"`loralens survey {folder}` lists" in several


def test_no_factor_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_lora(folder / "dog.safetensors", **SD_SCRIPTS)
    read = LazyArray.read

    def read_alpha(array: LazyArray) -> np.ndarray:
        assert array.size == 1, "a factor was read"
        return read(array)

    monkeypatch.setattr(LazyArray, "read", read_alpha)
    assert good(folder, "--html", folder / "page.html").stdout


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda path: (path / "adapter_config.json").unlink(), "check: config missing or incomplete, alpha"),
        (lambda path: (path / "adapter_config.json").write_text("{"), "line 1"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), "the folder holds no adapter file"),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(b""), "is empty"),
    ],
)
def test_the_verdict_names_what_is_wrong(change: object, verdict: str, small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "a")
    assert callable(change)
    change(tmp_path / "a")
    (found,) = verdicts(tmp_path).values()
    assert verdict in found


def test_names_that_no_client_has_are_told(tmp_path: Path) -> None:
    image_lora(tmp_path / "good.safetensors")
    # As a program of its own writes them, without a name of any client.
    tensors = {"w_a_000": np.ones((4, 16), np.float32), "w_b_000": np.ones((16, 4), np.float32)}
    save_file(tensors, tmp_path / "bad.safetensors")
    found = verdicts(tmp_path)
    assert found["good.safetensors"] == "fine: comfyui, sd-scripts, diffusers"
    assert found["bad.safetensors"].startswith("check: unknown names")


def test_files_of_one_layout_keep_what_is_their_own(tmp_path: Path) -> None:
    """Files whose tensors have the same names and shapes are read once, but for α, metadata and configurations."""
    image_lora(tmp_path / "a.safetensors", **{"modelspec.trigger_phrase": "one"})
    image_lora(tmp_path / "b.safetensors", alpha=2, **{"modelspec.trigger_phrase": "two"})
    image_lora(tmp_path / "c.safetensors", ss_sd_model_name="v1-5-pruned.ckpt")
    rows = told(tmp_path)["adapters"]
    assert [row["scales"] for row in rows] == [[1], [0.5], [1]]
    assert [row["trigger_words"] for row in rows] == [["one"], ["two"], []]
    assert [row["trained_on"] for row in rows] == [None, None, "v1-5-pruned.ckpt"]


def test_copies_are_files_of_equal_bytes_and_configurations(small: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "other-alpha"):
        shutil.copytree(small, tmp_path / name)
    config = tmp_path / "other-alpha" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 3'))
    # These differ in one byte, which lies between the samples, and in none.
    for name, place in (("x", 0), ("y", 300_000), ("z", 0)):
        content = bytearray(image_lora(tmp_path / f"{name}.safetensors", rank=256).read_bytes())
        content[100_000 + place] ^= 1
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    (tmp_path / "link.safetensors").symlink_to("x.safetensors")
    found = {name: text for name, text in verdicts(tmp_path).items() if not text.startswith("fine")}
    assert found == {"b": "copy of a", "x.safetensors": "same file as link", "z.safetensors": "copy of link"}
    rows = {Path(row["path"]).stem: row for row in told(tmp_path)["adapters"]}
    assert (rows["z"]["duplicate_kind"], rows["z"]["duplicate_of"]) == ("bytes", str(tmp_path / "link.safetensors"))


def test_what_a_line_must_have_fits_into_80_columns(tmp_path: Path) -> None:
    from loralens.tables import lay_out

    for epoch in (4, 8):
        name = f"lineart_style_of_the_nineties_version_1_epoch_{epoch:06}.safetensors"
        image_lora(tmp_path / name, rank=epoch, **{**SD_SCRIPTS, "modelspec.trigger_phrase": "lineart, " * 30})
    layout = lay_out(loralens.survey(tmp_path).tables()[0], 80)
    assert all(len(line) <= 80 for line in (layout.heading, *layout.lines))
    asked = ["path", "family", "r", "size", "trigger words", "trained on", "verdict"]
    assert re.split(r"\s{2,}", layout.heading) == asked
    assert ["000004" in layout.lines[0], "000008" in layout.lines[1]] == [True, True]


@pytest.mark.parametrize("kind", ["adapter", "unreadable", "model"])
def test_a_folder_with_anything_in_it_is_not_called_empty(kind: str, small: Path, tmp_path: Path) -> None:
    if kind == "adapter":
        shutil.copytree(small, tmp_path / "a")
    elif kind == "unreadable":
        (tmp_path / "bad.safetensors").write_bytes(b"{}")
    else:
        save_file({"model.embed.weight": np.ones((300, 2), np.float32)}, tmp_path / "model.safetensors")
    assert "no adapter in this folder" not in run(tmp_path).stdout


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_what_is_no_adapter_is_counted_and_added_up(count: int, tmp_path: Path) -> None:
    names, whole = [f"model-{i}.safetensors" for i in range(count)], 0
    for i, name in enumerate(names):
        save_file({"model.embed.weight": np.ones((300, 2 + i), np.float32)}, tmp_path / name)
        (tmp_path / f"old-{i}.safetensors").write_bytes(b"{}")
        whole += (tmp_path / name).stat().st_size
    lines = run(tmp_path).stdout.splitlines()
    files, hold = ("1 file", "holds") if count == 1 else (f"{count} files", "hold")
    listed = ", ".join(names[:3]) + (" …" if count > 3 else "")
    assert f"no adapters: {files} of {whole / 1000:.1f} kB {hold} tensors and no LoRA pairs: {listed}" in lines
    assert lines[0] == f"{tmp_path}: 0 adapters; {files} that cannot be read."


def test_a_file_to_check_is_not_called_sound_by_inspect(tmp_path: Path) -> None:
    path = image_lora(tmp_path / "a.safetensors")
    tensors = {name.replace("lora_unet", "lora_mine"): X for name, X in load_file(path).items()}
    save_file(tensors, path)
    assert verdicts(tmp_path) == {"a.safetensors": "check: unknown names"}
    said = Command("inspect").good(path).stdout
    assert "ComfyUI ignores 1 of 1 modules" in said
    assert "1 warning: unknown names." in said


# ---- The gallery


def test_the_gallery_is_one_inert_page(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    folder = tmp_path / "loras"
    folder.mkdir()
    image_lora(folder / f"{evil}.safetensors", **{"modelspec.trigger_phrase": "</code><script>alert(1)</script>\u202e"})
    page = tmp_path / "page.html"
    assert f"Wrote {page}." in good(folder, "--html", page).stderr
    text = page.read_text(encoding="utf-8")
    assert "<img src=x" not in text
    assert text.count("<script>") == 1
    assert "&lt;script&gt;alert(1)" in text
    assert "\u202e" not in text
    policy = re.search(r"Content-Security-Policy\" content=\"([^\"]*)", text)
    assert policy
    assert policy[1].startswith("default-src 'none'; img-src data:;")
    assert not re.findall(r"(?:src|href)=\"(?!data:image/jpeg)", text)
    # What exists is replaced only if the user says so.
    assert run(folder, "--html", page).exit_code == 2
    good(folder, "--html", page, "--overwrite")
    assert "end the name in .html" in run(folder, "--html", tmp_path / "page.txt").stderr


def test_the_commands_of_a_card_run_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_lora(tmp_path / "a dog.safetensors")
    good(tmp_path, "--html", tmp_path / "page.html")
    text = re.sub("</?span.*?>", "", (tmp_path / "page.html").read_text())
    commands = re.findall('<code class="command">loralens (.*?)</code>', text)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        Command().good(*shlex.split(html.unescape(command)))
    assert len(commands) == 2
    assert (tmp_path / "a dog.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "shown"),
    [
        ("dog.png", picture(), True),
        ("dog.preview.png", picture(), True),
        ("dog.webp", picture("WEBP"), True),
        ("dog.jpg", picture("JPEG"), True),
        ("dog.png", picture()[:200], False),
        ("dog.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", False),
        ("dog.png", picture("GIF"), False),
        ("cat.png", picture(), False),
    ],
)
def test_a_preview_is_a_picture_beside_the_file(name: str, content: bytes, shown: bool, tmp_path: Path) -> None:
    image_lora(tmp_path / "dog.safetensors")
    (tmp_path / name).write_bytes(content)
    good(tmp_path, "--html", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    found = re.findall(r'<img src="data:image/jpeg;base64,([^"]*)"', text)
    assert len(found) == shown
    for encoded in found:
        assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (384, 256)


@pytest.mark.parametrize(
    ("start", "content", "shown"),
    [
        ("data:image/jpeg;base64,", picture("JPEG"), True),
        ("data:image/png;base64,", picture("JPEG"), True),  # the content says what it is
        ("data:image/svg+xml;base64,", b"<svg onload='alert(1)'/>", False),
        ("data:image/png;base64,", b"<svg onload='alert(1)'/>", False),
        ("data:image/png;base64,", picture(size=(9000, 9000)), False),
        ("https://example.org/", b"", False),
    ],
)
def test_a_preview_in_the_metadata_is_checked(start: str, content: bytes, shown: bool, tmp_path: Path) -> None:
    image_lora(tmp_path / "dog.safetensors", **{"modelspec.thumbnail": start + base64.b64encode(content).decode()})
    good(tmp_path, "--html", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<img") == shown
    assert "svg onload" not in text


# ---- With the numbers


def test_with_the_numbers(folder: Path) -> None:
    lines = good("--content", folder).stdout.replace(str(folder), "FOLDER").splitlines()
    assert lines[0] == "FOLDER: 3 adapters: 1 fine, 2 copies; 3 files that cannot be read."
    rows = {line.split()[0]: " ".join(line.split()) for line in lines if line}
    fingerprint = told("--content", folder)["adapters"][0]["fingerprint"][:12]
    assert f" base 6 (1 zero) 9.695 1.79 {fingerprint} fine" in rows["a"]
    assert rows["b/copy"].endswith(f"{fingerprint} copy of a")
    assert rows["c"].endswith("copy of a (ΔW differs by 0.003)")
    assert rows["nan"].endswith("unreadable: model.layers.0.self_attn.q_proj: a factor holds NaN or Inf")
    assert "its zip archive is damaged" in rows["old.bin"]


RECORD = {
    "path", "level", "verdict", "format", "family", "base_model", "trained_on", "trigger_words", "modules",
    "zero_modules", "ranks", "scales", "parameters", "bytes", "frobenius", "effective_rank", "fingerprint", "clients",
    "duplicate_of", "duplicate_kind", "duplicate_difference", "findings",
}  # fmt: skip


def test_it_writes_nothing_into_the_folder(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    run(folder)
    run(folder, "--content")
    assert sorted(folder.rglob("*")) == before


def test_an_index_that_is_up_to_date_answers(folder: Path) -> None:
    def norm(*options: str) -> float:
        return float(told("--content", *options, folder)["adapters"][0]["frobenius"])

    before = norm()
    loralens.Fleet.open(folder).update(folder)
    # Other numbers in a file of the same size and time, which only a survey that reads the file sees.
    file = folder / "a" / "adapter_model.safetensors"
    status, content = file.stat(), file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:start] + (2 * np.frombuffer(content[start:], "<f4")).tobytes())
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert norm() == before
    # With another option the files are read in another way, and after a change of its time the file is read again.
    assert norm("--once") == pytest.approx(4 * before)
    os.utime(file)
    assert norm() == pytest.approx(4 * before)


def test_an_index_that_cannot_be_read_is_no_obstacle(folder: Path) -> None:
    expected = told("--content", folder)
    loralens.Fleet.open(folder).update(folder)
    (folder / ".loralens-fleet" / "catalogue.sqlite").write_bytes(b"not a catalogue")
    assert told("--content", folder) == expected


def test_json_keeps_its_contract(folder: Path) -> None:
    record = told("--content", folder)
    assert record["loralens"] == loralens.__version__
    assert record["folder"] == str(folder)
    one, two, three = record["adapters"]
    assert all(set(adapter) >= RECORD for adapter in (one, two, three))
    assert one["path"] == str(folder / "a" / "adapter_model.safetensors")
    assert (one["format"], one["base_model"], one["modules"], one["zero_modules"]) == ("peft", "tiny/base", 6, 1)
    assert one["duplicate_of"] is one["duplicate_kind"] is one["duplicate_difference"] is None
    assert (two["duplicate_of"], two["duplicate_kind"], two["duplicate_difference"]) == (one["path"], "bytes", 0)
    assert (three["duplicate_of"], three["duplicate_kind"]) == (one["path"], "update")
    assert {Path(bad["path"]).relative_to(folder).parts[0] for bad in record["unreadable"]} == {
        "bad.safetensors", "old.bin", "nan",
    }  # fmt: skip
    assert [Path(other["path"]).name for other in record["no_adapters"]] == ["model.safetensors"]
    # Without the numbers there are the same keys.
    assert all(set(adapter) == set(one) for adapter in told(folder)["adapters"])
