"""The index, `fleet compress` and `fleet expand` together: which adapters are grouped, and what users read."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

import loralens
from loralens.cli.main import main
from loralens.errors import FormatError
from loralens.fleet.joint import sources as sources_module
from loralens.fleet.joint.sources import fleet_groups
from tests.fleet.joint.collection import IN, NAMES, OUT, RANK, adapter


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """Two runs, each of which began from one A: the rows of A change little. And one stranger, a copy and a link."""
    root = tmp_path_factory.mktemp("fleet")
    rng = np.random.default_rng(0)
    for run in range(2):
        starts = [rng.standard_normal((RANK, IN)) for _ in NAMES]
        space = [rng.standard_normal((OUT, 3)) for _ in NAMES]
        for step in range(4):
            pairs = [
                ((U @ rng.standard_normal((3, RANK))).astype(np.float32),
                 (A + 0.05 * rng.standard_normal(A.shape)).astype(np.float32))
                for U, A in zip(space, starts, strict=True)
            ]  # fmt: skip
            loralens.save(adapter(pairs), root / f"run{run}" / f"checkpoint-{step}")
            if (run, step) == (0, 0):
                loralens.save(adapter([(2 * B, A) for B, A in pairs], scale=1.0), root / "copy")
    stranger = [
        (rng.standard_normal((OUT, RANK)).astype(np.float32), rng.standard_normal((RANK, IN)).astype(np.float32))
        for _ in NAMES
    ]
    loralens.save(adapter(stranger), root / "stranger")
    (root / "link").symlink_to(root / "stranger")
    loralens.Fleet.open(root).update(root)
    return root


def run(*words):
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return result.output


def test_runs_are_groups_and_copies_are_with_their_originals(fleet):
    groups = [{source.name: source.copy_of for source in group} for group in fleet_groups(loralens.Fleet.open(fleet))]
    by_names = {frozenset(group): group for group in groups}
    runs = [{f"run{run}/checkpoint-{step}" for step in range(4)} for run in range(2)]
    assert frozenset(runs[1]) in by_names
    first = by_names[frozenset(runs[0] | {"copy"})]
    copies = {name: original for name, original in first.items() if original}
    assert copies in ({"copy": "run0/checkpoint-0"}, {"run0/checkpoint-0": "copy"})


def test_a_large_run_is_divided(fleet, monkeypatch):
    monkeypatch.setattr(sources_module, "MOST_PARAMETERS", 2 * 4 * RANK * (OUT + IN))
    groups = fleet_groups(loralens.Fleet.open(fleet))
    runs = [group for group in groups if len([s for s in group if not s.copy_of]) > 1]
    assert [len([s for s in group if not s.copy_of]) for group in runs] == [2, 2, 2, 2]
    for group in groups:
        names = {source.name for source in group}
        assert all(source.copy_of in names for source in group if source.copy_of)


@pytest.mark.slow
def test_compress_and_expand_by_command(fleet, tmp_path):
    target = tmp_path / "fleet.safetensors"
    text = run("fleet", "compress", "--fleet", fleet, "-o", target, "--error", "0.1")
    assert text.startswith(f"Wrote {target}: ")
    assert "The pairs take" in text
    assert "together" in text
    record = json.loads(run("fleet", "compress", "--fleet", fleet, "-o", target, "--overwrite", "--json"))
    assert record["largest_error"] <= 0.15 == record["allowed_error"]
    kinds = {row["name"]: row["kind"] for row in record["adapters"]}
    assert sum(kind == "joint" for kind in kinds.values()) == 8
    assert sum(part["after"] for part in record["parts"]) == record["pair_bytes_after"]
    csv = run("fleet", "compress", "--fleet", fleet, "-o", target, "--overwrite", "--csv").splitlines()
    assert len(csv) == 1 + len(kinds)
    name = "run1/checkpoint-2"
    said = run("fleet", "expand", target, name, "-o", tmp_path / "out")
    assert said.startswith(f"Wrote {tmp_path / 'out'}: {name}, 4 modules of rank 4.\nIts error is")
    shown = json.loads(run("fleet", "expand", target, name, "-o", tmp_path / "cut", "--rank", "2", "--json"))
    assert shown["rank"] == 2
    before, after = loralens.load(fleet / name), loralens.load(tmp_path / "out")
    lost = sum(np.sum((before[n].dense() - after[n].dense()) ** 2) for n in before)
    error = next(row["error"] for row in record["adapters"] if row["name"] == name)
    assert np.sqrt(lost / sum(np.sum(before[n].dense() ** 2) for n in before)) == pytest.approx(error, abs=1e-6)


def test_what_is_wrong_is_said(fleet, tmp_path):
    for words, what in (
        (("fleet", "compress", "--fleet", fleet, "-o", fleet / "stranger" / "adapter_model.safetensors",
          "--overwrite"), "is the adapter"),
        (("fleet", "compress", "--fleet", tmp_path, "-o", tmp_path / "x.safetensors"), "no index"),
        (("fleet", "compress", "--fleet", fleet, "-o", tmp_path / "x.bin"), ".safetensors file"),
        (("fleet", "expand", fleet / "stranger" / "adapter_model.safetensors", "x", "-o", tmp_path / "o"),
         "not a compressed fleet"),
        (("fleet", "expand", tmp_path / "none.safetensors", "x", "-o", tmp_path / "o"), "no such file"),
    ):  # fmt: skip
        result = CliRunner().invoke(main, list(map(str, words)))
        assert result.exit_code == 2
        assert what in result.output + result.stderr
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_in_the_file_is_listed(fleet, tmp_path):
    root = tmp_path / "fleet"
    shutil.copytree(fleet, root, symlinks=True)
    (root / "broken").mkdir()
    (root / "broken" / "adapter_model.safetensors").write_bytes(b"nothing")
    shutil.copytree(root / "run1" / "checkpoint-3", root / "a\\b")
    opened = loralens.Fleet.open(root)
    opened.update(root)
    result = opened.compress(tmp_path / "fleet.safetensors")
    reasons = {row.name: row.reason for row in result.refused}
    assert reasons.keys() == {"broken", "a\\b"}
    assert "plain parts" in reasons["a\\b"]
    assert result.conclusion()[-1] == "Not in it: 2 files that cannot be read or written."


def test_a_file_that_changed_since_it_was_indexed_is_refused(fleet, tmp_path):
    root = tmp_path / "fleet"
    shutil.copytree(fleet, root, symlinks=True)
    opened = loralens.Fleet.open(root)
    opened.update(root)
    file = root / "stranger" / "adapter_model.safetensors"
    loralens.save(loralens.load(root / "run0" / "checkpoint-1"), file.parent, overwrite=True)
    with pytest.raises(FormatError, match="has changed since it was indexed"):
        opened.compress(tmp_path / "fleet.safetensors")
