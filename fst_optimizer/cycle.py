"""One cycle of Fast-Slow Training, reading straight down.

    population = evolve(population, policy, anchor)      # fast
    for batch in next T batches:
        groups = collect(population, policy, batch)      # G rollouts a problem, over all K candidates
        policy = update(policy, credit(groups))          # slow; publishes the next version
    state = evaluate and keep the best pair

Source: arXiv 2605.12484. The four methods are this cycle with parts left out, so that comparing them compares the
methods: `rl` has no fast rounds, `gepa` no slow steps, `sequential` first only the one, then only the other.

Each of these lines is a phase: a function from state to state, with a checkpoint after it. A run that died does its
unfinished phase again, from the same state and with the answers that it has paid for already.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.data import batch_at
from fst_optimizer.errors import Paused
from fst_optimizer.evolve.reflect import Reflector
from fst_optimizer.evolve.round import evolve
from fst_optimizer.policy.policy import Policy
from fst_optimizer.program.student import Teacher
from fst_optimizer.rollout.collector import Collector
from fst_optimizer.rollout.credit import credit
from fst_optimizer.rollout.groups import group_requests, grouped
from fst_optimizer.rollout.rollout import Request
from fst_optimizer.run.evaluate import OnRollout, evaluate, measure_kl
from fst_optimizer.run.monitors import after_eval, after_step
from fst_optimizer.run.saver import Saver
from fst_optimizer.run.state import Best, State, ValidationScore
from fst_optimizer.store.files import RunFiles, write_json, writing
from fst_optimizer.store.meter import BudgetSpent, Meter
from fst_optimizer.store.metrics import MetricsLog
from fst_optimizer.train.trainer import Trainer
from fst_optimizer.types import Candidate, Item, Outcome, Population, Rollout

logger = logging.getLogger(__name__)

ROLLOUTS_KEPT = 32
"""Rollouts of a cycle that are written down for people to read."""
UNREADABLE = (Outcome.PARSE_ERROR, Outcome.TRUNCATED)
"""Outcomes that say the answer's format failed."""
FIRST_STEP = 3
"""The number of a cycle's first slow step among its phases."""


@dataclass(frozen=True)
class Parts:
    """Everything that a cycle works with, and does not change itself."""

    config: FSTConfig
    policy: Policy
    collector: Collector
    meter: Meter
    """What has been spent."""
    trainer: Trainer | None
    """None when the method has no slow steps."""
    reflector: Reflector
    components: tuple[str, ...]
    teachers: tuple[Teacher, ...]
    """Programs that join every group of the slow steps."""
    trainset: tuple[Item, ...]
    valset: tuple[Item, ...]
    files: RunFiles
    metrics: MetricsLog
    saver: Saver


Phase = Callable[[State], State]


def run_cycle(parts: Parts, state: State) -> State:
    """One fast round, T slow steps, an evaluation after each. Sets `ended` when the run is over.

    Goes on behind the phases that `state` has done already.

    Raises:
        Paused: a monitor says so; the checkpoint is written.
    """
    for number, phase in enumerate(phases(parts, state), start=1):
        if number > state.phase:
            state = committed(parts, phase(replace(asked_to_stop(parts, state), phase=number)))
    return state


def phases(parts: Parts, state: State) -> list[Phase]:
    """What a cycle consists of, in order."""
    batches = next_batches(parts, state)
    return [
        partial(paid, parts, "fast", partial(fast_round, parts, batches=batches)),
        partial(paid, parts, "eval", partial(validated, parts, only_new=True)),
        *(partial(paid, parts, "slow", partial(slow_step, parts, batch=batch)) for batch in batches),
        partial(end_of_cycle, parts),
    ]


def asked_to_stop(parts: Parts, state: State) -> State:
    """The state, ended where a callback raised `StopRun`."""
    return replace(state, ended="stopped") if parts.metrics.stop_asked and not state.ended else state


def next_cycle(config: FSTConfig, state: State) -> State:
    """The state before the next cycle, or the run's last one."""
    state = replace(state, cycle=state.cycle + 1, batch=state.batch + config.train.steps_per_cycle, phase=0)
    budget = config.budget
    if state.ended:
        return state
    if state.cycle >= budget.max_cycles:
        return replace(state, ended="done")
    if budget.patience is not None and state.watch.stale >= budget.patience:
        return replace(state, ended="stopped")
    if budget.max_steps is not None and state.step >= budget.max_steps:
        return replace(state, ended="budget", cap="max_steps")  # no fast round for steps that will not be taken
    if not fast_now(config, state) and not slow_now(config, state):
        return replace(state, ended="budget", cap="max_rollouts")
    return state


def committed(parts: Parts, state: State) -> State:
    """The state, written down. What the monitors saw is said, and pauses the run where it should."""
    parts.saver.commit(state)
    for alarm in state.alarms:
        logger.warning("monitor %s: %s", alarm.monitor, alarm.text)
    pausing = [alarm for alarm in state.alarms if getattr(parts.config.monitors, alarm.monitor) == "pause"]
    if pausing:
        raise Paused(
            "; ".join(f"monitor {alarm.monitor}: {alarm.text}" for alarm in pausing)
            + f". Resume to go on all the same (--resume, or resume=True, with {str(parts.files.root)!r})"
        )
    return replace(state, alarms=())


def paid(parts: Parts, kind: str, phase: Phase, state: State) -> State:
    """The state after a phase; the same state once the run has ended."""
    return state if state.ended else within_caps(parts, kind, phase, state)


def within_caps(parts: Parts, kind: str, phase: Phase, state: State) -> State:
    """The state after a phase. Where a cap is reached in it: the state before, what was spent counted, and ended."""
    before, reflections = parts.meter.rollouts, parts.reflector.calls
    cost_before = parts.reflector.cost_usd
    try:
        return phase(state)
    except BudgetSpent as spent:
        return replace(
            state,
            rollouts=state.rollouts.plus(**{kind: parts.meter.rollouts - before}),
            reflection_calls=state.reflection_calls + parts.reflector.calls - reflections,
            reflection_cost_usd=added_cost(state.reflection_cost_usd, cost_before, parts.reflector.cost_usd),
            ended="budget",
            cap=state.cap or spent.cap,
            **parts.meter.spent(),
        )


def cap_reached(parts: Parts, state: State, batch: Sequence[Item]) -> State:
    """The state, ended where one more step would pass a cap that is known beforehand."""
    most = parts.config.budget.max_steps
    if state.ended:
        return state
    if most is not None and state.step >= most:
        return replace(state, ended="budget", cap="max_steps")
    if slow_cost(parts, batch) > rollouts_left(parts.config, state):
        return replace(state, ended="budget", cap="max_rollouts")
    return state


def fast_round(parts: Parts, state: State, batches: Sequence[Sequence[Item]]) -> State:
    """Evolve the population under the newest policy version, on examples that the coming steps will use."""
    config, anchor = parts.config, draw_anchor(parts.config, batches, state)
    if not fast_now(config, state):
        return state
    cost_before = parts.reflector.cost_usd
    progress = counting(parts.metrics, "fast", min(config.fast.max_rollouts, rollouts_left(config, state)))

    def score(candidate: Candidate, items: Sequence[Item], *, capture: bool) -> Sequence[Rollout]:
        requests = [Request(candidate, item) for item in items]
        return parts.collector.run(
            requests,
            version=state.policy_version,
            temperature=config.fast.temperature,
            capture=capture,
            on_rollout=progress,
        )

    reflections_left = None
    if config.fast.reflection_calls is not None:
        reflections_left = config.fast.reflection_calls - state.reflection_calls
    found = evolve(
        state.population,
        score,
        anchor,
        parts.reflector,
        config.fast,
        policy_version=state.policy_version,
        cycle=state.cycle,
        seed=config.seed,
        components=parts.components,
        rollouts_left=fast_left(config, state),
        reflections_left=reflections_left,
        halted=lambda: bool(parts.meter.reached()),
    )
    state = replace(
        state,
        population=found.population,
        rollouts=state.rollouts.plus(fast=found.rollouts, reused=found.reused),
        reflection_calls=state.reflection_calls + found.reflection_calls,
        reflection_cost_usd=added_cost(state.reflection_cost_usd, cost_before, parts.reflector.cost_usd),
        **parts.meter.spent(),
    )
    write_json(parts.files.population(state.cycle), {**found.population.to_json(), "notes": list(found.notes)})
    parts.metrics.line(
        "fast",
        cycle=state.cycle,
        step=state.step,
        policy_version=state.policy_version,
        rollouts=state.rollouts,
        proposals=found.proposals,
        accepted=found.accepted,
        population=len(found.population.candidates),
        best_score=found.best_score,
        frontier=len(found.frontier),
        reused=found.reused,
    )
    return state


def slow_step(parts: Parts, state: State, batch: Sequence[Item]) -> State:
    """Collect one batch of groups under the newest version, update the weights, publish the next version."""
    config = parts.config
    state = cap_reached(parts, state, batch)
    if state.ended or not slow_now(config, state):
        return state
    assert parts.trainer is not None
    if config.method == "sequential":
        state = replace(state, population=Population((state.best.candidate,), state.policy_version))
    requests = group_requests(state.population, batch, config, parts.teachers)
    rollouts = parts.collector.run(
        requests,
        version=state.policy_version,
        temperature=config.rollout.temperature,
        capture=config.train.credit == "predictor",
        on_rollout=counting(parts.metrics, "slow", len(requests)),
    )
    collected_s = parts.metrics.time_s
    credited = credit(
        grouped(rollouts),
        config.rollout,
        config.train.advantage_eps,
        own_share=config.train.own_share if config.train.credit == "predictor" else None,
        trained=config.trains,
    )
    report = parts.trainer.step(credited.rows)
    if report.updated:
        version = parts.policy.publish()
        parts.policy.retire_all_but({version, state.best.policy_version})
        state = replace(state, policy_version=version)
    state = replace(
        state,
        step=state.step + 1,
        rollouts=state.rollouts.plus(slow=len(rollouts)),
        **parts.meter.spent(),
    )
    if state.phase == FIRST_STEP:
        keep_rollouts(parts.files, state.cycle, rollouts)
    watch, alarms = after_step(
        config.monitors,
        state.watch,
        reward_mean=credited.reward_mean,
        flat=credited.flat_groups == credited.groups,
        updated=report.updated,
        entropy=report.entropy,
        failed_share=sum(rollout.outcome in UNREADABLE for rollout in rollouts) / len(rollouts),
    )
    parts.metrics.line(
        "step",
        cycle=state.cycle,
        step=state.step,
        policy_version=state.policy_version,
        rollouts=state.rollouts,
        reward_mean=credited.reward_mean,
        groups=credited.groups,
        flat_groups=credited.flat_groups,
        calls=sum(len(rollout.calls) for rollout in rollouts),
        tokens=sum(rollout.tokens for rollout in rollouts),
        updated=report.updated,
        failed=sum(rollout.outcome != "ok" for rollout in rollouts),
        grad_norm=report.grad_norm,
        ratio_mean=report.ratio_mean,
        clipped_share=report.clipped_share,
        entropy=report.entropy,
        advantage_delta=report.advantage_delta,
        lr=report.lr,
        step_s=round(parts.metrics.time_s - collected_s, 3),
        note=report.reason,
    )
    return replace(state, watch=watch, alarms=alarms)


def end_of_cycle(parts: Parts, state: State) -> State:
    """The evaluation that ends a cycle, and what the monitors make of it."""
    if not state.ended or state.cap in ("max_rollouts", "max_steps"):  # these leave room to look at what was learned
        state = asked_to_stop(parts, within_caps(parts, "eval", partial(validated, parts), state))
    seen = state.validated.get(leading(state.population, 1)[0].id)
    if seen is None or seen.policy_version != state.policy_version:  # a cap was in the way
        return next_cycle(parts.config, state)
    watch, alarms = after_eval(
        parts.config.monitors,
        state.watch,
        score=seen.score,
        best=state.best.score,
        best_before=state.val_score_before,
        kl_to_base=seen.kl_to_base,
    )
    return next_cycle(parts.config, replace(state, watch=watch, alarms=alarms))


def validated(parts: Parts, state: State, *, only_new: bool = False) -> State:
    """Score the leading candidates at the newest version on the validation set; keep the best pair.

    A pair that was scored before keeps its score: greedy decoding would give it again. `only_new` passes it over.
    """
    for candidate in leading(state.population, parts.config.eval.candidates):
        known = state.validated.get(candidate.id)
        if known is None or known.policy_version != state.policy_version:
            state = scored_on_validation(parts, state, candidate)
        elif only_new:
            continue
        score = state.validated[candidate.id]
        parts.metrics.line(
            "eval",
            cycle=state.cycle,
            step=state.step,
            policy_version=state.policy_version,
            rollouts=state.rollouts,
            split="val",
            score=score.score,
            kl_to_base=score.kl_to_base,
            candidate=candidate.id,
            failed=score.failed,
        )
        if score.score > state.best.score:
            state = replace(state, best=Best(candidate, state.policy_version, score.score, score.kl_to_base))
    return state


def scored_on_validation(parts: Parts, state: State, candidate: Candidate) -> State:
    """Run one candidate on the validation set at the newest version, and measure how far the policy has moved."""
    config, items = parts.config.eval, parts.valset[: parts.config.eval.max_examples]
    found = evaluate(
        parts.collector,
        candidate,
        items,
        version=state.policy_version,
        temperature=config.temperature,
        on_rollout=counting(parts.metrics, "eval", len(items)),
    )
    kl, extra = measure_kl(parts.collector, parts.policy, candidate, parts.valset, config, version=state.policy_version)
    score = ValidationScore(state.policy_version, found.score, kl, found.failed, found.rollouts + extra)
    at_this_version = {name: s for name, s in state.validated.items() if s.policy_version == state.policy_version}
    return replace(
        state,
        validated={**at_this_version, candidate.id: score},
        rollouts=state.rollouts.plus(eval=score.rollouts),
        **parts.meter.spent(),
    )


# -- which parts of the cycle a method has, and what the budget leaves ------------------------------------------


def fast_now(config: FSTConfig, state: State) -> bool:
    """Whether this cycle has a fast round: the method has them, and a candidate on the anchor can be paid for."""
    return config.method != "rl" and fast_left(config, state) >= config.fast.anchor_size


def slow_now(config: FSTConfig, state: State) -> bool:
    """Whether this cycle has slow steps."""
    if config.method == "sequential":
        return not fast_now(config, state)
    return config.method in ("fst", "rl")


def rollouts_left(config: FSTConfig, state: State) -> int:
    """Fast and slow rollouts that the run may still spend."""
    cap = config.budget.max_rollouts
    return (1 << 62) if cap is None else max(0, cap - state.rollouts.training)


def fast_left(config: FSTConfig, state: State) -> int:
    """Rollouts that fast rounds may still spend: for `sequential`, what is left of the first half."""
    if config.method != "sequential" or config.budget.max_rollouts is None:
        return rollouts_left(config, state)
    return max(0, config.budget.max_rollouts // 2 - state.rollouts.training)


def slow_cost(parts: Parts, batch: Sequence[Item]) -> int:
    """Rollouts of one slow step."""
    rollout = parts.config.rollout
    return len(batch) * (rollout.group_size + len(parts.teachers) * rollout.teacher_rollouts)


def added_cost(total: float | None, before: float | None, after: float | None) -> float | None:
    """Dollars so far; None once any price was unknown."""
    return None if total is None or before is None or after is None else total + after - before


# -- the data of a cycle ----------------------------------------------------------------------------------------


def next_batches(parts: Parts, state: State) -> list[tuple[Item, ...]]:
    """The next T batches."""
    config = parts.config
    return [
        batch_at(parts.trainset, state.batch + offset, config.rollout.batch_size, config.seed)
        for offset in range(config.train.steps_per_cycle)
    ]


def draw_anchor(config: FSTConfig, batches: Sequence[Sequence[Item]], state: State) -> tuple[Item, ...]:
    """Examples from those that the coming batches will use."""
    pool = list({item.id: item for batch in batches for item in batch}.values())
    random.Random(f"anchor/{config.seed}/{state.cycle}").shuffle(pool)
    return tuple(pool[: config.fast.anchor_size])


def leading(population: Population, count: int) -> tuple[Candidate, ...]:
    """The candidates with the best anchor means."""
    return tuple(sorted(population.candidates, key=population.mean_score, reverse=True)[:count])


def counting(metrics: MetricsLog, phase: str, total: int) -> OnRollout:
    """A callback that reports how many of a phase's rollouts are done."""
    done = 0

    def count(rollout: Rollout) -> None:
        nonlocal done
        done += 1
        metrics.progress(phase, done, total, example=rollout.example_id, score=rollout.score)

    return count


def keep_rollouts(files: RunFiles, cycle: int, rollouts: Sequence[Rollout]) -> None:
    """Write the first step's rollouts of a cycle down, those that failed or scored least first."""
    path = files.rollouts(cycle)
    worst_first = sorted(rollouts, key=lambda rollout: (rollout.outcome == "ok", rollout.score))
    lines = [json.dumps(readable(rollout), ensure_ascii=False) + "\n" for rollout in worst_first[:ROLLOUTS_KEPT]]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def readable(rollout: Rollout) -> dict[str, object]:
    """A rollout as people read it: texts, not token ids."""
    return {
        "candidate": rollout.candidate_id,
        "example": rollout.example_id,
        "policy_version": rollout.policy_version,
        "outcome": str(rollout.outcome),
        "score": rollout.score,
        "error": rollout.error,
        "calls": [
            {"predictor": call.predictor, "text": call.text, "tokens": len(call.completion_ids)}
            for call in rollout.calls
        ],
    }
