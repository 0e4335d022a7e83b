"""A task's run from start to end: what `fst compile` does, without what it prints."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.formats import GIVEN
from fst_optimizer.config.overrides import Settings, assignments, base_config, read_settings, settled
from fst_optimizer.config.policy import ENGINES, LoraConfig
from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import UserError, did_you_mean
from fst_optimizer.evolve.reflection_lm import EXTRACTIVE, POLICY, check_lm, check_lm_name, named_lm, recorded_name
from fst_optimizer.finished.load import KEY_VARIABLE, begin_at, load_policy, origin_of, read_finished
from fst_optimizer.finished.recorded import base_of, check_url, config_of, recorded_policy, recorded_size, settings_kept
from fst_optimizer.model.load import model_place, path_to_say
from fst_optimizer.store.files import RunFiles, check_run_dir, locked, read_json
from fst_optimizer.tasks import Task, load_task

if TYPE_CHECKING:
    import dspy

    from fst_optimizer.engines.vllm.server import OnWait
    from fst_optimizer.policy.policy import Policy
    from fst_optimizer.run.result import CompileResult
    from fst_optimizer.store.metrics import Callback

ReflectionLM = Callable[["Policy"], "dspy.BaseLM | None"]
"""Gives the reflection LM of a run on that policy."""


@dataclass(frozen=True)
class Sizes:
    """How many examples of each split are used, the first ones. None: the task's own number."""

    train: int | None = None
    val: int | None = None
    test: int | None = None

    def over(self, recorded: Mapping[str, Any]) -> Sizes:
        """These, and where none is given that of a run, by its `config.json`."""
        return Sizes(
            **{split: recorded_size(recorded, split) if size is None else size for split, size in asdict(self).items()}
        )


@dataclass(frozen=True)
class RunRequest:
    """What `fst compile` was asked for."""

    task: str
    run_dir: Path
    model: str | None = None
    """None: the task's own."""
    engine: str | None = None
    """None: that of the run to resume, or `torch`."""
    url: str | None = None
    """A vLLM server to attach to. None: one is started."""
    reflection_lm: str | None = None
    """Its name as litellm has it, `policy` for the policy's own base, or `extractive` for no LM. None: that of the run
    to resume, or the task's own."""
    auto: str | None = None
    config_file: Path | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Dotted settings from options of their own, e.g. `--seed`. None: not given."""
    sets: Sequence[str] = ()
    """`NAME=VALUE`, as given to `--set`."""
    sizes: Sizes = Sizes()
    resume: bool = False
    allow_changes: bool = False
    """Resume although something is not as it was."""
    instructions: Path | None = None
    """A JSON file of {predictor: text}: what the program starts from. None: those of the run to resume, or its own."""
    start_from: Path | None = None
    """A finished run whose weights this one begins with. None: the base's, or as the run to resume began."""


@dataclass(frozen=True)
class RunPlan:
    """A request, looked up and checked."""

    task: Task
    settings: Settings
    sizes: Sizes
    recorded: dict[str, Any] | None
    """`config.json` of the run to resume."""
    instructions: Mapping[str, str] | None = None
    """What the program starts from instead of its own. None: its own."""


def plan_run(request: RunRequest) -> RunPlan:
    """Find the task and settle the settings. A run that is resumed keeps its own, under what is given again.

    Raises:
        UserError: no such task or setting, or a value that does not fit.
    """
    check_engine(request)
    task = load_task(request.task)
    given = given_settings(request)
    path = RunFiles(request.run_dir).config
    if not request.resume or not path.exists():
        settings = with_start(settled(base_config(task.config(), request.auto), *given), request.start_from)
        return RunPlan(task, settings, request.sizes, None, given_instructions(request, task))
    recorded = config_of(path)
    before = settings_kept(read_settings(path), {name for layer in given for name in layer})
    was, settings = settled(FSTConfig(), before), settled(FSTConfig(), before, *given)
    for section in ("lora", "policy"):  # the optimizer compares the rest; how vLLM is run may change
        old, new = getattr(was, section), getattr(settings, section)
        if old != new:
            raise UserError(
                f"the run to resume was started with {old}, not {new}: leave the {section} settings out, "
                "or start another run"
            )
    check_start(recorded["policy"].get("started_from"), request)
    made = recorded_policy(recorded, str(path))
    check_url(made, request.engine, request.url)
    base_of(made, request.model, task.model())
    texts = given_instructions(request, task, recorded)
    return RunPlan(task, settings, request.sizes.over(recorded), recorded, texts)


def with_start(settings: Settings, start_from: Path | None) -> Settings:
    """The settings, with the adapter's shape of the finished run that is begun from.

    Raises:
        UserError: that is no finished run, or another shape is asked for.
    """
    if start_from is None:
        return settings
    shape = read_finished(start_from).policy.lora
    if settings.lora not in (LoraConfig(), shape):
        raise UserError(
            f"lora is {settings.lora}, and the run to start from, {str(start_from)!r}, has {shape}: leave the lora "
            "settings out"
        )
    return replace(settings, lora=shape)


def check_start(recorded: object, request: RunRequest) -> None:
    """Raises UserError where the run to resume began with other weights than those that are named, or named none."""
    if request.start_from is not None and origin_of(read_finished(request.start_from)) != recorded:
        raise UserError(
            f"--start-from is {str(request.start_from)!r}, and the run to resume began with other weights: leave it "
            "out, or give another --run-dir"
        )
    if recorded and request.start_from is None and not check_run_dir(request.run_dir, resume=True):
        raise UserError(
            f"the run in {str(request.run_dir)!r} ended before its first checkpoint, and began with the weights of "
            "another run: give that again (--start-from)"
        )


def given_settings(request: RunRequest) -> tuple[Mapping[str, Any], ...]:
    """Settings from `--config`, from options of their own and from `--set`; later ones go over earlier ones."""
    file = read_settings(request.config_file) if request.config_file else {}
    flags = {name: value for name, value in request.flags.items() if value is not None}
    sets = assignments(request.sets)
    if request.config_file and "config" in read_json(request.config_file):  # a run's own, which may be anybody's
        file = settings_kept(file, sets)
    return file, flags, sets


def given_instructions(
    request: RunRequest, task: Task, recorded: Mapping[str, Any] | None = None
) -> dict[str, str] | None:
    """What the program starts from: by the request, else by the `config.json` of the run to resume; None: its own.

    Raises:
        UserError: a file that is no JSON object, a predictor that the program does not have, or an instruction that is
            no text.
    """
    from fst_optimizer.program.texts import check_texts

    if request.instructions is not None:
        return check_texts(
            task.build_program(), read_json(request.instructions), f"--instructions {request.instructions}"
        )
    program = (recorded or {}).get("program")
    if not isinstance(program, Mapping) or not program.get(GIVEN):
        return None
    texts = program.get("instructions")
    where = f"program.instructions in {RunFiles(request.run_dir).config}"
    if not isinstance(texts, Mapping):
        raise UserError(f"{where} is {texts!r}, no object; is this the file of a run?")
    return check_texts(task.build_program(), texts, where)


def check_engine(request: RunRequest) -> None:
    """Raises UserError for an engine that does not exist, an address without a server, or no model in a folder."""
    if request.engine is not None and request.engine not in ENGINES:
        raise UserError(f"engine is {request.engine!r}: {did_you_mean(request.engine, ENGINES)}")
    if request.model is not None:
        model_place(request.model)


def reflection_lm_of(request: RunRequest, plan: RunPlan) -> ReflectionLM:
    """Whom a run asks for instructions, given its policy; checked as far as that goes without a call.

    What the request names, else what the run to resume began with, else the task's own.

    Raises:
        UserError: a name that is none, or whose key is not in the environment.
    """
    chosen: Any = request.reflection_lm
    if chosen is None and (plan.recorded is None or recorded_name(plan.recorded)):
        chosen = plan.task.reflection_lm()
        if plan.recorded is not None and getattr(chosen, "model", None) != recorded_name(plan.recorded):
            chosen = recorded_name(plan.recorded)
    if isinstance(chosen, str):
        check_lm_name(chosen)
        if chosen == POLICY:
            return lambda policy: policy.base_lm
        chosen = None if chosen == EXTRACTIVE else named_lm(chosen)
    check_lm(chosen)
    return lambda policy: chosen


def reflection_name(request: RunRequest, plan: RunPlan) -> str | None:
    """What a new run's `config.json` would call its reflection LM."""
    chosen: Any = request.reflection_lm or plan.task.reflection_lm()
    return None if chosen in (None, EXTRACTIVE) else str(getattr(chosen, "model", chosen))


def compile_task(
    request: RunRequest, plan: RunPlan, callbacks: Sequence[Callback] = (), stages: Sequence[Task] = ()
) -> CompileResult:
    """Run FST on the task; its test scores are part of the result.

    What can be refused is refused before the model is loaded. With `stages`, the tasks of a stream, of which the
    request's is the first: each is learned from its training examples and scored on its validation set; no test set.
    """
    from fst_optimizer.data import check_examples
    from fst_optimizer.program.student import check_program, check_roles
    from fst_optimizer.program.texts import apply_texts, seed_texts

    check_run_dir(request.run_dir, resume=request.resume)
    if request.run_dir.is_dir():
        with locked(request.run_dir):
            pass  # no other process writes it
    task, sizes = plan.task, plan.sizes
    train, val, test = (task.load(split, size) for split, size in asdict(sizes).items())
    check_examples(train, val)
    program = check_program(task.build_program())
    if plan.instructions is not None:
        program = apply_texts(program, plan.instructions)
    check_roles(seed_texts(program), plan.settings.config)
    reflection_lm = reflection_lm_of(request, plan)
    from fst_optimizer.optimizer import FST  # brings torch
    from fst_optimizer.program.lms import give_lm

    def on_wait(waited_s: float, log_line: str) -> None:
        for callback in callbacks:
            callback({"kind": "waiting", "seconds": waited_s, "text": log_line})

    fst = FST(
        task.metric,
        config=plan.settings.config.complete(),
        run_dir=request.run_dir,
        resume=request.resume,
        allow_changes=request.allow_changes,
        callbacks=callbacks,
        progress=False,
        task=request.task,
        testset=None if stages else test,
    )
    with closing(make_policy(request, plan, on_wait)) as policy:
        fst.reflection_lm = reflection_lm(policy)
        fst.instructions_given = plan.instructions is not None
        student = give_lm(program, policy.lm)
        if stages:
            pairs = [(one.name, one.load("train", sizes.train)) for one in stages]
            valsets = {one.name: one.load("val", sizes.val) for one in stages}
            compiled = fst.compile_stream(student, pairs, valsets=valsets)
        else:
            compiled = fst.compile(student, trainset=train, valset=val)
    outcome: CompileResult = compiled.detailed_results
    return outcome


def model_to_say(request: RunRequest, plan: RunPlan) -> str | None:
    """The base model, where whoever uses the finished run must say it again. None: the run or its task tells it."""
    own = plan.task.model()
    model = request.model or own
    if plan.recorded is not None and request.model is None:
        model = base_of(recorded_policy(plan.recorded, str(RunFiles(request.run_dir).config)), None, own)
    return None if model is None or model == own else path_to_say(model)


def make_policy(request: RunRequest, plan: RunPlan, on_wait: OnWait | None = None) -> Policy:
    """The policy to train: the recorded one when a run is resumed, else of `--model` or the task's own model."""
    from fst_optimizer.policy.policy import Policy

    settings = plan.settings
    engine = request.engine or (plan.recorded and plan.recorded["policy"].get("engine")) or "torch"
    if request.url is not None and engine != "vllm":
        raise UserError(f"--url is {request.url!r} and the engine is {engine!r}: add --engine vllm")
    vllm: dict[str, Any] = {}
    if engine == "vllm":
        config = settings.vllm.changed(log_file=settings.vllm.log_file or str(request.run_dir / "vllm.log"))
        vllm = {"url": request.url, "api_key": os.environ.get(KEY_VARIABLE), "vllm": config, "on_wait": on_wait}
    if plan.recorded is not None and (request.start_from is None or check_run_dir(request.run_dir, resume=True)):
        files = RunFiles(request.run_dir)
        model = base_of(recorded_policy(plan.recorded, str(files.config)), request.model, plan.task.model())
        policy = load_policy(files, plan.recorded, 0, model, engine, **vllm)
        policy.started_from = plan.recorded["policy"].get("started_from")
        return policy
    place = request.model or plan.task.model()
    if place is None:
        raise UserError(f"model is None: the task {request.task!r} has no model of its own; give --model")
    policy = Policy(
        place,
        engine=engine,
        lora=settings.lora,
        seed=settings.config.seed,
        max_tokens=settings.policy.max_tokens,
        **vllm,
    )
    if request.start_from is not None:
        try:
            begin_at(policy, read_finished(request.start_from))
        except UserError:
            policy.close()
            raise
    return policy
