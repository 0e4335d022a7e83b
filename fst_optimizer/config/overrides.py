"""The command line's settings: presets, the task's own, a file, `--set train.lr=1e-3`, in that order.

Names are those of `config.json` with dots. Three sections belong to the policy rather than to `FSTConfig`: `lora`,
`vllm`, and `policy` with what else a local model is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fst_optimizer.config.formats import ELSEWHERE, RENAMED, read_config
from fst_optimizer.config.policy import LoraConfig, PolicyConfig, VLLMConfig
from fst_optimizer.config.presets import preset
from fst_optimizer.config.run import OPEN, FSTConfig, nested
from fst_optimizer.errors import UserError, did_you_mean
from fst_optimizer.store.files import parse_json
from fst_optimizer.text import shown

Values = Mapping[str, Any]
"""Dotted setting name -> value."""


@dataclass(frozen=True)
class Settings:
    """Everything that the command line can set."""

    config: FSTConfig = field(default_factory=FSTConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    vllm: VLLMConfig = field(default_factory=VLLMConfig)


def base_config(own: FSTConfig | Mapping[str, Any] | None, auto: str | None) -> FSTConfig:
    """What a caller or a task sets, over a preset; None: `light`.

    An `FSTConfig` sets what was given when it was made, be it with the value that is the default.

    Raises:
        UserError: there is no such preset or setting, or a value does not fit.
    """
    if own is None:
        own = {}
    return FSTConfig.from_dict(
        own.given() if isinstance(own, FSTConfig) else own, preset("light" if auto is None else auto)
    )


def settled(base: FSTConfig, *layers: Values) -> Settings:
    """Dotted settings over a config, later layers over earlier ones, validated together at the end.

    Raises:
        UserError: an unknown name (with the nearest one), or a value that does not fit.
    """
    values = {name: value for layer in layers for name, value in layer.items()}
    check_names(values)
    given = nested(values)
    lora, policy, vllm = (given.pop(name, {}) for name in ("lora", "policy", "vllm"))
    return Settings(FSTConfig.from_dict(given, base), LoraConfig(**lora), PolicyConfig(**policy), VLLMConfig(**vllm))


def assignments(pairs: Iterable[str]) -> dict[str, Any]:
    """`NAME=VALUE` strings as dotted settings; a value is JSON where it parses, else a string.

    Raises:
        UserError: a string without `=`.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UserError(f"--set is {pair!r}: give NAME=VALUE, e.g. --set train.lr=1e-3")
        try:
            values[name.strip()] = parse_json(text)
        except ValueError:
            values[name.strip()] = text
    return values


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON file of nested settings as dotted ones; a run's `config.json` gives the settings of that run."""
    data = read_config(path)
    if isinstance(data.get("config"), dict):
        made = data.get("policy", {})
        if not isinstance(made, dict):
            raise UserError(f"{path}: policy is {shown(made)}: give an object of settings")
        policy = {"max_tokens": made["max_tokens"]} if "max_tokens" in made else {}
        data = {**data["config"], "lora": made.get("lora", {}), "vllm": made.get("vllm") or {}, "policy": policy}
    return flat(data)


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train": {"lr": 1}}` as `{"train.lr": 1}`."""
    values: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            values.update(flat(value, f"{prefix}{name}."))
        else:
            values[prefix + name] = value
    return values


def check_names(names: Iterable[str]) -> None:
    """Every name is a setting.

    Raises:
        UserError: names the first that is not, and the nearest that is.
    """
    apart = {section.section: section().to_dict() for section in (LoraConfig, PolicyConfig, VLLMConfig)}
    known = [*(f"{name}.NAME" for name in OPEN), *flat({**FSTConfig().to_dict(), **apart})]
    for name in names:
        if name in known or any(name.startswith(f"{one}.") and name != f"{one}." for one in OPEN):
            continue
        within = [full for full in known if full.startswith(f"{name}.")]
        if within:
            raise UserError(f"setting {name!r} is a section: set one of {', '.join(within)}")
        leaf = [full for full in known if full.rpartition(".")[2] == name.rpartition(".")[2]]
        section, dot, rest = name.partition(".")
        renamed = RENAMED.get(section, section) + dot + rest
        same = leaf or [ELSEWHERE[last] for last in [name.rpartition(".")[2]] if last in ELSEWHERE]
        remedy = f"did you mean {same[0]!r}?" if same else did_you_mean(renamed, known)
        raise UserError(f"unknown setting {name!r}; {remedy}")
