"""One cycle of Fast-Slow Training, reading straight down.

    population = evolve(population, policy, anchor)      # fast: rescored at this policy version, top K of the frontier
    validate(population, policy)                         # keep the best pair of candidate and policy version
    for batch in next T batches:
        groups = collect(population, policy, batch)      # G rollouts per example, G/K under each candidate, one group
        policy = update(policy, credit(groups))          # slow: one step on the LoRA adapter; the next version
    validate(population, policy)

Source: arXiv 2605.12484. Each line is a phase, and a checkpoint follows each (`phases`): a run that was killed does its
unfinished phase again, with the rollouts that it has paid for already. `schedule` says which phases a method has (`rl`
no fast round, `gepa` no slow steps, `sequential` and `once` first fast rounds, then slow steps) and what the budget
leaves.

What ends a run: `schedule.next_cycle` and the caps set `ended`, and the phases left are skipped. A monitor's alarm is
logged; where the settings say `pause`, the run stops after the checkpoint (`Paused`) and can be resumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fst_optimizer import schedule
from fst_optimizer.collect import collect, groups_of_step
from fst_optimizer.errors import ProgramError, ReflectionError
from fst_optimizer.evolve.budget import Wanted
from fst_optimizer.evolve.round import evolve
from fst_optimizer.phases import Phases, stopped_if_asked, within_caps
from fst_optimizer.rollout.credit import credit
from fst_optimizer.rollout.gather import worth_keeping
from fst_optimizer.rollout.groups import fast_requests, grouped
from fst_optimizer.run.batches import draw_anchor, next_batches
from fst_optimizer.run.evaluate import evaluate_pair
from fst_optimizer.run.monitors import after_eval, after_loss, after_step
from fst_optimizer.run.run import Run
from fst_optimizer.run.samples import keep_rollouts
from fst_optimizer.run.state import Best, State
from fst_optimizer.store.files import write_json
from fst_optimizer.store.metrics import accepted_fields, eval_fields, fast_fields, group_fields, step_fields
from fst_optimizer.store.tally import REMEDIES, Tally, commonest_failure, tally_of
from fst_optimizer.stream import end_of_stage, watch_round, watch_step
from fst_optimizer.types import Item, Outcome, Rollout


def run_cycle(run: Run, state: State) -> State:
    """One fast round, a validation, T slow steps, a validation. Skips the phases that `state` records as done.

    Batches and anchor follow from the seed and the state, so a resumed cycle has the same. Sets `ended` when the run is
    over.

    Raises:
        Paused: A monitor asks for it; the checkpoint is written.
    """
    state = schedule.allotted(run.config, state)
    config = schedule.cycle_config(run.config, state)
    batches = next_batches(run.trainset_at(state), config, state.batch, state.success)
    phase = Phases(run, done=state.phase)
    state = phase(state, fast_round, draw_anchor(batches, config, state.cycle), batches[0], kind="fast")
    state = phase(state, validate, kind="eval")
    for batch in batches:
        state = phase(state, slow_step, batch, kind="slow")
    return phase(state, end_of_cycle)


def fast_round(run: Run, state: State, anchor: Sequence[Item], batch: Sequence[Item]) -> State:
    """Evolve the population under the newest policy version. Old anchor scores are not used: all are measured anew.

    With `rollout.reuse`, rollouts on the `batch` of the next step are kept for its groups.
    """
    config = schedule.cycle_config(run.config, state)
    if not schedule.has_fast_round(config, state):
        return state
    if run.reflector.failure and config.fast.on_reflection_failure == "stop":
        raise ReflectionError(
            f"{run.reflector.failure}; so did all {run.reflector.calls} calls. Correct its key, name or address and "
            "resume, or let the run go on without new instructions: fast.on_reflection_failure='continue'"
        )
    left = schedule.fast_rollouts_left(config, state)
    version, temperature = state.policy_version, config.fast.temperature
    count = run.metrics.counting("fast", min(config.fast.max_rollouts, left))
    tally, asked, ran = Tally(), Counter[tuple[str, str]](), list[Rollout]()
    reuse = config.rollout.reuse != "none" and run.trainer is not None

    def score(wanted: Wanted, **how: Any) -> list[Rollout]:
        nonlocal tally
        # A whole batch that is lost means that the engine is down only where nothing was answered before.
        how["capture"] |= reuse and config.train.credit == "predictor"
        how |= {"version": version, "temperature": temperature, "on_rollout": count, "all_may_be_lost": tally.total > 0}
        requests = [one for pair in wanted for one in fast_requests(*pair, temperature, state.cycle, asked)]
        rollouts = run.collector.run(requests, **how)
        tally = tally.plus(tally_of(rollouts))
        ran.extend(rollouts)
        return rollouts

    found = evolve(
        schedule.searched_population(config, state),
        score,
        anchor,
        run.reflector,
        config.fast,
        policy_version=version,
        cycle=state.cycle,
        seed=config.seed,
        components=run.components,
        rollouts_left=left,
        reflections_left=schedule.reflections_left(config, state),
        tried=frozenset(state.tried),
        count_tokens=run.policy.count_tokens,
        root=run.root,
        halted=lambda: bool(run.meter.reached()),
        on_accepted=lambda accepted: run.metrics.tell("accepted", cycle=state.cycle, **accepted_fields(accepted)),
    )
    run.meter.add_reused(found.reused)
    write_json(run.files.population(state.cycle), {**found.population.to_json(), "notes": list(found.notes)})
    population = schedule.kept_population(config, state, found)
    state, switch = watch_round(run, schedule.after_fast_round(config, state, found), ran)
    state, said = schedule.announced(config, state)
    fields = {**fast_fields(found), "population": len(population.candidates), "search_over": state.search_over or None}
    run.log("fast", state, tally, **fields, **said, **noticed(switch))
    lost = ("the fast round", found.lost, len(anchor), str(tally.first_error))
    watch, alarms = after_loss(config.monitors, state.watch, *lost)
    for_groups = worth_keeping(ran, population, batch, config.rollout.group_size) if reuse else ()
    return replace(state, population=population, for_groups=for_groups, watch=watch, alarms=alarms)


def slow_step(run: Run, state: State, batch: Sequence[Item]) -> State:
    """Collect one batch of groups under the newest version, update the weights, publish the next version.

    `sequential` and `once` train under their best candidate alone, which is then the population.
    """
    config = run.config
    population = schedule.trained_population(config, state)
    batch = schedule.unlearned(config, state, batch)
    if run.trainer is None or not schedule.has_slow_steps(config, state):
        return state
    if not batch:
        return schedule.after_slow_step(config, state)
    groups = groups_of_step(run, state, population, batch)
    if cap := schedule.cap_before_step(config, state, groups.to_run):
        if state.stream and cap == "max_rollouts":
            return state  # the stage's: the next cycle is another one's
        return replace(state, ended="budget", cap=cap)
    found = collect(run, state, groups)
    collected_s = run.metrics.time_s
    credited = credit(grouped(found.rollouts), config)
    run.warn_once(state, credited.unlearned)
    report = run.trainer.step(credited.rows)
    version = run.policy.publish() if report.updated else state.policy_version
    state = schedule.after_slow_step(config, state, found, updated=report.updated)
    state = replace(state, population=population, step=state.step + 1, policy_version=version)
    if state.phase == schedule.FIRST_STEP:  # the sample kept to read
        keep_rollouts(run.files, state.cycle, found.rollouts)
    fields = step_fields(found.ran, credited, report, run.metrics.time_s - collected_s)
    fields |= group_fields(found, config.rollout)
    state, switch = watch_step(run, state, found.rollouts)
    state, said = schedule.announced(config, state)
    run.log("step", state, tally_of(found.ran), **fields, **said, **noticed(switch))
    watch, alarms = after_step(config.monitors, state.watch, found.rollouts, credited, report)
    return replace(state, watch=watch, alarms=alarms)


def validate(run: Run, state: State, again: bool = False) -> State:
    """Score the leading candidates at the newest version on the validation set; keep the best pair.

    A pair that is scored already is not scored again: evaluation is greedy. With `again` it still gets its line in the
    log, so that each cycle ends with one. In a stream nothing is chosen: the leading candidate's pair is kept.
    """
    if not again and not schedule.validation_due(run.config, state, ends=False):
        return state
    version, config, valset = state.policy_version, run.config.eval, run.valset_at(state)
    leading = state.population.leading(config.candidates)
    for candidate in leading:
        known = state.validation(candidate)
        new = known is None
        if known is None:
            known = evaluate_pair(
                run.collector,
                candidate,
                valset,
                config,
                version=version,
                on_rollout=run.metrics.counting("eval", len(valset[: config.max_examples])),
                on_sampled=run.metrics.counting("kl", len(valset[: config.kl_examples])),
            )
            others = {name: one for name, one in state.validated.items() if one.policy_version == version}
            state = replace(state, validated={**others, candidate.id: known}, validated_at=state.rollouts.training)
        if new or again:
            state, said = schedule.announced(run.config, state)
            run.log("eval", state, known.tally, **eval_fields(candidate, known), **said)
            examples, first = known.lost + len(known.scores), str(known.tally.first_error)
            watch, alarms = after_loss(run.config.monitors, state.watch, "the validation", known.lost, examples, first)
            state = replace(state, watch=watch, alarms=(*state.alarms, *alarms))
        if candidate == leading[0] if state.stream else (new or again) and state.best.beaten_by(known):
            state = replace(state, best=Best.of(candidate, known))
    return state


def end_of_cycle(run: Run, state: State) -> State:
    """The evaluation that ends a cycle, what the monitors make of it, and whether another cycle follows.

    Raises:
        ProgramError: The first cycle ends, and not one rollout of the run ended `ok`.
    """
    due = schedule.validation_due(run.config, state, ends=True)
    if due and schedule.leaves_evaluation(state):
        state = stopped_if_asked(run, within_caps(run, state, "eval", validate, True))
    if not state.cycle and state.ended != "stopped" and (why := nothing_ended_well(state)):
        raise ProgramError(why)
    (leader,) = state.population.leading(1)
    if due and (found := state.validation(leader)):  # otherwise a cap stopped the validation
        best, before = state.best.score, state.val_score_before
        watch, alarms = after_eval(run.config.monitors, state.watch, found, best=best, best_before=before)
        state = replace(state, watch=watch, alarms=(*state.alarms, *alarms))
    if state.stream and schedule.leaves_evaluation(state) and (state.ended or schedule.stage_over(run.config, state)):
        state = within_caps(run, state, "eval", end_of_stage)
    return schedule.next_cycle(run.config, state)


def noticed(switch: bool) -> dict[str, bool]:
    """What a line says of a switch: that there is one, or nothing."""
    return {"switch": True} if switch else {}


def nothing_ended_well(state: State) -> str:
    """What to say where not one rollout of the run so far ended `ok`; "" where one did."""
    tally, ran = state.tally, state.rollouts
    found = commonest_failure(tally.outcomes)
    # An older version of this package did not count: of what it ran, nothing is known.
    if found is None or Outcome.OK in tally.outcomes or tally.total < ran.training + ran.eval:
        return ""
    counts = ", ".join(f"{outcome} {count}" for outcome, count in tally.outcomes.items())
    return (
        f"not one of the {tally.total} rollouts of the first cycle ended well ({counts}; the first: "
        f"{tally.first_error}), so that nothing was learned: {REMEDIES[found[0]]}. "
        "Then start again in another directory"
    )
