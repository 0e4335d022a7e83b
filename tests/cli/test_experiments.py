"""The paper's experiments from end to end, on letters runs that take seconds."""

import shutil

import pytest

from fst_optimizer import task_run
from fst_optimizer.lab import measuring
from fst_optimizer.lab.cells import comparison_jobs
from fst_optimizer.lab.plan import Common
from fst_optimizer.lab.plasticity import plasticity_jobs, starts_of
from fst_optimizer.store.files import RunFiles, read_json
from fst_optimizer.store.metrics import read_metrics
from fst_optimizer.task_run import Sizes
from helpers.figures import is_png
from helpers.fst import LETTERS, fst

CAP, SIZES = 64, (16, 8, 8)
SETS = (
    *("train.steps_per_cycle=1", "rollout.batch_size=2", "train.lr=0.003", "train.warmup_steps=0"),
    *("policy.max_tokens=32", "fast.anchor_size=4", "fast.max_rollouts=16", "eval.kl_examples=4"),
    *("run.keep_versions=2", "run.dry_run=false"),
)
COMMON = [
    *(word for pair in SETS if not pair.startswith("run.") for word in ("--set", pair)),
    *("--max-rollouts", CAP, "--train-size", SIZES[0], "--val-size", SIZES[1], "--test-size", SIZES[2]),
]
SECOND = "programs/letters:reverse-drop"
DRIFT = ["--probe-size", 2, "--kl-size", 1]
WITHOUT_HOOKS = """
from fst_optimizer.tasks import load_task

letters = load_task("programs/letters:reverse-drop")
metric, model, build_program, load = letters.metric, letters.model, letters.build_program, letters.load
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder as fst lab compare leaves it: two runs on one task."""
    root = tmp_path_factory.mktemp("runs")
    common = Common(CAP, SETS, sizes=Sizes(*SIZES))
    for job in comparison_jobs(LETTERS, root / "sort-rotate", ("fst", "rl"), (0,), common, {}):
        said = fst(*job.command()[1:])
        assert said.exit_code == 0, said.output
    return root


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(measuring, "load_policy", refuse)
    monkeypatch.setattr(task_run, "make_policy", refuse)


def outcome(out, name):
    """The rows of an experiment, which left what each leaves."""
    assert is_png(out / f"{name}.png")
    data = read_json(out / f"{name}.json")
    assert list(data) == ["command", "versions", "rows"] and data["versions"]["torch"]
    for row in data["rows"]:
        assert {"task", "method", "rule", "kind", "seed"} <= row.keys()
    return data["rows"]


def test_a_run_keeps_the_versions_that_it_is_told_to_with_their_checksums(made):
    files = RunFiles(made / "sort-rotate" / "rl-seed0")
    result = read_json(files.result)
    # Four steps of 16 rollouts, a cycle each, and a fifth that the cap leaves without one. Two ends at most, 2 apart.
    ends = [line["policy_version"] for line in read_metrics(files.metrics) if line["kind"] == "eval"][1:]
    assert len(ends) == result["cycles"] == 5 and ends == [1, 2, 3, 4, 4]
    wanted = {2, 4, result["policy_version"]} - {0}
    assert wanted <= {int(path.name.removeprefix("policy-")) for path in files.policy(0).parent.iterdir()}
    assert {f"policy/policy-{version:06d}/adapter_model.safetensors" for version in wanted} <= result["files"].keys()


def test_decompose_agrees_with_the_runs_and_measures_nothing_twice(made, tmp_path, monkeypatch):
    said = fst("lab", "decompose", "--runs", made, "--out", tmp_path)
    assert said.exit_code == 0, said.output
    rows = outcome(tmp_path, "decompose")
    assert [row["method"] for row in rows] == ["fst", "rl"]
    for row in rows:
        result = read_json(made / "sort-rotate" / f"{row['method']}-seed0" / "result.json")
        assert row["base"] == pytest.approx(result["test_score_before"])
        assert row["both"] == pytest.approx(result["test_score_after"])
        assert (row["rule"], row["kind"], row["examples"]) == ("sort-rotate", "told", 8)
    assert rows[1]["prompt"] == rows[1]["base"]  # rl keeps the task's own instructions

    monkeypatch.setattr(measuring, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    asked = ["lab", "decompose", LETTERS, "--runs", made, "--methods", "rl", "--seeds", 0, "--out", tmp_path]
    again = fst(*asked, *COMMON)
    assert again.exit_code == 0, again.output
    assert "1 of 1 runs were finished before" in again.stderr
    assert outcome(tmp_path, "decompose") == rows[1:]


def test_drift_is_measured_along_the_runs_and_goes_on_where_it_was_stopped(made, tmp_path, monkeypatch):
    asked = ["lab", "drift", LETTERS, "--runs", made, "--methods", "fst,rl", "--seeds", 0, *DRIFT, *COMMON]
    asked += ["--on", SECOND, "--on-size", 4]
    measure, measured = measuring.Bench.kls, []

    def stopped_at_the_fourth(bench, exam, version, size):
        measured.append(version)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return measure(bench, exam, version, size)

    monkeypatch.setattr(measuring.Bench, "kls", stopped_at_the_fourth)
    said = fst(*asked, "--out", tmp_path / "out")
    assert said.exit_code == 130 and "the same command goes on where this stopped" in said.stderr
    monkeypatch.setattr(measuring.Bench, "kls", measure)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "measured").iterdir()}
    assert before
    said = fst(*asked, "--out", tmp_path / "out")
    assert said.exit_code == 0, said.output
    assert {path: path.stat().st_mtime_ns for path in before} == before

    rows = outcome(tmp_path / "out", "drift")
    lines = read_metrics(made / "sort-rotate" / "rl-seed0" / "metrics.jsonl")
    rl = [row for row in rows if row["method"] == "rl"]
    assert {0, 2, 4} <= {row["cycle"] for row in rl if row["role"] == "own"}
    logged = {line["policy_version"]: line for line in lines if line["kind"] == "eval"}
    for row in rl:
        assert row["rollouts"] == 16 * row["cycle"]
        if row["role"] == "own":
            assert (row["score"], row["kl"]) == tuple(
                logged[row["policy_version"]][name] for name in ("score", "kl_to_base")
            )
        else:
            assert (row["kl"] > 0) == (row["policy_version"] > 0)
    probes = {row["on"] for row in rl if row["role"] == "probe"}
    assert len(probes) == 16 and {"sort", "reverse"} <= probes
    assert {row["on"] for row in rl if row["role"] == "other"} == {SECOND}
    at_base = [row["score"] for row in rl if row["role"] == "probe" and not row["policy_version"]]
    assert sum(at_base) / len(at_base) > 0.9  # what the model was pretrained on


def test_a_run_that_kept_nothing_along_the_way_and_a_task_without_probes_are_refused(made, tmp_path, no_model):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "task.py").write_text(WITHOUT_HOOKS)
    said = fst("lab", "drift", tmp_path / "own", "--out", tmp_path / "out")
    assert (
        said.exit_code == 2 and "has no probes, and drift is measured on prompts that all methods share" in said.stderr
    )
    shutil.copytree(made, tmp_path / "runs")
    files = RunFiles(tmp_path / "runs" / "sort-rotate" / "rl-seed0")
    for path in files.policy(0).parent.iterdir():  # as a run leaves it that was told to keep nothing
        if path.name != "policy-000004":
            shutil.rmtree(path)
    files.config.write_text(files.config.read_text().replace('"keep_versions": 2', '"keep_versions": 0'))
    files.result.write_text(
        files.result.read_text().replace('"files"', '"older"').replace('"policy_version": 2', '"policy_version": 4')
    )
    said = fst("lab", "drift", "--runs", tmp_path / "runs", "--methods", "rl", "--out", tmp_path / "out")
    assert said.exit_code == 2, said.output
    assert "kept 1 of 4 policy versions" in said.stderr and "--set run.keep_versions=8" in said.stderr
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_was_changed_is_not_measured(made, tmp_path, no_model):
    shutil.copytree(made / "sort-rotate" / "rl-seed0", tmp_path / "rl-seed0")
    files = RunFiles(tmp_path / "rl-seed0")
    spare = {2, 4} - {read_json(files.result)["policy_version"]}
    (files.policy(min(spare)) / "adapter_model.safetensors").write_bytes(b"another")
    said = fst("lab", "drift", "--runs", files.root, "--out", tmp_path / "out")
    assert said.exit_code == 2 and "is damaged, changed or missing" in said.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decompose"], "neither TASK nor --runs is given"),
        (["decompose", LETTERS, "--runs", "a", "--runs", "b"], "--runs is given 2 times, and TASK too"),
        (["decompose", LETTERS, "--methods", "dspy-gepa"], "has 'dspy-gepa', which leaves no weights to measure"),
        (["decompose", "--runs", "nowhere"], "--runs 'nowhere' has no finished run"),
        (["drift", LETTERS, "--on", "programs/none"], "no folder with a task.py"),
        (["plasticity", "--from", "nowhere", "--to", SECOND], "result.json: no such file"),
        (["ceiling", "nowhere"], "has no finished run"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_spent(tmp_path, no_model, arguments, message):
    said = fst("lab", *arguments, "--out", tmp_path / "out")
    assert said.exit_code == 2 and message in said.stderr, said.output
    assert not (tmp_path / "out").exists()


def start_options(source, run):
    return [
        "compile",
        SECOND,
        "--run-dir",
        run,
        "--method",
        "rl",
        "--start-from",
        source,
        *COMMON[:-8],
        "--set",
        f"budget.max_rollouts={CAP}",
        *COMMON[-6:],
        "--max-cycles",
        1,
    ]


def test_a_run_begins_with_the_weights_of_another_and_says_so(made, tmp_path):
    source, run = made / "sort-rotate" / "rl-seed0", tmp_path / "run"
    said = fst(*start_options(source, run))
    assert said.exit_code == 0, said.output
    began, left = read_json(run / "config.json")["policy"], read_json(source / "result.json")
    assert began["start_version"] == 1 and began["started_from"]["policy_version"] == left["policy_version"] > 0
    assert began["started_from"]["run_id"] == read_json(source / "config.json")["run_id"]
    first, *_, last = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "eval"]
    assert first["policy_version"] == 1 and first["kl_to_base"] > 0  # its own, of the weights that it begins with
    assert last["policy_version"] == 2
    scored = fst("eval", SECOND, "--run-dir", run)
    assert scored.exit_code == 0, scored.output

    # As if it had been killed: it goes on from its checkpoint, with the same start or none named, and no other.
    (run / "result.json").unlink()
    other = start_options(made / "sort-rotate" / "fst-seed0", run)
    said = fst(*other, "--resume")
    assert said.exit_code == 2 and "the run to resume began with other weights" in said.stderr
    said = fst("compile", SECOND, "--run-dir", run, "--resume")
    assert said.exit_code == 0, said.output
    assert read_json(run / "config.json")["policy"]["started_from"] == began["started_from"]
    # As if it had been killed before its first checkpoint: nothing in it has the weights.
    for name in ("result.json", "state.json"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoint")
    said = fst("compile", SECOND, "--run-dir", run, "--resume")
    assert said.exit_code == 2 and "give that again (--start-from)" in said.stderr
    said = fst(*start_options(source, run), "--resume")
    assert said.exit_code == 0, said.output
    again = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "eval"]
    assert (again[0]["policy_version"], again[0]["kl_to_base"]) == (1, pytest.approx(first["kl_to_base"], rel=1e-4))


def test_another_shape_than_the_start_has_is_refused(made, tmp_path, no_model):
    said = fst(*start_options(made / "sort-rotate" / "rl-seed0", tmp_path / "run"), "--set", "lora.rank=2")
    assert said.exit_code == 2 and "leave the lora settings out" in said.stderr


@pytest.mark.slow
def test_plasticity_goes_on_where_it_was_stopped_and_makes_what_lacks(made, tmp_path):
    sources = [made / "sort-rotate" / f"{method}-seed0" for method in ("fst", "rl")]
    common = Common(16, SETS, sizes=Sizes(*SIZES))
    for job in plasticity_jobs(SECOND, tmp_path / "out" / "reverse-drop", starts_of(sources), (5,), common)[:2]:
        said = fst(*job.command()[1:])
        assert said.exit_code == 0, said.output
    words = ["lab", "plasticity", "--to", SECOND, "--seeds", 5, "--out", tmp_path / "out", *COMMON]
    words[words.index("--max-rollouts") + 1] = 16
    words += [word for source in sources for word in ("--from", source)]
    said = fst(*words)
    assert said.exit_code == 0, said.output
    assert "2 of 3 runs were finished before" in said.stderr
    rows = outcome(tmp_path / "out", "plasticity")
    told = [(row["start"], row["seed"], row["method"]) for row in rows]
    assert told == [("fst", 5, "rl"), ("rl", 5, "rl"), ("base", 5, "rl")]
    assert [row["start_rule"] for row in rows[:2]] == ["sort-rotate"] * 2
    assert all(row["rollouts"] == 16 and row["rule"] == "reverse-drop" for row in rows)
    # Its KL to the base is not 0 at first, where the weights that it begins with are not the base's.
    assert [row["curve"][0][2] > 0 for row in rows] == [row.get("start_version", 0) > 0 for row in rows]
    assert rows[1]["start_version"] > 0
    shutil.copytree(made / "sort-rotate" / "rl-seed0", tmp_path / "other" / "fst-seed0")
    said = fst(*(tmp_path / "other" / "fst-seed0" if str(word).endswith("fst-seed0") else word for word in words))
    assert said.exit_code == 2 and "holds a run that began with other weights: give another --out" in said.stderr


def test_ceilings_are_told_of_comparisons_and_of_runs(tmp_path, made):
    said = fst("lab", "ceiling", made, "--out", tmp_path)
    assert said.exit_code == 0, said.output
    rows = outcome(tmp_path, "ceiling")
    assert [row["method"] for row in rows] == ["fst", "rl"]
    assert all(row["A"] is None and row["why"] for row in rows)
    assert rows[1]["why"] == "fewer than 5 evaluations after the start"
