"""Several proposals in flight: the same whatever comes first, none lost with another, and one at a time as ever."""

import hashlib
import json
import logging
import threading
import time

import pytest

from fst_optimizer.config.run import FastConfig
from fst_optimizer.errors import StorageError
from fst_optimizer.evolve.reflect import Ask, LMReflector
from fst_optimizer.evolve.round import evolve
from fst_optimizer.failpoints import inject, raising
from fst_optimizer.lab.reflection_bench import SlowAnswers
from fst_optimizer.lab.reflection_bench import numbered as new_text
from fst_optimizer.store.journal import Journal
from fst_optimizer.types import Candidate, Outcome, Population, Rollout, TraceStep
from helpers.rounds import GOOD, RULES, SEED, Lossy, Scripted, World, fast, items, numbered
from helpers.toy import Reflection, answer, assert_same_run, run_toy

FOUR = FastConfig(parallel_proposals=4, patience=0)
ENTRY = {"Inputs": {"question": "q"}, "Generated Outputs": {"answer": "a"}, "Feedback": "Wrong.", "Score": 0.0}


def told(world, found):
    """Everything that a round did and found, as plain data."""
    rows = {name: dict(row) for name, row in found.population.scores.items()}
    ids = [candidate.id for candidate in found.population.candidates]
    counts = [found.proposals, found.accepted, found.rollouts, found.reused, found.reflection_calls]
    return [world.runs, world.captures, ids, rows, found.notes, *counts, found.tried]


def test_one_at_a_time_everything_is_as_it_was_before_there_were_several():
    """The digest of 16 rounds, taken from the version before."""
    hard = [f"train-{number}" for number in range(0, 16, 3)]
    rounds = []
    for seed in range(4):
        for temperature in (0.0, 0.5):
            for components in ("round_robin", "all"):
                config = FastConfig(temperature=temperature, components=components, patience=6)
                world, reflector = World(hard=hard), None if seed % 2 else numbered()
                rounds.append(told(world, fast(world, seed=seed, config=config, reflector=reflector)))
    assert sum(one[7] for one in rounds) == 888
    assert hashlib.sha256(json.dumps(rounds).encode()).hexdigest()[:16] == "eec64559f9be7ed0"


class Batches(Scripted):
    """Notes how many reflections were asked for together."""

    def __init__(self, *answers):
        super().__init__(*answers)
        self.sizes = []

    def many(self, asks, at_once=1):
        self.sizes.append((len(asks), at_once))
        return super().many(asks, at_once)


def always_new():
    counter = iter(range(10_000))
    return Batches(lambda component, current: f"Try {next(counter)}.")


def evolved(config, reflector, **more):
    """A round, and how many candidates and rollouts each batch of the collector had."""
    world, batches = World(), []

    def score(wanted, *, capture):
        batches.append((len(wanted), sum(len(items) for _, items in wanted)))
        return [one for pair in wanted for one in world(*pair, capture=capture)]

    known = {"policy_version": 3, "cycle": 2, "seed": 0, "components": tuple(RULES), "count_tokens": len, "root": SEED}
    known |= more
    return evolve(Population((SEED,)), score, items(), reflector, config, **known), batches


def test_reflections_are_asked_for_together_and_minibatches_run_as_one_batch():
    reflector = always_new()
    found, batches = evolved(FOUR.model_copy(update={"max_proposals": 10}), reflector)
    assert reflector.sizes == [(4, 4), (4, 4), (2, 4)]
    assert batches == [(1, 16), (4, 16), (4, 16), (2, 8)]
    assert (found.proposals, found.rollouts, found.notes[-1]) == (10, 16 + 40, "ended: max_proposals")


def test_what_is_accepted_together_is_scored_as_one_batch():
    texts = iter(f"{rule} {number}" for number in range(9) for rule in RULES.values())
    reflector = Batches(lambda component, current: f"{RULES[component]} {next(texts)}")
    found, batches = evolved(FOUR.model_copy(update={"max_proposals": 4}), reflector)
    assert batches == [(1, 16), (4, 16), (4, 48)]
    assert (found.accepted, found.rollouts) == (4, 80)


def test_no_more_start_together_than_the_budget_could_accept():
    # After the 16 of rescoring, 40 are left: two proposals of at most 16 each fit, then one.
    reflector = always_new()
    found, _ = evolved(FOUR.model_copy(update={"max_rollouts": 56}), reflector)
    assert [size for size, _ in reflector.sizes] == [2, 2, 1, 1, 1]
    assert found.rollouts == 16 + 7 * 4
    assert found.notes[-1] == "ended: the rollout budget"


@pytest.mark.parametrize(("left", "sizes"), [(5, [4, 1]), (8, [4, 4])])
def test_reflections_left_cap_what_is_in_flight(left, sizes):
    reflector = always_new()
    found, _ = evolved(FOUR, reflector, reflections_left=left)
    assert [size for size, _ in reflector.sizes] == sizes
    assert found.reflection_calls == found.proposals == left


def test_several_parents_are_reflected_on_together():
    """Two specialists lead on half of the examples each: both are drawn as parents in a batch of eight."""

    class Specialists(World):
        def rollout(self, candidate, item, capture):
            mine = candidate.texts["first"] == str(int(item.id[6:]) % 2)
            return Rollout(**{**vars(super().rollout(candidate, item, capture)), "score": 0.5 if mine else 0.0})

    olds = Population(tuple(Candidate({**SEED.texts, "first": str(half)}) for half in (0, 1)))
    seen = []

    class Seen(Scripted):
        def many(self, asks, at_once=1):
            seen.append({(ask.component, ask.current) for ask in asks})
            return super().many(asks, at_once)

    fast(Specialists(), olds, Seen(None), config=FastConfig(parallel_proposals=8, patience=1))
    assert {current for component, current in seen[0] if component == "first"} == {"0", "1"}


def test_what_is_reflected_on_together_is_what_would_be_one_after_the_other_and_never_the_same_twice():
    """Eight minibatches of four from sixteen examples: after four of them they are shuffled anew."""

    def read(parallel):
        seen = []

        class Reads(Scripted):
            def __call__(self, component, current, dataset):
                seen.append((component, tuple(entry["Inputs"].get("letters", entry["Feedback"]) for entry in dataset)))
                return super().__call__(component, current, dataset)

        counter = iter(range(99))
        reflector = Reads(lambda component, current: f"Try {next(counter)}.")
        fast(reflector=reflector, config=FastConfig(parallel_proposals=parallel, max_proposals=10, patience=0))
        return seen

    assert read(1) == read(4) == read(8) and len(set(read(8)[:8])) == 8


def test_one_failing_reflection_of_several_loses_none_of_the_others(caplog):
    class Third(Batches):
        def __call__(self, component, current, dataset):
            text = super().__call__(component, current, dataset)
            if self.calls == 3:
                raise RuntimeError("refused")
            return text

    reflector = Third(lambda component, current: f"{current} {RULES[component]}")
    with caplog.at_level(logging.WARNING):
        found, batches = evolved(FOUR.model_copy(update={"max_proposals": 4, "components": "all"}), reflector)
    assert reflector.sizes == [(8, 4)]
    assert "no new text for first: RuntimeError: refused" in found.notes
    assert found.best_score == 1.0
    assert len(caplog.records) == 1
    assert batches[1][0] == 2  # the whole rule, and the second part alone; the others say the same


def test_the_same_text_of_two_in_flight_is_run_once():
    reflector = Batches("Always the same.")
    found, batches = evolved(FOUR.model_copy(update={"max_proposals": 4, "components": "all"}), reflector)
    assert (found.proposals, batches) == (4, [(1, 16), (1, 4)])
    assert sum("proposed again" in note for note in found.notes) == 3


def test_a_batch_without_an_acceptance_counts_whole_for_patience():
    found, _ = evolved(FastConfig(parallel_proposals=3, patience=4), always_new())
    assert (found.proposals, found.notes[-1]) == (6, "ended: patience")


# -- the reflection LM -----------------------------------------------------------------------------------------------


class Turned:
    """An LM whose calls are answered together once `width` of them are there, the last that came first."""

    def __init__(self, width, fails=()):
        self.width, self.fails, self.history = width, fails, []
        self.waiting, self.done = [], []
        self.lock = threading.Condition()

    def __call__(self, prompt, **options):
        number = int(prompt.partition("Number ")[2].partition(".")[0])
        with self.lock:
            self.waiting.append(number)
            self.lock.notify_all()
            full = len(self.waiting) == self.width
            assert full or self.lock.wait_for(lambda: len(self.waiting) == self.width, 20)
            assert self.lock.wait_for(lambda: len(self.done) == self.width - 1 - self.waiting.index(number), 20)
            self.done.append(number)
            if number not in self.fails:
                self.history.append({"prompt": prompt, "cost": float(number)})
            self.lock.notify_all()
            # None returns before all are in the history.
            assert self.lock.wait_for(lambda: len(self.done) == self.width, 20)
            if number in self.fails:
                raise RuntimeError("slow down")
        return [f"```\nText {number}, answer {self.done.index(number)}.\n```"]


def asks(*numbers):
    return [Ask("first", f"Number {number}.", [ENTRY]) for number in numbers]


def test_answers_and_costs_belong_to_their_questions_whoever_is_answered_first():
    lm = Turned(4, fails=(3,))
    reflector = LMReflector(lm)
    answers = reflector.many(asks(1, 2, 3, 4), 4)
    assert lm.done == lm.waiting[::-1]
    assert [one.text and one.text.partition(",")[0] for one in answers] == ["Text 1", "Text 2", None, "Text 4"]
    assert answers[2].note == "the reflection LM failed: RuntimeError: slow down"
    assert (reflector.calls, reflector.cost_usd, reflector.failure) == (4, 7.0, "")


def test_a_wrong_key_is_seen_in_a_batch_and_forgotten_once_one_is_answered():
    with SlowAnswers(0.0, lambda number, prompt: 401) as server:
        reflector = LMReflector(server.lm())
        answers = reflector.many(asks(1, 2, 3), 3)
        assert [(one.text, one.lost) for one in answers] == [(None, False)] * 3
        assert "status 401" in reflector.failure
        with SlowAnswers(0.0, new_text) as right:
            reflector.lm = right.lm()
            assert reflector.many(asks(4), 3)[0].text
        assert reflector.failure == ""


def test_no_more_calls_are_in_flight_than_allowed():
    with SlowAnswers(0.1, new_text) as server:
        answers = LMReflector(server.lm()).many(asks(*range(6)), 3)
    assert len({one.text for one in answers}) == 6
    assert (server.most, len(server.prompts)) == (3, 6)


@pytest.mark.parametrize(("parallel", "most"), [(1, 1), (4, 4)])
def test_a_round_asks_a_real_server_as_often_at_once_as_it_is_told(parallel, most):
    """The latency is real: 0.3 s. What is asserted is how many requests were there together."""
    config = FastConfig(parallel_proposals=parallel, patience=0, max_proposals=4)
    with SlowAnswers(0.3, new_text) as server:
        found = fast(reflector=LMReflector(server.lm()), config=config)
    assert (server.most, len(server.prompts), found.proposals) == (most, 4, 4)


def test_a_server_that_refuses_one_request_of_four_loses_one_proposal():
    with SlowAnswers(0.1, lambda number, prompt: 400 if number == 2 else new_text(number, prompt)) as server:
        found = fast(reflector=LMReflector(server.lm()), config=FOUR.model_copy(update={"max_proposals": 4}))
    assert found.proposals == 4 and len(found.tried) == 3
    assert found.rollouts == 16 + 3 * 4
    assert sum("the reflection LM failed" in note for note in found.notes) == 1


def test_the_same_prompt_twice_in_flight_gets_its_own_answer_back_after_a_crash(tmp_path):
    journal = Journal(tmp_path / "1.jsonl")
    for number in (3, 1, 2):  # as they came
        journal.add_reflection("prompt", f"answer {number}", 0.0, number)
    journal.close()
    again = Journal(tmp_path / "1.jsonl")
    assert [again.reflection("prompt", number)["text"] for number in (1, 2, 3)] == ["answer 1", "answer 2", "answer 3"]
    assert again.reflection("prompt", 1) is None


def test_an_interrupt_leaves_those_in_flight_the_time_to_be_written_down(tmp_path, caplog):
    """The first answer brings the interrupt, the others come 2.5 s later: a pool that is stopped waits for 2 s."""

    def late(number, prompt):
        if number > 1:
            time.sleep(2.5)
        return new_text(number, prompt)

    path = tmp_path / "1.jsonl"
    with SlowAnswers(0.0, late) as server:
        reflector = LMReflector(server.lm(), grace_s=30.0)
        reflector.journal = Journal(path)
        with inject("reflection.answer", raising(KeyboardInterrupt()), times=1), pytest.raises(KeyboardInterrupt):
            reflector.many(asks(1, 2, 3, 4), 4)
        assert len(path.read_bytes().splitlines()) == 3
        assert "interrupted; waiting up to 30 s for 3 reflections (again to drop them)" in caplog.text
        reflector.journal.close()
        again = LMReflector(server.lm())
        again.journal = Journal(path)
        answers = again.many(asks(1, 2, 3, 4), 4)
    assert len(server.prompts) == 5  # the interrupted one alone
    assert len({one.text for one in answers} - {None}) == 4


def test_an_answer_of_several_that_cannot_be_written_down_ends_the_round():
    class Full(LMReflector):
        def hear(self, prompt, number):
            if number == 2:
                raise StorageError("the disk is full")
            return super().hear(prompt, number)

    with SlowAnswers(0.0, new_text) as server, pytest.raises(StorageError, match="the disk is full"):
        fast(reflector=Full(server.lm()), config=FOUR)


@pytest.mark.parametrize("place", [("reflection.answer", 2), ("rollout.end", 14)])
def test_a_run_with_several_in_flight_resumes_to_the_same(scripted, tmp_path, place):
    values = {"fast.parallel_proposals": 3, "fast.max_proposals": 4, "fast.max_rollouts": 40}

    class Same(Reflection):
        """Says the same to the same prompt, in any order."""

        def __call__(self, prompt=None, messages=None, **kwargs):
            self.calls += 1
            return [f"```\nAnswer. {hashlib.sha256(prompt.encode()).hexdigest()[:6]}\n```"]

    def run(name, **options):
        return run_toy(tmp_path / name, scripted(answer), values=values, reflection_lm=Same(), **options)

    whole = run("whole")
    assert whole["reflection_calls"] > 3
    with inject(place[0], raising(KeyboardInterrupt()), after=place[1]), pytest.raises(KeyboardInterrupt):
        run("killed")
    run("killed", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


# -- a limit on tokens ----------------------------------------------------------------------------------------------


def test_a_text_over_the_limit_is_rejected_before_any_rollout_with_its_reason():
    reflector = Scripted("One two three four.", "One two.")
    config = FastConfig(max_instruction_tokens=3, max_proposals=2)
    found, batches = evolved(config, reflector, count_tokens=lambda text: len(text.split()))
    assert batches == [(1, 16), (1, 4)]  # the short one alone
    assert (found.proposals, found.accepted, len(found.tried)) == (2, 0, 1)
    assert found.notes[-3:] == (
        "the text for first has 4 tokens, more than the 3 of fast.max_instruction_tokens: not run",
        "1 texts had more tokens than fast.max_instruction_tokens (3)",
        "ended: max_proposals",
    )


def test_the_reflection_lm_is_told_of_the_limit_and_of_none_otherwise():
    with SlowAnswers(0.0, new_text) as server:
        LMReflector(server.lm(), max_tokens=40).many(asks(1))
        LMReflector(server.lm()).many(asks(1))
    limited, plain = server.prompts
    assert limited == f"{plain}\n\nThe new instruction must not be longer than 40 tokens."


def test_the_policys_tokens_are_counted(scripted):
    policy = scripted(answer)
    assert policy.count_tokens("abc d") == 5  # one token a byte
    assert policy.count_tokens("") == 0


# -- minibatches in which everything failed ----------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [Outcome.PARSE_ERROR, Outcome.TRUNCATED, Outcome.TIMEOUT, Outcome.PROGRAM_ERROR])
@pytest.mark.parametrize("parallel", [1, 4])
def test_a_minibatch_in_which_every_rollout_failed_is_reflected_on(outcome, parallel):
    """The first predictor's answers are of no use, and the program never comes to the second."""

    class Failing(World):
        def rollout(self, candidate, item, capture):
            if RULES["first"] in candidate.texts["first"]:
                return super().rollout(candidate, item, capture)
            outputs = None if outcome in (Outcome.PARSE_ERROR, Outcome.TRUNCATED) else {"middle": "m"}
            trace = (TraceStep("first", {"letters": item.example.letters}, outputs, "so it says"),)
            return Rollout(candidate.id, item.id, 0, 0, outcome, 0.0, trace=trace, error="it failed")

    seen = []

    class Reads(Scripted):
        def __call__(self, component, current, dataset):
            seen.append((component, [entry["Feedback"] for entry in dataset]))
            return super().__call__(component, current, dataset)

    reflector = Reads(lambda component, current: f"{current} {RULES[component]}")
    found = fast(Failing(), reflector=reflector, config=FastConfig(parallel_proposals=parallel))
    assert seen[0][0] == "first" and len(seen[0][1]) == 4 and all("it failed" in words for words in seen[0][1])
    assert found.best_score == 1.0


def test_what_the_engine_lost_altogether_is_not_reflected_on():
    reflector = Scripted(lambda component, current: GOOD.texts[component])
    found = fast(Lossy([(SEED, range(16))]), reflector=reflector, config=FOUR)
    assert (found.reflection_calls, found.proposals) == (0, 0)
