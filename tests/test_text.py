import pytest

from fst_optimizer.text import clock, plain


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


@pytest.mark.parametrize(("seconds", "text"), [(5.4, "0:05"), (65, "1:05"), (3723, "1:02:03")])
def test_times_have_hours_where_there_are_any(seconds, text):
    assert clock(seconds) == text
