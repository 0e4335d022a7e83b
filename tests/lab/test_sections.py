import pytest

from fst_optimizer.lab import sections
from fst_optimizer.lab.page_figures import experiment_data
from fst_optimizer.lab.sections import SECTIONS, Section

DRIFT = next(section for section in SECTIONS if section.name == "drift")


def drift_row(rule, method, role, rollouts, score, kl, on="x"):
    own = {"task": f"programs/letters:{rule}+shown", "method": method, "rule": rule, "kind": "shown", "seed": 0}
    return own | {"run": f"{rule}/{method}", "role": role, "on": on, "rollouts": rollouts, "score": score, "kl": kl}


ROWS = [
    drift_row("a", "fst", "probe", 0, 1.0, 0.0),
    drift_row("a", "fst", "probe", 100, 0.9, 0.1, on="x"),
    drift_row("a", "fst", "probe", 100, 0.7, 0.3, on="y"),
    drift_row("b", "fst", "probe", 0, 1.0, 0.0),
    drift_row("b", "fst", "probe", 120, 0.6, 0.4),
]


def test_an_experiments_table_has_the_last_place_of_each_run_and_means_over_rules():
    head, (row,) = sections.table(ROWS, DRIFT)
    assert head == ["family", "role", "kind", "method", "rules", "score", "kl"]
    # Rule a ends at (.9 + .7) / 2 = .8 and rule b at .6; t(0.975, 1) = 12.7062, half width 12.7062 * .1 = 1.271.
    assert row == ["letters", "probe", "shown", "fst", "2", "0.700 ±1.271", "0.300 ±1.271"]


def test_an_experiments_figure_has_a_line_a_group_along_its_axis():
    data = experiment_data(ROWS, DRIFT)
    assert (data["xlabel"], list(data["panels"])) == ("rollouts", ["score", "kl"])
    (line,) = data["panels"]["score"]["fst"]
    assert line["line"] == [[0.0, 1.0], [100.0, pytest.approx(0.8)], [120.0, 0.6]]


def test_an_experiment_that_nobody_described_shows_all_of_its_numbers():
    rows = [
        {"task": "programs/letters:a", "method": method, "rule": rule, "seed": 0, "recovery": number, "why": "text"}
        for method, numbers in {"fst": (100, 300), "rl": (200, {"mean": 400, "low": 1, "high": 2})}.items()
        for rule, number in zip("ab", numbers, strict=True)
    ]
    head, table = sections.table(rows, Section("other", "Other", ""))
    assert head == ["family", "kind", "method", "rules", "recovery"]
    assert [row[2:4] for row in table] == [["fst", "2"], ["rl", "2"]] and table[1][4].startswith("300 ±")
    data = experiment_data(rows, Section("other", "Other", ""))
    assert data["panels"]["recovery"]["rl"] == [{"dots": [[0, 200.0], [0, 400.0]]}]
