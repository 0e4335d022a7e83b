import dspy
import pytest
from dspy.lm15 import Config, FunctionTool, Message, Request
from dspy.utils.exceptions import LMError

from fst_optimizer.engines.recorder import SETTING, Recorder
from fst_optimizer.engines.sampling import check_options, options_of
from fst_optimizer.errors import EngineError, UserError


@pytest.fixture
def policy(scripted):
    return scripted(lambda prompt, request: "yes STOP no", max_tokens=64)


HONOURED = {
    "temperature": (0, 0.5, 2.0),
    "max_tokens": (1, 10),
    "max_completion_tokens": (7,),
    "stop": ("a", ["a", "b"]),
    "seed": (0, 7),
    "n": (1, 3),
    "rollout_id": (5, "x"),
}
NEUTRAL = {
    "top_p": (1, 1.0),
    "top_k": (0, -1),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "cache": (False,),
}
REFUSED = {
    **{"top_p": (0.5, 0), "top_k": (5, 1), "min_p": (0.1,), "frequency_penalty": (0.5,), "presence_penalty": (-1,)},
    **{"repetition_penalty": (1.1,), "logit_bias": ({"5": 1},), "logprobs": (True, 3), "response_format": ({},)},
    **{"tools": ([{"name": "f"}],), "tool_choice": ("auto",), "reasoning_effort": ("low",), "cache": (True,)},
    **{"temperature": (-0.1, 2.5, float("nan"), "0.5", True), "max_tokens": (0, -1, 1.5), "stop": ("", [""], 3)},
    **{"seed": (-1, 0.5), "n": (0, -2), "num_generations": (3,), "best_of": (2,), "stream": (True,), "api_key": ("k",)},
}


def pairs(table):
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), [*pairs(HONOURED), *pairs(NEUTRAL), ("top_p", None)])
def test_what_is_honoured_or_changes_nothing_passes(name, value):
    check_options({name: value})


@pytest.mark.parametrize(("name", "value"), pairs(REFUSED))
def test_everything_else_is_refused_with_its_value_and_a_remedy(name, value):
    with pytest.raises(UserError, match=rf"^here: {name} is .*: [a-z].* .*"):
        check_options({name: value}, "here: ")


def test_the_nearest_option_is_named():
    with pytest.raises(UserError, match="maxtokens is 5: a policy's LM has no such option; did you mean 'max_tokens'"):
        check_options({"maxtokens": 5})


def test_one_seed_for_several_completions_is_refused():
    with pytest.raises(UserError, match=r"seed is 7 and n is 3: every completion would be the same"):
        check_options({"seed": 7, "n": 3})
    check_options({"seed": 7, "n": 1})


# -- the doors of the LM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), pairs(REFUSED))
def test_no_option_is_dropped_on_the_way_by_dspy(policy, name, value):
    asks = [lambda: policy.lm("a", **{name: value}), lambda: policy.lm.copy(**{name: value})]
    # Prompt formats write tools into the prompt; dspy.Predict itself fails at a temperature that is text.
    if name not in ("tools", "tool_choice") and not isinstance(value, str):
        asks += [
            lambda: dspy.Predict("a -> b", **{name: value})(a="1", lm=policy.lm),
            lambda: dspy.Predict("a -> b")(a="1", lm=policy.lm, config={name: value}),
        ]
    for ask in asks:
        with pytest.raises(UserError, match=f"^{name} is "):
            ask()
    assert policy.engine.requests == []


def test_what_is_asked_reaches_the_engine(policy):
    lm = policy.lm.copy(temperature=0.25, stop=["STOP"])
    assert lm("a", max_tokens=9, seed=3) == ["yes"]
    request = policy.engine.requests[-1]
    assert (request.temperature, request.stop, request.max_tokens, request.seed) == (0.25, ("STOP",), 9, 3)
    assert lm("a", n=3) == ["yes"] * 3
    assert len({request.seed for request in policy.engine.requests[-3:]}) == 3


def test_requests_that_are_made_by_hand_are_refused_too(policy):
    tool = FunctionTool(name="f", description="d", parameters={"type": "object", "properties": {}})
    for request, named in (
        (Request(model=policy.lm.model, messages=(Message.user("a"),), config=Config(top_p=0.5)), "top_p is 0.5"),
        (Request(model=policy.lm.model, messages=(Message.user("a"),), config=Config(logprobs=0)), "logprobs is True"),
        (
            Request(model=policy.lm.model, messages=(Message.user("a"),), config=Config(extensions={"min_p": 0.1})),
            "min_p is 0.1",
        ),
        (Request(model=policy.lm.model, messages=(Message.user("a"),), config=Config(), tools=(tool,)), "tools is "),
    ):
        with pytest.raises(LMError, match=named) as raised:
            policy.lm(request)
        assert isinstance(raised.value.__cause__, UserError)


def test_a_plain_request_asks_for_nothing():
    assert options_of(Request(model="m", messages=(Message.user("a"),), config=Config())) == {}


def test_a_rollout_is_told_even_where_the_program_catches_it(policy):
    recorder = Recorder(policy, 0, 1.0)
    with dspy.context(**{SETTING: recorder}), pytest.raises(UserError):
        policy.lm("a", top_p=0.5)
    assert "top_p is 0.5" in str(recorder.refused)
    frozen = Recorder(policy, 0, 1.0)
    with dspy.context(**{SETTING: frozen}), pytest.raises(UserError):
        policy.base_lm("a", top_k=5)
    assert "top_k is 5" in str(frozen.refused)


def test_a_closed_policy_says_so(policy):
    policy.close()
    with pytest.raises(EngineError, match=r"^Policy\(.*\) is closed and answers no more: make a new Policy"):
        policy.lm("a")
