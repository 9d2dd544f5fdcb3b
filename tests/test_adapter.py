"""Merging, and adapter files: what is kept is kept exactly, and what does not fit is refused by
name.

Oracles: W0 + s B A worked out in float64; equality of logits and of bits before and after.
"""

import json
import math
import os
import re

import pytest
import torch
import torch.nn as nn

from bilora import (add_lora, auxiliary_parameters, load_adapter, lora_layers, merge_lora_,
                    primary_parameters, save_adapter)
from model import read_safetensors, write_safetensors
from test_steps import LAYERS, Net, adapted, assert_close, assert_same_bits, snapshot


def prepared(seed=0, rank=2, alpha=6, aux_rank=2, head=True, targets=None):
    """A float32 Net with adapters away from their initial values and a trainable head."""
    torch.manual_seed(0)
    net = Net()
    add_lora(net, rank, alpha, aux_rank, targets)
    net.head.requires_grad_(head)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in [*primary_parameters(net), *auxiliary_parameters(net), *net.head.parameters()]:
            p.copy_(torch.randn_like(p))
    return net.eval()


def assert_same_adapter(net, other):
    for name in LAYERS:
        ours, theirs = getattr(net, name), getattr(other, name)
        assert torch.equal(ours.lora_B, theirs.lora_B), f"{name}.lora_B"
        assert torch.equal(ours.lora_A, theirs.lora_A), f"{name}.lora_A"


# ------------------------------------------------------------------------------------------ merge


def test_merge_in_float64():
    net = adapted(aux_rank=2).eval()
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = {n: getattr(net, n).weight + 3.0 * getattr(net, n).lora_B @ getattr(net, n).lora_A
                for n in ("first", "shared", "last")}
    base, logits = {n: getattr(net, n).weight.clone() for n in expected}, net(x)
    assert merge_lora_(net) is net and not lora_layers(net)
    for name, W in expected.items():
        layer = getattr(net, name)
        assert type(layer) is nn.Linear and (layer.out_features, layer.in_features) == W.shape
        assert not layer.training, f"{name}: W0's layer was in eval mode, the merged one is not"
        assert not layer.weight.requires_grad, f"{name}: W0 was frozen, the merged weight is not"
        assert (layer.weight - base[name]).norm() > 0.1  # there was something to merge
        assert_close(layer.weight, W, f"Eq. (1), merged {name}.weight", rtol=1e-12, atol=1e-12)
    assert_close(net.train()(x), logits, "logits of the merged model", rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge_rounds_once(dtype):
    """Half an ulp of W at most, and the float32 sum before it: several roundings would leave the
    bound."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48)).to(dtype)
    (layer,) = add_lora(net, 8, 16)
    with torch.no_grad():
        layer.lora_B.normal_()
    exact = layer.weight.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
    merge_lora_(net)
    half_ulp = 2.0 ** torch.floor(torch.log2(exact.abs())) * torch.finfo(dtype).eps / 2
    assert net[0].weight.dtype == dtype
    off = ((net[0].weight.double() - exact).abs() / half_ulp).max()
    assert off <= 1 + 1e-3, f"Eq. (1), merged weight: off by {off:.3g} half ulps; one rounding is 1"


def test_merge_under_autocast():
    net = prepared()
    expected = net.first.weight + 3.0 * net.first.lora_B @ net.first.lora_A
    with torch.autocast("cpu", torch.bfloat16):
        merge_lora_(net)
    assert type(net.first) is nn.Linear
    torch.testing.assert_close(net.first.weight, expected, rtol=1e-6, atol=1e-6)


def test_merge_leaves_a_shared_base_weight_alone():
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "other": nn.Linear(3, 3)})
    net["b"], net["other"].weight = net["a"], net["a"].weight
    W = net["a"].weight.detach().clone()
    add_lora(net, 2, 4, targets="^[ab]$")
    with torch.no_grad():
        net["a"].lora_B.normal_()
    merge_lora_(net)
    assert net["a"] is net["b"]
    assert torch.equal(net["other"].weight, W), "W0, which another module shares, has changed"
    assert not torch.equal(net["a"].weight, W)


# ------------------------------------------------------------------------------------------ files


def test_round_trip(tmp_path):
    """A model that knows the base alone gives the same logits, head included.  That another process
    reads what this one writes: test_methods.py finds the same bytes in both."""
    net, x = prepared(), torch.arange(12.0).view(2, 6) / 10
    save_adapter(net, tmp_path)
    other = prepared(seed=5)
    assert not torch.equal(other(x), net(x))
    load_adapter(other, tmp_path)
    assert torch.equal(other(x), net(x))


def test_file_layout(tmp_path):
    net = prepared()
    save_adapter(net, tmp_path, rename={"first": "model.query", "head": "model.score"})
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.bin",
                                            "base_fingerprint.txt"]
    tensors = torch.load(tmp_path / "adapter_model.bin", weights_only=True)
    names = {"model.query": net.first, "shared": net.shared, "last": net.last}
    assert tensors.keys() == {
        f"base_model.model.{name}.lora_{f}.weight" for name in names for f in "AB"} | {
        f"base_model.model.model.score.{p}" for p in ("weight", "bias")}
    for name, layer in names.items():
        assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], layer.lora_A), name
        assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], layer.lora_B), name
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 6)
    assert config["target_modules"] == ["last", "model.query", "shared"]
    assert config["modules_to_save"] == ["model.score"]
    other = prepared(seed=5)
    load_adapter(other, tmp_path,
                 rename=lambda n: {"first": "model.query", "head": "model.score"}.get(n, n))
    assert_same_bits(other.head, snapshot(net.head))


def test_auxiliary_pairs_are_not_kept(tmp_path):
    """An adapter trained with an auxiliary pair loads into a model without one, and changes none it
    finds."""
    net = prepared(aux_rank=2)
    save_adapter(net, tmp_path)
    plain, other = prepared(seed=5, aux_rank=0), prepared(seed=5)
    auxiliary = [p.detach().clone() for p in auxiliary_parameters(other)]
    for model in (plain, other):
        load_adapter(model, tmp_path)
        assert_same_adapter(model, net)
    assert all(map(torch.equal, auxiliary_parameters(other), auxiliary))


def test_base_in_another_dtype_is_the_same_base(tmp_path):
    net = prepared(head=False)
    for layer in lora_layers(net):
        layer.weight = nn.Parameter(layer.weight.bfloat16(), requires_grad=False)
    save_adapter(net, tmp_path)
    other = prepared(seed=5, head=False)
    load_adapter(other, tmp_path)
    assert_same_adapter(other, net)


def other_base(name, tensor):
    def make():
        net = prepared()
        with torch.no_grad():
            getattr(getattr(net, name), tensor)[1] += 0.1
        return net
    return make


def exchanged_layers():
    net = prepared(head=False)
    net.first, net.last = net.last, net.first
    return net


def drop(name):
    def edit(tensors):
        del tensors[f"base_model.model.{name}"]
    return edit


def put(name, value):
    def edit(tensors):
        tensors[f"base_model.model.{name}"] = value
    return edit


@pytest.mark.parametrize("make, edit, message", [
    *[(other_base(name, tensor), None, "base_fingerprint.txt: the base is")
      for name in ("first", "shared", "last") for tensor in ("weight", "bias")],
    (exchanged_layers, None, "first.lora_A.weight is (2, 6), the model's is (2, 5)"),
    (lambda: prepared(rank=3), None, "r is 2, the model's is 3"),
    (lambda: prepared(alpha=7), None, "lora_alpha is 6, the model's is 7"),
    (lambda: prepared(targets="first|last"), None,
     "shared.lora_A.weight is (2, 5), the model's is missing"),
    (prepared, drop("last.lora_B.weight"), "last.lora_B.weight is missing, the model's is (4, 2)"),
    (prepared, drop("head.bias"), "head.bias is missing"),
    (lambda: prepared(head=False), None, "head.weight is (3, 4), the model's is missing"),
    (prepared, put("first.weight", torch.zeros(5, 6)),
     "first.weight is (5, 6), the model's is missing"),
    (prepared, put("last.aux_A.weight", torch.zeros(2, 5)),
     "last.aux_A.weight is (2, 5), the model's is missing"),
    (prepared, put("last.lora_B.weight", torch.zeros(4, 3)),
     "last.lora_B.weight is (4, 3), the model's is (4, 2)"),
    (prepared, put("last.lora_B.weight", 3.0), "last.lora_B.weight is 3.0, the model's is (4, 2)"),
])
def test_what_does_not_fit_is_refused_and_nothing_is_copied(tmp_path, make, edit, message):
    save_adapter(prepared(seed=5), tmp_path)
    if edit:
        tensors = torch.load(tmp_path / "adapter_model.bin", weights_only=True)
        edit(tensors)
        torch.save(tensors, tmp_path / "adapter_model.bin")
    net = make()
    before = snapshot(net)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_adapter(net, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert_same_bits(net, before)


@pytest.mark.parametrize("key", ["peft_type", "bias", "r", "lora_alpha"])
def test_every_setting_has_to_be_there(tmp_path, key):
    save_adapter(prepared(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config[key]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{key} is missing"):
        load_adapter(prepared(), tmp_path)


@pytest.mark.parametrize("key, value", [
    ("peft_type", "LOHA"), ("bias", "all"), ("r", 3), ("lora_alpha", 7), ("use_rslora", True),
    ("use_dora", True), ("rank_pattern", {"first": 3}),
    ("alpha_pattern", {"first": 3}), ("lora_bias", True), ("fan_in_fan_out", True),
    ("init_lora_weights", "pissa"),
    ("layer_replication", [[0, 1]]), ("something_new", 1),
])
def test_settings_of_peft_that_make_another_layer_are_refused(tmp_path, key, value):
    """Without the fingerprint the folder is one that PEFT wrote; its harmless settings change
    nothing."""
    save_adapter(prepared(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    os.remove(tmp_path / "base_fingerprint.txt")
    config |= {"target_modules": ["first", "last", "shared"], "peft_version": "0.21.2",
               "layers_to_transform": None,
               "revision": "main", "lora_dropout": 0.1, "rank_pattern": {}, "use_dora": False,
               "init_lora_weights": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    load_adapter(prepared(seed=5), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, key: value}))
    net = prepared(seed=5)
    before = snapshot(net)
    with pytest.raises(ValueError, match=f"adapter_config.json: {key} is"):
        load_adapter(net, tmp_path)
    assert_same_bits(net, before)


def test_safetensors_by_a_writer_and_a_reader(tmp_path):
    """Both get paths of adapter_model.safetensors; the writer's is another until all files are
    written."""
    net, other, paths = prepared(), prepared(seed=5), []

    def read(path):
        paths.append(path)
        return read_safetensors(path)

    save_adapter(net, tmp_path, write=lambda path, tensors: (
        paths.append(path), write_safetensors(path, tensors)))
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors",
                                            "base_fingerprint.txt"]
    load_adapter(other, tmp_path, read=read)
    assert [path.name for path in paths] == ["adapter_model.safetensors"] * 2
    assert paths[0] != paths[1] == tmp_path / "adapter_model.safetensors"
    assert_same_adapter(other, net)
    assert_same_bits(other.head, snapshot(net.head))
    with pytest.raises(ValueError, match="adapter_model.safetensors: expected `read`"):
        load_adapter(other, tmp_path)
    with pytest.raises(ValueError, match="head.bias is missing"):
        load_adapter(other, tmp_path, read=lambda path: {key: t for key, t in read(path).items()
                                                         if "head.bias" not in key})


def test_two_adapter_files_are_refused(tmp_path):
    """Saving one kind beside the other, and loading where both are; nothing is written or
    copied."""
    names = ["adapter_model.bin", "adapter_model.safetensors"]
    for name, other, write in ((*names, write_safetensors), (*names[::-1], None)):
        folder, net = tmp_path / name, prepared()
        save_adapter(net, folder, write=None if write else write_safetensors)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(ValueError, match=f"{other} cannot stand beside {name}"):
            save_adapter(prepared(seed=5), folder, write=write)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        (folder / other).write_bytes(b"")
        with pytest.raises(ValueError,
                           match="adapter_model.safetensors cannot stand beside adapter_model.bin"):
            load_adapter(net, folder, read=read_safetensors)


def test_settings_are_those_that_peft_knows(tmp_path):
    """The keys of the files that PEFT wrote into tests/golden."""
    save_adapter(prepared(), tmp_path)
    theirs = os.path.join(os.path.dirname(__file__), "golden", "bert", "peft",
                          "adapter_config.json")
    ours, written = (json.loads(open(path).read())
                     for path in (tmp_path / "adapter_config.json", theirs))
    assert ours.keys() <= written.keys()


class Payload:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_a_pickle_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_adapter(prepared(), tmp_path)
    torch.save({"x": Payload()}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.bin: not a file of tensors"):
        load_adapter(prepared(), tmp_path)
    assert not os.path.exists("unpickled")


def test_names_that_collide_or_lie_at_the_root(tmp_path):
    with pytest.raises(ValueError, match="two modules one name"):
        save_adapter(prepared(), tmp_path, rename={"first": "last"})
    net = prepared()
    net.offset = nn.Parameter(torch.ones(3))
    save_adapter(net, tmp_path)
    assert "base_model.model.offset" in torch.load(tmp_path / "adapter_model.bin",
                                                   weights_only=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["head"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.bin"])
@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"\x80\x04.", b"PK\x03\x04 not really"])
def test_broken_files(tmp_path, name, content):
    net = prepared()
    save_adapter(net, tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load_adapter(net, tmp_path)


@pytest.mark.parametrize("moment", ["tensors", "settings", "fingerprint"])
def test_a_failed_save_leaves_the_last_one(tmp_path, monkeypatch, moment):
    net = prepared()
    save_adapter(net, tmp_path, write=write_safetensors)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(path, content, **options):
        if moment == "tensors" or (moment == "settings") == (path.name == "adapter_config.json"):
            raise OSError("No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_text", full_disk)
    with pytest.raises(OSError):
        save_adapter(prepared(seed=5), tmp_path,
                     write=full_disk if moment == "tensors" else write_safetensors)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    other = prepared(seed=5)
    load_adapter(other, tmp_path, read=read_safetensors)
    assert_same_adapter(other, net)


def test_models_without_adapters():
    for call in (save_adapter, load_adapter):
        with pytest.raises(ValueError, match="no LoRA adapters"):
            call(Net(), "nowhere")
    assert math.isfinite(merge_lora_(Net())(torch.ones(1, 6)).sum().item())
