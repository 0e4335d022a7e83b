"""The program: search, note, search again with the notes, and judge."""

from typing import Literal

import dspy

from .corpus import Corpus, corpus_at

PASSAGES = 3
"""Documents that one search brings."""
QUERY_SEED = "Write a search query."
SUMMARY_SEED = "Summarize the passages."
VERDICT_SEED = "Judge the claim."
Verdict = Literal["SUPPORTED", "NOT_SUPPORTED"]


class HoverProgram(dspy.Module):  # type: ignore[misc]
    """`query1`, `summarize1`, `query2`, ..., the last hop's `query`, and `verdict` where one is asked for.

    The last hop has no `summarize`: the verdict reads its passages. Searching is no call of an LM.
    """

    def __init__(self, hops: int, corpus: str | None, verdict: bool) -> None:
        """Builds the predictors, and the corpus's index if this process has none yet."""
        super().__init__()
        self.hops = hops
        self.corpus = corpus  # its path: copies of the program share the index
        corpus_at(corpus)
        for hop in range(1, hops + 1):
            notes = "claim, notes" if hop > 1 else "claim"
            setattr(self, f"query{hop}", dspy.Predict(dspy.Signature(f"{notes} -> query", QUERY_SEED)))
            if hop < hops:
                signature = dspy.Signature(f"{notes}, passages -> summary", SUMMARY_SEED)
                setattr(self, f"summarize{hop}", dspy.Predict(signature))
        if verdict:
            signature = dspy.Signature("claim, notes, passages -> verdict", VERDICT_SEED)
            self.verdict = dspy.Predict(signature.with_updated_fields("verdict", type_=Verdict))

    def forward(self, claim: str) -> dspy.Prediction:
        """Runs the hops. The prediction has one query and one list of titles a hop, for the metric to grade."""
        corpus = corpus_at(self.corpus)
        queries: list[str] = []
        retrieved: list[list[str]] = []
        summaries: list[str] = []
        passages = ""
        for hop in range(1, self.hops + 1):
            notes = {"notes": "\n".join(summaries)} if hop > 1 else {}
            queries.append(getattr(self, f"query{hop}")(claim=claim, **notes).query)
            titles, passages = search(corpus, queries[-1])
            retrieved.append(titles)
            if hop < self.hops:
                summaries.append(getattr(self, f"summarize{hop}")(claim=claim, **notes, passages=passages).summary)
        verdict = {}
        if hasattr(self, "verdict"):
            judged = self.verdict(claim=claim, notes="\n".join(summaries), passages=passages)
            verdict = {"verdict": judged.verdict}
        return dspy.Prediction(queries=queries, retrieved=retrieved, summaries=summaries, **verdict)


def search(corpus: Corpus, query: object) -> tuple[list[str], str]:
    """The titles found, and the passages as a predictor reads them."""
    found = corpus.search(query, PASSAGES) if isinstance(query, str) else ()
    text = "\n".join(f"{document.title}: {document.text}" for document in found)
    return [document.title for document in found], text or "No passage was found."
