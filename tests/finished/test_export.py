"""What `fst export` writes is read here by processes in which this library cannot be imported."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

import fst_optimizer
from fst_optimizer import UserError
from fst_optimizer.engines.base import GenerationRequest
from fst_optimizer.engines.vllm import supervisor
from fst_optimizer.engines.vllm.installed import entry_point
from fst_optimizer.engines.vllm.server import SERVED_NAME, free_port
from fst_optimizer.finished.export import export_run
from fst_optimizer.finished.load import load_policy
from fst_optimizer.store.files import RunFiles, checksum, read_json, write_json
from fst_optimizer.tasks import load_task
from fst_optimizer.testing import as_row
from helpers.fst import LETTERS, SMALL, fst
from helpers.servers import group, hear_interrupts, need_vllm

pytestmark = pytest.mark.slow  # the letters model really learns

ALONE = "import json, sys; sys.modules['fst_optimizer'] = None\n"
"""Makes `import fst_optimizer` fail."""
PROMPT = tuple(range(10, 30))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run whose best pair is the newest version, which is far from the base."""
    folder = tmp_path_factory.mktemp("export") / "run"
    far = ("--set", "train.warmup_steps=0", "--set", "train.lr=1e-2", "--set", "rollout.batch_size=8")
    said = fst("compile", LETTERS, "--run-dir", folder, "--seed", 3, *SMALL, *far)
    assert said.exit_code == 0, said.output
    newest = read_json(RunFiles(folder).state)["state"]["policy_version"]
    assert newest > 0
    files = RunFiles(folder)
    result, adapter = read_json(files.result), files.adapter(newest)
    own = {path.relative_to(folder).as_posix(): checksum(path) for path in adapter.iterdir()}
    write_json(files.result, {**result, "policy_version": newest, "files": {**result["files"], **own}})
    return folder


@pytest.fixture(scope="module")
def ended_at_the_base(run, tmp_path_factory):
    folder = shutil.copytree(run, tmp_path_factory.mktemp("export") / "base")
    write_json(RunFiles(folder).result, {**read_json(RunFiles(folder).result), "policy_version": 0})
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The folders of the adapter and of the merged model, as the command writes them."""
    root = tmp_path_factory.mktemp("exported")
    for name, flags in (("adapter", ()), ("merged", ("--merge",))):
        said = fst("export", run, "--out", root / name, *flags)
        assert said.exit_code == 0, said.output
        assert said.stdout.count("wrote ") == 3
    return root


def ours(run, version):
    """The log-probs that the run's policy gives to what it says after PROMPT, and what that is."""
    policy = load_policy(RunFiles(run), read_json(RunFiles(run).config), version)
    request = GenerationRequest(PROMPT, 12, temperature=1.0, version=version, seed=7)
    generation = policy.engine.submit(request).result(timeout=60)
    tensors = policy.tensors(version) if version else None
    logprobs = policy.logprobs_of([as_row(request, generation).call], tensors)[0]
    policy.close()
    return generation.completion_ids, logprobs


def alone(code, *arguments, **environment):
    """Run code in a process without this library; what it prints last is JSON."""
    ran = subprocess.run(
        [sys.executable, "-c", ALONE + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


LOGPROBS = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
prompt, completion = json.loads(sys.argv[1]), json.loads(sys.argv[2])
if len(sys.argv) == 5:
    from peft import PeftModel
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[4]), sys.argv[3])
else:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[3])
    assert model.dtype is torch.float32 and AutoTokenizer.from_pretrained(sys.argv[3]).chat_template
with torch.no_grad():
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
picked = logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
print(json.dumps(picked.tolist()))
"""


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_plain_peft_and_transformers_compute_what_the_policy_computes(run, exported, kind):
    version = read_json(RunFiles(run).result)["policy_version"]
    completion, expected = ours(run, version)
    base = read_json(exported / "adapter" / "adapter" / "adapter_config.json")["base_model_name_or_path"]
    paths = (exported / "adapter" / "adapter", base) if kind == "adapter" else (exported / "merged" / "model",)
    found = alone(LOGPROBS, json.dumps(PROMPT), json.dumps(completion), *paths)
    assert found == pytest.approx(expected, abs=1e-4)
    unlearned = alone(LOGPROBS, json.dumps(PROMPT), json.dumps(completion), base)
    assert max(abs(a - b) for a, b in zip(unlearned, expected, strict=True)) > 0.01


PROGRAM = """
import os
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
import dspy

# The task's code is the user's own; it uses the file of helpers for writing tasks, which stands alone.
spec = spec_from_file_location("fst_optimizer.task_kit", TASK_KIT)
sys.modules[spec.name] = kit = module_from_spec(spec)
spec.loader.exec_module(kit)
task = import_module("programs.letters.task")
program = task.build_program("sort-rotate")
program.load(sys.argv[1])
examples = task.load("test", 12, variant="sort-rotate")
with dspy.context(adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
    def ask(example):
        try:
            return program(**example.inputs()).answer
        except dspy.utils.exceptions.AdapterParseError:
            return None
    answers = [ask(example) for example in examples]
lm = program.predictors()[0].lm
instructions = [p.signature.instructions for p in program.predictors()]
print(json.dumps({"answers": answers, "model": lm.model, "instructions": instructions}))
""".replace("TASK_KIT", repr(str(Path(fst_optimizer.__file__).with_name("task_kit.py"))))


@pytest.fixture(scope="module")
def loaded_answers(run):
    """What the loaded program answers, by this library."""
    program = fst_optimizer.load(run)
    from dspy.utils.exceptions import AdapterParseError

    def ask(example):
        try:
            return program(**example.inputs()).answer
        except AdapterParseError:
            return None

    examples = load_task(LETTERS).load("test", 12)
    answers = [ask(example) for example in examples]
    program.predictors()[0].lm.engine.policy.close()
    assert any(answers)
    return answers


def check_answers(exported, url, key, run, expected):
    said = alone(
        PROGRAM,
        exported / "program.json",
        HOSTED_VLLM_API_BASE=f"{url}/v1",
        HOSTED_VLLM_API_KEY=key,
        DSPY_CACHEDIR=str(exported / "cache"),
    )
    assert said["model"] == f"hosted_vllm/{SERVED_NAME}"
    assert said["instructions"] == list(read_json(RunFiles(run).result)["candidate"].values())
    same = sum(a == b for a, b in zip(said["answers"], expected, strict=True))
    assert same >= len(expected) - 1, (said["answers"], expected)  # a near tie may fall otherwise in other kernels


@pytest.mark.vllm
def test_the_exported_program_runs_on_what_fst_serve_serves(run, exported, loaded_answers):
    need_vllm()
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "fst_optimizer.cli.main", "serve", str(run), "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_interrupts,
        env={**os.environ, "FST_API_KEY": "planted-key"},
    )
    try:
        said = ""
        while "in dspy" not in said and (line := process.stdout.readline()):
            said += line
        assert f"serving   {SERVED_NAME} at http://127.0.0.1:{port}/v1" in said, process.stderr.read()
        assert "planted-key" not in said
        servers = psutil.Process(process.pid).children(recursive=True)
        check_answers(exported / "adapter", f"http://127.0.0.1:{port}", "planted-key", run, loaded_answers)
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/load_lora_adapter", b"{}", {"Authorization": "Bearer planted-key"}
        )
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(request)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        process.kill()  # its server goes with it, whatever happened
        process.wait()
    assert process.returncode == 130
    _, alive = psutil.wait_procs(servers, timeout=30)
    assert servers and not alive


@pytest.mark.vllm
def test_the_merged_model_is_served_by_plain_vllm(run, exported, loaded_answers):
    need_vllm()
    port = free_port()
    command = [*entry_point(str(exported / "merged" / "model")), "--port", str(port), "--host", "127.0.0.1"]
    command += ["--served-model-name", SERVED_NAME, "--generation-config", "vllm", "--dtype", "float32"]
    log = exported / "plain.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, supervisor.__file__, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=out,
            env={**os.environ, "VLLM_API_KEY": "key", "VLLM_CPU_KVCACHE_SPACE": "1"},
        )
    pid = int(process.stdout.readline())
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", process, log)
        check_answers(exported / "merged", f"http://127.0.0.1:{port}", "key", run, loaded_answers)
    finally:
        process.stdin.close()
        process.wait(60)
    assert not group(pid)


def wait_until_healthy(url, process, log):
    while process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2)
            return
        except OSError:
            try:
                process.wait(0.3)
            except subprocess.TimeoutExpired:
                continue
    raise AssertionError(log.read_text()[-2000:])


def test_the_readme_of_an_export_says_how_to_use_it(exported):
    adapter, merged = ((exported / name / "README.md").read_text() for name in ("adapter", "merged"))
    assert f"--enable-lora --max-lora-rank 16 --lora-modules {SERVED_NAME}=adapter" in adapter
    assert f"vllm serve model --served-model-name {SERVED_NAME}" in merged
    for text in (adapter, merged):
        assert "{" not in text and 'program.load("program.json")' in text


def test_an_exported_program_asks_for_what_the_run_was_scored_with(exported):
    for name in ("adapter", "merged"):
        (predictor,) = [part for part in read_json(exported / name / "program.json").values() if "lm" in part]
        lm = predictor["lm"]
        assert (lm["model"], lm["temperature"], lm["max_tokens"]) == (f"hosted_vllm/{SERVED_NAME}", 0.0, 32)
        assert "api_key" not in lm


def test_a_folder_that_holds_something_is_refused(run, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="holds something"):
        export_run(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_another_base_model_is_refused_and_nothing_is_written(run, tiny_model, tmp_path):
    with pytest.raises(UserError, match="is not the one that the run was made with"):
        export_run(run, tmp_path / "out", merge=True, model=str(tiny_model))
    assert not list(tmp_path.iterdir())


def test_a_run_that_ended_at_the_base_has_no_adapter_but_can_be_merged(ended_at_the_base, tmp_path):
    with pytest.raises(UserError, match=r"no adapter to export; --merge exports the base"):
        export_run(ended_at_the_base, tmp_path / "out")
    export_run(ended_at_the_base, tmp_path / "out", merge=True)
    completion, expected = ours(ended_at_the_base, 0)
    found = alone(LOGPROBS, json.dumps(PROMPT), json.dumps(completion), tmp_path / "out" / "model")
    assert found == pytest.approx(expected, abs=1e-4)


def test_an_unfinished_run_is_not_exported(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    RunFiles(folder).result.unlink()
    said = fst("export", folder, "--out", tmp_path / "out")
    assert said.exit_code == 2 and "holds an unfinished run" in said.stderr
    assert fst("serve", folder).exit_code == 2


def test_serving_takes_settings_of_the_server_alone(run):
    said = fst("serve", run, "--set", "train.lr=1")
    assert said.exit_code == 2
    assert "only settings of the server can be given here" in said.stderr
