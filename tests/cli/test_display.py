import io
import re

import pytest
from rich.console import Console

from fst_optimizer.cli.display import Snapshot, advance, line_of, run_display, share_done
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.types import RolloutCounts

COUNTS = {"fast": 30, "slow": 64, "eval": 16, "reused": 4}
SHARED = {"cycle": 0, "step": 1, "policy_version": 1, "time_s": 65.2, "rollouts": COUNTS}
STEP = {"kind": "step", **SHARED, "reward_mean": 0.25, "groups": 8, "flat_groups": 3, "updated": True, "note": ""}
FAST = {"kind": "fast", **SHARED, "proposals": 5, "accepted": 2, "population": 3, "best_score": 0.5, "frontier": 4}


START = {"fast": 0, "slow": 0, "eval": 16, "reused": 0}


def evaluated(score, cycle=0, rollouts=COUNTS):
    return {
        "kind": "eval",
        **SHARED,
        "rollouts": rollouts,
        "cycle": cycle,
        "split": "val",
        "score": score,
        "kl_to_base": 0.01,
        "candidate": "a",
    }


def progressed(done, phase="slow"):
    return {"kind": "progress", "phase": phase, "done": done, "total": 64}


def test_a_snapshot_gathers_what_the_lines_say():
    snapshot = Snapshot()
    for event in [evaluated(0.2), FAST, STEP, evaluated(0.6, 1), evaluated(0.5, 2)]:
        snapshot = advance(snapshot, event)
    assert (snapshot.val_first, snapshot.val_score, snapshot.val_best) == (0.2, 0.5, 0.6)
    assert (snapshot.frontier, snapshot.reward, snapshot.cycle) == (4, 0.25, 2)
    assert snapshot.rollouts.training == 94


def test_the_share_done_is_that_of_the_nearer_limit():
    config = FSTConfig().with_values({"budget.max_cycles": 4, "budget.max_rollouts": 100, "train.steps_per_cycle": 2})
    # 1.5 of 4 cycles, and 60 of 100 rollouts.
    snapshot = Snapshot(cycle=1, step=3, rollouts=RolloutCounts(fast=20, slow=30), phase="slow", done=10)
    assert share_done(snapshot, config) == 0.6


def test_elsewhere_than_on_a_terminal_every_event_is_one_plain_line():
    out = io.StringIO()
    with run_display(Console(file=out, width=40), FSTConfig()) as callback:
        for event in [
            evaluated(0.2, rollouts=START),
            progressed(3),
            FAST,
            evaluated(0.5),
            STEP,
            {**STEP, "updated": False, "note": ""},
            evaluated(0.6, 1),
        ]:
            callback(event)
    lines = out.getvalue().splitlines()
    assert lines == [
        "loading the model ...",
        "[1:05] before the first cycle: val score 0.200, KL to base 0.0100",
        "[1:05] cycle 1: prompts evolved, 5 proposed, 2 accepted, population 3, best 0.500 on the anchor, "
        "94 rollouts so far",
        "[1:05] cycle 1: val score 0.500, KL to base 0.0100, the best so far",
        "[1:05] cycle 1, step 1: reward 0.250, 5 of 8 groups with signal",
        "[1:05] cycle 1, step 1: reward 0.250, 5 of 8 groups with signal, no update (every group was flat)",
        "[1:05] after cycle 1: val score 0.600, KL to base 0.0100, the best so far",
    ]


@pytest.fixture
def terminal():
    """Shows events, one a second by its clock, and returns what stands below the lines at the end."""

    def show(events, config, width=120):
        console = Console(file=io.StringIO(), width=width, force_terminal=True)
        with run_display(console, config) as callback:
            for seconds, event in enumerate(events):
                callback.get_time = lambda seconds=float(seconds): seconds
                callback(event)
            panel = Console(file=io.StringIO(), width=width)
            panel.print(callback)
        return panel.file.getvalue()

    return show


def test_on_a_terminal_bars_show_cycle_phase_reward_and_rollouts(terminal):
    text = terminal([evaluated(0.2), FAST, STEP, progressed(1), progressed(40)], FSTConfig())
    assert "cycle 1/10   step 1" in text and "collecting rollouts 40/64" in text and " left " in text
    assert "reward 0.250   frontier 4   validation 0.200 (first 0.200, best 0.200)   KL 0.0100" in text
    assert "rollouts fast 30 slow 64 eval 16" in text


def test_the_rate_is_of_this_phase_alone(terminal):
    slow = [progressed(done) for done in (1, 21, 41)]
    assert "   20 rollouts/s" in terminal(slow, FSTConfig())
    assert "   - rollouts/s" in terminal([*slow, progressed(1, "eval")], FSTConfig())


def test_what_is_left_follows_from_the_pace_since_this_start(terminal):
    config = FSTConfig().with_values({"budget.max_rollouts": 100})
    # 94 training rollouts came before; then 1, 2 and 3 of the last 6, one a second.
    text = terminal([evaluated(0.2), *(progressed(done) for done in (1, 2, 3))], config)
    assert "97%" in text and "left 0:00:03" in text.splitlines()[0]


def test_bars_and_numbers_fit_a_narrow_terminal(terminal):
    text = terminal([evaluated(0.2), FAST, STEP, progressed(1), progressed(40)], FSTConfig(), width=60)
    assert "collecting rollouts 40/64" in text and "62%" in text and re.search(r"0:\d\d:\d\d left", text)
    assert max(map(len, text.splitlines())) <= 60


def test_while_a_server_starts_its_log_is_all_there_is(terminal):
    waiting = {"kind": "waiting", "seconds": 1.0, "text": "loading [red]weights"}
    assert terminal([waiting], FSTConfig()).strip() == "starting vLLM, 0:01: loading [red]weights"
    assert "starting" not in terminal([waiting, progressed(1)], FSTConfig())


def test_progress_events_have_no_line_of_their_own():
    assert line_of(progressed(1), Snapshot()) is None


def test_a_server_that_starts_is_told_of_once():
    first = {"kind": "waiting", "seconds": 1.0, "text": "loading \x1b[31mweights"}
    assert "starting vLLM" in line_of(first, Snapshot())
    after = advance(Snapshot(), first)
    assert after.waiting == "starting vLLM, 0:01: loading \\x1b[31mweights"
    assert line_of(first, after) is None
