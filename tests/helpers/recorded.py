"""The events of a run, as its callbacks heard them."""

import json
from pathlib import Path

LETTERS = Path(__file__).parents[1] / "progress" / "letters_run.jsonl"
"""`fst` on programs/letters: 5 cycles of 4 steps, 64 examples for validation and 64 for the test, on a busy machine."""


def pack(events):
    """Lines for a file: progress events of one phase in one line, by their times."""
    packed = []
    for event in events:
        if event["kind"] != "progress":
            packed.append(event)
        elif packed and packed[-1]["kind"] == "progress" and packed[-1]["total"] == event["total"]:
            packed[-1]["times"].append(event["time_s"])
        else:
            packed.append({"kind": "progress", **{k: event[k] for k in ("phase", "total")}, "times": [event["time_s"]]})
    return "".join(json.dumps(one, separators=(",", ":")) + "\n" for one in packed)


def events(path=LETTERS):
    """The events of such a file."""
    for line in path.read_text().splitlines():
        event = json.loads(line)
        if event["kind"] != "progress":
            yield event
            continue
        for place, time_s in enumerate(event.pop("times")):
            yield {**event, "done": place % event["total"] + 1, "time_s": time_s, "outcome": "ok", "tokens": 20}
