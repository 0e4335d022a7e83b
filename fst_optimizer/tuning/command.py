"""`fst tune`, step by step: join the study, have it worked on, say what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fst_optimizer.store.files import write_json
from fst_optimizer.tuning import output
from fst_optimizer.tuning.ask import Ask, Prepared
from fst_optimizer.tuning.confirm import confirmed, task_runs
from fst_optimizer.tuning.storage import open_storage
from fst_optimizer.tuning.study import check_folder, open_study
from fst_optimizer.tuning.workers import write_command

if TYPE_CHECKING:
    from optuna import Study

    from fst_optimizer.lab.launch import Tell


def join_study(ask: Ask, prepared: Prepared) -> Study:
    """The study, made or found, and what its workers need in its folder.

    Raises:
        UserError: the storage cannot be reached, or the study is another one.
    """
    if ask.storage is None:
        ask.folder.mkdir(parents=True, exist_ok=True)
    storage = open_storage(ask.url, ask.heartbeat_s)
    study, fresh = open_study(storage, ask.study, prepared.plan, prepared.presets)
    check_folder(ask.folder, fresh)
    ask.folder.mkdir(parents=True, exist_ok=True)
    write_json(ask.folder / "space.json", dict(ask.space))
    write_command(ask)
    return study


def finish(ask: Ask, prepared: Prepared, study: Study, command: str, tell: Tell) -> dict[str, Any]:
    """More seeds where they are asked for, then the files; the study's summary."""
    summary = {**output.summarized(study, prepared.plan), "command": command}
    if ask.repeats and summary["best"] is not None:
        summary.update(confirmed(summary, prepared, ask.folder, ask.repeats, task_runs(ask, prepared, tell)))
    paths = output.write_outputs(study, prepared.plan, summary, ask.folder)
    return {**summary, "paths": [str(path) for path in paths]}
