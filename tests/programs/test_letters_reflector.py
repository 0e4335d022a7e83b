"""The letters reflector that ships: how well it reads examples, how large it is, and runs with it."""

import random
from pathlib import Path

import pytest
import torch

from fst_optimizer import FST, FSTConfig, Policy
from fst_optimizer.failpoints import inject, raising
from fst_optimizer.store.files import read_json
from fst_optimizer.task_run import RunRequest, Sizes, compile_task, plan_run
from programs import reflecting
from programs.letters import reflect, task
from programs.pretraining import load_model

ROOT = Path(__file__).parents[2] / "programs"
SHORT = {
    "budget.max_cycles": 1,
    "train.steps_per_cycle": 1,
    "fast.anchor_size": 4,
    "fast.max_rollouts": 24,
    "fast.max_proposals": 4,
    "rollout.batch_size": 1,
}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_models_and_reflectors_of_all_families_are_small() -> None:
    reflectors, models = list(ROOT.glob("*/reflector")), list(ROOT.glob("*/model"))
    assert reflect.REFLECTOR in reflectors and Path(task.model()) in models
    assert all(size_of(folder) <= 4_000_000 for folder in reflectors)
    assert sum(map(size_of, [*reflectors, *models])) <= 16_000_000


@pytest.mark.parametrize(
    ("kind", "least"), [("single operations", 0.8), ("trained pairs", 0.35)], ids=["single", "pairs"]
)
def test_it_writes_the_rule_of_four_examples(kind: str, least: float) -> None:
    """Floors: what its header says is measured on more."""
    torch.set_num_threads(1)
    model, tokenizer = load_model(reflect.REFLECTOR)
    lessons = reflect.lessons_on(reflect.measured_rules()[kind], 40, "test")
    torch.manual_seed(0)
    score = reflecting.measure(model, tokenizer, lessons, reflect.grade)
    assert score.greedy >= least
    assert score.any_of_8 >= score.greedy - 0.1 and score.near >= score.greedy


def test_what_is_measured_as_withheld_is_and_the_proof_is_not_looked_at() -> None:
    rules = reflect.measured_rules()
    proof = {tuple(stage.split("-")) for name in reflect.PROOF for stage in name.split(".")}
    assert all(reflect.withheld(rule) for name in ("withheld pairs", "withheld triples") for rule in rules[name])
    assert not any(rule in proof for name, found in rules.items() if name.startswith("withheld") for rule in found)
    assert len(rules["withheld pairs"]) >= 5


def compiled(kind: str, run_dir: Path, *, resume: bool = False) -> None:
    request = RunRequest(f"programs/letters:demo+{kind}", run_dir, sizes=Sizes(16, 4, 4), flags=SHORT, resume=resume)
    compile_task(request, plan_run(request))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shown", "scored"])
def test_a_run_names_it_without_a_path_and_resumes_to_the_same(tmp_path: Path, kind: str) -> None:
    compiled(kind, tmp_path / "whole")
    named = {"shown": "hosted_vllm/letters-reflector", "scored": "hosted_vllm/letters-random-sentences"}[kind]
    assert read_json(tmp_path / "whole" / "config.json")["program"]["reflection_lm"] == named
    result = read_json(tmp_path / "whole" / "result.json")
    assert result["reflection_calls"] > 1 and result["cost_usd"] == 0.0
    with (
        inject("reflection.answer", raising(KeyboardInterrupt()), after=result["reflection_calls"] - 1),
        pytest.raises(KeyboardInterrupt),
    ):
        compiled(kind, tmp_path / "run")
    compiled(kind, tmp_path / "run", resume=True)
    # A real engine's batches differ, and with them the last digits of what is trained; not the search.
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert read_json(run / "result.json")["reflection_calls"] == result["reflection_calls"]
    found = [read_json(max((path / "population").glob("*")))["candidates"] for path in (whole, run)]
    assert found[0] == found[1]


@pytest.mark.slow
def test_any_fst_takes_it_as_a_policys_lm(tmp_path: Path) -> None:
    with (
        Policy(task.model(), max_tokens=task.MAX_TOKENS) as policy,
        Policy(reflect.REFLECTOR, temperature=1.0) as other,
    ):
        program = task.build_program("demo+shown")
        program.set_lm(policy.lm)
        fst = FST(
            task.metric,
            reflection_lm=other.lm,
            config=FSTConfig().with_values(SHORT),
            run_dir=tmp_path / "run",
            progress=False,
        )
        train, val = (task.load(split, 8, variant="demo+shown") for split in ("train", "val"))
        result = fst.compile(program, trainset=train, valset=val).detailed_results.result
        assert result["reflection_calls"] > 0 and other.version == 0
    assert read_json(tmp_path / "run" / "config.json")["program"]["reflection_lm"] == "hosted_vllm/reflector"


def test_proposals_differ_from_one_seed_to_another() -> None:
    lesson = reflect.draw_lesson(random.Random(3), 4, ("sort", "rotate"))
    lm = task.reflection_lm("demo+shown")
    assert lm is not None
    assert lm(lesson.prompt, seed=1) == lm(lesson.prompt, seed=1)
    written = {reflecting.written_instruction(lm(lesson.prompt, seed=seed)[0]) for seed in range(16)}
    assert len(written) > 1  # what it was never shown it guesses at, and a search can choose
