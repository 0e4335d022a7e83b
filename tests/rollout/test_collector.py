import asyncio
import threading

import dspy
import pytest
from dspy.utils.dummies import DummyLM

from fst_optimizer.config.run import FSTConfig
from fst_optimizer.errors import EngineError, MetricError, UserError
from fst_optimizer.program.texts import apply_texts, seed_texts
from fst_optimizer.rollout.collector import Collector
from fst_optimizer.rollout.metric import Metric
from fst_optimizer.rollout.rollout import Request
from fst_optimizer.testing import chat_answer
from fst_optimizer.types import Candidate, Outcome, items_of


def always(text):
    return lambda prompt, request: text


def chatty(prompt, request):
    """Any signature's answer: the seed's last digits, so that what was sampled can be told apart."""
    return chat_answer(middle=f"m{request.seed % 1000}", answer=f"a{request.seed % 1000}")


def score_one(example, prediction, trace=None):
    return 1.0


def examples(*questions):
    return items_of([dspy.Example(question=q, answer=q).with_inputs("question") for q in questions], "train")


class One(dspy.Module):
    def __init__(self, signature="question -> answer"):
        super().__init__()
        self.answer = dspy.Predict(signature)

    def forward(self, question):
        return self.answer(question=question)


class Two(dspy.Module):
    def __init__(self):
        super().__init__()
        self.first = dspy.Predict("question -> middle")
        self.second = dspy.Predict("middle -> answer")

    def forward(self, question):
        middle = self.first(question=question).middle
        return dspy.Prediction(middle=middle, answer=self.second(middle=middle).answer)


def collect(
    policy,
    program,
    *,
    items=None,
    metric=score_one,
    group=1,
    texts=None,
    set_lm=True,
    seed=0,
    num_threads=4,
    timeout_s=120.0,
    temperature=1.0,
    capture=False,
    **rest,
):
    if set_lm:
        program.set_lm(policy.lm)
    collector = Collector(
        lambda candidate: apply_texts(program, candidate.texts),
        policy,
        Metric(metric),
        FSTConfig().with_values({"seed": seed, "rollout.num_threads": num_threads, "rollout.timeout_s": timeout_s}),
    )
    candidates = [Candidate(one) for one in texts or [seed_texts(program)]]
    requests = [
        Request(candidate, item, index)
        for item in items or examples("one")
        for candidate in candidates
        for index in range(group)
    ]
    return collector.run(requests, version=0, temperature=temperature, capture=capture, **rest)


# -- what is recorded ---------------------------------------------------------------------------------------------


def test_a_rollout_has_every_call_with_its_exact_tokens(scripted):
    policy = scripted(chatty)
    (rollout,) = collect(policy, Two(), temperature=0.7)
    assert (rollout.outcome, rollout.score, rollout.error) == (Outcome.OK, 1.0, "")
    assert [call.predictor for call in rollout.calls] == ["first", "second"]
    assert [call.prompt_ids for call in rollout.calls] == [asked.prompt_ids for asked in policy.engine.requests]
    for call in rollout.calls:
        assert policy.decode(call.completion_ids) == call.text
        assert call.completion_ids[-1] == policy.tokenizer.eos_token_id
        assert len(call.logprobs) == len(call.completion_ids)
        assert (call.temperature, call.policy_version, call.finish_reason) == (0.7, 0, "stop")
    assert rollout.tokens == sum(len(call.completion_ids) for call in rollout.calls)


def test_rollouts_come_in_the_order_of_their_requests(scripted):
    items = examples("one", "two")
    texts = [{"answer": "Say it."}, {"answer": "Shout it."}]
    heard = []
    rollouts = collect(scripted(chatty), One(), items=items, texts=texts, group=2, on_rollout=heard.append)
    assert [(one.example_id, one.index) for one in rollouts] == [
        (name, index) for name in ("train-0", "train-1") for _ in texts for index in (0, 1)
    ]
    assert sorted(heard, key=id) == sorted(rollouts, key=id)


def test_every_candidate_runs_its_own_instructions(scripted):
    def answer(prompt, request):
        return chat_answer(answer="loud" if "Shout it." in prompt else "quiet")

    texts = [{"answer": "Say it."}, {"answer": "Shout it."}]
    rollouts = collect(scripted(answer), One(), texts=texts, group=4, num_threads=8)
    assert ["loud" in one.calls[0].text for one in rollouts] == [False] * 4 + [True] * 4


def test_one_candidates_program_does_not_see_anothers_state(scripted):
    class Counting(One):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, question):
            self.seen.append(question)
            return super().forward(question)

    program = Counting()
    texts = [{"answer": "Say it."}, {"answer": "Shout it."}]
    collect(scripted(chatty), program, texts=texts)
    assert program.seen == []
    assert program.answer.signature.instructions not in ("Say it.", "Shout it.")


def test_a_program_may_call_no_predictor(scripted):
    class Silent(One):
        def forward(self, question):
            return dspy.Prediction(answer="known")

    (rollout,) = collect(scripted(chatty), Silent(), metric=lambda example, prediction: 0.5)
    assert (rollout.outcome, rollout.score, rollout.calls, rollout.trace) == (Outcome.OK, 0.5, (), ())


def test_a_program_may_call_one_predictor_many_times(scripted):
    class Looping(One):
        def forward(self, question):
            for _ in range(5):
                prediction = self.answer(question=question)
            return prediction

    (rollout,) = collect(scripted(chatty), Looping())
    assert [call.predictor for call in rollout.calls] == ["answer"] * 5
    assert len({call.text for call in rollout.calls}) == 5, "the same prompt asked again has another seed"


def test_a_react_agent_is_recorded_turn_by_turn(scripted):
    def lookup(word: str) -> str:
        return f"{word} means x"

    def answer(prompt, request):
        if "next_tool_name" not in prompt:
            return chat_answer(reasoning="done", answer="x")
        name, arguments = ("finish", "{}") if "means x" in prompt else ("lookup", '{"word": "one"}')
        return chat_answer(next_thought="hm", next_tool_name=name, next_tool_args=arguments)

    (rollout,) = collect(scripted(answer, context_length=20_000), dspy.ReAct("question -> answer", tools=[lookup]))
    assert rollout.outcome is Outcome.OK
    assert [call.predictor for call in rollout.calls] == ["react", "react", "extract.predict"]
    assert [step.predictor for step in rollout.trace] == ["react", "react", "extract.predict"]


@pytest.mark.parametrize("wrapper", ["best_of_n", "refine"])
def test_predictors_keep_their_names_inside_best_of_n_and_refine(scripted, wrapper):
    class Best(dspy.Module):
        def __init__(self):
            super().__init__()
            make = dspy.BestOfN if wrapper == "best_of_n" else dspy.Refine
            self.best = make(module=One(), N=3, reward_fn=lambda args, prediction: 0.0, threshold=1.0)

        def forward(self, question):
            return self.best(question=question)

    def answer(prompt, request):
        return chat_answer(answer=f"a{request.seed % 1000}", discussion="no", advice="{}")

    program = Best()
    (rollout,) = collect(scripted(answer, context_length=50_000), program, temperature=0.3)
    own = [call for call in rollout.calls if call.predictor]
    assert rollout.outcome is Outcome.OK
    assert {call.predictor for call in own} == {name for name, _ in program.named_predictors()}
    assert len(own) == 3
    assert len({call.text for call in own}) == 3
    assert {call.temperature for call in own} == {1.0}, "they force it, and what was used is what is recorded"


def test_the_trace_holds_each_predictors_turn_with_its_raw_completion(scripted):
    (rollout,) = collect(scripted(always(chat_answer(middle="m", answer="a"))), Two())
    first, second = rollout.trace
    assert (first.predictor, dict(first.inputs), first.outputs["middle"]) == ("first", {"question": "one"}, "m")
    assert (second.predictor, dict(second.inputs), second.outputs["answer"]) == ("second", {"middle": "m"}, "a")
    assert first.completion == chat_answer(middle="m", answer="a")


def test_thinking_is_trained_as_sampled_and_hidden_from_the_program(scripted):
    text = "<think>Is it [[ ## answer ## ]] no? </think>" + chat_answer(answer="yes")
    predictions = []
    policy = scripted(always(text))
    (rollout,) = collect(policy, One(), metric=lambda example, prediction: predictions.append(prediction.answer) or 1)
    assert predictions == ["yes"]
    assert policy.decode(rollout.calls[0].completion_ids) == rollout.calls[0].text == text


def test_the_programs_own_temperature_and_max_tokens_are_used_and_recorded(scripted):
    class Warm(One):
        def __init__(self):
            super().__init__()
            self.answer = dspy.Predict("question -> answer", temperature=0.25, max_tokens=77)

    policy = scripted(chatty)
    (rollout,) = collect(policy, Warm(), temperature=0.9)
    assert rollout.calls[0].temperature == 0.25
    assert policy.engine.requests[0].max_tokens == 77


# -- what is not the program's ------------------------------------------------------------------------------------


@pytest.mark.parametrize("face", ["lm", "base_lm"])
def test_a_judge_on_the_same_policy_is_not_recorded(scripted, face):
    policy = scripted(lambda prompt, request: chat_answer(answer="x", verdict="good"))
    judge = dspy.Predict("answer -> verdict")

    def metric(example, prediction):
        with dspy.context(lm=getattr(policy, face)):
            return float(judge(answer=prediction.answer).verdict == "good")

    (rollout,) = collect(policy, One(), metric=metric)
    assert rollout.score == 1.0
    assert len(policy.engine.requests) == 2
    assert [call.predictor for call in rollout.calls] == ["answer"]
    assert [step.predictor for step in rollout.trace] == ["answer"]


def test_a_predictor_on_another_lm_is_not_recorded(scripted):
    policy = scripted(chatty)
    program = Two()
    program.first.lm = policy.lm
    program.second.lm = DummyLM([{"answer": "frozen"}] * 3)
    predictions = []
    (rollout,) = collect(
        policy, program, set_lm=False, metric=lambda example, prediction: predictions.append(prediction.answer) or 1
    )
    assert predictions == ["frozen"]
    assert [call.predictor for call in rollout.calls] == ["first"]
    assert [step.predictor for step in rollout.trace] == ["first", "second"]


def test_a_predictor_on_the_policys_frozen_base_is_not_recorded(scripted):
    policy = scripted(chatty)
    program = Two()
    program.first.lm, program.second.lm = policy.lm, policy.base_lm
    (rollout,) = collect(policy, program, set_lm=False)
    assert [call.predictor for call in rollout.calls] == ["first"]


def test_a_call_outside_of_any_rollout_is_answered_and_not_kept(scripted):
    policy = scripted(always("hello"))
    assert policy.lm("hi") == ["hello"]
    assert asyncio.run(policy.lm.acall("hi")) == ["hello"]


# -- how it goes wrong --------------------------------------------------------------------------------------------


def test_a_completion_that_does_not_parse_is_recorded_and_not_asked_again(scripted):
    policy = scripted(always("I will not follow a format."))
    (rollout,) = collect(policy, One(), capture=True)
    assert (rollout.outcome, rollout.score) == (Outcome.PARSE_ERROR, 0.0)
    assert len(policy.engine.requests) == len(rollout.calls) == 1
    assert rollout.trace[-1].outputs is None
    assert rollout.trace[-1].completion == "I will not follow a format."
    assert "`answer`" in rollout.error
    assert rollout.feedback == {"": rollout.error}


def test_the_turn_that_does_not_parse_comes_after_those_that_did(scripted):
    def answer(prompt, request):
        return chat_answer(middle="m") if "`question`" in prompt else "no format"

    (rollout,) = collect(scripted(answer), Two())
    assert rollout.outcome is Outcome.PARSE_ERROR
    assert [(step.predictor, step.outputs is None) for step in rollout.trace] == [("first", False), ("second", True)]


def test_an_answer_that_is_cut_before_it_parses_is_truncated(scripted):
    policy = scripted(always(chat_answer(answer="x" * 200)), max_tokens=10)
    (rollout,) = collect(policy, One())
    assert rollout.outcome is Outcome.TRUNCATED
    assert rollout.calls[0].finish_reason == "length"
    assert len(rollout.calls[0].completion_ids) == 10
    assert "cut at max_tokens" in rollout.error


def test_an_answer_that_is_cut_and_still_parses_is_no_failure(scripted):
    policy = scripted(always(chat_answer(answer="x" * 200)), max_tokens=40)
    (rollout,) = collect(policy, One())
    assert rollout.outcome is Outcome.OK
    assert rollout.calls[0].finish_reason == "length"


def test_a_cut_call_beside_one_that_does_not_parse_does_not_make_it_truncated(scripted):
    class Both(One):
        def forward(self, question):
            try:
                self.answer(question=question, config={"max_tokens": 5})
            except Exception:
                return self.answer(question="again")

    def answer(prompt, request):
        return "no format here" if "again" in prompt else "abcdefghijkl"

    (rollout,) = collect(scripted(answer), Both())
    assert [call.finish_reason for call in rollout.calls] == ["length", "stop"]
    assert rollout.outcome is Outcome.PARSE_ERROR


def test_thinking_that_never_ends_is_truncated(scripted):
    policy = scripted(always("<think>" + "hm " * 100), max_tokens=30)
    assert collect(policy, One())[0].outcome is Outcome.TRUNCATED


def test_a_prompt_longer_than_the_context_is_recorded_and_never_cut(scripted):
    policy = scripted(chatty, context_length=100)
    (rollout,) = collect(policy, One())
    assert (rollout.outcome, rollout.calls) == (Outcome.PROMPT_TOO_LONG, ())
    assert policy.engine.requests == []


def test_what_a_program_survives_is_not_how_it_ended(scripted):
    class Careful(One):
        def forward(self, question):
            try:
                self.answer(question="x" * 10_000)
            except Exception:
                return self.answer(question=question)

    assert collect(scripted(chatty), Careful())[0].outcome is Outcome.OK
    assert collect(scripted(always("no format")), Careful())[0].outcome is Outcome.PARSE_ERROR


def test_a_tool_that_raises_is_recorded_with_its_words(scripted):
    class Tooled(One):
        def forward(self, question):
            self.answer(question=question)
            raise OSError("the database is away")

    (rollout,) = collect(scripted(chatty), Tooled(), capture=True)
    assert rollout.outcome is Outcome.PROGRAM_ERROR
    assert rollout.error == rollout.feedback[""] == "OSError: the database is away"
    assert len(rollout.calls) == 1
    assert [step.outputs is None for step in rollout.trace] == [False], "what parsed is not called unparsed"


def test_a_rollout_that_hangs_times_out_and_the_others_do_not_wait(scripted):
    release, hung = threading.Event(), threading.Event()

    class Hanging(One):
        def forward(self, question):
            prediction = self.answer(question=question)
            if question == "hang":
                release.wait(60)
                try:
                    self.answer(question="after the deadline")
                finally:
                    hung.set()
            return prediction

    policy = scripted(chatty)
    rollouts = collect(
        policy, Hanging(), items=examples("hang", "go", "go on"), num_threads=1, timeout_s=4.0, capture=True
    )
    assert [one.outcome for one in rollouts] == [Outcome.TIMEOUT, Outcome.OK, Outcome.OK]
    late = rollouts[0]
    assert "timed out after 4 s" in late.error
    assert len(late.calls) == 1
    assert [(step.predictor, step.outputs is None) for step in late.trace] == [("answer", False)]
    release.set()
    assert hung.wait(60)
    assert len(late.calls) == 1, "nothing is recorded after the deadline"


def test_a_failing_request_is_an_engine_error_and_does_not_stop_the_others(scripted):
    def answer(prompt, request):
        if "poison" in prompt:
            raise EngineError("out of memory")
        return chatty(prompt, request)

    rollouts = collect(scripted(answer), One(), items=examples("fine", "poison"))
    assert [one.outcome for one in rollouts] == [Outcome.OK, Outcome.ENGINE_ERROR]


def test_an_engine_that_fails_everything_stops_the_run(scripted):
    def answer(prompt, request):
        raise EngineError("out of memory")

    with pytest.raises(EngineError, match=r"failed all 2 rollouts.*out of memory") as caught:
        collect(scripted(answer), One(), group=2)
    assert caught.value.__cause__ is not None


def test_a_metric_that_raises_stops_the_run_with_the_example_named(scripted):
    def metric(example, prediction):
        if example.question == "two":
            raise KeyError("gold")
        return 1.0

    with pytest.raises(MetricError, match="on example train-1"):
        collect(scripted(chatty), One(), items=examples("one", "two", "three"), metric=metric)


@pytest.mark.parametrize("bad", [float("nan"), "good", None])
def test_a_metric_that_returns_no_number_stops_the_run_with_the_example_named(scripted, bad):
    with pytest.raises(UserError, match="on example train-0"):
        collect(scripted(chatty), One(), metric=lambda example, prediction: bad)


def test_the_metric_is_not_asked_about_a_rollout_that_failed(scripted):
    def metric(example, prediction):
        raise AssertionError("there is nothing to score")

    assert collect(scripted(always("no format")), One(), metric=metric)[0].outcome is Outcome.PARSE_ERROR


def test_an_interrupt_leaves_no_rollout_running(scripted):
    def interrupt(rollout):
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        collect(scripted(chatty), Two(), group=20, num_threads=4, on_rollout=interrupt)
    assert threading.active_count() <= before


# -- feedback -----------------------------------------------------------------------------------------------------


def test_every_predictor_is_judged_with_its_own_part_of_the_trace_only_when_asked(scripted):
    asked = []

    def metric(example, prediction, trace=None, pred_name=None, pred_trace=None):
        asked.append(pred_name)
        if pred_name is None:
            return dspy.Prediction(score=0.5, feedback="whole")
        assert [step[0] for step in pred_trace] == [step[0] for step in trace if step in pred_trace]
        return dspy.Prediction(score=float(pred_name == "first"), feedback=f"{pred_name}: {len(pred_trace)}")

    policy = scripted(chatty)
    (rollout,) = collect(policy, Two(), metric=metric, capture=True)
    assert rollout.score == 0.5
    assert rollout.feedback == {"": "whole", "first": "first: 1", "second": "second: 1"}
    assert rollout.predictor_scores == {"first": 1.0, "second": 0.0}
    asked.clear()
    collect(policy, Two(), metric=metric)
    assert asked == [None]


# -- what chooses the data ----------------------------------------------------------------------------------------


def sampled(rollouts):
    return [
        (one.candidate_id, one.example_id, one.index, [call.completion_ids for call in one.calls]) for one in rollouts
    ]


def test_the_number_of_threads_does_not_choose_the_data(scripted):
    items = examples(*"abcdef")
    texts = [{"first": "One.", "second": "Two."}, {"first": "Uno.", "second": "Due."}]
    runs = [collect(scripted(chatty), Two(), items=items, texts=texts, group=2, num_threads=n) for n in (1, 16)]
    assert sampled(runs[0]) == sampled(runs[1])


def test_the_runs_seed_chooses_the_data(scripted):
    policy = scripted(chatty)
    runs = [sampled(collect(policy, One(), group=4, seed=seed)) for seed in (0, 1, 0)]
    assert runs[0] != runs[1]
    assert runs[0] == runs[2]


def test_rollouts_of_a_group_are_sampled_apart(scripted):
    rollouts = collect(scripted(chatty), One(), group=8)
    assert len({one.calls[0].completion_ids for one in rollouts}) == 8


# -- the user's settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "text"),
    [
        (dspy.JSONAdapter(), '{"answer": "x"}'),
        (dspy.XMLAdapter(), "<answer>x</answer>"),
        (dspy.ChatAdapter(), chat_answer(answer="x")),
    ],
    ids=["json", "xml", "chat"],
)
def test_the_users_prompt_format_is_used_and_a_failed_parse_is_one_call(scripted, adapter, text):
    with dspy.context(adapter=adapter):
        assert collect(scripted(always(text)), One())[0].outcome is Outcome.OK
        policy = scripted(always("neither"))
        assert collect(policy, One())[0].outcome is Outcome.PARSE_ERROR
        assert len(policy.engine.requests) == 1
    if isinstance(adapter, dspy.ChatAdapter) and type(adapter) is dspy.ChatAdapter:
        assert adapter.use_json_adapter_fallback, "the user's own object is left as it was"


def test_an_lm_from_the_users_context_is_used(scripted):
    policy = scripted(chatty)
    with dspy.context(lm=policy.lm):
        (rollout,) = collect(policy, One(), set_lm=False)
    assert [call.predictor for call in rollout.calls] == ["answer"]


def test_nothing_is_added_to_the_users_history_or_trace(scripted):
    trace = []
    policy = scripted(chatty)
    with dspy.context(trace=trace):
        collect(policy, One(), group=3)
    assert trace == []
    assert list(policy.lm.history) == []


def test_an_async_program_is_recorded(scripted):
    class Async(One):
        async def aforward(self, question):
            first, second = await asyncio.gather(
                self.answer.acall(question=question), self.answer.acall(question=question + "!")
            )
            return dspy.Prediction(answer=first.answer + second.answer)

        def forward(self, question):
            return asyncio.run(self.aforward(question))

    (rollout,) = collect(scripted(chatty), Async())
    assert rollout.outcome is Outcome.OK
    assert [call.predictor for call in rollout.calls] == ["answer", "answer"]


def test_rollouts_run_inside_a_running_event_loop(scripted):
    policy = scripted(chatty)

    async def directly():
        return collect(policy, One())

    async def beside():
        return await asyncio.to_thread(collect, policy, One())

    for run in (directly, beside):
        (rollout,) = asyncio.run(run())
        assert rollout.outcome is Outcome.OK


def test_a_prompt_that_cannot_be_kept_apart_from_control_tokens_is_the_rollouts_outcome(scripted):
    policy = scripted(chatty)
    policy.tokenizer.chat_template = "{% for message in messages %}{{ message['content'][::2] }}<|im_end|>{% endfor %}"
    texts = {"answer": "Say <|im_end|> twice."}
    rollouts = collect(policy, One(), texts=[texts])
    assert [rollout.outcome for rollout in rollouts] == [Outcome.PROGRAM_ERROR]
    assert "'<|im_end|>', which is, or begins, a control token" in rollouts[0].error
    assert policy.engine.requests == []
