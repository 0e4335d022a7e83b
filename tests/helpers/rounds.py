"""A made-up world for fast rounds: what a policy does under instructions, and reflectors that say what they must."""

import random

import dspy

from fst_optimizer.config.run import FastConfig
from fst_optimizer.evolve.extractive import ExtractiveReflector
from fst_optimizer.evolve.reflect import Reflector
from fst_optimizer.evolve.round import evolve
from fst_optimizer.types import Candidate, Item, Outcome, Population, Rollout, TraceStep

RULES = {"first": "Drop the last letter.", "second": "Sort the letters, then move the first letter to the end."}
SEED = Candidate(dict.fromkeys(RULES, "Answer the question."))
GOOD = Candidate({name: f"Answer the question. {rule}" for name, rule in RULES.items()}, origin="given")


def items(count=16):
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcdefgh", k=6)) for _ in range(count)]
    return tuple(
        Item(f"train-{i}", dspy.Example(letters=text, answer=text[::-1]).with_inputs("letters"))
        for i, text in enumerate(texts)
    )


class World:
    """A policy that follows a rule when its instruction has it, on all examples but the hard ones."""

    def __init__(self, rules=RULES, hard=(), version=0, feedback=True):
        self.rules, self.hard, self.version, self.feedback = rules, set(hard), version, feedback
        self.runs = []
        self.captures = []

    def __call__(self, candidate, items, *, capture):
        self.runs += [(candidate.id, item.id) for item in items]
        self.captures.append(capture)
        return [self.rollout(candidate, item, capture) for item in items]

    def rollout(self, candidate, item, capture):
        right = {
            name: float(rule in candidate.texts[name] and item.id not in self.hard) for name, rule in self.rules.items()
        }
        words = {name: "Right." if right[name] else f'Got "{item.id}". {rule}' for name, rule in self.rules.items()}
        steps = (
            TraceStep("first", {"letters": item.example.letters}, {"middle": f"m {item.id}"}, ""),
            TraceStep("second", {"middle": f"m {item.id}"}, {"answer": f"a {item.id}"}, ""),
        )
        return Rollout(
            candidate_id=candidate.id,
            example_id=item.id,
            index=0,
            policy_version=self.version,
            outcome=Outcome.OK,
            score=sum(right.values()) / len(right),
            trace=steps if capture else (),
            feedback=words if capture and self.feedback else {},
            predictor_scores=right if capture else {},
        )


class Lossy(World):
    """The engine fails the rollouts of some candidates on some examples, so many times each."""

    def __init__(self, lost, times=9, **more):
        super().__init__(**more)
        self.left = {(candidate.id, f"train-{number}"): times for candidate, numbers in lost for number in numbers}

    def rollout(self, candidate, item, capture):
        found = super().rollout(candidate, item, capture)
        key = candidate.id, item.id
        self.left[key] = self.left.get(key, 0) - 1
        if self.left[key] < 0:
            return found
        return Rollout(candidate.id, item.id, 0, self.version, Outcome.ENGINE_ERROR, 0.0, error="away")


class Scripted(Reflector):
    """A reflector that says what it is told, round and round."""

    def __init__(self, *answers):
        self.answers, self.calls, self.cost_usd, self.note = answers, 0, 0.0, ""

    def __call__(self, component, current, dataset):
        answer = self.answers[self.calls % len(self.answers)]
        self.calls += 1
        if isinstance(answer, Exception):
            raise answer
        return answer(component, current) if callable(answer) else answer


def numbered():
    """A reflector whose every text is new and worthless."""
    counter = iter(range(10_000))
    return Scripted(lambda component, current: f"Try {next(counter)}.")


def fast(world=None, population=None, reflector=None, anchor=None, *, config=None, seed=0, **more):
    arguments = {"policy_version": 3, "cycle": 2, "components": tuple(RULES), "count_tokens": len, "root": SEED, **more}
    world = world or World()
    return evolve(
        population or Population((SEED,)),
        lambda wanted, *, capture: [one for pair in wanted for one in world(*pair, capture=capture)],
        items() if anchor is None else anchor,
        reflector or ExtractiveReflector(seed),
        config or FastConfig(),
        seed=seed,
        **arguments,
    )
