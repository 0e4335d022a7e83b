"""What a stream's rows, table and matrix say, worked by hand; which tasks and settings are refused; a command's run."""

import pytest

from fst_optimizer import UserError
from fst_optimizer.lab.plan import Common
from fst_optimizer.lab.stream import check_streams, check_tasks, forgetting, stage_rows, stream_jobs, table
from fst_optimizer.store.files import read_json
from helpers.figures import is_png
from helpers.fst import LETTERS, fst

SECOND = "programs/letters:reverse-drop"


def line(kind, stage, fast, slow, score=None, switch=False):
    found = {"kind": kind, "stage": stage, "rollouts": {"fast": fast, "slow": slow, "eval": 5, "reused": 0}}
    if kind == "eval":
        found |= {"split": "val", "score": score, "kl_to_base": 0.1}
    return found | ({"switch": True} if switch else {})


LINES = [
    line("eval", "a", 0, 0, 0.1),
    line("step", "a", 16, 24, switch=True),  # none was there
    line("eval", "a", 16, 84, 0.8),
    line("eval", "b", 16, 84, 0.2),
    line("fast", "b", 40, 84, switch=True),
    line("eval", "b", 40, 84, 0.44),
    line("step", "b", 40, 100, switch=True),  # told before
    line("eval", "b", 40, 130, 0.5),
    line("eval", "b", 40, 160, 0.48),
]
END = {"candidate": {}, "policy_version": 1, "kl_to_base": 0.3}
RESULT = {
    "stage_scores_before": {"a": 0.1, "b": 0.0},
    "stages": [
        {**END, "name": "a", "rollouts": 100, "scores": {"a": 0.8, "b": 0.2}},
        {**END, "name": "b", "rollouts": 200, "scores": {"a": 0.3, "b": 0.48}},
    ],
}


def test_a_row_says_what_a_stage_came_to():
    first, second = stage_rows(RESULT, LINES)
    assert (first["score_before"], first["score"], first["score_at_the_end"]) == (0.1, 0.8, 0.3)
    assert first["forgotten"] == pytest.approx(0.5) and second["forgotten"] == 0
    assert (second["start"], second["rollouts"], second["score_before"]) == (100, 100, 0.2)
    # .9 of the best, .5, is .45: first reached 70 rollouts after the stage began.
    assert (second["best"], second["recovered_rollouts"]) == (0.5, 70)


def test_the_first_switch_after_a_stage_began_is_the_one_and_all_others_are_false():
    first, second = stage_rows(RESULT, LINES)
    assert (first["detected"], first["delay"], first["false_alarms"]) == (False, None, 1)
    assert (second["detected"], second["delay"], second["false_alarms"]) == (True, 24, 1)
    quiet = [{name: value for name, value in one.items() if name != "switch"} for one in LINES]
    assert [(row["detected"], row["false_alarms"]) for row in stage_rows(RESULT, quiet)] == [(False, 0), (False, 0)]


def test_table_and_matrix_are_means_over_runs():
    runs = ((0.0, "one"), (0.1, "two"))
    rows = [
        {**row, "method": "fst", "run": run, "score": row["score"] + more}
        for more, run in runs
        for row in stage_rows(RESULT, LINES)
    ]
    _, ((method, count, score, end, forgotten, recover, noticed, delay, false),) = table(rows)
    assert (method, count, score, end, forgotten) == ("fst", "2", "0.690", "0.390", "0.250")
    assert (recover, noticed, delay, false) == ("70", "2 of 2", "24", "4")
    assert forgetting(rows) == (["a", "b"], [[0.1, 0.0], [0.8, 0.2], [0.3, 0.48]])


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ([LETTERS], "give two or more tasks"),
        ([LETTERS, LETTERS], "each once"),
        ([LETTERS, "programs/letters:pipeline"], "other predictors and fields"),
        ([LETTERS, "programs/star_graph"], "metrics of their own"),
    ],
)
def test_tasks_that_are_no_stream_are_refused(tasks, said):
    with pytest.raises(UserError, match=said):
        check_tasks(tasks)


def test_a_run_with_too_few_rollouts_a_stage_is_refused_before_it_is_made(tmp_path):
    jobs = stream_jobs([LETTERS, SECOND], tmp_path, ["rl"], [0], 2, Common(4), {})
    with pytest.raises(UserError, match=r"budget\.stage_rollouts is 2: .* at least those of one step"):
        check_streams(jobs)


def test_a_baseline_makes_no_stream(tmp_path):
    said = fst("lab", "stream", LETTERS, SECOND, "--methods", "sft", "--out", tmp_path)
    assert said.exit_code == 2 and "--methods has 'sft'" in said.output


def test_a_stream_from_the_command_line(tmp_path):
    small = ["train.steps_per_cycle=2", "rollout.batch_size=2", "policy.max_tokens=32", "fast.anchor_size=4"]
    small += ["fast.max_rollouts=8", "fast.population=1", "eval.kl_examples=2", "run.dry_run=false"]
    sets = [word for pair in small for word in ("--set", pair)]
    command = ["lab", "stream", LETTERS, SECOND, "--methods", "fst", "--stage-rollouts", 40, "--train-size", 12]
    command += ["--val-size", 4, "--out", tmp_path, *sets]
    said = fst(*command)
    assert said.exit_code == 0, said.output
    data = read_json(tmp_path / "stream.json")
    assert [row["task"] for row in data["rows"]] == [LETTERS, SECOND] and set(data) == {"command", "versions", "rows"}
    assert {"method", "rule", "kind", "seed"} < set(data["rows"][0]) and is_png(tmp_path / "stream.png")
    assert all(set(row["scores"]) == {LETTERS, SECOND} for row in data["rows"])
    again = fst(*command)
    assert again.exit_code == 0 and "1 of 1 runs were finished before" in again.output
