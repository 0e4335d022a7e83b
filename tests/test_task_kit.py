import dspy
import pytest

from fst_optimizer.task_kit import by_predictor, checked_size, distinct, named, numbered, split_by_hash

SIZES = {"train": 4, "val": 2}


def test_a_split_is_decided_by_the_text_alone():
    # sha256("a") begins with 0xca = 202, "b" with 0x3e = 62, "d" with 0x18 = 24, "f" with 0x25 = 37; modulo 4.
    assert [split_by_hash(text) for text in ("a", "b", "d", "f")] == ["val", "val", "train", "train"]
    assert split_by_hash("e") == "test"  # 0x3f = 63


@pytest.mark.parametrize(("size", "largest", "expected"), [(None, 9, 4), (None, 3, 3), (0, 9, 0), (9, 9, 9)])
def test_no_size_is_the_splits_own_or_all_there_are(size, largest, expected):
    assert checked_size("train", size, SIZES, largest) == expected


@pytest.mark.parametrize(
    ("split", "size", "words"),
    [
        ("dev", 1, "unknown split 'dev'; choose one of train, val"),
        ("val", -1, "between 0 and 9, not -1"),
        ("val", 10, "between 0 and 9, not 10"),
    ],
)
def test_a_wrong_split_or_size_is_named(split, size, words):
    with pytest.raises(ValueError, match=words):
        checked_size(split, size, SIZES, 9)


def test_a_variant_is_found_by_name():
    assert named("letters", {"one": 1}, "one") == 1
    with pytest.raises(ValueError, match="unknown variant 'two' of letters; choose one of one"):
        named("letters", {"one": 1}, "two")


def test_each_key_counts_once_and_none_does_not_belong():
    draws = [("a", 1), (None, 2), ("a", 3), ("b", 4), ("c", 5)]
    assert distinct(draws, 2) == [1, 4]
    assert distinct(draws, 0) == []


def test_patience_ends_a_search_without_end():
    def draws():
        yield "a", 1
        while True:
            yield "a", 2

    assert distinct(draws(), 2, patience=5) == [1]


def test_examples_are_numbered_and_know_their_inputs():
    first, second = numbered("val", 3, [{"q": 1, "a": 2}, {"q": 3, "a": 4}], "q")
    assert (first.id, second.id) == ("val-3-0000", "val-3-0001")
    assert dict(second.inputs()) == {"q": 3}
    assert isinstance(first, dspy.Example) and first.a == 2


JUDGED = {"first": (1.0, "Right."), "second": (0.5, "Sort.")}


def test_the_program_has_the_mean_of_its_predictors_unless_a_score_is_given():
    whole = by_predictor(None, JUDGED, JUDGED.__getitem__)
    assert (whole.score, whole.feedback) == (0.75, "first: Right.\nsecond: Sort.")
    assert by_predictor(None, JUDGED, JUDGED.__getitem__, 0.0).score == 0.0


def test_one_predictor_alone_is_not_named_in_the_feedback():
    assert by_predictor(None, ["second"], JUDGED.__getitem__).feedback == "Sort."


def test_only_the_predictor_that_is_asked_about_is_judged():
    asked = []
    found = by_predictor("second", JUDGED, lambda name: asked.append(name) or JUDGED[name], 1.0)
    assert (found.score, found.feedback, asked) == (0.5, "Sort.", ["second"])
    with pytest.raises(ValueError, match="no predictor 'third', only first, second"):
        by_predictor("third", JUDGED, JUDGED.__getitem__)
