import io

import pytest
from rich.console import Console

from fst_optimizer.cli.tune import closing, shown_trials
from fst_optimizer.tuning import confirm
from fst_optimizer.tuning.report import cells, pruning_text, report, short_params
from fst_optimizer.tuning.study import study_name
from fst_optimizer.tuning.summary import best_trial, unpruned_rollouts


def row(trial, state="complete", score=0.5, rollouts=100, **more):
    empty = dict.fromkeys(("origin", "pruned", "cause", "error", "run", "retry_of", "seconds", "values"))
    return {**empty, "trial": trial, "state": state, "params": {"train.lr": 1e-3 * trial}, "score": score} | {
        "rollouts": rollouts,
        **more,
    }


def test_a_row_says_why_a_trial_was_given_up_or_failed():
    assert (
        cells(row(3, "pruned", pruned="0.412 at 768 rollouts (hyperband)"))[-1] == "0.412 at 768 rollouts (hyperband)"
    )
    assert cells(row(4, "fail", score=None, cause="out of memory"))[3:] == ["-", "100", "out of memory"]
    assert cells(row(5, retry_of=4, origin="preset light"))[-1] == "again trial 4, preset light"


def test_what_a_failure_wrote_cannot_command_the_terminal():
    assert "\x1b" not in cells(row(1, "fail", cause="bad\x1b[2J"))[-1]


def test_parameters_have_short_names():
    params = {
        "train.steps_per_cycle": 6,
        "lora.alpha / lora.rank": 2,
        "train.lr": 0.0021437,
        "fast.population of 1, 2": 2,
    }
    assert short_params(params) == "T 6, alpha/r 2, lr 0.00214, K 2"


def test_each_change_is_printed_once_and_nothing_that_was_over_before():
    out = io.StringIO()
    with shown_trials(Console(file=out, width=200), 4, 100) as update:
        update([row(0), row(1, "running", score=None), row(2, "waiting")])
        update([row(0), row(1, "running"), row(2, "waiting")])
        update([row(0), row(1, "pruned", pruned="low"), row(2, "fail", score=None, cause="diverged")])
    assert out.getvalue().splitlines() == [
        "trial 1 running: lr 0.001",
        "trial 1 pruned: score 0.500, 100 rollouts (low)",
        "trial 2 fail: score -, 100 rollouts (diverged)",
    ]


def test_a_terminal_has_a_bar_with_finished_trials_and_their_rollouts():
    out = io.StringIO()
    with shown_trials(Console(file=out, width=160, force_terminal=True), 4, 100) as update:
        update([row(0), row(1, "pruned", rollouts=30), row(2, "running", score=0.25, rollouts=40)])
    assert "2/4" in out.getvalue() and "170 rollouts" in out.getvalue()


def test_the_leading_configurations_are_complete_and_different():
    rows = [row(0, score=0.9), row(1, "pruned", score=1.0), row(2, score=0.95), row(3, score=0.7), row(4, score=0.8)]
    rows[3]["params"] = rows[2]["params"]
    assert [one["trial"] for one in confirm.leading(rows)] == [2, 0, 4]
    assert best_trial(rows) == 2 and best_trial(rows[1:2]) is None
    assert best_trial([row(1), row(0)]) == 0  # the earliest of equals


def test_the_best_mean_wins():
    assert confirm.pick({4: [0.5, 0.7], 7: [0.61, 0.61], 9: [0.9, 0.2]}) == 7
    assert confirm.pick({7: [0.6], 4: [0.6]}) == 4


def test_a_difference_is_larger_than_the_noise_where_its_interval_leaves_zero_out():
    # Mean 0.1, standard error 0.0058; t(0.975, 2) = 4.30: 0.1 ± 0.025.
    found = confirm.comparison([0.71, 0.80, 0.9], [0.6, 0.7, 0.81])
    assert found["difference"]["mean"] == pytest.approx(0.1)
    assert found["difference"]["low"] == pytest.approx(0.0752, abs=1e-3)
    assert found["verdict"] == "better than the preset, by more than the noise"
    assert confirm.verdict([-0.1, -0.11, -0.09]) == "worse than the preset, by more than the noise"
    assert confirm.verdict([0.3, -0.1, 0.1]) == "no difference from the preset that is larger than the noise"
    assert confirm.verdict([0.3]) == "one seed does not tell a difference from noise"


def test_names_of_studies():
    assert study_name("programs/letters:sort-rotate", 0) == "letters-sort-rotate-0"
    assert study_name("my.tasks.sums", 3) == "sums-3"
    assert study_name("programs/letters/", 1) == "letters-1"


SUMMARY = {
    "study": "one",
    "task": "letters",
    "model": "model",
    "objectives": ["score"],
    "cap": 100,
    "space": {},
    "states": {"complete": 1, "pruned": 1},
    "rollouts": 130,
    "pruning": {"spent": 130, "unpruned": 200.0, "share": 0.35},
    "importance": {"train.lr": 1.0},
    "best": 0,
    "pareto": [],
    "trials": [row(0, score=0.9), row(1, "pruned", rollouts=30)],
}


def test_the_report_has_what_the_summary_has():
    text = report({**SUMMARY, "command": "fst tune letters --trials 2"})
    assert "Pruning saved 35% of the training rollouts: 130" in text
    assert "fst tune letters --trials 2" in text and "| train.lr | 1.000 |" in text
    assert pruning_text({**SUMMARY, "states": {"complete": 2}}) == ""


def test_the_closing_words_say_what_to_do_next(tmp_path):
    texts = [part for part in closing(SUMMARY, tmp_path, 2) if isinstance(part, str)]
    assert f"fst compile letters --config {tmp_path / 'best.json'}" in texts[-1]
    texts = [part for part in closing(SUMMARY, tmp_path, 9) if isinstance(part, str)]
    assert "no room for another trial" in texts[-1]


def test_what_pruning_saved_worked_by_hand():
    rows = [
        *[{"state": "complete", "rollouts": 100}] * 2,
        *[{"state": "pruned", "rollouts": 25}] * 2,
        {"state": "fail", "rollouts": 70},
    ]
    # 250 were spent; four trials of 100 without pruning.
    assert unpruned_rollouts(rows) == {"spent": 250, "unpruned": 400.0, "share": 0.375}
    assert unpruned_rollouts([{"state": "pruned", "rollouts": 3}]) is None
    assert unpruned_rollouts([{"state": "complete", "rollouts": 5}])["share"] == 0
