"""A finished run distilled: what `fst distill` does, without what it prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.overrides import Settings, assignments, read_settings, settled
from fst_optimizer.config.policy import LoraConfig, PolicyConfig
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.distill.lesson import origin_of
from fst_optimizer.errors import UserError
from fst_optimizer.finished.load import FinishedRun, load, read_finished
from fst_optimizer.finished.recorded import config_of, recorded_task, scoring_config
from fst_optimizer.program.student import checked_student
from fst_optimizer.program.texts import check_texts, seed_texts
from fst_optimizer.store.files import ADAPTER_TENSORS, RunFiles, check_run_dir, checksum, locked, read_json
from fst_optimizer.task_run import Sizes
from fst_optimizer.tasks import load_task

if TYPE_CHECKING:
    import dspy

    from fst_optimizer.run.result import CompileResult
    from fst_optimizer.store.metrics import Callback


@dataclass(frozen=True)
class DistillRequest:
    """What `fst distill` was asked for."""

    run_dir: Path
    """The finished run."""
    out: Path
    task: str | None = None
    """None: the run's own, where it comes with this package."""
    model: str | None = None
    """Where the base is now. None: as `load` finds it."""
    engine: str | None = None
    url: str | None = None
    instructions: Path | None = None
    """A JSON file of {predictor: text} for the student. None: what the run started from."""
    config_file: Path | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Dotted settings from options of their own. None: not given."""
    sets: Sequence[str] = ()
    sizes: Sizes = field(default_factory=Sizes)
    resume: bool = False
    allow_changes: bool = False


def distill_run(request: DistillRequest, callbacks: Sequence[Callback] = ()) -> CompileResult:
    """Distill a finished run's program; its test scores are part of the result. The run itself is only read.

    Raises:
        UserError: as `load` and `FST.distill` do, and for a place or a setting that does not fit.
        NotDistilled: the result is not good enough.
    """
    from fst_optimizer.optimizer import FST  # brings torch

    check_out(request)
    parent = read_finished(request.run_dir)
    task = recorded_task(parent.config, str(request.run_dir)) if request.task is None else load_task(request.task)
    begun = begun_at(request)
    recorded, where = (parent.config, request.run_dir) if begun is None else (begun, request.out)
    settings = settings_of(request, recorded, new=begun is None)
    sizes = request.sizes.over(recorded)
    train, val, test = (task.load(split, size) for split, size in asdict(sizes).items())
    seed = started_from(recorded, task.build_program(), f"program.instructions in {RunFiles(where).config}")
    fst = FST(
        task.metric,
        config=settings.config.complete(),
        run_dir=request.out,
        resume=request.resume,
        allow_changes=request.allow_changes,
        callbacks=callbacks,
        progress=False,
        task=request.task or str(parent.config["task"]),
        testset=test,
    )
    fst.seed_instructions, fst.distilled_from = seed, origin(parent)
    given = None if request.instructions is None else read_json(request.instructions)
    program = loaded(request, settings)
    with closing(checked_student(program)[0]):
        compiled = fst.distill(program, trainset=train, valset=val, instructions=given)
    outcome: CompileResult = compiled.detailed_results
    return outcome


def check_out(request: DistillRequest) -> None:
    """Raises UserError where nothing can be written at `out`, or what is written there would change the run."""
    if request.out.resolve().is_relative_to(request.run_dir.resolve()):
        raise UserError(
            f"out is {str(request.out)!r}, which lies in the run's own directory: give a folder of its own, e.g. "
            "runs/distilled"
        )
    check_run_dir(request.out, resume=request.resume)
    if request.out.is_dir():
        with locked(request.out):
            pass  # no other process writes it


def begun_at(request: DistillRequest) -> dict[str, Any] | None:
    """`config.json` of the distillation that is resumed. None: a new one.

    Raises:
        UserError: what lies at `out` is another kind of run.
    """
    path = RunFiles(request.out).config
    if not request.resume or not path.exists():
        return None
    recorded = config_of(path)
    program = recorded.get("program")
    if not recorded.get("distilled_from") or not isinstance(program, Mapping):
        raise UserError(f"out is {str(request.out)!r}, which holds no distillation to resume: give another directory")
    return recorded


def settings_of(request: DistillRequest, recorded: Mapping[str, Any], *, new: bool) -> Settings:
    """Those of the run or, where one is resumed, of the distillation; under what is given now.

    A new one has a budget of its own: the run's was for finding what is now distilled. Prices stay.
    """
    base = scoring_config(recorded["config"])
    if new:
        base = FSTConfig.from_dict({**base.to_dict(), "method": "rl", "budget": {"prices": dict(base.budget.prices)}})
    file = read_settings(request.config_file) if request.config_file else {}
    flags = {name: value for name, value in request.flags.items() if value is not None}
    settings = settled(base, file, flags, assignments(request.sets))
    kept = (("lora", settings.lora, LoraConfig()), ("policy", settings.policy, PolicyConfig()))
    for name, given, default in kept:
        if given != default:
            raise UserError(f"{name} is {given}: a run is distilled with its own; leave the {name} settings out")
    return settings


def started_from(recorded: Mapping[str, Any], program: dspy.Module, where: str) -> dict[str, str]:
    """The instructions that a run started from, by its `config.json`; the program's own where an older one says none.

    Raises:
        UserError: they are not those of such a program.
    """
    started = recorded.get("program")
    texts = started.get("instructions") if isinstance(started, Mapping) else None
    return check_texts(program, texts, where) if isinstance(texts, Mapping) else seed_texts(program)


def origin(parent: FinishedRun) -> dict[str, Any]:
    """Which run is distilled, its weights by their checksum; no path."""
    weights = None if parent.adapter is None else checksum(parent.adapter / ADAPTER_TENSORS)
    return {**origin_of(parent.result, parent.config), "adapter_sha256": weights}


def loaded(request: DistillRequest, settings: Settings) -> dspy.Module:
    """The run's program on its policy, which is the caller's to close."""
    given: dict[str, Any] = {} if request.url is None else {"url": request.url}
    if settings.vllm.given():
        given["vllm"] = settings.vllm
    return load(request.run_dir, task=request.task, model=request.model, engine=request.engine, **given)
