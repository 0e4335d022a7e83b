"""Loaded by vLLM in each of its processes: lets them sleep where they would spin.

vLLM 0.32 runs a model on CPU in a process of its own, and the two sides of its message queue wait by yielding the
processor in a tight loop, for a second after each message. Beside a GPU that costs nothing; on two cores it takes one
of them from the server's front and from the programs, whose threads then hand the interpreter's lock to each other at
the pace of the scheduler's time slices: requests trickle in, and batches stay small. A wait of 0.2 ms gives the core
back and is short beside a decoding step.
"""

from __future__ import annotations

import os
import time
from functools import partial

PATIENT = "FST_VLLM_PATIENT"
"""Set for the servers that we start on CPU; in all other vLLM processes this plugin does nothing."""

NAP_S = 2e-4


def register() -> None:
    """The entry point that `vllm.general_plugins` names."""
    if os.environ.get(PATIENT) != "1":
        return
    from vllm.distributed.device_communicators import shm_broadcast

    if hasattr(shm_broadcast, "sched_yield"):
        shm_broadcast.sched_yield = partial(time.sleep, NAP_S)
