"""`fst compile`."""

from __future__ import annotations

from fst_optimizer.cli import options
from fst_optimizer.cli.console import consoles, quiet_libraries, user_errors
from fst_optimizer.cli.tables import compiled
from fst_optimizer.progress.tables import show
from fst_optimizer.task_run import RunRequest, Sizes, compile_task, plan_run


def compile_command(
    task: options.Task,
    run_dir: options.RunDir,
    model: options.Model = None,
    engine: options.Engine = None,
    url: options.Url = None,
    method: options.Method = None,
    seed: options.Seed = None,
    max_cycles: options.MaxCycles = None,
    auto: options.Preset = None,
    config: options.ConfigFile = None,
    sets: options.Sets = None,
    resume: options.Resume = False,
    allow_changes: options.AllowChanges = False,
    train_size: options.TrainSize = None,
    val_size: options.ValSize = None,
    test_size: options.TestSize = None,
) -> None:
    """Learn a task's prompts and weights together, and score it on its test set.

    The run's folder ends up with the program, its policy version, every number on the way and a result.json.
    Settings are laid over each other in this order: the preset, the task's own, --config, the options here, --set.

    Examples:
        fst compile programs/letters --run-dir runs/first

        fst compile programs/letters:sort-rotate --run-dir runs/rl --method rl --seed 1

        fst compile programs/letters --run-dir runs/slow --set train.lr=5e-4 --set rollout.batch_size=16

        fst compile programs/letters --run-dir runs/first --resume

        fst compile TASK --run-dir runs/big --model Qwen/Qwen3-8B --engine vllm --set vllm.gpu_memory_utilization=0.4
    """
    request = RunRequest(
        task=task,
        run_dir=run_dir,
        model=model,
        engine=engine,
        url=url,
        auto=auto,
        config_file=config,
        flags={"method": method, "seed": seed, "budget.max_cycles": max_cycles},
        sets=tuple(sets or ()),
        sizes=Sizes(train_size, val_size, test_size),
        resume=resume,
        allow_changes=allow_changes,
    )
    with user_errors(f"go on with: fst compile {task} --run-dir {run_dir} --resume"):
        from fst_optimizer.progress.display import shown

        out, progress = consoles()
        plan = plan_run(request)
        with quiet_libraries(progress), shown(console=progress) as display:
            display.say(f"run directory: {run_dir}")
            display.say("loading the model ...")
            outcome = compile_task(request, plan, (display,))
        show(out, compiled(outcome.result, run_dir))
