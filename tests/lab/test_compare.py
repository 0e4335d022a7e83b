import json

import pytest

from fst_optimizer.lab.compare import save_comparison
from helpers.runs import EXTRA


def test_compare_json_says_who_reached_rls_best_and_at_what_cost(fabricated):
    root, runs = fabricated
    data = save_comparison(runs, root, extra=EXTRA)
    assert data == json.loads((root / "compare.json").read_text())
    assert data["val_examples"] == 100
    assert [best["rollouts"] for best in data["rl_best"]] == [200, 200]
    first, second = data["against_rl"]["fst"]["pairs"]
    assert (first["rollouts"], first["ratio"], first["kl_ratio"]) == (100, 0.5, pytest.approx(0.25))
    assert second["rollouts"] is None
    assert data["against_rl"]["gepa"]["reached"] == 0
    assert "rl" not in data["against_rl"]


def test_final_scores_have_means_over_seeds_and_differences_paired_by_seed(fabricated):
    data = save_comparison(fabricated[1], fabricated[0], extra=EXTRA)
    assert data["methods"]["fst"]["test_score_after"]["mean"] == pytest.approx(0.65)
    assert data["methods"]["fst"]["training_rollouts"]["mean"] == (100 + 50) / 2
    lead = data["differences"]["fst - gepa"]["test_score_after"]
    assert lead["mean"] == pytest.approx((0.3 + 0.1) / 2)
    # The two differences are 0.3 and 0.1: standard error 0.1, and t(0.975, 1) = 12.7062.
    assert lead["high"] == pytest.approx(0.2 + 1.27062, abs=1e-4)
    curve = data["runs"][0]["curve"]
    assert curve[1] == [50, 0.57, 0.05]
    assert data["runs"][0]["dir"] == "fst-seed0"


def test_a_comparison_without_rl_has_nothing_against_it(fabricated):
    root, runs = fabricated
    data = save_comparison([run for run in runs if run.method != "rl"], root, extra=EXTRA)
    assert data["rl_best"] is None and data["against_rl"] == {}
