"""Keys: values that nobody may be told, and what looks like one.

What is known to be a key (of an LM, of a server, of the environment) is taken out of texts whatever it looks like.
Who takes an LM or a server in tells it here; every error of this package, every warning that it prints or keeps, and
what it writes of rollouts go through `without_keys`.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

HIDDEN = "***"
SHORTEST, SHORTEST_OF_ENVIRONMENT = 6, 8
"""Shorter values are words rather than keys: taking them out would leave no text readable."""
PLACEHOLDERS = re.compile(
    "(?i)(fake|dummy|test|false|local|your|no|not|some|my|vllm|lm)?[-_ ]?(needed|key|required|key[-_ ]required|studio|"
    "api[-_ ]key|used|secret|password|token)|changeme|credentials?|default|example|letmein|localhost|ollama|"
    "placeholder|token-abc123|unused|anything|nothing|unknown|x+"
)
"""What people write where a server wants a key and looks at none."""

_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_PART = re.compile(
    "(?i)keys?|apikey|token|secrets?|pass|pwd|auth|authorization|bearer|cookie|sig|signature|credentials?"
)
_SECRET_WITHIN = re.compile(r"(?i)password|passwd|passphrase|secret|apikey|credential")
_NO_SECRETS = re.compile("prompt_cache_key|PWD|OLDPWD|token_counts?")
_PLACE = re.compile(r"(PATH|FILE|DIR|SOCK|HOME|URL|HOST|PORT|NAME|TYPE)$")
"""Variables that say where a secret is, and hold none."""
_ABOUT_WHAT = frozenset({"messages", "prompt", "request"})
"""Options of a call that are no settings."""
_HARMLESS_HEADER = re.compile(
    "(?i)accept(-.*)?|anthropic-(beta|version)|api-version|content-type|(http-)?referer|openai-.*|user-agent|x-title"
)
_HEADERS = re.compile(r"(?i)headers?$")
# A password may hold slashes, and even an @: the last one counts.
_USERINFO = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)([^\s/?#:@'\"]*)(:[^\s'\"]*)?@(?![^\s'\"]*@)")
_QUERY = re.compile(r"([?&;])([^=&\s#?;]+)=([^&\s#;'\"]+)")
_SHAPES = (
    re.compile(
        r"(?i)((?:api[_-]?key|access[_-]?token|token|secret|password|key)(?:=|%3D|[\"']?:\s*[\"']?))[^\s&\"',)]{6,}"
    ),
    re.compile(r"(?i)(bearer\s+)[\w.~+/-]{6,}=*"),
    re.compile(r"()\b(?:sk|rk|pk|hf|gsk|xai)[-_][\w-]{12,}"),
    re.compile(r"()\bAIza[\w-]{20,}"),
)
_known: frozenset[str] = frozenset()


# -- what is known ------------------------------------------------------------------------------------------------


def keep_secret(*values: object) -> None:
    """Take these out of all texts from now on. What is no text, too short or a placeholder is left."""
    global _known
    new = {value for value in values if isinstance(value, str) and _is_key(value, SHORTEST)}
    if not new <= _known:
        _known |= new


def keep_secrets_of(settings: Any, *, secret: bool = False) -> None:
    """The same of a client's settings: what has the name of a key, every header, and passwords in addresses."""
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            own = names_a_secret(str(name)) or bool(_HEADERS.search(str(name)))
            keep_secrets_of(value, secret=own or (secret and not _HARMLESS_HEADER.fullmatch(str(name))))
    elif isinstance(settings, list | tuple):
        for value in settings:
            keep_secrets_of(value, secret=secret)
    elif isinstance(settings, str):
        keep_secret(*_secrets_in(settings))
        if secret:
            keep_secret(settings, re.sub(r"(?i)^(bearer|basic|token)\s+", "", settings))


def keep_keys_of_lm(lm: Any, options: Mapping[str, Any] | None = None) -> None:
    """The same of an LM of dspy's, and of the options of a call of it."""
    for settings in (lm.kwargs, getattr(lm, "launch_kwargs", None), getattr(lm, "train_kwargs", None)):
        keep_secrets_of(settings)
    keep_secrets_of({name: value for name, value in (options or {}).items() if name not in _ABOUT_WHAT})
    keep_secrets_of(getattr(lm, "model", ""))
    own = (getattr(lm, "engine", None), getattr(lm, "async_engine", None))  # a custom engine has keys of its own
    for engine in own:
        keep_secrets_of({name: value for name, value in getattr(engine, "__dict__", {}).items() if type(value) is str})


def names_a_secret(name: str) -> bool:
    """Whether what has this name is a key: `api_key`, `sslpassword`, `azure_ad_token`; not `max_tokens`."""
    if _NO_SECRETS.fullmatch(name):
        return False
    return bool(_SECRET_WITHIN.search(name)) or any(map(_SECRET_PART.fullmatch, _PARTS.findall(name)))


def _is_key(value: str, shortest: int) -> bool:
    return len(value.strip()) >= shortest and not PLACEHOLDERS.fullmatch(value.strip())


def _secrets_in(address: str) -> Iterable[str]:
    """The password and the keys in an address, as written and as meant."""
    if "://" not in address:
        return
    try:
        query = parse_qsl(urlsplit(address).query)
    except ValueError:
        query = []
    yield from (value for name, value in query if names_a_secret(name))
    for found in _USERINFO.finditer(address):
        scheme, user, password = found[1], found[2], (found[3] or "")[1:]
        token = password or (user if scheme.lower().startswith("http") else "")
        yield from (token, unquote(token))
        if password:
            yield base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()


def _of_environment() -> frozenset[str]:
    names = list(os.environ)
    return frozenset().union(*(_of_variable(name, os.environ.get(name, "")) for name in names))


@lru_cache(maxsize=4096)
def _of_variable(name: str, value: str) -> frozenset[str]:
    found = frozenset(_secrets_in(value))
    if not found and names_a_secret(name) and not _PLACE.search(name) and not os.path.exists(value):
        found = frozenset({value})
    return frozenset(one for one in found if _is_key(one, SHORTEST_OF_ENVIRONMENT))


@lru_cache(maxsize=8)
def _pattern(values: frozenset[str]) -> re.Pattern[str] | None:
    forms = {form for value in values for form in _forms(value)}
    if not forms:
        return None
    return re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True))))


def _forms(value: str) -> Iterable[str]:
    """A value as it may stand in a text: itself, in JSON, in a `repr`, in an address."""
    yield value
    yield value.strip()
    yield json.dumps(value)[1:-1]
    yield json.dumps(value, ensure_ascii=False)[1:-1]
    yield repr(value)[1:-1]
    yield quote(value, safe="")
    yield quote(value)


# -- texts without it ---------------------------------------------------------------------------------------------


def without_keys(text: str) -> str:
    """A text without the keys that are known."""
    pattern = _pattern(_known | _of_environment())
    return pattern.sub(HIDDEN, text) if pattern else text


def without_secrets(text: str) -> str:
    """A text without keys: those that are known, and what looks like one in an address or a header."""
    text = without_address_secrets(without_keys(text))
    for pattern in _SHAPES:
        text = pattern.sub(r"\1***", text)
    return text


def without_address_secrets(text: str) -> str:
    """A text whose addresses have no passwords, and no keys among what is asked."""

    def user(found: re.Match[str]) -> str:
        scheme, name, password = found.groups()
        if password:
            return f"{scheme}{name}:{HIDDEN}@"
        return f"{scheme}{HIDDEN}@" if scheme.lower().startswith("http") else found[0]

    def asked(found: re.Match[str]) -> str:
        return f"{found[1]}{found[2]}={HIDDEN}" if names_a_secret(found[2]) else found[0]

    return _QUERY.sub(asked, _USERINFO.sub(user, text)) if "=" in text or "@" in text else text


def words_without_secrets(words: Iterable[str]) -> list[str]:
    """A command's words without keys: after options and settings with the name of one, and in addresses."""
    shown: list[str] = []
    option = ""
    for word in words:
        name, equals, value = word.partition("=")
        if names_a_secret(option) and not word.startswith("-"):
            word = HIDDEN
        elif equals and value and "://" not in name and names_a_secret(name.rpartition(".")[2]):
            word = f"{name}={HIDDEN}"
        option = name if word.startswith("-") and not equals else ""
        shown.append(without_secrets(word))
    return shown


def settings_without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A client's settings to write down: without keys and headers, addresses without their passwords."""
    kept = {}
    for name, value in settings.items():
        if names_a_secret(name) or _HEADERS.search(name):
            continue
        if isinstance(value, Mapping):
            value = settings_without_secrets(value)
        elif isinstance(value, str):
            value = without_keys(without_address_secrets(value))
        kept[name] = value
    return kept
