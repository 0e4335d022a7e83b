"""The process that `fst tune --workers` starts: `python -m fst_optimizer.tuning FOLDER NUMBER`.

FOLDER has `command.json`; the storage's URL is in FST_TUNE_STORAGE. Output goes to a log, of which `fst tune` shows the
line that begins with `failed:`.
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

from fst_optimizer.children import end_with_parent
from fst_optimizer.errors import FSTError
from fst_optimizer.text import plain
from fst_optimizer.tuning.worker import run_worker


def main() -> None:
    """Run trials until the study has enough. SIGTERM does what Ctrl-C does: the trial is put back in the queue."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end_with_parent()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for name in ("dspy", "transformers", "peft", "LiteLLM"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        run_worker(Path(sys.argv[1]), int(sys.argv[2]))
    except FSTError as error:
        cause = f" ({type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ else ""
        sys.exit(plain(f"failed: {error}{cause}"))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
