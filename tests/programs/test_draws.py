"""What the tasks draw is fixed: results that were published on them can only be compared on the same examples.

`reasoning` draws from a package of others and is not held here.
"""

import hashlib
import json

import pytest

from fst_optimizer.tasks import load_task

DIGESTS = {
    "codeio": "8c2f2f5541757b34",
    "codeio:easy": "f1422ab6e4266460",
    "codeio:hard": "333388a8cad13f73",
    "hover": "766de61a415b4de7",
    "hover:2-hop-retrieval": "b1788a76f708ade2",
    "letters": "f7d68522dec9eff7",
    "letters:sort-rotate": "915dbec5e08ddbd9",
    "letters:held-out": "0dc62dad1682166f",
    "math": "d765af1fe739b337",
    "papillon": "5ed3d9380a0f8d88",
    "papillon:long": "a386108dac4734e7",
    "parcels": "f6a059c813fa3910",
    "parcels:sorting+shown": "3230b8d4df0a8438",
    "parcels:harbour": "9030c1b4c4aa034e",
    "star_graph": "1da5f2b8e19b1c38",
    "star_graph:d3-l4-two": "45476eb7d4188894",
    "tool_agent": "632afe6f193430db",
    "tool_agent:3-lookup": "04727f407a202f1e",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_a_task_draws_the_examples_that_it_always_drew(name):
    task = load_task(f"programs/{name}")
    drawn = [
        [dict(example), sorted(example.inputs())]
        for split in ("train", "val", "test")
        for example in task.load(split, 24, seed=1)
    ]
    assert hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16] == DIGESTS[name]
