from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import Qwen3ForCausalLM

from fst_optimizer.config.policy import LoraConfig
from fst_optimizer.errors import StorageError, UserError
from fst_optimizer.model import lora

IDS_BT = torch.tensor([[1, 2, 3, 4, 5, 6]])
MakeModel = Callable[[], PeftModel]
MakeBase = Callable[[], Qwen3ForCausalLM]
Moved = Callable[[PeftModel], PeftModel]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS_BT).logits  # type: ignore[no-any-return]


def is_training(model: PeftModel) -> bool:
    """`default` is active, enabled, and alone in requiring gradients."""
    wanted = {name for name, p in model.named_parameters() if ".default." in name and "lora_" in name}
    required = {name for name, p in model.named_parameters() if p.requires_grad}
    return required == wanted and model.active_adapters == ["default"] and model.get_model_status().enabled is True


def test_a_fresh_adapter_is_the_base(make_base: MakeBase, model: PeftModel) -> None:
    assert torch.equal(logits(model), logits(make_base()))
    assert is_training(model)
    assert not model.training


def test_every_linear_layer_but_the_head_is_adapted(model: PeftModel) -> None:
    names = lora.snapshot(model)
    # 2 layers x (q, k, v, o, gate, up, down) x (A, B).
    assert len(names) == 28
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert not any("lm_head" in name or "embed" in name for name in names)


def test_the_seed_decides_the_matrices_and_spares_the_global_rng(make_base: MakeBase) -> None:
    base = [make_base() for _ in range(3)]
    before = torch.random.get_rng_state()
    first, again, other = (lora.snapshot(lora.attach(b, seed=s)) for b, s in zip(base, (1, 1, 2), strict=True))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_target_modules_can_be_chosen(make_base: MakeBase) -> None:
    names = lora.snapshot(lora.attach(make_base(), LoraConfig(target_modules=["q_proj", "v_proj"])))
    assert {name.split(".")[-3] for name in names} == {"q_proj", "v_proj"}


def test_a_saved_adapter_loads_in_plain_peft(
    make_base: MakeBase, model: PeftModel, moved: Moved, tmp_path: Path
) -> None:
    moved(model)
    lora.save_adapter(model, lora.snapshot(model), tmp_path / "policy-000001")
    assert {path.name for path in (tmp_path / "policy-000001").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["policy-000001"]
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "policy-000001")
    assert torch.equal(logits(loaded), logits(model))


def test_the_saved_config_is_one_that_servers_read(model: PeftModel, tmp_path: Path) -> None:
    lora.save_adapter(model, lora.snapshot(model), tmp_path / "policy")
    config = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert sorted(config["target_modules"]) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert config["inference_mode"] is True
    assert model.peft_config["default"].inference_mode is False


def test_tensors_survive_the_disk_to_the_bit(model: PeftModel, moved: Moved, tmp_path: Path) -> None:
    tensors = lora.snapshot(moved(model))
    lora.save_adapter(model, tensors, tmp_path / "policy")
    loaded = lora.load_adapter_tensors(tmp_path / "policy")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_saving_replaces_an_older_adapter(model: PeftModel, moved: Moved, tmp_path: Path) -> None:
    lora.save_adapter(model, lora.snapshot(model), tmp_path / "policy")
    tensors = lora.snapshot(moved(model))
    lora.save_adapter(model, tensors, tmp_path / "policy")
    loaded = lora.load_adapter_tensors(tmp_path / "policy")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_a_failed_save_leaves_the_older_adapter(
    model: PeftModel, moved: Moved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = lora.snapshot(model)
    lora.save_adapter(model, old, tmp_path / "policy")

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(lora, "save_file", full_disk)
    with pytest.raises(StorageError, match=r"policy could not be written \(no space left"):
        lora.save_adapter(model, lora.snapshot(moved(model)), tmp_path / "policy")
    loaded = lora.load_adapter_tensors(tmp_path / "policy")
    assert all(torch.equal(loaded[name], old[name]) for name in old)
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_training_can_start_from_a_saved_adapter(
    make_base: MakeBase, model: PeftModel, moved: Moved, tmp_path: Path
) -> None:
    lora.save_adapter(moved(model), lora.snapshot(model), tmp_path / "policy")
    resumed = lora.attach_from(make_base(), tmp_path / "policy")
    assert is_training(resumed)
    assert not resumed.training
    assert torch.equal(logits(resumed), logits(model))
    with lora.active_adapter(resumed, None):
        assert torch.equal(logits(resumed), logits(make_base()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias=all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["lm_head"]}, "target lm_head"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_adapters_that_are_not_plain_lora_are_refused(
    make_base: MakeBase, model: PeftModel, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    lora.save_adapter(model, lora.snapshot(model), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=said):
        lora.attach_from(make_base(), tmp_path)


BROKEN = {
    "truncated": (
        lambda data: data[:-1000],
        r"adapter_model\.safetensors could not be read \(Error while deserializing",
    ),
    "empty": (lambda data: b"", r"adapter_model\.safetensors could not be read"),
    "zeros": (lambda data: bytes(len(data)), r"adapter_model\.safetensors could not be read"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_damaged_adapter_is_named(make_base: MakeBase, model: PeftModel, tmp_path: Path, damage: str) -> None:
    lora.save_adapter(model, lora.snapshot(model), tmp_path / "policy")
    path = tmp_path / "policy" / "adapter_model.safetensors"
    change, said = BROKEN[damage]
    path.write_bytes(change(path.read_bytes()))
    for use in (lora.load_adapter_tensors, lambda folder: lora.attach_from(make_base(), folder)):
        with pytest.raises(UserError, match=said):
            use(tmp_path / "policy")


def test_an_adapter_without_one_of_its_tensors_or_with_one_too_many_or_misshaped_is_refused(
    make_base: MakeBase, model: PeftModel, tmp_path: Path
) -> None:
    tensors = lora.snapshot(model)
    name = min(tensors)
    without = {key: value for key, value in tensors.items() if key != name}
    for wrong, said in (
        (without, rf"1 tensor \({name}\) missing"),
        ({**tensors, "base_model.more": tensors[name].clone()}, r"1 tensor \(base_model\.more\) unknown"),
        ({**tensors, name: tensors[name][:1]}, rf"the adapter's {name} is \(1, \d+\)"),
    ):
        lora.save_adapter(model, wrong, tmp_path / "policy")
        with pytest.raises(UserError, match=said):
            lora.attach_from(make_base(), tmp_path / "policy")


def test_an_adapter_whose_settings_are_damaged_is_refused(
    make_base: MakeBase, model: PeftModel, tmp_path: Path
) -> None:
    lora.save_adapter(model, lora.snapshot(model), tmp_path)
    path = tmp_path / "adapter_config.json"
    for text, said in (
        ("{", "not readable as JSON"),
        (json.dumps({**json.loads(path.read_text()), "target_modules": ["no_such"]}), "give the whole folder"),
        (json.dumps({**json.loads(path.read_text()), "r": 0}), "give the whole folder"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            lora.attach_from(make_base(), tmp_path)


def test_a_folder_without_an_adapter_is_refused(make_base: MakeBase, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        lora.attach_from(make_base(), tmp_path)


def test_a_version_does_not_change_while_default_trains(model: PeftModel, moved: Moved) -> None:
    published = logits(moved(model))
    tensors = lora.snapshot(model)
    lora.add_version(model, "policy-000001", tensors)
    with torch.no_grad():
        for tensor in (*lora.trained_parameters(model).values(), *tensors.values()):
            tensor.add_(1)
    with lora.active_adapter(model, "policy-000001"):
        assert torch.equal(logits(model), published)
    assert not torch.equal(logits(model), published)


def test_adding_a_version_spares_the_rng_and_the_trained_adapter(model: PeftModel) -> None:
    before, parameters = torch.random.get_rng_state(), lora.trained_parameters(model)
    lora.add_version(model, "policy-000001", lora.snapshot(model))
    assert torch.equal(before, torch.random.get_rng_state())
    assert is_training(model)
    assert all(parameters[name] is p for name, p in lora.trained_parameters(model).items())


def test_serving_switches_and_restores(make_base: MakeBase, model: PeftModel, moved: Moved) -> None:
    lora.add_version(model, "policy-000001", lora.snapshot(model))
    trained = logits(moved(model))
    for name in ("policy-000001", None):
        with lora.active_adapter(model, name):
            # Version 1 was published before the adapter moved, so it is the base as well.
            assert torch.equal(logits(model), logits(make_base()))
            assert not any(p.requires_grad for p in model.parameters())
        assert is_training(model)
        assert torch.equal(logits(model), trained)


def test_serving_restores_after_an_error(model: PeftModel) -> None:
    lora.add_version(model, "policy-000001", lora.snapshot(model))
    for name in ("policy-000001", None, "policy-000009"):
        with pytest.raises(ValueError, match=r"broken|not found"), lora.active_adapter(model, name):
            raise ValueError("broken")
        assert is_training(model)


def test_serving_leaves_accumulated_gradients(model: PeftModel) -> None:
    model(input_ids=IDS_BT, labels=IDS_BT).loss.backward()
    gradients = {name: p.grad for name, p in lora.trained_parameters(model).items()}
    with lora.active_adapter(model, None):
        logits(model)
    assert all(p.grad is gradients[name] for name, p in lora.trained_parameters(model).items())


def test_a_dropped_version_is_gone(model: PeftModel) -> None:
    lora.add_version(model, "policy-000001", lora.snapshot(model))
    lora.drop_version(model, "policy-000001")
    assert is_training(model)
    assert not any("policy-000001" in name for name, _ in model.named_parameters())
    lora.add_version(model, "policy-000001", lora.snapshot(model))


def test_restore_writes_in_place(model: PeftModel, moved: Moved) -> None:
    fresh, parameters = lora.snapshot(model), lora.trained_parameters(model)
    lora.restore(moved(model), fresh)
    assert all(torch.equal(p, fresh[name]) for name, p in parameters.items())
    with pytest.raises(UserError, match=r"27 tensors \(base_model.*, \.\.\. and 24 more\) missing$"):
        lora.restore(model, dict([next(iter(fresh.items()))]))
