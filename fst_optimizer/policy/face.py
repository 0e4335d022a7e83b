"""The side of a policy that its LMs and the recorder see: which version an LM serves, and how text becomes tokens."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fst_optimizer.errors import UserError
from fst_optimizer.model.chat import encode_chat

if TYPE_CHECKING:
    import dspy

    from fst_optimizer.engines.base import CallObserver, Engine
    from fst_optimizer.engines.recorder import RecordingEngine


class PolicyFace:
    """Base of `Policy`, which sets what is only declared here."""

    name: str
    key: str
    version: int
    engine: Engine
    closed: bool
    max_tokens: int
    temperature: float
    tokenizer: Any
    chat_template_args: dict[str, Any]
    _seeds: itertools.count[int]
    _lm_version: int | None
    _pinned: weakref.WeakSet[RecordingEngine]
    _observer: weakref.ref[CallObserver] | None

    @property
    def lm_version(self) -> int:
        """The version that `lm` stays at: 0, or 1 with an `adapter` to start from, until `move_lm` says another."""
        return self.version if self._lm_version is None else self._lm_version

    def move_lm(self, version: int) -> None:
        """Let `lm` stay at another version that is served; programs on it then answer by that."""
        self.check_served(version, "the version to move policy.lm to")
        self._lm_version = version

    @contextmanager
    def lm_following(self) -> Iterator[None]:
        """Inside, `lm` serves what `latest_lm` does; afterwards it stays where that is."""
        self._lm_version = None
        try:
            yield
        finally:
            self._lm_version = self.version

    def lm_at(self, version: int) -> dspy.LM:
        """An LM that stays at one version. It counts as this policy when its program is compiled again."""
        lm = self._make_lm(version)
        self._pinned.add(lm.engine)
        return lm

    @property
    def base_lm(self) -> dspy.LM:
        """The base model as a frozen LM: for a judge or a reflector. Never recorded, never trained."""
        return self._make_lm(0, trainable=False)

    def _make_lm(self, version: int | None, **kind: bool) -> dspy.LM:
        from fst_optimizer.policy.lm import make_lm

        return make_lm(self, version, **kind)

    def check_served(self, version: int, what: str, program: str = "student") -> None:
        """Raises UserError where the policy does not serve the version that `what`, an LM of `program`, is at."""
        if version not in self.engine.versions():
            raise UserError(
                f"{what} is at policy version {version}, which {self!r} does not serve any more: "
                f"call {program}.set_lm(policy.lm)"
            )

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Prompt token ids of a conversation, ready for the assistant's turn."""
        return encode_chat(self.tokenizer, messages, self.chat_template_args)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of sampled tokens, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def fresh_seed(self) -> int:
        """The sampling seed of the next call outside of any rollout."""
        return next(self._seeds)

    @property
    def observer(self) -> CallObserver | None:
        """Told of the calls outside of rollouts.

        A weak reference: an owner that is dropped, because its optimizer raised, stops observing.
        """
        return None if self._observer is None else self._observer()

    @observer.setter
    def observer(self, observer: CallObserver | None) -> None:
        self._observer = None if observer is None else weakref.ref(observer)

    def count_tokens(self, text: str) -> int:
        """How many tokens a text is, without those that a chat template adds."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))
