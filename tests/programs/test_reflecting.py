"""What reflectors are trained on, and that a training goes on where it was cut off."""

import random
import re
from dataclasses import replace

import dspy
import pytest
import torch

from fst_optimizer.evolve.reflect import LMReflector
from programs import reflecting
from programs.letters import reflect
from programs.letters.rules import OPERATIONS, WITHHELD, alike, sentence, withheld
from programs.reflecting import ANSWER, INSTRUCTION, Lesson

SMALL = replace(reflect.RECIPE, tokenizer_lessons=50, vocabulary=400, batch=4, save_every=2, early_steps=1)
LESSON = Lesson(
    "Answer the question.",
    (
        {
            "Inputs": {"letters": "a b"},
            "Generated Outputs": {"answer": "a b"},
            "Feedback": 'Got "a b", but "a b" gives "b a".',
        },
        {"Inputs": {"letters": "c"}, "Generated Outputs": {"answer": "c"}, "Feedback": 'Right: "c" gives "c".'},
        {
            "Inputs": {"letters": "b d"},
            "Generated Outputs": {"answer": "b d"},
            "Feedback": 'Got "b d", but "b d" gives "d b".',
        },
    ),
    ("b a", "", "d b"),
    "Reverse the letters.",
)


class Keeps(dspy.LM):
    """Keeps the messages that it is asked."""

    def __init__(self) -> None:
        super().__init__("openai/none", cache=False)
        self.asked = []

    def __call__(self, prompt=None, messages=None, **kwargs):
        self.asked.append(messages or [{"role": "user", "content": prompt}])
        return ["```\nSort the letters.\n```"]


@pytest.fixture(scope="module")
def tokenizer():
    return reflecting.make_tokenizer(SMALL, seed=0)


def test_a_lesson_is_what_a_run_asks() -> None:
    lm = Keeps()
    text = LMReflector(lm)(
        "first", LESSON.current, [dict(entry, Score=0.0, Instance=("x",)) for entry in LESSON.entries]
    )
    assert text == "Sort the letters."
    assert lm.asked == [LESSON.messages]


def test_gepas_sentences_are_a_token_each(tokenizer) -> None:
    fixed = reflecting.fixed_texts()
    assert [len(tokenizer(text, add_special_tokens=False).input_ids) for text in fixed] == [1, 1, 1]
    assert all(text in LESSON.prompt for text in fixed)
    assert tokenizer.decode(tokenizer(LESSON.prompt, add_special_tokens=False).input_ids) == LESSON.prompt


def test_training_counts_the_instruction_and_the_answers_of_later_examples(tokenizer) -> None:
    ((ids, kinds),) = reflecting.encode_lessons(tokenizer, [LESSON])
    text = {
        kind: tokenizer.decode([one for one, counted in zip(ids, kinds, strict=True) if counted == kind])
        for kind in (INSTRUCTION, ANSWER)
    }
    assert text == {INSTRUCTION: LESSON.completion, ANSWER: 'd b".'}


def test_padding_is_counted_nowhere() -> None:
    ids_BT, kinds_BT = reflecting.padded([([5, 6], [0, 1]), ([7], [2])], pad=9)
    assert ids_BT.tolist() == [[5, 6], [7, 9]]
    assert kinds_BT.tolist() == [[0, 1], [2, 0]]


def test_the_learning_rate_goes_up_and_then_down() -> None:
    assert [reflecting.rate(step, 5, 1) for step in (1, 2, 3, 4, 5)] == [0.5, 1.0, 0.75, 0.5, 0.25]


def test_a_training_that_was_cut_off_ends_with_the_same_weights(tmp_path, monkeypatch) -> None:
    def trained(name):
        reflecting.train(replace(SMALL, warmup_steps=1), tmp_path / name, 4, 0, tmp_path / f"{name}.pt")
        return torch.load(tmp_path / f"{name}.pt", weights_only=True)

    whole, batch_of = trained("whole"), reflecting.batch_of

    def dies(recipe, tokenizer, seed, step):
        if step == 4:
            raise KeyboardInterrupt
        return batch_of(recipe, tokenizer, seed, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reflecting, "batch_of", dies)
        trained("cut")
    cut = trained("cut")
    assert whole["done"] == cut["done"] == 4 and whole["tokens"] == cut["tokens"]
    assert all(torch.equal(tensor, cut["model"][name]) for name, tensor in whole["model"].items())


# -- letters -----------------------------------------------------------------------------------------------------------


def test_no_lesson_of_letters_has_a_withheld_rule() -> None:
    for operations in (1, 2, 3):
        assert not any(withheld(rule) for rule in reflect.trained(operations))
    assert not any(alike(rule, kept) for rule in reflect.trained(2) for kept in WITHHELD)
    kept = {text for text, rule in reflect.rules_by_sentence().items() if withheld(rule)}
    rng = random.Random(0)
    for _ in range(400):
        lesson = reflect.draw_lesson(rng, 2)
        assert lesson.instruction not in kept
        assert not any(text in kept for text in (lesson.current, lesson.current.partition(". ")[2]))


def test_a_lesson_fails_somewhere_and_its_answers_follow_from_its_rule() -> None:
    rng, others = random.Random(1), 0
    for _ in range(200):
        lesson = reflect.draw_lesson(rng, 4)
        rule = reflect.rule_of(lesson.instruction)
        assert any(entry["Feedback"].startswith("Got") for entry in lesson.entries)
        for entry, answer in zip(lesson.entries, lesson.answers, strict=True):
            (shown,), (got,) = entry["Inputs"].values(), entry["Generated Outputs"].values()
            said, given, right = re.fullmatch(r'(.+) "(.+)" gives "(.+)"[.]', entry["Feedback"]).groups()
            assert right == answer == " ".join(reflect.apply(rule, given.split()))
            assert said == ("Right:" if got == answer else f'Got "{got}", but')
            others += given != shown
    assert 0 < others < 100  # where an earlier predictor's mistake is shown


def test_a_written_sentence_is_right_if_it_acts_alike() -> None:
    lesson = replace(LESSON, instruction=sentence(("reverse", "drop_first")))
    assert reflect.grade("Drop the last letter, then reverse the letters.", lesson) == 1
    assert reflect.grade("Answer the question. Drop the last letter, then reverse the letters.", lesson) == 1
    assert reflect.grade("Reverse the letters, then drop the last letter.", lesson) == 0.5
    assert reflect.grade("Reverse the letters.", lesson) == 0.5
    assert reflect.grade("Sort the letters.", lesson) == 0
    assert reflect.grade("Drop the last letter then.", lesson) == 0
    assert len(reflect.rules_by_sentence()) == len(OPERATIONS) * (1 + 15 + 15 * 14)
