"""`policy.lm`: a `dspy.LM` whose engine is the policy, and the way back from an LM to its policy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakValueDictionary

import dspy

from fst_optimizer.engines.recorder import AsyncRecordingEngine, RecordingEngine
from fst_optimizer.engines.sampling import check_options
from fst_optimizer.errors import UserError
from fst_optimizer.policy.provider import make_provider

if TYPE_CHECKING:
    from dspy.clients.provider import TrainingJob
    from dspy.clients.utils_finetune import TrainDataFormat
    from dspy.lm15 import Request, Response

    from fst_optimizer.policy.face import PolicyFace
    from fst_optimizer.policy.policy import Policy


class PolicyLM(dspy.LM):  # type: ignore[misc]
    """A `dspy.LM` that dspy's optimizers can train, and that leaves no trace of itself in a saved program.

    dspy refuses to load custom engines from a file, and weights do not belong in a program's JSON: the program is
    saved as if it had no LM, and the LM is attached again by `set_lm`, `dspy.configure` or `fst_optimizer.load`.
    A copy shares the weights. A pickle holds none: in the process that wrote it, the LM finds its policy again, and in
    another one it says how to attach it.
    """

    def __call__(self, prompt: Any = None, *, messages: Any = None, **options: Any) -> Any:
        """As `dspy.LM`'s. Raises UserError for an option that a policy does not have: dspy would drop or wrap some."""
        self.engine.check({**self.kwargs, **options})
        return super().__call__(prompt, messages=messages, **options)

    async def acall(self, prompt: Any = None, *, messages: Any = None, **options: Any) -> Any:
        """`__call__` for a running event loop."""
        self.engine.check({**self.kwargs, **options})
        return await super().acall(prompt, messages=messages, **options)

    def copy(self, **changes: Any) -> PolicyLM:
        """A shallow copy with other settings, on the same weights. Raises UserError for what a policy does not have."""
        if "engine" not in changes:
            own = {"cache"} | {name for name in changes if not hasattr(self, name)}
            check_options({name: value for name, value in changes.items() if name in own})
        return cast(PolicyLM, super().copy(**changes))

    def dump_state(self) -> dict[str, Any]:
        """Empty, which dspy reads as "no LM of its own"."""
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> PolicyLM:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        state: Any = self.__getstate__()
        copied.__setstate__(deepcopy(state, memo))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        engine = self.engine
        kind = {"trainable": engine.trainable, "follows": engine.follows}
        return unpickled, (engine.policy.name, engine.policy.key, engine.version, self.version, kind, self.kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The end of a deep copy: it serves what its original does, until a job trains one of them."""
        super().__setstate__(state)
        policy = trainable_policy(self)
        if policy is not None and not self.pinned:
            policy.jobs.add_copy(self)

    @property
    def pinned(self) -> bool:
        """Whether it stays at a version of its own, as `lm_at` gives it."""
        return self.engine.version is not None

    @property
    def version(self) -> int:
        """The policy version that it serves now."""
        return int(self.engine.serves)

    def __repr__(self) -> str:
        engine = self.engine
        notes = ["follows the policy" if engine.follows else "stays"]
        notes += [] if engine.trainable else ["frozen"]
        notes += ["without its weights"] if isinstance(engine, DetachedEngine) else []
        notes += [f"{name}={value!r}" for name, value in self.kwargs.items() if value is not None]
        return f"PolicyLM({engine.policy.name!r}, version={self.version}, {', '.join(notes)})"

    def move_to(self, version: int) -> None:
        """Serve `version`, which a job trained this LM to be; the policy's `lm` is moved with all that share it."""
        if self.pinned:
            self.stay_at(version)
        elif not self.engine.follows:
            self.engine.policy.move_lm(version)

    def at(self, version: int) -> PolicyLM:
        """A copy, with all settings, that stays at `version`."""
        copy = self.copy()
        copy.stay_at(version)
        return copy

    def stay_at(self, version: int) -> None:
        """From now on serve `version` alone. Copies made before are not touched."""
        engine = self.engine.policy.lm_at(version).engine
        self._engine_spec, self._async_engine_spec = engine, AsyncRecordingEngine(engine)

    def finetune(
        self,
        train_data: list[dict[str, Any]],
        train_data_format: TrainDataFormat | str | None = None,
        train_kwargs: dict[str, Any] | None = None,
    ) -> TrainingJob:
        """Start supervised training from the version that this LM serves: see `FinetuneJob`.

        dspy's own `finetune` tells the job the model's name alone; ours needs the LM, to find the policy.
        """
        job = self.provider.TrainingJob(self, train_data, train_data_format, train_kwargs or self.train_kwargs)
        job.start()
        return job


def make_lm(policy: PolicyFace, version: int | None, *, trainable: bool = True, follows: bool = False) -> PolicyLM:
    """An LM on `policy`: at a version, at its `lm_version`, or with `follows` at its current one."""
    engine = RecordingEngine(policy, version, trainable=trainable, follows=follows)
    _policies[os.getpid(), policy.key] = policy
    return _lm(policy.name, engine, AsyncRecordingEngine(engine))


def _lm(name: str, engine: object, async_engine: object = None) -> PolicyLM:
    return PolicyLM(
        f"hosted_vllm/{name}",
        engine=engine,
        async_engine=async_engine,
        cache=False,  # dspy's cache knows nothing of weights
        num_retries=0,
        provider=make_provider(),
    )


# -- pickling ----------------------------------------------------------------------------------------------------------

_policies: WeakValueDictionary[tuple[int, str], PolicyFace] = WeakValueDictionary()
"""By process and key: a forked process has its parent's policies too, but no engine that runs."""


@dataclass(frozen=True)
class _PolicyName:
    """What is left of a policy in another process."""

    name: str


class DetachedEngine:
    """The engine of an LM that was unpickled where its policy is not: it says so when it is asked anything."""

    def __init__(self, name: str, version: int, *, trainable: bool, follows: bool) -> None:
        self.policy = _PolicyName(name)
        self.version = self.serves = version
        self.trainable = trainable
        self.follows = follows

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("pickle the LM, not its engine")

    def check(self, options: Mapping[str, Any]) -> None:
        """Raises UserError, whatever is asked."""
        raise UserError(
            f"this program was pickled, and a pickle holds no weights of its policy ({self.policy.name!r}, version "
            f"{self.version}): call program.set_lm(policy.lm), or attach those of its run with "
            "fst_optimizer.load(run_dir, program=program)"
        )

    def complete(self, request: Request) -> Response:
        """Raises UserError."""
        self.check({})
        raise AssertionError


def unpickled(
    name: str, key: str, pinned: int | None, serves: int, kind: Mapping[str, bool], settings: Mapping[str, Any]
) -> PolicyLM:
    """The LM that was pickled: on its policy, where that is in this process and serves its version, else detached."""
    policy = _policies.get((os.getpid(), key))
    if policy is None or (pinned is not None and pinned not in policy.engine.versions()):
        lm = _lm(name, DetachedEngine(name, serves, **kind))
    else:
        lm = make_lm(policy, None if kind["trainable"] else pinned, **kind)
        if pinned is not None and kind["trainable"]:
            lm.stay_at(pinned)
    lm.kwargs.update(settings)
    return lm


def trainable_policy(lm: object) -> Policy | None:
    """The policy that an LM trains, or None for an API model or a frozen use of a policy."""
    engine = getattr(lm, "engine", None)
    return cast("Policy", engine.policy) if isinstance(engine, RecordingEngine) and engine.trainable else None


def takes_policy(lm: object) -> bool:
    """Whether an LM is on a policy to be trained, or was before it was pickled: another policy's LM may replace it."""
    engine = getattr(lm, "engine", None)
    return isinstance(engine, RecordingEngine | DetachedEngine) and engine.trainable


def policy_to_train(lm: object, what: str) -> Policy:
    """The policy behind an LM that `what` is to train. Raises UserError for an LM of another kind, or a frozen one."""
    policy = trainable_policy(lm)
    if policy is None:
        frozen = " is a frozen use of a policy and" if hasattr(getattr(lm, "engine", None), "policy") else ""
        raise UserError(
            f"lm {getattr(lm, 'model', lm)!r}{frozen} cannot be trained by {what}: make a fst_optimizer.Policy(model) "
            "and call student.set_lm(policy.lm)"
        )
    return policy
