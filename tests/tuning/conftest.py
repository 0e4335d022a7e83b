from postgres import MISSING


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", ())
    if any(MISSING in str(report.longrepr) for report in skipped):
        terminalreporter.section("ATTENTION", red=True, bold=True)
        terminalreporter.write_line(MISSING, red=True, bold=True)
