import pytest

from fst_optimizer.lab.compare import read_run
from helpers.runs import FST_CURVE, GEPA_CURVE, RL_CURVE, write_run


@pytest.fixture
def fabricated(tmp_path):
    """Three methods, two seeds; FST's second seed stops short of RL's best."""
    root = tmp_path / "out" / "letters"
    folders = [
        write_run(root / "fst-seed0", "fst", 0, FST_CURVE, test=(0.1, 0.7)),
        write_run(root / "rl-seed0", "rl", 0, RL_CURVE, test=(0.1, 0.6)),
        write_run(root / "gepa-seed0", "gepa", 0, GEPA_CURVE, test=(0.1, 0.4)),
        write_run(root / "fst-seed1", "fst", 1, FST_CURVE[:2], test=(0.1, 0.6)),
        write_run(root / "rl-seed1", "rl", 1, RL_CURVE, test=(0.1, 0.6)),
        write_run(root / "gepa-seed1", "gepa", 1, GEPA_CURVE, test=(0.1, 0.5)),
    ]
    return root, [read_run(folder) for folder in folders]
