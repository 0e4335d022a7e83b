"""Random mistakes and random damage: each ends as if it were not there, or in one sentence that says what is wrong.

`FST_FUZZ_SEED=7 FST_FUZZ_CASES=20` tries others, and more of each kind. The settings have a fuzz of their own in
`tests/config/test_odd_arguments.py`.
"""

import asyncio
import json
import math
import os
import random
import shutil
import threading
from functools import partial
from pathlib import Path

import dspy
import pytest

import fst_optimizer
from fst_optimizer.engines.base import GenerationRequest
from fst_optimizer.engines.vllm.answers import generation_of
from fst_optimizer.errors import EngineError, FSTError
from fst_optimizer.rollout.metric import Metric
from fst_optimizer.store.files import read_json
from fst_optimizer.text import clock
from fst_optimizer.types import Item
from helpers.toy import SHORT, TRAIN, VAL, Program, answer, optimizer, student_of, untimed_metrics

SEED, CASES = int(os.environ.get("FST_FUZZ_SEED", "0")), int(os.environ.get("FST_FUZZ_CASES", "2"))


# -- metrics ---------------------------------------------------------------------------------------------------------


def odd_value(rng, depth=0):
    """Anything that a function may return."""
    plain = [
        *(None, True, 0, 1, -3, 10**400, 0.5, -0.0, math.nan, math.inf, 1e308, "", "good", "\udcff", "\0", b"1", 1j),
        *(object(), object, len, clock, {}, [], (), {1, 2}, range(3), Exception("no"), lambda: 1),
    ]
    makers = [
        lambda: dspy.Prediction(score=odd_value(rng, depth + 1), feedback=odd_value(rng, depth + 1)),
        lambda: {"score": odd_value(rng, depth + 1), "feedback": odd_value(rng, depth + 1)},
        lambda: {str(odd_value(rng, 9)): odd_value(rng, depth + 1)},
        lambda: [odd_value(rng, depth + 1)] * rng.randrange(3),
        lambda: type("Odd", (), {rng.choice(DUNDERS): raises(odd_error(rng, KINDS))})(),
        lambda: type("Odd", (), {"score": property(raises(odd_error(rng)))})(),
        lambda: type("Float", (float,), {rng.choice(DUNDERS): raises(odd_error(rng, KINDS))})(0.5),
    ]
    return rng.choice(plain) if depth > 2 or rng.random() < 0.5 else rng.choice(makers)()


DUNDERS = ("__float__", "__str__", "__repr__", "__bool__", "__len__", "__getattr__", "__index__", "__eq__", "__hash__")


KINDS = (ValueError, KeyError, RecursionError, MemoryError, StopIteration)
ENDS = (SystemExit, GeneratorExit, KeyboardInterrupt, asyncio.CancelledError)


def odd_error(rng, kinds=(*KINDS, *ENDS)):
    return rng.choice(kinds)(rng.choice(("", "no", "\udcff", 3)))


def raises(error):
    def function(*_):
        raise error

    return function


def gives(value):
    return lambda example, prediction: value


def test_a_metric_gives_a_finite_score_and_words_or_an_error_that_names_it():
    rng, item = random.Random(f"metrics/{SEED}"), Item("train-0", TRAIN[0])
    judged = 0
    for _ in range(1000):
        metric = Metric(raises(odd_error(rng)) if rng.random() < 0.2 else gives(odd_value(rng)))
        try:
            found = in_a_thread(partial(metric.judge, item, dspy.Prediction(answer="x")))
        except FSTError as refused:
            assert "on example train-0" in str(refused) and len(str(refused)) < 2000
            continue
        assert math.isfinite(found.score) and type(found.score) is float
        json.dumps([found.score, found.feedback], ensure_ascii=False).encode()
        judged += 1
    assert judged > 100


def in_a_thread(function):
    """As metrics run: where an interrupt cannot be a Ctrl-C."""
    done = []

    def work():
        try:
            done.append((function(), None))
        except BaseException as error:
            done.append((None, error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    result, error = done[0]
    if error is not None:
        raise error
    return result


# -- answers of a server ---------------------------------------------------------------------------------------------

REAL = (Path(__file__).parent / "engines" / "vllm_answer.json").read_text()
REQUEST = GenerationRequest((72, 101, 108, 108, 111), 6, seed=3)


def places(data):
    """(holder, key) of everything inside."""
    for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
        yield data, key
        if isinstance(value, dict | list):
            yield from places(value)


def odd_answer(rng):
    data = json.loads(REAL)
    for _ in range(rng.randrange(1, 3)):
        holder, key = rng.choice(list(places(data)))
        odd = [
            None,
            True,
            -1,
            0,
            5,
            258,
            259,
            2**70,
            0.5,
            -0.5,
            math.nan,
            -math.inf,
            "",
            "stop",
            "length",
            [],
            {},
            [[]],
        ]
        change = rng.randrange(4)
        if change == 0:
            del holder[key]
        elif change == 1 and isinstance(holder, list):
            holder.insert(key, holder[key])
        else:
            holder[key] = rng.choice(odd)
    body = bytearray(json.dumps(data).encode())
    if rng.random() < 0.3:
        place = rng.randrange(len(body))
        body[place] ^= 1 << rng.randrange(8)
    return bytes(body[: rng.randrange(len(body))] if rng.random() < 0.1 else body)


def test_an_answer_of_a_server_is_a_sane_generation_or_an_engine_error():
    rng = random.Random(f"answers/{SEED}")
    understood = 0
    for _ in range(3000):
        body = odd_answer(rng)
        try:
            found = generation_of(body, "base", REQUEST, vocabulary=259, end_ids=[257])
        except EngineError:
            continue
        understood += 1
        assert 0 < len(found.completion_ids) == len(found.logprobs) <= REQUEST.max_tokens, body
        assert all(type(one) is int and 0 <= one < 259 for one in found.completion_ids), body
        assert all(math.isfinite(one) and one <= 1e-3 for one in found.logprobs), body
        assert found.finish_reason in ("stop", "length"), body
    assert understood > 300


# -- run directories -------------------------------------------------------------------------------------------------


def damages(root, rng, secret):
    """(what, function of a copy of the run) for each file below `root`, some places in it at random."""
    for path in sorted(one for one in root.rglob("*") if one.is_file()):
        name = path.relative_to(root)
        kinds = ["remove", "empty", "cut", "link", "folder", *["flip"] * CASES, *["digit"] * CASES]
        for kind in rng.sample(kinds, 1 + CASES):
            yield f"{kind} {name}", partial(damage, name=name, kind=kind, share=rng.random(), secret=secret)


def damage(copy, *, name, kind, share, secret):
    path = copy / name
    body = path.read_bytes()
    place = int(share * len(body))
    path.unlink()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(body[:place])
    elif kind == "link":
        path.symlink_to(secret)
    elif kind == "folder":
        path.mkdir()
    elif kind == "flip" and body:
        path.write_bytes(body[:place] + bytes([body[place] ^ (1 << int(share * 8e3) % 8)]) + body[place + 1 :])
    elif kind == "digit":  # still JSON, and another number
        places = [at for at, byte in enumerate(body) if chr(byte) in "12345678"]
        at = places[int(share * len(places))] if places else None
        path.write_bytes(body if at is None else body[:at] + bytes([body[at] + 1]) + body[at + 1 :])


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """A finished run, one that was interrupted, and what the latter comes to."""
    from fst_optimizer.policy.policy import Policy
    from fst_optimizer.testing import ScriptedEngine

    def make(name, **options):
        policy = Policy(tiny_model, engine=lambda policy: ScriptedEngine(policy, answer, context_length=4096))
        try:
            fst = optimizer(root / name, settings=SHORT, progress=False, **options)
            fst.compile(student_of(policy), trainset=TRAIN, valset=VAL)
        finally:
            policy.close()

    root = tmp_path_factory.mktemp("fuzz")
    make("finished", values={"fast.max_proposals": 0, "budget.max_cycles": 2})
    with pytest.raises(KeyboardInterrupt):
        make("unfinished", callbacks=[interrupt])
    make("whole")
    return root, make


def interrupt(line):
    if line["kind"] == "step":
        raise KeyboardInterrupt


def meaning(run_dir, model):
    """What a user gets of a finished run: instructions, weights, and how the LM answers."""
    program = fst_optimizer.load(run_dir, program=Program(), model=str(model), engine="torch")
    policy = program.first.lm.engine.policy
    try:
        version = program.first.lm.version
        tensors = {name: tensor.tolist() for name, tensor in policy.tensors(version).items()} if version else {}
        made = (policy.max_tokens, policy.seed, policy.chat_template_args, policy.lora)
        return program.dump_state(), version, tensors, made
    finally:
        policy.close()


def tried(root, rng, tmp_path, attempt):
    """Whether each damage left the same, as (what, outcome)."""
    secret = tmp_path / "secret"
    secret.write_text("{}")
    copy, found = tmp_path / "copy", {}
    every = list(damages(root, rng, secret))
    for what, spoil in rng.sample(every, min(len(every), 12 * CASES)):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(root, copy, symlinks=True)
        spoil(copy)
        try:
            found[what] = attempt(copy)
        except FSTError as error:
            assert str(error).strip() and len(str(error)) < 3000, what
            found[what] = "refused"
        except BaseException as error:
            raise AssertionError(f"seed {SEED}: {what}: {type(error).__name__}: {error}") from error
        assert secret.read_text() == "{}", f"seed {SEED}: {what} was written through"
    return found


def test_a_damaged_finished_run_loads_as_it_was_or_is_refused(runs, tiny_model, tmp_path):
    root, _ = runs
    whole = meaning(root / "finished", tiny_model)

    def attempt(run):
        return meaning(run, tiny_model) == whole or "other"

    found = tried(root / "finished", random.Random(f"finished/{SEED}"), tmp_path, attempt)
    assert not [what for what, outcome in found.items() if outcome == "other"], f"seed {SEED}"
    assert {"refused", True} == set(found.values())


def test_a_damaged_unfinished_run_ends_as_it_would_have_or_is_refused(runs, tmp_path):
    root, make = runs

    def comes_to(run):
        return read_json(run / "result.json") | {"wall_s": 0, "alarms": [], "files": {}}

    whole = comes_to(root / "whole")

    def attempt(run):
        target = root / "copy"
        shutil.rmtree(target, ignore_errors=True)
        run.rename(target)
        make("copy", resume=True)
        found = comes_to(target)
        return {name: value for name, value in found.items() if value != whole[name]} or True

    found = tried(root / "unfinished", random.Random(f"unfinished/{SEED}"), tmp_path, attempt)
    assert {what: outcome for what, outcome in found.items() if outcome not in ("refused", True)} == {}, f"seed {SEED}"
    assert {"refused", True} == {outcome if outcome == "refused" else True for outcome in found.values()}


@pytest.mark.parametrize(("name", "kind"), [("metrics.jsonl", "folder"), ("checkpoint/*/state.json", "remove")])
def test_what_the_fuzz_found(runs, tmp_path, name, kind):
    root, make = runs
    shutil.copytree(root / "unfinished", root / f"found-{kind}")
    last = max((root / f"found-{kind}").glob(name)).relative_to(root / f"found-{kind}")
    damage(root / f"found-{kind}", name=last, kind=kind, share=0.5, secret=tmp_path)
    if kind == "remove":  # state.json is another copy of it
        make(f"found-{kind}", resume=True)
        assert untimed_metrics(root / f"found-{kind}") == untimed_metrics(root / "whole")
    else:
        with pytest.raises(FSTError, match=r"metrics\.jsonl is no file: a run goes on from its own files"):
            make(f"found-{kind}", resume=True)
