import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fst_optimizer.errors import UserError
from fst_optimizer.model.load import (
    check_fingerprint,
    check_tokenizer,
    fingerprint,
    load_base,
    load_tokenizer,
    model_place,
)
from fst_optimizer.testing import make_tiny_model


@pytest.mark.parametrize("model", ["no/such/folder", "./nowhere", "/nowhere", Path("owner/name"), "name"])
def test_what_is_neither_a_folder_nor_a_hub_name_is_refused(model):
    with pytest.raises(
        UserError, match=r"no such folder; give a model's folder, a hub name like owner/name, or 'letters'"
    ):
        model_place(model)


def test_a_hub_name_is_left_to_the_hub():
    assert model_place("owner/name") == "owner/name"


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"the folder has no config\.json"):
        model_place(tmp_path)


@pytest.mark.parametrize("name", ["letters", "programs/letters/model"])
def test_the_built_in_model_is_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letters").mkdir()  # any folder of that name, as runs and tasks have
    assert Path(model_place(name)).is_absolute()
    assert load_tokenizer(model_place(name), trust_remote_code=False).chat_template


def test_a_folder_with_a_model_goes_before_the_built_in_one(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, tmp_path / "letters")
    assert model_place("letters") == "letters"


def test_a_tokenizer_without_a_chat_template_is_refused(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no chat template; take the instruct variant"):
        load_tokenizer(str(folder), False)


def test_what_cannot_be_loaded_is_the_users_mistake(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="its tokenizer could not be loaded"):
        load_tokenizer(str(tmp_path), False)
    with pytest.raises(UserError, match="it could not be loaded"):
        load_base(str(tmp_path), "auto", "cpu", False)


def copy_of(model, folder):
    shutil.copytree(model, folder)
    return folder, folder / "model.safetensors"


UP = "model.layers.0.mlp.up_proj.weight"


def test_a_model_without_one_of_its_tensors_is_refused_by_name(tiny_model, tmp_path):
    folder, path = copy_of(tiny_model, tmp_path / "model")
    tensors = load_file(path)
    tensors.pop(UP)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"1 tensor \({UP}\) are not in its files, and would be filled at random; get"):
        load_base(str(folder), "auto", "cpu", False)
    for name in list(tensors)[:20]:
        tensors.pop(name)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"22 tensors \(.*, \.\.\. and 19 more\) are not in its files"):
        load_base(str(folder), "auto", "cpu", False)


def test_a_model_with_a_tensor_of_another_shape_is_refused_by_name(tiny_model, tmp_path):
    folder, path = copy_of(tiny_model, tmp_path / "model")
    save_file({**load_file(path), UP: torch.zeros(3, 3)}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"1 tensor \({UP} \(\(3, 3\), not \(\d+, \d+\)\)\) have another shape"):
        load_base(str(folder), "auto", "cpu", False)


def test_a_tied_head_is_not_missed(tiny_model, tmp_path):
    folder, path = copy_of(tiny_model, tmp_path / "model")
    assert "lm_head.weight" not in load_file(path)
    load_base(str(folder), "auto", "cpu", False)


@pytest.mark.parametrize("damage", [lambda data: data[:-1000], lambda data: b"", lambda data: bytes(len(data))])
def test_a_model_whose_weights_are_damaged_is_refused(tiny_model, tmp_path, damage):
    folder, path = copy_of(tiny_model, tmp_path / "model")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"it could not be loaded \(Error while deserializing header.*\); see that"):
        load_base(str(folder), "auto", "cpu", False)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"[1, 2]"])
def test_a_model_whose_settings_or_tokens_are_damaged_is_refused(tiny_model, tmp_path, name, damage):
    folder, _ = copy_of(tiny_model, tmp_path / "model")
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(UserError, match=r"could not be loaded|no chat template"):
        load_tokenizer(str(folder), False)
        load_base(str(folder), "auto", "cpu", False)


@pytest.mark.parametrize("settings", [{"hidden_size": "big"}, {"num_hidden_layers": 3}, {"model_type": "no_such"}])
def test_a_model_whose_settings_mean_nothing_is_refused(tiny_model, tmp_path, settings):
    folder, _ = copy_of(tiny_model, tmp_path / "model")
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    with pytest.raises(
        UserError, match=r"model is .*: it could not be loaded .*; see that the name is right and the files whole"
    ):
        load_base(str(folder), "auto", "cpu", False)


def test_on_cpu_a_model_is_loaded_in_float32_unless_another_dtype_is_named(tiny_model):
    assert load_base(str(tiny_model), "auto", "cpu", False).dtype is torch.float32
    assert load_base(str(tiny_model), "bfloat16", "cpu", False).dtype is torch.bfloat16
    with pytest.raises(UserError, match="dtype is 'floot32': did you mean 'float32'"):
        load_base(str(tiny_model), "floot32", "cpu", False)


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_another_models():
    model = SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=torch.zeros(3, 2)))
    check_tokenizer("m", [0] * 3, model)
    with pytest.raises(UserError, match="4 tokens and its embedding only 3 rows"):
        check_tokenizer("m", [0] * 4, model)


def test_a_fingerprint_tells_models_apart_in_any_dtype(tiny_model, tmp_path):
    one = fingerprint(load_base(str(tiny_model), "float32", "cpu", False))
    assert fingerprint(load_base(str(tiny_model), "bfloat16", "cpu", False)) == one
    other = load_base(str(make_tiny_model(tmp_path / "other", seed=1)), "float32", "cpu", False)
    assert fingerprint(other) != one


def test_a_run_is_not_loaded_on_another_model():
    made = {"fingerprint": "abc", "model": "then"}
    check_fingerprint("abc", made, "now")
    check_fingerprint("abc", {"model": "then"}, "now")
    with pytest.raises(UserError, match=r"the model in 'now' is not the one .*\('then' then\)"):
        check_fingerprint("def", made, "now")
