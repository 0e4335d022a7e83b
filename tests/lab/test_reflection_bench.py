"""The bench of a fast round with a slow reflection LM: what it runs and tells. Not how long it takes."""

from types import SimpleNamespace

import pytest

from fst_optimizer import FSTConfig
from fst_optimizer.errors import UserError
from fst_optimizer.lab.reflection_bench import SlowAnswers, reflection_bench
from helpers.toy import SETTINGS, Program, answer, examples, metric

TASK = SimpleNamespace(
    name="toy", build_program=Program, metric=metric, load=lambda split, size=None: examples(size or 6)
)


def config(parallel):
    # Every proposal could be accepted: 3 anchor examples and 4 x 3 rollouts.
    values = {"fast.parallel_proposals": parallel, "fast.max_proposals": 4, "fast.max_rollouts": 40}
    return FSTConfig.from_dict(SETTINGS).with_values(values)


def test_both_contenders_make_the_same_proposals_and_one_has_them_in_flight(scripted):
    wrong = scripted(lambda prompt, request: answer(prompt, SimpleNamespace(seed=3)))  # nothing is ever right
    found = reflection_bench(TASK, wrong, config(4), reflection_s=0.05, examples=6, repeats=1)
    # Three anchor examples make minibatches of two and of one that comes twice; two of each.
    assert found["proposals"] == [4, 4] and found["rollouts"] == [3 + 2 * (2 + 1)] * 2
    assert (found["most_in_flight"], found["parallel_proposals"]) == (4, 4)
    assert found["in_flight_over_one_by_one"] == found["round_s_in_flight"] / found["round_s_one_by_one"]


def test_one_in_flight_is_nothing_to_compare_with(scripted):
    with pytest.raises(UserError, match=r"fast\.parallel_proposals is 1: give more to compare with"):
        reflection_bench(TASK, scripted(answer), config(1), reflection_s=0.0)


def test_the_server_answers_as_a_chat_api_does_and_fails_as_told():
    with SlowAnswers(0.0, lambda number, prompt: 503 if number == 2 else f"{number}: {prompt}") as server:
        lm = server.lm()
        assert lm("Hello there") == ["1: Hello there"]
        assert lm.history[-1]["usage"]["prompt_tokens"] == 2
        with pytest.raises(Exception, match="status 503"):
            lm("again")
    assert server.prompts == ["Hello there", "again"] and server.most == 1
