"""The process that `fst tune --workers` starts: `python -m fst_optimizer.cli.tune_worker FOLDER NUMBER`.

FOLDER has `command.json`; the storage's URL is in FST_TUNE_STORAGE.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fst_optimizer.cli.console import consoles, quiet_libraries, user_errors


def main() -> None:
    """Run trials until the study has enough."""
    with user_errors("the trial is in the queue again"):
        from fst_optimizer.tuning.workers import run_worker

        _, console = consoles()
        with quiet_libraries(console):
            run_worker(Path(sys.argv[1]), int(sys.argv[2]))


if __name__ == "__main__":
    main()
