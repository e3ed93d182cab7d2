"""What joint compression gains on a folder of adapters: the tables of docs/fleet_compression.md.

    python -m benchmarks.fleet_compression FOLDER [--vlora PYTHON] [-o RESULT.json]

Every byte that is needed to give the updates back counts, the bases included. ``PYTHON`` is an interpreter that has
vlora-dev, torch and the packages of loralens.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np

import loralens
from loralens.compression.joint.alone import code_alone, estimate_alone
from loralens.compression.joint.group import PRICES, _Group
from loralens.compression.joint.split import SplitUpdate
from loralens.core.adapter import Adapter
from loralens.errors import LoraLensError
from loralens.fleet.joint.code_group import FleetSource, is_codable
from loralens.fleet.joint.compress import compress_fleet
from loralens.fleet.joint.result import CompressionResult
from loralens.fleet.joint.sources import fleet_groups
from loralens.fleet.sketching.module_keys import module_keys
from loralens.linalg.leading import leading_directions

Split = dict[str, SplitUpdate]
ERROR = 0.15
FORCED = 10**12  # bytes of an adapter alone, so that it is never left out of a group
EIGHT_BITS = 0.012  # error of rounding both sides of singular directions to 8 bits


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vlora", metavar="PYTHON")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        result = measure(options.folder, Path(work), options.vlora)
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


def measure(folder: Path, work: Path, vlora: str | None) -> dict[str, object]:
    """All tables of one folder."""
    fleet = loralens.Fleet.open(work / "index")
    fleet.update(folder)
    groups = fleet_groups(fleet)
    splits, adapters = _read([source for group in groups for source in group])
    pairs = sum(adapter.nbytes for adapter in adapters.values())
    start = time.perf_counter()
    written = compress_fleet(groups, work / "fleet.safetensors", error=ERROR)
    seconds = time.perf_counter() - start
    alone = {name: code_alone(split, error=ERROR) for name, split in splits.items()}
    copies = {source.name for group in groups for source in group if source.copy_of}
    sizes = {
        "each alone, 8 bits": sum(eight_bits(split) for split in splits.values()),
        "each alone, rank and bits": sum(coding.nbytes for coding in alone.values()),
        "copies once, others alone": sum(alone[name].nbytes for name in splits if name not in copies),
        "joint per run": written.pair_bytes_after,
        "one basis for all of one base": one_basis(splits, copies, ERROR),
    }
    runs = [[s for s in group if not s.copy_of and s.name in splits] for group in groups]
    print(json.dumps({name: round(size / pairs, 4) for name, size in sizes.items()}), file=sys.stderr)
    return {
        "adapters": len(splits),
        "copies": len(copies),
        "pair_bytes": pairs,
        "seconds": round(seconds, 1),
        "share of the pair bytes": {name: round(size / pairs, 4) for name, size in sizes.items()},
        "at the bytes of joint per run": at_equal_bytes(splits, copies, groups, written, vlora),
        "joint / each alone": {
            name: round(written.pair_bytes_after / sizes[name], 3)
            for name in ("each alone, 8 bits", "each alone, rank and bits", "copies once, others alone")
        },
        "file_bytes": [written.file_bytes_before, written.file_bytes_after],
        "largest error": written.largest_error,
        "kinds": dict(Counter(row.kind for row in written.adapters)),
        "runs": [_of_run(run, splits, alone, vlora) for run in runs if len(run) > 3],
        "strangers": strangers(splits, alone),
        "a new adapter": new_adapter(splits),
    }


def _read(sources: Sequence[FleetSource]) -> tuple[dict[str, Split], dict[str, Adapter]]:
    splits, adapters = {}, {}
    for source in sources:
        try:
            adapter = source.load()
            if is_codable(adapter):
                keys = sorted((key, name) for name, key in module_keys(adapter).items())
                splits[source.name] = {key: SplitUpdate.of(adapter[name]) for key, name in keys}
                adapters[source.name] = adapter
        except LoraLensError as error:
            print(f"{source.name}: {error}", file=sys.stderr)
    return splits, adapters


def eight_bits(split: Split) -> int:
    """Singular directions in 8 bits, over all modules the largest first, until the error is reached."""
    energies = np.concatenate([update.singular_values**2 for update in split.values()])
    sizes = np.concatenate([np.full(u.left.shape[1], sum(u.shape) + 9) for u in split.values()])
    order = np.argsort(-energies)
    kept = np.cumsum(energies[order])
    count = int(np.searchsorted(kept, (1 - ERROR**2 + EIGHT_BITS**2) * kept[-1])) + 1
    return int(sizes[order[:count]].sum())


def one_basis(splits: Mapping[str, Split], copies: set[str], error: float) -> int:
    """The bytes if all adapters with the same modules share bases, whether that pays or not."""
    total = 0
    for names in by_signature({name: split for name, split in splits.items() if name not in copies}):
        total += forced(splits, names, error)[0]
    return total


def at_equal_bytes(
    splits: Mapping[str, Split],
    copies: set[str],
    groups: Sequence[Sequence[FleetSource]],
    written: CompressionResult,
    vlora: str | None,
) -> dict[str, object]:
    """The least error that every adapter of the fleet keeps in as many bytes as joint coding takes for all of them.

    vlora-dev cannot be so small: it has a mean and one component at least, and then its bytes are stated beside its
    errors. It gets the same runs, or all adapters of one base that have the same modules and ranks.
    """
    budget = written.pair_bytes_after
    basis = error_at(lambda e: one_basis(splits, copies, e), budget, steps=7, low=ERROR / 2, high=4 * ERROR)
    result: dict[str, object] = {
        "bytes": budget,
        "joint per run": round(written.largest_error, 4),
        "each alone": round(_alone_error(splits, list(splits), budget), 4),
        "one basis for all of one base": round(basis, 4),
    }
    if vlora:
        paths = {s.name: s.path for group in groups for s in group if not s.copy_of and s.name in splits}
        runs = [{s.name: paths[s.name] for s in group if s.name in paths} for group in groups]
        for way, sets in (("runs", runs), ("bases", [paths])):
            alike = [[one[name] for name in names] for one in sets for names in by_form(splits, one)]
            result[f"vlora-dev, {way}"] = sum_up(run_vlora(vlora, alike, 0))
    return result


def by_form(splits: Mapping[str, Split], paths: Mapping[str, str]) -> list[list[str]]:
    """The names of adapters that vlora-dev can take together: equal names and shapes of modules, and equal ranks."""
    alike: dict[object, list[str]] = defaultdict(list)
    for name, path in paths.items():
        modules = loralens.load(path, strict=False).items()
        alike[tuple((module, update.shape, update.rank) for module, update in modules)].append(name)
    groups = [[name for name in names if any(u.energy for u in splits[name].values())] for names in alike.values()]
    return [names for names in groups if names]


def sum_up(answers: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """The bytes of vlora-dev over several groups, and the median errors of all adapters."""
    if "failed" in answers[0]:
        return dict(answers[0])
    errors = [[error for answer in answers for error in answer[key]] for key in ("errors", "errors in other gauges")]  # type: ignore[attr-defined]
    return {
        "groups": len(answers),
        "adapters": len(errors[0]),
        "bytes": sum(int(answer["bytes"]) for answer in answers),  # type: ignore[call-overload]
        "median error": round(median(errors[0]), 4),
        "largest error": round(max(errors[0]), 4),
        "median error in other gauges": round(median(errors[1]), 4),
    }


def forced(splits: Mapping[str, Split], names: Sequence[str], error: float) -> tuple[int, float]:
    """The bytes of one group with all of these adapters, and the median error."""
    updates = [list(splits[name].values()) for name in names if any(u.energy for u in splits[name].values())]
    if not updates:
        return 0, 0.0
    norms = [sum(update.energy for update in adapter) ** 0.5 for adapter in updates]
    units = [[u.divided(norm) for u in adapter] for adapter, norm in zip(updates, norms, strict=True)]
    ones = np.ones(len(units))  # norms: the steps are not written
    group = _Group(units, np.arange(len(units)), ones, FORCED * ones, error)
    best, worse = None, 0
    for factor in PRICES:
        coding = group.at(group.guess * factor)
        if coding is None or len(coding.members) < len(units):
            continue
        total = coding.shared_bytes + len(units) * coding.core_bytes
        if best is None or total < best[0]:
            best, worse = (total, float(median(coding.errors))), 0
        else:
            worse += 1
        if worse == 2:
            break
    if best is None:
        print(f"{names[0]} and {len(names) - 1} more: no price gives all of them {error:.3f}", file=sys.stderr)
        return sum(estimate_alone(splits[name], error=error) for name in names), error
    return best


def by_signature(splits: Mapping[str, Split]) -> list[list[str]]:
    """The names of adapters with the same modules, the most adapters first."""
    alike: dict[object, list[str]] = defaultdict(list)
    for name, split in splits.items():
        alike[tuple((key, update.shape) for key, update in split.items())].append(name)
    return sorted(alike.values(), key=len, reverse=True)


def _of_run(
    run: Sequence[FleetSource], splits: Mapping[str, Split], alone: Mapping[str, object], vlora: str | None
) -> dict[str, object]:
    """One run: bytes at one error, and errors at the bytes of the joint coding."""
    return compare([source.name for source in run], splits, alone, vlora, {s.name: s.path for s in run})


def compare(
    names: Sequence[str],
    splits: Mapping[str, Split],
    alone: Mapping[str, object],
    vlora: str | None,
    paths: Mapping[str, str] | None = None,
) -> dict[str, object]:
    """Bytes of each coding at one error, and the median errors of all codings at the bytes of the joint one."""
    names = max(by_signature({name: splits[name] for name in names}), key=len)
    names = [name for name in names if any(update.energy for update in splits[name].values())]
    numbers = sum(u.left.shape[1] * sum(u.shape) for name in names for u in splits[name].values())
    each = sum(alone[name].nbytes for name in names)  # type: ignore[attr-defined]
    joint, error = forced(splits, names, ERROR)
    result: dict[str, object] = {
        "first": names[0],
        "adapters": len(names),
        "alone": each,
        "joint": joint,
        "joint / alone": round(joint / each, 3),
        "of 16-bit pairs": [round(each / numbers / 2, 4), round(joint / numbers / 2, 4)],
        "error of alone at the bytes of joint": round(_alone_error(splits, names, joint), 4),
    }
    if vlora and paths:
        theirs = run_vlora(vlora, [[paths[name] for name in names]], joint)[0]
        result["vlora"] = theirs
        if "bytes" in theirs:
            # vlora-dev needs a mean and one component at least, which may take more bytes than the joint coding.
            budget = int(theirs["bytes"])  # type: ignore[call-overload]
            ours = joint_error(splits, names, budget) if budget > 1.05 * joint else error
            result["errors at the bytes of vlora"] = {
                "joint": round(ours, 4),
                "alone": round(_alone_error(splits, names, budget), 4),
            }
    return result


def _alone_error(splits: Mapping[str, Split], names: Sequence[str], budget: int) -> float:
    return error_at(lambda e: sum(estimate_alone(splits[n], error=e) for n in names), budget, steps=20)


def joint_error(splits: Mapping[str, Split], names: Sequence[str], budget: int) -> float:
    """The median error of a group within some bytes."""
    return forced(splits, names, error_at(lambda e: forced(splits, names, e)[0], budget, steps=5))[1]


def error_at(
    size: Callable[[float], int], budget: int, *, steps: int, low: float = 0.005, high: float = 0.995
) -> float:
    """The error at which a coding takes this many bytes."""
    for _ in range(steps):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if size(middle) <= budget else (middle, high)
    return high


def strangers(splits: Mapping[str, Split], alone: Mapping[str, object]) -> list[dict[str, object]]:
    """Adapters of one base by different authors: one of each repository (the name before the two underscores)."""
    rows = []
    for names in by_signature(splits):
        first = {name.split("__")[0]: name for name in reversed(names)}
        if len(first) > 3:
            rows.append(compare(list(first.values()), splits, alone, None))
    return rows


def new_adapter(splits: Mapping[str, Split], rank: int = 16) -> list[dict[str, object]]:
    """The error of an adapter in bases of ``rank`` columns that were made of the adapters of other authors."""
    rows = []
    for names in by_signature(splits):
        first = list({name.split("__")[0]: name for name in reversed(names)}.values())
        if len(first) < 4:
            continue
        errors = []
        for held in first:
            lost = total = 0.0
            others = [splits[name] for name in first if name != held]
            for key, update in splits[held].items():
                sides = [[(s[key].left, s[key].right * s[key].singular_values) for s in others if s[key].energy]]
                U, V = (
                    leading_directions(np.hstack([pair[i] / np.linalg.norm(pair[0]) for pair in sides[0]])).columns
                    for i in (0, 1)
                )
                C = (U[:, :rank].T @ update.left) @ (update.right.T @ V[:, :rank])
                lost, total = lost + update.energy - float(np.sum(C**2)), total + update.energy
            errors.append((lost / total) ** 0.5 if total else 0.0)
        rows.append({
            "first": first[0], "adapters": len(first), "median error": round(median(errors), 3),
            "least": round(min(errors), 3),
        })  # fmt: skip
    return rows


def run_vlora(python: str, groups: Sequence[Sequence[str]], budget: int) -> list[dict[str, object]]:
    """The errors of vlora-dev for several groups, each with 8-bit components within these bytes."""
    script = Path(__file__).with_name("fleet_vlora.py")
    words = [word for paths in groups for word in ("+", *paths)][1:]
    run = subprocess.run([python, script, str(budget), *words], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        return [{"failed": run.stderr.strip().splitlines()[-1:]}]
    return [json.loads(line) for line in run.stdout.splitlines()]


if __name__ == "__main__":
    main()
