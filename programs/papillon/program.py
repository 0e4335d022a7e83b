"""The program: write a prompt without the private facts, have a frozen model answer it, write the reply."""

import os

import dspy

from .offline import OfflineLM

LM_VARIABLE = "FST_PAPILLON_LM"
CRAFT_SEED = "Write a prompt."
ANSWER_SEED = "Answer the prompt."
RESPOND_SEED = "Write the reply."


class PapillonProgram(dspy.Module):  # type: ignore[misc]
    """`craft` and `respond` are the policy's; `answer_untrusted` is the frozen LM's, and sees the prompt alone."""

    def __init__(self) -> None:
        """Builds the predictors, the frozen one with its LM."""
        super().__init__()
        self.craft = dspy.Predict(dspy.Signature("request -> prompt", CRAFT_SEED))
        self.answer_untrusted = dspy.Predict(dspy.Signature("prompt -> answer", ANSWER_SEED))
        self.answer_untrusted.lm = frozen_lm()
        self.respond = dspy.Predict(dspy.Signature("request, answer -> reply", RESPOND_SEED))

    def set_lm(self, lm: dspy.BaseLM) -> None:
        """Gives the policy's predictors an LM; the frozen one keeps its own."""
        self.craft.lm = self.respond.lm = lm

    def forward(self, request: str) -> dspy.Prediction:
        """Runs the three. The prediction has what each wrote."""
        prompt = self.craft(request=request).prompt
        answer = self.answer_untrusted(prompt=prompt).answer
        reply = self.respond(request=request, answer=answer).reply
        return dspy.Prediction(prompt=prompt, answer=answer, reply=reply)


def frozen_lm() -> dspy.LM:
    """The model that `FST_PAPILLON_LM` names, as `dspy.LM` takes it, or the offline one. Nothing is asked of it yet."""
    name = os.environ.get(LM_VARIABLE)
    return dspy.LM(name) if name else OfflineLM()
