"""What is kept of a comparison: one small row a run, in the form that all experiments share.

`{command, versions, commits, settings, rows: [...]}` with a row on each line. The results page is made from such files
alone, so a row has all that the page says of a run: scores, costs, the validation curve, the instructions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.formats import GIVEN
from fst_optimizer.config.overrides import flat
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import UserError
from fst_optimizer.evolve.reflection_lm import recorded_name
from fst_optimizer.lab.methods import reads_feedback
from fst_optimizer.store.files import read_json, writing
from fst_optimizer.task_kit import split_kind

if TYPE_CHECKING:
    from fst_optimizer.lab.compare import ComparedRun

DIGITS = 4
"""Of scores, KL and shares in a row: test scores over 256 examples differ by 0.004 at the least."""
REMARKS = "remarks.md"
"""Beside the kept JSON: what people have to say of the runs, such as why one was left out. The page takes it over."""
SETTLED = ("seed", "method")
"""Settings that a row tells itself."""


def parts_of(task: str) -> tuple[str, str, str]:
    """Family, rule and kind of feedback of a task: `programs/letters:sort-rotate+shown` has all three.

    A task of one's own has its folder's name, `default` and `told`: its feedback as it is.
    """
    place, _, variant = task.partition(":")
    family = place.rstrip("/").replace(".", "/").rpartition("/")[2] or place
    try:
        rule, kind = split_kind(variant)
    except ValueError:  # a variant of one's own with a plus
        rule, kind = variant, "told"
    return family, rule or "default", kind


def run_row(run: ComparedRun) -> dict[str, Any]:
    """A run of a comparison as one row of plain values."""
    result, recorded = run.result, run.recorded
    family, rule, kind = parts_of(result["task"])
    program, counts = recorded.get("program") or {}, result["rollouts"]
    ends = {point.rollouts for point in run.end_curve}
    return {
        "task": result["task"],
        "family": family,
        "rule": rule,
        "kind": kind,
        "method": run.method,
        "seed": run.seed,
        "cap": recorded["config"]["budget"]["max_rollouts"],
        "start": start_of(recorded),
        "seed_instructions": program.get("instructions"),
        "given_instructions": bool(program.get(GIVEN)),
        "reads_feedback": reads_feedback(run.method, recorded["config"]),
        "reflector": recorded_name(recorded),
        "commit": recorded.get("commit"),
        "val_examples": run.val_examples,
        "test_examples": (recorded["data"].get("test") or {}).get("examples"),
        **{name: rounded(result[name]) for name in ("val_score_before", "val_score_after")},
        **{name: rounded(result[name]) for name in ("test_score_before", "test_score_after", "kl_to_base")},
        "fast": counts["fast"],
        "slow": counts["slow"],
        "eval": counts["eval"],
        "steps": result["steps"],
        "cycles": result["cycles"],
        "reflection_calls": result["reflection_calls"],
        "seconds": round(result["wall_s"], 1),
        "ended": result["ended"],
        **{name: rounded(value) for name, value in run.search.items()},
        "instructions": dict(result["candidate"]),
        # The fourth number: whether the point is the end of a cycle, where all methods are evaluated.
        "curve": [
            [point.rollouts, rounded(point.score), rounded(point.kl), int(point.rollouts in ends)]
            for point in run.curve
        ],
    }


def start_of(recorded: Mapping[str, Any]) -> str:
    """What all methods of a comparison share at the start, as one short code: the policy's weights and the data."""
    data = {split: found.get("inputs", found["sha256"]) for split, found in recorded["data"].items() if found}
    text = json.dumps([recorded["policy"].get("fingerprint"), data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def rounded(value: Any) -> Any:
    """Numbers as they are kept, inside lists and objects too; anything else as it is."""
    if isinstance(value, Mapping):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def own_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that are not the defaults, by dotted name."""
    defaults = flat(FSTConfig().to_dict())
    return {
        name: value
        for name, value in flat(config).items()
        if name not in SETTLED and value != defaults.get(name, object())
    }


# -- files ------------------------------------------------------------------------------------------------------------


def find_kept(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """By name, every JSON file with rows in these folders, and what their comparisons come to.

    A folder that `fst lab compare --out` left has `compare.json` files in it or one level below: together they are one
    file of rows, named after the folder.

    Raises:
        UserError: A folder has neither, or two files have one name.
    """
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        own = {
            path.stem: {**data, "rows": rounded(data["rows"])}
            for path in sorted(folder.glob("*.json"))
            if has_rows(data := read_json(path))
        }
        own.pop("compare", None)
        paths = [path for path in (folder / "compare.json", *sorted(folder.glob("*/compare.json"))) if path.exists()]
        if paths:
            own[folder.resolve().name] = gathered([read_json(path) for path in paths])
        if not own and not (folder / REMARKS).exists():  # with remarks it is a folder to keep, still empty
            raise UserError(
                f"{folder} has no JSON file with rows and no compare.json: make one with "
                f"fst lab compare ... --out {folder}"
            )
        if twice := sorted(found.keys() & own.keys()):
            raise UserError(f"two files are called {twice[0]!r}, in {folder} and before: rename one")
        found |= own
    return found


def has_rows(data: Mapping[str, Any]) -> bool:
    """Whether a JSON object is a comparison's or an experiment's: a list of rows, each of a task."""
    rows = data.get("rows")
    return isinstance(rows, list) and all(isinstance(row, dict) and "task" in row for row in rows)


def gathered(comparisons: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of several `compare.json` as one file of rows."""
    commands = dict.fromkeys(one["command"] for one in comparisons if one.get("command"))
    settings: dict[str, Any] = {}
    rows = []
    for one in comparisons:
        rows += [row for row in one["rows"] if row not in rows]  # several kinds share a run that reads no feedback
        for row in one["rows"]:
            by_method = settings.setdefault(row["family"], {})
            by_method.setdefault(row["method"], own_settings(one["settings"][row["method"]]))
    return {
        "command": "\n".join(commands),
        "versions": comparisons[0]["versions"],
        "commits": sorted({row["commit"] for row in rows if row["commit"]}),
        "model": sorted({one["model"] for one in comparisons}),
        "settings": settings,
        "rows": rows,
    }


def keep(kept: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write each into the folder, under its name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, data in kept.items():
        path = folder / f"{name}.json"
        with writing(path):
            path.write_text(kept_text(data), encoding="utf-8", errors="backslashreplace")
        paths.append(path)
    return paths


def kept_text(data: Mapping[str, Any]) -> str:
    """JSON with a row on each line: small, and a change of one run is a change of one line."""
    head = [f"{json.dumps(name)}: {_json(value)}" for name, value in data.items() if name != "rows"]
    rows = ",\n".join(_json(row) for row in data["rows"])
    return "{\n" + ",\n".join([*head, f'"rows": [\n{rows}\n]']) + "\n}\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def commands_of(kept: Iterable[Mapping[str, Any]]) -> list[str]:
    """The commands that the files were made by, each once and on one line."""
    lines = [line for data in kept for line in str(data.get("command", "")).split("\n") if line.strip()]
    return list(dict.fromkeys(lines))
