import io
from pathlib import Path

from rich.console import Console

from fst_optimizer.cli.tables import compiled
from fst_optimizer.progress.tables import show
from fst_optimizer.store.files import read_json
from helpers.runs import FST_CURVE, write_run


def test_after_fst_compile_the_commands_that_come_next_are_named(tmp_path):
    result = read_json(write_run(tmp_path / "run", "fst", 0, FST_CURVE) / "result.json")
    out = io.StringIO()
    show(
        Console(file=out, width=60),
        compiled(result | {"task": "programs/letters"}, Path("runs/a"), task=None, model=None),
    )
    assert "fst eval programs/letters --run-dir runs/a" in out.getvalue()
    assert "fst_optimizer.load('runs/a')" in out.getvalue()


def test_after_a_run_of_ones_own_task_and_model_both_are_in_the_lines_to_copy(tmp_path):
    result = read_json(write_run(tmp_path / "run", "fst", 0, FST_CURVE) / "result.json") | {"task": "my tasks/sums"}
    out = io.StringIO()
    show(Console(file=out, width=60), compiled(result, Path("runs/a"), task="my tasks/sums", model="models/own"))
    assert "fst eval 'my tasks/sums' --run-dir runs/a --model models/own\n" in out.getvalue()
    assert "fst_optimizer.load('runs/a', task='my tasks/sums', model='models/own')" in out.getvalue()
