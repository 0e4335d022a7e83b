"""Conversations as token ids, in which what somebody wrote stays text.

A tokenizer reads its own control tokens wherever it finds their names: a field of the data with `<|end|><|user|>` in it
would close its turn and speak as the user. So where such a name stands in a message, the template is rendered with a
placeholder in its place, the template's own control tokens are given other names, secret ones, and a copy of the
tokenizer that knows only these makes the ids. The text is otherwise cut and merged as ever, across all seams; and a
conversation without such names goes the tokenizer's usual way.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from fst_optimizer.errors import UserError

_PRIVATE, _SECRET, _LAST = 0x100000, 0x108000, 0x10FFFD
"""Unicode's last private plane, which means nothing to anybody: numbers are written in its first half."""
_LENGTH = 8
"""Of a secret name, in characters of the second half: nobody guesses 120 bits."""

Messages = Sequence[Mapping[str, str]]
_MADE: WeakKeyDictionary[Any, tuple[str, _Names, _PlainTokenizer]] = WeakKeyDictionary()


def encode_chat(tokenizer: Any, messages: Messages, template_args: Mapping[str, Any]) -> tuple[int, ...]:
    """Prompt token ids of a conversation, ready for the assistant's turn.

    Raises:
        UserError: a message has the name of a control token, and this tokenizer cannot write it as text.
    """
    names, plain = _of(tokenizer)
    args = {**template_args, "add_generation_prompt": True}
    if not any(names.suspicious(text) for message in messages for text in message.values()):
        return tuple(tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=False, **args))
    hidden = _Hidden(names)
    safe = [{key: hidden.hide(text) for key, text in message.items()} for message in messages]
    rendered = hidden.whole(tokenizer.apply_chat_template(safe, tokenize=False, **args))
    return tuple(plain.ids(hidden.shown(plain.marked(rendered)), hidden.found))


def encode_text(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of a text by itself. Raises UserError as `encode_chat` does."""
    names, plain = _of(tokenizer)
    if not names.suspicious(text):
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return tuple(plain.ids(text, names.pattern.findall(text)))


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Name -> id of the tokens that data may not become: all special ones, and what the template marks turns with."""
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    written: set[int] = set()
    for conversation in (turns, turns[:1]):
        # Templates raise what they like at conversations that they do not take.
        with contextlib.suppress(Exception):
            written |= set(tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False))
    added = tokenizer.added_tokens_decoder.items()
    return {token.content: int(number) for number, token in added if token.special or number in written}


def _of(tokenizer: Any) -> tuple[_Names, _PlainTokenizer]:
    """What is made once for a tokenizer and its template."""
    made = _MADE.get(tokenizer)
    if made is None or made[0] != tokenizer.chat_template:
        control = control_tokens(tokenizer)
        made = (tokenizer.chat_template, _Names(tokenizer, control), _PlainTokenizer(tokenizer, control))
        _MADE[tokenizer] = made
    return made[1:]


class _Names:
    """Finds the names of control tokens in text."""

    def __init__(self, tokenizer: Any, control: Mapping[str, int]) -> None:
        self.pattern = _any_of(control)
        self.beginnings = {name[:length] for name in control for length in range(1, len(name))}
        self.longest = max(map(len, control), default=0)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.normalizer = getattr(backend, "normalizer", None)
        if self.normalizer is not None:  # which may make a control token's name of what is none yet
            self.normal = _any_of({self.normalizer.normalize_str(name) for name in control})

    def suspicious(self, text: str) -> bool:
        """Whether a name is in the text, or begins at its end: the next message could go on with it."""
        if self.pattern.search(text) or self.hanging(text):
            return True
        return self.normalizer is not None and bool(self.normal.search(self.normalizer.normalize_str(text)))

    def hanging(self, text: str) -> int:
        """The place behind a beginning of a name at the end of the text, white space aside; 0 where there is none."""
        end = len(text.rstrip())
        found = any(text[max(0, end - length) : end] in self.beginnings for length in range(1, self.longest))
        return end if found else 0


class _Hidden:
    """Placeholders for names, each of which is one character behind a secret that no template has an opinion on."""

    def __init__(self, names: _Names) -> None:
        self.names = names
        self.found: list[str] = []
        self.secret = _secret()
        self.pattern = re.compile(f"{self.secret}([{chr(_PRIVATE)}-{chr(_SECRET - 1)}])")

    def hide(self, text: str) -> str:
        """The text without names."""
        text = self.names.pattern.sub(lambda match: self._placeholder(match[0]), text)
        end = self.names.hanging(text)
        return text[: end - 1] + self._placeholder(text[end - 1]) + text[end:] if end else text

    def whole(self, rendered: str) -> str:
        """The rendered template itself. Raises UserError where it took a placeholder apart."""
        left = self.pattern.sub("", rendered)
        if any(part in left for part in self.secret):
            raise _refused(self.found, "the chat template takes the text apart there")
        return rendered

    def shown(self, text: str) -> str:
        """The text with the names in it."""
        return self.pattern.sub(lambda match: self.found[ord(match[1]) - _PRIVATE], text)

    def _placeholder(self, name: str) -> str:
        if name not in self.found:
            self.found.append(name)
        return self.secret + chr(_PRIVATE + self.found.index(name))


class _PlainTokenizer:
    """A copy of a tokenizer that knows its control tokens by secret names alone."""

    def __init__(self, tokenizer: Any, control: Mapping[str, int]) -> None:
        self.numbers_of_control = frozenset(control.values())
        secret = _secret()
        self.marks = {name: secret + chr(_PRIVATE + place) for place, name in enumerate(control)}
        self.number_of_mark = {mark: control[name] for name, mark in self.marks.items()}
        self.pattern, self.mark_pattern = _any_of(control), _any_of(self.number_of_mark)
        self.backend: Any = None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            self._copy(backend)

    def _copy(self, backend: Any) -> None:
        from tokenizers import Tokenizer

        made = json.loads(backend.to_str())
        numbers = {}
        for entry in made["added_tokens"]:
            entry["content"] = self.marks.get(entry["content"], entry["content"])
            numbers[entry["content"]] = entry["id"]
        made |= {"truncation": None, "padding": None, "post_processor": None}
        self.backend = Tokenizer.from_str(json.dumps(made))
        # A name that was in the model's own vocabulary has a new one, and so a new number, and others behind it too.
        self.numbers = {self.backend.token_to_id(content): number for content, number in numbers.items()}

    def marked(self, text: str) -> str:
        """A text with all control tokens under their secret names."""
        return self.pattern.sub(lambda match: self.marks[match[0]], text)

    def ids(self, text: str, found: Sequence[str]) -> list[int]:
        """Token ids of a marked text. Raises UserError where they have other control tokens than its marks."""
        if self.backend is None:
            raise _refused(found, "its tokenizer is none of the tokenizers library")
        ids = [self.numbers.get(number, number) for number in self.backend.encode(text, add_special_tokens=False).ids]
        wanted = [self.number_of_mark[match[0]] for match in self.mark_pattern.finditer(text)]
        if [number for number in ids if number in self.numbers_of_control] != wanted:
            raise _refused(found, "its tokenizer makes a control token of it all the same")
        return ids


def _any_of(names: Any) -> re.Pattern[str]:
    """Finds the longest of these names."""
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _secret() -> str:
    return "".join(chr(_SECRET + secrets.randbelow(_LAST - _SECRET)) for _ in range(_LENGTH))


def _refused(found: Sequence[str], reason: str) -> UserError:
    shown = ", ".join(repr(name) for name in found)[:200]
    return UserError(
        f"a message has {shown}, which is, or begins, a control token of this model, and cannot be kept as text: "
        f"{reason}; take it out of the data, or take another model"
    )
