"""A phase as a transaction: done once, within the caps, a checkpoint after it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import Paused
from fst_optimizer.logs import KeptWarnings
from fst_optimizer.phases import Phases, commit, within_caps
from fst_optimizer.run.monitors import Alarm
from fst_optimizer.run.state import Best, State
from fst_optimizer.store.meter import BudgetSpent, Meter
from fst_optimizer.types import Candidate, Outcome, Population, Rollout, RolloutCounts

SEED = Candidate({"answer": "Say it."})
START = State(population=Population((SEED,)), best=Best(SEED, 0))


class Saver:
    def __init__(self):
        self.committed = []

    def commit(self, state):
        self.committed.append(state)


@pytest.fixture
def run():
    metrics, files = SimpleNamespace(stop_asked=False), SimpleNamespace(root="runs/one")
    config = FSTConfig().with_values({"monitors.kl": "pause"})
    parts = {"metrics": metrics, "files": files, "saver": Saver(), "warnings": KeptWarnings()}
    return SimpleNamespace(config=config, meter=Meter(config.budget), enter=lambda phase, state: None, **parts)


def roll(run, state, count=1, step=0):
    """A phase that executes some rollouts."""
    for index in range(count):
        run.meter.add(Rollout(SEED.id, "train-0", index, 0, Outcome.OK, 1.0))
    return replace(state, step=state.step + step)


def spend_then_hit_a_cap(run, state):
    roll(run, state, 3, step=1)
    raise BudgetSpent("max_tokens")


def test_every_phase_is_committed_with_its_number(run):
    phase = Phases(run, done=0)
    state = phase(START, roll, 2, kind="fast")
    state = phase(state, roll, 3, kind="eval")
    state = phase(state, roll, 4, kind="slow")
    assert [one.phase for one in run.saver.committed] == [1, 2, 3]
    assert [one.rollouts for one in run.saver.committed] == [
        RolloutCounts(fast=2),
        RolloutCounts(fast=2, eval=3),
        RolloutCounts(fast=2, eval=3, slow=4),
    ]


def test_phases_behind_the_checkpoint_are_not_done_again(run):
    phase = Phases(run, done=2)
    resumed = replace(START, phase=2, step=7)
    assert phase(resumed, roll, kind="fast") is resumed
    assert phase(resumed, roll, kind="eval") is resumed
    assert not run.saver.committed and run.meter.rollouts == RolloutCounts()
    assert phase(resumed, roll, kind="slow").phase == 3
    assert run.meter.rollouts == RolloutCounts(slow=1)


def test_a_cap_inside_a_phase_gives_the_state_before_it_with_what_was_spent(run):
    after = within_caps(run, replace(START, step=5), "slow", spend_then_hit_a_cap)
    assert (after.step, after.ended, after.cap) == (5, "budget", "max_tokens")
    assert after.rollouts == RolloutCounts(slow=3)


def test_the_first_cap_is_the_one_that_is_named(run):
    after = within_caps(run, replace(START, ended="budget", cap="max_steps"), "eval", spend_then_hit_a_cap)
    assert after.cap == "max_steps"


def test_once_ended_a_run_spends_nothing_and_still_does_what_spends_nothing(run):
    phase = Phases(run, done=0)
    state = phase(replace(START, ended="budget"), roll, kind="slow")
    assert run.meter.rollouts == RolloutCounts()
    assert phase(state, lambda run, state: replace(state, cycle=9)).cycle == 9


def test_a_callback_that_stops_the_run_ends_it_before_the_next_phase(run):
    phase = Phases(run, done=0)
    state = phase(START, roll, kind="fast")
    run.metrics.stop_asked = True
    state = phase(state, roll, kind="slow")
    assert (state.ended, state.rollouts) == ("stopped", RolloutCounts(fast=1))


def test_rollouts_outside_of_any_phase_count_as_evaluations(run):
    roll(run, START)
    with run.meter.charging("slow"):
        roll(run, START)
        with run.meter.charging("fast"):
            roll(run, START, 2)
        roll(run, START)
    assert run.meter.rollouts == RolloutCounts(fast=2, slow=2, eval=1)


def test_alarms_are_logged_once_and_pause_where_the_settings_say_so(run, caplog):
    warned = commit(run, replace(START, alarms=(Alarm("flat", "nothing was learned"),)))
    assert warned.alarms == () and "monitor flat: nothing was learned" in caplog.text
    with pytest.raises(Paused, match=r"monitor kl: far away\. Resume to go on all the same .*'runs/one'"):
        commit(run, replace(START, alarms=(Alarm("kl", "far away"),)))
    assert len(run.saver.committed) == 2  # the checkpoint is written first


def test_what_was_warned_of_is_in_the_state_each_once(run):
    run.warnings.texts["the disk is slow"] = None
    first = commit(run, replace(START, warnings=("a key is missing",)))
    assert first.warnings == ("a key is missing", "the disk is slow") == commit(run, first).warnings
