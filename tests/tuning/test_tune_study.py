"""Studies in this process, on an engine that is told what to say."""

import _thread
import json
from dataclasses import replace
from importlib.util import find_spec

import dspy
import optuna
import pytest

from fst_optimizer import FSTConfig, LoraConfig, UserError, tune
from fst_optimizer.config.overrides import Settings
from fst_optimizer.config.presets import preset
from fst_optimizer.errors import EngineDied, EngineError, FSTError, Paused, StorageError, TrainingError
from fst_optimizer.store.files import read_json
from fst_optimizer.tuning.objectives import objective_values
from fst_optimizer.tuning.request import with_cap
from fst_optimizer.tuning.runner import TrialRunner, failure_cause
from fst_optimizer.tuning.space import default_space
from fst_optimizer.tuning.storage import open_storage
from fst_optimizer.tuning.study import StudyPlan, distinct_presets
from fst_optimizer.tuning.worker import StudyStopped
from helpers.figures import is_png
from helpers.run_check import assert_as_designed
from helpers.tiny_study import (
    SETTINGS,
    SPACE,
    TEST,
    TRAIN,
    TRAINING,
    VAL,
    Program,
    answer,
    examples,
    metric,
    student_of,
    tuned,
)

STATES = ("complete", "pruned")


@pytest.fixture
def policy(scripted):
    return scripted(answer)


def states(result):
    return [row["state"] for row in result.summary["trials"]]


def load_study(folder, name="Program-0"):
    return optuna.load_study(study_name=name, storage=open_storage(f"sqlite:///{folder / 'study.db'}"))


# -- a study and what it leaves -----------------------------------------------------------------------------------


def test_every_trial_is_an_ordinary_run_directory(policy, tmp_path):
    result = tuned(policy, tmp_path, trials=3, values=TRAINING)
    assert result.ended == "done" and len(states(result)) == 3
    for row in result.summary["trials"]:
        run = tmp_path / "trials" / f"trial-{row['trial']:06d}"
        assert_as_designed(run)
        assert row["run"] == str(run)
        recorded, made = read_json(run / "result.json"), read_json(run / "config.json")
        assert (recorded["trial"], recorded["study"]) == (row["trial"], "Program-0")
        assert made["config"]["train"]["lr"] == row["params"]["train.lr"]
        assert made["policy"]["lora"]["rank"] == row["params"]["lora.rank"]
        assert made["policy"]["lora"]["alpha"] == row["params"]["lora.rank"] * row["params"]["lora.alpha / lora.rank"]
        assert recorded["rollouts"]["fast"] + recorded["rollouts"]["slow"] == row["rollouts"] <= 12
        assert row["values"] == [recorded["val_score_after"]]


def test_what_would_be_run_anyway_comes_first_and_once(policy, tmp_path):
    result = tuned(policy, tmp_path, trials=2)
    origins = [row["origin"] for row in result.summary["trials"]]
    # What is given is put over every preset, so that they differ in nothing that the space has.
    assert origins == ["own settings", None]
    first = result.summary["trials"][0]["params"]
    assert (first["train.lr"], first["rollout.group_size"], first["lora.rank"]) == (0.01, 2, 16)


def test_presets_are_called_so_where_the_space_reaches_them():
    presets = {f"preset {name}": with_cap(Settings(preset(name)), 2304) for name in ("light", "medium", "heavy")}
    plan = StudyPlan("task", presets["preset light"], default_space(), ("score",), 2304, presets=presets)
    found = distinct_presets(plan)
    # At one cap, medium is light; heavy differs in two settings that the space leaves alone.
    assert list(found) == ["preset light", "like preset heavy"]
    assert found["like preset heavy"]["fast.max_rollouts"] == 384
    small = replace(plan, settings=Settings(preset("light")), space={"train.lr": SPACE["train.lr"]})
    assert distinct_presets(small) == {"like preset light": {"train.lr": 1e-3}}


def test_a_study_goes_on_with_a_larger_number_and_reports_with_the_same(policy, tmp_path):
    first = tuned(policy, tmp_path, trials=2)
    asked = len(policy.engine.requests)
    again = tuned(policy, tmp_path, trials=2)
    assert len(policy.engine.requests) == asked
    assert again.summary == first.summary
    more = tuned(policy, tmp_path, trials=4)
    assert len(more.summary["trials"]) == 4
    assert more.summary["trials"][:2] == first.summary["trials"]
    fewer = tuned(policy, tmp_path, trials=1)
    assert len(fewer.summary["trials"]) == 4


def test_the_policy_and_the_program_are_as_before(policy, tmp_path):
    program = student_of(policy)
    before, requests = program.dump_state(), len(policy.engine.requests)
    tune(program, metric, TRAIN, VAL, trials=1, space=SPACE, config=SETTINGS, folder=tmp_path)
    assert len(policy.engine.requests) > requests
    assert program.dump_state() == before
    assert policy.version == 0 and policy.engine.versions() == {0}
    assert policy.lora == LoraConfig() and policy.rank == 16


def test_a_program_that_gets_its_lm_from_dspy_is_not_changed_either(policy, tmp_path):
    program = Program()
    with dspy.context(lm=policy.lm):
        tune(program, metric, TRAIN, VAL, trials=1, space=SPACE, config=SETTINGS, folder=tmp_path)
    assert program.answer.lm is None


def test_the_files_of_a_study(policy, tmp_path, plots):
    result = tuned(policy, tmp_path, trials=6, sampler="random")
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if "trials/" not in str(path)}
    plots = [f"plots/{name}.{kind}" for name in ("history", "slice", "curves") for kind in ("html", "png")]
    assert names >= {"best.json", "tune.json", "report.md", "study.db", *plots}
    assert all(is_png(path) for path in (tmp_path / "plots").glob("*.png"))
    assert read_json(tmp_path / "tune.json") == json.loads(json.dumps(result.summary))
    report = (tmp_path / "report.md").read_text()
    assert (report.count("\n| 0 |") == 1 and "6 complete" in report) or "pruned" in report
    best = read_json(tmp_path / "best.json")
    assert best["trial"] == result.best_trial
    assert FSTConfig.from_dict(best["config"]) == result.best_config
    assert result.best_score == max(row["score"] for row in result.summary["trials"] if row["state"] == "complete")


def test_importance_is_fanovas_over_complete_trials(policy, tmp_path, plots):
    result = tuned(policy, tmp_path, trials=8, sampler="random", pruner="none")
    if len({row["score"] for row in result.summary["trials"]}) > 1:
        assert sum(result.summary["importance"].values()) == pytest.approx(1)
        assert is_png(tmp_path / "plots" / "importance.png")
    assert result.study.user_attrs["fst"]["cap"] == 36


@pytest.mark.skipif(find_spec("optuna_dashboard") is None, reason="optuna-dashboard is not installed")
def test_the_dashboard_opens_a_study(policy, tmp_path):
    from optuna_dashboard import wsgi

    tuned(policy, tmp_path, trials=1)
    assert callable(wsgi(open_storage(f"sqlite:///{tmp_path / 'study.db'}")))


def test_a_journal_will_do_without_heartbeats(policy, tmp_path):
    result = tuned(policy, tmp_path / "a", trials=1, storage=f"journal:{tmp_path / 'journal.log'}")
    more = tuned(policy, tmp_path / "b", trials=2, storage=f"journal:{tmp_path / 'journal.log'}")
    assert len(result.summary["trials"]) == 1 and len(more.summary["trials"]) == 2
    assert [path.name for path in (tmp_path / "b" / "trials").iterdir()] == ["trial-000001"]
    more.study.ask()  # a worker that died: nobody will ever know
    left = tuned(policy, tmp_path / "c", trials=3, storage=f"journal:{tmp_path / 'journal.log'}")
    assert left.ended == "elsewhere" and states(left)[2] == "running"


# -- pruning ------------------------------------------------------------------------------------------------------


@pytest.fixture
def told_the_trial(monkeypatch):
    """Lets a metric know which trial runs."""
    run = TrialRunner.run

    def tell(marks):
        def counted(runner, settings, folder, *args, **kwargs):
            marks.trial = int(folder.name.split("-")[1])
            return run(runner, settings, folder, *args, **kwargs)

        monkeypatch.setattr(TrialRunner, "run", counted)
        return marks

    return tell


class Fading:
    """A metric that gives the first `good` trials full marks and the others none."""

    def __init__(self, good):
        self.good = good
        self.trial = 0

    def __call__(self, example, prediction, trace=None, pred_name=None, pred_trace=None):
        return float(self.trial < self.good)


def test_a_pruned_trial_stops_within_one_step_and_keeps_its_record(policy, tmp_path, lines, told_the_trial):
    marks = told_the_trial(Fading(good=4))
    values = {**TRAINING, "budget.max_rollouts": 36}
    result = tuned(policy, tmp_path, trials=8, pruner="median", metric=marks, values=values)
    pruned = [row for row in result.summary["trials"] if row["state"] == "pruned"]
    assert {row["trial"] for row in pruned} == {4, 5, 6, 7}
    for row in pruned:
        folder = tmp_path / "trials" / f"trial-{row['trial']:06d}"
        recorded, told = read_json(folder / "result.json"), lines(folder / "metrics.jsonl")
        spent = [line["rollouts"]["fast"] + line["rollouts"]["slow"] for line in told]
        # The first point of the grid is at 4 rollouts: the first line beyond it is the last one.
        assert spent[-1] > 4 and all(count <= 4 for count in spent[:-1])
        assert recorded["ended"] == "stopped" and recorded["pruned"] and row["rollouts"] == spent[-1]
        assert "at 4 rollouts (median)" in row["pruned"]
        assert_as_designed_but_short(folder)
    assert policy.engine.versions() == {0}
    assert result.summary["pruning"]["share"] > 0.3


def assert_as_designed_but_short(run):
    for name in ("config.json", "state.json", "metrics.jsonl", "program.json", "result.json"):
        assert (run / name).is_file(), name


def test_wilcoxon_prunes_by_the_scores_of_examples(policy, tmp_path, told_the_trial):
    marks = told_the_trial(Fading(good=1))
    result = tune(
        student_of(policy),
        marks,
        TRAIN,
        examples(6, 100),
        trials=2,
        space=SPACE,
        config=FSTConfig.from_dict(SETTINGS).with_values(TRAINING),
        folder=tmp_path,
        pruner="wilcoxon",
    )
    # Six examples that are all worse: p = 1/64.
    assert states(result) == ["complete", "pruned"]
    assert len(result.study.trials[0].user_attrs["scores"]["1"]) == 6


def test_several_objectives_are_never_pruned(policy, tmp_path, plots):
    result = tuned(policy, tmp_path, trials=6, objectives="score,rollouts,kl_to_base", values=TRAINING)
    assert set(states(result)) == {"complete"}
    rows = {row["trial"]: row["values"] for row in result.summary["trials"]}
    pareto = [row["trial"] for row in result.pareto]
    for number, (score, rollouts, kl) in rows.items():
        beaten = any(
            other != (score, rollouts, kl) and other[0] >= score and other[1] <= rollouts and other[2] <= kl
            for other in map(tuple, rows.values())
        )
        assert (number in pareto) == (not beaten)
    assert "## Pareto set" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "plots" / "pareto.html").is_file() and not (tmp_path / "plots" / "curves.html").exists()
    assert read_json(tmp_path / "best.json")["score"] == max(values[0] for values in rows.values())


# -- failures -----------------------------------------------------------------------------------------------------


class Failing:
    """The metric, but for some trials, which it fails."""

    def __init__(self, bad, error):
        self.bad, self.error, self.trial = set(bad), error, -1

    def __call__(self, example, prediction, trace=None, pred_name=None, pred_trace=None):
        if self.trial in self.bad:
            raise self.error
        return metric(example, prediction)


class Interrupting:
    """The metric, and one Ctrl-C in the second trial."""

    def __init__(self):
        self.pressed, self.trial = False, -1

    def __call__(self, example, prediction, trace=None, pred_name=None, pred_trace=None):
        if self.trial == 1 and not self.pressed:
            self.pressed = True
            _thread.interrupt_main()
        return metric(example, prediction)


def test_a_failed_trial_is_recorded_and_the_study_goes_on(policy, tmp_path, told_the_trial):
    failing = told_the_trial(Failing([1], ZeroDivisionError("no good")))
    result = tuned(policy, tmp_path, trials=3, metric=failing)
    assert states(result) == ["complete", "fail", *states(result)[2:]]
    assert sum(state in STATES for state in states(result)) == 3
    failed = result.summary["trials"][1]
    assert failed["cause"] == "metric" and "MetricError" in failed["error"]
    assert read_json(tmp_path / "trials" / "trial-000001" / "failure.json")["cause"] == "metric"


def test_the_same_cause_three_times_in_a_row_stops_the_study(policy, tmp_path, told_the_trial):
    failing = told_the_trial(Failing([1, 2, 3], ZeroDivisionError("no good")))
    with pytest.raises(
        StudyStopped, match=r"3 trials in a row failed of the same cause, metric: MetricError.*trial-000003"
    ):
        tuned(policy, tmp_path, trials=3, metric=failing)
    assert [trial.state.name for trial in load_study(tmp_path).trials] == ["COMPLETE", "FAIL", "FAIL", "FAIL"]
    # Whoever goes on has mended it: what failed before does not count again.
    assert tuned(policy, tmp_path, trials=3, metric=metric).ended == "done"


def test_memory_engine_and_training_are_told_apart():
    def caused(error, cause):
        error.__cause__ = cause
        return error

    class OutOfMemoryError(RuntimeError):
        pass

    assert failure_cause(caused(TrainingError("step 3"), OutOfMemoryError())) == "out of memory"
    assert failure_cause(MemoryError()) == "out of memory"
    assert failure_cause(TrainingError("not finite")) == "diverged"
    assert failure_cause(EngineDied("gone")) == failure_cause(EngineError("gone")) == "engine dead"
    assert failure_cause(StorageError("full")) == "disk"
    assert failure_cause(Paused("monitor kl")) == "paused by a monitor"
    assert failure_cause(UserError("no")) == "settings"
    assert failure_cause(ZeroDivisionError()) == "ZeroDivisionError"


def test_an_interrupted_trial_is_run_again_by_whoever_goes_on(policy, tmp_path, told_the_trial):
    stopping = told_the_trial(Interrupting())
    with pytest.raises(KeyboardInterrupt):
        tuned(policy, tmp_path, trials=3, metric=stopping)
    study = load_study(tmp_path)
    assert [trial.state.name for trial in study.trials][:2] == ["COMPLETE", "FAIL"]
    interrupted = study.trials[1]
    assert interrupted.user_attrs["cause"] == "interrupted"
    result = tuned(policy, tmp_path, trials=3)
    again = [row for row in result.summary["trials"] if row["retry_of"] == 1]
    assert [row["params"] for row in again] == [dict(interrupted.params)]
    assert sum(state in STATES for state in states(result)) == 3
    assert result.summary["trials"][-1]["trial"] == 3  # none was run that was not needed


def test_a_budget_caps_the_whole_study(policy, tmp_path):
    result = tuned(policy, tmp_path, trials=50, budget_rollouts=100, pruner="none")
    assert result.ended == "budget"
    assert result.summary["rollouts"] <= 100
    assert 2 <= len(result.summary["trials"]) < 50
    more = tuned(policy, tmp_path, trials=50, budget_rollouts=140, pruner="none")
    assert len(more.summary["trials"]) > len(result.summary["trials"])


# -- what bad input gets ------------------------------------------------------------------------------------------

OTHER_SPACE = {**SPACE, "train.lr": {"type": "float", "low": 1e-3, "high": 2e-1, "log": True}}
BAD = {
    "no trials": ({"trials": 0}, "trials is 0"),
    "half a trial": ({"trials": 1.5}, r"trials is 1\.5"),
    "repeats below 0": ({"repeats": -1}, "repeats is -1"),
    "repeats without a test set": ({"repeats": 2}, "testset is empty"),
    "no such sampler": ({"sampler": "tep"}, "did you mean 'tpe'"),
    "no such pruner": ({"pruner": "medain"}, "did you mean 'median'"),
    "no such objective": ({"objectives": "score,rolouts"}, "did you mean 'rollouts'"),
    "no score": ({"objectives": "rollouts"}, "give score"),
    "a sampler for one objective": ({"objectives": "score,rollouts", "sampler": "cmaes"}, "one objective"),
    "a budget for no trial": ({"budget_rollouts": 35}, "one trial may take 36"),
    "unknown setting": ({"space": {"train.lrr": SPACE["train.lr"]}}, r"did you mean 'train\.lr'"),
    "reversed range": ({"space": {"train.lr": {**SPACE["train.lr"], "low": 1.0}}}, "is reversed"),
    "empty range": ({"space": {"train.lr": {**SPACE["train.lr"], "low": 0.1}}}, "is empty"),
    "no database": ({"storage": "postgresql://me:secret@127.0.0.1:1/studies"}, r"cannot be reached"),
    "no driver": ({"storage": "sqlight:///study.db"}, r"storage is 'sqlight:///study.db': it cannot be reached"),
    "no URL": ({"storage": "study.db"}, "cannot be reached"),
    "no folder": ({"storage": "sqlite:////nowhere/at/all/study.db"}, "cannot be reached"),
}


@pytest.mark.parametrize(("options", "text"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_any_trial(policy, tmp_path, options, text):
    with pytest.raises(UserError, match=text) as refused:
        tuned(policy, tmp_path, **options)
    assert "secret" not in str(refused.value)
    assert policy.engine.requests == [] and not (tmp_path / "trials").exists()


OTHERS = {
    "space": ({"space": OTHER_SPACE}, r"another search space \(train\.lr\)"),
    "directions": ({"objectives": "score,rollouts"}, r"the directions \['maximize'\], not \['maximize', 'minimize'\]"),
    "settings": ({"values": {"rollout.batch_size": 1}}, r"config\.rollout\.batch_size 2, not 1"),
    "cap": ({"values": {"budget.max_rollouts": 40}}, "cap 36, not 40"),
    "reflection": ({"reflection_lm": dspy.LM("hosted_vllm/own")}, "reflection_lm None, not 'hosted_vllm/own'"),
}


@pytest.mark.parametrize(("options", "text"), OTHERS.values(), ids=OTHERS)
def test_a_study_that_exists_for_something_else_is_refused(policy, tmp_path, options, text):
    tuned(policy, tmp_path, trials=1)
    asked = len(policy.engine.requests)
    with pytest.raises(UserError, match=text):
        tuned(policy, tmp_path, trials=2, **options)
    assert len(policy.engine.requests) == asked


def test_another_objective_in_the_same_direction_is_another_study(policy, tmp_path):
    tuned(policy, tmp_path, trials=1, objectives="score,rollouts")
    with pytest.raises(UserError, match=r"objectives \['score', 'rollouts'\], not \['score', 'seconds'\]"):
        tuned(policy, tmp_path, trials=2, objectives="score,seconds")


def test_a_study_that_was_made_by_others_is_refused(policy, tmp_path, monkeypatch):
    monkeypatch.setattr("fst_optimizer.tuning.study.SETTLING_S", 0.0)
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    optuna.create_study(storage=storage, study_name="Program-0", direction="maximize")
    with pytest.raises(UserError, match="was not made by fst tune"):
        tuned(policy, tmp_path)


def test_a_folder_with_the_trials_of_another_study_is_refused(policy, tmp_path):
    tuned(policy, tmp_path, trials=1)
    with pytest.raises(UserError, match="holds the trials of another study"):
        tuned(policy, tmp_path, trials=1, study="another")


def test_a_program_that_is_trained_already_is_refused(policy, tmp_path):
    policy.publish()
    with pytest.raises(UserError, match="trials start from the base"):
        tuned(policy, tmp_path)


def test_unknown_dollars_fail_the_trial_and_say_so(policy, tmp_path):
    line = {"kind": "eval", "score": 0.5, "rollouts": {"fast": 3, "slow": 4}, "time_s": 2.0}
    result = {"val_score_after": 0.5, "cost_usd": None, "kl_to_base": 0.25}
    assert objective_values(("score", "rollouts", "seconds", "kl_to_base"), result, [line]) == [0.5, 7, 2.0, 0.25]
    with pytest.raises(FSTError, match=r"give budget\.prices"):
        objective_values(("score", "dollars"), result, [line])


# -- noise --------------------------------------------------------------------------------------------------------


def test_repeats_pick_the_winner_and_confirm_it_on_the_test_set(policy, tmp_path):
    result = tuned(policy, tmp_path, trials=3, repeats=2, testset=TEST)
    repeats, confirmation = result.summary["repeats"], result.summary["confirmation"]
    assert len(repeats) == 3 and all(len(one["scores"]) == 2 for one in repeats)
    assert result.best_trial == max(repeats, key=lambda one: (one["mean"], -one["trial"]))["trial"]
    assert confirmation["seeds"] == [2000, 2001] and confirmation["name"] == "own settings"
    for side in ("best", "preset"):
        label = f"trial-{result.best_trial:06d}" if side == "best" else "preset"
        runs = [tmp_path / "confirm" / f"{label}-seed{seed}" for seed in (2000, 2001)]
        scores = [read_json(run / "result.json")["test_score_after"] for run in runs]
        assert confirmation[side]["scores"] == scores
    assert confirmation["verdict"] in (tmp_path / "report.md").read_text()
    asked = len(policy.engine.requests)
    again = tuned(policy, tmp_path, trials=3, repeats=2, testset=TEST)
    assert len(policy.engine.requests) == asked  # the runs are there
    assert again.summary == result.summary


def test_no_trial_ever_sees_the_test_set(policy, tmp_path):
    tuned(policy, tmp_path, trials=2, testset=TEST)
    asked = {policy.engine.prompt_text(request) for request in policy.engine.requests}
    assert asked and not any(f"\nq20{n}" in prompt for prompt in asked for n in range(4))
