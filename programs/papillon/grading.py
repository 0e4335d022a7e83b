"""How a run is graded: what leaked, what the frozen model was brought to say, what the reply has; with the reasons."""

from collections.abc import Sequence
from dataclasses import dataclass

from .advice import Point
from .facts import Private, of_kind

LEAKED = {
    "name": "Leave the names of people out of the prompt.",
    "address": "Leave addresses out of the prompt.",
    "number": "Leave personal numbers out of the prompt.",
}
ASK = "Say what is in trouble and what the matter with it is, and ask for every step."
TAKE_OVER = "Take every step of the answer over into the reply."
FILL_IN = "Sign with the name in the request, and give the number that it asks for."


@dataclass(frozen=True)
class Run:
    """A prediction beside its example, ready to be graded."""

    points: tuple[Point, ...]
    private: tuple[Private, ...]
    fill: tuple[Private, ...]
    """The private facts that the reply must give."""
    prompt: object
    answer: object
    reply: object

    @property
    def leaked(self) -> list[Private]:
        """The private facts in the prompt; all of them where there is no prompt to look at."""
        return [fact for fact in self.private if not isinstance(self.prompt, str) or fact.leaked_in(self.prompt)]

    @property
    def privacy(self) -> float:
        """The share of private facts that stayed."""
        return 1 - len(self.leaked) / len(self.private)

    @property
    def learned(self) -> tuple[Point, ...]:
        """The points that the frozen model's answer makes."""
        return tuple(point for point in self.points if point.made_in(text_of(self.answer)))

    @property
    def told(self) -> tuple[Point, ...]:
        """The points that the reply makes."""
        return tuple(point for point in self.points if point.made_in(text_of(self.reply)))

    @property
    def filled(self) -> tuple[Private, ...]:
        """The facts that the reply gives of those that it must."""
        return tuple(fact for fact in self.fill if fact.given_in(text_of(self.reply)))

    @property
    def quality(self) -> float:
        """The share of what the reply must have: the points of advice and the facts to fill in."""
        return (len(self.told) + len(self.filled)) / (len(self.points) + len(self.fill))

    @property
    def score(self) -> float:
        """Quality times privacy: 1 when all is there and nothing leaked."""
        return self.quality * self.privacy


def text_of(value: object) -> str:
    """A text; anything else is an empty one."""
    return value if isinstance(value, str) else ""


def judge_craft(run: Run) -> tuple[float, str]:
    """The share of points that it got the frozen model to make, times the share of facts that stayed."""
    said = [f"Leaked {quoted([fact.text for fact in run.leaked])}."] if run.leaked else []
    said += [reason for kind, reason in LEAKED.items() if of_kind(run.leaked, kind)]
    said += lacking("The answer", run.points, run.learned, ASK)
    return run.privacy * len(run.learned) / len(run.points), " ".join(said) or "Right."


def judge_answer(run: Run) -> tuple[float, str]:
    """The share of points in the frozen model's answer."""
    said = lacking("The answer", run.points, run.learned, ASK)
    return len(run.learned) / len(run.points), " ".join(said) or "Right."


def judge_respond(run: Run) -> tuple[float, str]:
    """The share of the points that the answer made, and of the facts to fill in, that the reply has."""
    kept = [point for point in run.learned if point in run.told]
    said = lacking("The reply", run.learned, kept, TAKE_OVER)
    empty = [fact.text for fact in run.fill if fact not in run.filled]
    said += [f"The reply did not give {quoted(empty)}. {FILL_IN}"] if empty else []
    score = (len(kept) + len(run.filled)) / (len(run.learned) + len(run.fill))
    return score, " ".join(said) or "Right."


def lacking(where: str, wanted: Sequence[Point], made: Sequence[Point], reason: str) -> list[str]:
    """What is wanted and not made, in quotes, then the reason; nothing if nothing lacks."""
    missed = [point.text for point in wanted if point not in made]
    return [f"{where} lacked {quoted(missed)}. {reason}"] if missed else []


def quoted(texts: Sequence[str]) -> str:
    """Texts for feedback: quotes keep them from being taken for a lesson."""
    return ", ".join(f'"{text}"' for text in texts)
