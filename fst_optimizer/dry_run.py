"""The dry run: what two rollouts, one call of the reflection LM and the settings show before anything is spent.

Each check gives a `Finding`: `ok`, `warn` or `fail`. All that can be made are made, so that one look names every
problem. `FST.compile` refuses what fails; `fst check` prints it all.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.distill.lesson import rendering
from fst_optimizer.errors import EngineError, FSTError, ProgramError, UserError
from fst_optimizer.evolve.reflect import LMReflector, Reflector, will_pass
from fst_optimizer.evolve.reflection_lm import is_policy
from fst_optimizer.finding import Finding
from fst_optimizer.keys import without_secrets
from fst_optimizer.parts import sizes_of
from fst_optimizer.planned import Planned, RunSizes, planned, rollouts_per_step
from fst_optimizer.program.texts import seed_texts
from fst_optimizer.rollout.collector import Collector
from fst_optimizer.rollout.credit import greedy_calls
from fst_optimizer.rollout.outcome import raised_alike
from fst_optimizer.rollout.threads import REMEDY, stray_calls
from fst_optimizer.schedule import NO_CAP
from fst_optimizer.store import files
from fst_optimizer.store.meter import cost_usd, model_cost_usd, unknown_cost
from fst_optimizer.types import Candidate, Outcome, Rollout, Usage, total_usage

if TYPE_CHECKING:
    from fst_optimizer.run.run import Given
    from fst_optimizer.store.meter import Prices

logger = logging.getLogger(__name__)

EXAMPLES = 2
"""Training examples that the student is tried on."""
REFLECTION = Usage(calls=1, prompt_tokens=2000, completion_tokens=500)
"""What one reflection is taken to cost, where its price is known."""
UNCHECKED = "not checked, as"
UNPARSED = (Outcome.PARSE_ERROR, Outcome.TRUNCATED, Outcome.PROMPT_TOO_LONG)


@dataclass(frozen=True)
class DryRun:
    """What a dry run found, and what it spent."""

    findings: tuple[Finding, ...]
    planned: Planned
    """The most that the run may spend."""
    rollouts: tuple[Rollout, ...]
    spent: Mapping[str, Any]
    """Under the names that a run's `State` has for it."""
    broken: FSTError | None = None
    """What was raised while the student ran, by the metric, an engine or the program itself."""

    @property
    def failed(self) -> tuple[Finding, ...]:
        """What a run would be refused for."""
        return tuple(one for one in self.findings if one.level == "fail")

    @property
    def plan(self) -> str:
        """`planned` in words, with dollars where they can be told."""
        return next(one.text for one in self.findings if one.name == "plan")

    def refuse(self) -> None:
        """Raise what `compile` raises for it; warn of what is odd, and log the plan, where nothing fails.

        Raises:
            MetricError, EngineError: a part broke.
            ProgramError: the program raised on all examples.
            UserError: anything else that would keep the run from learning; all of it is named.
        """
        if self.broken is not None and not isinstance(self.broken, UserError):
            raise self.broken
        if not self.failed:
            self._log()
            return
        kind = ProgramError if any(one.name == "program" for one in self.failed) else UserError
        texts = [one.text for one in self.failed]
        if len(texts) > 1:
            texts = [f"{len(texts)} problems", *(f"({number}) {text}" for number, text in enumerate(texts, 1))]
        found = "found in the dry run; no more than that was spent. run.dry_run=False leaves it out"
        raise kind("\n".join([*texts, f"({found})"])) from (self.broken and self.broken.__cause__)

    def _log(self) -> None:
        for one in self.findings:
            told = one.name == "program" and any(rollout.raised for rollout in self.rollouts)  # as it happened
            if one.level == "warn" and not told and not one.text.startswith(UNCHECKED):
                logger.warning("dry run, %s: %s", one.name, one.text)
        logger.info("plan: %s", self.plan)


def dry_run(
    collector: Collector,
    reflector: Reflector,
    given: Given,
    test: int,
    run_dir: Path | None,
    *,
    resume: bool = False,
) -> DryRun:
    """Try the student on its first examples at training's temperature, and the reflection LM with one call.

    Nothing is written. The collector is one of its own: its meter's counts are what was spent, as `eval`. `test`: how
    many examples are scored before and after the run.
    """
    config, meter, sizes = collector.config, collector.meter, sizes_of(given, test)
    ended: list[Rollout] = []
    under_teacher = given.lesson.under_teacher() if given.lesson else None
    broken: FSTError | None = None
    with meter.uncapped(), meter.charging("eval"):
        try:
            collector.run_candidate(
                Candidate(seed_texts(given.student)),
                given.train[:EXAMPLES],
                version=given.start_version,
                temperature=config.rollout.temperature,
                capture=True,
                on_rollout=ended.append,
                under_teacher=under_teacher,
            )
        except FSTError as error:
            broken = error
    rollouts = tuple(one for item in given.train[:EXAMPLES] for one in ended if one.example_id == item.id)
    plan = planned(config, sizes, dry_run=meter.rollouts.eval)
    findings = [
        check_run_dir(run_dir, resume=resume),
        check_budget(config, sizes),
        *(
            [*check_rollouts(rollouts, collector.strays), *check_sampling(rollouts, config)]
            if broken is None or isinstance(broken, ProgramError)
            else [_broken(broken)]
        ),
        *(rendering(under_teacher) if under_teacher else ()),
        *check_prices(config, meter.usage),
        check_reflection(config, sizes, reflector),
        Finding("ok", "plan", described(plan, config, meter.usage, len(rollouts), reflector)),
    ]
    # What it raised on one example is a mistake after all where it raises so everywhere in the first batch.
    spent = {**meter.spent(), "crashes": ()}
    return DryRun(tuple(filter(None, findings)), plan, rollouts, spent, broken)


def _broken(error: FSTError) -> Finding:
    """The metric returned no number or raised, or the engine failed."""
    name = "rollouts" if isinstance(error, EngineError) else "metric"
    return Finding("fail", name, f"{error}; answers and scores were not checked")


# -- settings ------------------------------------------------------------------------------------------------------


def check_run_dir(run_dir: Path | None, *, resume: bool = False) -> Finding | None:
    """Whether a new run can be written there. None: no folder is named."""
    if run_dir is None:
        return None
    try:
        files.check_run_dir(run_dir, resume=resume)
    except UserError as error:
        return Finding("fail", "run_dir", str(error))
    return Finding("ok", "run_dir", f"{run_dir} is free")


def check_budget(config: FSTConfig, sizes: RunSizes) -> Finding:
    """Whether the caps leave room for the rollouts that a cycle begins with."""
    cap = NO_CAP if config.budget.max_rollouts is None else config.budget.max_rollouts
    own = config.search_rollouts
    fast_cap = cap if own is None else min(cap, own)
    anchor, step = config.fast.anchor_size, rollouts_per_step(config, sizes)
    wanted, paid = [], []
    if own != 0:
        wanted.append(f"one candidate on the anchor ({anchor} rollouts, fast.anchor_size)")
        paid.append(anchor <= fast_cap)
    if config.method != "gepa":
        wanted.append(f"one step ({step} rollouts, rollout.batch_size x rollout.group_size)")
        paid.append(step <= cap)
    if all(paid):
        return Finding("ok", "budget", f"pays for {' and '.join(wanted)}")
    lacking = [name for name, enough in zip(wanted, paid, strict=True) if not enough]
    half = ", half of it for prompts," if config.method == "sequential" else ""
    caps = f"budget.max_rollouts is {cap}:{half}"
    if config.method == "once" and fast_cap < min(cap, anchor):
        caps = f"fast.once_rollouts is {fast_cap}:"
    text = f"{caps} it does not pay for {' nor for '.join(lacking)}; raise it, or lower those"
    return Finding("warn" if any(paid) else "fail", "budget", text)


def check_prices(config: FSTConfig, usage: Mapping[str, Usage]) -> list[Finding]:
    """A cap on dollars needs the price of every LM that is used."""
    if config.budget.max_cost_usd is None:
        return []
    unknown = unknown_cost(usage, config.budget.prices)
    if unknown is None:
        return []
    who, remedy = unknown
    text = f"budget.max_cost_usd is {config.budget.max_cost_usd}, and what {who} costs is unknown: {remedy}"
    return [Finding("fail", "prices", text)]


# -- rollouts ------------------------------------------------------------------------------------------------------


def check_rollouts(rollouts: Sequence[Rollout], strays: int) -> list[Finding]:
    """What the rollouts say of the program, its calls, its answers and the metric."""
    program = check_program(rollouts)
    if program.level == "fail":
        calls = [Finding("fail", "calls", stray_calls(strays))] if strays else []
        return [program, *calls, Finding("warn", "scores", f"{UNCHECKED} the program failed")]
    return [program, check_calls(rollouts, strays), *check_answers(rollouts), *check_scores(rollouts)]


def check_program(rollouts: Sequence[Rollout]) -> Finding:
    """The program must not fail on every example: raise, ask for more than the context, or take too long."""
    raised = [one for one in rollouts if one.outcome is Outcome.PROGRAM_ERROR]
    late = [one for one in rollouts if one.outcome in (Outcome.TIMEOUT, Outcome.ENGINE_ERROR)]
    long = [one for one in rollouts if one.outcome is Outcome.PROMPT_TOO_LONG]
    if len(raised) == len(rollouts):
        told = raised[:1] if raised_alike(raised) else raised
        return Finding("fail", "program", f"the program raised on {_named(raised)}:\n" + "\n".join(map(_lines, told)))
    if len(long) == len(rollouts):
        return Finding("fail", "program", f"no prompt fits on {_named(long)}: {long[0].error}")
    if all(one.outcome is Outcome.TIMEOUT for one in rollouts):
        remedy = "correct the program, or raise rollout.timeout_s"
        return Finding("fail", "program", f"the program did not end on {_named(late)}: {late[0].error}; {remedy}")
    if raised:
        return Finding("warn", "program", f"the program raised on {_named(raised)}: {_lines(raised[0])}")
    if late:
        return Finding("warn", "program", "; ".join(f"{one.example_id}: {one.outcome}, {one.error}" for one in late))
    return Finding("ok", "program", f"ran on {_named(rollouts)}")


def check_calls(rollouts: Sequence[Rollout], strays: int) -> Finding:
    """Every rollout must be recorded: calls that nobody keeps are not trained on."""
    if strays:
        return Finding("fail", "calls", stray_calls(strays))
    without = [one for one in rollouts if not one.calls]
    if len(without) == len(rollouts):
        text = (
            f"no call of the policy was recorded on {_named(rollouts)}: nothing can be learned. The program calls no "
            f"predictor that has policy.lm, or does so where it cannot be seen, such as in another process. {REMEDY}"
        )
        return Finding("fail", "calls", text)
    counts = ", ".join(f"{len(one.calls)} on {one.example_id}" for one in rollouts)
    return Finding("warn" if without else "ok", "calls", f"calls of the policy: {counts}")


def check_sampling(rollouts: Sequence[Rollout], config: FSTConfig) -> list[Finding]:
    """Greedy calls are not trained on: where all are greedy, no weight would ever change."""
    calls = [call for one in rollouts for call in one.calls if config.trains(call.predictor)]
    greedy = {call.predictor for call in calls if not call.temperature}
    if config.method == "gepa" or not greedy:
        return []
    if all(not call.temperature for call in calls):
        text = f"no weight would change: all {greedy_calls(greedy)}; to learn prompts alone, give method='gepa'"
        return [Finding("fail", "sampling", text)]
    return [Finding("warn", "sampling", greedy_calls(greedy))]


def check_answers(rollouts: Sequence[Rollout]) -> list[Finding]:
    """Answers that do not parse are data, and what training mends; that none parses may be a mistake."""
    unparsed = [one for one in rollouts if one.outcome in UNPARSED]
    if not unparsed:
        return []
    return [Finding("warn", "answers", f"{unparsed[0].outcome} on {_named(unparsed)}: {unparsed[0].error}")]


def check_scores(rollouts: Sequence[Rollout]) -> list[Finding]:
    """A score is a number from 0 to 1."""
    judged = [one for one in rollouts if one.outcome is Outcome.OK]
    if not judged:
        return [Finding("warn", "scores", f"{UNCHECKED} no rollout gave anything to score")]
    told = {
        **{one.example_id: one.score for one in judged},
        **{f"{one.example_id}, {name}": score for one in judged for name, score in one.predictor_scores.items()},
    }
    outside = ", ".join(f"{score:g} on {where}" for where, score in told.items() if not 0 <= score <= 1)
    if outside:
        text = (
            f"the metric's score is outside [0, 1] ({outside}), and 1 counts as perfect: prompts would stop evolving. "
            "Let the metric divide by its largest score"
        )
        if min(told.values()) < 0:
            text = f"the metric's score is outside [0, 1] ({outside}): let the metric map its scores to 0..1"
        return [Finding("fail", "scores", text)]
    scores = [one.score for one in judged]
    if len(judged) == len(rollouts) > 1 and len(set(scores)) == 1:
        text = f"{scores[0]:g} on each of {_named(judged)}: a metric that scores every answer the same teaches nothing"
        return [Finding("warn", "scores", text)]
    return [Finding("ok", "scores", ", ".join(f"{one.score:g} on {one.example_id}" for one in judged))]


def _named(rollouts: Sequence[Rollout]) -> str:
    names = " and ".join(one.example_id for one in rollouts)
    return names if len(rollouts) == 1 else f"both {names}" if len(rollouts) == EXAMPLES else names


def _lines(rollout: Rollout) -> str:
    return "\n".join(rollout.raised.lines) if rollout.raised else rollout.error


# -- reflection ----------------------------------------------------------------------------------------------------


def check_reflection(config: FSTConfig, sizes: RunSizes, reflector: Reflector) -> Finding | None:
    """Whether the reflection LM answers at all. None where no prompt evolves."""
    if config.search_rollouts == 0 or not sizes.components:
        return None
    if not isinstance(reflector, LMReflector):
        return Finding("ok", "reflection", "the extractive reflector, which calls no LM")
    model = reflector.model
    if is_policy(reflector.lm):
        return Finding("ok", "reflection", f"{model}, a policy of this process, was not asked")
    try:
        reflector.try_out()
    except Exception as error:
        why = without_secrets(f"the reflection LM {model} failed: {type(error).__name__}: {error}")
        if will_pass(error):
            return Finding("warn", "reflection", f"{why}; it may pass")
        return Finding("fail", "reflection", f"{why}. Correct its key, name or address")
    return Finding("ok", "reflection", f"{model} answers")


# -- the plan ------------------------------------------------------------------------------------------------------


def described(plan: Planned, config: FSTConfig, usage: Mapping[str, Usage], tried: int, reflector: Reflector) -> str:
    """The plan in words, with dollars where they can be told."""
    runs = f"{plan.fast} fast, {plan.slow} slow and {plan.eval} eval rollouts"
    text = f"at most {plan.cycles} cycles and {plan.steps} steps: {runs}"
    if plan.training < plan.fast + plan.slow:
        text += f" ({plan.training} fast and slow together)"
    text += f", {plan.reflection_calls} reflections" if plan.reflection_calls else ""
    dollars = []
    if usage:
        cost = planned_cost_usd(plan, usage, tried, config.budget.prices)
        dollars.append("other LMs in rollouts " + ("at an unknown price" if cost is None else f"about ${cost:.2f}"))
    if isinstance(reflector, LMReflector) and plan.reflection_calls and not is_policy(reflector.lm):
        each = model_cost_usd(reflector.model, REFLECTION, config.budget.prices)
        told = "at an unknown price" if each is None else f"about ${each * plan.reflection_calls:.2f}"
        dollars.append(f"reflection {told}")
    return "; ".join([text, *dollars])


def planned_cost_usd(plan: Planned, usage: Mapping[str, Usage], tried: int, prices: Prices) -> float | None:
    """Dollars for LMs that are not trained, if every planned rollout costs what those tried cost; None: not known."""
    cost = cost_usd(total_usage(usage), prices)
    return None if cost is None or not tried else cost / tried * plan.rollouts
