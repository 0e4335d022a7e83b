import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fst_optimizer.errors import UserError
from fst_optimizer.model.load import (
    check_fingerprint,
    check_model_folder,
    check_tokenizer,
    fingerprint,
    load_base,
    load_tokenizer,
)
from fst_optimizer.testing import make_tiny_model


@pytest.mark.parametrize("model", ["no/such/folder", "./nowhere", "/nowhere", Path("owner/name"), "name"])
def test_what_is_neither_a_folder_nor_a_hub_name_is_refused(model):
    with pytest.raises(UserError, match=r"no such folder; give a model's folder or a hub name like owner/name"):
        check_model_folder(model)


def test_a_hub_name_is_left_to_the_hub():
    check_model_folder("owner/name")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"the folder has no config\.json"):
        check_model_folder(tmp_path)


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
