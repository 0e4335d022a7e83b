"""`sft`: the policy's adapter tuned on right answers, as a baseline of a comparison.

Every predictor's prompt is the one that it sends in a rollout, with the task's right answers before it (its
`answers`), and what is learned is the right answer as the prompt format writes and parses it. Start, data, learning
rate and optimizer are those of the other methods; the loss is the likelihood, and an update is over as many examples as
a slow step. It sees as many examples, one after the other, as the others may make rollouts: `budget.max_rollouts`
over the training examples is the number of epochs. After each the program is validated, and the best version is kept,
as our methods keep their best pair.

It is told what no other method is: the right answers. It makes no rollouts to learn from, reads no feedback and changes
no instruction. The time is counted in seconds, the cost in examples seen (`supervised` in `result.json`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import dspy
from dspy.lm15 import Message, Request, Response, TextPart, Usage

from fst_optimizer.config.run import FSTConfig, TrainConfig
from fst_optimizer.dspy_jobs.data import end_of_turn, text_call
from fst_optimizer.dspy_jobs.settings import FinetuneSettings
from fst_optimizer.dspy_jobs.supervised import updates
from fst_optimizer.engines.recorder import calling_component, chat_messages, name_components
from fst_optimizer.errors import UserError
from fst_optimizer.lab.baseline import Learned, Start, main
from fst_optimizer.lab.methods import SFT
from fst_optimizer.policy.lm import takes_policy
from fst_optimizer.program.lms import attach_policy
from fst_optimizer.program.texts import copy_program
from fst_optimizer.rollout.rollout import strict_prompt_format
from fst_optimizer.run.state import ValidationScore
from fst_optimizer.types import TrainRow

RightAnswers = Mapping[str, Mapping[str, str]]
"""Predictor -> output field -> text, on one example."""


class RightEngine:
    """The engine of an LM that answers each predictor's call on one example with the right answer, and keeps both."""

    def __init__(self, task: str, answers: RightAnswers) -> None:
        self.task = task
        self.answers = answers
        self.turns: list[tuple[str, list[dict[str, str]], str]] = []
        """Predictor, prompt as messages, and answer of each call."""
        self.wrong: UserError | None = None
        """Why a call cannot be answered; dspy may wrap what is raised."""

    def __deepcopy__(self, memo: dict[int, object]) -> RightEngine:
        return self

    def complete(self, request: Request) -> Response:
        """The right answer, in the words of the prompt format (dspy's custom engine contract)."""
        name = calling_component()
        signature = dspy.settings.caller_modules[-1].signature
        outputs = self.answers.get(name, {})
        lacking = [field for field in signature.output_fields if field not in outputs]
        if lacking:
            self.wrong = UserError(
                f"task {self.task!r}: its answers lack {', '.join(lacking)} of predictor {name!r}: sft needs all that "
                "a predictor writes"
            )
            raise self.wrong
        text = strict_prompt_format().format_assistant_message_content(signature, outputs)
        self.turns.append((name, chat_messages(request), text))
        return Response(
            id=None,
            model="answers",
            message=Message.assistant([TextPart(text)]),
            finish_reason="stop",
            usage=Usage(input_tokens=0, output_tokens=0),
        )


def right_turns(
    task: str, program: dspy.Module, example: dspy.Example, answers: RightAnswers
) -> tuple[list[tuple[str, list[dict[str, str]], str]], Any]:
    """The calls of the policy that the program makes where each is answered right, and what the program then returns.

    Raises:
        UserError: an answer is missing, or the program fails on them.
    """
    engine = RightEngine(task, answers)
    copy = copy_program(program)
    name_components(copy)
    for predictor in copy.predictors():
        if takes_policy(predictor.lm):
            predictor.lm = dspy.LM("hosted_vllm/answers", engine=engine, cache=False)
    with dspy.context(trace=[], disable_history=True, adapter=strict_prompt_format()):
        try:
            prediction = copy(**example.inputs())
        except Exception as error:
            raise engine.wrong or UserError(
                f"task {task!r}: the program fails on its own right answers to {example!r}: {error}"
            ) from error
    return engine.turns, prediction


def supervised_examples(start: Start) -> list[list[TrainRow]]:
    """The rows of each training example: what every trained predictor is asked, and the right answer as token ids."""
    policy, task, end_id = start.policy, start.task, end_of_turn(start.policy)
    examples = []
    for place, example in enumerate(start.train):
        turns, _ = right_turns(task.name, start.program, example, task.answers(example) or {})
        rows = []
        for name, messages, answer in turns:
            where = f"training example {place}, predictor {name!r}"
            prompt_ids = policy.encode_chat(messages)
            call = text_call(policy, prompt_ids, answer, end_id, temperature=1.0, where=where)
            if start.config.trains(name):
                rows.append(TrainRow(call, 1.0, rollout=place, group=place))
        examples.append(rows)
    return examples


def settings_for(config: FSTConfig, examples: int, rows: int) -> FinetuneSettings:
    """As many examples seen as the others may make rollouts, and as many in an update as in a slow step."""
    cap = config.budget.max_rollouts
    assert cap is not None, "a comparison always has a cap"
    per_example = max(1, round(rows / examples))
    # What shapes a policy gradient has no place in a likelihood.
    plain = TrainConfig()
    train = config.train.changed(
        loss=plain.loss,
        kl_coef=0.0,
        entropy_coef=0.0,
        entropy_floor=None,
        average=plain.average,
        epochs=1,
        target_kl=None,
    )
    return FinetuneSettings(
        train=train,
        epochs=max(1, cap // examples),
        batch_size=config.rollout.batch_size * per_example,
        seed=config.seed,
    )


def learn(start: Start, before: ValidationScore) -> Learned:
    """Tune the adapter, validate after each epoch, and keep the best version."""
    policy = start.policy
    examples = supervised_examples(start)
    rows = [row for own in examples for row in own]
    settings = settings_for(start.config, len(examples), len(rows))
    in_epoch = math.ceil(len(rows) / settings.batch_size)
    program, best = start.program, before
    losses = []
    for step, report in enumerate(updates(policy, rows, settings), 1):
        losses.append(report.loss)
        if step % in_epoch == 0:
            policy.retire_all_but({best.policy_version, policy.version})
            tuned = attach_policy(start.program, policy, policy.publish())
            found = start.validate(tuned, step, step // in_epoch)
            if found.score > best.score:
                program, best = tuned, found
    supervised = {
        "examples": len(examples),
        "rows": len(rows),
        "epochs": settings.epochs,
        "examples_seen": len(examples) * settings.epochs,
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }
    return Learned(program, best, len(losses), settings.epochs, {"supervised": supervised})


if __name__ == "__main__":
    main((SFT,), lambda method: learn, __doc__)
