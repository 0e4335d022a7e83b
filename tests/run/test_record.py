import json
import subprocess
from dataclasses import replace

import dspy
import pytest

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import UserError
from fst_optimizer.run.record import changes, check_same_run, code_commit, describe_run, digest, result_of
from fst_optimizer.run.state import Best, State
from fst_optimizer.store.tally import FirstError, Tally
from fst_optimizer.types import Candidate, Population, RolloutCounts, items_of


def items(*questions, split="train"):
    return items_of([dspy.Example(question=q, answer="a").with_inputs("question") for q in questions], split)


@pytest.fixture
def describe(scripted):
    policy = scripted(lambda prompt, request: "", seed=3)

    def describe(config=None, train=("a", "b"), task="Program"):
        found = describe_run(config or FSTConfig(), policy, task, items(*train), items("v", split="val"))
        return json.loads(json.dumps(found))

    return describe


def test_the_description_is_plain_json_with_versions_and_digests(describe, tiny_model):
    found = describe()
    assert found["policy"]["model"] == str(tiny_model)
    assert found["format"] == 2
    assert found["policy"]["seed"] == 3
    assert found["policy"]["lora"]["rank"] == 16
    assert found["data"]["train"]["examples"] == 2
    assert found["versions"].keys() >= {"python", "dspy", "gepa", "torch", "transformers", "peft"}
    assert FSTConfig.from_dict(found["config"]) == FSTConfig()


def test_the_commit_of_a_checkout_is_told_and_whether_its_files_are_others(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("a")
    assert code_commit(package) is None

    def git(*arguments):
        own = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", "-C", tmp_path, *own, *arguments], check=True, capture_output=True, text=True)

    git("init", "-q")
    assert code_commit(package) is None  # no commit yet
    git("add", "package")
    git("commit", "-q", "-m", "one", "--no-verify")
    head = git("rev-parse", "HEAD").stdout
    assert head.startswith(code_commit(package)) and len(code_commit(package)) == 10
    (tmp_path / "notes").write_text("not of the package")
    assert not code_commit(package).endswith("+")
    (package / "a.py").write_text("b")
    assert code_commit(package).endswith("+")


def test_examples_that_ask_the_same_have_the_same_inputs_whatever_else_they_say(describe):
    kinds = [[dspy.Example(question="q", kind=kind).with_inputs("question")] for kind in ("told", "shown")]
    one, other = (digest(items_of(examples, "train")) for examples in kinds)
    assert one["inputs"] == other["inputs"] and one["sha256"] != other["sha256"]
    # A run of before has no hash of the inputs alone, and goes on.
    now = describe()
    before = json.loads(json.dumps(now))
    del before["data"]["train"]["inputs"], before["data"]["val"]["inputs"]
    assert changes(before, now) == []


def test_another_commit_does_not_keep_a_run_from_being_resumed(describe):
    before = describe()
    assert changes(before | {"commit": "another"}, before) == []


def test_the_same_run_may_go_on_from_another_place(describe):
    before, now = describe(), describe()
    now["policy"] |= {"model": "/elsewhere/model", "engine": "vllm", "start_version": 4}
    now["config"]["run"]["grace_s"] = 99.0
    now["config"]["monitors"]["kl"] = "pause"
    now["config"]["rollout"]["num_threads"] = 3
    assert changes(before, now) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": FSTConfig(seed=1)}, "config.seed: 0 -> 1"),
        ({"config": FSTConfig().with_values({"train.lr": 0.5})}, r"config.train.lr: 0.001 -> 0.5"),
        ({"train": ("a", "c")}, "data.train.sha256"),
        ({"train": ("b", "a")}, "data.train.sha256"),
        ({"task": "Other"}, "task: 'Program' -> 'Other'"),
    ],
)
def test_a_run_with_other_settings_or_data_is_not_resumed(describe, change, named):
    with pytest.raises(UserError, match=named):
        check_same_run(changes(describe(), describe(**change)), allowed=False)


def test_a_setting_that_an_older_run_has_not_is_read_as_its_default(describe):
    before, now = describe(), describe()
    del before["config"]["train"]["average"], before["config"]["fast"]["patience"], before["config"]["monitors"]
    assert changes(before, now) == []
    now["config"]["train"]["average"] = "prompt"
    assert changes(before, now) == ["config.train.average: 'token' -> 'prompt'"]


def test_a_run_with_another_adapter_or_sampling_limit_is_not_resumed(describe):
    before, now = describe(), describe()
    now["policy"]["lora"]["alpha"] = 64
    now["policy"]["max_tokens"] = 7
    with pytest.raises(UserError, match=r"policy.lora.alpha: 32 -> 64; policy.max_tokens: 512 -> 7"):
        check_same_run(changes(before, now), allowed=False)


def test_another_library_is_a_change_and_can_be_allowed(describe, caplog):
    before, now = describe(), describe()
    now["versions"]["torch"] = "9.9"
    with pytest.raises(UserError, match=r"versions.torch: '.*' -> '9.9'.*--allow-changes"):
        check_same_run(changes(before, now), allowed=False)
    check_same_run(changes(before, now), allowed=True)
    assert "another versions.torch" in caplog.text


def test_the_result_tells_the_best_pair():
    candidate = Candidate({"answer": "Say it."})
    state = State(
        population=Population((candidate,)),
        best=Best(candidate, 5, 0.75, 0.125),
        cycle=2,
        step=12,
        policy_version=12,
        rollouts=RolloutCounts(10, 20, 30, 4),
        val_score_before=0.25,
        ended="done",
        tally=Tally({"ok": 59, "timeout": 1}, FirstError("timeout", "late", "val-1")),
    )
    found = result_of(FSTConfig(seed=9), "Program", state, 60.5)
    assert found | {"rollouts": None} == {
        "task": "Program",
        "method": "fst",
        "seed": 9,
        "val_score_before": 0.25,
        "val_score_after": 0.75,
        "test_score_before": None,
        "test_score_after": None,
        "rollouts": None,
        "steps": 12,
        "cycles": 2,
        "reflection_calls": 0,
        "cost_usd": 0.0,
        "lm_usage": {},
        "wall_s": 60.5,
        "kl_to_base": 0.125,
        "policy_version": 5,
        "candidate": {"answer": "Say it."},
        "ended": "done",
        "cap": None,
        "search_over": None,
        "unused_rollouts": None,
        "outcomes": {"ok": 59, "timeout": 1},
        "first_error": {"outcome": "timeout", "text": "late", "example": "val-1"},
        "tokens": 0,
        "alarms": [],
    }
    assert found["rollouts"] == {"fast": 10, "slow": 20, "eval": 30, "reused": 4}
    capped = FSTConfig().with_values({"method": "gepa", "budget.max_rollouts": 100})
    over = result_of(capped, "Program", replace(state, search_over="nothing new"), 60.5)
    assert (over["search_over"], over["unused_rollouts"]) == ("nothing new", 70)
