"""The job behind `dspy.BootstrapFinetune` on a policy: conversations in, an LM at the next version out."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import InvalidStateError
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspy.clients.provider import TrainingJob
from dspy.clients.utils_finetune import TrainDataFormat, TrainingStatus

from fst_optimizer.dspy_jobs.data import check_format, conversations, end_of_turn, text_call
from fst_optimizer.dspy_jobs.settings import FinetuneSettings, finetune_settings
from fst_optimizer.dspy_jobs.weights import load, publish_next, tensors_at
from fst_optimizer.errors import TrainingError
from fst_optimizer.policy.lm import policy_to_train
from fst_optimizer.types import TrainRow

if TYPE_CHECKING:
    from fst_optimizer.policy.lm import PolicyLM
    from fst_optimizer.policy.policy import Policy
    from fst_optimizer.train.trainer import StepReport

logger = logging.getLogger(__name__)


class FinetuneJob(TrainingJob):  # type: ignore[misc]
    """Supervised training of the policy behind `lm`, in a thread, from the version that `lm` serves when it is made.

    The result is an LM that stays at the new version; the policy's current version is the new one as well. Jobs on
    one policy run one after the other, each from its own start. What goes wrong is raised by `result`.

    Args:
        lm: `policy.lm`, or an LM at a version.
        train_data: Rows of `{"messages": [...]}`; the assistant's last answer is learned, the rest is its prompt.
        train_data_format: `TrainDataFormat.CHAT` or None.
        train_kwargs: See `settings.finetune_settings`.

    Raises:
        UserError: The LM cannot be trained, a setting is wrong, or the data is not as said.
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
        self.settings = finetune_settings(train_kwargs)
        check_format(train_data_format, TrainDataFormat.CHAT.value, "a finetune job")
        self.rows = supervised_rows(self.policy, train_data)
        self.losses: list[float] = []
        """Mean negative log-likelihood a token of each update's rows, before the update."""
        self._start = tensors_at(self.policy, lm.version)
        self._begun = False
        super().__init__(
            thread=threading.Thread(target=self._run, name="fst-finetune"),
            model=lm.model,
            train_data=train_data,
            train_data_format=train_data_format,
            train_kwargs=train_kwargs,
        )

    def start(self) -> None:
        """Begin, once no other job trains."""
        self.policy.jobs.pin_copies(self.policy.version, but=self.lm)
        self.thread.start()

    def cancel(self) -> bool:
        """Stop before the next update; nothing is published then. False when the job has ended."""
        return bool(super(TrainingJob, self).cancel())  # TrainingJob's own forgets to say

    def status(self) -> TrainingStatus:
        """Of the job, in dspy's words."""
        if self.cancelled():
            return TrainingStatus.cancelled
        if self.done():
            return TrainingStatus.failed if self.exception() else TrainingStatus.succeeded
        return TrainingStatus.running if self._begun else TrainingStatus.pending

    def _run(self) -> None:
        # A future that was cancelled meanwhile takes neither.
        try:
            lm = self._trained()
            with suppress(InvalidStateError):
                self.set_result(lm)
        except BaseException as error:  # whatever it is: who waits for the result must hear of it
            with suppress(InvalidStateError):
                self.set_exception(error)

    def _trained(self) -> PolicyLM | None:
        """An LM at the version that training led to, or None when it was cancelled."""
        policy = self.policy
        with policy.jobs.training:
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
            version,
            len(self.losses),
            len(self.rows),
            self.losses[0],
            self.losses[-1],
        )
        return lm


def supervised_rows(policy: Policy, train_data: object) -> list[TrainRow]:
    """Conversations as rows of advantage 1.

    Raises:
        UserError: The data is not as said, or a row is longer than the model's context.
    """
    end_id = end_of_turn(policy)
    rows = []
    for place, (prompt, answer) in enumerate(conversations(train_data)):
        prompt_ids = policy.encode_chat(prompt)
        call = text_call(policy, prompt_ids, answer, end_id, temperature=1.0, where=f"train_data[{place}]")
        rows.append(TrainRow(call, 1.0, place))
    return rows


def batches(count: int, settings: FinetuneSettings) -> Iterator[list[int]]:
    """Indices of each update's rows: every epoch in an order of its own, the last batch as short as it comes."""
    for epoch in range(settings.epochs):
        order = list(range(count))
        random.Random(f"finetune/{settings.seed}/{epoch}").shuffle(order)
        for start in range(0, count, settings.batch_size):
            yield order[start : start + settings.batch_size]


def updates(policy: Policy, rows: Sequence[TrainRow], settings: FinetuneSettings) -> Iterator[StepReport]:
    """Train the adapter as it stands, one report an update.

    Raises:
        TrainingError: The loss was not finite several times in a row, or always.
    """
    from fst_optimizer.dspy_jobs.supervised import SupervisedTrainer

    trainer = SupervisedTrainer(policy, settings.train)
    reports = []
    for batch in batches(len(rows), settings):
        reports.append(trainer.step([rows[index] for index in batch]))
        yield reports[-1]
    if not any(report.updated for report in reports):
        raise TrainingError(f"finetune changed nothing: {reports[-1].reason}; lower lr")
