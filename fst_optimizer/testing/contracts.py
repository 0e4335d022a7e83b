"""What every engine must do, as a test class to be subclassed. Needs pytest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.run import TrainConfig
from fst_optimizer.engines.base import Generation, GenerationRequest, sampled_call
from fst_optimizer.errors import EngineError, RetiredVersion
from fst_optimizer.testing.tiny import move_adapter
from fst_optimizer.types import TrainRow

if TYPE_CHECKING:
    from fst_optimizer.policy.policy import Policy


def as_row(request: GenerationRequest, generation: Generation) -> TrainRow:
    """What a trainer would be given of one completion."""
    return TrainRow(sampled_call(request, generation, "answer"), advantage=1.0, rollout=0, group=0)


class EngineContract:
    """What every engine must do. Subclass it with a fixture `policy`, a fresh one for each test, on a random model.

        class TestMine(EngineContract):
            @pytest.fixture
            def policy(self, tmp_path):
                return Policy(make_tiny_model(tmp_path), engine=MyEngine)

    An engine that takes part in training must agree with the trainer to `TOLERANCE`.
    """

    PROMPTS = ("a", "What comes next?", "Sort the letters: d c b a", "one two three four five six seven")
    """Ragged on purpose."""
    TOLERANCE = 1e-4
    """Between the engine's log-probs and the trainer's, in nats, at float32."""

    def requests(self, policy: Policy, **settings: Any) -> list[GenerationRequest]:
        """One request a prompt, with seeds 0, 1, ..."""
        return [
            GenerationRequest(
                policy.encode_chat([{"role": "user", "content": prompt}]),
                **{"max_tokens": 12, "seed": index, **settings},
            )
            for index, prompt in enumerate(self.PROMPTS)
        ]

    def answers(self, policy: Policy, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """All at once, so that an engine may batch them."""
        futures = [policy.engine.submit(request) for request in requests]
        return [future.result(timeout=120) for future in futures]

    def test_greedy_decoding_gives_the_same_tokens_twice(self, policy: Policy) -> None:
        """Temperature 0 leaves nothing to chance, whatever the seed."""
        first = self.answers(policy, self.requests(policy, temperature=0.0))
        again = self.answers(policy, self.requests(policy, temperature=0.0, seed=99))
        assert [one.completion_ids for one in first] == [one.completion_ids for one in again]

    def test_a_seed_gives_the_same_tokens_whatever_its_neighbours(self, policy: Policy) -> None:
        """Batching must not choose the data."""
        requests = self.requests(policy)
        together = self.answers(policy, requests)
        alone = [self.answers(policy, [request])[0] for request in requests]
        assert [one.completion_ids for one in together] == [one.completion_ids for one in alone]

    def test_different_seeds_sample_different_tokens(self, policy: Policy) -> None:
        """On a random model at temperature 1, twelve equal tokens would be a wonder."""
        request = self.requests(policy)[1]
        seeds = [GenerationRequest(request.prompt_ids, 12, seed=seed) for seed in range(4)]
        assert len({one.completion_ids for one in self.answers(policy, seeds)}) == 4

    def test_max_tokens_is_each_requests_own_and_told_as_length(self, policy: Policy) -> None:
        """A longer neighbour must not lengthen a short request."""
        prompt = self.requests(policy)[0].prompt_ids
        requests = [GenerationRequest(prompt, limit, seed=limit) for limit in (1, 3, 20)]
        for request, answer in zip(requests, self.answers(policy, requests), strict=True):
            ended = answer.finish_reason == "stop"
            assert len(answer.completion_ids) <= request.max_tokens
            assert ended or len(answer.completion_ids) == request.max_tokens
            assert answer.finish_reason in ("stop", "length")

    def test_every_token_has_one_logprob(self, policy: Policy) -> None:
        """And it is one: finite, and not above 0."""
        for answer in self.answers(policy, self.requests(policy, temperature=0.7)):
            assert len(answer.logprobs) == len(answer.completion_ids) > 0
            assert all(-1e9 < logprob <= 0 for logprob in answer.logprobs)

    def test_logprobs_are_the_trainers_at_every_temperature(self, policy: Policy) -> None:
        """Sampler and trainer must agree, over ragged prompts in one batch."""
        move_adapter(policy)
        version = policy.publish()
        requests = [
            request
            for temperature in (0.0, 0.5, 1.0, 1.7)
            for request in self.requests(policy, temperature=temperature, version=version)
        ]
        rows = [as_row(*pair) for pair in zip(requests, self.answers(policy, requests), strict=True)]
        for row, trained in zip(rows, policy.trainer(TrainConfig()).logprobs(rows), strict=True):
            far = max(abs(a - b) for a, b in zip(row.call.logprobs, trained, strict=True))
            assert far < self.TOLERANCE, f"{far} nats apart at temperature {row.call.temperature}"

    def test_a_stop_string_ends_the_completion_and_stays_in_its_tokens(self, policy: Policy) -> None:
        """The tokens are what was sampled; cutting the text is the recorder's work."""
        request = self.requests(policy)[1]
        whole = self.answers(policy, [request])[0]
        text = policy.decode(whole.completion_ids)
        word = text[2:4] if len(text) > 4 else text[:1]
        stopped_request = GenerationRequest(request.prompt_ids, 12, stop=(word,), seed=request.seed)
        stopped = self.answers(policy, [stopped_request])[0]
        assert stopped.finish_reason == "stop"
        assert word in policy.decode(stopped.completion_ids)
        assert whole.completion_ids[: len(stopped.completion_ids)] == stopped.completion_ids
        assert len(stopped.completion_ids) < len(whole.completion_ids)

    def test_a_retired_version_is_refused(self, policy: Policy) -> None:
        """And one that was never published."""
        import pytest

        move_adapter(policy)
        version = policy.publish()
        policy.retire_all_but(())
        for gone in (version, version + 1):
            future = policy.engine.submit(self.requests(policy, version=gone)[0])
            with pytest.raises(RetiredVersion, match=str(gone)):
                future.result(timeout=120)
        assert policy.engine.versions() == {0}

    def test_published_versions_answer_with_their_own_logprobs(self, policy: Policy) -> None:
        """Interleaved requests for three versions, each as it answers alone."""
        versions = [0]
        for seed in (1, 2):
            move_adapter(policy, seed=seed)
            versions.append(policy.publish())
        mixed = [request for version in versions for request in self.requests(policy, version=version)[:2]]
        mixed = mixed[::2] + mixed[1::2]
        together = self.answers(policy, mixed)
        for request, answer in zip(mixed, together, strict=True):
            (alone,) = self.answers(policy, [request])
            assert answer.completion_ids == alone.completion_ids
            assert max(abs(a - b) for a, b in zip(answer.logprobs, alone.logprobs, strict=True)) < self.TOLERANCE
        assert len({together[index].logprobs for index in range(3)}) == 3

    def test_a_cancelled_request_is_skipped(self, policy: Policy) -> None:
        """Those behind it are answered as if it had never been there."""
        requests = self.requests(policy)
        with policy.lock:  # generation waits meanwhile, where it needs the trainer's weights
            futures = [policy.engine.submit(request) for request in requests]
            cancelled = [index for index, future in enumerate(futures) if index % 2 and future.cancel()]
        kept = [index for index in range(len(requests)) if index not in cancelled]
        answers = [futures[index].result(timeout=120) for index in kept]
        alone = self.answers(policy, [requests[index] for index in kept])
        assert [one.completion_ids for one in answers] == [one.completion_ids for one in alone]
        assert all(futures[index].cancelled() for index in cancelled)

    def test_a_prompt_longer_than_the_context_raises_dspys_own_error(self, policy: Policy) -> None:
        """Programs that know it, ReAct among them, shorten their prompt and go on."""
        import pytest
        from dspy.utils.exceptions import ContextWindowExceededError

        with pytest.raises(ContextWindowExceededError):
            policy.lm("x" * (policy.engine.context_length * 8))

    def test_a_closed_engine_refuses(self, policy: Policy) -> None:
        """Closing twice is allowed."""
        import pytest

        policy.close()
        policy.close()
        with pytest.raises(EngineError):
            policy.engine.submit(self.requests(policy)[0]).result(timeout=120)
