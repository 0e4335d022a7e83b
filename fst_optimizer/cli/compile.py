"""`fst compile`."""

from __future__ import annotations

from pathlib import Path

from fst_optimizer.cli import options
from fst_optimizer.cli.console import consoles, quiet_libraries, user_errors
from fst_optimizer.cli.tables import compiled
from fst_optimizer.errors import UserError
from fst_optimizer.progress.tables import show
from fst_optimizer.store.files import RunFiles, check_run_dir, new_run_dir, read_json, runs_in
from fst_optimizer.task_run import RunRequest, Sizes, compile_task, model_to_say, plan_run
from fst_optimizer.tasks import run_name, shipped_task


def compile_command(
    task: options.Task,
    run_dir: options.NewRunDir = None,
    model: options.Model = None,
    engine: options.Engine = None,
    url: options.Url = None,
    reflection_lm: options.ReflectionLM = None,
    instructions: options.Instructions = None,
    method: options.Method = None,
    seed: options.Seed = None,
    max_cycles: options.MaxCycles = None,
    auto: options.Preset = None,
    config: options.ConfigFile = None,
    start_from: options.StartFrom = None,
    sets: options.Sets = None,
    resume: options.Resume = False,
    allow_changes: options.AllowChanges = False,
    train_size: options.TrainSize = None,
    val_size: options.ValSize = None,
    test_size: options.TestSize = None,
) -> None:
    """Learn a task's prompts and weights together, and score it on its test set.

    Writes the run's folder: config.json, metrics.jsonl, population/, rollouts/, policy/, program.json, result.json.

    Settings are laid over each other in this order: the preset, the task's own, --config, the options here, --set.

    Try:

        fst compile programs/letters
        fst compile programs/letters --run-dir runs/first --resume
        fst compile programs/letters:sort-rotate --method rl --seed 1
        fst compile programs/letters --method once --instructions given.json --set fast.once_rollouts=0
        fst compile programs/letters --set train.lr=5e-4 --set rollout.batch_size=16
        fst compile TASK --model Qwen/Qwen3-1.7B --reflection-lm openai/gpt-5.2
        fst compile TASK --model Qwen/Qwen3-8B --engine vllm --set vllm.devices=1
    """
    with user_errors(f"nothing was begun; run it again: fst compile {task}"):
        run_dir = checked_folder(task, run_dir, resume=resume)
    request = RunRequest(
        task=task,
        run_dir=run_dir,
        model=model,
        engine=engine,
        url=url,
        reflection_lm=reflection_lm,
        instructions=instructions,
        auto=auto,
        config_file=config,
        flags={"method": method, "seed": seed, "budget.max_cycles": max_cycles},
        sets=tuple(sets or ()),
        sizes=Sizes(train_size, val_size, test_size),
        resume=resume,
        allow_changes=allow_changes,
        start_from=start_from,
    )
    with user_errors(f"go on with: fst compile {task} --run-dir {run_dir} --resume"):
        from fst_optimizer.progress.display import shown

        out, progress = consoles()
        plan = plan_run(request)
        with quiet_libraries(progress), shown(console=progress) as display:
            display.say(f"run directory: {run_dir}")
            display.say("loading the model ...")
            outcome = compile_task(request, plan, (display,))
        named = None if shipped_task(task) else task
        show(out, compiled(outcome.result, run_dir, task=named, model=model_to_say(request, plan)))


def checked_folder(task: str, run_dir: Path | None, *, resume: bool) -> Path:
    """The run's folder, a new one where none is given. Looked at before anything is imported that takes time.

    Raises:
        UserError: a run is to be resumed and none is named, or the folder does not fit.
    """
    if run_dir is None and resume:
        unfinished = [path for path in runs_in(Path("runs")) if not RunFiles(path).result.exists()]
        mine = [path for path in unfinished if read_json(RunFiles(path).config).get("task") == task]
        said = f"the newest unfinished one of {task} is {mine[0]}" if mine else f"runs/ has no unfinished one of {task}"
        raise UserError(f"--resume needs --run-dir, the run to go on with: {said}")
    folder = run_dir or new_run_dir(run_name(task))
    check_run_dir(folder, resume=resume)
    return folder
