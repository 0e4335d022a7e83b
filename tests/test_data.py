import warnings
from collections import Counter

import dspy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fst_optimizer import FST
from fst_optimizer.data import (
    MOST_KNOWN,
    Success,
    batch_at,
    by_undecided,
    check_fields,
    fingerprint,
    split_data,
    undecided_batch,
    with_groups,
)
from fst_optimizer.errors import UserError
from fst_optimizer.types import Group, Outcome, Rollout, items_of


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


# -- examples by how undecided they are ------------------------------------------------------------------------------


def group(name, *scores, lost=0):
    rollouts = [Rollout("c", name, index, 0, Outcome.OK, score) for index, score in enumerate(scores)]
    rollouts += [Rollout("c", name, 9, 0, Outcome.ENGINE_ERROR, 0.0)] * lost
    return Group(name, tuple(rollouts))


def test_how_an_example_went_by_hand():
    known = with_groups({}, [group("train-0", 1.0, 0.0, 1.0, 1.0, lost=2)])
    assert known == {"train-0": Success(0.75, 0.75, 1)}
    assert known["train-0"].undecided == 4 * (0.75 - 0.75**2)  # 4 x .75 x .25 = .75
    known = with_groups(known, [group("train-0", 0.0, 0.0)])
    assert known == {"train-0": Success(0.375, 0.375, 2)}  # both groups count the same
    for _ in range(2):
        known = with_groups(known, [group("train-0", 1.0, 1.0)])
    # A third of the third group, and .3 of the fourth: .375 + .625 / 3 = .58333, then .58333 + .3 x .41667 = .70833.
    assert known["train-0"].mean == pytest.approx(0.708333, abs=1e-6)
    assert known["train-0"].groups == 4


@pytest.mark.parametrize(
    ("scores", "undecided"),
    [((1, 0), 1.0), ((1, 1), 0.0), ((0, 0), 0.0), ((0.5, 0.5), 0.0), ((0.25, 0.75), 0.25), ((7.0, -3.0), 1.0)],
)
def test_what_is_undecided_is_what_differs(scores, undecided):
    assert with_groups({}, [group("train-0", *scores)])["train-0"].undecided == pytest.approx(undecided)


def test_a_group_that_was_lost_says_nothing_and_what_was_seen_last_is_remembered_longest():
    assert with_groups({}, [group("train-0", lost=3)]) == {}
    known = with_groups({}, [group(f"train-{number}", 1.0) for number in range(MOST_KNOWN)])
    known = with_groups(known, [group("train-0", 0.0), group("train-new", 1.0)])
    assert len(known) == MOST_KNOWN and {"train-0", "train-new"} <= set(known) and "train-1" not in known


@given(count=st.integers(1, 12), size=st.integers(1, 15), seed=st.integers(0, 20))
def test_no_example_starves_whatever_is_known_of_it(count, size, seed):
    items = items_of(examples(count), "train")
    known = {item.id: Success(0.0, 0.0, 9) for item in items[1:]} | {items[0].id: Success(0.5, 0.5, 9)}
    used, batches = set(), 0
    while batches * min(size, count) < 2 * count:
        batch = undecided_batch(items, batches, size, seed, known)
        assert batch == undecided_batch(items, batches, size, seed, known)
        assert len(batch) == len(set(names(batch))) == min(size, count)
        used |= set(names(batch))
        batches += 1
    assert used == set(names(items))  # two epochs' worth of examples, and every one was among them


def test_the_undecided_are_drawn_more_often_and_the_unknown_as_often_as_they():
    items = items_of(examples(30), "train")
    easy = {item.id: Success(1.0, 1.0, 5) for item in items[:10]}
    open_ = {item.id: Success(0.5, 0.5, 5) for item in items[10:20]}
    drawn = Counter(name for index in range(300) for name in names(undecided_batch(items, index, 8, 0, easy | open_)))
    by_kind = [sum(drawn[item.id] for item in items[start : start + 10]) for start in (0, 10, 20)]
    # 400 each by turns; of the other 1200 each of the decided ones has a tenth of the others' weight.
    assert by_kind[0] < 0.62 * min(by_kind[1:])
    assert abs(by_kind[1] - by_kind[2]) < 100
    plain = Counter(name for index in range(300) for name in names(undecided_batch(items, index, 8, 0, {})))
    assert max(plain.values()) < 1.6 * min(plain.values())


def test_the_first_drawn_of_two_is_the_undecided_one_by_its_weight():
    items = items_of(examples(2), "train")
    known = {"train-0": Success(1.0, 1.0), "train-1": Success(0.5, 0.5)}
    first = Counter(by_undecided(items, known, f"seed {number}")[0].id for number in range(2000))
    assert first["train-1"] / 2000 == pytest.approx(1 / 1.1, abs=0.02)  # weights 1 and .1
