"""Programs that give their calls to threads of their own: what is recorded is what the same program records without."""

import asyncio
import contextvars
import functools
import queue
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool

import dspy
import pytest

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.engines.recorder import SETTING
from fst_optimizer.program.texts import apply_texts, seed_texts
from fst_optimizer.rollout.collector import Collector
from fst_optimizer.rollout.metric import Metric
from fst_optimizer.rollout.rollout import Request
from fst_optimizer.rollout.threads import inherited_by_threads
from fst_optimizer.testing import chat_answer
from fst_optimizer.types import Candidate, Outcome, Usage, items_of
from helpers.toy import frozen

AT_IMPORT = ThreadPoolExecutor(2)


def here(program, work, inputs):
    return [work(one) for one in inputs]


def threads(program, work, inputs):
    found = {}
    workers = [threading.Thread(target=lambda one=one: found.update({one: work(one)})) for one in inputs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [found[one] for one in inputs]


def subclassed_threads(program, work, inputs):
    class Worker(threading.Thread):
        def __init__(self, one):
            super().__init__()
            self.one = one

        def run(self):
            self.found = work(self.one)

    workers = [Worker(one) for one in inputs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [worker.found for worker in workers]


def a_pool(program, work, inputs):
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(work, one) for one in inputs]]


def a_pool_mapped(program, work, inputs):
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, inputs))


def a_pool_made_in_init(program, work, inputs):
    return list(program.pool.map(work, inputs))


def a_pool_made_at_import(program, work, inputs):
    return list(AT_IMPORT.map(work, inputs))


def nested_pools(program, work, inputs):
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda one: a_pool(program, work, [one])[0], inputs))


def a_thread_pool(program, work, inputs):
    with ThreadPool(2) as pool:
        return pool.map(func=work, iterable=inputs)


def a_thread_pool_made_in_init(program, work, inputs):
    first, *rest = inputs
    return [program.thread_pool.apply(work, (first,)), *program.thread_pool.imap(work, rest)]


def run_in_executor(program, work, inputs):
    async def main():
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(None, work, one) for one in inputs))

    return asyncio.run(main())


def a_loop_in_a_thread(program, work, inputs):
    async def main():
        return await asyncio.gather(*(asyncio.to_thread(work, one) for one in inputs))

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, main()).result()


def with_their_context(program, work, inputs):
    """What the docs advise where nothing else helps."""
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(contextvars.copy_context().run, work, one) for one in inputs]
        return [future.result() for future in futures]


def dspy_parallel(program, work, inputs):
    pairs = [(work, {"one": one}) for one in inputs]
    return dspy.Parallel(num_threads=2, disable_progress_bar=True)(pairs)


def a_queue_of_functions_with_their_context(program, work, inputs):
    """What the docs advise for threads that wait for work."""
    todo, found = queue.SimpleQueue(), queue.SimpleQueue()
    worker = threading.Thread(target=lambda: [found.put(todo.get()()) for _ in inputs])
    contextvars.Context().run(worker.start)
    for one in inputs:
        todo.put(functools.partial(contextvars.copy_context().run, work, one))
    return [found.get(timeout=20) for _ in inputs]


def asyncified(program, work, inputs):
    async def main():
        return await asyncio.gather(*(dspy.asyncify(work)(one) for one in inputs))

    return asyncio.run(main())


WAYS = (
    *(threads, subclassed_threads, a_pool, a_pool_mapped, a_pool_made_in_init, a_pool_made_at_import, nested_pools),
    *(a_thread_pool, a_thread_pool_made_in_init, run_in_executor, a_loop_in_a_thread, with_their_context),
    *(a_queue_of_functions_with_their_context, dspy_parallel, asyncified),
)


class Spread(dspy.Module):
    """Three questions at once: each to the policy, and its answer to another LM."""

    def __init__(self, way):
        super().__init__()
        self.way = [way]  # in a list: a program's functions are not its modules
        self.ask = dspy.Predict("question -> answer")
        self.check = dspy.Predict("answer -> score")
        self.pools = Shared()

    pool = property(lambda self: self.pools.pool)
    thread_pool = property(lambda self: self.pools.thread_pool)

    def forward(self, question):
        def work(one):
            answer = self.ask(question=one).answer
            return answer, self.check(answer=answer).score

        found = self.way[0](self, work, [f"{question}{place}" for place in range(3)])
        return dspy.Prediction(answer=" ".join(answer for answer, _ in found))


class Shared:
    """Pools of all copies of a program."""

    def __init__(self):
        self.pool, self.thread_pool = ThreadPoolExecutor(2), ThreadPool(2)

    def __deepcopy__(self, memo):
        return self

    def close(self):
        self.pool.shutdown()
        self.thread_pool.terminate()


def chatty(prompt, request):
    return chat_answer(answer=f"a{request.seed % 1000}")


def collector_of(policy, program, metric=lambda example, prediction: 1.0, **values):
    config = FSTConfig().with_values({"rollout.num_threads": 4, **values})
    return Collector(lambda candidate: apply_texts(program, candidate.texts), policy, Metric(metric), config)


def collect(collector, program, group=3):
    items = items_of([dspy.Example(question=q, answer=q).with_inputs("question") for q in ("one", "two")], "train")
    requests = [Request(Candidate(seed_texts(program)), item, index) for item in items for index in range(group)]
    return collector.run(requests, version=0, temperature=1.0, capture=True)


def spread(policy, way, **settings):
    """The rollouts of `Spread`, and what the meter has counted."""
    program = Spread(way)
    program.ask.lm, (program.check.lm, _) = policy.lm, frozen()
    collector = collector_of(policy, program, **settings)
    try:
        return collect(collector, program), collector
    finally:
        program.pools.close()


def plain(rollout):
    """What does not depend on which thread was first."""
    return (
        (rollout.example_id, rollout.index, rollout.outcome, rollout.score, rollout.tokens, dict(rollout.usage)),
        sorted((call.predictor, call.prompt_ids, call.completion_ids, call.logprobs) for call in rollout.calls),
        Counter((step.predictor, str(step.inputs), str(step.outputs)) for step in rollout.trace),
    )


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_work_in_threads_is_recorded_as_in_the_program_without_them(scripted, way):
    expected, counted = spread(scripted(chatty), here)
    rollouts, collector = spread(scripted(chatty), way)
    assert [plain(rollout) for rollout in rollouts] == [plain(rollout) for rollout in expected]
    for rollout in rollouts:
        assert Counter(call.predictor for call in rollout.calls) == {"ask": 3}
        assert Counter(step.predictor for step in rollout.trace) == {"ask": 3, "check": 3}
    assert collector.meter.usage == counted.meter.usage == {"openai/gpt-4o-mini": Usage(18, 1800, 0, 180)}
    assert collector.strays == 0


def test_what_a_metric_asks_in_threads_is_counted_and_not_recorded(scripted):
    policy, (judge, engine) = scripted(chatty), frozen("openai/judge")
    program = dspy.Predict("question -> answer")
    program.lm = policy.lm

    def metric(example, prediction):
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda lm: lm("good?"), [judge, policy.lm]))
        return 1.0

    collector = collector_of(policy, program, metric)
    rollouts = collect(collector, program)
    assert engine.calls == collector.meter.usage["openai/judge"].calls == 6
    assert [len(rollout.calls) for rollout in rollouts] == [1] * 6
    assert collector.strays == 0


def test_what_raises_in_a_thread_raises_where_its_result_is_asked_for(scripted):
    def way(program, work, inputs):
        def broken(one):
            work(one)
            raise ValueError(f"no {one}")

        return a_pool(program, broken, inputs)

    (rollout, *_), _ = spread(scripted(chatty), way)
    assert (rollout.outcome, rollout.error) == (Outcome.PROGRAM_ERROR, "ValueError: no one0")


def test_threads_of_two_collectors_at_once_keep_their_own_calls(scripted):
    both = threading.Barrier(2, timeout=20)

    def way(program, work, inputs):
        both.wait()  # a rollout of each is under way
        return a_pool_made_at_import(program, work, inputs)

    policies = [scripted(chatty), scripted(lambda prompt, request: chat_answer(answer="other"))]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda policy: spread(policy, way, **{"rollout.num_threads": 1}), policies))
    for policy, (rollouts, collector) in zip(policies, found, strict=True):
        calls = [call for rollout in rollouts for call in rollout.calls]
        assert sorted(c.prompt_ids for c in calls) == sorted(r.prompt_ids for r in policy.engine.requests)
        assert len(calls) == 18 and collector.strays == 0
    assert all("other" in call.text for rollout in found[1][0] for call in rollout.calls)


# -- what outlives its rollout ------------------------------------------------------------------------------------


def refusals_after(policy, start, timeout_s=60.0):
    """Run a program that leaves a thread behind, let that go on, and return what its call got, and the rollouts."""
    go_on, told = threading.Event(), queue.SimpleQueue()

    def late(work):
        go_on.wait(20)
        try:
            told.put(work("late"))
        except Exception as error:
            told.put(error)

    def way(program, work, inputs):
        start(lambda: late(work))
        return here(program, work, inputs)

    rollouts, _ = spread(policy, way, **{"rollout.timeout_s": timeout_s})
    go_on.set()
    return [told.get(timeout=20) for _ in rollouts], rollouts


@pytest.mark.parametrize(
    "start", [lambda late: threading.Thread(target=late).start(), lambda late: AT_IMPORT.submit(late)]
)
def test_a_thread_that_outlives_its_rollout_is_refused(scripted, start):
    policy = scripted(chatty)
    refusals, rollouts = refusals_after(policy, start)
    assert all("was cancelled or has ended" in str(refusal) for refusal in refusals)
    assert [len(rollout.calls) for rollout in rollouts] == [3] * 6


def test_a_thread_of_a_rollout_that_timed_out_is_refused_even_where_it_starts_another(scripted):
    go_on, told = threading.Event(), queue.SimpleQueue()

    def way(program, work, inputs):
        go_on.wait(20)  # the deadline is missed here
        try:
            return threads(program, lambda one: told.put(attempt(work, one)), inputs)
        except KeyError:
            return []

    def attempt(work, one):
        try:
            return work(one)
        except Exception as error:
            return error

    rollouts, _ = spread(scripted(chatty), way, **{"rollout.timeout_s": 0.2, "rollout.num_threads": 6})
    assert {rollout.outcome for rollout in rollouts} == {Outcome.TIMEOUT}
    go_on.set()
    assert all("was cancelled or has ended" in str(told.get(timeout=20)) for _ in range(3 * 6))


def test_a_pools_threads_serve_others_after_the_rollout_in_which_they_were_started(scripted):
    policy, pool = scripted(chatty), ThreadPoolExecutor(2)
    spread(policy, lambda program, work, inputs: list(pool.map(work, inputs)))
    with pool:
        assert pool.submit(policy.lm, "hello").result()[0].startswith("[[ ## answer")


# -- what is left alone -------------------------------------------------------------------------------------------


def methods():
    owners = {threading.Thread: ["start"], ThreadPoolExecutor: ["submit"], ThreadPool: ["__init__", "map", "imap"]}
    return [vars(owner).get(name) for owner, names in owners.items() for name in names]


def test_the_methods_of_threads_and_pools_are_put_back(scripted):
    before = methods()
    with inherited_by_threads():
        assert methods() != before
        with inherited_by_threads():
            pass
        assert methods() != before
    assert methods() == before
    spread(scripted(chatty), a_pool)
    assert methods() == before


def test_who_wrapped_a_method_meanwhile_keeps_it(monkeypatch):
    def theirs(*arguments):
        return plain_submit(*arguments)

    before = ThreadPoolExecutor.submit
    with inherited_by_threads():
        plain_submit = ThreadPoolExecutor.submit
        ThreadPoolExecutor.submit = theirs
    assert ThreadPoolExecutor.submit is theirs
    ThreadPoolExecutor.submit = before


def test_threads_from_outside_of_rollouts_inherit_nothing():
    variable = contextvars.ContextVar("variable", default="")
    variable.set("set")
    with inherited_by_threads(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(variable.get).result() == ""
        with dspy.context(**{SETTING: None}):
            assert pool.submit(variable.get).result() == "set"
        assert pool.submit(variable.get).result() == ""


# -- what cannot be caught is seen --------------------------------------------------------------------------------


class Fed:
    """A thread that was started long before, and waits for work at a queue."""

    def __init__(self):
        self.todo = queue.SimpleQueue()
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            work, one, answer = self.todo.get()
            answer.put(work(one))

    def __call__(self, program, work, inputs):
        answer = queue.SimpleQueue()
        for one in inputs:
            self.todo.put((work, one, answer))
        return [answer.get(timeout=20) for _ in inputs]

    def __deepcopy__(self, memo):
        return self


def test_calls_of_a_thread_that_no_rollout_started_are_counted_and_warned_of_once(scripted, caplog):
    policy, program = scripted(chatty), Spread(Fed())
    program.ask.lm, (program.check.lm, _) = policy.lm, frozen()
    collector = collector_of(policy, program)
    rollouts = collect(collector, program)
    collect(collector, program)
    program.pools.close()
    assert [len(rollout.calls) for rollout in rollouts] == [0] * 6
    assert collector.strays == 2 * 18
    (warning,) = [record.getMessage() for record in caplog.records if "outside of any rollout" in record.getMessage()]
    assert warning.startswith("18 call(s) of the policy came from outside of any rollout while rollouts ran")
    assert "contextvars.copy_context().run" in warning
    policy.lm("hello")
    assert policy.observer is None and collector.strays == 2 * 18
