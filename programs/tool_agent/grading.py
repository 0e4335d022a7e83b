"""How an agent's run is graded: from its answer and from its trajectory, with the reasons.

The reasons avoid the tools' names: those are outputs of the predictor, and a sentence that repeats an output is taken
to be about one example.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .goods import makers, records

TOLERANCE = 0.01
"""Between the answer and the right number."""
LOOKED_UP, CALCULATED = 0.3, 0.15
"""What a wrong answer earns: for the share of records that were seen, and for having calculated the right number."""
ERROR = "Execution error in "
"""How `dspy.ReAct` begins the observation of a tool that raised."""

LOOK_UP = "Look up every good that the question names before calculating."
REBATE = "A rebate belongs to a maker: look up the maker that the record of the good names."
ONE_NAME = "Look up one plain name at a time, exactly as it is written."
PLAIN_NUMBERS = "Calculate with plain numbers and signs only: no units, no words, no commas."
CALCULATE = "Calculate the answer in one expression, from the numbers in the records."
END = "End as soon as the number is known: the turns ran out."
TAKE_OVER = "Answer with the number that was calculated last, unrounded and without words."


@dataclass(frozen=True)
class Turn:
    """One tool call."""

    tool: object
    observation: object

    @property
    def failed(self) -> bool:
        """Whether the tool raised."""
        return isinstance(self.observation, str) and self.observation.startswith(ERROR)


@dataclass(frozen=True)
class Run:
    """A prediction beside its example, ready to be graded."""

    right_answer: float
    names: tuple[str, ...]
    """What must be looked up."""
    answer: object
    turns: tuple[Turn, ...]

    @property
    def right(self) -> bool:
        """Whether the answer is."""
        return near(self.answer, self.right_answer)

    @property
    def missing(self) -> list[str]:
        """The names whose record was never seen."""
        seen = [turn.observation for turn in self.turns]
        return [name for name in self.names if records()[name.lower()] not in seen]

    @property
    def looked_up(self) -> float:
        """The share of records that were seen."""
        return 1 - len(self.missing) / len(self.names)

    @property
    def calculated(self) -> bool:
        """Whether the right number came from the calculator."""
        return any(turn.tool == "calculator" and near(turn.observation, self.right_answer) for turn in self.turns)

    @property
    def score(self) -> float:
        """1 for the right answer, however it came about; else less than a half, for what was done towards it."""
        return 1.0 if self.right else LOOKED_UP * self.looked_up + CALCULATED * self.calculated


def near(value: object, right: float) -> bool:
    """Whether it is a number, or the text of one, close to the right one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return False
    return math.isfinite(number) and abs(number - right) <= TOLERANCE


def turns_of(trajectory: object) -> tuple[Turn, ...]:
    """The tool calls of a ReAct trajectory, in order; none if it is not one."""
    if not isinstance(trajectory, dict):
        return ()
    count = sum(str(name).startswith("tool_name_") for name in trajectory)
    return tuple(
        Turn(trajectory.get(f"tool_name_{place}"), trajectory.get(f"observation_{place}")) for place in range(count)
    )


def judge_react(run: Run) -> tuple[float, str]:
    """1 if the answer is right; else half for the records seen, half for the right number calculated."""
    if run.right:
        return 1.0, "Right."
    score = (run.looked_up + run.calculated) / 2
    return score, " ".join(shortcomings(run)) or "Right."


def shortcomings(run: Run) -> list[str]:
    """What the calls lacked, the first cause first."""
    said = []
    if run.missing:
        said.append(f"Never looked up: {quoted(run.missing)}.")
        said += [LOOK_UP] if any(name not in makers() for name in run.missing) else []
        said += [REBATE] if any(name in makers() for name in run.missing) else []
    failed = {turn.tool for turn in run.turns if turn.failed}
    said += [ONE_NAME] if "lookup" in failed else []
    said += [PLAIN_NUMBERS] if "calculator" in failed else []
    if not run.calculated:
        said.append(f'"{run.right_answer:g}" was never calculated. {CALCULATE}')
    if run.turns and run.turns[-1].tool != "finish":
        said.append(END)
    return said


def judge_extract(run: Run) -> tuple[float, str]:
    """1 if the answer is right, 0 if it is not though the trajectory had it; else the program's score."""
    if run.right:
        return 1.0, "Right."
    if run.calculated:
        return 0.0, f'Answered "{run.answer}", although "{run.right_answer:g}" had been calculated. {TAKE_OVER}'
    return run.score, f'The trajectory did not hold "{run.right_answer:g}".'


def quoted(names: Sequence[str]) -> str:
    """Names for feedback: quotes keep them from being taken for a lesson."""
    return ", ".join(f'"{name}"' for name in names)
