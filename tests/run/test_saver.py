"""The saver: which journal belongs to which checkpoint, and what a resume puts back."""

import errno
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fst_optimizer.errors import StorageError
from fst_optimizer.failpoints import inject, raising
from fst_optimizer.run.saver import Saver
from fst_optimizer.run.state import Best, State
from fst_optimizer.store.files import ADAPTER_TENSORS, RunFiles
from fst_optimizer.store.journal import Journal
from fst_optimizer.store.metrics import MetricsLog, read_metrics
from fst_optimizer.testing import move_adapter
from fst_optimizer.types import Candidate, Outcome, Population, Rollout, RolloutCounts

SEED = Candidate({"answer": "Say it."})
STATE = State(population=Population((SEED,)), best=Best(SEED, 0), tokens=70)
KEY = (0, SEED.id, "train-0", 0, 1.0, False)
ROLLOUT = Rollout(SEED.id, "train-0", 0, 0, Outcome.OK, 0.5)


class FakeMeter:
    resumed = None

    def resume(self, state, elapsed_s):
        self.resumed = {"tokens": state.tokens, "elapsed_s": elapsed_s}


@pytest.fixture
def run(scripted, tmp_path):
    """Makes the saver of a run in `tmp_path`, as each of its processes does; its parts are attributes of it."""

    def make():
        files = RunFiles(tmp_path)
        return Saver(
            files,
            scripted(lambda prompt, request: ""),
            None,
            MetricsLog(files.metrics),
            FakeMeter(),
            (SimpleNamespace(journal=Journal()),),
            2,
        )

    return make


def journal_of(saver):
    (one,) = saver.journaled
    return one.journal


def metrics_line(saver, step):
    saver.metrics.line("step", cycle=0, step=step, policy_version=0, rollouts=RolloutCounts())


def test_each_checkpoint_has_a_number_and_a_journal_of_its_own(run):
    saver = run()
    for number in (1, 2):
        saver.commit(STATE)
        assert saver.number == number
        assert journal_of(saver).path == saver.files.journal(number)


def test_a_resume_finds_the_state_and_what_the_unfinished_phase_had_done(run):
    saver = run()
    saver.commit(replace(STATE, step=1))
    saver.commit(replace(STATE, step=2))
    journal_of(saver).add_rollout(KEY, ROLLOUT)
    saver.close()

    resumed = run()
    assert resumed.resume() == replace(STATE, step=2)
    assert resumed.number == 2
    assert journal_of(resumed).rollout(KEY) == ROLLOUT
    assert resumed.meter.resumed["tokens"] == 70


def test_changed_settings_make_the_unfinished_phase_run_anew(run):
    saver = run()
    saver.commit(STATE)
    journal_of(saver).add_rollout(KEY, ROLLOUT)
    saver.close()
    resumed = run()
    assert resumed.resume(changed=True) == STATE
    assert journal_of(resumed).rollout(KEY) is None


def test_a_resume_cuts_the_metrics_to_those_of_the_checkpoint(run):
    saver = run()
    metrics_line(saver, 1)
    saver.commit(STATE)
    metrics_line(saver, 2)
    resumed = run()
    resumed.resume()
    assert [line["step"] for line in read_metrics(resumed.files.metrics)] == [1]


def test_the_clock_goes_on_from_the_last_thing_that_was_written(run):
    saver = run()
    saver.metrics.resume(0, None, saved_s=0.0, elapsed_s=100.0)
    saver.commit(STATE)
    saver.metrics.resume(0, None, saved_s=0.0, elapsed_s=500.0)
    journal_of(saver).add_rollout(KEY, ROLLOUT)
    saver.close()
    resumed = run()
    resumed.resume()
    assert 500 <= resumed.meter.resumed["elapsed_s"] <= resumed.metrics.time_s < 600


def test_a_commit_that_fails_leaves_the_checkpoint_before_and_its_journal(run):
    saver = run()
    saver.commit(replace(STATE, step=1))
    before = journal_of(saver)
    full = OSError(errno.ENOSPC, "No space left on device")
    with inject("files.write", raising(full), times=1), pytest.raises(StorageError, match="No space left"):
        saver.commit(replace(STATE, step=2))
    assert (saver.number, journal_of(saver)) == (1, before)
    assert run().resume() == replace(STATE, step=1)


def test_damage_between_two_commits_shows_at_the_resume(run, caplog):
    saver = run()
    move_adapter(saver.policy)
    version = saver.policy.publish()
    saver.commit(replace(STATE, policy_version=version))
    path = saver.files.policy(version) / ADAPTER_TENSORS
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    saver.commit(replace(STATE, policy_version=version, step=1))
    with pytest.raises(ValueError, match=f"{ADAPTER_TENSORS} is damaged or missing"):
        run().resume()


def test_a_finished_run_keeps_no_journal(run):
    saver = run()
    saver.commit(STATE)
    journal_of(saver).add_rollout(KEY, ROLLOUT)
    saver.close()
    assert saver.files.journal(1).exists()
    saver.finish()
    assert not saver.files.journal(1).exists()
