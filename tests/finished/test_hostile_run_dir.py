"""A run directory is data, and may come from anybody: attacks that it could make, and that nothing came of them.

Nothing ran: a canary file is not there. No request left: a listener heard nothing. Nothing was read through a link.
"""

import json
import os
import pickle
import shutil
import sys
from contextlib import closing

import dspy
import pytest

from fst_optimizer import Policy, UserError, load
from fst_optimizer.engines.vllm import engine as vllm_engine
from fst_optimizer.finished import recorded
from fst_optimizer.finished.export import export_run
from fst_optimizer.finished.load import checked_state, load_policy, read_finished
from fst_optimizer.finished.recorded import base_of, recorded_policy, scoring_config
from fst_optimizer.finished.score import score_task
from fst_optimizer.finished.serve import policy_server, server_settings
from fst_optimizer.store.files import ADAPTER_CONFIG, ADAPTER_TENSORS, RunFiles, check_run_dir, read_json
from fst_optimizer.task_run import RunRequest, plan_run
from fst_optimizer.testing import ScriptedEngine
from helpers.hostile import Scripted
from helpers.toy import Program, answer, run_toy

LETTERS = "programs/letters:sort-rotate"
KEY = "planted-key-0123456789"
EVIL = """
from pathlib import Path
Path({canary!r}).write_text("it ran")
raise SystemExit
"""


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A run whose best pair has an adapter, and whose base is a folder."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    with Policy(tiny_model, engine=lambda policy: ScriptedEngine(policy, answer, context_length=4096)) as policy:

        def metric(example, prediction):
            return policy.version / 10 + (prediction.answer == "right") / 2

        run_toy(folder, policy, metric=metric, progress=False)
    assert read_json(folder / "result.json")["policy_version"]
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy that nothing in `result.json` vouches for: whoever forges a run forges that too."""
    folder = shutil.copytree(finished, tmp_path / "run")
    change(folder / "result.json", lambda result: result.pop("files"))
    return folder


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture
def listener(monkeypatch):
    """A server on loopback that must not be asked anything, and every key there is."""
    for name in ("FST_API_KEY", "OPENAI_API_KEY", "HOSTED_VLLM_API_KEY"):
        monkeypatch.setenv(name, KEY)
    with closing(Scripted(lambda handler, path, count: handler.answer(404, b"{}"))) as server:
        yield server


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def policy_of(run, **values):
    """Values over `policy` in its config.json."""
    change(run / "config.json", lambda config: config["policy"].update(values))


def adapter_of(run):
    return RunFiles(run).adapter(read_json(run / "result.json")["policy_version"])


def uses(run, model, out):
    """Everything that reads a finished run: they must not differ in what they refuse."""
    return {
        "load": lambda: load(run, program=Program(), model=model),
        "eval": lambda: score_task(LETTERS, run, model=model and str(model)),
        "serve": lambda: policy_server(run, model=model),
        "export": lambda: export_run(run, out, model=model),
        "merge": lambda: export_run(run, out, model=model, merge=True),
    }


# -- code ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["in the run", "in the current directory", "in place of one of ours", "a module"])
def test_the_task_that_a_run_names_does_not_run(run, canary, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    folder = {
        "in the run": run / "evil",
        "in place of one of ours": tmp_path / "programs" / "letters",
    }.get(place, tmp_path / "evil")
    folder.mkdir(parents=True)
    (folder / "task.py").write_text(EVIL.format(canary=str(canary)))
    (folder / "__init__.py").write_text(EVIL.format(canary=str(canary)))
    name = {"in the run": str(folder), "in place of one of ours": LETTERS}.get(place, "evil")
    change(run / "config.json", lambda config: config.update(task=name))
    with pytest.raises(UserError, match=r"pass program=|is not that of the run"):
        load(run)
    with pytest.raises(UserError, match="is not that of the run"):
        score_task(write_mine(tmp_path / "mine"), run)
    assert not canary.exists() and "evil" not in sys.modules


def write_mine(folder):
    """A task of the caller's: its own code runs, and no other."""
    folder.mkdir()
    (folder / "task.py").write_text(
        "from fst_optimizer.tasks import shipped_task\n"
        f"letters = shipped_task({LETTERS!r})\n"
        "build_program, metric, load = letters.build_program, letters.metric, letters.load\n"
    )
    return str(folder)


def test_a_task_that_the_package_has_is_built_by_its_name_wherever_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (LETTERS, "programs/math"):
        assert recorded.recorded_task({"task": name}, "run").build_program()
    for name in ("programs/../programs/letters", "fst_optimizer.tasks", "programs/none", "/etc", "", None, 3, ["x"]):
        with pytest.raises(UserError, match="not trusted to say which code runs: pass program="):
            recorded.recorded_task({"task": name}, "run")


def test_an_adapters_settings_import_nothing_and_are_not_passed_on(run, canary, tmp_path, tiny_model, monkeypatch):
    monkeypatch.syspath_prepend(run)
    (run / "evil_module.py").write_text(EVIL.format(canary=str(canary)))
    mapping = {"base_model_class": "Evil", "parent_library": "evil_module"}
    saved = adapter_of(run)
    change(
        saved / ADAPTER_CONFIG,
        lambda settings: settings.update(
            auto_mapping=mapping, task_type=None, base_model_name_or_path="/etc", runtime_config={"x": 1}, revision="x"
        ),
    )
    (saved / "modeling_evil.py").write_text(EVIL.format(canary=str(canary)))
    (saved / "notes.bin").write_bytes(b"x")
    export_run(run, tmp_path / "out", model=tiny_model)
    export_run(run, tmp_path / "merged", model=tiny_model, merge=True)
    server = policy_server(run, model=tiny_model)
    (served,) = server.adapters.values()
    for folder in (tmp_path / "out" / "adapter", served):
        assert sorted(path.name for path in folder.iterdir()) == [ADAPTER_CONFIG, ADAPTER_TENSORS]
        found = read_json(folder / ADAPTER_CONFIG)
        assert not {"auto_mapping", "runtime_config", "revision"} & found.keys()
        assert found["base_model_name_or_path"] == str(tiny_model) and found["r"] == 16
    assert not canary.exists()
    assert server.command()[-1] == f"fst-policy={served}"  # not the run's own folder


@pytest.mark.parametrize(
    "values",
    [
        {"peft_type": "IA3"},
        {"r": 10**9},
        {"r": "16"},
        {"lora_alpha": -1},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"bias": "all"},
    ],
)
def test_an_adapter_that_is_no_plain_one_is_refused(run, tmp_path, tiny_model, values):
    change(adapter_of(run) / ADAPTER_CONFIG, lambda settings: settings.update(values))
    for use in (
        lambda: policy_server(run, model=tiny_model),
        lambda: export_run(run, tmp_path / "o", model=tiny_model),
    ):
        with pytest.raises(UserError, match=r"adapter_config\.json is not that of plain LoRA"):
            use()
    assert not (tmp_path / "o").exists()


# -- flags, addresses, devices and paths ----------------------------------------------------------------------------

HOSTILE_SERVER = {
    "flags": ["--middleware", "evil.Plugin", "--host", "0.0.0.0", "--trust-remote-code"],
    "devices": "7",
    "cpu_threads": "0-63",
    "adapter_dir": "/etc",
    "log_file": "/etc/evil.log",
    "cpu_kv_cache_gib": 10**6,
    "max_live_versions": 10**6,
    "start_timeout_s": 1e9,
    "max_model_len": 77,
    "gpu_memory_utilization": 0.3,
}


def test_a_server_gets_none_of_a_runs_flags_devices_and_paths(run, tiny_model, caplog):
    policy_of(run, engine="vllm", vllm=HOSTILE_SERVER)
    server = policy_server(run, model=tiny_model)
    command = server.command()
    assert not {"evil.Plugin", "0.0.0.0", "--trust-remote-code", "/etc"} & set(command)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--max-model-len") + 1] == "77"
    assert server.environment()["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert not str(server.log_file).startswith("/etc")
    assert 'vllm.flags=["--middleware", "evil.Plugin"' in caplog.text and "vllm.devices" in caplog.text
    assert "give again what is still wanted (--set vllm.NAME=VALUE)" in caplog.text
    given = server_settings(run, ['vllm.flags=["--enforce-eager"]'])
    assert given.flags == ("--enforce-eager",) and given.max_model_len == 77


def test_a_load_and_a_resume_get_none_of_them_either(run, tiny_model, monkeypatch, caplog):
    policy_of(run, engine="vllm", vllm=HOSTILE_SERVER)
    seen = []
    monkeypatch.setattr("fst_optimizer.policy.policy.make_engine", lambda policy, *_, **__: seen.append(policy.vllm))
    load_policy(RunFiles(run), read_json(run / "config.json"), 0, str(tiny_model))
    (run / "result.json").unlink()
    task = run.parent / "mine"
    write_mine(task)
    request = RunRequest(str(task), run, model=str(tiny_model), resume=True, sets=("vllm.devices=0",))
    seen.append(plan_run(request).settings.vllm)
    for found in seen:
        assert (found.flags, found.adapter_dir, found.log_file, found.cpu_kv_cache_gib) == ((), None, None, 1)
        assert found.max_model_len == 77
    assert (seen[0].devices, seen[1].devices) == (None, "0")
    said = [one.getMessage() for one in caplog.records if "not taken from its files" in one.getMessage()]
    assert "vllm.devices" in said[0] and "vllm.devices" not in said[1]


def test_the_settings_of_another_run_bring_no_flags(run, tiny_model, caplog, tmp_path):
    policy_of(run, vllm=HOSTILE_SERVER)
    plan = plan_run(RunRequest(LETTERS, tmp_path / "new", config_file=run / "config.json"))
    assert plan.settings.vllm.flags == () and "vllm.flags" in caplog.text
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"vllm": {"flags": ["--enforce-eager"]}}))
    assert plan_run(RunRequest(LETTERS, tmp_path / "new", config_file=own)).settings.vllm.flags == ("--enforce-eager",)


def test_no_server_that_a_run_names_is_asked(run, listener, tiny_model, monkeypatch):
    policy_of(run, engine="vllm", url=listener.url)
    monkeypatch.setattr(vllm_engine, "VLLMEngine", None)  # none is made
    refused = r"an address in a run's files is never asked: give it again \(--url, url=\)"
    with pytest.raises(UserError, match=refused):
        load(run, program=Program(), model=tiny_model)
    (run / "result.json").unlink()
    with pytest.raises(UserError, match=refused):
        plan_run(RunRequest(LETTERS, run, model=str(tiny_model), resume=True))
    assert plan_run(RunRequest(LETTERS, run, model=str(tiny_model), resume=True, engine="torch"))
    assert not listener.asked


def test_the_caller_may_attach_to_the_server_again(run, listener, tiny_model):
    policy_of(run, engine="vllm", url="http://127.0.0.1:9")
    with pytest.raises(UserError, match=listener.url):
        load(run, program=Program(), model=tiny_model, url=listener.url)
    assert listener.asked and KEY in str(listener.headers)  # the caller's server, and so the caller's key


@pytest.mark.parametrize("dtype", ["--middleware=evil.Plugin", "float8", 3])
def test_a_dtype_is_one_of_torchs(run, tiny_model, dtype):
    policy_of(run, dtype=dtype)
    with pytest.raises(UserError, match=r"config\.json: policy\.dtype is .*is this the file of a run"):
        policy_server(run, model=tiny_model)


# -- the base --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["load", "eval", "serve", "export", "merge"])
def test_a_base_in_a_folder_is_named_by_the_caller_alone(run, tmp_path, use):
    with pytest.raises(UserError, match=r"a path in a run's files is not followed|is not that of the run"):
        uses(run, None, tmp_path / "out")[use]()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("use", ["load", "serve", "export", "merge"])
def test_a_base_that_the_caller_names_is_compared_with_the_runs(run, tmp_path, use):
    with pytest.raises(UserError, match="is not the one that the run was made with"):
        uses(run, "letters", tmp_path / "out")[use]()
    assert not (tmp_path / "out").exists()


def test_only_a_name_says_which_base_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "here").mkdir(parents=True)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "config.json").write_text("{}")

    def base(name):
        return base_of(recorded_policy({"policy": {"model": name}}, "config.json"), None)

    assert base("owner/name") == "owner/name"
    assert base("letters") == base("programs/letters/model") == base(base("letters"))
    assert not base("letters").startswith(str(tmp_path))
    for name in ("owner/here", "../x/y", "./model", "/etc", "-x/--flag", "owner/../..", "x", "", "http://a/b", "a\0/b"):
        with pytest.raises(UserError, match="a path in a run's files is not followed: say where that model is"):
            base(name)


# -- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["load", "eval", "serve", "export", "merge", "resume"])
@pytest.mark.parametrize("linked", ["config.json", "program.json", "policy", "the adapter", ADAPTER_TENSORS, "deep"])
def test_links_are_followed_nowhere(run, tmp_path, tiny_model, use, linked):
    outside = tmp_path / "outside"
    place = {
        "the adapter": adapter_of(run),
        ADAPTER_TENSORS: adapter_of(run) / ADAPTER_TENSORS,
        "deep": adapter_of(run) / "more" / "secrets",
    }.get(linked, run / linked)
    if linked == "deep":
        outside.write_text("secret")
        place.parent.mkdir()
    else:
        place.rename(outside)
    place.symlink_to(outside)
    if use == "resume":
        (run / "result.json").unlink()
    with pytest.raises(UserError, match="is a link and leads out of the run directory"):
        if use == "resume":
            check_run_dir(run, resume=True)
        else:
            uses(run, tiny_model, tmp_path / "out")[use]()
    assert not (tmp_path / "out").exists()


def test_a_link_within_the_run_and_a_pipe_are_refused_too(run, tmp_path):
    (run / "state.json").unlink()
    (run / "state.json").symlink_to("result.json")
    with pytest.raises(UserError, match=r"is a link and leads to 'result\.json'"):
        read_finished(run)
    (run / "state.json").unlink()
    os.mkfifo(run / "state.json")
    with pytest.raises(UserError, match="is neither a file nor a folder"):
        read_finished(run)


def test_the_run_directory_itself_may_be_a_link(run, tmp_path, tiny_model):
    (tmp_path / "latest").symlink_to(run)
    assert export_run(tmp_path / "latest", tmp_path / "out", model=tiny_model)


# -- program.json ----------------------------------------------------------------------------------------------------


def test_an_lm_that_a_program_file_names_is_never_asked(run, listener, tiny_model, tmp_path):
    state = {
        "_dspy_lm_class": "dspy.clients.lm.LM",
        **{"model": "openai/gpt-4o-mini", "model_type": "chat", "cache": False, "num_retries": 0},
        **{"api_base": f"{listener.url}/v1", "base_url": f"{listener.url}/v1", "extra_headers": {"x": "y"}},
    }
    change(run / "program.json", lambda program: program["second"].update(lm=state))
    with pytest.raises(UserError, match=r"predictor 'second' had an LM of its own .* \('openai/gpt-4o-mini'\), which"):
        load(run, program=Program(), model=tiny_model)
    export_run(run, tmp_path / "out", model=tiny_model)
    exported = read_json(tmp_path / "out" / "program.json")
    assert listener.url not in json.dumps(exported) and exported["second"]["lm"]["model"] == "openai/gpt-4o-mini"
    assert not listener.asked


def test_a_program_file_sets_texts_and_demos_and_nothing_else(run, listener, tiny_model, tmp_path):
    state = read_json(run / "program.json")
    state["second"] |= {"config": {"api_base": f"{listener.url}/v1"}, "callbacks": ["x"], "forward": "y", "lm": None}
    state["second"]["demos"] = [{"middle": "a", "answer": "b"}]
    program = Program()
    own = program.second.lm = dspy.LM("openai/gpt-4o-mini", api_base="http://127.0.0.1:9/v1", num_retries=0)
    program.load_state(checked_state(state, program, "run"))
    assert program.second.config == {} and callable(program.second.forward) and not program.second.callbacks
    assert program.second.demos == [{"middle": "a", "answer": "b"}]
    (run / "program.json").write_text(json.dumps(state))
    loaded = Program()
    loaded.second.lm = own
    loaded = load(run, program=loaded, model=tiny_model)
    assert loaded.second.lm is own
    with pytest.raises(Exception, match=r"[Cc]onnect"):
        loaded.second(middle="x")
    loaded.first.lm.engine.policy.close()
    assert not listener.asked
    export_run(run, tmp_path / "out", model=tiny_model)
    assert listener.url not in (tmp_path / "out" / "program.json").read_text()


@pytest.mark.parametrize(
    "part",
    [3, [], {}, {"signature": {}}, {"signature": {"instructions": 3, "fields": []}}, {"signature": {"fields": [1]}}],
)
def test_a_state_of_another_shape_is_no_predictors(run, tiny_model, part):
    change(run / "program.json", lambda program: program.update(second=part))
    with pytest.raises(UserError, match="'second' is no state of a predictor"):
        load(run, program=Program(), model=tiny_model)


def test_a_pickle_is_not_looked_for(run, canary, tiny_model):
    class Evil:
        def __reduce__(self):
            return (canary.write_text, ("it ran",))

    for name in ("program.pkl", "program.json"):
        (run / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"program\.json: not readable as JSON"):
        load(run, program=Program(), model=tiny_model)
    assert not canary.exists()


# -- numbers and shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_tokens": 10**12}, r"policy\.max_tokens"),
        ({"max_tokens": "32"}, r"policy\.max_tokens"),
        ({"lora": {"rank": 10**9}}, r"lora\.rank"),
        ({"lora": {"alpha": 10**400}}, r"lora\.alpha"),
        ({"lora": [1]}, r"lora is \[1\]"),
        ({"seed": -1}, r"policy\.seed"),
        ({"model": ["x"]}, r"policy\.model"),
        ({"model": "x" * 5000}, r"policy\.model"),
        ({"chat_template_args": {"chat_template": "{% for i in range(10**9) %}{% endfor %}"}}, "chat_template"),
        ({"chat_template_args": {"tokenize": False}}, "tokenize"),
        ({"chat_template_args": {"x": {"deep": [1]}}}, "chat_template_args"),
        ({"engine": {"a": 1}}, r"policy\.engine"),
    ],
)
def test_a_value_that_no_run_has_is_refused_by_name(run, tiny_model, values, named):
    policy_of(run, **values)
    for use in ("load", "serve", "export"):
        with pytest.raises(UserError, match=rf"config\.json: .*{named}"):
            uses(run, tiny_model, run.parent / "out")[use]()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' * 100_000, '{"a": ' + "9" * 5000 + "}", "\0", "[]", '{"a": 1}']
)
@pytest.mark.parametrize("name", ["config.json", "program.json", "result.json"])
def test_a_file_that_is_no_runs_is_refused_in_words(run, tiny_model, name, text):
    (run / name).write_text(text)
    with pytest.raises(
        UserError, match=r"is damaged|is this a run directory|not readable as JSON|the file of a run|holds list|'a'"
    ):
        load(run, program=Program(), model=tiny_model)


@pytest.mark.parametrize("version", [-1, 1.5, True, "1", "../../x", 10**30, None])
def test_a_policy_version_is_a_number(run, tiny_model, version):
    change(run / "result.json", lambda result: result.update(policy_version=version))
    for use in ("load", "serve", "export"):
        with pytest.raises(UserError, match="policy_version is"):
            uses(run, tiny_model, run.parent / "out")[use]()


def test_numbers_that_could_hang_a_scoring_are_bounded(run):
    config = read_json(run / "config.json")["config"]
    config["rollout"] |= {"num_threads": 10**9, "timeout_s": 1e9}
    found = scoring_config(config).rollout
    assert (found.num_threads, found.timeout_s) == (256, 86_400.0)
    change(run / "config.json", lambda one: one["data"].update(test={"examples": 10**15}))
    with pytest.raises(UserError, match=r"data\.test\.examples is 1000000000000000"):
        recorded.recorded_size(read_json(run / "config.json"), "test")


# -- what goes on working --------------------------------------------------------------------------------------------


def test_program_and_task_are_not_given_together(run):
    with pytest.raises(UserError, match="program and task are both given"):
        load(run, program=Program(), task=LETTERS)


def test_the_line_that_a_run_prints_loads_it(finished, tiny_model):
    program = load(finished, program=Program(), model=tiny_model)
    policy = program.first.lm.engine.policy
    assert policy.lm_version == read_json(finished / "result.json")["policy_version"]
    policy.close()
