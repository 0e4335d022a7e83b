import re
from html import unescape

import pytest
from markdown_it import MarkdownIt

from fst_optimizer.lab.tables import markdown_table
from fst_optimizer.text import clock, code_block, code_span, markdown, plain, plain_data, shown


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("a\tb\nc é 漢", "a\tb\nc é 漢"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b31m\x07\r", "\\x9b31m\\x07\\x0d"),
        ("ab\u202ecd", "ab\\u202ecd"),
        ("a\u200fb\u2028c\u2029d", "a\\u200fb\\u2028c\\u2029d"),
        ("\u061c\u200b\u2060\ufeff\u00ad\u2066", "\\u061c\\u200b\\u2060\\ufeff\\xad\\u2066"),
        ("\U000e0041", "\\U000e0041"),
        ("👩\u200d🚀 \u0645\u06cc\u200c\u062e", "👩\u200d🚀 \u0645\u06cc\u200c\u062e"),
    ],
)
def test_control_characters_are_spelled_out(text, safe):
    assert plain(text) == safe


HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](http://example.org/x.png)",
    "<javascript:alert(1)>",
    "`<b>`",
    "```\n\n<b>now</b>\n\n```",
    "a | b\n\n# head\n\n<b>",
    "\\`<i>\\[x](javascript:y)",
    "&lt;b&gt; {: onclick=alert(1) }",
    "[a]: javascript:alert(1)\n\n[a]",
)


def rendered(page):
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(page)


@pytest.mark.parametrize("text", HOSTILE)
def test_text_in_a_page_of_markdown_is_text(text):
    words = " ".join(text.split())
    assert unescape(rendered(f"before {markdown(text)} after")) == f"<p>before {words} after</p>\n"
    assert unescape(rendered(f"before {code_span(text)} after")) == f"<p>before <code>{words}</code> after</p>\n"
    assert unescape(rendered(f"{code_block(text)}\n\nafter")) == f"<pre><code>{text}\n</code></pre>\n<p>after</p>\n"
    cells = re.findall("<t[dh]>(.*?)</t[dh]>", rendered(markdown_table((text, "b"), [[text, "2"]])), re.DOTALL)
    assert list(map(unescape, cells)) == [words, "b", words, "2"]


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
