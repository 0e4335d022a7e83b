"""Generation by transformers in this process, from the very weights that the trainer updates.

Requests from many threads are gathered into batches by one worker thread. A batch holds requests for one policy
version, whose LoRA adapter (or none, for the base) is switched on while it runs; publishing a version copies its
small tensors and nothing else. Sampling happens inside a logits processor, one uniform number a row and step from
the request's own seed, so a request's tokens do not depend on its neighbours, and only the sampled token's log-prob
is kept of each step's logits.

The worker holds nothing of the engine while it waits, so an engine that is dropped is freed and its worker ends.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from fst_optimizer.engines.base import Generation, GenerationRequest, check_process, end_ids, not_served
from fst_optimizer.engines.checks import checked
from fst_optimizer.errors import EngineError
from fst_optimizer.model import lora

if TYPE_CHECKING:
    from peft import PeftModel

_Queued = tuple[GenerationRequest, "Future[Generation]"]
_Arrivals = queue.SimpleQueue["tuple[TransformersEngine, _Queued] | None"]
"""Requests, each with the engine that it keeps alive; None: the engine was closed, or is gone."""


class TransformersEngine:
    """A micro-batcher over `model.generate`.

    Args:
        model: The peft model that the trainer updates.
        tokenizer: Gives pad and end-of-turn ids, and decodes for stop strings.
        lock: Held while a batch runs; the trainer holds it while it steps.
        max_batch, max_batch_tokens, max_wait_s: As in `Policy`.
    """

    max_rank: int | None = None
    """peft takes adapters of any rank."""

    def __init__(
        self,
        model: PeftModel,
        tokenizer: Any,
        *,
        lock: AbstractContextManager[Any],
        max_batch: int,
        max_batch_tokens: int,
        max_wait_s: float,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.lock = lock
        self.max_batch = max_batch
        self.max_batch_tokens = max_batch_tokens
        self.max_wait_s = max_wait_s
        own = getattr(model.get_base_model().config.get_text_config(), "max_position_embeddings", None)
        self.context_length = min(own or 1 << 30, int(tokenizer.model_max_length), 1 << 30)
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        self.end_ids = end_ids(model.get_base_model().generation_config, tokenizer)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_ids[0]
        # The model's own defaults (top_p, top_k, penalties) would change what is sampled from.
        model.generation_config = GenerationConfig(eos_token_id=self.end_ids, pad_token_id=self.pad_id)
        model.get_base_model().generation_config = model.generation_config
        self._versions: set[int] = {0}
        self._arrivals: _Arrivals = queue.SimpleQueue()
        self._waiting: list[_Queued] = []
        self._closed = False
        self._pid = os.getpid()
        self._worker = threading.Thread(target=_work, args=(self._arrivals,), name="fst-engine", daemon=True)
        self._worker.start()
        weakref.finalize(self, self._arrivals.put, None).atexit = False

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        """See `Engine.submit`."""
        future: Future[Generation] = Future()
        try:
            check_process(self._pid)
            if self._closed:
                raise EngineError("the engine is closed")
            if request.version not in self._versions:
                raise not_served(request.version, self._versions)
        except EngineError as error:
            future.set_exception(error)
        else:
            self._arrivals.put((self, (request, future)))
        return future

    def publish(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """See `Engine.publish`."""
        check_process(self._pid)
        with self.lock:
            lora.add_version(self.model, str(_adapter_name(version)), dict(tensors))
        self._versions.add(version)

    def retire(self, version: int) -> None:
        """See `Engine.retire`."""
        check_process(self._pid)
        if version in self._versions and version:
            self._versions.discard(version)
            with self.lock:
                lora.drop_version(self.model, str(_adapter_name(version)))

    def versions(self) -> frozenset[int]:
        """See `Engine.versions`."""
        return frozenset(self._versions)

    def outage_s(self) -> float:
        """See `Engine.outage_s`: there is no server that could be down."""
        return 0.0

    def close(self) -> None:
        """See `Engine.close`."""
        if not self._closed:
            self._closed = True
            self._arrivals.put(None)
            if os.getpid() == self._pid:
                self._worker.join()

    def _work_off(self, first: _Queued) -> bool:
        """Answer this request and those that arrive meanwhile. False when closed."""
        self._waiting.append(first)
        while self._waiting:
            batch = self._gather()
            if batch is None:
                for _, future in self._waiting:
                    if future.set_running_or_notify_cancel():
                        future.set_exception(EngineError("the engine was closed"))
                return False
            live = [(request, future) for request, future in batch if future.set_running_or_notify_cancel()]
            if live:
                self._run(live)
        return True

    def _gather(self) -> list[_Queued] | None:
        """The next batch: the oldest request, and those that fit with it. None when closed."""
        deadline = time.monotonic() + self.max_wait_s
        while len(self._waiting) < self.max_batch:
            try:
                more = self._arrivals.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if more is None:
                return None
            self._waiting.append(more[1])
        batch, self._waiting = split_batch(self._waiting, self.max_batch, self.max_batch_tokens)
        return batch

    def _run(self, batch: Sequence[_Queued]) -> None:
        try:
            generations = self.generate([request for request, _ in batch])
        except Exception as cause:
            for _, future in batch:
                error = EngineError(f"generating {len(batch)} completions failed: {cause}")
                error.__cause__ = cause
                future.set_exception(error)
            return
        for (request, future), generation in zip(batch, generations, strict=True):
            try:
                future.set_result(self._checked(request, generation))
            except EngineError as error:  # weights that are not finite any more, say
                future.set_exception(error)

    def _checked(self, request: GenerationRequest, generation: Generation) -> Generation:
        ids, logprobs, finish = generation.completion_ids, generation.logprobs, generation.finish_reason
        return checked(request, ids, logprobs, finish, vocabulary=self.vocabulary, end_ids=self.end_ids)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Sample one batch, all of one policy version, in this thread."""
        version = requests[0].version
        if version not in self._versions:
            raise not_served(version, self._versions)
        sampler = _Sampler(requests)
        prompts = [torch.tensor(request.prompt_ids) for request in requests]
        prompts_BT = pad_sequence(prompts, batch_first=True, padding_value=self.pad_id, padding_side="left")
        mask_BT = pad_sequence([torch.ones_like(ids) for ids in prompts], batch_first=True, padding_side="left")
        with self.lock, torch.no_grad(), lora.active_adapter(self.model, _adapter_name(version)):
            self.model.eval()
            sequences = self.model.generate(
                input_ids=prompts_BT.to(self.model.device),
                attention_mask=mask_BT.to(self.model.device),
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=max(request.max_tokens for request in requests),
                    eos_token_id=self.end_ids,
                    pad_token_id=self.pad_id,
                ),
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([_RowEnds(sampler, self.tokenizer)]),
            )
        return self._collect(requests, sequences[:, prompts_BT.shape[1] :].tolist(), sampler)

    def _collect(
        self, requests: Sequence[GenerationRequest], rows: list[list[int]], sampler: _Sampler
    ) -> list[Generation]:
        """Each row up to its end: an end-of-turn token, a stop string, or its limit."""
        logprobs = torch.stack(sampler.logprobs, dim=1).tolist()
        generations = []
        for index, request in enumerate(requests):
            stopped_at = sampler.stopped_at.get(index)
            row = rows[index][: min(request.max_tokens, stopped_at or request.max_tokens)]
            length = next((place + 1 for place, token in enumerate(row) if token in self.end_ids), len(row))
            ended = row[length - 1] in self.end_ids or stopped_at == length
            generations.append(
                Generation(tuple(row[:length]), tuple(logprobs[index][:length]), "stop" if ended else "length")
            )
        return generations


def _work(arrivals: _Arrivals) -> None:
    """The worker's thread."""
    while (arrival := arrivals.get()) is not None:
        engine, first = arrival
        going_on = engine._work_off(first)
        del arrival, engine, first
        if not going_on:
            return


class _Sampler(LogitsProcessor):  # type: ignore[misc]
    """Samples each row's next token and masks out all others, so that generate's own argmax takes it."""

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        self.requests = requests
        self.step = 0
        self.logprobs: list[Tensor] = []
        self.stopped_at: dict[int, int] = {}
        """Row -> number of tokens at which a stop string was complete."""
        temperatures = [request.temperature for request in requests]
        self.greedy_B = torch.tensor([t == 0 for t in temperatures])
        self.temperature_B1 = torch.tensor([t or 1.0 for t in temperatures])[:, None]
        # Each request's numbers from its own seed, as many as the longest needs: a longer draw starts the same.
        room = max(request.max_tokens for request in requests)
        generators = [np.random.Generator(np.random.PCG64(request.seed)) for request in requests]
        self.uniform_BT = torch.from_numpy(np.stack([generator.random(room) for generator in generators]))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        device = scores.device
        logprobs_BV = torch.log_softmax(scores.float() / self.temperature_B1.to(device), dim=-1)
        tokens_B = logprobs_BV.argmax(dim=-1)
        if not self.greedy_B.all():
            sampled_B = _sample(logprobs_BV, self.uniform_BT[:, self.step].to(device))
            tokens_B = torch.where(self.greedy_B.to(device), tokens_B, sampled_B)
        self.logprobs.append(logprobs_BV.gather(1, tokens_B[:, None])[:, 0].cpu())
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens_B[:, None], 0.0)


def _sample(logprobs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which each row's cumulative distribution passes its uniform number. Shape: (B,)."""
    cumulative_BV = logprobs_BV.double().exp().cumsum(dim=-1)
    # Scaled by the total, which rounding keeps a little off 1; a token of zero probability is never taken.
    threshold_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0].clamp_(max=logprobs_BV.shape[1] - 1)


class _RowEnds(StoppingCriteria):  # type: ignore[misc]
    """Every row has its own max_tokens and stop strings.

    A stop string may begin and end inside tokens, so the text of each such row is decoded as it grows.
    """

    def __init__(self, sampler: _Sampler, tokenizer: Any) -> None:
        self.sampler, self.tokenizer = sampler, tokenizer

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        requests, step, stopped_at = self.sampler.requests, self.sampler.step, self.sampler.stopped_at
        for row, request in enumerate(requests):
            if request.stop and row not in stopped_at:
                text = self.tokenizer.decode(input_ids[row, -step:], skip_special_tokens=True)
                if any(word in text for word in request.stop):
                    stopped_at[row] = step
        ended = [row in stopped_at or request.max_tokens <= step for row, request in enumerate(requests)]
        return torch.tensor(ended, device=input_ids.device)


def split_batch(
    waiting: Sequence[_Queued], max_batch: int, max_batch_tokens: int
) -> tuple[list[_Queued], list[_Queued]]:
    """The oldest request with those of its version that fit beside it, and the rest in order."""
    batch: list[_Queued] = []
    rest: list[_Queued] = []
    longest_prompt = longest_completion = 0
    for queued in waiting:
        request = queued[0]
        prompt = max(longest_prompt, len(request.prompt_ids))
        completion = max(longest_completion, request.max_tokens)
        fits = len(batch) < max_batch and (len(batch) + 1) * (prompt + completion) <= max_batch_tokens
        if not batch or (request.version == batch[0][0].version and fits):
            batch.append(queued)
            longest_prompt, longest_completion = prompt, completion
        else:
            rest.append(queued)
    return batch, rest


def _adapter_name(version: int) -> str | None:
    """The peft adapter that holds a policy version; None for the base."""
    return f"policy-{version:06d}" if version else None
