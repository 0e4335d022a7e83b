import json

import pytest

from fst_optimizer.config.formats import CONFIG_FORMAT, migrated, read_config
from fst_optimizer.config.overrides import read_settings, settled
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import UserError
from fst_optimizer.finished.load import read_finished
from fst_optimizer.finished.serve import server_settings
from fst_optimizer.run.record import changes
from fst_optimizer.task_run import RunRequest, plan_run
from fst_optimizer.tuning.study import settings_from_json

NOW = FSTConfig().with_values({"monitors.kl": "pause", "monitors.steps": 7}).to_dict()
THEN = {("guards" if name == "monitors" else name): value for name, value in NOW.items()}


def written(path, data):
    path.write_text(json.dumps(data))
    return path


def test_a_config_json_without_a_number_called_its_monitors_guards(tmp_path):
    found = read_config(written(tmp_path / "config.json", {"task": "t", "config": THEN, "policy": {}}))
    assert found == {"task": "t", "config": NOW, "policy": {}}
    assert changes(found, {"task": "t", "config": NOW, "policy": {}}) == []


def test_an_older_file_of_settings_is_read_wherever_settings_are(tmp_path):
    run = written(tmp_path / "config.json", {"task": "t", "config": THEN, "policy": {"max_tokens": 9}})
    plain = written(tmp_path / "settings.json", {"guards": {"kl": "pause", "steps": 7}})
    for path in (run, plain):
        assert settled(FSTConfig(), read_settings(path)).config.to_dict() == NOW


def test_a_file_with_the_number_is_taken_as_it_is(tmp_path):
    data = {"format": CONFIG_FORMAT, "config": THEN, "policy": {}}
    with pytest.raises(UserError, match=r"unknown setting 'guards.kl'; did you mean 'monitors.kl'\?"):
        settled(FSTConfig(), read_settings(written(tmp_path / "config.json", data)))


@pytest.mark.parametrize("number", [3, 0, "2", None])
def test_a_format_that_this_version_cannot_read_is_refused(tmp_path, number):
    path = written(tmp_path / "config.json", {"format": number, "config": NOW, "policy": {}})
    with pytest.raises(UserError, match=rf"config\.json: format {number}, this version reads 1 to 2; use the fst_opt"):
        read_config(path)


def test_a_run_that_an_earlier_version_began_is_planned_with_its_own_settings(tmp_path):
    recorded = {
        "task": "programs/letters",
        "config": THEN,
        "policy": {
            **{"model": "m", "engine": "torch", "lora": {"rank": 4}, "vllm": {"max_in_flight": 9}},
            **{"seed": 0, "max_tokens": 48},
        },
        "data": {split: {"examples": 8} for split in ("train", "val", "test")},
    }
    written(tmp_path / "config.json", recorded)
    plan = plan_run(RunRequest("programs/letters", tmp_path, resume=True))
    assert plan.settings.config.to_dict() == NOW
    assert (plan.settings.lora.rank, plan.settings.vllm.max_in_flight, plan.settings.policy.max_tokens) == (4, 9, 48)
    assert server_settings(tmp_path, ["vllm.max_in_flight=3"]).max_in_flight == 3
    written(tmp_path / "result.json", {"policy_version": 0, "task": "t", "method": "fst", "seed": 0})
    assert read_finished(tmp_path).config["config"] == NOW


def test_a_study_that_an_earlier_version_made_is_read():
    made = settings_from_json(migrated({"config": THEN, "policy": {"lora": {"rank": 4}, "max_tokens": 48}}))
    assert (made.config.to_dict(), made.lora.rank, made.policy.max_tokens) == (NOW, 4, 48)
