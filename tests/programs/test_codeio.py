"""CodeIO: programs that really run, values and grades worked by hand, splits, and the program run by the collector."""

import json
import random
import re
import subprocess
import sys
from typing import Any

import dspy
import pytest

from fst_optimizer.evolve.extractive import lessons
from fst_optimizer.tasks import load_task
from fst_optimizer.testing import chat_answer
from fst_optimizer.types import Outcome
from helpers.collecting import collect
from programs.codeio import compose, execute, families, naming, outputs

task = load_task("programs/codeio").module

SUMS = """def f(xs):
    total, out = 0, []
    for x in xs:
        total += x * 3
        out.append(total)
    return out

def main(xs, k):
    a = f(xs)
    while len(a) > k:
        a = a[1:]
    return a"""


def example(output: Any = (19, "ab"), states: tuple[str, ...] = ("15", "[15, 19]")) -> dspy.Example:
    return dspy.Example(
        code="def main(xs):\n    return xs[1:]",
        arguments='{"xs": [1, 2]}',
        output=json.dumps(output),
        states=states,
        variant="easy",
    ).with_inputs("code", "arguments")


# --- Running programs ------------------------------------------------------------------------------------------------


def test_a_run_notes_what_is_assigned_appended_and_returned() -> None:
    done = execute.run(SUMS, {"xs": [1, 4, 2], "k": 2})
    assert done.output == [15, 21]
    assert done.noted == ("3", "3", "15", "15", "21", "21", "[3, 15, 21]", "[3, 15, 21]", "[15, 21]", "[15, 21]")
    assert done.steps == 6  # two calls, three turns of one loop and one of the other


def test_constants_and_indices_are_not_noted() -> None:
    code = 'def main(s):\n    i, n = 0, 5\n    out = []\n    while i < 2:\n        i += 1\n    n, c = n + i, "x"'
    code += "\n    return n"
    assert execute.run(code, {"s": "ab"}).noted == ("7", "7")


def test_only_new_values_are_asked_for() -> None:
    shown = f"{SUMS}\n" + '{"xs": [1, 4, 2], "k": 2}'
    noted = execute.run(SUMS, {"xs": [1, 4, 2], "k": 2}).noted
    assert naming.new_values(noted, shown) == ("15", "21", "[3, 15, 21]", "[15, 21]")  # 3 stands in the code
    assert naming.new_values(['"a"', '"ab"', '""', "[]"], "out = []") == ('"ab"',)


@pytest.mark.parametrize(
    "body",
    [
        "while True:\n        n = 1",
        "return main(n + 1)",
        "for x in range(10 ** 9):\n        n = n",
        "n = 9 ** 9 ** 5\n    return n",
        "a = [n] * 200\n    return a",
        "n = -n - 99_996\n    return n",
    ],
)
def test_a_program_out_of_bounds_is_stopped(body: str) -> None:
    with pytest.raises(execute.OutOfBounds):
        execute.run(f"def main(n):\n    {body}", {"n": 5})


@pytest.mark.parametrize("name", ["open", "exec", "__import__", "print", "getattr"])
def test_a_program_sees_only_the_functions_it_needs(name: str) -> None:
    with pytest.raises(NameError):
        execute.run(f"def main(n):\n    return {name}(n)", {"n": 1})


def test_arguments_are_left_as_they_were() -> None:
    arguments = {"xs": [3, 1]}
    assert execute.run("def main(xs):\n    xs.append(xs[0] + 1)\n    return xs", arguments).output == [3, 1, 4]
    assert arguments == {"xs": [3, 1]}


# --- Families and composition ----------------------------------------------------------------------------------------

EDGES: dict[str, list[Any]] = {
    "ints": [[], [0], [-6, -6], [99_999]],
    "number": [0, -7, 1, 99_999],
    "text": ["", "a", "zz", "0", "Aa9"],
    "words": [[], [""], ["", "a", "B"], ["x1"]],
    "table": [{}, {"": 0}, {"dropped": -3, "a": 5}],
}
TYPES = {"ints": list, "number": int, "text": str, "words": list, "table": dict, "real": float}


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_family_takes_every_value_of_its_type_and_returns_its_own(name: str) -> None:
    family, rng = families.FAMILIES[name], random.Random(name)
    for _ in range(40):
        code = family.write(rng, "main", "value")
        for value in [*EDGES[family.source], compose.DRAW[family.source](rng, 5)]:
            try:
                output = execute.run(code, {"value": value}).output
            except execute.OutOfBounds:
                continue
            assert type(output) is TYPES[family.target]
            parts = {"ints": output, "words": output, "table": output.values() if family.target == "table" else ()}
            inner = str if family.target == "words" else int
            assert all(type(part) is inner for part in parts.get(family.target, ()))


def test_a_family_writes_many_functions() -> None:
    assert len(families.FAMILIES) >= 12
    for name, family in families.FAMILIES.items():
        rng = random.Random(name)
        assert len({family.write(rng, "main", "value") for _ in range(60)}) >= 4, name


@pytest.mark.parametrize("level", compose.LEVELS)
def test_every_family_is_used_at_every_level(level: str) -> None:
    rng, used = random.Random(level), set()
    for _ in range(600):
        program = compose.draw(rng, compose.LEVELS[level])
        if not used >= set(program.families) and compose.solve(program, compose.LEVELS[level]):
            used |= set(program.families)
    assert used == set(families.FAMILIES)


def test_levels_chain_one_two_and_three_stages_with_loops_and_choices() -> None:
    rng = random.Random(0)
    drawn = {name: [compose.draw(rng, level) for _ in range(100)] for name, level in compose.LEVELS.items()}
    assert {len(program.families) for program in drawn["easy"]} == {1}
    assert {len(program.families) for program in drawn["medium"]} == {2, 3}  # a choice takes one more
    assert {len(program.families) for program in drawn["hard"]} == {3, 4, 5}
    for name in ("medium", "hard"):
        mains = [program.code.rpartition("def main")[2] for program in drawn[name]]
        assert any("for _ in range(" in main for main in mains)
        assert any("    else:\n" in main for main in mains)
        with_k = [program for program in drawn[name] if "k" in program.arguments]
        assert 0 < len(with_k) < 100
        for program in with_k:
            assert len(re.findall(r"\bk\b", program.code.rpartition("def main")[2])) >= 2, "a parameter that is used"


@pytest.mark.parametrize("level", compose.LEVELS)
def test_outputs_are_what_the_shown_code_returns(level: str) -> None:
    for one in task.load("val", 60, variant=level):
        space: dict[str, Any] = {}
        exec(one.code, space)
        output = space["main"](**json.loads(one.arguments))
        assert (type(output), json.dumps(output)) == (type(json.loads(one.output)), one.output)


def test_levels_differ_in_the_values_that_a_run_makes() -> None:
    means = [
        sum(len(one.states) for one in task.load("val", 64, variant=level)) / 64 for level in ("easy", "medium", "hard")
    ]
    assert means[0] * 1.5 < means[1]
    assert means[1] * 1.2 < means[2]


@pytest.mark.parametrize(("level", "echo"), [("easy", 0.041), ("medium", 0.022), ("hard", 0.021)])
def test_outputs_cannot_be_guessed(level: str, echo: float) -> None:
    examples = task.load("test", variant=level)
    seen = [one.output for one in examples]
    assert max(seen.count(output) for output in set(seen)) <= 5
    echoed = [dspy.Prediction(output=json.dumps(next(iter(json.loads(one.arguments).values())))) for one in examples]
    scores = [task.metric(one, output).score for one, output in zip(examples, echoed, strict=True)]
    assert max(scores) <= 0.45
    assert round(sum(scores) / len(scores), 3) == echo


@pytest.mark.parametrize(
    ("level", "copied", "listed"), [("easy", 0.0, 0.159), ("medium", 0.0, 0.224), ("hard", 0.0, 0.249)]
)
def test_a_trace_cannot_be_copied_or_listed(level: str, copied: float, listed: float) -> None:
    examples = task.load("test", variant=level)

    def mean(steps) -> float:
        scores = [task.metric(one, dspy.Prediction(steps=steps(one)), None, "trace", None).score for one in examples]
        return round(sum(scores) / len(scores), 3)

    assert mean(lambda one: f"{one.code}\n{one.arguments}") == copied
    assert mean(lambda one: " ".join(map(str, range(31)))) == listed


def test_programs_do_not_depend_on_the_order_of_sets() -> None:
    script = (
        "import random, hashlib; from programs.codeio import compose\n"
        "rng, level = random.Random(3), compose.LEVELS['hard']\n"
        "made = [(p.code, compose.solve(p, level)) for p in (compose.draw(rng, level) for _ in range(80))]\n"
        "import sys; sys.stdout.write(hashlib.sha256(repr(made).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


# --- Reading and grading outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[1, 2]", [1, 2]),
        (' {"a": 1} \n', {"a": 1}),
        ("{'a': [1, 'b']}", {"a": [1, "b"]}),
        ("(1, 2)", [1, 2]),
        ("'ab'", "ab"),
        ("True", True),
        ("true", True),
        ("-2.5", -2.5),
        ("```json\n[1]\n```", [1]),
        ("The output is\n```\n{'a': 1}\n```\nas shown.", {"a": 1}),
        ('"```"', "```"),
    ],
)
def test_json_and_python_literals_are_read_alone_or_in_a_fence(text: str, value: Any) -> None:
    parsed = outputs.parse(text)
    assert parsed is not None
    assert (type(parsed.value), parsed.value) == (type(value), value)


@pytest.mark.parametrize(
    "text",
    [
        *("", "   ", "ab", "[1, 2", "The output is 5.", "NaN", "Infinity", "{1, 2}", "{1: 2}", "b'a'", "1+2j", "..."),
        *(
            "```\n1\n```\n```\n2\n```",
            "__import__('os')",
            "[" * 3000,
            "-" * 3000 + "1",
            "1" * 9000,
            "\x00",
            None,
            5,
            [1],
        ),
    ],
)
def test_what_is_no_json_is_not_read_and_raises_nothing(text: object) -> None:
    assert outputs.parse(text) is None
    assert task.grade(text, [1]) == 0.0
    assert task.explain(text, [1]).endswith(task.FORMAT)


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("5", 5, 1.0),
        ("5.0", 5, 0.2),
        ("5", 5.0, 0.2),
        ("true", 1, 0.2),
        ("1", True, 0.2),
        ('"5"', 5, 0.0),
        ("6", 5, 0.05),
        ("[1, 2, 4, 4]", [1, 2, 3, 4], 0.05 + 0.4 * 3 / 4),
        ("[1, 2]", [1, 2, 3, 4], 0.05 + 0.4 * 2 / 4),
        ("[1.0, 2]", [1, 2], 0.05 + 0.4 * 1.5 / 2),
        ("[1, 2, 3, 4]", [1, 2], 0.05 + 0.4 * 2 / 4),
        ("[]", [1], 0.05),
        ('["ab", "cd"]', ["ab", "cx"], 0.05 + 0.4 * 1.5 / 2),
        ('{"b": 2, "a": 1}', {"a": 1, "b": 2}, 1.0),
        ('{"a": 1, "c": 2}', {"a": 1, "b": 2}, 0.05 + 0.4 / 3),
        ('"abxd"', "abcd", 0.05 + 0.4 * 3 / 4),
        ("abcd", "abcd", 0.4),
        ("abxd", "abcd", 0.3),
        ('["a"]', "a", 0.0),
        ("null", None, 1.0),
    ],
)
def test_grades_worked_by_hand(answer: str, expected: Any, score: float) -> None:
    assert task.grade(answer, expected) == pytest.approx(score)


@pytest.mark.parametrize(
    ("got", "expected", "place", "of_type"),
    [
        ([1, 2, 3], [1, 5, 4], "[1]", False),
        ([1, 2], [1, 2, 3], "[2]", False),
        ({"a": [1, "x"]}, {"a": [1, "y"]}, '["a"][1][0]', False),
        ({"b": 1}, {"a": 1, "b": 1}, '["a"]', False),
        ({"a": 1, "z": 2}, {"a": 1}, '["z"]', False),
        ([1, True], [1, 1], "[1]", True),
        ("ab", "abc", "[2]", False),
        (3, "3", "", True),
    ],
)
def test_the_first_difference_is_found(got: Any, expected: Any, place: str, of_type: bool) -> None:
    found = outputs.difference(got, expected)
    assert found is not None
    assert (found.place, found.of_type) == (place, of_type)
    assert outputs.difference(expected, expected) is None


def test_feedback_quotes_the_instance_and_then_says_what_to_do() -> None:
    say = {text: task.explain(text, [19, "ab"]) for text in ('[19, "ax"]', "[19]", '["19", "ab"]', "7", "so: 19", "")}
    start = {text: f'Got `{text}`, expected `[19, "ab"]`.' for text in say}
    parted = "They first differ at"
    wrong = '[19, "ax"]'
    assert say[wrong] == f'{start[wrong]} {parted} `[1][1]`: `"x"` for `"b"`. {task.FOLLOW}'
    assert say["[19]"] == f'{start["[19]"]} {parted} `[1]`: nothing for `"ab"`. {task.LENGTH} {task.FOLLOW}'
    assert say['["19", "ab"]'].endswith(f'{parted} `[0]`: `"19"` for `19`. {task.TYPE} {task.FOLLOW}')
    assert say["7"] == f"{start['7']} {task.TYPE} {task.FOLLOW}"
    assert say["so: 19"] == f'Got `so: 19`, which is no JSON, expected `[19, "ab"]`. {task.FORMAT}'
    assert say[""] == f'Got no output, expected `[19, "ab"]`. {task.FORMAT}'
    assert task.explain("[19, 'ab']", [19, "ab"]) == "Right."


def test_an_answer_is_quoted_on_one_short_line() -> None:
    said = task.explain("Well.\nIt `may` be.\n" + "x" * 5000, 5)
    assert said.startswith("Got `Well. It may be. xxx")
    assert "\n" not in said
    assert len(said) < 400


# --- Grading traces --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value", "named"),
    [
        ("total is 13.", "13", True),
        ("total=13, then", "13", True),
        ("13.5 or 131 or -13 or x13", "13", False),
        ("-13", "-13", True),
        ("[1,2]", "[1, 2]", True),
        ("a = [ 1 , 2 ]", "[1, 2]", True),
        ("a is [0, 1, 2]", "[1, 2]", False),
        ("f gives {'a': True}", '{"a": true}', True),
        ("it is ab now", '"ab"', True),
        ("it is 'ab'", '"ab"', True),
        ("cab", '"ab"', False),
        ("5\n[5, 5]", "[5, 5]", True),
        ("", "13", False),
    ],
)
def test_a_text_names_a_value_that_stands_in_it_by_itself(text: str, value: str, named: bool) -> None:
    assert naming.names(naming.plain(text), value) is named


def test_a_trace_scores_the_share_of_values_it_names() -> None:
    states = ("15", "21", "[15, 21]", '"ab"')
    assert naming.followed("x is 15, then ab", states, "2 3") == (0.5, ("21", "[15, 21]"), False)
    assert naming.followed("15 21 [15, 21] ab", states, "") == (1.0, (), False)
    assert naming.followed("", states, "") == (0.0, states, False)


def test_a_trace_that_lists_all_numbers_earns_little() -> None:
    score, missing, strays = naming.followed(" ".join(map(str, range(100))), ("15", "21", "40", "[15]"), "2 3")
    assert (score, missing, strays) == (pytest.approx(0.75 * 2 * 5 / 100), ("[15]",), True)


def test_partial_results_beside_the_values_cost_nothing() -> None:
    steps = "Step 1: 5 * 3 = 15. Step 2: 15 + 6 = 21."  # 5 and 6 are partial results, 3, 15, 21, 1 and 2 are known
    assert naming.followed(steps, ("15", "21"), "1 2 3") == (1.0, (), False)


def test_a_long_blank_trace_is_read_at_once() -> None:
    assert naming.followed(" " * 200_000 + "15", ("15",), "")[0] == 1.0


# --- The metric ------------------------------------------------------------------------------------------------------


def test_trace_and_answer_have_their_own_scores_and_the_program_has_the_answers() -> None:
    one, prediction = example(), dspy.Prediction(steps="first 15", output='[19, "xb"]')
    trace = task.metric(one, prediction, None, "trace", None)
    answer = task.metric(one, prediction, None, "answer", None)
    whole = task.metric(one, prediction)
    assert (trace.score, trace.feedback) == (0.5, f"The run also makes `[15, 19]`. {task.NAME}")
    assert answer.score == whole.score == pytest.approx(0.05 + 0.4 * 1.5 / 2)
    assert whole.feedback == f"trace: {trace.feedback}\nanswer: {answer.feedback}"


def test_a_straying_trace_is_told_so() -> None:
    prediction = dspy.Prediction(steps=f"15 [15, 19] {' '.join(map(str, range(40)))}", output="1")
    judged = task.metric(example(), prediction, None, "trace", None)
    assert judged.feedback == task.STRAY
    assert judged.score < 0.5


@pytest.mark.parametrize("bad", [None, "", 7, True, [], {"a": 1}, b"x", float("nan"), "\x00", "[" * 5000])
def test_malformed_predictions_score_zero_and_raise_nothing(bad: object) -> None:
    for prediction in (dspy.Prediction(steps=bad, output=bad), dspy.Prediction(), dspy.Prediction(output=bad), None):
        for name in (None, "trace", "answer"):
            assert task.metric(example(), prediction, None, name, None).score == 0.0


def test_an_unknown_predictor_is_refused() -> None:
    with pytest.raises(ValueError, match="no predictor 'plan', only trace, answer"):
        task.metric(example(), dspy.Prediction(), pred_name="plan")


@pytest.mark.parametrize("level", compose.LEVELS)
def test_references_score_one_and_corrupted_ones_less(level: str) -> None:
    for one in task.load("val", 128, variant=level):
        right = task.reference(one)
        assert [task.metric(one, right, None, name, None).score for name in (None, "trace", "answer")] == [1.0] * 3
        value = json.loads(one.output)
        wrong = ["", f"[{one.output}]", json.dumps(str(value) + "x"), "null", one.arguments]
        if not isinstance(value, float):  # 48. is 48.0 in Python
            wrong.append(one.output[:-1])
        if isinstance(value, list):
            wrong += [json.dumps(value[:-1]), json.dumps([*value, value[0]])]
        for text in wrong:
            assert task.metric(one, dspy.Prediction(output=text)).score <= 0.45
        fewer = dspy.Prediction(steps="\n".join(one.states[1:]), output=one.output)
        assert task.metric(one, fewer, None, "trace", None).score < 1.0 or one.states[0] in " ".join(one.states[1:])


@pytest.mark.parametrize(
    ("name", "output", "sentence"),
    [
        ("answer", "I cannot tell", "FORMAT"),
        ("answer", "[[]]", "FOLLOW"),
        ("answer", "null", "TYPE"),
        ("trace", "null", "NAME"),
    ],
)
def test_a_reflector_without_an_lm_finds_what_to_do(name: str, output: str, sentence: str) -> None:
    entries = []
    for one in task.load("train", 4):
        wrong = dspy.Prediction(steps="It runs.", output=output)
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
    assert lessons(entries)[getattr(task, sentence)] == 4


# --- Variants and splits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", compose.LEVELS)
def test_no_example_is_in_two_splits_and_loading_again_gives_the_same(level: str) -> None:
    sizes = {"train": 200, "val": 100, "test": 100}
    splits = {split: task.load(split, size, variant=level) for split, size in sizes.items()}
    keys = {split: {(one.code, one.arguments) for one in examples} for split, examples in splits.items()}
    assert {split: len(found) for split, found in keys.items()} == sizes
    assert not keys["train"] & keys["val"]
    assert not keys["train"] & keys["test"]
    assert not keys["val"] & keys["test"]
    assert all(task.split_of(*key) == split for split, found in keys.items() for key in found)
    assert task.load("test", 5, variant=level) == splits["test"][:5]


def test_another_seed_draws_other_examples_of_the_same_split() -> None:
    first, second = (task.load("val", 40, seed=seed) for seed in (0, 1))
    assert not {one.code for one in first} & {one.code for one in second}
    assert {task.split_of(one.code, one.arguments) for one in second} == {"val"}


def test_the_default_is_medium_with_its_default_sizes() -> None:
    assert task.load("train", 3) == task.load("train", 3, variant="medium")
    assert len(task.load("val")) == task.SIZES["val"]
    assert [name for name, _ in task.build_program().named_predictors()] == ["trace", "answer"]


def test_unknown_names_and_sizes_are_refused() -> None:
    for function in (task.build_program, task.config, lambda name: task.load("train", 1, variant=name)):
        with pytest.raises(ValueError, match="unknown variant 'nope' of codeio; choose one of easy, medium, hard"):
            function("nope")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        task.load("dev")
    with pytest.raises(ValueError, match="size must be between 0 and 8192, not 9000"):
        task.load("train", 9000)


def test_the_settings_are_valid() -> None:
    assert task.config("hard").rollout.batch_size == 32


# --- Running ---------------------------------------------------------------------------------------------------------


def run(scripted, answer) -> list:
    """Rollouts of the seed program on three examples; `answer` makes a prediction's fields from an example."""
    examples = task.load("val", 3, variant="hard")

    def complete(prompt, request):
        (one,) = [one for one in examples if one.code in prompt and one.arguments in prompt]
        fields = answer(one)
        last = "output" if "[[ ## output ## ]]" in prompt else "steps"
        return chat_answer(**{last: fields[last]})

    policy = scripted(complete, context_length=20_000)
    rollouts = collect(policy, task.build_program("hard"), task.metric, examples)
    assert [rollout.outcome for rollout in rollouts] == [Outcome.OK] * 3
    return rollouts


def test_a_program_that_answers_right_scores_one(scripted) -> None:
    for rollout in run(scripted, task.reference):
        assert [call.predictor for call in rollout.calls] == ["trace", "answer"]
        assert rollout.score == 1.0
        assert rollout.predictor_scores == {"trace": 1.0, "answer": 1.0}
        assert rollout.feedback[""] == "trace: Right.\nanswer: Right."


def test_wrong_answers_score_low_with_feedback_for_each_predictor(scripted) -> None:
    for rollout in run(scripted, lambda one: {"steps": "It runs.", "output": "no idea"}):
        assert rollout.score < 0.2
        assert rollout.predictor_scores["trace"] == 0.0
        assert rollout.feedback["trace"].endswith(task.NAME)
        assert rollout.feedback["answer"].endswith(task.FORMAT)
