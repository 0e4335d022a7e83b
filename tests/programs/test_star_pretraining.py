"""Pretraining of a model for star graphs: its prompts are dspy's, its answers right, and a few steps train and save."""

import random
from dataclasses import replace

import dspy

from programs import pretraining
from programs.star_graph import graph, pretrain, task

PUZZLE = graph.draw(random.Random(0), 2, 3)


def test_the_prompt_is_what_the_program_would_send():
    shown = pretrain.Shown("Find the path.\nMind the edges.", pretrain.fields_of(PUZZLE), pretrain.BLANK)
    signature = task.build_program("d2-l3").find.predict.signature.with_instructions(shown.instruction)
    assert pretrain.messages_for(shown) == dspy.ChatAdapter().format(signature, [], dict(shown.inputs))


def test_the_answer_under_the_metrics_strategy_is_right():
    reasoning, path = pretrain.outputs_for(pretrain.TRACE, PUZZLE, random.Random(0))
    assert reasoning.split() == list(PUZZLE.path[::-1])
    assert path.split() == list(PUZZLE.path)
    completion = pretrain.completion_for(pretrain.Shown("", (), (("reasoning", reasoning), ("path", path))))
    assert pretrain.path_in(completion.removesuffix(pretraining.END)) == path


def test_every_arm_begins_at_the_start_and_one_is_the_path():
    arms = pretrain.arms_of(PUZZLE)
    assert len(arms) == 2 and {arm[0] for arm in arms} == {PUZZLE.start} and {len(arm) for arm in arms} == {4}
    assert tuple(PUZZLE.path) in arms


def test_a_few_steps_train_save_and_generate(tmp_path, capsys):
    recipe = replace(pretrain.RECIPE, tokenizer_examples=50, batch=2, warmup_steps=1, report_every=1)
    pretraining.train(recipe, tmp_path, steps=2, seed=0)
    assert capsys.readouterr().out.count("loss") == 2
    model, tokenizer = pretraining.load_model(tmp_path)
    prompt, _ = pretrain.draw_example(random.Random(0))
    assert len(pretraining.generate(model, tokenizer, [prompt, prompt])) == 2
