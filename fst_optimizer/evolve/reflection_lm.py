"""The reflection LM by name: as the command line takes it, and as a run's `config.json` has it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.engines.recorder import RecordingEngine
from fst_optimizer.errors import UserError
from fst_optimizer.evolve.task_lms import TaskEngine
from fst_optimizer.keys import without_address_secrets, without_secrets
from fst_optimizer.store.meter import OWN_SERVERS

if TYPE_CHECKING:
    import dspy

    from fst_optimizer.policy.policy import Policy

POLICY = "policy"
"""The name of the policy's own base, `policy.base_lm`."""
EXTRACTIVE = "extractive"
"""The name of no LM: the extractive reflector, also where a task brings an LM."""
_NAME = re.compile(r"[\w.-]+(/[\w.:@+-]+)*")


def check_lm_name(name: str) -> None:
    """A name can be asked: it is one, and the key that its provider needs is in the environment.

    Raises:
        UserError: it is none, it seems to hold a key, or its key is missing.
    """
    if without_secrets(name) != name:
        raise UserError(
            "reflection_lm holds what looks like a key: give the model's name alone; keys are read from the "
            "environment, e.g. OPENAI_API_KEY"
        )
    if not _NAME.fullmatch(name):
        raise UserError(
            f"reflection_lm is {name!r}: give a model's name as litellm has it, e.g. openai/gpt-5.2, {POLICY!r} for "
            f"the policy's own base, or {EXTRACTIVE!r} for no LM; keys and addresses are read from the environment"
        )
    if name in (POLICY, EXTRACTIVE) or name.partition("/")[0] in OWN_SERVERS:
        return
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else importing it asks the network for prices
    import litellm

    litellm.suppress_debug_info = True  # else an unknown provider prints a page of advice
    lacking = litellm.validate_environment(model=name)["missing_keys"]
    # Providers that want more than a key (a region, a project) also take it from files of their own.
    if lacking and all(variable.endswith("_API_KEY") for variable in lacking):
        raise UserError(
            f"reflection_lm is {name!r}, and {' or '.join(lacking)} is not set: export it, or name another LM"
        )


def check_lm(lm: object) -> None:
    """Raises a UserError for what is given as `reflection_lm` and is no LM."""
    import dspy

    if isinstance(lm, str):
        raise UserError(f"reflection_lm is {lm!r}: give an LM, reflection_lm=dspy.LM({lm!r})")
    if lm is not None and not isinstance(lm, dspy.BaseLM):
        raise UserError(f"reflection_lm is {lm!r}: give a dspy.LM, or None for the extractive reflector")


def is_policy(lm: object) -> bool:
    """Whether an LM is a policy of this process or a task's own: it samples by a seed, and costs no dollars."""
    return isinstance(getattr(lm, "engine", None), RecordingEngine | TaskEngine)


def sampling_options(lm: dspy.LM, seed: int, number: int) -> dict[str, Any]:
    """What reflection `number` of a run with this seed asks a policy for besides its prompt; nothing of other LMs.

    What a policy samples then follows from the run alone: not from how often the process has asked it before, so that
    a resumed run gets the same proposals, and not from the prompt, which may come twice and is to be answered anew.
    """
    if not is_policy(lm) or lm.kwargs.get("seed") is not None:
        return {}
    digest = hashlib.blake2b(repr(("reflection", seed, number)).encode(), digest_size=8).digest()
    # A policy refuses a seed for several completions at once, and one is read.
    return {"seed": int.from_bytes(digest, "big"), **({"n": 1} if lm.kwargs.get("n") else {})}


def named_lm(name: str) -> dspy.LM:
    """The LM of that name, with its provider's own temperature and length, its key from the environment."""
    import dspy

    return dspy.LM(name)


def name_of(lm: object, policy: Policy) -> str | None:
    """What `config.json` calls a reflection LM: its model's name, or `policy` for the policy's own base."""
    if lm is None:
        return None
    own = getattr(getattr(lm, "engine", None), "policy", None) is policy
    return POLICY if own else without_address_secrets(str(getattr(lm, "model", lm)))


def recorded_name(description: Mapping[str, Any]) -> str | None:
    """The reflection LM that a run's `config.json` names. Earlier ones named the policy's base by its folder."""
    name: str | None = (description.get("program") or {}).get("reflection_lm")
    before = f"hosted_vllm/{Path(str(description['policy']['model'])).name}"
    return POLICY if name == before else name
