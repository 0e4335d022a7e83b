"""A finished run is what it was when it ended, or it is not loaded, served, scored or exported."""

import json

import pytest

from fst_optimizer import UserError
from fst_optimizer.finished.export import export_run
from fst_optimizer.finished.load import load, read_finished
from fst_optimizer.store.files import ADAPTER_CONFIG, ADAPTER_TENSORS, RunFiles, read_json, write_json
from helpers.toy import Program, answer, run_toy

CHANGED = (
    r"{} is damaged, changed or missing \(its checksum is not the one in result\.json\): bring it back from a copy"
)


@pytest.fixture
def files(scripted, tmp_path):
    """Those of a finished run whose best pair has an adapter."""
    policy = scripted(answer)

    def metric(example, prediction):
        return policy.version / 10 + (prediction.answer == "right") / 2

    run_toy(tmp_path / "run", policy, metric=metric)
    files = RunFiles(tmp_path / "run")
    assert read_json(files.result)["policy_version"]
    return files


def adapter_of(files):
    return files.adapter(read_json(files.result)["policy_version"])


def change(path):
    """A hundred bytes in its middle become others."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 100] = bytes(255 - byte for byte in data[middle : middle + 100])
    path.write_bytes(bytes(data))


def test_a_run_that_nobody_touched_is_read(files):
    paths = (files.program, files.config, *adapter_of(files).iterdir())
    names = [path.relative_to(files.root).as_posix() for path in paths]
    assert sorted(read_finished(files.root).result["files"]) == sorted(names)


@pytest.mark.parametrize("name", [ADAPTER_TENSORS, ADAPTER_CONFIG, "program.json", "config.json"])
@pytest.mark.parametrize("damage", [change, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_changed_file_is_named_whatever_the_run_is_wanted_for(files, tmp_path, name, damage):
    path = files.root / name if name in ("program.json", "config.json") else adapter_of(files) / name
    damage(path)
    for use in (
        read_finished,
        lambda run: load(run, program=Program()),
        lambda run: export_run(run, tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=CHANGED.format(name)):
            use(files.root)
    assert not (tmp_path / "out").exists()


def test_a_result_that_names_another_version_is_not_believed(files):
    other = files.policy(99)
    adapter_of(files).rename(other)
    write_json(files.result, {**read_json(files.result), "policy_version": 99})
    with pytest.raises(UserError, match=CHANGED.format(ADAPTER_CONFIG)):
        read_finished(files.root)


def test_runs_from_before_there_were_checksums_are_read_as_they_are(files):
    result = read_json(files.result)
    del result["files"]
    files.result.write_text(json.dumps(result))
    change(adapter_of(files) / ADAPTER_TENSORS)
    assert read_finished(files.root).version
