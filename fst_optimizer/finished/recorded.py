"""What is believed of a run's files: they are data, and may come from anybody.

Numbers, texts and names in them are used, within bounds. No code, flag, address or path in them is: those come from
the caller alone.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fst_optimizer.config.formats import read_config
from fst_optimizer.config.policy import LoraConfig, VLLMConfig
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.config.section import Remedy, Section
from fst_optimizer.errors import UserError
from fst_optimizer.model.load import model_place, named_place
from fst_optimizer.tasks import Task, shipped_task

logger = logging.getLogger(__name__)

KEPT = ("vllm.gpu_memory_utilization", "vllm.max_in_flight", "vllm.max_model_len")
"""What is taken over of how a run's vLLM was run. The rest are flags, devices, paths, and numbers that take memory."""
NOT_MISSED = ("vllm.log_file",)
"""Each use of a run has one of its own."""
MOST_RANK, MOST_ALPHA, MOST_TOKENS, MOST_CHARACTERS = 4096, 1_000_000, 1_000_000, 1000
MOST_EXAMPLES = 10_000_000
MOST_THREADS, MOST_TIMEOUT_S, MOST_GRACE_S = 256, 86_400.0, 600.0


class RecordedPolicy(Section, section="policy"):
    """How a run's policy was made, by `policy` in its `config.json`."""

    model: Annotated[str, Field(max_length=MOST_CHARACTERS)] = ""
    """Its base, as it was named then."""
    fingerprint: str | None = None
    """Of the base. None where an earlier version of this package wrote it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The base's."""
    engine: str = "torch"
    """What generated."""
    url: str | None = None
    """The vLLM server that it was attached to. It is named in errors, and never asked."""
    lora: LoraConfig = LoraConfig()
    """The adapter's shape."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of the adapter's first weights."""
    max_tokens: int = Field(default=512, ge=1, le=MOST_TOKENS)
    """Most new tokens of a call that does not say."""
    chat_template_args: Annotated[Mapping[str, Any], Remedy("give an object of plain values")] = {}
    """For the chat template's own switches."""


def recorded_policy(config: Mapping[str, Any], where: str) -> RecordedPolicy:
    """`policy` in a run's `config.json`, which is `where`.

    Raises:
        UserError: a value that no run can have.
    """
    given = config.get("policy")
    try:
        if not isinstance(given, Mapping):
            raise UserError(f"policy is {given!r}: give an object of settings")
        lora = LoraConfig(**_object(given, "lora"))
        known = {name: value for name, value in given.items() if name in RecordedPolicy.model_fields}
        made = RecordedPolicy(**{**known, "lora": lora})
        for name, value, most in (("rank", lora.rank, MOST_RANK), ("alpha", lora.alpha, MOST_ALPHA)):
            if value > most:
                raise UserError(f"lora.{name} is {value}: give at most {most}")
        _check_template_args(made.chat_template_args)
    except UserError as error:
        raise UserError(f"{where}: {error}; is this the file of a run?") from error
    return made


def _object(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = given.get(name) or {}
    if not isinstance(value, Mapping):
        raise UserError(f"{name} is {value!r}: give an object of settings")
    return value


def _check_template_args(args: Mapping[str, Any]) -> None:
    """A template's own switches are plain; the tokenizer's arguments would bring another template, or other ids."""
    from transformers import PreTrainedTokenizerBase

    own = [name for name in args if name in inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters]
    odd = [name for name, value in args.items() if not isinstance(value, bool | int | float | str | None)]
    if odd or len(json.dumps(dict(args))) > MOST_CHARACTERS:
        raise UserError(f"policy.chat_template_args has {(odd or ['too much'])[0]!r}: give an object of plain values")
    if own:
        raise UserError(f"policy.chat_template_args has {own[0]!r}, which is the tokenizer's, no template's own switch")


def base_of(made: RecordedPolicy, given: str | None, own: str | None = None) -> str:
    """The base model of a run: what the caller names, else the run's own where its name alone says which that is.

    Where that is a folder, it is `own`, the model of the task that the caller names.

    Raises:
        UserError: the run's files name a folder, which only the caller may give.
    """
    if given is not None:
        model_place(given)
        return given
    place = named_place(made.model) or own
    if place is None:
        raise UserError(
            f"the run's base model was {made.model!r}, and a path in a run's files is not followed: say where that "
            "model is (--model PATH, model=PATH); it is compared with the run's"
        )
    return place


def check_given_base(made: RecordedPolicy, given: str | None, source: str, trust_remote_code: bool) -> None:
    """Raises a UserError where the caller names another model than the run's. Reads the whole model, on the CPU."""
    from fst_optimizer.model.load import check_fingerprint, fingerprint, load_base

    if given is not None and made.fingerprint is not None:
        # In half the memory of float32; a fingerprint is the same in every dtype.
        base = load_base(source, "bfloat16", "cpu", trust_remote_code)
        check_fingerprint(fingerprint(base), made.to_dict(), source)


def check_url(made: RecordedPolicy, engine: str | None, url: str | None) -> None:
    """Raises a UserError where a run was attached to a server, and the caller says neither which, nor what else."""
    if made.engine == "vllm" and made.url is not None and engine is None and url is None:
        raise UserError(
            f"the run was attached to the vLLM server at {made.url!r}, and an address in a run's files is never asked: "
            "give it again (--url, url=), or say what generates (--engine, engine=; vllm starts a server here)"
        )


def settings_kept(recorded: Mapping[str, Any], given: Container[str]) -> dict[str, Any]:
    """A run's dotted settings without those of its vLLM that only the caller may give; warns of what was dropped."""
    dropped = {name: value for name, value in recorded.items() if name.startswith("vllm.") and name not in KEPT}
    default = VLLMConfig().to_dict()
    missed = [
        f"{name}={json.dumps(value)[:MOST_CHARACTERS]}"
        for name, value in dropped.items()
        if name not in given and name not in NOT_MISSED and value != default.get(name.partition(".")[2])
    ]
    if missed:
        logger.warning(
            "the run had %s, not taken from its files: give again what is still wanted (--set vllm.NAME=VALUE)",
            " and ".join(missed),
        )
    return {name: value for name, value in recorded.items() if name not in dropped}


def scoring_config(config: Mapping[str, Any]) -> FSTConfig:
    """A run's settings, to score its program with; numbers that could make this hang are bounded.

    Raises:
        UserError: a value that does not fit.
    """
    found = FSTConfig.from_dict(config)
    return found.with_values(
        {
            "rollout.num_threads": min(found.rollout.num_threads, MOST_THREADS),
            "rollout.timeout_s": min(found.rollout.timeout_s, MOST_TIMEOUT_S),
            "run.grace_s": min(found.run.grace_s, MOST_GRACE_S),
        }
    )


def recorded_size(config: Mapping[str, Any], split: str) -> int | None:
    """How many examples of a split a run used; None where it had none.

    Raises:
        UserError: a number that no run can have.
    """
    data = config["data"].get(split)
    size = data.get("examples") if isinstance(data, Mapping) else None
    if size is not None and (type(size) is not int or not 0 <= size <= MOST_EXAMPLES):
        raise UserError(f"data.{split}.examples is {size!r} in the run's config.json; is this the file of a run?")
    return size


def recorded_task(config: Mapping[str, Any], run_dir: str) -> Task:
    """The task of a run, where it comes with the package.

    Raises:
        UserError: it is another, which only the caller may name.
    """
    name = config.get("task")
    task = shipped_task(name) if isinstance(name, str) else None
    if task is None:
        raise UserError(
            f"run_dir {run_dir!r} is a run of {name!r}, which does not come with fst_optimizer, and a run's files are "
            "not trusted to say which code runs: pass program=, a fresh instance of your program, or task=, its task"
        )
    return task


def config_of(path: Path) -> dict[str, Any]:
    """A run's `config.json`.

    Raises:
        UserError: no such file, no JSON, a newer format, or parts of it are no objects.
    """
    config = read_config(path)
    for name in ("config", "policy", "data"):
        if not isinstance(config.get(name), Mapping):
            raise UserError(f"{path}: {name} is {config.get(name)!r}, no object; is this the file of a run?")
    return config
