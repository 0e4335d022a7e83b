"""The job behind `dspy.teleprompt.grpo.GRPO` on a policy: groups of text in, one update and the next version out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspy.clients.provider import ReinforceJob
from dspy.clients.utils_finetune import TrainDataFormat, TrainingStatus

from fst_optimizer.dspy_jobs.data import Scored, check_format, end_of_turn, group_objects, scored, text_call
from fst_optimizer.dspy_jobs.matching import Generations
from fst_optimizer.dspy_jobs.settings import ReinforceSettings
from fst_optimizer.dspy_jobs.weights import load, publish_next, tensors_at
from fst_optimizer.errors import UserError
from fst_optimizer.policy.lm import policy_to_train
from fst_optimizer.rollout.credit import advantages, scales, trains_flat
from fst_optimizer.types import TrainRow

if TYPE_CHECKING:
    from torch import Tensor

    from fst_optimizer.policy.lm import PolicyLM
    from fst_optimizer.train.report import StepReport
    from fst_optimizer.train.trainer import Trainer

logger = logging.getLogger(__name__)

BATCH_IDS = 1024
"""Batch ids that `get_status` offers for a step. dspy hands in one group an id: it repeats groups when there are more
ids than groups, and keeps groups for the next step, when they are off-policy, when there are fewer. So more ids are
offered than a step has groups, and `_without_repeats` drops the repeats."""


class PolicyReinforceJob(ReinforceJob):  # type: ignore[misc]
    """Policy gradient on the policy behind `lm`, one update a `step`.

    After a step the policy's current version is the new one, and `lm`, `policy.lm` and their shallow copies serve it.
    LMs in deep copies of programs that were made before the job stay at the version they had.

    Args:
        lm: `policy.lm`, or an LM at a version, which is then where training starts.
        train_kwargs: See `settings.ReinforceSettings`.

    Raises:
        UserError: The LM cannot be trained, or a setting is wrong.
    """

    def __init__(self, lm: PolicyLM, train_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(lm=lm, train_kwargs=train_kwargs)
        self.policy = policy_to_train(lm, "reinforce")
        self.settings = ReinforceSettings.read(train_kwargs)
        self.counts = {"matched": 0, "tokenized": 0, "groups": 0, "flat_groups": 0}
        """Completions trained on by the tokens that were sampled, and by tokens made from their text; groups seen, and
        those of equal rewards, which give no gradient."""
        self.greedy = 0
        """Completions left out, as they were decoded greedily."""
        self.report: StepReport | None = None
        """What the last step did."""
        self.version = lm.version
        """The policy version that the next step starts from."""
        self._trainer: Trainer | None = None
        self._generations: Generations | None = None
        self._tensors: dict[str, Tensor] = {}
        self._handed_in: dict[int, Sequence[Any]] = {}
        self._first_batch_id = 0
        self._compiles = 0

    def initialize(self) -> None:
        """Start: from now on the policy's calls are recorded, and calls without a temperature sample.

        Raises:
            UserError: A compile trains the policy.
        """
        policy, settings = self.policy, self.settings
        policy.jobs.begin(self)
        self._compiles = policy.jobs.compiles
        self._tensors = tensors_at(policy, self.version)
        policy.jobs.pin_copies()
        self._trainer = policy.trainer(settings.train)
        own = policy.temperature or 1.0
        self._generations = Generations(settings.memory, own if settings.temperature is None else settings.temperature)
        policy.observer = self._generations

    def step(self, train_data: list[Any], train_data_format: TrainDataFormat | str | None = None) -> None:
        """One update from these groups, and the next policy version; none when every group is flat.

        Raises:
            UserError: The job does not run, or the data is not GRPO's.
            TrainingError: The update broke.
        """
        trainer, generations = self._trainer, self._generations
        if trainer is None or generations is None:
            raise UserError(
                "the reinforce job does not run: call job.initialize() first; after terminate(), make another"
            )
        if self._compiles != self.policy.jobs.compiles:
            raise UserError(
                "the reinforce job's Policy was trained by FST.compile since the job began: end it with "
                "job.terminate(), and make another, which starts from what was learned"
            )
        check_format(train_data_format, TrainDataFormat.GRPO_CHAT.value, "a reinforce job")
        fresh = self._without_repeats(group_objects(train_data))
        groups = [
            [scored(entry, f"group {place}, completion {index}") for index, entry in enumerate(group)]
            for place, group in enumerate(fresh)
        ]
        self._first_batch_id += BATCH_IDS
        with self.policy.jobs.in_turn():
            load(self.policy, self._tensors)
            self.report = trainer.step(self._rows(trainer, generations, groups))
            if self.report.updated:
                self.version = publish_next(self.policy)
                self._tensors = tensors_at(self.policy, self.version)
                self.lm.move_to(self.version)
        logger.debug("reinforce step: %s", self.report)

    def _without_repeats(self, groups: list[Sequence[Any]]) -> list[Sequence[Any]]:
        """Each group once, and those of the step before only if there is no other."""
        once = {id(group): group for group in groups}
        fresh = [group for identity, group in once.items() if identity not in self._handed_in]
        self._handed_in = once
        return fresh or list(once.values())

    def _rows(self, trainer: Trainer, generations: Generations, groups: list[list[Scored]]) -> list[TrainRow]:
        """Every completion with its advantage over its group. The trainer's weights are those of `version`."""
        train = self.settings.train
        rows: list[TrainRow] = []
        tokenized: list[int] = []
        seen: Counter[tuple[tuple[int, ...], str]] = Counter()
        end_id = end_of_turn(self.policy)
        for place, group in enumerate(groups):
            shares = advantages([one.reward for one in group], train.advantage_eps, scale=scales(train))
            flat = not any(shares)
            self.counts["groups"] += 1
            self.counts["flat_groups"] += flat
            if flat and not trains_flat(train):
                continue
            for index, (one, share) in enumerate(zip(group, shares, strict=True)):
                prompt_ids = self.policy.encode_chat(one.messages)
                key = (prompt_ids, one.text.strip())
                call = generations.find(prompt_ids, one.text, seen[key])
                seen[key] += 1
                if call is None:
                    where = f"group {place}, completion {index}"
                    temperature = generations.temperature
                    call = text_call(self.policy, prompt_ids, one.text, end_id, temperature=temperature, where=where)
                    tokenized.append(len(rows))
                elif not call.temperature:
                    self._leave_out_greedy()
                    continue
                rows.append(TrainRow(call, share, len(rows), place, flat))
        self._count(len(rows) - len(tokenized), len(tokenized))
        # No sampler gave these log-probs: with the trainer's own their ratio is 1.
        for place, logprobs in zip(tokenized, trainer.logprobs([rows[place] for place in tokenized]), strict=True):
            row = rows[place]
            rows[place] = replace(row, call=replace(row.call, logprobs=tuple(logprobs)))
        return rows

    def _leave_out_greedy(self) -> None:
        if not self.greedy:
            logger.warning(
                "completions at temperature 0 are not trained on, as nothing was sampled in them: take temperature=0 "
                "out of the settings of the predictor or its LM, so that train_kwargs['temperature'] holds"
            )
        self.greedy += 1

    def _count(self, matched: int, tokenized: int) -> None:
        if tokenized and not matched and not self.counts["matched"] and not self.counts["tokenized"]:
            logger.warning(
                "none of the completions that dspy handed over was sampled from this policy with the same prompt: "
                "training goes on with tokens made from their text. GRPO writes prompts with dspy.XMLAdapter while "
                "programs use dspy.ChatAdapter: give GRPO adapter=dspy.ChatAdapter(), or dspy.configure(adapter=...)"
            )
        self.counts["matched"] += matched
        self.counts["tokenized"] += tokenized

    def terminate(self) -> None:
        """End: calls are not recorded any more; the LM goes on serving the last version. Idempotent."""
        if self._trainer is None:
            return
        self._trainer = self._generations = None
        self.policy.observer = None
        self.policy.jobs.end(self)
        with self.policy.jobs.in_turn():
            load(self.policy, tensors_at(self.policy, self.policy.version))
            self.policy.retire_all_but({self.policy.version})
        logger.info("reinforce ended at policy version %d: %s", self.version, self.counts)

    def cancel(self) -> None:
        """`terminate`: steps run in the caller's thread, so there is nothing else to stop."""
        self.terminate()

    def save_checkpoint(self, checkpoint_name: str) -> None:
        """Write the version that the job is at into `output_dir/checkpoint_name`, as a peft LoRA folder.

        Raises:
            UserError: There is no `output_dir`, or nothing has been learned yet.
        """
        if self.settings.output_dir is None:
            raise UserError("output_dir is None: give train_kwargs={'output_dir': folder} to save checkpoints")
        if not self.version:
            raise UserError("the job is at version 0, the base: there is no adapter to save before the first update")
        folder = Path(self.settings.output_dir) / checkpoint_name
        self.policy.save_version(self.version, folder)
        self.checkpoints[checkpoint_name] = str(folder)
        self.last_checkpoint = checkpoint_name

    def status(self) -> dict[str, Any]:
        """What GRPO polls (`dspy.clients.utils_finetune.GRPOStatus`): while the job runs, it always asks for groups."""
        running = self._trainer is not None
        return {
            "job_id": f"reinforce/{self.policy.name}",
            "status": (TrainingStatus.running if running else TrainingStatus.succeeded).value,
            "current_model": f"policy-{self.version:06d}",
            "checkpoints": dict(self.checkpoints),
            "last_checkpoint": self.last_checkpoint,
            "pending_batch_ids": list(range(self._first_batch_id, self._first_batch_id + BATCH_IDS)) if running else [],
        }

    get_status = status
