"""A distillation, reading straight down.

    teacher = score(long prompt, weights)                   # once; the student begins with the same weights
    for T batches, until the student is as good:
        rollouts = collect(short prompt, policy, batch)     # the student's own, each call rendered for the teacher too
        policy = update(policy, KL(student || teacher))     # at every sampled token; the next version
    validate(short prompt, policy)                          # keep the best version
    gate(best, teacher)                                     # held-out score and entropy

Phases, checkpoints, journal, caps and monitors are those of every run (`phases`, `cycle`): a distillation that was
killed goes on where it was.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fst_optimizer import schedule
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.cycle import end_of_cycle, validate
from fst_optimizer.data import batch_at
from fst_optimizer.distill.gate import Measured, keeps, refusal
from fst_optimizer.distill.lesson import Lesson, unrendered
from fst_optimizer.ends import start
from fst_optimizer.errors import NotDistilled, UserError
from fst_optimizer.phases import Phases, commit, within_caps
from fst_optimizer.rollout.credit import Credit, greedy_calls, reward
from fst_optimizer.rollout.rollout import Request
from fst_optimizer.run.evaluate import evaluate
from fst_optimizer.run.monitors import after_step
from fst_optimizer.run.run import Run
from fst_optimizer.run.samples import keep_rollouts
from fst_optimizer.run.state import State, Taught
from fst_optimizer.store.metrics import step_fields
from fst_optimizer.store.tally import tally_of
from fst_optimizer.types import Candidate, Item, Outcome, Rollout, TrainRow

logger = logging.getLogger(__name__)

UNRENDERED = (
    "some calls are not learned from: they cannot be rendered under the teacher's prompt, or do not fit into the "
    "model's context there"
)


def distill(run: Run, state: State, lesson: Lesson, testset: Sequence[Item] | None) -> State:
    """From a new or a resumed state to the end of all cycles.

    Raises:
        UserError: a call cannot be rendered under the teacher's prompt.
        Paused: A monitor asks for it; the checkpoint is written.
    """
    state = reopened(run.config, begin(run, state, lesson, testset))
    while not state.over:
        state = run_cycle(run, state, lesson)
    return state


def begin(run: Run, state: State, lesson: Lesson, testset: Sequence[Item] | None) -> State:
    """The state with the scores of the teacher, and of the student before it learns. Already as good, it is done."""
    if state.teacher is None:
        run.enter("eval", state)
        with run.meter.uncapped():
            state = commit(run, within_caps(run, state, "eval", score_teacher, lesson))
    if state.started:
        return state
    state = start(run, state, testset)
    if not learned(state):
        return state
    return commit(run, replace(within_caps(run, state, "eval", validate, True), ended="done"))


def score_teacher(run: Run, state: State, lesson: Lesson) -> State:
    """The teacher's score on the validation set, greedily, and the tokens that its answers take."""
    items = run.valset[: run.config.eval.max_examples]
    found = evaluate(
        run.collector,
        lesson.teacher,
        items,
        version=lesson.version,
        temperature=run.config.eval.temperature,
        on_rollout=run.metrics.counting("eval", len(items)),
    )
    logger.info("the teacher scores %.4f on the validation set", found.score)
    return replace(state, teacher=Taught(found.score, found.tokens_per_answer))


def run_cycle(run: Run, state: State, lesson: Lesson) -> State:
    """T steps and a validation. Skips the phases that `state` records as done."""
    phase, first = Phases(run, done=state.phase, before=schedule.FIRST_STEP - 1), state.batch
    for offset in range(run.config.train.steps_per_cycle):
        state = phase(state, distill_step, first + offset, lesson, kind="slow")
    return phase(state, end)


def distill_step(run: Run, state: State, batch: int, lesson: Lesson) -> State:
    """Collect one batch under the student's prompt, update the weights towards the teacher, publish the version."""
    assert run.trainer is not None
    config, under_teacher = run.config, lesson.under_teacher()
    requests = lesson_requests(lesson.student, run.trainset, config, batch, step=state.step)
    if cap := schedule.cap_before_step(config, state, len(requests)):
        return replace(state, ended="budget", cap=cap)
    rollouts = run.collector.run(
        requests,
        version=state.policy_version,
        temperature=config.rollout.temperature,
        on_rollout=run.metrics.counting("slow", len(requests)),
        under_teacher=under_teacher,
    )
    collected_s = run.metrics.time_s
    learnt = rows_of(rollouts, config, run.policy.engine.context_length)
    if under_teacher.problems and not state.step:  # later, what worked before is worth more than what does not
        raise UserError(unrendered(*next(iter(under_teacher.problems.items()))))
    run.warn_once(state, learnt.left_out)
    report = run.trainer.step(learnt.rows)
    version = run.policy.publish() if report.updated else state.policy_version
    state = replace(state, step=state.step + 1, policy_version=version)
    if state.phase == schedule.FIRST_STEP:
        keep_rollouts(run.files, state.cycle, rollouts)
    credited = learnt.credit(rollouts, config)
    fields: dict[str, Any] = step_fields(rollouts, credited, report, run.metrics.time_s - collected_s)
    fields |= {"note": report.reason and (learnt.left_out or report.reason), "kl_to_teacher": report.loss}
    run.log("step", state, tally_of(rollouts), **fields)
    watch, alarms = after_step(config.monitors, state.watch, rollouts, credited, report)
    return replace(state, watch=watch, alarms=alarms)


def end(run: Run, state: State) -> State:
    """The end of a cycle; of all cycles, where the student is as good as its teacher."""
    state = end_of_cycle(run, state)
    return replace(state, ended="done") if learned(state) and not state.ended else state


def gate(run: Run, state: State, lesson: Lesson) -> tuple[State, dict[str, Any]]:
    """Let the best version through, or refuse it; the state with what that took, and what `result.json` has of it.

    Raises:
        NotDistilled: the version keeps too little of the gain, or its entropy has collapsed.
    """
    teacher, best = state.teacher, state.best
    assert teacher is not None
    run.enter("eval", state)
    with run.meter.uncapped(), run.meter.charging("eval"):
        teacher_entropy = _entropy(run, lesson.teacher, lesson.version)
        entropy = _entropy(run, best.candidate, best.policy_version)
    state = replace(state, **run.meter.spent())
    found = Measured(state.val_score_before, best.score, teacher.score, entropy, teacher_entropy)
    if why := refusal(found, run.config.distill):
        raise NotDistilled(
            f"{why}. Nothing was made that can be used, and what was to be distilled is as it was. Go on with more "
            f"cycles or other settings in {str(run.files.root)!r} (--resume, or resume=True), or ask for less"
        )
    return state, {
        "distilled_from": dict(lesson.origin),
        "teacher_score": found.teacher,
        "tokens_per_answer": {"before": teacher.tokens_per_answer, "after": best.tokens_per_answer},
        "token_entropy": {"before": teacher_entropy, "after": entropy},
    }


def _entropy(run: Run, candidate: Candidate, version: int) -> float:
    """Nats a token, on tokens sampled from the version under the candidate's prompt on held-out examples."""
    items = run.valset[: run.config.eval.kl_examples]
    rollouts = run.collector.run_candidate(candidate, items, version=version, temperature=1.0)
    return run.policy.entropy_of([call for rollout in rollouts for call in rollout.calls], version)


# -- pure ----------------------------------------------------------------------------------------------------------


def learned(state: State) -> bool:
    """Whether the best version is as good as the teacher."""
    return state.teacher is not None and state.best.score >= state.teacher.score


def reopened(config: FSTConfig, state: State) -> State:
    """The state of a distillation that has ended: going on, where it was refused and there is room for more cycles."""
    if not state.over or state.teacher is None:
        return state
    good = keeps(state.val_score_before, state.best.score, state.teacher.score, config.distill.keep_gain)
    budget, size = config.budget, config.rollout.batch_size * config.rollout.group_size
    full = state.cycle >= budget.max_cycles or schedule.cap_before_step(config, state, size)
    patient = budget.patience is None or state.watch.stale < budget.patience
    if good or full or not patient:
        return state
    return replace(state, ended="", cap="")


def lesson_requests(
    student: Candidate, trainset: Sequence[Item], config: FSTConfig, batch: int, *, step: int
) -> list[Request]:
    """The rollouts of a step, as many as any step has, each of another example as far as there are examples."""
    count = min(config.rollout.batch_size, len(trainset)) * config.rollout.group_size
    items = batch_at(trainset, batch, count, config.seed)
    return [Request(student, items[i % len(items)], i // len(items), draw=f"step {step}") for i in range(count)]


@dataclass(frozen=True)
class Learnt:
    """What a step learns from."""

    rows: tuple[TrainRow, ...]
    greedy: Counter[str]
    unrendered: int
    """Calls that cannot be rendered under the teacher's prompt, or do not fit into the context there."""

    @property
    def left_out(self) -> str:
        """What to say of calls that are not learned from; "" where there are none."""
        if self.greedy:
            return greedy_calls(self.greedy)
        return UNRENDERED if self.unrendered else ""

    def credit(self, rollouts: Sequence[Rollout], config: FSTConfig) -> Credit:
        """The step's numbers as any step has them. There are no baselines, so no group is flat."""
        rewards = [reward(one, config.rollout) for one in rollouts if one.outcome is not Outcome.ENGINE_ERROR]
        groups = len({one.example_id for one in rollouts})
        return Credit(self.rows, sum(rewards) / max(1, len(rewards)), groups, 0, dict(self.greedy))


def rows_of(rollouts: Sequence[Rollout], config: FSTConfig, context_length: int) -> Learnt:
    """The sampled calls of predictors that train the policy, of rollouts that failed too: the teacher knows better."""
    rows, greedy, unrendered = list[TrainRow](), Counter[str](), 0
    for place, rollout in enumerate(rollouts):
        for call in rollout.calls:
            if not call.completion_ids or not config.trains(call.predictor):
                continue
            if not call.temperature:
                greedy[call.predictor] += 1
            elif not call.teacher_ids or len(call.teacher_ids) + len(call.completion_ids) > context_length:
                unrendered += 1
            else:
                rows.append(TrainRow(call, 0.0, place, place))
    return Learnt(tuple(rows), greedy, unrendered)
