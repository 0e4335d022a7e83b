import math

import dspy
import pytest

from fst_optimizer.errors import MetricError, UserError
from fst_optimizer.rollout.metric import Judgement, Metric
from fst_optimizer.types import Item

EXAMPLE, PREDICTION = dspy.Example(q=1).with_inputs("q"), dspy.Prediction(answer=2)
ITEM = Item("train-3", EXAMPLE)


def judged(function, **rest):
    return Metric(function).judge(ITEM, PREDICTION, **rest)


@pytest.mark.parametrize(
    ("answer", "judgement"),
    [
        (0.5, Judgement(0.5)),
        (True, Judgement(1.0)),
        (3, Judgement(3.0)),
        (-2.5, Judgement(-2.5)),
        (dspy.Prediction(score=0.25, feedback="Nearly."), Judgement(0.25, "Nearly.")),
        (dspy.Prediction(score=0.25), Judgement(0.25)),
        ({"score": 1, "feedback": "Yes."}, Judgement(1.0, "Yes.")),
        ({"score": 1, "feedback": None}, Judgement(1.0, "")),
    ],
)
def test_a_metric_may_return_a_number_or_a_prediction(answer, judgement):
    assert judged(lambda example, prediction: answer) == judgement


def test_numpy_and_torch_numbers_are_numbers():
    import numpy as np
    import torch

    assert judged(lambda example, prediction: np.float32(0.5)).score == 0.5
    assert judged(lambda example, prediction: torch.tensor(0.5)).score == 0.5


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "good",
        "1.0",
        math.nan,
        math.inf,
        -math.inf,
        [1.0],
        dspy.Prediction(feedback="no score"),
        dspy.Prediction(score=None),
        {"feedback": "no score"},
        {"score": math.nan},
        pytest.param(10**400, id="a large number"),
        pytest.param(10**5000, id="a number too long to be shown"),
        dspy.Prediction(score=-(10**400)),
    ],
)
def test_anything_but_a_finite_number_is_the_users_mistake_and_names_the_example(answer):
    with pytest.raises(UserError, match="on example train-3: return a finite number"):
        judged(lambda example, prediction: answer)


class Broken:
    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __float__ = __bool__ = __str__


class BrokenError(Exception):
    __str__ = __repr__ = Broken.__str__


@pytest.mark.parametrize("answer", [Broken(), {"score": 1.0, "feedback": Broken()}, {"score": Broken()}])
def test_an_answer_that_raises_when_it_is_read_is_the_metrics_mistake_and_names_the_example(answer):
    with pytest.raises(MetricError, match=r"on example train-3, which raises when it is read: RuntimeError"):
        judged(lambda example, prediction: answer)


def test_an_error_that_cannot_be_shown_is_named_by_its_type():
    def fussy(example, prediction):
        raise BrokenError

    with pytest.raises(MetricError, match="on example train-3: <BrokenError, whose repr raises RuntimeError>"):
        judged(fussy)


def test_a_metric_that_raises_is_named_with_the_example_and_chained():
    def fussy(example, prediction):
        raise KeyError("gold")

    with pytest.raises(MetricError, match=r"metric fussy raised on example train-3: KeyError\('gold'\)") as caught:
        judged(fussy)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    "function",
    [
        lambda example: 1.0,
        lambda: 1.0,
        lambda example, prediction, trace, name: 1.0,
        lambda a, b, c, d, e, f: 1.0,
        lambda example, prediction, *, strict: 1.0,
    ],
)
def test_a_metric_of_neither_two_nor_five_arguments_is_refused(function):
    with pytest.raises(UserError, match="takes neither two arguments"):
        Metric(function)


@pytest.mark.parametrize("thing", [None, 0.5, "exact_match"])
def test_a_metric_that_cannot_be_called_is_refused(thing):
    with pytest.raises(UserError, match=r"metric is .*: give a function"):
        Metric(thing)


def test_a_metric_with_optional_arguments_is_called_with_two():
    assert judged(lambda example, prediction, trace=None: 1.0 if trace is None else 0.0, trace=["x"]).score == 1.0


def test_a_metric_of_five_arguments_is_told_the_predictor():
    def five(example, prediction, trace, pred_name, pred_trace):
        return dspy.Prediction(score=len(trace or ()), feedback=f"{pred_name} {pred_trace}")

    assert judged(five, trace=[1, 2], pred_name="first", pred_trace=[1]) == Judgement(2.0, "first [1]")
    assert Metric(five).per_predictor


def test_a_callable_object_is_a_metric():
    class Exact:
        def __call__(self, example, prediction, trace=None):
            return prediction.answer == 2

    assert judged(Exact()).score == 1.0


def test_a_dspy_module_is_a_metric_by_its_forwards_arguments():
    class Judge(dspy.Module):
        def forward(self, example, prediction, trace=None):
            return prediction.answer / 4

    assert not Metric(Judge()).per_predictor
    assert judged(Judge()).score == 0.5


def test_where_a_metric_raised_and_what_it_was_given_are_told():
    def metric(example, prediction):
        return prediction.answer == example.answer

    item = Item("train-3", dspy.Example(answer="x"))
    with pytest.raises(MetricError) as caught:
        Metric(metric).judge(item, "a text")
    said = str(caught.value)
    assert said.startswith("the metric raised on example train-3: AttributeError(\"'str' object has no attribute")
    assert "test_metric.py:" in said and "in metric)" in said
    assert said.endswith("; the program returned 'a text': let forward return dspy.Prediction(...)")
