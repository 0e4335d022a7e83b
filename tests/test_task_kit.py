import dspy
import pytest

from fst_optimizer.task_kit import (
    KINDS,
    by_predictor,
    checked_size,
    distinct,
    feedback,
    named,
    numbered,
    spelled,
    split_by_hash,
    split_kind,
)

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


@pytest.mark.parametrize(
    ("variant", "rule", "kind"),
    [
        (None, "", "told"),
        ("", "", "told"),
        ("pipeline", "pipeline", "told"),
        ("pipeline+told", "pipeline", "told"),
        ("a.b-c+shown", "a.b-c", "shown"),
        ("+scored", "", "scored"),
        ("x+shuffled", "x", "shuffled"),
    ],
)
def test_a_variant_is_a_rule_and_a_kind_of_feedback(variant, rule, kind):
    assert split_kind(variant) == (rule, kind)


@pytest.mark.parametrize("variant", ["x+", "x+Told", "x+shown+told", "+none"])
def test_an_unknown_kind_is_told_the_known_ones(variant):
    with pytest.raises(ValueError, match=r"unknown kind of feedback .*; choose one of told, shown, scored, shuffled"):
        split_kind(variant)


def test_a_rule_is_spelled_stage_by_stage():
    assert spelled("t", "a.b-c", "abc", ["x"]) == (("a",), ("b", "c"))
    assert spelled("t", "a-a-a.b.c", "abc", ["x"]) == (("a", "a", "a"), ("b",), ("c",))


@pytest.mark.parametrize("rule", ["d", "a.", "a--b", ".a", "a.b-d", " a", "", "A"])
def test_a_rule_with_an_unknown_operation_is_told_names_and_operations(rule):
    with pytest.raises(ValueError, match=r"unknown variant .* of t; choose one of x, y, or spell a rule.* out of a, b"):
        spelled("t", rule, "ab", ["x", "y"])


@pytest.mark.parametrize("rule", ["a.a.a.a", "a-a-a-a", "a.a-a-a-a"])
def test_a_rule_that_is_too_long_is_refused(rule):
    with pytest.raises(ValueError, match="too long; spell one to 3 stages, each of one to 3 operations"):
        spelled("t", rule, "a", [])


TEXTS = {
    "told": ('Got "b a", expected "a b". Sort.', "Right.", 'Got no answer, expected "a b". Sort.'),
    "shown": ('Got "b a", expected "a b".', "Right.", 'Got no answer, expected "a b".'),
    "scored": ("Score 0.25.", "Score 1.00.", "Score 0.00."),
    "shuffled": ('Got "b a", expected "z".', 'Got "a b", expected "z".', 'Got no answer, expected "z".'),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_feedback_gives_away_what_it_says(kind):
    given = ((0.25, "b a"), (1.0, "a b"), (0.0, None))
    assert tuple(feedback(kind, score, answer, "a b", "Sort.", lambda: "z") for score, answer in given) == TEXTS[kind]


GIVEN = {
    "told": ('Got "b a", but "b a" gives "a b". Sort.', 'Right: "b a" gives "a b".'),
    "shown": ('Got "b a", but "b a" gives "a b".', 'Right: "b a" gives "a b".'),
    "scored": ("Score 0.25.", "Score 1.00."),
    "shuffled": ('Got "b a", but "b a" gives "z".', 'Got "a b", but "b a" gives "z".'),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_given_stands_beside_what_is_right(kind):
    told = [
        feedback(kind, score, answer, "a b", "Sort.", lambda: "z", "b a")
        for score, answer in ((0.25, "b a"), (1.0, "a b"))
    ]
    assert tuple(told) == GIVEN[kind]


@pytest.mark.parametrize("kind", ["told", "shown", "scored"])
def test_only_shuffled_feedback_looks_at_another_example(kind):
    feedback(kind, 0.0, "b", "a", "Sort.", lambda: pytest.fail("asked for another"))
