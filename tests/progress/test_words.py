"""The lines and numbers that people see."""

from itertools import accumulate

import pytest

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.progress.plan import Plan
from fst_optimizer.progress.snapshot import Snapshot, advance
from fst_optimizer.progress.words import lines_of, panel
from helpers.recorded import events

COUNTS = {"fast": 30, "slow": 64, "eval": 16, "reused": 4}
SHARED = {"cycle": 0, "step": 1, "policy_version": 1, "time_s": 65.2, "rollouts": COUNTS}
STEP = {"kind": "step", **SHARED, "reward_mean": 0.25, "groups": 8, "flat_groups": 3, "updated": True, "note": ""}
FAST = {"kind": "fast", **SHARED, "proposals": 5, "accepted": 2, "population": 3, "best_score": 0.5, "frontier": 4}
ACCEPTED = {
    "kind": "accepted",
    "time_s": 30.0,
    "cycle": 0,
    "before": {"trim": "Answer the question."},
    "after": {"trim": "Answer the question. Drop \x1b[31mthe [red]last[/red] letter."},
    "score": 0.5,
    "parent_score": 0.125,
}


def started(*, method="fst", resumed=False, **fields):
    config = FSTConfig().with_values({"method": method, "budget.max_cycles": 4})
    return {
        "kind": "start",
        "time_s": 0.0,
        "run_dir": "runs/a",
        "resumed": resumed,
        "cycle": 0,
        "step": 0,
        "rollouts": dict.fromkeys(COUNTS, 0),
        "tokens": 0,
        "outcomes": {},
        "reward_mean": None,
        "val_score_before": None,
        "best": None,
        "score": None,
        "kl_to_base": 0.0,
        "plan": vars(Plan.of(config, val=64, test=0)),
        **fields,
    }


def phase(number, name, cycle=0, step=0, time_s=1.0):
    return {"kind": "phase", "phase": name, "cycle": cycle, "number": number, "step": step, "time_s": time_s}


def evaluated(score, cycle=0):
    return {"kind": "eval", **SHARED, "cycle": cycle, "split": "val", "score": score, "kl_to_base": 0.01}


def progressed(done, phase="slow", outcome="ok", time_s=2.0):
    shared = {"kind": "progress", "phase": phase, "done": done, "total": 64, "time_s": time_s}
    return {**shared, "outcome": outcome, "tokens": 10}


def lines(heard):
    """The lines of some events, without what is left."""
    snapshot, shown, last = Snapshot(), [], 0.0
    for event in heard:
        before, snapshot = snapshot, advance(snapshot, event)
        for line in lines_of(event, before, snapshot, last):
            shown.append(line.partition(";")[0])
            last = snapshot.time_s
    return shown


def snapshot_of(heard):
    *_, last = accumulate(heard, advance, initial=Snapshot())
    return last


def test_each_event_that_is_worth_one_is_a_line():
    heard = [
        started(),
        phase(0, "eval"),
        progressed(3, "eval"),
        evaluated(0.2),
        phase(1, "fast"),
        ACCEPTED,
        FAST,
        phase(2, "eval"),
        evaluated(0.5),
        phase(3, "slow"),
        STEP,
        {**STEP, "updated": False, "note": "", "failed": 3, "outcomes": {"ok": 61, "parse_error": 3}},
        phase(9, "eval"),
        evaluated(0.6),
    ]
    assert lines(heard) == [
        "[1:05] before the first cycle: val score 0.200, KL to base 0.0100",
        "[0:30] cycle 1 of 4: new instruction for trim, 0.125 -> 0.500 on the anchor",
        "    Answer the question. {+Drop \\x1b[31mthe [red]last[/red] letter.+}",
        "[1:05] cycle 1 of 4: prompts evolved, 5 proposed, 2 accepted, population 3, best 0.500 on the anchor, "
        "94 rollouts so far",
        "[1:05] cycle 1 of 4, new prompts: val score 0.500, KL to base 0.0100, the best so far",
        "[1:05] cycle 1 of 4, step 1 of 24: reward 0.250, 5 of 8 groups with signal",
        "[1:05] cycle 1 of 4, step 1 of 24: reward 0.250, 5 of 8 groups with signal, 3 failed (mostly parse_error), "
        "no update (every group was flat)",
        "[1:05] after cycle 1 of 4: val score 0.600, KL to base 0.0100, the best so far",
    ]


@pytest.mark.parametrize(
    ("decided", "said"),
    [
        ((12, 16, 0), "goes to prompts, up to 12 proposals: why"),
        ((0, 0, 3), "goes to weights, up to 3 steps: why"),
        ((0, 32, 3), "goes to candidates scored on 32 examples, then weights, up to 3 steps: why"),
        ((0, 0, 0), "goes to nothing: why"),
    ],
)
def test_what_was_decided_for_a_cycle_stands_before_its_first_line(decided, said):
    allocation = dict(zip(("proposals", "examples", "steps"), decided, strict=True))
    for line in (FAST, STEP):
        heard = [started(), phase(1, "fast"), {**line, "allocation": allocation, "reason": "why\x1b[31m"}]
        first, second = lines(heard)
        assert first == f"[1:05] cycle 1 of 4 {said}\\x1b[31m" and second.startswith("[1:05] cycle 1 of 4")


def test_the_plan_is_told_as_it_is():
    assert lines([{"kind": "plan", "time_s": 0.0, "text": "at most 10 rollouts"}]) == ["plan: at most 10 rollouts"]


def test_rl_has_no_cycle_0():
    heard = [started(method="rl"), phase(0, "eval"), evaluated(0.2), phase(3, "slow"), STEP, phase(9, "eval")]
    assert lines([*heard, evaluated(0.3)]) == [
        "[1:05] before the first cycle: val score 0.200, KL to base 0.0100",
        "[1:05] cycle 1 of 4, step 1 of 24: reward 0.250, 5 of 8 groups with signal",
        "[1:05] after cycle 1 of 4: val score 0.300, KL to base 0.0100, the best so far",
    ]


def test_a_resumed_run_shows_the_scores_that_it_had():
    had = {"val_score_before": 0.2, "best": 0.6, "score": 0.5, "kl_to_base": 0.03, "reward_mean": 0.4}
    start = started(
        resumed=True,
        cycle=1,
        step=8,
        time_s=200.0,
        rollouts=COUNTS,
        tokens=1234,
        outcomes={"ok": 90, "timeout": 4},
        **had,
    )
    assert lines([start]) == [
        "[3:20] resumed in cycle 2 of 4, after step 8: validation 0.500 (first 0.200, best 0.600), "
        "KL to base 0.0300, 94 rollouts so far"
    ]
    text = "\n".join(panel(snapshot_of([start]), 201.0))
    assert "validation 0.500 (first 0.200, best 0.600)   KL 0.0300" in text
    assert "reward 0.400" in text and "failed 4 of 94, mostly timeout   1,234 tokens" in text and "3:21 [" in text
    # A worse score after it is not the best so far.
    assert "best" not in lines([start, evaluated(0.55, cycle=1)])[-1]
    assert snapshot_of([start, evaluated(0.55, cycle=1)]).val_first == 0.2


def test_the_numbers_tell_phase_failures_tokens_and_pace():
    outcomes = ["ok"] * 5 + ["parse_error"] * 2 + ["truncated"]
    ended = [progressed(place + 1, outcome=one, time_s=7.0) for place, one in enumerate(outcomes)]
    text = panel(snapshot_of([started(), evaluated(0.2), FAST, phase(3, "slow", time_s=6.0), *ended]), 10.0)
    assert text == [
        "cycle 1 of 4   step 0 of 24   0:10 [........................]",
        "collecting rollouts, 8 of 64   2 rollouts/s",
        "reward -   frontier 4   validation 0.200 (first 0.200, best 0.200)   KL 0.0100",
        "rollouts fast 30 slow 72 eval 16   failed 3 of 8, mostly parse_error   80 tokens",
    ]
    assert panel(snapshot_of([started(), phase(3, "slow"), progressed(64)]), 3.0)[1].startswith("updating the weights")


def test_lines_and_numbers_are_of_one_clock():
    heard = list(events())
    for event, now in zip(heard, list(accumulate(heard, advance, initial=Snapshot()))[1:], strict=True):
        assert now.time_s == event["time_s"]
    assert panel(now, heard[-1]["time_s"])[0].startswith(
        "cycle 5 of 5   step 20 of 20   1:49 [########################]"
    )


def test_what_is_left_is_told_with_each_step():
    snapshot, told = Snapshot(), []
    for event in events():
        before, snapshot = snapshot, advance(snapshot, event)
        told += [line.partition("; ")[2] for line in lines_of(event, before, snapshot, 1e9) if ", step " in line]
    assert told[0] == "" and told[1].startswith("about 1:") and told[4].startswith("1:") and told[-1] == "0:06 left"


def test_a_long_phase_tells_how_far_it_is_every_minute():
    heard = [started(), phase(0, "eval"), *(progressed(one, "eval", time_s=one * 25.0) for one in range(1, 9))]
    assert lines(heard) == [f"[{minute}] validating, {done} of 64" for minute, done in (("1:15", 3), ("2:30", 6))]


def test_patience_makes_it_at_most():
    plan = started()["plan"] | {"may_end_early": True}
    first = [started(plan=plan), phase(3, "slow", time_s=1.0), progressed(64), phase(4, "slow", time_s=3.0)]
    assert "about at most " in panel(snapshot_of(first), 3.0)[0]


def test_a_cap_on_rollouts_makes_the_steps_a_guess():
    plan = started()["plan"] | {"max_rollouts": 1000}
    assert "step 0 of about " in panel(snapshot_of([started(plan=plan)]), 1.0)[0]


def test_a_server_that_starts_is_told_of_once():
    first = {"kind": "waiting", "seconds": 1.0, "text": "loading \x1b[31mweights"}
    assert lines([first, first]) == ["starting vLLM, which takes half a minute or more ..."]
    after = advance(Snapshot(), first)
    assert panel(after, 0.0) == ["starting vLLM, 0:01: loading \\x1b[31mweights"]
    assert advance(after, started()).waiting == ""


def test_events_of_an_unknown_kind_are_passed_over():
    assert lines([{"kind": "new", "time_s": 3.0}]) == []
    assert advance(Snapshot(val_best=0.5), {"kind": "new", "time_s": 3.0}) == Snapshot(val_best=0.5, time_s=3.0)
