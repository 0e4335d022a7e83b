"""How a run is graded: what each search brought, what each summary passed on, and the verdict; with the reasons."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import dspy

from .corpus import Corpus, fold
from .world import by_title

SEARCH = "Search for a name that the claim or the notes give and that no passage is about yet, and for nothing else."
MISSED = {
    "object": "The document about the thing that the claim begins with was not found.",
    "maker": "The document about the maker was not found.",
    "town": "The document about the town was not found.",
    "river": "The document about the river was not found.",
    "range": "The document about the mountains was not found.",
}
MISSED_OTHER = "A document that the claim relies on was not found."
SUMMARIZE = "Keep every name that the passages give: those that no passage is about yet must be searched for next."
COMPARE = "Compare each statement of the claim with its document, and reject the claim if a single one differs."
WAIT = "The verdict was given before all of the claim's documents had been found."


@dataclass(frozen=True)
class Run:
    """A prediction beside its example, ready to be graded."""

    gold: tuple[str, ...]
    """Titles, in the order of the claim where that is known."""
    label: str
    asks_verdict: bool
    queries: tuple[str, ...]
    """One a hop, as `summaries` and `retrieved`; what a prediction lacks is empty."""
    summaries: tuple[str, ...]
    retrieved: tuple[tuple[str, ...], ...]
    verdict: object

    def missing_after(self, hop: int) -> tuple[str, ...]:
        """Gold titles that the first `hop` searches did not bring."""
        found = {fold(title) for titles in self.retrieved[:hop] for title in titles}
        return tuple(title for title in self.gold if fold(title) not in found)

    @property
    def right(self) -> bool:
        """Whether the verdict is, where one is asked for."""
        return not self.asks_verdict or self.verdict == self.label

    @property
    def score(self) -> float:
        """The share of gold documents found, half of it only with the right verdict: a guess earns little."""
        found = 1 - len(self.missing_after(len(self.retrieved))) / len(self.gold)
        return found if self.right else found / 2


def run_of(example: dspy.Example, prediction: dspy.Prediction, hops: int, asks_verdict: bool) -> Run:
    """What the prediction says, whatever its fields are."""
    queries, summaries = (strings(getattr(prediction, name, None), hops) for name in ("queries", "summaries"))
    lists = getattr(prediction, "retrieved", None)
    retrieved = tuple(strings(titles) for titles in lists) if isinstance(lists, list) else ()
    retrieved += ((),) * (hops - len(retrieved))
    verdict = getattr(prediction, "verdict", None)
    return Run(tuple(example.titles), example.label, asks_verdict, queries, summaries, retrieved, verdict)


def strings(values: object, count: int = 0) -> tuple[str, ...]:
    """The texts of a list, others as empty ones; at least `count` of them."""
    found = tuple(value if isinstance(value, str) else "" for value in values) if isinstance(values, list) else ()
    return found + ("",) * (count - len(found))


def judge_query(run: Run, hop: int) -> tuple[float, str]:
    """1 if the search brought a document that was missing, or none was; else 0."""
    before, after = run.missing_after(hop - 1), run.missing_after(hop)
    if len(after) < len(before) or not before:
        return 1.0, "Right."
    next_one = by_title().get(before[0])
    kind = MISSED_OTHER if next_one is None else MISSED[next_one.kind.name]
    return 0.0, f'The query "{run.queries[hop - 1]}" brought none of {quoted(before)}. {kind} {SEARCH}'


def judge_summary(run: Run, hop: int, corpus: Corpus) -> tuple[float, str]:
    """The share of the missing titles named in this hop's passages that the summary names too.

    Where the passages name none there is nothing to judge it by but the program's score.
    """
    passages = " ".join(corpus.texts.get(fold(title), "") for title in run.retrieved[hop - 1])
    missing = run.missing_after(hop)
    named = [title for title in missing if names(passages, title)]
    if not missing:
        return 1.0, "Right."
    if not named:
        return run.score, f"The passages did not name {quoted(missing)}."
    lost = [title for title in named if not names(run.summaries[hop - 1], title)]
    if not lost:
        return 1.0, "Right."
    return 1 - len(lost) / len(named), f"The summary lost {quoted(lost)}. {SUMMARIZE}"


def judge_verdict(run: Run) -> tuple[float, str]:
    """1 if the verdict is right, else 0."""
    if run.right:
        return 1.0, "Right."
    missing = run.missing_after(len(run.retrieved))
    reason = f"{WAIT} It lacked {quoted(missing)}." if missing else COMPARE
    return 0.0, f'Judged "{run.verdict}", expected "{run.label}". {reason}'


def judge(name: str, run: Run, corpus: Corpus) -> tuple[float, str]:
    """One predictor's score and feedback."""
    if name == "verdict":
        return judge_verdict(run)
    hop = int(name[-1])
    return judge_query(run, hop) if name.startswith("query") else judge_summary(run, hop, corpus)


def names(text: str, title: str) -> bool:
    """Whether the text has the title in it, without what brackets add to it."""
    return fold(re.sub(r" \([^)]*\)$", "", title)) in fold(text)


def quoted(titles: Sequence[str]) -> str:
    """Titles for feedback: quotes keep them from being taken for a lesson."""
    return ", ".join(f'"{title}"' for title in titles)
