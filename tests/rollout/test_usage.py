"""What API models are asked is counted, in dollars where they can be told, whoever asks and however."""

import asyncio
import queue
import threading

import dspy
import pytest
from dspy.clients.base_lm import BaseLM

from fst_optimizer import FST, FSTConfig, UserError
from fst_optimizer.config.run import FSTConfig as Config
from fst_optimizer.program.texts import apply_texts, seed_texts
from fst_optimizer.rollout.collector import Collector
from fst_optimizer.rollout.metric import Metric
from fst_optimizer.rollout.rollout import Request
from fst_optimizer.rollout.usage import usage_of
from fst_optimizer.store.meter import cost_usd
from fst_optimizer.testing import chat_answer
from fst_optimizer.types import Candidate, Outcome, Usage, items_of
from helpers.api import API as Server
from helpers.api import USAGE, served
from helpers.toy import SHORT, TRAIN, VAL, metric, student_of

MODEL = "openai/gpt-4o-mini"
PRICE = (100 * 0.15 + 10 * 0.60) / 1e6
"""Of one call of the server, by litellm's table."""


def never(number):
    return None


def words(prompt, request):
    return chat_answer(middle="right", answer="right" if request.seed % 2 else "wrong")


@pytest.fixture
def policy(scripted):
    return scripted(words)


@pytest.fixture
def api():
    with served(Server()) as server:
        yield server


def run(student, folder, metric=metric, **values):
    config = FSTConfig.from_dict(SHORT).with_values(values)
    fst = FST(metric, config=config, run_dir=folder)
    return fst.compile(student, trainset=TRAIN, valset=VAL).detailed_results.result


class Asks(dspy.Module):
    """Asks an API model in some way, and then the policy."""

    def __init__(self, policy, lm, way):
        super().__init__()
        self.first, self.second = dspy.Predict("question -> middle"), dspy.Predict("middle -> answer")
        self.first.lm, self.second.lm = lm, policy.lm
        self.way = way

    def forward(self, question):
        self.way(self, question)
        return dspy.Prediction(middle="right", answer=self.second(middle="right").answer)


def by_predictor(program, question):
    program.first(question=question)


def directly(program, question):
    program.first.lm(question)


def asynchronously(program, question):
    asyncio.run(program.first.acall(question=question))


def by_a_stream(program, question):
    async def main():
        said = dspy.streamify(program.first, stream_listeners=[dspy.streaming.StreamListener("middle")])
        return [part async for part in said(question=question)]

    asyncio.run(main())


def under_a_tracker_of_its_own(program, question):
    with dspy.track_usage():
        program.first(question=question)


def in_threads(program, question):
    worker = threading.Thread(target=lambda: program.first(question=question))
    worker.start()
    worker.join()


TODO = queue.SimpleQueue()


def work():
    while (task := TODO.get()) is not None:
        program, question, done = task
        program.first(question=question)
        done.set()


def in_a_thread_that_waits_for_work(program, question):
    done = threading.Event()
    TODO.put((program, question, done))
    assert done.wait(20)


def in_a_thread_that_runs_a_loop(program, question):
    done = threading.Event()

    async def call():
        await program.first.acall(question=question)
        done.set()

    asyncio.run_coroutine_threadsafe(call(), LOOP)
    assert done.wait(20)


LOOP = asyncio.new_event_loop()


@pytest.fixture
def workers():
    """Threads that no rollout starts."""
    started = [threading.Thread(target=work), threading.Thread(target=LOOP.run_forever)]
    for one in started:
        one.start()
    yield
    TODO.put(None)
    LOOP.call_soon_threadsafe(LOOP.stop)
    for one in started:
        one.join()


WAYS = (
    *(by_predictor, directly, asynchronously, by_a_stream, under_a_tracker_of_its_own, in_threads),
    *(in_a_thread_that_waits_for_work, in_a_thread_that_runs_a_loop),
)


def collect(policy, student, metric=lambda example, prediction: 1.0, runs=3, **settings):
    """The rollouts of a program, and what the meter has."""

    def build(candidate):
        return apply_texts(student, candidate.texts)

    collector = Collector(build, policy, Metric(metric), Config.from_dict(settings))
    candidate = Candidate(seed_texts(student))
    requests = [Request(candidate, item) for item in items_of(TRAIN[:runs], "train")]
    return collector.run(requests, version=0, temperature=1.0), collector.meter


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("told", [True, False], ids=["told", "untold"])
def test_every_call_is_counted_however_it_is_made(policy, way, told):
    with served(Server() if told else Server(never)) as api:
        rollouts, meter = collect(policy, Asks(policy, api.lm(), way))
    assert [one.outcome for one in rollouts] == [Outcome.OK] * 3
    expected = Usage(3, 300, 0, 30) if told else Usage(calls=3, untold=3)
    assert (api.calls, meter.usage) == (3, {MODEL: expected})
    assert cost_usd(meter.usage, {}) == (pytest.approx(3 * PRICE) if told else None)


def test_a_run_whose_provider_tells_no_tokens_has_an_unknown_cost(policy, tmp_path):
    with served(Server(never)) as api:
        result = run(student_of(policy, first=api.lm()), tmp_path / "run")
    assert result["cost_usd"] is None
    used = result["lm_usage"][MODEL]
    assert used["untold"] == used["calls"] == api.calls > 0


@pytest.mark.parametrize("prices", [{}, {MODEL: [0.15, 0.6]}], ids=["litellm's", "own"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_cap_on_dollars_stops_a_run_whose_provider_tells_no_tokens(policy, tmp_path, prices, dry_run):
    values = {"budget.max_cost_usd": 0.05, "budget.prices": prices, "run.dry_run": dry_run}
    with served(Server(never)) as api, pytest.raises(UserError) as refused:
        run(student_of(policy, first=api.lm()), tmp_path / "run", **values)
    text = str(refused.value)
    assert f"budget.max_cost_usd is 0.05, and what {MODEL} costs is unknown" in text
    assert f"the provider told no tokens for {api.calls} of {api.calls} calls of {MODEL}" in text
    assert "set no cap" in text
    assert api.calls <= len(VAL) + 4  # the first validation, or the dry run


def test_one_call_without_tokens_makes_the_whole_unknown(policy, tmp_path):
    with served(Server(lambda number: None if number == 3 else USAGE)) as api:
        result = run(student_of(policy, first=api.lm()), tmp_path / "run")
    assert (result["cost_usd"], result["lm_usage"][MODEL]["untold"]) == (None, 1)


def test_a_price_of_nothing_needs_no_tokens(policy, tmp_path):
    values = {"budget.max_cost_usd": 0.05, "budget.prices": {MODEL: [0, 0]}}
    with served(Server(never)) as api:
        result = run(student_of(policy, first=api.lm()), tmp_path / "run", **values)
    assert (result["cost_usd"], result["ended"]) == (0.0, "done")


def test_what_dspys_cache_answers_costs_nothing(policy, tmp_path, monkeypatch):
    memory = dspy.clients.Cache(
        enable_disk_cache=False,
        enable_memory_cache=True,
        disk_cache_dir=str(tmp_path / "cache"),
        disk_size_limit_bytes=0,
        memory_max_entries=1000,
    )
    monkeypatch.setattr(dspy, "cache", memory)
    with served(Server(never)) as api:
        lm = api.lm(cache=True)
        for example in TRAIN[:3]:
            with dspy.context(lm=lm):
                dspy.Predict("question -> middle")(question=example.question)
        assert api.calls == 3
        _, meter = collect(policy, Asks(policy, lm, by_predictor))
    assert (api.calls, meter.usage) == (3, {})


def test_a_judge_that_tells_no_tokens_has_an_unknown_cost(policy, tmp_path):
    with served(Server(never)) as api:
        judge = api.lm()

        def judged(example, prediction, trace=None):
            judge("How good is it?")
            return float(prediction.answer == "right")

        result = run(student_of(policy), tmp_path / "run", judged)
    assert (result["cost_usd"], result["lm_usage"][MODEL]["untold"]) == (None, api.calls)


class Own(BaseLM):
    """An LM class of the user's own, without usage."""

    def forward(self, prompt=None, messages=None, **kwargs):
        from types import SimpleNamespace

        message = SimpleNamespace(content=chat_answer(middle="right"), tool_calls=None)
        choice = SimpleNamespace(message=message, finish_reason="stop")
        return SimpleNamespace(choices=[choice], usage=None, model="own")


@pytest.mark.filterwarnings("ignore")
def test_an_lm_class_that_tells_no_tokens_has_an_unknown_cost(policy):
    _, meter = collect(policy, Asks(policy, Own("mine/own"), by_predictor))
    assert meter.usage == {"mine/own": Usage(calls=3, untold=3)} and cost_usd(meter.usage, {}) is None


def test_dollars_spent_in_plain_threads_are_reported_and_capped(policy, tmp_path, api):
    student = Asks(policy, api.lm(), in_threads)
    values = {"budget.prices": {MODEL: [1.0, 0.0]}}  # 0.0001 dollars a call
    free = run(student, tmp_path / "free", **values)
    assert free["cost_usd"] == pytest.approx(api.calls * 1e-4)
    before = api.calls
    capped = run(student, tmp_path / "capped", **values, **{"budget.max_cost_usd": 10 * 1e-4})
    assert (capped["ended"], capped["cap"]) == ("budget", "max_cost_usd")
    assert capped["cost_usd"] == pytest.approx((api.calls - before) * 1e-4)
    assert api.calls - before <= 10 + 4 + len(VAL)


def test_what_a_program_asks_after_its_time_is_counted(policy, api):
    started, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def late(program, question):
        by_predictor(program, question)
        started.set()
        assert go_on.wait(20)
        try:
            by_predictor(program, question)
        finally:
            ended.set()

    settings = {"rollout": {"timeout_s": 1.0}}
    rollouts, meter = collect(policy, Asks(policy, api.lm(), late), runs=1, **settings)
    assert rollouts[0].outcome is Outcome.TIMEOUT
    assert (rollouts[0].usage, meter.usage) == ({MODEL: Usage(1, 100, 0, 10)},) * 2
    go_on.set()
    assert ended.wait(20)
    assert meter.usage == {MODEL: Usage(2, 200, 0, 20)}


def test_calls_between_rollouts_are_nobodys(policy, api):
    student = Asks(policy, api.lm(), by_predictor)
    _, meter = collect(policy, student)
    student.first.lm("hello")
    assert meter.usage == {MODEL: Usage(3, 300, 0, 30)}


def test_a_reflection_lm_that_tells_no_tokens_stops_a_run_with_a_cap(policy, tmp_path):
    config = FSTConfig.from_dict(SHORT).with_values({"budget.max_cost_usd": 0.05})
    with served(Server(never)) as api:
        fst = FST(metric, config=config, run_dir=tmp_path / "run", reflection_lm=api.lm())
        with pytest.raises(UserError, match=f"what the reflection LM {MODEL} costs is unknown"):
            fst.compile(student_of(policy), trainset=TRAIN, valset=VAL)
        config = FSTConfig.from_dict(SHORT)
        fst = FST(metric, config=config, run_dir=tmp_path / "free", reflection_lm=api.lm())
        assert fst.compile(student_of(policy), trainset=TRAIN, valset=VAL).detailed_results.result["cost_usd"] is None


@pytest.mark.parametrize(
    ("entry", "usage"),
    [
        ({}, Usage(1, untold=1)),
        ({"prompt_tokens": 0, "completion_tokens": 0}, Usage(1, untold=1)),
        ({"prompt_tokens": 7}, Usage(1, 7, untold=1)),
        ({"prompt_tokens": 7, "completion_tokens": 0}, Usage(1, 7)),
        (
            {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 5}},
            Usage(1, 7, 5, 2),
        ),
        ({"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": None}, Usage(1, 7, 0, 2)),
    ],
)
def test_a_call_is_untold_where_either_count_is_missing(entry, usage):
    assert usage_of([entry]) == usage
