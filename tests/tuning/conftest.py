import pytest

from helpers.postgres import MISSING
from helpers.tune import make_task


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", ())
    if any(MISSING in str(report.longrepr) for report in skipped):
        terminalreporter.section("ATTENTION", red=True, bold=True)
        terminalreporter.write_line(MISSING, red=True, bold=True)


@pytest.fixture
def task(tmp_path, tiny_model):
    return make_task(tmp_path / "tiny", tiny_model)


@pytest.fixture
def plots():
    """Asked for by tests that look at a study's plots."""


@pytest.fixture(autouse=True)
def without_plots(request, monkeypatch):
    """Drawing takes longer than a tiny study does: plots are left out unless a test asks for them."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr("fst_optimizer.tuning.summary.draw_plots", lambda *_, **__: None)
