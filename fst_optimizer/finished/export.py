"""`fst export`: what a finished run learned, in files that need nothing of this library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fst_optimizer.engines.vllm.installed import served_rank
from fst_optimizer.engines.vllm.server import SERVED_NAME
from fst_optimizer.errors import UserError
from fst_optimizer.finished.adapter import ADAPTER, write_adapter
from fst_optimizer.finished.load import METADATA, FinishedRun, as_saved, plain_state, read_finished
from fst_optimizer.finished.recorded import RecordedPolicy, base_of, check_given_base
from fst_optimizer.model.load import model_place
from fst_optimizer.store.files import read_json, write_json
from fst_optimizer.store.folders import temporary_folder
from fst_optimizer.store.guard import check_place
from fst_optimizer.text import code_span, markdown

MODEL, PROGRAM, README = "model", "program.json", "README.md"
LM_CLASS, DSPY_LM = "_dspy_lm_class", "dspy.clients.lm.LM"
"""Where an LM's state names its class, and dspy's own."""
OF_AN_LM = (
    *("model", "model_type", "cache", "num_retries", "temperature", "max_tokens", "max_completion_tokens", "top_p"),
    *("seed", "n", "reasoning_effort"),
)
_LM_NAME = re.compile(r"[\w.-]+(/[\w.:@+-]+)*")
README_TEMPLATE = Path(__file__).with_name("export_readme.md")


def export_run(
    run_dir: str | Path,
    out: str | Path,
    *,
    merge: bool = False,
    model: str | None = None,
    name: str = SERVED_NAME,
    trust_remote_code: bool = False,
) -> list[Path]:
    """Write a finished run's program and weights into `out`, all or nothing.

    `out` gets `program.json`, which `dspy.Module.load` reads, a README.md that says how everything is used, and either
    `adapter/`, a peft LoRA folder, or `model/`, the base with the adapter merged into it in float32. The program's LM
    is `hosted_vllm/NAME`; where that is served, HOSTED_VLLM_API_BASE and HOSTED_VLLM_API_KEY say.

    Args:
        run_dir: What `FST(run_dir=...)` or `fst compile --run-dir` left.
        out: A folder that does not exist yet, or is empty.
        merge: Whether to merge. Takes 4 bytes of memory and of disk for every parameter of the base.
        model: Where the base model is now. None: as the run names it, where that is no folder but a name.
        name: The name that the program's LM asks for.
        trust_remote_code: Whether code in the model's folder may run.

    Returns:
        The paths written.

    Raises:
        UserError: the run is not finished, `out` holds something, there is no adapter to export, or the base model is
            missing or another one.
    """
    out, run = Path(out), read_finished(run_dir)
    check_place(out, "out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out is {str(out)!r}, which holds something: give a folder that does not exist yet")
    made = run.policy
    source = model_place(base_of(made, model))
    if run.adapter is None and not merge:
        raise UserError(
            f"the run in {str(run_dir)!r} ended at policy version 0, the base itself: there is no adapter to export; "
            "--merge exports the base"
        )
    saved = read_json(run.files.program)
    state = plain_state(saved, str(run_dir))
    program = as_saved(plain_program(state, plain_lm(made, source, name, trust_remote_code)), saved)
    program[METADATA] = {"dependency_versions": versions_of(saved)}
    if run.adapter is not None and not merge:
        check_given_base(made, model, source, trust_remote_code)
    with temporary_folder(f".{out.name}.", out.parent) as temporary:
        new = temporary / out.name
        new.mkdir()
        if merge or run.adapter is None:
            _write_merged(run, source, new / MODEL, trust_remote_code)
        else:
            write_adapter(run.adapter, new / ADAPTER, source)
        write_json(new / PROGRAM, program)
        (new / README).write_text(_readme(run, source, name, merge))
        if out.exists():
            out.rmdir()
        new.rename(out)
    return [out / (MODEL if merge else ADAPTER), out / PROGRAM, out / README]


def plain_program(state: Mapping[str, Mapping[str, Any]], lm: Mapping[str, Any]) -> dict[str, Any]:
    """A program's DSPy state with `lm` wherever the policy was. A predictor's own other LM stays, by name and numbers.

    An address or a header in a run's file would take along the key of whoever loads the export.
    """
    return {name: {**part, "lm": lm if part["lm"] == {} else other_lm(part["lm"])} for name, part in state.items()}


def versions_of(saved: Mapping[str, Any]) -> dict[str, str]:
    """The library versions in a program's state that dspy compares with its own."""
    from dspy.utils.saving import get_dependency_versions

    found = saved.get(METADATA)
    recorded = found.get("dependency_versions") if isinstance(found, Mapping) else None
    versions = recorded if isinstance(recorded, Mapping) else {}
    return {name: versions[name] for name in get_dependency_versions() if isinstance(versions.get(name), str)}


def other_lm(saved: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What is kept of the state of an LM of dspy's own. None for any other."""
    if not saved or saved.get(LM_CLASS, DSPY_LM) != DSPY_LM or not _LM_NAME.fullmatch(str(saved.get("model"))):
        return None
    kept = {name: saved[name] for name in OF_AN_LM if isinstance(saved.get(name), bool | int | float | str)}
    return {LM_CLASS: DSPY_LM, **kept}


def plain_lm(made: RecordedPolicy, source: str, name: str, trust_remote_code: bool) -> dict[str, Any]:
    """The state of a `dspy.LM` that asks a server for what the policy's own LM gives: greedy, and nothing added.

    `made` is `policy` in the run's config.json; `source` is the base model, for the tokens that end a turn.
    """
    import dspy

    # Said with every request: a server may have taken other defaults from the model's generation_config.json.
    extra: dict[str, Any] = {
        "top_k": 0,
        "repetition_penalty": 1.0,
        "stop_token_ids": _end_ids(source, trust_remote_code),
    }
    if made.chat_template_args:
        extra["chat_template_kwargs"] = dict(made.chat_template_args)
    lm = dspy.LM(f"hosted_vllm/{name}", temperature=0.0, top_p=1.0, max_tokens=made.max_tokens, extra_body=extra)
    state: dict[str, Any] = lm.dump_state()
    return state


def _end_ids(source: str, trust_remote_code: bool) -> list[int]:
    from transformers import AutoConfig, GenerationConfig

    from fst_optimizer.engines.base import end_ids
    from fst_optimizer.model.load import load_tokenizer

    tokenizer = load_tokenizer(source, trust_remote_code)
    try:
        generation = GenerationConfig.from_pretrained(source)
    except OSError:  # an older model has none of its own
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        generation = GenerationConfig.from_model_config(config)
    return end_ids(generation, tokenizer)


def _write_merged(run: FinishedRun, source: str, folder: Path, trust_remote_code: bool) -> None:
    """The base in float32, plus the adapter, and its tokenizer."""
    from peft import PeftModel

    from fst_optimizer.model.load import check_fingerprint, fingerprint, load_base, load_tokenizer

    # On the CPU: a base that fills a GPU in half precision does not fit there in float32.
    model = load_base(source, "float32", "cpu", trust_remote_code)
    check_fingerprint(fingerprint(model), run.policy.to_dict(), source)
    if run.adapter is not None:
        with temporary_folder(".adapter.", folder.parent) as temporary:
            write_adapter(run.adapter, temporary / ADAPTER, source)
            model = PeftModel.from_pretrained(model, str(temporary / ADAPTER)).merge_and_unload(safe_merge=True)
    model.save_pretrained(str(folder))
    load_tokenizer(source, trust_remote_code).save_pretrained(str(folder))


ADAPTER_CODE = """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({source!r})
model = PeftModel.from_pretrained(base, "adapter")"""
MERGED_CODE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")"""


def _readme(run: FinishedRun, source: str, name: str, merge: bool) -> str:
    rank = run.policy.lora.rank
    if merge:
        row = "| `model/` | the base with the adapter merged into it, in float32, with its tokenizer |"
        serve = f"vllm serve model --served-model-name {name}"
        code = MERGED_CODE
    else:
        row = f"| `adapter/` | a LoRA adapter (rank {rank}) for that base, as peft and vLLM read it |"
        lora = f"--enable-lora --max-lora-rank {served_rank(rank)} --lora-modules {name}=adapter"
        serve = f"vllm serve {source} {lora}"
        code = ADAPTER_CODE.format(source=source)
    about = {field: markdown(str(run.result.get(field))) for field in ("method", "seed", "policy_version")}
    task = code_span(str(run.result.get("task")))
    limit = run.policy.max_tokens
    return README_TEMPLATE.read_text().format(
        source=source, name=name, row=row, serve=serve, code=code, max_tokens=limit, task=task, **about
    )
