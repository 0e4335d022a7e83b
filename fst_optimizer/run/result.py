"""`program.detailed_results`: what a run came to, under our names and under those of `dspy.GEPA`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.program.texts import apply_texts
from fst_optimizer.run.state import Best
from fst_optimizer.store.metrics import read_metrics
from fst_optimizer.types import Candidate, Population

if TYPE_CHECKING:
    import dspy

    from fst_optimizer.run.state import State
    from fst_optimizer.store.files import RunFiles


@dataclass(frozen=True)
class CompileResult:
    """What `program.detailed_results` holds.

    The fields are ours. The properties have the names that `dspy.GEPA` gives its results, where a run has what they
    stand for: the candidates are the last population, and the one that the program carries where that population has
    lost it. Two notions differ. GEPA scores every candidate on the validation set, and with fixed weights; here the
    candidates are compared on the *anchor* of the last fast round, examples of the trainset, all at the policy version
    of that round (`population.policy_version`). And the program's candidate was chosen with its policy version, on the
    validation set (`best`), so that it need not lead on the anchor.

    GEPA's other names are absent: `best_outputs_valset`, since answers are not kept, and `val_aggregate_subscores`,
    `per_objective_best_candidates` and `objective_pareto_front`, since there is one objective.
    """

    run_dir: Path
    result: Mapping[str, Any]
    """The content of `result.json`."""
    population: Population
    """The last population, with scores on its anchor."""
    best: Best
    """The (candidate, policy version) pair that the program carries."""
    program: dspy.Module = field(repr=False, compare=False)
    """The compiled program."""
    round_ends: Mapping[int, int] = field(default_factory=dict)
    """Cycle -> rollouts of all kinds when its fast round ended."""
    num_full_val_evals: int = 0
    """(candidate, policy version) pairs that were scored on the validation set (its first `eval.max_examples`)."""

    def __deepcopy__(self, memo: dict[int, object]) -> CompileResult:
        """Itself: a copy of the program comes from the same run."""
        return self

    @property
    def candidates(self) -> list[dspy.Module]:
        """Programs with the candidates' instructions, made when asked for; their LM is that of the compiled program."""
        return [apply_texts(self.program, candidate.texts) for candidate in self._compared]

    @property
    def parents(self) -> list[list[int | None]]:
        """For each candidate the places of its parents in `candidates`; None for one that is not there any more.

        `[None]` for the seed, as GEPA has it. `population.candidates[i].parents` are their ids.
        """
        places: dict[str, int | None] = {one.id: place for place, one in enumerate(self._compared)}
        return [[places.get(parent) for parent in one.parents] or [None] for one in self._compared]

    @property
    def val_aggregate_scores(self) -> list[float | None]:
        """Each candidate's mean score on the last anchor; None for one that was not scored there.

        That is the program's own candidate where the last population has lost it, and every candidate of a run that
        ends without fast rounds (`rl`, `sequential`, `once`).
        """
        return [sum(scores.values()) / len(scores) if scores else None for scores in self.val_subscores]

    @property
    def val_subscores(self) -> list[dict[str, float]]:
        """Each candidate's score by example of the last anchor, e.g. `train-12`; empty for one not scored there."""
        return [dict(self.population.scores.get(one.id, {})) for one in self._compared]

    @property
    def per_val_instance_best_candidates(self) -> dict[str, set[int]]:
        """For each example of the last anchor, the places of the candidates that are best on it."""
        scores, highest = self.val_subscores, self.highest_score_achieved_per_val_task
        return {
            example: {place for place, own in enumerate(scores) if own.get(example) == most}
            for example, most in highest.items()
        }

    @property
    def highest_score_achieved_per_val_task(self) -> dict[str, float]:
        """For each example of the last anchor, the best score that a candidate has on it."""
        highest: dict[str, float] = {}
        for scores in self.val_subscores:
            highest |= {example: max(score, highest.get(example, score)) for example, score in scores.items()}
        return highest

    @property
    def discovery_eval_counts(self) -> list[int]:
        """Rollouts of all kinds until the end of the fast round that found the candidate; 0 for the seed."""
        return [0 if one.origin == "seed" else self.round_ends[one.cycle] for one in self._compared]

    @property
    def total_metric_calls(self) -> int:
        """Rollouts of all kinds, evaluations included. The metric scores each once, but not those that failed."""
        rollouts = self.result["rollouts"]
        return int(rollouts["fast"] + rollouts["slow"] + rollouts["eval"])

    @property
    def log_dir(self) -> str:
        """The run's directory."""
        return str(self.run_dir)

    @property
    def seed(self) -> int:
        """The run's."""
        return int(self.result["seed"])

    @property
    def best_idx(self) -> int:
        """The place of the candidate that the compiled program carries: the best on the validation set."""
        return [one.id for one in self._compared].index(self.best.candidate.id)

    @property
    def best_candidate(self) -> dspy.Module:
        """The compiled program."""
        return self.program

    def to_dict(self) -> dict[str, Any]:
        """All of GEPA's names that are here, as plain data; candidates as their instructions by predictor."""
        names = (
            *("parents", "val_aggregate_scores", "val_subscores", "discovery_eval_counts", "total_metric_calls"),
            *("num_full_val_evals", "log_dir", "seed", "best_idx"),
        )
        best = self.per_val_instance_best_candidates
        return {
            "candidates": [dict(one.texts) for one in self._compared],
            "per_val_instance_best_candidates": {example: sorted(places) for example, places in best.items()},
            **{name: getattr(self, name) for name in names},
        }

    @property
    def _compared(self) -> tuple[Candidate, ...]:
        """The last population, and after it the best pair's candidate where it is not in there."""
        there = self.population.candidates
        known = any(one.id == self.best.candidate.id for one in there)
        return there if known else (*there, self.best.candidate)


def compile_result(files: RunFiles, result: Mapping[str, Any], state: State, program: dspy.Module) -> CompileResult:
    """The result of a run that has ended: `result.json`, the last state, and what its metrics tell."""
    lines = read_metrics(files.metrics)
    return CompileResult(
        run_dir=files.root,
        result=result,
        population=state.population,
        best=state.best,
        program=program,
        round_ends=_round_ends(lines),
        num_full_val_evals=len(
            {(line["candidate"], line["policy_version"]) for line in lines if line["kind"] == "eval"}
        ),
    )


def _round_ends(lines: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    counts = {line["cycle"]: line["rollouts"] for line in lines if line["kind"] == "fast"}
    return {cycle: count["fast"] + count["slow"] + count["eval"] for cycle, count in counts.items()}
