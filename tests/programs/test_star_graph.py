"""Star graphs: puzzles that have one answer, grades worked by hand, splits, and programs run by the collector."""

import random

import dspy
import pytest

from fst_optimizer.evolve.extractive import lessons
from fst_optimizer.tasks import load_task
from fst_optimizer.testing import chat_answer
from fst_optimizer.types import Outcome
from helpers.collecting import collect
from programs.star_graph import graph

task = load_task("programs/star_graph").module

STAR = "33-17, 17-42, 81-33, 55-42, 17-60, 60-61"
"""Three arms of two edges about 17: 17 33 81, 17 42 55, 17 60 61."""
SHAPES = ("d2-l2", "d2-l20", "d5-l5", "d20-l4", "d8-l11")


def example(variant: str = "d3-l2") -> dspy.Example:
    return dspy.Example(graph=STAR, start="17", goal="81", path="17 33 81", variant=variant).with_inputs(
        "graph", "start", "goal"
    )


def score(path: object, variant: str = "d3-l2") -> float:
    return task.metric(example(variant), dspy.Prediction(path=path)).score


# --- Graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_puzzle_is_a_star_and_its_path_is_the_only_way(shape: str) -> None:
    variant = task.variant_named(shape)
    puzzle = graph.draw(random.Random(shape), variant.degree, variant.length)
    neighbours: dict[str, list[str]] = {}
    for edge in puzzle.graph.split(", "):
        one, other = edge.split("-")
        neighbours.setdefault(one, []).append(other)
        neighbours.setdefault(other, []).append(one)
    ends = [node for node, around in neighbours.items() if len(around) == 1]
    assert len(neighbours) == variant.degree * variant.length + 1
    assert len(ends) == len(neighbours[puzzle.start]) == variant.degree
    assert puzzle.goal in ends
    walk = [puzzle.goal]
    while walk[-1] != puzzle.start:
        (onward,) = [node for node in neighbours[walk[-1]] if node not in walk]
        walk.append(onward)
    assert tuple(reversed(walk)) == puzzle.path
    assert len(puzzle.path) == variant.length + 1


def test_neither_the_order_of_edges_nor_of_their_ends_tells_the_way() -> None:
    rng = random.Random(0)
    puzzles = [graph.draw(rng, 5, 5) for _ in range(400)]
    first = [puzzle.graph.split(", ")[0].split("-") for puzzle in puzzles]
    outward = [puzzle.graph.find(f"{puzzle.path[0]}-{puzzle.path[1]}") >= 0 for puzzle in puzzles]
    on_path = [set(edge) <= set(puzzle.path) for edge, puzzle in zip(first, puzzles, strict=True)]
    assert 0.43 < sum(outward) / 400 < 0.57, "either end of an edge may come first"
    assert 0.12 < sum(on_path) / 400 < 0.28, "five of 25 edges are on the path"


def test_the_same_graph_in_another_order_is_the_same_puzzle() -> None:
    one = graph.Puzzle("17-42, 42-33", "17", "33", ("17", "42", "33"))
    other = graph.Puzzle("33-42, 17-42", "17", "33", ("17", "42", "33"))
    assert one.key == other.key == "17-42 33-42 17 33"
    assert task.split_of(one) == task.split_of(other)


@pytest.mark.parametrize("text", ["17 33 81", "17 -> 33 -> 81", "17-33-81", "[17, 33, 81]", "Path: 17, 33, 81."])
def test_a_path_is_read_whatever_stands_between_its_nodes(text: str) -> None:
    assert graph.nodes_in(text) == ("17", "33", "81")
    assert score(text) == 1.0
    assert graph.nodes_in([17, 33, 81]) == ("17", "33", "81")


# --- Grades and feedback ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("17 33 81", 1.0),
        ("17 42 55", 0.1),  # a whole wrong arm: two steps of two along edges, no inner node
        ("17 42 81", 0.05),  # one step of two
        ("17 81", 0.0),
        ("17 33", 0.05 + 0.3),  # one step of two, the inner node at its place
        ("17 33 17 33 81", 0.1 * 2 / 4 + 0.3 / 3),  # back and forth: new nodes are 33 and 81, placed is 33 of three
        ("81 33 17", 0.1 + 0.3),  # reversed: along edges, and the only inner node is at its place by symmetry
        ("17 033 81", 0.0),
        ("17", 0.0),
    ],
)
def test_a_wrong_path_earns_little_and_only_for_steps_and_places(path: str, expected: float) -> None:
    assert score(path) == pytest.approx(expected)
    assert score(path, "d3-l2-exact") == float(expected == 1.0)


@pytest.mark.parametrize(
    "path", ["", "   ", "no way", None, 7, True, {"path": 17}, [], [None], b"17 33 81", "9" * 9999]
)
@pytest.mark.parametrize("variant", ["d3-l2", "d3-l2-two", "d3-l2-exact"])
def test_malformed_answers_score_zero_and_raise_nothing(path: object, variant: str) -> None:
    prediction = dspy.Prediction(path=path, plan=path, reasoning=path)
    assert task.metric(example(variant), prediction).score == 0.0
    names = [name for name, _ in task.build_program(variant).named_predictors()]
    assert [task.metric(example(variant), prediction, None, name, None).score for name in names] == [0.0] * len(names)


@pytest.mark.parametrize("prediction", [dspy.Prediction(), dspy.Prediction(plan="81 33 17"), None])
def test_a_prediction_without_a_path_scores_zero(prediction: object) -> None:
    assert task.metric(example("d3-l2-two"), prediction).score == 0.0


def test_feedback_quotes_the_instance_and_then_names_the_strategy() -> None:
    strategy = "Trace the path backwards from the goal, then reverse it."
    along = "Every step must follow an edge of the graph to a new node."
    ends = "Begin at the start and end at the goal."
    say = {path: task.metric(example(), dspy.Prediction(path=path)).feedback for path in ("17 42 55", "17 42 81", "?")}
    assert say["17 42 55"] == f'Got "17 42 55", expected "17 33 81". {ends} {strategy}'
    assert say["17 42 81"] == f'Got "17 42 81", expected "17 33 81". {along} {strategy}'
    assert say["?"] == (
        f'Got no nodes, expected "17 33 81". Write the numbers of the nodes, in order. {ends} {strategy}'
    )
    assert task.metric(example(), dspy.Prediction(path="17 33 81")).feedback == "Right."


def test_a_rambling_answer_is_cut_in_the_feedback() -> None:
    feedback = task.metric(example(), dspy.Prediction(path="17 33 " * 500)).feedback
    assert len(feedback) < 400


def test_plan_and_answer_have_their_own_scores_and_the_program_has_the_paths() -> None:
    one = example("d3-l2-two")
    prediction = dspy.Prediction(plan="81 joins 33, 33 joins 17", path="17 42 55")
    plan = task.metric(one, prediction, None, "plan", None)
    answer = task.metric(one, prediction, None, "answer", None)
    assert (plan.score, plan.feedback) == (1.0, "Right.")
    assert answer.score == pytest.approx(0.1)
    whole = task.metric(one, prediction)
    assert whole.score == answer.score
    assert whole.feedback == f"plan: Right.\nanswer: {answer.feedback}"
    assert answer.feedback.endswith(task.STRATEGY["answer"])


def test_a_plan_must_begin_at_the_goal() -> None:
    one = example("d3-l2-two")
    plan = task.metric(one, dspy.Prediction(plan="17 42 55", path="17 33 81"), None, "plan", None)
    assert plan.score == pytest.approx(0.1)
    assert plan.feedback == f'Got "17 42 55", expected "81 33 17". {task.STRATEGY["plan"]}'


def test_an_unknown_predictor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no predictor 'plan', only find\.predict"):
        task.metric(example(), dspy.Prediction(), pred_name="plan")


@pytest.mark.parametrize("role", ["find", "plan", "answer"])
def test_a_reflector_without_an_lm_finds_the_strategy(role: str) -> None:
    variant = "d5-l5" if role == "find" else "d5-l5-two"
    name = "find.predict" if role == "find" else role
    entries = []
    for one in task.load("train", 3, variant=variant):
        wrong = dspy.Prediction(path=f"{one.start} {one.goal}", plan=f"{one.goal} {one.start}")
        judged = task.metric(one, wrong, None, name, None)
        entries.append(
            {
                "Inputs": dict(one.inputs()),
                "Generated Outputs": dict(wrong),
                "Feedback": judged.feedback,
                "Score": judged.score,
                "Instance": tuple(str(value) for value in one.labels().values()),
            }
        )
    assert lessons(entries)[task.STRATEGY[role]] == 3


@pytest.mark.parametrize(
    ("variant", "graded", "exact"),
    [
        ("d2-l5", 0.53, 0.48),
        ("d5-l5", 0.27, 0.19),
        ("d10-l5", 0.20, 0.11),
        ("d5-l10", 0.27, 0.19),
        ("d4-l20", 0.29, 0.21),
    ],
)
def test_an_arm_chosen_at_random_earns_what_the_readme_says(variant: str, graded: float, exact: float) -> None:
    rng, scores = random.Random(0), []
    for one in task.load("test", variant=variant):
        around: dict[str, list[str]] = {}
        for edge in one.graph.split(", "):
            a, b = edge.split("-")
            around.setdefault(a, []).append(b)
            around.setdefault(b, []).append(a)
        nodes = [one.start, rng.choice(around[one.start])]
        while onward := [node for node in around[nodes[-1]] if node not in nodes]:
            nodes.append(onward[0])
        scores.append(task.metric(one, dspy.Prediction(path=" ".join(nodes))).score)
    assert round(sum(scores) / len(scores), 2) == graded
    assert round(scores.count(1.0) / len(scores), 2) == exact


# --- Variants and splits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["d2-l2", "d5-l5", "d5-l5-two", "d5-l5-exact", "d10-l5-two-exact", "d4-l20"])
def test_references_score_one_and_corrupted_ones_less(variant: str) -> None:
    names = [name for name, _ in task.build_program(variant).named_predictors()]
    rng = random.Random(variant)
    for one in task.load("val", 64, variant=variant):
        right = task.reference(one)
        assert [task.metric(one, right, None, name, None).score for name in (None, *names)] == [1.0] * (len(names) + 1)
        nodes = one.path.split()
        at = rng.randrange(len(nodes) - 1)
        swapped = [*nodes[:at], nodes[at + 1], nodes[at], *nodes[at + 2 :]]
        for wrong in (nodes[:-1], nodes[1:], nodes[::-1], swapped, [*nodes, nodes[0]], [nodes[0], nodes[-1]]):
            corrupted = dspy.Prediction(**{**right, "path": " ".join(wrong)})
            assert task.metric(one, corrupted).score <= (0.0 if "exact" in variant else 0.4)


def test_suffixes_change_program_and_score_and_not_the_puzzles() -> None:
    puzzles = [
        [(one.graph, one.goal) for one in task.load("test", 5, variant=f"d4-l3{suffix}")]
        for suffix in ("", "-two", "-exact", "-two-exact")
    ]
    assert puzzles[0] == puzzles[1] == puzzles[2] == puzzles[3]
    assert len(task.build_program("d4-l3").predictors()) == 1
    assert len(task.build_program("d4-l3-two-exact").predictors()) == 2
    assert task.load("train", 3) == task.load("train", 3, variant="d5-l5")


@pytest.mark.parametrize("variant", ["d2-l2", "d5-l5-two"])
def test_no_puzzle_is_in_two_splits_and_loading_again_gives_the_same(variant: str) -> None:
    splits = {split: task.load(split, variant=variant) for split in task.SIZES}
    keys = {
        split: {graph.Puzzle(one.graph, one.start, one.goal, ()).key for one in examples}
        for split, examples in splits.items()
    }
    assert {split: len(found) for split, found in keys.items()} == task.SIZES
    assert not keys["train"] & keys["val"]
    assert not keys["train"] & keys["test"]
    assert not keys["val"] & keys["test"]
    assert task.load("test", 5, variant=variant) == splits["test"][:5]


def test_another_seed_draws_other_puzzles_of_the_same_split() -> None:
    first, second = (task.load("val", 50, seed=seed) for seed in (0, 1))
    assert not {one.graph for one in first} & {one.graph for one in second}
    puzzles = [graph.Puzzle(one.graph, one.start, one.goal, ()) for one in second]
    assert {task.split_of(puzzle) for puzzle in puzzles} == {"val"}


@pytest.mark.parametrize("variant", ["", "nope", "d5", "l5-d5", "d5-l5-exact-two", "d5-l5-three", "d5-l5 "])
def test_a_name_that_is_no_variant_is_refused_with_what_is_allowed(variant: str) -> None:
    for function in (task.build_program, task.config, lambda name: task.load("train", 1, variant=name)):
        with pytest.raises(ValueError, match=r"unknown variant.*degree and length from 2 to 20"):
            function(variant)


@pytest.mark.parametrize("variant", ["d1-l5", "d5-l1", "d21-l2", "d2-l21", "d9-l10", "d999-l999-two"])
def test_a_shape_out_of_range_is_refused_with_what_is_allowed(variant: str) -> None:
    with pytest.raises(ValueError, match=r"out of range; give degree and length from 2 to 20, at most 89 nodes"):
        task.build_program(variant)


def test_unknown_splits_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        task.load("dev")
    with pytest.raises(ValueError, match="size must be between 0 and 4096, not -1"):
        task.load("train", -1)


def test_prompts_stay_short() -> None:
    assert max(len(one.graph) for one in task.load("train", 20)) == 25 * 7 - 2
    assert max(len(one.graph) for one in task.load("train", 20, variant="d4-l20")) == 80 * 7 - 2


def test_the_settings_are_valid_for_every_shape() -> None:
    assert task.config("d5-l5-two-exact").rollout.group_size == 8


# --- Running ---------------------------------------------------------------------------------------------------------


def run(scripted, variant: str, answer) -> list:
    """Rollouts of the seed program on three examples; `answer` makes a prediction's fields from an example."""
    examples = task.load("val", 3, variant=variant)

    def complete(prompt, request):
        (one,) = [one for one in examples if one.graph in prompt]
        return chat_answer(**answer(one))

    policy = scripted(complete, context_length=20_000)
    rollouts = collect(policy, task.build_program(variant), task.metric, examples)
    assert [rollout.outcome for rollout in rollouts] == [Outcome.OK] * 3
    return rollouts


@pytest.mark.parametrize(
    ("variant", "predictors"), [("d5-l5", ["find.predict"]), ("d3-l4-two-exact", ["plan", "answer"])]
)
def test_a_program_that_answers_right_scores_one(scripted, variant: str, predictors: list[str]) -> None:
    for rollout in run(scripted, variant, task.reference):
        assert [call.predictor for call in rollout.calls] == predictors
        assert rollout.score == 1.0
        assert rollout.predictor_scores == dict.fromkeys(predictors, 1.0)


def test_a_wrong_plan_and_path_score_low_with_feedback_for_each(scripted) -> None:
    def wrong(one):
        return {"plan": f"{one.goal} {one.start}", "path": f"{one.start} {one.goal}"}

    for rollout in run(scripted, "d3-l4-two", wrong):
        assert rollout.score == 0.0
        assert rollout.predictor_scores == {"plan": 0.0, "answer": 0.0}
        assert rollout.feedback["plan"].endswith(task.STRATEGY["plan"])


def test_all_or_nothing_gives_nothing_for_half_the_way(scripted) -> None:
    def half(one):
        return {"reasoning": "so", "path": one.path[: len(one.path) // 2]}

    assert [rollout.score for rollout in run(scripted, "d5-l5-exact", half)] == [0.0] * 3
    assert all(0.1 < rollout.score <= 0.4 for rollout in run(scripted, "d5-l5", half))
