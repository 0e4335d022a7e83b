"""Hover: the invented world and its index, claims and splits, grades worked by hand, and the program run for real."""

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import dspy
import pytest

from fst_optimizer.evolve.extractive import is_general, lessons, sentences
from fst_optimizer.evolve.gepa_adapter import Trajectory, reflective_entries
from fst_optimizer.program.texts import apply_texts
from fst_optimizer.task_kit import split_by_hash
from fst_optimizer.tasks import load_task
from fst_optimizer.testing import chat_answer
from fst_optimizer.types import Outcome, items_of
from helpers.collecting import collect

task = load_task("programs/hover").module
package = sys.modules[task.__package__]
world, claims, corpus, grading, program = (
    sys.modules[f"{task.__package__}.{name}"] for name in ("world", "claims", "corpus", "grading", "program")
)
INVENTED = [name for name, variant in task.VARIANTS.items() if not variant.real]


# -- the world and its index --------------------------------------------------------------------------------------


def test_the_world_has_352_documents_with_different_titles():
    assert len(world.entities()) == len(world.by_title()) == 144 + 96 + 64 + 32 + 16


def test_every_link_leads_to_the_next_kind_and_is_named_in_the_text():
    order = [kind.name for kind in world.KINDS]
    for entity in world.entities():
        if entity.kind.name == "range":
            assert entity.target == ""
        else:
            assert order.index(world.by_title()[entity.target].kind.name) == order.index(entity.kind.name) + 1
            assert entity.target in entity.text


def test_a_document_reads_as_written_by_hand():
    town = next(kind for kind in world.KINDS if kind.name == "town")
    assert world.Entity(town, "Velm", "River Ish", ("March", "salt", "five")).text == (
        "Velm lies on the River Ish. It holds its fair in March. It sells salt. It has five gates."
    )


def test_a_title_finds_its_document_first():
    index = corpus.corpus_at(None)
    assert all(index.search(entity.title, 1)[0].title == entity.title for entity in world.entities())


def test_words_that_no_document_has_find_nothing():
    index = corpus.corpus_at(None)
    assert index.search("", 3) == index.search("the of", 3) == index.search("xylophone!", 3) == ()


def test_equal_scores_come_in_the_order_of_the_corpus():
    documents = [corpus.Document(title, "wool") for title in ("one", "two", "three")]
    assert corpus.Corpus(documents).search("wool", 2) == tuple(documents[:2])


def test_sixty_four_threads_find_what_one_thread_finds():
    index = corpus.corpus_at(None)
    queries = [claim.text for claim in claims.draw_claims("train", 512, 4, 0)]
    alone = [index.search(query, 5) for query in queries]
    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(lambda query: index.search(query, 5), queries)) == alone


def test_a_process_indexes_a_corpus_once_even_when_asked_by_many_threads(monkeypatch):
    monkeypatch.setattr(corpus, "_CORPORA", {})
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: corpus.corpus_at(None), range(16)))
    assert len({id(one) for one in made}) == 1


def test_copies_of_the_program_share_the_index():
    built = task.build_program()
    copied = apply_texts(built, {"query1": "Search."})
    assert not [value for value in vars(copied).values() if isinstance(value, corpus.Corpus)]


def test_without_bm25s_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    monkeypatch.setattr(corpus, "_CORPORA", {})
    with pytest.raises(ValueError, match="pip install bm25s"):
        task.build_program()


# -- claims and splits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hops", [2, 3, 4])
def test_a_true_claim_repeats_its_documents_and_a_false_one_changes_one_property(hops):
    predicates = [one.text.format(value) for kind in world.KINDS for one in kind.properties for value in one.values]
    for claim in claims.draw_claims("train", 200, hops, 0):
        evidence = [world.by_title()[title].text for title in claim.titles]
        said = [predicate for predicate in predicates if re.search(rf"{predicate}[,.]", claim.text)]
        held = [predicate for predicate in said if any(f"{predicate}." in text for text in evidence)]
        assert len(said) == hops
        assert len(held) == hops - (claim.label == "NOT_SUPPORTED")


@pytest.mark.parametrize("hops", [2, 3, 4])
def test_a_claim_names_its_first_document_and_no_other(hops):
    for claim in claims.draw_claims("val", 200, hops, 0):
        assert [title in claim.text for title in claim.titles] == [True] + [False] * (hops - 1)


@pytest.mark.parametrize("variant", INVENTED)
def test_splits_are_disjoint_sized_and_repeatable(variant):
    splits = {split: task.load(split, variant=variant) for split in task.SIZES}
    asked = {split: {one.claim for one in examples} for split, examples in splits.items()}
    first = {split: {one.titles[0] for one in examples} for split, examples in splits.items()}
    assert {split: len(texts) for split, texts in asked.items()} == task.SIZES
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not asked[one] & asked[other]
        assert not first[one] & first[other]
    assert task.load("test", 5, variant=variant) == splits["test"][:5]
    labels = [one.label for examples in splits.values() for one in examples]
    assert 0.4 < labels.count("SUPPORTED") / len(labels) < 0.6


@pytest.mark.parametrize("hops", [2, 3, 4])
def test_every_split_has_as_many_claims_as_may_be_asked_for(hops):
    for split in task.SIZES:
        assert len(task.load(split, task.LARGEST_SIZE, variant=f"{hops}-hop")) == task.LARGEST_SIZE


def test_another_seed_draws_other_claims():
    assert {one.claim for one in task.load("val", 50)} != {one.claim for one in task.load("val", 50, seed=1)}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown variant '5-hop'"):
        task.build_program("5-hop")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        task.load("dev")
    with pytest.raises(ValueError, match="size must be between"):
        task.load("train", 10**6)
    with pytest.raises(ValueError, match="no predictor 'query4'"):
        task.metric(example(), dspy.Prediction(), pred_name="query4")


# -- grades and feedback ------------------------------------------------------------------------------------------


def example(variant="3-hop", label="SUPPORTED"):
    """The first true 3-hop claim of the training set, about an object, a maker and a town."""
    drawn = (one for one in task.load("train", variant=variant) if one.label == label)
    return next(one for one in drawn if world.by_title()[one.titles[0]].kind.name == "object")


def prediction(one, *hops, verdict="SUPPORTED", summaries=("", "")):
    """Found at each hop the gold documents at these places."""
    return dspy.Prediction(
        queries=["q"] * len(hops),
        retrieved=[[one.titles[place] for place in places] for places in hops],
        summaries=list(summaries),
        verdict=verdict,
    )


@pytest.mark.parametrize(
    ("hops", "verdict", "score"),
    [
        (([0], [1], [2]), "SUPPORTED", 1.0),
        (([0, 1, 2], [], []), "SUPPORTED", 1.0),
        (([0], [1], [2]), "NOT_SUPPORTED", 1 / 2),
        (([0], [1], [1]), "SUPPORTED", 2 / 3),
        (([0], [], []), "NOT_SUPPORTED", 1 / 6),
        (([], [], []), "SUPPORTED", 0.0),
    ],
)
def test_the_score_is_the_share_found_and_half_of_it_when_the_verdict_is_wrong(hops, verdict, score):
    one = example()
    assert task.metric(one, prediction(one, *hops, verdict=verdict)).score == pytest.approx(score)


def test_retrieval_variants_ask_for_no_verdict():
    one = example("3-hop-retrieval")
    assert task.metric(one, prediction(one, [0], [1], [2], verdict="NOT_SUPPORTED")).score == 1.0
    with pytest.raises(ValueError, match="no predictor 'verdict'"):
        task.metric(one, dspy.Prediction(), pred_name="verdict")


def test_a_query_is_judged_on_what_its_search_brought():
    one = example()
    wasted = prediction(one, [0], [0], [1])
    scores = [task.metric(one, wasted, pred_name=f"query{hop}").score for hop in (1, 2, 3)]
    assert scores == [1.0, 0.0, 1.0]
    feedback = task.metric(one, wasted, pred_name="query2").feedback
    assert feedback == (
        f'The query "q" brought none of "{one.titles[1]}", "{one.titles[2]}". '
        f"The document about the maker was not found. {grading.SEARCH}"
    )


def test_a_query_with_nothing_left_to_find_is_right():
    one = example()
    assert task.metric(one, prediction(one, [0, 1, 2], [], []), pred_name="query3").score == 1.0


def test_a_summary_is_judged_on_the_missing_names_that_it_passes_on():
    one = example()
    kept = prediction(one, [0], [1], [2], summaries=(f"it is by {one.titles[1].lower()}", "nothing"))
    assert task.metric(one, kept, pred_name="summarize1").score == 1.0
    lost = task.metric(one, kept, pred_name="summarize2")
    assert (lost.score, lost.feedback) == (0.0, f'The summary lost "{one.titles[2]}". {grading.SUMMARIZE}')


def test_a_summary_of_passages_that_name_nothing_new_gets_the_programs_score():
    one = example()
    found = prediction(one, [2], [], [])
    judged = task.metric(one, found, pred_name="summarize1")
    assert judged.score == task.metric(one, found).score == pytest.approx(1 / 3)


def test_a_wrong_verdict_is_told_whether_the_evidence_was_there():
    one = example()
    whole = task.metric(one, prediction(one, [0], [1], [2], verdict="NOT_SUPPORTED"), pred_name="verdict")
    part = task.metric(one, prediction(one, [0], [1], [], verdict="NOT_SUPPORTED"), pred_name="verdict")
    assert whole.feedback == f'Judged "NOT_SUPPORTED", expected "SUPPORTED". {grading.COMPARE}'
    assert part.feedback == f'Judged "NOT_SUPPORTED", expected "SUPPORTED". {grading.WAIT} It lacked "{one.titles[2]}".'


@pytest.mark.parametrize("variant", INVENTED)
def test_the_reference_scores_one_and_a_spoilt_one_less(variant):
    names = [name for name, _ in task.build_program(variant).named_predictors()]
    assert names == task.predictor_names(task.VARIANTS[variant])
    for split in task.SIZES:
        for one in task.load(split, 64, variant=variant):
            right = task.reference(one)
            assert task.metric(one, right).score == 1.0
            assert {task.metric(one, right, pred_name=name).score for name in names} == {1.0}
            for place in range(len(one.titles)):
                spoilt = task.reference(one)
                spoilt.retrieved[place] = ["Elsewhere"]
                assert task.metric(one, spoilt).score < 1.0
            if "verdict" in names:
                assert task.metric(one, dspy.Prediction(**{**right, "verdict": "MAYBE"})).score == 0.5


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"queries": None, "retrieved": None, "summaries": None, "verdict": None},
        {"queries": 3, "retrieved": "all of them", "summaries": {}, "verdict": 7},
        {"queries": [None], "retrieved": [None, 3, [4]], "summaries": [[]], "verdict": ["SUPPORTED"]},
        {"queries": [], "retrieved": [], "summaries": [], "verdict": ""},
    ],
)
def test_malformed_predictions_score_zero(fields):
    one = example()
    assert task.metric(one, dspy.Prediction(**fields)).score == 0.0
    for name in task.predictor_names(task.VARIANTS["3-hop"]):
        assert task.metric(one, dspy.Prediction(**fields), pred_name=name).score == 0.0


@pytest.mark.parametrize(
    "sentence",
    [
        *grading.MISSED.values(),
        grading.MISSED_OTHER,
        *(grading.SEARCH, grading.SUMMARIZE, grading.COMPARE, grading.WAIT),
    ],
)
def test_the_reasons_name_nothing_of_an_example(sentence):
    for one in task.load("train", 64):
        entry = {"Inputs": dict(one.inputs()), "Instance": tuple(map(str, one.labels().values()))}
        assert [is_general(part, entry) for part in sentences(sentence)] == [True]


# -- HoVer's own files --------------------------------------------------------------------------------------------


def record(number, hops=3, **changes):
    facts = [[f"Title{number} part{place}", place] for place in range(hops)]
    whole = {
        "uid": f"u{number}",
        "claim": f"Claim number {number}.",
        "supporting_facts": [*facts, facts[0]],
        "label": "NOT_SUPPORTED" if number % 2 else "SUPPORTED",
        "num_hops": hops,
    }
    return {**whole, **changes}


@pytest.fixture
def real(tmp_path, monkeypatch):
    """A tiny copy of HoVer: 40 claims with 3 hops and 4 with 2, and a document for each title."""
    records = [record(number) for number in range(40)] + [record(number, 2) for number in range(40, 44)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text(json.dumps(records[:30]))
    (tmp_path / "data" / "dev.json").write_text(json.dumps(records[30:]))
    titles = [title for one in records for title, _ in one["supporting_facts"][:-1]]
    texts = [f"{title} comes before {after}." for title, after in zip(titles, [*titles[1:], "all"], strict=True)]
    rows = [
        {"title": title, "text": [text] if "1" in title else text} for title, text in zip(titles, texts, strict=True)
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("FST_HOVER_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("FST_HOVER_CORPUS", str(tmp_path / "corpus.jsonl"))
    return tmp_path


def test_real_claims_are_read_by_hops_and_split_by_their_text(real):
    splits = {split: task.load(split, variant="real") for split in task.SIZES}
    texts = [one.claim for examples in splits.values() for one in examples]
    assert sorted(texts) == sorted(f"Claim number {number}." for number in range(40))
    assert all(splits.values())
    assert all({split_by_hash(one.claim) for one in examples} == {split} for split, examples in splits.items())
    assert sum(len(task.load(split, variant="real-2-hop")) for split in task.SIZES) == 4
    one = splits["train"][0]
    number = one.claim.split()[-1].rstrip(".")
    assert one.titles == [f"Title{number} part{place}" for place in range(3)]
    assert one.label == ("NOT_SUPPORTED" if int(number) % 2 else "SUPPORTED")


def test_one_file_of_real_claims_will_do(real, monkeypatch):
    monkeypatch.setenv("FST_HOVER_DATA", str(real / "data" / "train.json"))
    assert sum(len(task.load(split, variant="real")) for split in task.SIZES) == 30


def test_references_score_one_on_real_claims_and_missed_documents_are_told_without_a_kind(real):
    for split in task.SIZES:
        for one in task.load(split, variant="real"):
            assert task.metric(one, task.reference(one)).score == 1.0
    judged = task.metric(one, dspy.Prediction(), pred_name="query1")
    assert judged.feedback.endswith(f"{grading.MISSED_OTHER} {grading.SEARCH}")


def test_the_real_corpus_is_searched(real):
    assert task.build_program("real").corpus == str(real / "corpus.jsonl")
    assert corpus.corpus_at(str(real / "corpus.jsonl")).search("title7 part0", 1)[0].title == "Title7 part0"


def test_titles_are_compared_without_case_and_found_without_their_brackets():
    assert corpus.fold("Ame\u0301lie  X") == corpus.fold("am\u00e9lie x")
    assert grading.names("She played in Amélie.", "Amélie (film)")


def test_what_is_wrong_with_real_files_is_named(real, monkeypatch):
    data = real / "data" / "train.json"

    def refused(match, *records):
        data.write_text(json.dumps(list(records)))
        with pytest.raises(ValueError, match=match):
            task.load("train", variant="real")

    refused("record 0 lacks label, num_hops", {"uid": 1, "claim": "x", "supporting_facts": []})
    refused("record 1 has the label None", record(0), record(1, label=None))
    refused("supporting_facts", record(0, supporting_facts=[{"key": "Title"}]))
    monkeypatch.setenv("FST_HOVER_DATA", str(data))
    refused("no claims with 3 hops, only with", record(0, 2))
    data.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        task.load("train", variant="real")
    monkeypatch.setenv("FST_HOVER_DATA", str(real / "nowhere"))
    with pytest.raises(ValueError, match="hover_train_release"):
        task.load("train", variant="real")
    monkeypatch.delenv("FST_HOVER_DATA")
    with pytest.raises(ValueError, match="FST_HOVER_DATA is not set"):
        task.load("train", variant="real")


def test_what_is_wrong_with_a_real_corpus_is_named(real, monkeypatch):
    path = real / "other.jsonl"
    monkeypatch.setenv("FST_HOVER_CORPUS", str(path))
    with pytest.raises(ValueError, match="is no file"):
        task.build_program("real")
    path.write_text('{"title": "x", "text": "y"}\n{"title": "x"}\n')
    with pytest.raises(ValueError, match=r"other\.jsonl:2"):
        task.build_program("real")
    path.write_text('{"title": "", "text": ""}\n')
    with pytest.raises(ValueError, match="no words"):
        task.build_program("real")
    monkeypatch.delenv("FST_HOVER_CORPUS")
    with pytest.raises(ValueError, match="FST_HOVER_CORPUS is not set"):
        task.build_program("real")


# -- the program, run for real ------------------------------------------------------------------------------------


def fields(prompt):
    """The inputs of a prompt's last turn, and the first output that it asks for."""
    turn = prompt.rpartition("<|im_start|>user\n")[2]
    inputs = dict(re.findall(r"\[\[ ## (\w+) ## \]\]\n(.*?)(?=\n\n\[\[|\n\nRespond)", turn, re.DOTALL))
    return inputs, re.search(r"starting with the field `\[\[ ## (\w+)", turn)[1]


LINK = re.compile("(?:is the work of|was born in|lies on the|rises in the) ([^.]+)")


def careful(prompt, request):
    """Does by rule what an instructed model should do, from the prompt alone."""
    inputs, output = fields(prompt)
    if output == "query":
        noted = inputs.get("notes", "").rpartition("Next: ")[2]
        return chat_answer(query=noted or re.findall(r"[A-Z]\w+", inputs["claim"].removeprefix("The town of"))[:3])
    passage = inputs["passages"].splitlines()[0]
    if output == "summary":
        return chat_answer(summary=f"{passage} Next: {LINK.search(passage)[1]}")
    evidence = f"{inputs['notes']}\n{passage}"
    clauses = re.split(r", and |, ", inputs["claim"].rstrip("."))
    known = (one.text.format(value) for kind in world.KINDS for one in kind.properties for value in one.values)
    said = [predicate for predicate in known if any(clause.endswith(predicate) for clause in clauses)]
    held = all(f"{predicate}." in evidence for predicate in said)
    return chat_answer(verdict="SUPPORTED" if held else "NOT_SUPPORTED")


def careless(prompt, request):
    """Asks for the whole claim again and again, notes nothing, and believes everything."""
    inputs, output = fields(prompt)
    return chat_answer(
        **{output: {"query": inputs["claim"], "summary": "I cannot say.", "verdict": "SUPPORTED"}[output]}
    )


@pytest.mark.parametrize("variant", INVENTED)
def test_a_careful_reader_scores_one_from_the_prompts_alone(scripted, variant):
    policy = scripted(careful, context_length=20_000)
    for rollout in collect(policy, task.build_program(variant), task.metric, task.load("test", 12, variant=variant)):
        assert (rollout.outcome, rollout.score) == (Outcome.OK, 1.0)
        assert [call.predictor for call in rollout.calls] == task.predictor_names(task.VARIANTS[variant])
        assert set(rollout.predictor_scores.values()) == {1.0}


def test_the_claim_as_every_query_finds_about_a_third_and_is_told_why(scripted):
    examples = task.load("test", 16)
    rollouts = collect(scripted(careless, context_length=20_000), task.build_program("3-hop"), task.metric, examples)
    assert {rollout.outcome for rollout in rollouts} == {Outcome.OK}
    assert 0 < sum(rollout.score for rollout in rollouts) / len(rollouts) < 0.5
    seen = [Trajectory(item, rollout) for item, rollout in zip(items_of(examples, "train"), rollouts, strict=True)]
    assert grading.SEARCH in lessons(reflective_entries("query2", seen))
    assert grading.SUMMARIZE in lessons(reflective_entries("summarize1", seen))
    assert lessons(reflective_entries("query1", seen)) == {}


def test_an_invalid_verdict_is_a_parse_error(scripted):
    def unsure(prompt, request):
        return careful(prompt, request).replace("SUPPORTED", "MAYBE").replace("NOT_MAYBE", "MAYBE")

    (rollout,) = collect(
        scripted(unsure, context_length=20_000),
        task.build_program("2-hop"),
        task.metric,
        task.load("test", 1, variant="2-hop"),
    )
    assert (rollout.outcome, rollout.score) == (Outcome.PARSE_ERROR, 0.0)


def test_the_settings_are_valid_for_every_variant():
    for variant in task.VARIANTS:
        assert load_task(f"programs/hover:{variant}").config().rollout.batch_size == 16
