"""Measures a finished run's policy at any version that it kept, each thing once: the same command goes on from there.

A measurement is a function of the weights, the instructions, the examples and the code that scores. What is written
down is found again by these, whichever run or experiment asks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fst_optimizer.errors import UserError
from fst_optimizer.finished.load import load_policy
from fst_optimizer.finished.recorded import base_of, scoring_config
from fst_optimizer.lab.subjects import Subject
from fst_optimizer.run.record import digest, versions
from fst_optimizer.store.files import ADAPTER_TENSORS, checksum, read_json, write_json
from fst_optimizer.tasks import Task
from fst_optimizer.types import Candidate, Item, items_of

if TYPE_CHECKING:
    from fst_optimizer.policy.policy import Policy
    from fst_optimizer.rollout.collector import Collector

Tell = Callable[[int, int], None]
"""Is told how many examples are scored, of how many."""


@dataclass(frozen=True)
class Memory:
    """Measurements that were made before, one file each."""

    folder: Path

    def __call__(self, key: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured under this key, or is measured now."""
        plain = json.loads(json.dumps(key, default=str))
        name = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:24]
        path = self.folder / f"{name}.json"
        if path.exists() and (known := read_json(path)).get("key") == plain:
            found: dict[str, Any] = known["found"]
            return found
        found = measure()
        write_json(path, {"key": plain, "found": found})
        return found


@dataclass(frozen=True)
class Exam:
    """Programs of one task's variants, each with instructions and examples of its test split."""

    task: Task
    """Its metric scores all of them."""
    parts: Mapping[str, tuple[Mapping[str, str], tuple[Item, ...]]]
    """Name -> the program's instructions, and examples."""
    builders: Mapping[str, Callable[[], Any]]
    """Name -> builds the program."""

    @property
    def key(self) -> dict[str, Any]:
        """What its scores depend on besides the policy."""
        parts = {name: [dict(texts), digest(items)] for name, (texts, items) in self.parts.items()}
        return {"task": self.task.name, "code": code_of(self.task.module), "parts": parts}


def exam_on(task: Task, texts: Mapping[str, str] | None, size: int | None, name: str = "") -> Exam:
    """The test split of one task under these instructions. None: those that the task says are right, or its own.

    Raises:
        UserError: the test set is empty.
    """
    from fst_optimizer.program.texts import seed_texts

    if texts is None:
        texts = task.instructions() or seed_texts(task.build_program())
    examples = task.load("test", size)
    if not examples:
        raise UserError(f"the test set of {task.name!r} is empty: give examples")
    return Exam(task, {name: (texts, items_of(examples, "test"))}, {name: task.build_program})


def probes_of(task: Task, size: int) -> Exam | None:
    """The task's probes, each under the instructions that are right for it, `size` examples each. None: it has none."""
    variants = task.probes()
    if not variants:
        return None
    place = task.name.partition(":")[0]
    each = [exam_on(replace(task, name=f"{place}:{one}", variant=one), None, size, one) for one in variants]
    parts = {
        name: (texts, tuple(replace(item, id=f"{name}/{item.id}") for item in items))
        for exam in each
        for name, (texts, items) in exam.parts.items()
    }
    builders = {name: build for exam in each for name, build in exam.builders.items()}
    return Exam(task, parts, builders)


class Bench:
    """The policy of a finished run, loaded when something is measured that is not known yet."""

    def __init__(
        self,
        subject: Subject,
        memory: Memory,
        *,
        model: str | None = None,
        engine: str | None = None,
        on_progress: Tell | None = None,
    ) -> None:
        self.subject = subject
        self.memory = memory
        self._model, self._engine = model, engine
        self._on_progress = on_progress

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        if "policy" in vars(self):
            self.policy.close()

    @cached_property
    def policy(self) -> Policy:
        """The run's."""
        finished = self.subject.finished
        base = base_of(finished.policy, self._model, self.subject.task.model())
        return load_policy(finished.files, finished.config, finished.version, base, self._engine)

    def scores(self, exam: Exam, version: int) -> dict[str, list[float]]:
        """Part -> the score of each example, by greedy decoding at this version of the weights."""

        def measure() -> dict[str, Any]:
            rollouts = self._run(exam, version, 0.0, None)
            return {name: [rollout.score for rollout in some] for name, some in rollouts.items()}

        return self.memory({"scores": exam.key, **self._weights(version)}, measure)

    def kls(self, exam: Exam, version: int, size: int) -> dict[str, float]:
        """Part -> KL(version || base), in nats a token, on tokens sampled at the version on `size` examples."""

        def measure() -> dict[str, Any]:
            rollouts = self._run(exam, version, 1.0, size)
            calls = {name: [call for one in some for call in one.calls] for name, some in rollouts.items()}
            return {name: self.policy.kl_to_base(some, version) for name, some in calls.items()}

        if not version:
            return dict.fromkeys(exam.parts, 0.0)
        key = {"kl": exam.key, "size": size, "seed": self.subject.run.seed, **self._weights(version)}
        return self.memory(key, measure)

    def _weights(self, version: int) -> dict[str, Any]:
        """What tells the weights of a version, and how they are asked, from others."""
        finished = self.subject.finished
        made = finished.policy
        tensors = checksum(finished.files.adapter(version) / ADAPTER_TENSORS) if version else None
        lora = made.lora.to_dict() if version else None
        asked = {"max_tokens": made.max_tokens, "chat_template_args": dict(made.chat_template_args)}
        base = made.fingerprint or made.model
        return {"base": base, "adapter": tensors, "lora": lora, **asked, "versions": versions()}

    def _run(self, exam: Exam, version: int, temperature: float, size: int | None) -> dict[str, list[Any]]:
        """Rollouts of every part, together."""
        from fst_optimizer.rollout.rollout import Request

        self._serve(version)
        named = {name: Candidate(texts, id=f"exam/{name}") for name, (texts, _) in exam.parts.items()}
        requests = [Request(named[name], item) for name, (_, items) in exam.parts.items() for item in items[:size]]
        count = 0

        def tell(_: object) -> None:
            nonlocal count
            count += 1
            if self._on_progress:
                self._on_progress(count, len(requests))

        collector = self._collector(exam)
        rollouts = collector.run(requests, version=version, temperature=temperature, on_rollout=tell)
        found: dict[str, list[Any]] = {name: [] for name in exam.parts}
        for request, rollout in zip(requests, rollouts, strict=True):
            found[part_of(request.candidate)].append(rollout)
        return found

    def _collector(self, exam: Exam) -> Collector:
        from fst_optimizer.program.lms import attach_policy, give_lm
        from fst_optimizer.program.student import check_program
        from fst_optimizer.program.texts import apply_texts
        from fst_optimizer.rollout.collector import Collector
        from fst_optimizer.rollout.metric import Metric

        policy, config = self.policy, scoring_config(self.subject.finished.config["config"])
        programs = {
            name: attach_policy(give_lm(check_program(build()), policy.lm), policy)
            for name, build in exam.builders.items()
        }

        def program_of(candidate: Candidate) -> Any:
            return apply_texts(programs[part_of(candidate)], candidate.texts)

        return Collector(program_of, policy, Metric(exam.task.metric), config, must_work=True)

    def _serve(self, version: int) -> None:
        """Have the policy serve a version that the run kept, and no other but the run's own."""
        from fst_optimizer.model.lora import load_adapter_tensors

        if version not in self.policy.engine.versions():
            self.policy.retire_all_but(())
            self.policy.restore(version, load_adapter_tensors(self.subject.finished.files.adapter(version)))


def part_of(candidate: Candidate) -> str:
    """The part of an exam that a candidate is made for."""
    return candidate.id.partition("/")[2]


@cache
def code_of(module: ModuleType) -> str:
    """A hash of a task's code: of the Python files beside its `task.py`, else of its module alone."""
    path = Path(str(module.__file__))
    files = sorted(path.parent.glob("*.py")) if path.name == "task.py" else [path]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
