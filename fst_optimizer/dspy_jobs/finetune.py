"""The job behind `dspy.BootstrapFinetune` on a policy: conversations in, an LM at the next version out."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import InvalidStateError
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspy.clients.provider import TrainingJob
from dspy.clients.utils_finetune import TrainDataFormat, TrainingStatus

from fst_optimizer.dspy_jobs.data import check_format
from fst_optimizer.dspy_jobs.settings import FinetuneSettings
from fst_optimizer.dspy_jobs.supervised import supervised_rows, updates
from fst_optimizer.dspy_jobs.weights import load, publish_next, tensors_at
from fst_optimizer.policy.lm import policy_to_train

if TYPE_CHECKING:
    from fst_optimizer.policy.lm import PolicyLM

logger = logging.getLogger(__name__)


class FinetuneJob(TrainingJob):  # type: ignore[misc]
    """Supervised training of the policy behind `lm`, in a thread, from the version that `lm` serves when it is made.

    The result is an LM that stays at the new version; the policy's current version is the new one as well. Jobs on
    one policy run one after the other, each from its own start. What goes wrong is raised by `result`.

    Args:
        lm: `policy.lm`, or an LM at a version.
        train_data: Rows of `{"messages": [...]}`; the assistant's last answer is learned, the rest is its prompt.
        train_data_format: `TrainDataFormat.CHAT` or None.
        train_kwargs: See `settings.FinetuneSettings`.

    Raises:
        UserError: The LM cannot be trained, a setting is wrong, or the data is not conversations.
    """

    def __init__(
        self,
        lm: PolicyLM,
        train_data: list[dict[str, Any]],
        train_data_format: TrainDataFormat | str | None = None,
        train_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.lm = lm
        self.policy = policy_to_train(lm, "finetune")
        self.settings = FinetuneSettings.read(train_kwargs)
        check_format(train_data_format, TrainDataFormat.CHAT.value, "a finetune job")
        self.rows = supervised_rows(self.policy, train_data)
        self.losses: list[float] = []
        """Mean negative log-likelihood a token of each update's rows, before the update."""
        self._start = tensors_at(self.policy, lm.version)
        self._begun = False
        thread = threading.Thread(target=self._run, name="fst-finetune")
        super().__init__(thread, lm.model, train_data, train_data_format, train_kwargs)

    def start(self) -> None:
        """Begin, once no other job trains. Raises UserError where a compile does."""
        self.policy.jobs.check_no_compile()
        self.policy.jobs.pin_copies()
        self.thread.start()

    def cancel(self) -> bool:
        """Stop before the next update; nothing is published then. False when the job has ended."""
        return bool(super(TrainingJob, self).cancel())  # TrainingJob's own returns None

    def status(self) -> TrainingStatus:
        """Of the job, in dspy's words."""
        if self.cancelled():
            return TrainingStatus.cancelled
        if self.done():
            return TrainingStatus.failed if self.exception() else TrainingStatus.succeeded
        return TrainingStatus.running if self._begun else TrainingStatus.pending

    def _run(self) -> None:
        with suppress(InvalidStateError):  # cancelled meanwhile: a cancelled future takes no result
            try:
                self.set_result(self._trained())
            except BaseException as error:  # any error must reach whoever waits for the result
                self.set_exception(error)

    def _trained(self) -> PolicyLM | None:
        """An LM at the version that training led to, or None when it was cancelled."""
        policy = self.policy
        with policy.jobs.in_turn():
            self._begun = True
            if self.cancelled():
                return None
            try:
                load(policy, self._start)
                for report in updates(policy, self.rows, self.settings):
                    self.losses.append(report.loss)
                    if self.cancelled():
                        return None
                if not self.set_running_or_notify_cancel():  # from here on it is too late to cancel
                    return None
                version = publish_next(policy)
            finally:
                load(policy, tensors_at(policy, policy.version))
            lm = self.lm.at(version)
        if self.settings.output_dir is not None:
            policy.save_version(version, Path(self.settings.output_dir))
        logger.info(
            "finetune: policy version %d after %d updates on %d rows, loss %.3f to %.3f",
            version, len(self.losses), len(self.rows), self.losses[0], self.losses[-1],
        )  # fmt: skip
        return lm
