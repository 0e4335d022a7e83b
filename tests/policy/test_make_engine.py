import pytest

from fst_optimizer import Policy, UserError, VLLMConfig


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": "torch", "url": "http://localhost:1"}, "url is .*engine='vllm' alone"),
        ({"engine": "torch", "vllm": VLLMConfig()}, "engine='vllm' alone"),
        ({"engine": lambda policy: None, "url": "http://localhost:1"}, "engine='vllm' alone"),
        ({"engine": "vllm", "url": "localhost:8000"}, "http://"),
        ({"engine": "vlm"}, "did you mean 'vllm'"),
        ({"quantization": "int3"}, "quantization is 'int3'"),
        ({"quantization": "nf4", "device": "cpu"}, "needs a GPU"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tiny_model, settings, words):
    with pytest.raises(UserError, match=words):
        Policy(tiny_model, **settings)


def test_nobody_at_the_url_is_the_users_mistake(tiny_model):
    with pytest.raises(UserError, match=r"no answer from .*restart it with.*--max-lora-rank 16 --max-loras 6 "):
        Policy(tiny_model, engine="vllm", url="http://127.0.0.1:9")


def test_a_callable_makes_the_engine_from_the_policy(scripted):
    policy = scripted(lambda prompt, request: "x")
    assert policy.engine_name == "custom"
    assert policy.engine.policy is policy
