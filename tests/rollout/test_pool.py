import contextvars
import signal
import threading
import time
from contextlib import closing

import pytest

from fst_optimizer.errors import UserError
from fst_optimizer.rollout.pool import run_jobs

COLOUR = contextvars.ContextVar("COLOUR", default="none")


class Work:
    def __init__(self, do):
        self.do = do
        self.stopped = threading.Event()

    def run(self):
        return self.do(self)

    def stop(self):
        self.stopped.set()

    def timed_out(self, seconds):
        return f"late {seconds:g}"


def results(jobs, *, num_threads=4, timeout_s=60.0):
    with closing(run_jobs(jobs, num_threads=num_threads, timeout_s=timeout_s)) as it:
        return dict(it)


@pytest.mark.parametrize("num_threads", [1, 3, 50])
def test_every_job_runs_once_and_is_told_by_its_index(num_threads):
    ran = []
    jobs = [Work(lambda _, i=i: ran.append(i) or i * i) for i in range(20)]
    assert results(jobs, num_threads=num_threads) == {i: i * i for i in range(20)}
    assert sorted(ran) == list(range(20))


def test_no_jobs_give_no_results():
    assert results([]) == {}


def test_a_timeout_longer_than_a_thread_can_wait_is_no_timeout():
    assert results([Work(lambda _: 3)], timeout_s=threading.TIMEOUT_MAX * 10) == {0: 3}


def test_jobs_run_at_the_same_time():
    barrier = threading.Barrier(4, timeout=60)
    assert len(results([Work(lambda _: barrier.wait()) for _ in range(4)], num_threads=4)) == 4


def test_no_more_threads_run_than_asked_for():
    names = set()
    results([Work(lambda _: names.add(threading.get_ident())) for _ in range(30)], num_threads=2)
    assert len(names) <= 2


def test_jobs_see_the_callers_context():
    token = COLOUR.set("blue")
    try:
        assert results([Work(lambda _: COLOUR.get())]) == {0: "blue"}
    finally:
        COLOUR.reset(token)


def test_a_late_job_is_told_to_stop_and_the_rest_go_on_without_it():
    release = threading.Event()
    hanging = Work(lambda _: release.wait(60) and "too late")
    jobs = [hanging, *(Work(lambda _, i=i: i) for i in range(3))]
    found = results(jobs, num_threads=1, timeout_s=1.5)
    assert found == {0: "late 1.5", 1: 0, 2: 1, 3: 2}
    assert hanging.stopped.is_set()
    release.set()


def test_a_job_that_raises_stops_the_others_and_raises_here():
    started = threading.Barrier(2, timeout=60)

    def wait(job):
        started.wait()
        return job.stopped.wait(60)

    def fail(_):
        started.wait()
        raise ZeroDivisionError("broken")

    waiting = Work(wait)
    never = [Work(lambda _: pytest.fail("ran after the failure")) for _ in range(3)]
    with pytest.raises(ZeroDivisionError, match="broken"):
        results([waiting, Work(fail), *never], num_threads=2)
    assert waiting.stopped.is_set()


def test_closing_early_stops_what_runs_and_starts_nothing_more():
    ran = []
    waiting = Work(lambda job: job.stopped.wait(60))
    jobs = [Work(lambda _: "quick"), waiting, *(Work(lambda _: ran.append(1)) for _ in range(5))]
    before = threading.active_count()
    iterator = run_jobs(jobs[:2], num_threads=2, timeout_s=60)
    assert next(iterator) == (0, "quick")
    iterator.close()
    assert waiting.stopped.is_set()
    assert threading.active_count() <= before
    assert ran == []


def test_an_interrupt_in_a_job_is_not_swallowed():
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results([Work(interrupt)])


def test_a_halted_batch_ends_with_the_jobs_that_had_started():
    done = []
    jobs = [Work(lambda _, i=i: done.append(i)) for i in range(20)]
    found = list(run_jobs(jobs, num_threads=2, timeout_s=60, halted=lambda: len(done) >= 5))
    assert sorted(index for index, _ in found) == sorted(done)
    assert 5 <= len(done) <= 5 + 1


def test_what_the_cap_cannot_decide_stops_the_batch():
    def halted():
        raise UserError("unknown price")

    with pytest.raises(UserError, match="unknown price"):
        list(run_jobs([Work(lambda _: None)], num_threads=1, timeout_s=60, halted=halted))


@pytest.fixture
def ctrl_c():
    """What a terminal sends, to the thread that waits for results."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    main = threading.get_ident()
    yield lambda: signal.pthread_kill(main, signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def run_until_interrupted(jobs, grace_s):
    with pytest.raises(KeyboardInterrupt):
        for _ in run_jobs(jobs, num_threads=2, timeout_s=60, grace_s=grace_s):
            pass


def test_an_interrupt_lets_what_is_under_way_finish_and_starts_nothing_more(ctrl_c):
    ended = []

    def slow(work):
        ctrl_c()
        time.sleep(0.3)
        ended.append(work)

    jobs = [Work(slow), *[Work(lambda work: time.sleep(0.1) or ended.append(work)) for _ in range(40)]]
    run_until_interrupted(jobs, grace_s=30)
    assert jobs[0] in ended
    assert len(ended) < 10
    assert not any(job.stopped.is_set() for job in jobs)


def test_without_a_grace_what_is_under_way_is_stopped(ctrl_c):
    jobs = [Work(lambda work: ctrl_c() or work.stopped.wait(30)), Work(lambda work: work.stopped.wait(30))]
    run_until_interrupted(jobs, grace_s=0)
    assert jobs[0].stopped.is_set()


def test_a_second_interrupt_stops_what_the_first_one_waited_for(ctrl_c):
    def stubborn(work):
        ctrl_c()
        time.sleep(0.3)
        ctrl_c()
        work.stopped.wait(30)

    started = time.monotonic()
    job = Work(stubborn)
    run_until_interrupted([job], grace_s=60)
    assert job.stopped.is_set()
    assert time.monotonic() - started < 20
