"""The bridge from dspy to an engine: messages become token ids once, and every call is kept as it was sampled.

dspy hands a request to `RecordingEngine.complete`. The chat template turns its messages into prompt ids, the engine
samples, and the rollout's `Recorder`, found in `dspy.settings`, keeps the `Call`. Text is only ever made from the
sampled ids, never the other way round.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fst_optimizer.engines.base import Generation, GenerationRequest, ServedPolicy, sampled_call
from fst_optimizer.engines.sampling import check_options, options_of
from fst_optimizer.errors import EngineDied, EngineError, PromptTooLong, RetiredVersion, UserError
from fst_optimizer.failpoints import failpoint
from fst_optimizer.types import Call, Outcome

if TYPE_CHECKING:
    import dspy
    from dspy.lm15 import Request, Response

SETTING = "fst_recorder"
"""The key in `dspy.settings` under which a rollout's recorder travels, into dspy's worker threads too."""
COMPONENT = "_fst_component"
"""The attribute that names a predictor; unlike its identity it survives the copies that BestOfN and Refine make."""


Messages = list[dict[str, str]]
UnderTeacher = Callable[[str, Messages], Messages | None]
"""From a predictor and the messages of its call, the messages under other instructions; None where it cannot tell."""


class RolloutCancelled(EngineError):
    """The rollout timed out or was cancelled; its program may not sample any more."""


@dataclass
class Recorder:
    """Collects the calls of one rollout, and decides what they are sampled from."""

    policy: ServedPolicy
    policy_version: int
    temperature: float
    """Used by every call for which the program did not ask for its own."""
    seed_key: tuple[object, ...] = ()
    """What the sampling seeds follow from: (seed, policy version, candidate, example, rollout), and the draw if any."""
    under_teacher: UnderTeacher | None = None
    """Renders each call under a teacher's instructions too. None: there is no teacher."""
    calls: list[Call] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    """The last user message of each call, for people to read."""
    failure: Outcome | None = None
    """Set when the engine refused or failed a call."""
    died: EngineDied | None = None
    """Set when the engine failed for good, even where the program caught that."""
    refused: UserError | None = None
    """Set when a call asked for what a policy cannot do, even where the program caught that."""
    _cancelled: bool = False
    _seen: Counter[tuple[object, ...]] = field(default_factory=Counter)
    _pending: set[Future[Generation]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def sampling_seed(self, predictor: str, prompt_ids: tuple[int, ...]) -> int:
        """A seed from what is asked, not from when: thread timing inside the program does not choose the data."""
        key = (predictor, prompt_ids)
        with self._lock:
            occurrence = self._seen[key]
            self._seen[key] += 1
        text = repr((self.seed_key, predictor, prompt_ids, occurrence))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")

    def add(self, call: Call, prompt: str) -> None:
        """Keep a finished call."""
        with self._lock:
            self.calls.append(call)
            self.prompts.append(prompt)

    def failed(self, error: BaseException) -> None:
        """Note that a call failed; RetiredVersion is not the engine's failure, the rollout came too late."""
        if isinstance(error, PromptTooLong):
            self.failure = Outcome.PROMPT_TOO_LONG
        elif isinstance(error, Exception) and not isinstance(error, RetiredVersion):
            self.failure = Outcome.ENGINE_ERROR
            if isinstance(error, EngineDied):
                self.died = error

    def track(self, future: Future[Generation]) -> None:
        """Let `cancel` reach this request.

        Raises:
            RolloutCancelled: it was called already.
        """
        with self._lock:
            if not self._cancelled:
                self._pending.add(future)
                future.add_done_callback(self._pending.discard)
                return
        future.cancel()
        raise RolloutCancelled("the rollout was cancelled or has ended")

    def cancel(self) -> None:
        """Refuse every further call of this rollout, and drop those still queued."""
        with self._lock:
            self._cancelled = True
            pending = tuple(self._pending)
        for future in pending:
            future.cancel()


def calling_component() -> str:
    """The component name of the predictor that is calling the LM now, or ""."""
    import dspy

    for module in reversed(dspy.settings.get("caller_modules") or []):
        name = getattr(module, COMPONENT, None)
        if name is not None:
            return str(name)
    return ""


def name_components(program: dspy.Module, component_names: Sequence[tuple[str, Any]] | None = None) -> None:
    """Write each predictor's name on it, so that its calls can be told apart."""
    for name, predictor in component_names or program.named_predictors():
        setattr(predictor, COMPONENT, name)


@dataclass(frozen=True)
class _Pending:
    """A call on its way."""

    request: GenerationRequest
    future: Future[Generation]
    recorder: Recorder | None
    """None outside of rollouts."""
    component: str
    prompt: str
    teacher_ids: tuple[int, ...] = ()

    @contextmanager
    def errors_noted(self) -> Iterator[None]:
        """Around the wait for the answer: what goes wrong is told to the rollout's recorder and to the program."""
        try:
            yield
        except CancelledError as error:
            raise RolloutCancelled("the rollout was cancelled") from error
        except BaseException as error:
            if self.recorder:
                self.recorder.failed(error)
            raise


class RecordingEngine:
    """A dspy engine over a policy: at `version`; without one at its `lm_version`, or with `follows` at its current one.

    `trainable=False` marks a frozen use of the policy (its base as a judge or a reflector): such calls are sampled
    from `version` even inside a rollout, and neither recorded nor observed.
    """

    def __init__(
        self, policy: ServedPolicy, version: int | None = None, *, trainable: bool = True, follows: bool = False
    ) -> None:
        self.policy = policy
        self.version = version
        self.trainable = trainable
        self.follows = follows
        self._ids = itertools.count()

    def __deepcopy__(self, memo: dict[int, object]) -> RecordingEngine:
        return self  # dspy deep-copies a program's LMs; the weights behind them are shared on purpose

    @property
    def serves(self) -> int:
        """The policy version that calls outside of rollouts are sampled from now."""
        if self.version is not None:
            return self.version
        return self.policy.version if self.follows else self.policy.lm_version

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse a call that cannot be answered as it asks, before dspy drops or wraps anything.

        Raises:
            UserError: an option that a policy does not have. The rollout that asked ends the run.
            EngineError: the policy is closed.
        """
        import dspy

        recorder: Recorder | None = dspy.settings.get(SETTING)
        if recorder is None and self.policy.closed:
            raise EngineError(f"{self.policy!r} is closed and answers no more: make a new Policy")
        try:
            check_options(options)
        except UserError as error:
            if recorder is not None:
                recorder.refused = error
            raise

    def complete(self, request: Request) -> Response:
        """Sample one completion (dspy's custom engine contract)."""
        pending = self._submit(request)
        with pending.errors_noted():
            generation = failpoint("engine.answer", pending.future.result())
        return self._finish(pending, generation)

    async def acomplete(self, request: Request) -> Response:
        """`complete` for a running event loop."""
        pending = self._submit(request)
        with pending.errors_noted():
            # Cancelling the coroutine cancels the request as well.
            generation = failpoint("engine.answer", await asyncio.wrap_future(pending.future))
        return self._finish(pending, generation)

    def _submit(self, request: Request) -> _Pending:
        from dspy.lm15 import ContextLengthError

        self.check(options_of(request))
        recorder = self._recorder()
        component = calling_component() if recorder else ""
        messages = chat_messages(request)
        try:
            prompt_ids = self.policy.encode_chat(messages)
        except UserError:  # the text names control tokens that cannot be kept apart: not the engine's doing
            if recorder:
                recorder.failure = Outcome.PROGRAM_ERROR
            raise
        teacher_ids: tuple[int, ...] = ()
        if recorder and recorder.under_teacher and (other := recorder.under_teacher(component, messages)):
            teacher_ids = self.policy.encode_chat(other)
        context = self.policy.engine.context_length
        if len(prompt_ids) >= context:
            error = PromptTooLong(
                f"the prompt has {len(prompt_ids)} tokens and the model's context is {context}: "
                "shorten the inputs, the demos or the instruction"
            )
            if recorder:
                recorder.failed(error)
            raise ContextLengthError(str(error)) from error
        if recorder:
            version, temperature = recorder.policy_version, recorder.temperature
        else:
            version = self.serves
            observer = self.policy.observer if self.trainable else None
            temperature = self.policy.temperature if observer is None else observer.temperature
        asked = request.config
        seed = asked.seed
        if seed is None:
            seed = recorder.sampling_seed(component, prompt_ids) if recorder else self.policy.fresh_seed()
        generation_request = GenerationRequest(
            prompt_ids=prompt_ids,
            max_tokens=min(asked.max_tokens or self.policy.max_tokens, context - len(prompt_ids)),
            temperature=temperature if asked.temperature is None else asked.temperature,
            stop=tuple(asked.stop or ()),
            seed=seed,
            version=version,
        )
        future = self.policy.engine.submit(generation_request)
        if recorder:
            recorder.track(future)
        return _Pending(generation_request, future, recorder, component, messages[-1]["content"], teacher_ids)

    def _recorder(self) -> Recorder | None:
        """The recorder of the rollout that calls, if its program calls this policy to be trained by it."""
        import dspy

        recorder: Recorder | None = dspy.settings.get(SETTING)
        return recorder if self.trainable and recorder is not None and recorder.policy is self.policy else None

    def _finish(self, pending: _Pending, generation: Generation) -> Response:
        from dspy.lm15 import Message, Response, TextPart, Usage

        request, sampled = pending.request, self.policy.decode(generation.completion_ids)
        text = visible_text(sampled, request.stop)
        if pending.recorder:
            call = sampled_call(request, generation, pending.component, sampled)
            pending.recorder.add(replace(call, teacher_ids=pending.teacher_ids), pending.prompt)
        elif self.trainable and (observer := self.policy.observer) is not None:
            observer.add(request, generation, text)
        return Response(
            id=f"fst-{next(self._ids)}",
            model=self.policy.name,
            message=Message.assistant([TextPart(text or " ")]),  # dspy refuses an empty part
            finish_reason="length" if generation.finish_reason == "length" else "stop",
            usage=Usage(input_tokens=len(request.prompt_ids), output_tokens=len(generation.completion_ids)),
        )


class AsyncRecordingEngine:
    """The coroutine face of a `RecordingEngine`, as dspy wants it: a second object."""

    def __init__(self, engine: RecordingEngine) -> None:
        self.sync = engine

    def __deepcopy__(self, memo: dict[int, object]) -> AsyncRecordingEngine:
        return self

    async def complete(self, request: Request) -> Response:
        """Sample one completion without blocking the event loop."""
        return await self.sync.acomplete(request)


def chat_messages(request: Request) -> Messages:
    """The request's system text and messages as a chat template wants them."""
    messages = []
    if request.system:
        system = request.system if isinstance(request.system, str) else "".join(part.text for part in request.system)
        messages.append({"role": "system", "content": system})
    roles = {"developer": "system"}
    for message in request.messages:
        messages.append({"role": roles.get(message.role, message.role), "content": message.text or ""})
    return messages


def visible_text(sampled: str, stop: Sequence[str] = ()) -> str:
    """What the program sees: without the `<think>` part and from the first stop string on.

    A `<think>` that was never closed hides the rest: the model was cut while thinking and gave no answer. A
    `</think>` without its opening belongs to a template that opened it in the prompt.
    """
    text = sampled
    if "</think>" in text:
        text = text.rsplit("</think>", 1)[1]
    elif "<think>" in text:
        text = text.split("<think>", 1)[0]
    cuts = [index for index in (text.find(word) for word in stop) if index >= 0]
    return text[: min(cuts)].strip() if cuts else text.strip()
