"""A task's program run by the collector."""

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.program.texts import apply_texts, seed_texts
from fst_optimizer.rollout.collector import Collector
from fst_optimizer.rollout.metric import Metric
from fst_optimizer.rollout.rollout import Request
from fst_optimizer.types import Candidate, items_of


def collect(policy, program, metric, examples):
    """A rollout an example, with its trace, of the program with its seed instructions on this policy."""
    program.set_lm(policy.lm)
    return collect_with_usage(policy, program, metric, examples)[0]


def collect_with_usage(policy, program, metric, examples):
    """The rollouts of a program that has its LMs, and what those LMs used that are not the policy."""
    collector = Collector(lambda candidate: apply_texts(program, candidate.texts), policy, Metric(metric), FSTConfig())
    candidate = Candidate(seed_texts(program))
    requests = [Request(candidate, item) for item in items_of(examples, "train")]
    return collector.run(requests, version=0, temperature=1.0, capture=True), collector.meter.usage
