import warnings

import dspy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fst_optimizer import FST
from fst_optimizer.data import batch_at, check_fields, fingerprint, split_data
from fst_optimizer.errors import UserError
from fst_optimizer.types import items_of


def examples(count, start=0):
    return [dspy.Example(question=f"q{start + i}", answer="a").with_inputs("question") for i in range(count)]


def names(items):
    return [item.id for item in items]


def test_without_a_valset_a_seeded_fifth_is_held_out():
    train, val = split_data(examples(20), None, seed=0)
    assert (len(train), len(val)) == (16, 4)
    assert sorted(names(train) + names(val)) == sorted(f"train-{i}" for i in range(20))
    assert names(val) == names(split_data(examples(20), None, seed=0)[1])
    assert names(val) != names(split_data(examples(20), None, seed=1)[1])


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_small_trainset_still_gives_one_example_to_validate_on(count):
    train, val = split_data(examples(count), None, seed=0)
    assert (len(train), len(val)) == (count - 1, 1)


@pytest.mark.parametrize(
    ("trainset", "valset", "named"),
    [
        ([], None, "trainset is empty"),
        ([], examples(1), "trainset is empty"),
        (examples(1), None, "trainset has one example"),
        (examples(2), [], "valset is empty"),
        ([{"question": "a"}, {"question": "b"}], None, "is dict: give a dspy.Example"),
        ([dspy.Example(question="a"), dspy.Example(question="b")], None, r"call \.with_inputs"),
        (examples(2), [dspy.Example(question="a")], r"call \.with_inputs"),
    ],
)
def test_data_that_nothing_can_be_learned_from_is_refused(trainset, valset, named):
    with pytest.raises(UserError, match=named):
        split_data(trainset, valset, seed=0)


class Mute:
    def __str__(self):
        raise RuntimeError("no text")


def cyclic():
    found = {"more": []}
    found["more"].append(found)
    return found


def nested(depth):
    return [] if not depth else [nested(depth - 1)]


ODD = {
    "half a character": ("a \udcff b", r"holds half a character \('\\udcff'\): clean it"),
    "half a character, deep inside": ({"a": ["\ud800"]}, r"holds half a character \('\\ud800'\)"),
    "contains itself": (cyclic(), "contains itself: give plain data"),
    "no text": (Mute(), r"cannot be turned into text \(RuntimeError\('no text'\)\)"),
    "too long a number": (10**5000, "cannot be turned into text"),
    "names of several kinds": ({1: "a", "b": 2}, "cannot be turned into text"),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("field", ["question", "answer"])
def test_a_field_that_cannot_be_written_down_is_refused_with_the_name_of_its_example(odd, field):
    value, said = ODD[odd]
    broken = dspy.Example(**{"question": "q", "answer": "a", field: value}).with_inputs("question")
    with pytest.raises(UserError, match=f"example train-2: its field '{field}' {said}"):
        split_data([*examples(2), broken], examples(2, start=10), seed=0)
    with pytest.raises(UserError, match=f"example val-1: its field '{field}' {said}"):
        split_data(examples(4), [*examples(1, start=10), broken], seed=0)
    with pytest.raises(UserError, match=f"example test-0: its field '{field}' {said}"):
        FST(lambda example, prediction: 1.0, testset=[broken])


def test_a_field_of_any_other_kind_will_do():
    odd = [nested(50), float("nan"), {1, 2}, b"bytes", object(), None, {"a": (1, "é 漢 😀")}]
    check_fields([dspy.Example(question=one).with_inputs("question") for one in odd], "train")


def test_any_iterable_of_examples_will_do():
    train, val = split_data(iter(examples(10)), iter(examples(2, start=10)), seed=0)
    assert (len(train), len(val)) == (10, 2)


def test_shared_examples_are_counted_in_a_warning():
    with pytest.warns(UserWarning, match=r"trainset and valset share 2 example\(s\)"):
        split_data(examples(5), examples(5, start=3), seed=0)


def test_separate_sets_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split_data(examples(5), examples(5, start=5), seed=0)


def test_two_examples_that_ask_the_same_are_the_same():
    one, other = dspy.Example(q=["a", 1], answer=1), dspy.Example(answer=2, q=["a", 1])
    assert fingerprint(one.with_inputs("q")) == fingerprint(other.with_inputs("q"))
    assert fingerprint(one.with_inputs("q")) != fingerprint(one.with_inputs("q", "answer"))


@given(count=st.integers(1, 12), size=st.integers(1, 15), seed=st.integers(0, 50))
def test_batches_are_full_distinct_and_follow_from_the_seed(count, size, seed):
    items = items_of(examples(count), "train")
    for index in range(5):
        batch = batch_at(items, index, size, seed)
        assert len(batch) == len(set(names(batch))) == min(size, count)
        assert batch == batch_at(items, index, size, seed)


@given(epochs=st.integers(1, 4), size=st.integers(1, 4), seed=st.integers(0, 50))
def test_when_the_size_divides_the_data_an_epoch_uses_every_example_once(epochs, size, seed):
    items = items_of(examples(size * 3), "train")
    for epoch in range(epochs):
        used = [name for index in range(3) for name in names(batch_at(items, epoch * 3 + index, size, seed))]
        assert sorted(used) == sorted(names(items))


def test_every_epoch_is_another_shuffle():
    items = items_of(examples(12), "train")
    epochs = [tuple(names(batch_at(items, index, 12, 0))) for index in range(3)]
    assert len(set(epochs)) == 3
