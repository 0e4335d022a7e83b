from dataclasses import replace

import pytest
import torch

from fst_optimizer.config import TrainConfig
from fst_optimizer.engines.base import Generation, GenerationRequest
from fst_optimizer.errors import UserError
from fst_optimizer.run.files import RunFiles, read_json, write_json
from fst_optimizer.run.state import Best, State, commit, restore
from fst_optimizer.testing import as_row, move_adapter
from fst_optimizer.types import Candidate, Population, RolloutCounts, Usage

SEED = Candidate({"answer": "Say it."})
STATE = State(population=Population((SEED,), 0, {SEED.id: {"train-1": 0.5}}), best=Best(SEED, 0, 0.5, 0.0))
ROWS = [as_row(GenerationRequest((1, 2, 3), 4), Generation((4, 5), (-3.0, -4.0), "stop"))]


@pytest.fixture
def policy(scripted):
    return scripted(lambda prompt, request: "")


@pytest.fixture
def files(tmp_path):
    return RunFiles(tmp_path)


def save(files, state, policy, trainer=None):
    commit(files, state, policy, trainer, elapsed_s=12.5, metrics_size=345)


def at(version, best=0, cycle=1):
    return replace(STATE, cycle=cycle, policy_version=version, best=Best(SEED, best, 0.75, 0.1))


def test_a_state_survives_json():
    state = replace(at(3, best=2), step=6, batch=6, rollouts=RolloutCounts(1, 2, 3, 4), ended="budget")
    state = replace(state, reflection_cost_usd=None, usage={"openai/judge": Usage(3, 100, 40, 20)})
    assert State.from_json(state.to_json()) == state


def test_a_restored_run_is_the_committed_one(files, policy, scripted):
    trainer = policy.trainer(TrainConfig())
    trainer.step(ROWS)
    first = policy.publish()
    trainer.step(ROWS)
    second = policy.publish()
    save(files, at(second, best=first), policy, trainer)
    tensors = policy.tensors(second)

    fresh = scripted(lambda prompt, request: "", seed=99)
    fresh_trainer = fresh.trainer(TrainConfig())
    found = restore(files, fresh, fresh_trainer)
    assert (found.state, found.elapsed_s, found.metrics_size) == (at(second, best=first), 12.5, 345)
    assert (fresh.version, fresh.engine.versions()) == (second, {0, first, second})
    assert all(torch.equal(tensors[name], tensor) for name, tensor in fresh.tensors(second).items())
    trainer.step(ROWS)
    fresh_trainer.step(ROWS)
    assert policy.publish() == fresh.publish() == 3
    assert all(torch.equal(policy.tensors(3)[name], tensor) for name, tensor in fresh.tensors(3).items())


def test_only_what_the_state_names_is_kept_on_disk(files, policy):
    for cycle in (1, 2, 3):
        move_adapter(policy, seed=cycle)
        policy.publish()
        save(files, at(cycle, best=1, cycle=cycle), policy)
    assert sorted(path.name for path in (files.root / "policy").iterdir()) == ["policy-000001", "policy-000003"]
    assert [path.name for path in (files.root / "checkpoint").iterdir()] == ["cycle-000003"]
    assert read_json(files.state)["checkpoint"] == "checkpoint/cycle-000003"
    assert policy.engine.versions() == {0, 1, 3}


def test_the_base_needs_no_adapter_on_disk(files, policy):
    save(files, STATE, policy)
    assert not (files.root / "policy").exists()
    assert restore(files, policy, None).state == STATE


def test_a_crash_before_the_last_write_leaves_the_previous_state(files, policy, monkeypatch):
    move_adapter(policy, seed=1)
    save(files, at(policy.publish()), policy)

    def fail(path, data):
        if path == files.state:
            raise OSError("the disk is full")
        write_json(path, data)

    monkeypatch.setattr("fst_optimizer.run.state.write_json", fail)
    move_adapter(policy, seed=2)
    with pytest.raises(OSError, match="full"):
        save(files, at(policy.publish(), cycle=2), policy)
    assert restore(files, policy, None).state == at(1)


def test_a_version_written_after_the_last_state_is_not_taken_for_the_new_one_of_its_number(files, policy, scripted):
    move_adapter(policy, seed=1)
    save(files, at(policy.publish()), policy)
    move_adapter(policy, seed=2)
    policy.save_version(policy.publish(), files.policy(2))  # and then the power went

    fresh = scripted(lambda prompt, request: "")
    restore(files, fresh, None)
    move_adapter(fresh, seed=3)
    assert fresh.publish() == 2
    save(files, at(2, cycle=2), fresh)
    again = scripted(lambda prompt, request: "")
    restore(files, again, None)
    assert all(torch.equal(fresh.tensors(2)[name], tensor) for name, tensor in again.tensors(2).items())


def test_a_policy_that_went_on_after_the_checkpoint_is_put_back(files, policy):
    move_adapter(policy, seed=1)
    save(files, at(policy.publish()), policy)
    before = policy.tensors(1)
    for seed in (2, 3):
        move_adapter(policy, seed=seed)
        policy.publish()
    restore(files, policy, None)
    assert (policy.version, policy.engine.versions()) == (1, {0, 1})
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.tensors(1).items())
    assert policy.publish() == 2


def test_a_state_of_another_format_is_refused(files, policy):
    write_json(files.state, {"format": 99})
    with pytest.raises(UserError, match="format 99, this version reads 1"):
        restore(files, policy, None)
