"""Answers that no vLLM would send: refused, in bounded room and time, and never trained on."""

import asyncio
import gzip
import json
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_optimizer import FST, FSTConfig, Policy, UserError, VLLMConfig
from fst_optimizer.engines.base import Generation, GenerationRequest
from fst_optimizer.engines.vllm import client as vllm_client
from fst_optimizer.engines.vllm.answers import Answer, body_limit, context_of, generation_of, models_of
from fst_optimizer.engines.vllm.client import VLLMClient
from fst_optimizer.errors import EngineError
from fst_optimizer.tasks import load_task
from fst_optimizer.train.trainer import Trainer
from helpers.hostile import LikeVLLM, Scripted
from helpers.toy import SHORT

REAL = json.loads(Path(__file__).with_name("vllm_answer.json").read_text())
"""What vLLM 0.32 answered to this request."""
REQUEST = GenerationRequest((72, 101, 108, 108, 111), 6, seed=3)
VOCABULARY, END = 259, 257


def understood(answer, request=REQUEST):
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return generation_of(body, "base", request, vocabulary=VOCABULARY, end_ids=[END])


def changed(**parts):
    """The real answer with other parts of its choice, or of itself."""
    choice = {**REAL["choices"][0]}
    for name, value in parts.items():
        if name == "token_logprobs":
            choice["logprobs"] = {**choice["logprobs"], name: value}
        elif name in choice:
            choice[name] = value
    return {**REAL, "choices": [choice], **{name: value for name, value in parts.items() if name in REAL}}


IDS, NATS = REAL["choices"][0]["token_ids"], REAL["choices"][0]["logprobs"]["token_logprobs"]


# -- one answer -----------------------------------------------------------------------------------------------------


def test_a_real_answer_is_understood():
    assert understood(REAL) == Generation(tuple(IDS), tuple(NATS), "length")


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"token_logprobs": [float("nan"), *NATS[1:]]}, r"logprobs\[0\] is nan"),
        ({"token_logprobs": [*NATS[:-1], float("-inf")]}, r"logprobs\[5\] is -inf"),
        ({"token_logprobs": [*NATS[:-1], -9999.0]}, r"logprobs\[5\] is -9999"),
        ({"token_logprobs": [5.0, *NATS[1:]]}, r"logprobs\[0\] is 5\.0; .* at most 0"),
        ({"token_logprobs": [None, *NATS[1:]]}, r"logprobs\[0\] is None"),
        ({"token_logprobs": [True, *NATS[1:]]}, r"logprobs\[0\] is True"),
        ({"token_logprobs": ["-1", *NATS[1:]]}, r"logprobs\[0\] is '-1'"),
        ({"token_logprobs": NATS[:-1]}, "6 token ids with 5 log-probs"),
        ({"token_logprobs": {"0": -1.0}}, "logprobs is {'0': -1.0}; a list is needed"),
        ({"token_ids": [], "token_logprobs": []}, "0 token ids with 0 log-probs"),
        ({"token_ids": [1] * 3000, "token_logprobs": [-1.0] * 3000}, "3000 token ids where max_tokens was 6"),
        ({"token_ids": [VOCABULARY, *IDS[1:]]}, r"token_ids\[0\] is 259; the model has the tokens 0 to 258"),
        ({"token_ids": [-1, *IDS[1:]]}, r"token_ids\[0\] is -1"),
        ({"token_ids": [10**400, *IDS[1:]]}, r"token_ids\[0\] is 1000"),
        ({"token_ids": [1.0, *IDS[1:]]}, r"token_ids\[0\] is 1\.0"),
        ({"token_ids": [True, *IDS[1:]]}, r"token_ids\[0\] is True"),
        ({"token_ids": [END, *IDS[1:]]}, r"token_ids\[0\] is 257; it ends the turn, and more tokens follow"),
        ({"token_ids": "123456"}, "token_ids is '123456'; a list is needed"),
        ({"token_ids": None}, "no token ids"),
        ({"logprobs": None}, "no token ids and log-probs"),
        ({"finish_reason": "stop"}, r"finish_reason is 'stop'; the last token, \d+, does not end a turn"),
        ({"finish_reason": "abort"}, "finish_reason is 'abort'"),
        ({"finish_reason": None}, "finish_reason is None"),
        ({"token_ids": IDS[:3], "token_logprobs": NATS[:3]}, "finish_reason is 'length'; 3 of 6 tokens were sampled"),
        ({"prompt_token_ids": [72, 101]}, "another prompt"),
        ({"model": "gpt-5"}, "answered for model 'gpt-5', asked was 'base'"),
        ({"model": None}, "answered for model None"),
        ({"choices": []}, r"no token ids: choices is \[\]"),
        ({"choices": [REAL["choices"][0]] * 2}, "not one object"),
        ({"choices": "many"}, "choices is 'many'"),
    ],
)
def test_an_answer_that_cannot_be_is_refused_with_its_field_and_value(parts, words):
    with pytest.raises(EngineError, match=words):
        understood(changed(**parts))


@pytest.mark.parametrize(
    "body", [b"", b"not json", b"{}", b"[1]", b"1", b"null", b"[" * 100_000, b'{"choices": 1' + b"0" * 5000]
)
def test_an_answer_that_means_nothing_is_an_engine_error(body):
    with pytest.raises(EngineError, match="no token ids"):
        understood(body)


def test_what_follows_a_stop_string_may_end_without_an_end_token():
    request = GenerationRequest(REQUEST.prompt_ids, 6, stop=("x",))
    assert understood(changed(finish_reason="stop"), request).finish_reason == "stop"


def test_rounding_may_leave_a_logprob_a_little_above_0():
    assert understood(changed(token_logprobs=[1e-6, *NATS[1:]])).logprobs[0] == 0.0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def places(value, path=()):
    """The path of everything in an answer."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield from places(inner, (*path, name))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def holds(generation, max_tokens=REQUEST.max_tokens, vocabulary=VOCABULARY):
    """What training relies on."""
    ids, nats = generation.completion_ids, generation.logprobs
    assert 0 < len(ids) == len(nats) <= max_tokens
    assert all(type(token) is int and 0 <= token < vocabulary for token in ids)
    assert all(-1000 < nat <= 0 for nat in nats)
    assert generation.finish_reason in ("stop", "length")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_real_answer_with_anything_in_it_replaced_is_refused_or_as_good(data):
    answer = REAL
    for _ in range(data.draw(st.integers(1, 3))):
        answer = replaced(answer, data.draw(st.sampled_from(list(places(answer)))), data.draw(JSON))
        if not isinstance(answer, dict | list):
            break
    try:
        generation = understood(answer)
    except EngineError:
        return
    holds(generation)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_real_answer_with_bytes_changed_is_refused_or_as_good(data):
    body = bytearray(json.dumps(REAL).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        generation = understood(bytes(body))
    except EngineError:
        return
    holds(generation)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_whatever_lists_models_is_a_list_of_names_or_refused(body):
    try:
        listed = models_of(body)
    except EngineError:
        return
    assert all(isinstance(model["id"], str) for model in listed)
    assert context_of(listed) is None or context_of(listed) > 0


@pytest.mark.parametrize("length", [None, "4096", 0, -1, True, 4096.5, 10**30])
def test_a_context_length_that_is_none_is_not_taken(length):
    assert context_of([{"id": "base", "max_model_len": length}]) is None
    assert context_of([{"id": "x", "parent": "base", "max_model_len": 9}, {"id": "base", "max_model_len": 8}]) == 8


def test_an_errors_words_reach_no_terminal_as_commands():
    assert Answer(400, b'{"error": {"message": "\\u001b[2Jgone"}}').message == "\\x1b[2Jgone"


def test_the_in_process_engine_is_held_to_the_same(tiny_model):
    import torch

    policy = Policy(tiny_model)
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(EngineError, match=r"logprobs\[0\] is nan"):
        policy.engine.submit(REQUEST).result(timeout=60)
    policy.close()


# -- over a connection ----------------------------------------------------------------------------------------------


@pytest.fixture
def serve():
    """Makes servers that are well and do `act(handler)` to completions."""
    made = []

    def make(act):
        def whole(handler, path, count):
            if path == "/health":
                handler.answer(200, b"")
            else:
                act(handler)

        made.append(Scripted(whole))
        return made[-1]

    yield make
    for server in made:
        server.close()


def asked(server, request=REQUEST):
    async def connected():
        client = VLLMClient([END], vocabulary=VOCABULARY, max_in_flight=8, timeout_s=60.0)
        await client.connect(server.url, "the-key-0123456789")
        try:
            return await client.complete("base", request)
        finally:
            await client.close()

    return asyncio.run(connected())


def without_end(handler):
    """Sends zeros for as long as anyone takes them, at most 1.5 GB."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1500000000\r\n\r\n")
    for _ in range(1500):
        handler.wfile.write(b"0" * 1_000_000)


def in_chunks(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(100_000):
        handler.wfile.write(b"4000\r\n" + b" " * 0x4000 + b"\r\n")


@pytest.mark.parametrize("act", [without_end, in_chunks])
def test_an_answer_without_limit_is_cut_off(serve, act):
    server = serve(act)
    tracemalloc.start()
    try:
        with pytest.raises(EngineError, match=f"longer than the {body_limit(REQUEST)} bytes that it may have"):
            asked(server)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert body_limit(REQUEST) < 100_000
    assert peak < 20_000_000
    assert server.asked["/v1/completions"] == 1


def test_a_compressed_answer_is_not_unpacked(serve):
    bomb = gzip.compress(b" " * 10_000_000)
    with pytest.raises(EngineError, match=r"compressed \('gzip'\), which nobody asked for"):
        asked(serve(lambda handler: handler.answer(200, bomb, Content_Encoding="gzip")))


def test_an_answer_that_trickles_is_given_up(serve, monkeypatch):
    monkeypatch.setattr(vllm_client, "BODY_S", 0.3)

    def trickle(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n")
        for _ in range(200):
            handler.wfile.write(b" ")
            time.sleep(0.02)

    with pytest.raises(EngineError, match=r"did not end within 0\.3 s of its beginning"):
        asked(serve(trickle))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_the_key_goes_nowhere_else(serve, status):
    elsewhere = serve(lambda handler: handler.answer(200, json.dumps(REAL).encode()))
    here = serve(lambda handler: handler.answer(status, b"", Location=f"{elsewhere.url}/v1/completions"))
    with pytest.raises(EngineError, match=f"the server answered {status}"):
        asked(here)
    assert not elsewhere.headers


def test_what_speaks_no_http_is_an_engine_error(serve):
    def noise(handler):
        handler.wfile.write(b"\x00\xff SSH-2.0-OpenSSH\r\n\r\n")
        handler.close_connection = True

    with pytest.raises(EngineError):
        asked(serve(noise))


# -- a server that is attached to -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>It works!</html>", "no list of models, as it is no JSON object: .*It works!"),
        (b"{}", "lists no models: data is None"),
        (b'{"data": [1]}', r"lists no models: data is \[1\]"),
        (b'{"data": []}', "no vLLM server, or one that lists no base model"),
        (b'{"data": [{"id": "base", "max_model_len": "long"}]}', "no vLLM server, or one that lists no base model"),
    ],
)
def test_a_url_of_something_else_that_answers_is_a_mistake_in_the_settings(tiny_model, body, words):
    server = Scripted(lambda handler, path, count: handler.answer(200, body))
    with pytest.raises(UserError, match=words) as refused:
        Policy(tiny_model, engine="vllm", url=server.url, api_key="the-key-0123456789")
    server.close()
    assert "the-key-0123456789" not in str(refused.value)


def test_a_server_that_never_answers_its_first_completion_is_given_up(tiny_model):
    server = LikeVLLM(tiny_model, lambda answer, count: time.sleep(3) or answer)
    with pytest.raises(UserError, match=r"did not answer its first request within 0\.5 s \(vllm\.start_timeout_s\)"):
        Policy(tiny_model, engine="vllm", url=server.url, vllm=VLLMConfig(start_timeout_s=0.5))
    server.close()


LIES = {
    "nan": lambda choice: choice["logprobs"].update(token_logprobs=[float("nan")] * len(choice["token_ids"])),
    "above 0": lambda choice: choice["logprobs"].update(token_logprobs=[5.0] * len(choice["token_ids"])),
    "too many": lambda choice: choice.update(
        token_ids=[1] * 3000, logprobs={"token_logprobs": [-1.0] * 3000}, finish_reason="length"
    ),
    "no such token": lambda choice: choice.update(token_ids=[10**6] * len(choice["token_ids"])),
}


def test_a_server_that_begins_to_lie_within_a_run_is_never_trained_on(tmp_path, monkeypatch, lines):
    task, told = load_task("programs/letters"), []

    def change(answer, count):
        if count > 10 and count % 4 == 0:  # the first two are the check on attaching
            told.append(sorted(LIES)[count // 4 % len(LIES)])
            LIES[told[-1]](answer["choices"][0])
        return answer

    trained = []
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, rows, *more: trained.extend(rows) or step(self, rows, *more))
    server = LikeVLLM(task.model(), change)
    policy = Policy(task.model(), engine="vllm", url=server.url, max_tokens=24)
    try:
        program = task.build_program()
        program.set_lm(policy.lm)
        config = FSTConfig.from_dict(SHORT).with_values({"rollout.group_size": 6, "fast.max_proposals": 0})
        fst = FST(task.metric, config=config, run_dir=tmp_path / "run")
        fst.compile(program, trainset=task.load("train", 4), valset=task.load("val", 2))
    finally:
        policy.close()
        server.close()
    (found,) = [line for line in lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]
    assert found["failed"] > 0 and found["updated"]
    assert trained and set(told) == set(LIES)
    for row in trained:
        call = row.call
        holds(
            Generation(call.completion_ids, call.logprobs, call.finish_reason),
            task.module.MAX_TOKENS,
            len(policy.tokenizer),
        )
