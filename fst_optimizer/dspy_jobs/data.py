"""What dspy hands to a job, checked, and text as the token ids that the policy would have sampled for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fst_optimizer.engines.base import end_ids
from fst_optimizer.errors import UserError
from fst_optimizer.model.chat import encode_text
from fst_optimizer.types import Call

if TYPE_CHECKING:
    from fst_optimizer.policy.policy import Policy

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""As given -> as the chat template knows it; the same as in the recording engine."""
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Scored:
    """One completion of a group: what GRPO calls a rollout of one predictor."""

    messages: Messages
    text: str
    reward: float


def check_format(given: object, known: str, what: str) -> None:
    """Raises UserError for another format than `known`, a value of `dspy.clients.utils_finetune.TrainDataFormat`."""
    name = getattr(given, "value", given)
    if name not in (None, known):
        raise UserError(f"train_data_format is {name!r}: {what} takes {known!r}")


def group_objects(train_data: object) -> list[Sequence[Any]]:
    """The groups in a step's data: `{"batch_id": ..., "group": [...]}` as GRPO gives them, or plain lists."""
    groups = []
    for place, entry in enumerate(_listed(train_data, "groups")):
        group = entry.get("group") if isinstance(entry, Mapping) else entry
        if not _is_list(group) or not group:
            raise UserError(
                f'train_data[{place}] is no group: give {{"batch_id": ..., "group": [...]}} with at least one '
                "completion, or the list alone"
            )
        groups.append(group)
    return groups


def scored(entry: Any, where: str) -> Scored:
    """A completion of a group.

    Raises:
        UserError: It is not `{"messages": [...], "completion": {"content": text}, "reward": number}`.
    """
    if not isinstance(entry, Mapping) or not {"messages", "completion", "reward"} <= entry.keys():
        raise UserError(f"{where} needs messages, completion and reward: {_short(entry)}")
    reward, completion = entry["reward"], entry["completion"]
    if not isinstance(reward, int | float) or not math.isfinite(reward):
        raise UserError(f"{where} has reward {reward!r}: the metric must give a finite number")
    text = completion.get("content") if isinstance(completion, Mapping) else None
    if not isinstance(text, str):
        raise UserError(f'{where} has completion {_short(completion)}: give {{"role": "assistant", "content": text}}')
    return Scored(_messages(entry["messages"], where), text, float(reward))


def conversations(train_data: object) -> list[tuple[Messages, str]]:
    """(prompt, the assistant's last answer) of every row of supervised data.

    Raises:
        UserError: There is no row, or one is not `{"messages": [..., {"role": "assistant", "content": text}]}`.
    """
    rows = []
    for place, entry in enumerate(_listed(train_data, "rows")):
        where = f"train_data[{place}]"
        if not isinstance(entry, Mapping) or "messages" not in entry:
            raise UserError(f"{where} needs messages: {_short(entry)}")
        messages = _messages(entry["messages"], where)
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise UserError(f"{where} must end with the assistant's answer to something, and has {_short(messages)}")
        rows.append((messages[:-1], messages[-1]["content"]))
    if not rows:
        raise UserError(
            "train_data is empty: no run of the teacher passed the metric; loosen it, give a stronger teacher, or let "
            "the policy sample with a temperature and give more examples"
        )
    return rows


def _messages(messages: Any, where: str) -> Messages:
    """Messages as the chat template takes them."""
    if not _is_list(messages) or not messages:
        raise UserError(f"{where} has messages {_short(messages)}: give a list of at least one")
    checked = []
    for message in messages:
        role = ROLES.get(message.get("role", "")) if isinstance(message, Mapping) else None
        text = _text(message.get("content")) if role else None
        if role is None or text is None:
            raise UserError(
                f"{where} has message {_short(message)}: give a role ({', '.join(ROLES)}) and text as content"
            )
        checked.append({"role": role, "content": text})
    return checked


def _text(content: Any) -> str | None:
    """A message's text, from a string or from a list of text parts; None when there is something else in it."""
    if isinstance(content, str):
        return content
    if _is_list(content) and all(isinstance(part, Mapping) and "text" in part for part in content):
        return "".join(str(part["text"]) for part in content)
    return None


def _listed(train_data: Any, what: str) -> Sequence[Any]:
    if not _is_list(train_data):
        raise UserError(f"train_data is {type(train_data).__name__}: give a list of {what}")
    return train_data  # type: ignore[no-any-return]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def text_call(
    policy: Policy, prompt_ids: tuple[int, ...], text: str, end_id: int, *, temperature: float, where: str
) -> Call:
    """A completion that no policy sampled, as token ids: its text and the end of the turn. Log-probs are 0.

    White space around the text is left out: dspy writes a newline after every answer, which it never reads.

    Raises:
        UserError: Prompt and completion do not fit into the model's context.
    """
    ids = (*encode_text(policy.tokenizer, text.strip()), end_id)
    room = policy.engine.context_length
    if len(prompt_ids) + len(ids) > room:
        raise UserError(
            f"{where} has {len(prompt_ids)} + {len(ids)} tokens and the model's context is {room}: leave it out"
        )
    return Call("", prompt_ids, ids, (0.0,) * len(ids), temperature, policy.version, "stop", text)


def end_of_turn(policy: Policy) -> int:
    """The token that ends the assistant's turn: of those that stop generation, the one that the template writes."""
    ends = end_ids(policy.model.get_base_model().generation_config, policy.tokenizer)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    written = policy.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    return int(next((token for token in reversed(written) if token in ends), ends[0]))
