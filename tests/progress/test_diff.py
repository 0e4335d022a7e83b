from fst_optimizer.progress.diff import diff


def words(count, name="w"):
    return " ".join(f"{name}{index}" for index in range(count))


def test_what_was_put_in_and_taken_out_is_marked():
    assert diff("Answer the question.", "Answer the question. Drop the last.") == (
        "Answer the question. {+Drop the last.+}"
    )
    assert diff("Say yes at the end.", "Say no at the end.") == "Say [-yes-] {+no+} at the end."
    assert diff("a b", "a b") == "a b"
    assert diff("", "all new") == "{+all new+}"


def test_space_does_not_count():
    assert diff("a\n\n b", "a b") == "a b"


def test_of_what_stayed_only_the_words_beside_a_change_are_shown():
    text = words(100)
    shown = diff(text, text.replace("w50", "CHANGED"))
    assert (
        shown
        == f"... {words(50).split(' ', 42)[-1]} [-w50-] {{+CHANGED+}} {' '.join(f'w{i}' for i in range(51, 59))} ..."
    )


def test_a_long_change_is_cut_in_its_middle():
    shown = diff("old", words(1000))
    assert "w0 w1" in shown and "w999+}" in shown and "... (920 words) ..." in shown
    assert len(shown.split()) < 100


def test_many_changes_end_in_dots():
    shown = diff(words(400), " ".join(f"w{i}" if i % 2 else f"x{i}" for i in range(400)))
    assert shown.count("{+") == 12 and shown.endswith("...")


def test_texts_too_long_to_compare_are_one_change():
    one, other = words(5000), words(5000, "x")
    assert diff(f"begin {one} end", f"begin {other} end").count("{+") == 1


def test_a_word_without_an_end_is_cut():
    assert len(diff("a", "x" * 10_000)) < 150
