"""For tests of programs, engines and FST itself: a tiny model, an engine that says what it is told, a contract.

    policy = Policy(make_tiny_model(folder), engine=lambda policy: ScriptedEngine(policy, answer))

runs all of FST without a model worth the name: `answer` writes the completions, everything else is the real thing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.run import TrainConfig
from fst_optimizer.engines.base import Generation, GenerationRequest
from fst_optimizer.errors import EngineError, RetiredVersion
from fst_optimizer.types import Call, TrainRow

if TYPE_CHECKING:
    from torch import Tensor

    from fst_optimizer.policy.policy import Policy

Answer = Callable[[str, GenerationRequest], str]
"""From the prompt's text, special tokens included, and the request, the completion's text."""

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(folder: str | Path, *, seed: int = 0, context_length: int = 4096) -> Path:
    """Write a random Qwen3 model with its tokenizer into `folder` and return the folder.

    Two layers of 32 dimensions and one token a byte, so that any text comes back from its tokens exactly.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = Path(folder)
    tokenizer = _byte_tokenizer(context_length)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # the smallest that vLLM computes on CPU
        max_position_embeddings=context_length,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _byte_tokenizer(context_length: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def chat_answer(**fields: object) -> str:
    """A completion that dspy's ChatAdapter parses into these output fields."""
    parts = [f"[[ ## {name} ## ]]\n{value}" for name, value in fields.items()]
    return "\n\n".join([*parts, "[[ ## completed ## ]]"])


class ScriptedEngine:
    """An engine whose completions a function writes, for any policy version.

    Token ids are exactly those of the answer's text and an end token, cut to max_tokens; log-probs are made up, but
    always the same for a token, its place and a version. What `answer` raises fails that request.

    Args:
        policy: Whose tokenizer is used.
        answer: Writes the completions, in the thread that asks.
        context_length: Most tokens of prompt and completion together.
    """

    def __init__(self, policy: Policy, answer: Answer, *, context_length: int = 4096) -> None:
        self.policy = policy
        self.answer = answer
        self.context_length = context_length
        self.max_rank: int | None = None
        self.requests: list[GenerationRequest] = []
        """All that was asked, in order of arrival."""
        self.published: list[int] = []
        self.retired: list[int] = []
        self.closed = False
        self._served = {0}
        self._lock = threading.Lock()

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        """See `Engine.submit`; the future is done when this returns."""
        future: Future[Generation] = Future()
        try:
            future.set_result(self._generate(request))
        except Exception as error:
            future.set_exception(error)
        return future

    def prompt_text(self, request: GenerationRequest) -> str:
        """A request's prompt as text, special tokens included."""
        return str(self.policy.tokenizer.decode(list(request.prompt_ids), skip_special_tokens=False))

    def publish(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """See `Engine.publish`."""
        self.published.append(version)
        self._served.add(version)

    def retire(self, version: int) -> None:
        """See `Engine.retire`."""
        if version and version in self._served:
            self._served.discard(version)
            self.retired.append(version)

    def versions(self) -> frozenset[int]:
        """See `Engine.versions`."""
        return frozenset(self._served)

    def outage_s(self) -> float:
        """See `Engine.outage_s`."""
        return 0.0

    def close(self) -> None:
        """See `Engine.close`."""
        self.closed = True

    def _generate(self, request: GenerationRequest) -> Generation:
        with self._lock:
            self.requests.append(request)
        if self.closed:
            raise EngineError("the engine is closed")
        if request.version not in self._served:
            raise RetiredVersion(f"policy version {request.version} is not served any more")
        text = self.answer(self.prompt_text(request), request)
        tokenizer = self.policy.tokenizer
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        kept = tuple(ids[: request.max_tokens])
        logprobs = tuple(_made_up(token, place, request.version) for place, token in enumerate(kept))
        return Generation(kept, logprobs, "stop" if len(kept) == len(ids) else "length")


def _made_up(token: int, place: int, version: int) -> float:
    return -1.0 - (token * 7919 + place * 104_729 + version * 1_299_709) % 997 / 1000


def move_adapter(policy: Policy, *, size: float = 0.1, seed: int = 0) -> None:
    """Give the trainable adapter a random B, so that the next published version is not the base."""
    import torch

    from fst_optimizer.model.lora import trained_parameters

    generator = torch.Generator().manual_seed(seed)
    with policy.lock, torch.no_grad():
        for name, parameter in trained_parameters(policy.model).items():
            if ".lora_B." in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def as_row(request: GenerationRequest, generation: Generation) -> TrainRow:
    """What a trainer would be given of one completion."""
    call = Call(
        predictor="answer",
        prompt_ids=request.prompt_ids,
        completion_ids=generation.completion_ids,
        logprobs=generation.logprobs,
        temperature=request.temperature,
        policy_version=request.version,
        finish_reason=generation.finish_reason,
    )
    return TrainRow(call, advantage=1.0, rollout=0)


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
