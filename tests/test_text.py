import pytest

from fst_optimizer.text import clock, plain, plain_data, shown


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("a\tb\nc é 漢", "a\tb\nc é 漢"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b31m\x07\r", "\\x9b31m\\x07\\x0d"),
        ("ab\u202ecd", "ab\\u202ecd"),
    ],
)
def test_control_characters_are_spelled_out(text, safe):
    assert plain(text) == safe


class Mute:
    def __str__(self):
        raise RuntimeError

    __repr__ = __str__


def test_data_that_holds_itself_or_has_no_text_becomes_plain_all_the_same():
    cyclic = {"name": "a\udcff", Mute: [1, Mute()]}
    cyclic["self"] = [cyclic]
    mute = "<Mute, whose repr raises RuntimeError>"
    plain = {"name": "a\udcff", str(Mute): ["1", mute], "self": ["..."]}
    assert plain_data(cyclic) == plain == plain_data(plain)
    deep = []
    for _ in range(5000):
        deep = [deep]
    assert "..." in str(plain_data(deep))


def test_what_is_shown_of_a_value_is_short_and_never_raises():
    assert shown("a") == "'a'"
    assert shown("a" * 300) == "'" + "a" * 199 + "..."
    assert shown(10**5000) == "<int, whose repr raises ValueError>"


@pytest.mark.parametrize(("seconds", "text"), [(5.4, "0:05"), (65, "1:05"), (3723, "1:02:03")])
def test_times_have_hours_where_there_are_any(seconds, text):
    assert clock(seconds) == text
