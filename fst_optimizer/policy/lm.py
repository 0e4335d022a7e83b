"""`policy.lm`: a `dspy.LM` whose engine is the policy, and the way back from an LM to its policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import dspy

from fst_optimizer.engines.recorder import AsyncRecordingEngine, RecordingEngine
from fst_optimizer.errors import UserError
from fst_optimizer.policy.provider import make_provider

if TYPE_CHECKING:
    from dspy.clients.provider import TrainingJob
    from dspy.clients.utils_finetune import TrainDataFormat

    from fst_optimizer.policy.policy import Policy


class PolicyLM(dspy.LM):  # type: ignore[misc]
    """A `dspy.LM` that dspy's optimizers can train, and that leaves no trace of itself in a saved program.

    dspy refuses to load custom engines from a file, and weights do not belong in a program's JSON: the program is
    saved as if it had no LM, and the LM is attached again by `set_lm`, `dspy.configure` or `fst_optimizer.load`.
    """

    def dump_state(self) -> dict[str, Any]:
        """Empty, which dspy reads as "no LM of its own"."""
        return {}

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
        given = [f"{name}={value!r}" for name, value in self.kwargs.items() if value is not None]
        notes = ["follows the policy" if engine.follows else "stays", *([] if engine.trainable else ["frozen"]), *given]
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
        return cast(PolicyLM, copy)

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


def make_lm(policy: Policy, version: int | None, *, trainable: bool = True, follows: bool = False) -> PolicyLM:
    """An LM on `policy`: at a version, at its `lm_version`, or with `follows` at its current one."""
    engine = RecordingEngine(policy, version, trainable=trainable, follows=follows)
    return PolicyLM(
        f"hosted_vllm/{policy.name}",
        engine=engine,
        async_engine=AsyncRecordingEngine(engine),
        cache=False,  # dspy's cache knows nothing of weights
        num_retries=0,
        provider=make_provider(),
    )


def trainable_policy(lm: object) -> Policy | None:
    """The policy that an LM trains, or None for an API model or a frozen use of a policy."""
    engine = getattr(lm, "engine", None)
    return cast("Policy", engine.policy) if isinstance(engine, RecordingEngine) and engine.trainable else None


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
