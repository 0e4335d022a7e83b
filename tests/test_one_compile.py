"""A policy has one set of weights: one compile, or one training job, at a time."""

import threading

import pytest
from dspy.clients.utils_finetune import TrainDataFormat

from fst_optimizer import UserError
from fst_optimizer.errors import MetricError
from fst_optimizer.finished.load import load
from helpers.toy import SHORT, TRAIN, VAL, Program, answer, metric, optimizer, run_toy, student_of, untimed_metrics

TAKEN = "student is on a Policy that another compile is training"


@pytest.fixture
def policy(scripted):
    return scripted(answer)


def compiled(policy, run_dir, **options):
    return optimizer(run_dir, settings=SHORT, **options).compile(student_of(policy), trainset=TRAIN, valset=VAL)


def refused(attempt):
    """What an attempt says that is refused."""
    with pytest.raises(UserError) as caught:
        attempt()
    return str(caught.value)


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_compile_in_another_thread_is_refused_and_the_first_is_as_without_it(
    policy, scripted, tmp_path, resume
):
    if resume:
        with pytest.raises(KeyboardInterrupt):
            compiled(scripted(answer), tmp_path / "second", callbacks=[_interrupt])
    said, before = [], []

    def second(data):
        if data["kind"] == "step" and not said:
            before.extend(sorted(path.name for path in tmp_path.glob("second/*")))
            attempt = lambda: compiled(policy, tmp_path / "second", resume=resume)  # noqa: E731
            thread = threading.Thread(target=lambda: said.append(refused(attempt)))
            thread.start()
            thread.join(60)
            assert sorted(path.name for path in tmp_path.glob("second/*")) == before, "nothing was begun"

    compiled(policy, tmp_path / "first", callbacks=[second])
    assert len(said) == 1 and said[0].startswith(TAKEN) and "a Policy of its own" in said[0]
    run_toy(tmp_path / "alone", scripted(answer), settings=SHORT)
    assert untimed_metrics(tmp_path / "first") == untimed_metrics(tmp_path / "alone")


def _interrupt(data):
    if data["kind"] == "fast":
        raise KeyboardInterrupt


def test_a_compile_in_a_callback_of_a_compile_is_refused(policy, tmp_path):
    said = []

    def nested(data):
        if data["kind"] == "fast":
            said.append(refused(lambda: compiled(policy, tmp_path / "inner")))

    assert compiled(policy, tmp_path / "outer", callbacks=[nested]).detailed_results.result["ended"] == "done"
    assert said[0].startswith(TAKEN) and not (tmp_path / "inner").exists()


def test_a_compile_in_a_metric_of_a_compile_is_refused(policy, tmp_path):
    def nested(example, prediction):
        return compiled(policy, tmp_path / "inner") and 1.0

    with pytest.raises(MetricError, match=f"metric nested raised on example val-0: UserError.*{TAKEN}"):
        compiled(policy, tmp_path / "outer", metric=nested, values={"rollout.num_threads": 1})


def test_once_a_compile_has_failed_the_next_one_begins(policy, tmp_path):
    def broken(example, prediction):
        raise KeyError("gold")

    with pytest.raises(MetricError):
        compiled(policy, tmp_path / "first", metric=broken)
    with pytest.raises(KeyboardInterrupt):
        compiled(policy, tmp_path / "second", callbacks=[_interrupt])
    compiled(policy, tmp_path / "second", resume=True)
    compiled(policy, tmp_path / "third")


def test_compiles_on_two_policies_do_not_mind_each_other(policy, scripted, tmp_path):
    other = scripted(answer)

    def nested(data):
        if data["kind"] == "fast":
            compiled(other, tmp_path / "inner")

    compiled(policy, tmp_path / "outer", callbacks=[nested])
    assert (tmp_path / "inner" / "result.json").exists()


def test_a_finished_run_may_be_loaded_and_asked_during_a_compile(policy, tmp_path):
    compiled(policy, tmp_path / "done")
    scores = []

    def look(data):
        if data["kind"] == "fast":
            loaded = load(tmp_path / "done", program=Program(), model=policy.source)
            scores.append(loaded.first.lm.model)
            scores.append(metric(VAL[0], student_of(policy)(question="q1")).score)

    compiled(policy, tmp_path / "run", callbacks=[look])
    assert len(scores) == 2


# -- jobs of dspy's optimizers -------------------------------------------------------------------------------------

ROWS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
TWO = [
    {"messages": ROWS[0]["messages"][:1], "completion": {"role": "assistant", "content": text}, "reward": reward}
    for text, reward in (("b", 1.0), ("c", 0.0))
]


def test_a_job_beside_a_compile_is_refused(policy, tmp_path):
    said = []

    def jobs(data):
        if data["kind"] == "fast":
            said.append(refused(lambda: policy.lm.finetune(ROWS, TrainDataFormat.CHAT, {"epochs": 1})))
            said.append(refused(lambda: policy.lm.reinforce({"lr": 1e-2})))

    compiled(policy, tmp_path / "run", callbacks=[jobs])
    assert len(said) == 2 and all("FST.compile is training" in text for text in said)


def test_a_compile_beside_a_job_that_trains_is_refused(policy, tmp_path):
    with policy.jobs.training:  # as a finetune job holds it
        text = refused(lambda: compiled(policy, tmp_path / "run"))
    assert "a job of one of DSPy's optimizers is training" in text and not (tmp_path / "run").exists()
    compiled(policy, tmp_path / "run")


def test_a_compile_between_the_steps_of_another_threads_job_is_refused(policy, tmp_path):
    begun, over = threading.Event(), threading.Event()

    def grpo():
        job = policy.lm.reinforce({"lr": 1e-2})
        begun.set()
        over.wait(60)
        job.terminate()

    thread = threading.Thread(target=grpo)
    thread.start()
    begun.wait(60)
    assert "a job of one of DSPy's optimizers" in refused(lambda: compiled(policy, tmp_path / "run"))
    over.set()
    thread.join()
    compiled(policy, tmp_path / "run")


def test_a_job_that_was_left_behind_keeps_no_compile_and_takes_no_step_after_it(policy, tmp_path):
    job = policy.lm.reinforce({"lr": 1e-2})  # as in a notebook, where GRPO raised
    compiled(policy, tmp_path / "run")
    version, served = policy.version, policy.engine.versions()
    assert "was trained by FST.compile since the job began" in refused(lambda: job.step([TWO], "GRPO_CHAT"))
    assert (policy.version, policy.engine.versions()) == (version, served)
    job.terminate()
