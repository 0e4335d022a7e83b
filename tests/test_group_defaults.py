"""Settings of groups and of reuse, left as they are, ask for the same rollouts and train on the same rows as ever."""

import hashlib
import json

import pytest

from fst_optimizer.rollout.collector import Collector
from fst_optimizer.train.trainer import Trainer
from helpers.toy import answer, run_toy

AS_EVER = {
    "rollout": "a6c184286baac47e",
    "predictor": "57decc25c488283d",
}
"""Credit -> a digest of what was asked for and trained on, taken before there were such settings."""


@pytest.mark.parametrize("credit", AS_EVER)
def test_by_default_rollouts_and_rows_are_as_ever(credit, scripted, tmp_path, monkeypatch):
    seen, run, step = [], Collector.run, Trainer.step

    def asking(self, requests, **how):
        asked = [[one.candidate.id, one.item.id, one.index, one.version, one.draw] for one in requests]
        seen.append([asked, how["version"], how["temperature"], how.get("capture", False)])
        return run(self, requests, **how)

    def training(self, rows):
        seen.append([[row.rollout, row.group, row.flat, repr(row.advantage), row.call.completion_ids] for row in rows])
        return step(self, rows)

    monkeypatch.setattr(Collector, "run", asking)
    monkeypatch.setattr(Trainer, "step", training)
    result = run_toy(tmp_path / "run", scripted(answer), values={"train.credit": credit})
    seen.append(result["rollouts"])
    assert hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16] == AS_EVER[credit]
