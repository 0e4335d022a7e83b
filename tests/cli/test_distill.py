"""`fst distill` on letters: a prompt that names a rule goes into the weights, and what is refused."""

import hashlib

import pytest

from fst_optimizer import load
from fst_optimizer.program.texts import seed_texts
from fst_optimizer.store.files import read_json, write_json
from helpers.fst import fst
from helpers.run_check import assert_as_designed

TASK = "programs/letters:drop_first"
SIZES = ["--train-size", "128", "--val-size", "48", "--test-size", "48"]


def tree(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A finished run whose prompt names the rule; its weights are the base's."""
    folder = tmp_path_factory.mktemp("told") / "run"
    ran = fst("compile", TASK, "--method", "gepa", "--run-dir", folder, "--max-cycles", "1", *SIZES)
    assert ran.exit_code == 0, ran.output
    assert read_json(folder / "result.json")["val_score_after"] > 0.9
    return folder


@pytest.mark.slow
def test_a_rule_goes_into_the_weights(told, tmp_path):
    before, out = tree(told), tmp_path / "short"
    quick = ["--set", "train.warmup_steps=0", "--set", "train.lr=2e-3", "--set", "eval.kl_examples=16"]
    ran = fst("distill", told, "--out", out, *quick)
    assert ran.exit_code == 0, ran.output
    assert tree(told) == before
    assert_as_designed(out)
    result, parent = read_json(out / "result.json"), read_json(told / "result.json")
    assert result["candidate"] == {"first": "Answer the question."}
    assert result["teacher_score"] == parent["val_score_after"]
    assert result["val_score_before"] == parent["val_score_before"] < 0.4
    assert result["val_score_after"] >= 0.9 * result["teacher_score"]
    assert result["test_score_after"] > result["test_score_before"] + 0.5
    assert result["tokens_per_answer"]["after"] < result["tokens_per_answer"]["before"]
    assert result["distilled_from"]["method"] == "gepa" and result["distilled_from"]["policy_version"] == 0
    assert "with the long prompt" in ran.output and "distilled from" not in result
    # A run like any other: scored from its files alone, loaded, exported, and refused where it is finished.
    scored = fst("eval", TASK, "--run-dir", out)
    assert scored.exit_code == 0 and "the recorded score, exactly" in scored.output
    program = load(out)
    assert seed_texts(program) == result["candidate"]
    program.first.lm.engine.policy.close()
    assert fst("export", out, "--out", tmp_path / "exported").exit_code == 0
    assert (tmp_path / "exported" / "adapter" / "adapter_model.safetensors").is_file()
    again = fst("distill", told, "--out", out)
    assert again.exit_code == 2 and "holds a finished run" in again.output


@pytest.mark.slow
def test_too_little_learned_is_refused_and_the_run_is_as_it_was(told, tmp_path):
    before, out = tree(told), tmp_path / "short"
    small = ["--max-cycles", "1", "--set", "train.steps_per_cycle=1", "--set", "rollout.batch_size=1"]
    ran = fst("distill", told, "--out", out, *small)
    assert ran.exit_code == 1, ran.output
    assert "failed: without the long prompt the program scores 0." in ran.output
    assert f"with it {read_json(told / 'result.json')['val_score_after']:.4f}" in " ".join(ran.output.split())
    assert tree(told) == before and not (out / "result.json").exists() and not (out / "program.json").exists()
    evaluated = fst("eval", TASK, "--run-dir", out)
    assert evaluated.exit_code == 2 and "unfinished run" in evaluated.output
    other = fst("compile", TASK, "--run-dir", out, "--resume", "--allow-changes")
    assert other.exit_code == 2 and "is a distillation: go on with fst distill" in " ".join(other.output.split())
    lower = fst("distill", told, "--out", out, "--resume", "--set", "distill.keep_gain=1e-9")
    assert lower.exit_code == 0, lower.output  # a bar of nothing, and not a step more
    assert_as_designed(out)
    assert read_json(out / "result.json")["steps"] == 1


@pytest.mark.slow
def test_what_does_not_fit_is_refused_before_a_model_is_loaded(told, tmp_path):
    out = tmp_path / "short"
    inside = fst("distill", told, "--out", told / "short")
    assert inside.exit_code == 2 and "lies in the run's own directory" in inside.output
    shape = fst("distill", told, "--out", out, "--set", "lora.rank=4")
    assert shape.exit_code == 2 and "a run is distilled with its own; leave the lora settings out" in shape.output
    write_json(tmp_path / "short.json", {"frist": "Answer."})
    unknown = fst("distill", told, "--out", out, "--instructions", tmp_path / "short.json")
    assert unknown.exit_code == 2 and "names 'frist'" in unknown.output
    missing = fst("distill", tmp_path / "nothing", "--out", out)
    assert missing.exit_code == 2 and "no such file" in missing.output
    nothing = fst("distill", told, "--out", out, "--resume")
    assert nothing.exit_code == 2 and "holds no run to resume" in nothing.output
    resumed = fst("distill", told, "--out", told.parent / "other", "--resume")
    assert resumed.exit_code == 2
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["link", "changed"])
def test_a_run_directory_is_read_as_load_reads_it(told, tmp_path, kind):
    import shutil

    forged = tmp_path / "forged"
    shutil.copytree(told, forged)
    if kind == "link":
        (forged / "program.json").rename(tmp_path / "program.json")
        (forged / "program.json").symlink_to(tmp_path / "program.json")
    else:
        (forged / "config.json").write_text((forged / "config.json").read_text().replace("Answer the", "Answer no"))
    ran = fst("distill", forged, "--out", tmp_path / "short")
    assert ran.exit_code == 2, ran.output
    assert ("link" if kind == "link" else "damaged, changed or missing") in " ".join(ran.output.split())
    assert not (tmp_path / "short").exists()
