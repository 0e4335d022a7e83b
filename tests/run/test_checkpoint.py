"""Checkpoints: what is written and read back, and what a crash or a damaged file leaves."""

import errno
import json
from dataclasses import replace

import pytest
import torch

from fst_optimizer.config.run import TrainConfig
from fst_optimizer.engines.base import Generation, GenerationRequest
from fst_optimizer.errors import StorageError, UserError
from fst_optimizer.failpoints import inject, raising
from fst_optimizer.run import checkpoint
from fst_optimizer.run.checkpoint import commit, last_whole, restore
from fst_optimizer.run.state import Best, State
from fst_optimizer.store.files import ADAPTER_TENSORS, RunFiles, read_json, write_json
from fst_optimizer.testing import as_row, move_adapter
from fst_optimizer.types import Candidate, Population

SEED = Candidate({"answer": "Say it."})
STATE = State(population=Population((SEED,), 0, {SEED.id: {"train-1": 0.5}}), best=Best(SEED, 0, 0.5, 0.0))
ROWS = [as_row(GenerationRequest((1, 2, 3), 4), Generation((4, 5), (-3.0, -4.0), "stop"))]
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def policy(scripted):
    return scripted(lambda prompt, request: "")


@pytest.fixture
def files(tmp_path):
    return RunFiles(tmp_path)


def save(files, state, policy, trainer=None, number=1, **options):
    commit(files, state, number, policy, trainer, elapsed_s=12.5, metrics_size=345, **options)


def at(version, best=0, cycle=1):
    return replace(STATE, cycle=cycle, policy_version=version, best=Best(SEED, best, 0.75, 0.1))


def three(files, policy, **options):
    """Three checkpoints, each with a version of its own."""
    for number in (1, 2, 3):
        move_adapter(policy, seed=number)
        policy.publish()
        save(files, at(number, best=1, cycle=number), policy, number=number, **options)
        files.journal(number).parent.mkdir(exist_ok=True)
        files.journal(number).write_text("")


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
    assert (found.number, found.elapsed_s, found.metrics_size) == (1, 12.5, 345)
    assert found.state == at(second, best=first)
    assert (fresh.version, fresh.engine.versions()) == (second, {0, first, second})
    assert all(torch.equal(tensors[name], tensor) for name, tensor in fresh.tensors(second).items())
    trainer.step(ROWS)
    fresh_trainer.step(ROWS)
    assert policy.publish() == fresh.publish() == 3
    assert all(torch.equal(policy.tensors(3)[name], tensor) for name, tensor in fresh.tensors(3).items())


def test_the_last_checkpoints_are_kept_with_what_they_name_and_the_best(files, policy):
    three(files, policy, keep=2)
    assert sorted(path.name for path in (files.root / "policy").iterdir()) == [f"policy-00000{n}" for n in (1, 2, 3)]
    assert sorted(path.name for path in (files.root / "checkpoint").iterdir()) == ["000002", "000003"]
    assert sorted(path.name for path in (files.root / "journal").iterdir()) == ["000002.jsonl", "000003.jsonl"]
    assert read_json(files.state)["checkpoint"] == "checkpoint/000003"
    assert policy.engine.versions() == {0, 1, 3}
    move_adapter(policy, seed=4)
    policy.publish()
    save(files, at(4, best=1, cycle=4), policy, number=4, keep=1)
    assert sorted(path.name for path in (files.root / "policy").iterdir()) == ["policy-000001", "policy-000004"]


def test_the_base_needs_no_adapter_on_disk(files, policy):
    save(files, STATE, policy)
    assert not (files.root / "policy").exists()
    assert restore(files, policy, None).state == STATE


@pytest.mark.parametrize("writes", range(4))
def test_a_disk_that_is_full_at_any_write_leaves_the_previous_state(files, policy, writes):
    trainer = policy.trainer(TrainConfig())
    move_adapter(policy, seed=1)
    save(files, at(policy.publish()), policy, trainer)
    move_adapter(policy, seed=2)
    version = policy.publish()
    with (
        inject("files.write", raising(FULL), after=writes),
        pytest.raises(StorageError, match=r"No space left.*resume"),
    ):
        save(files, at(version, cycle=2), policy, trainer, number=2)
    assert restore(files, policy, trainer).state == at(1)


def test_a_crash_just_before_the_last_write_leaves_the_previous_state(files, policy):
    move_adapter(policy, seed=1)
    save(files, at(policy.publish()), policy)
    move_adapter(policy, seed=2)
    version = policy.publish()
    with inject("files.commit", raising(KeyboardInterrupt())), pytest.raises(KeyboardInterrupt):
        save(files, at(version, cycle=2), policy, number=2)
    assert restore(files, policy, None).state == at(1)
    assert not files.policy(2).exists()


def test_a_version_written_after_the_last_state_is_not_taken_for_the_new_one_of_its_number(files, policy, scripted):
    move_adapter(policy, seed=1)
    save(files, at(policy.publish()), policy)
    move_adapter(policy, seed=2)
    policy.save_version(policy.publish(), files.policy(2))  # and then the power went

    fresh = scripted(lambda prompt, request: "")
    restore(files, fresh, None)
    move_adapter(fresh, seed=3)
    assert fresh.publish() == 2
    save(files, at(2, cycle=2), fresh, number=2)
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
    with pytest.raises(UserError, match="format 99, this version reads 2"):
        restore(files, policy, None)


def flip(path):
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damaged",
    [
        "state.json",
        "checkpoint/000003/optimizer.safetensors",
        "checkpoint/000003/trainer.json",
        "policy/policy-000003/adapter_model.safetensors",
        "policy/policy-000003/adapter_config.json",
    ],
)
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_file_costs_one_checkpoint_and_the_user_is_told(files, policy, caplog, damaged, damage):
    three(files, policy)
    path = files.root / damaged
    if damage == "flipped":
        flip(path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        path.unlink()
    found = restore(files, policy, None)
    assert (found.number, found.state) == (2, at(2, best=1, cycle=2)) if damaged != "state.json" else (3, at(3, 1, 3))
    assert path.name in caplog.text
    assert "going on from" in caplog.text
    assert policy.publish() == found.state.policy_version + 1


def test_a_run_without_a_whole_checkpoint_is_refused_with_what_is_wrong(files, policy):
    three(files, policy, keep=1)
    flip(files.policy(3) / ADAPTER_TENSORS)
    with pytest.raises(
        UserError, match=r"no checkpoint that is whole: policy/policy-000003/adapter_model.safetensors is damaged"
    ):
        last_whole(files)


@pytest.mark.parametrize(
    "name", ["../outside/adapter_model.safetensors", "/etc/passwd", "policy/policy-000003/../../x"]
)
def test_a_path_out_of_the_run_directory_is_not_followed(files, policy, name):
    three(files, policy, keep=1)
    for path in (files.state, files.checkpoint(3) / "state.json"):
        content = read_json(path)
        content["files"][name] = "0" * 64
        write_json(path, content | {"sha256": checkpoint._digest(content)})
    with pytest.raises(UserError, match="which is no file of a run"):
        last_whole(files)


@pytest.mark.parametrize("name", ["../elsewhere", "checkpoint/../../elsewhere", "/tmp"])
def test_a_checkpoint_elsewhere_is_not_read(files, policy, name):
    three(files, policy, keep=1)
    content = read_json(files.state) | {"checkpoint": name}
    write_json(files.state, content | {"sha256": checkpoint._digest(content)})
    assert last_whole(files).number == 3  # by the state beside the files


def test_an_adapter_that_is_a_link_is_not_read(files, policy, tmp_path_factory):
    three(files, policy, keep=1)
    path = files.policy(3) / ADAPTER_TENSORS
    outside = tmp_path_factory.mktemp("outside") / "copy.safetensors"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(UserError, match="no checkpoint that is whole"):
        last_whole(files)


def test_a_checkpoint_of_another_run_is_told_and_not_used(files, policy, caplog):
    save(files, at(0, cycle=1), policy, number=1, run_id="own")
    save(files, at(0, cycle=2), policy, number=2, run_id="another")  # as if its files were copied in
    with caplog.at_level("WARNING"):
        assert last_whole(files, "own").state == at(0, cycle=1)
    assert "state.json is of another run (its run_id is not that of config.json)" in caplog.text
    assert last_whole(files, "another").number == 2
    with pytest.raises(UserError, match="is of another run"):
        last_whole(files)  # a run that was begun before there were ids takes none with an id


def test_a_run_that_was_begun_before_there_were_ids_is_resumed(files, policy):
    save(files, at(0), policy)
    for path in (files.state, files.checkpoint(1) / "state.json"):
        content = {name: value for name, value in read_json(path).items() if name not in ("run_id", "metrics_sha256")}
        write_json(path, content | {"sha256": checkpoint._digest(content)})
    found = last_whole(files)
    assert (found.state, found.metrics_sha256) == (at(0), None)


def test_the_checksums_are_of_the_files(files, policy):
    three(files, policy)
    content = json.loads(files.state.read_text())
    assert {name.split("/")[0] for name in content["files"]} == {"checkpoint", "policy"}
    assert content == json.loads((files.checkpoint(3) / "state.json").read_text())


def test_a_damaged_best_adapter_shows_and_costs_the_best_pair_alone(files, policy, caplog):
    move_adapter(policy, seed=1)
    policy.publish()
    first = commit(files, at(1, best=1), 1, policy, None, elapsed_s=0, metrics_size=0)
    flip(files.policy(1) / ADAPTER_TENSORS)
    move_adapter(policy, seed=2)
    policy.publish()
    save(files, at(2, best=1), policy, number=2, checksums=first.checksums)
    found = last_whole(files)
    assert (found.number, found.state.policy_version) == (2, 2)
    assert found.state.best == Best(SEED, 2)  # any score is better: the next evaluation names another
    assert "adapter_model.safetensors is damaged or missing; going on without it" in caplog.text


def test_a_damaged_checkpoint_that_is_not_the_last_is_dropped_by_the_next(files, policy):
    three(files, policy)
    (files.checkpoint(3) / "state.json").write_text("{")
    move_adapter(policy, seed=4)
    policy.publish()
    save(files, at(4, best=1), policy, number=4)
    assert sorted(path.name for path in (files.root / "checkpoint").iterdir()) == ["000002", "000004"]
    assert last_whole(files).number == 4


def test_what_lies_in_the_folders_and_is_not_the_runs_stays(files, policy):
    for name in ("checkpoint/notes.txt", "policy/notes.txt", "journal/notes.txt", "policy/.policy-000009.x/half"):
        (files.root / name).parent.mkdir(parents=True, exist_ok=True)
        (files.root / name).write_text("")
    three(files, policy)
    restore(files, policy, None)
    files.drop_journals()
    assert [path.name for path in (files.root / "journal").iterdir()] == ["notes.txt"]
    assert all((files.root / folder / "notes.txt").exists() for folder in ("checkpoint", "policy", "journal"))
    assert not list((files.root / "policy").glob(".policy-*"))


def kept_at(policy, files, number, kept, sums=None):
    """A checkpoint with a version of its own, and these kept."""
    move_adapter(policy, seed=number)
    policy.publish()
    state = replace(at(number, best=number, cycle=number), kept=kept)
    return commit(files, state, number, policy, None, elapsed_s=0, metrics_size=0, keep=1, checksums=sums).checksums


def test_versions_that_are_kept_stay_on_disk_until_they_are_not(files, policy):
    sums = kept_at(policy, files, 1, {1: 1})
    for number in (2, 3, 4, 5, 6):
        sums = kept_at(policy, files, number, {1: 1}, sums)
    folders = sorted(path.name for path in files.policy(0).parent.iterdir())
    assert folders == ["policy-000001", "policy-000006"]
    assert State.from_json(read_json(files.state)["state"]).kept == {1: 1}
    assert "policy/policy-000001/adapter_model.safetensors" in sums
    kept_at(policy, files, 7, {}, sums)
    assert [path.name for path in files.policy(0).parent.iterdir()] == ["policy-000007"]


def test_a_damaged_adapter_that_no_resume_needs_costs_nothing(files, policy, caplog):
    sums = kept_at(policy, files, 1, {1: 1})
    kept_at(policy, files, 2, {1: 1}, sums)
    flip(files.policy(1) / ADAPTER_TENSORS)
    assert last_whole(files).number == 2 and not caplog.text
    restore(files, policy, None)
    assert policy.version == 2
