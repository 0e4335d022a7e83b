import io

from rich.console import Console

from fst_optimizer.cli.display import Snapshot, advance, display, line_of, share_done
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
    for now_s, event in enumerate([evaluated(0.2), FAST, STEP, evaluated(0.6, 1), evaluated(0.5, 2)]):
        snapshot = advance(snapshot, event, float(now_s))
    assert (snapshot.val_first, snapshot.val_score, snapshot.val_best) == (0.2, 0.5, 0.6)
    assert (snapshot.frontier, snapshot.reward, snapshot.cycle) == (4, 0.25, 2)
    assert snapshot.rollouts.training == 94


def test_the_rate_is_counted_from_the_start_of_the_phase():
    snapshot = advance(advance(Snapshot(), progressed(1), 10.0), progressed(21), 14.0)
    assert snapshot.rate == 21 / 4
    assert advance(snapshot, progressed(1, "eval"), 15.0).rate is None


def test_the_share_done_is_that_of_the_nearer_limit():
    config = FSTConfig().with_values({"budget.max_cycles": 4, "budget.max_rollouts": 100, "train.steps_per_cycle": 2})
    # 1.5 of 4 cycles, and 60 of 100 rollouts.
    snapshot = Snapshot(cycle=1, step=3, rollouts=RolloutCounts(fast=20, slow=30), phase="slow", done=10)
    assert share_done(snapshot, config) == 0.6


def test_elsewhere_than_on_a_terminal_every_event_is_one_plain_line():
    out = io.StringIO()
    with display(Console(file=out, width=40), FSTConfig()) as callback:
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
        "[1:05] before the first cycle: val score 0.200, KL to base 0.0100",
        "[1:05] cycle 1: prompts evolved, 5 proposed, 2 accepted, population 3, best 0.500 on the anchor, "
        "94 rollouts so far",
        "[1:05] cycle 1: val score 0.500, KL to base 0.0100, the best so far",
        "[1:05] cycle 1, step 1: reward 0.250, 5 of 8 groups with signal",
        "[1:05] cycle 1, step 1: reward 0.250, 5 of 8 groups with signal, no update (every group was flat)",
        "[1:05] after cycle 1: val score 0.600, KL to base 0.0100, the best so far",
    ]


def test_on_a_terminal_the_panel_shows_cycle_reward_and_rate():
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    with display(console, FSTConfig()) as callback:
        for event in [evaluated(0.2), FAST, STEP, progressed(1), progressed(40)]:
            callback(event)
        panel = Console(width=120, file=io.StringIO())
        panel.print(callback)
    text = panel.file.getvalue()
    assert "cycle 1/10" in text and "collecting rollouts 40/64" in text and "rollouts/s" in text
    assert "reward 0.250   frontier 4   validation 0.200" in text


def test_progress_events_have_no_line_of_their_own():
    assert line_of(progressed(1), Snapshot()) is None


def test_a_server_that_starts_is_told_of_once():
    first = {"kind": "waiting", "seconds": 1.0, "text": "loading \x1b[31mweights"}
    assert "starting vLLM" in line_of(first, Snapshot())
    after = advance(Snapshot(), first, 1.0)
    assert after.waiting == "starting vLLM, 0:01: loading \\x1b[31mweights"
    assert line_of(first, after) is None
