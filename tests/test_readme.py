"""What README and notes/usage.md show is what the code does: the steps' lines are the functions'
lines, and every example runs."""

import glob
import inspect
import os
import re
import shutil
import sys
from collections import OrderedDict
from types import SimpleNamespace

import torch
import torch.nn as nn
from tokenizers import Tokenizer, models, pre_tokenizers

import bilora
import train_glue
import train_gsm8k
from model import Transformer, read_safetensors

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, os.path.join(ROOT, "notes"))
import drawing  # noqa: E402
import methods  # noqa: E402


def read(*path):
    with open(os.path.join(ROOT, *path), encoding="utf-8") as file:
        return file.read()


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


README, USAGE = read("README.md"), read("notes", "usage.md")


def test_the_steps_are_the_functions_lines():
    steps = (bilora.lora_step, bilora.lora_sam_step, bilora.bilora_step)
    for block, function in zip(blocks(README)[:3], steps, strict=True):
        source = inspect.getsource(function)
        for line in block.splitlines():
            assert line.split("#")[0].strip() in source, (function.__name__, line)


def test_the_example_trains_a_model():
    torch.manual_seed(0)
    layers = OrderedDict(a=nn.Linear(4, 8), b=nn.Tanh(), classifier=nn.Linear(8, 8))
    model, losses = nn.Sequential(layers), []
    batches = [(torch.randn(16, 4), torch.randint(0, 8, (16,)))] * 60

    def backward(model, batch):
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        losses.append(loss.item())
        return loss

    model.eval()
    example = blocks(README)[3].replace("lr=5e-4", "lr=5e-2").replace("rank=8", "rank=4")
    exec(example, {**vars(bilora), "model": model, "batches": batches, "backward": backward})
    assert losses[-1] < 0.7 * losses[0]


def test_the_example_adds_a_method():
    """Pasted into notes/methods.py it runs: no name is missing there."""
    scope = {**vars(methods), "add": lambda table: scope.update(table)}
    exec(blocks(README)[4], scope)
    weight = nn.Parameter(torch.ones(2))

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    run = SimpleNamespace(descent=torch.optim.SGD([weight], lr=0.1), rho=0.1)
    assert scope["lora-sam-on-all"].step(run, closure)["loss"] == 2 and (weight < 1).all()


def test_the_step_of_note_4_moves_b_alone():
    """Where the second gradient is taken A is as before, and B is rho away."""
    scope = {**vars(methods), "add": lambda table: scope.update(table)}
    exec(blocks(read("notes", "4_bilora.md"))[0], scope)
    layer, seen = bilora.LoRALinear(nn.Linear(4, 3), 2, 4), []

    def closure():
        seen.append((layer.lora_B.detach().clone(), layer.lora_A.detach().clone()))
        loss = layer(torch.ones(1, 4)).square().sum()
        loss.backward()
        return loss

    run = SimpleNamespace(descent=torch.optim.SGD(layer.parameters(), lr=0.1), rho=0.1,
                          layers=[layer])
    scope["sam-on-b"].step(run, closure)
    (B, A), (moved, same) = seen
    assert torch.equal(A, same) and abs((moved - B).norm() - 0.1) < 1e-6


def test_the_other_step_of_note_4_moves_a_alone_by_what_is_left_of_rho():
    """In the third of four steps half of the radius is left; both passes have the same masks."""
    scope = {**vars(methods), "add": lambda table: scope.update(table)}
    exec(blocks(read("notes", "4_bilora.md"))[1], scope)
    layer, seen, masks = bilora.LoRALinear(nn.Linear(4, 3), 2, 4), [], []
    nn.init.ones_(layer.lora_B)

    def closure():
        seen.append((layer.lora_B.detach().clone(), layer.lora_A.detach().clone()))
        masks.append(torch.rand(4))
        loss = layer(torch.ones(1, 4)).square().sum()
        loss.backward()
        return loss

    run = SimpleNamespace(descent=torch.optim.SGD(layer.parameters(), lr=0.1), rho=0.2, steps=4,
                          layers=[layer], log=[{}, {}])
    assert scope["sam-on-a"].rho == 0.2
    logged = scope["sam-on-a"].step(run, closure)
    (B, A), (same, moved) = seen
    assert torch.equal(B, same) and abs((moved - A).norm() - 0.1) < 1e-6
    assert logged["perturbation"] == 0.1 and torch.equal(*masks)


def test_the_adapter_of_a_run_predicts(tmp_path, monkeypatch, capsys):
    """On the tiny BERT, with what a run of the script left: the example's merged model gives the
    logits of the adapted one."""
    monkeypatch.chdir(tmp_path)
    name = str(tmp_path / "bert")
    shutil.copytree(os.path.join(HERE, "golden", "bert"), name)
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "rain": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(name + "/tokenizer.json")
    rows = "1\t1\t2\ta rain\train\n0\t1\t2\ta\tb\n" * 4
    for file in ("train.tsv", "dev.tsv"):
        with open(file, "w") as out:
            out.write("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + rows)
    train_glue.main(["--task", "mrpc", "--model", name, "--data", ".", "--method", "bi-lora",
                     "--seeds", "0", "--rank", "2", "--aux-rank", "2", "--max-length", "12",
                     "--lr", "0.1", "--epochs", "2", "--device", "cpu"])
    capsys.readouterr()
    example = blocks(USAGE)[0].replace("sentence-transformers/all-MiniLM-L6-v2", name)
    scope = {}
    exec(example.replace("rank=8", "rank=2"), scope)
    model = Transformer.from_pretrained(name, num_labels=2)
    bilora.add_lora(model, 2, 16)
    model.classifier.requires_grad_(True)
    bilora.load_adapter(model, "runs/mrpc/bi-lora-seed0", model.module_names, read_safetensors)
    ids = torch.tensor([scope["row"].ids])
    torch.testing.assert_close(scope["model"](ids), model(ids), rtol=0, atol=1e-5)
    assert "tensor([[" in capsys.readouterr().out


def test_the_adapter_of_peft_goes_through(tmp_path, monkeypatch):
    golden = os.path.join(HERE, "golden", "qwen2")
    monkeypatch.chdir(tmp_path)
    example = blocks(USAGE)[2].replace("meta-llama/Llama-3.2-1B", golden)
    example = example.replace("peft_adapter", os.path.join(golden, "peft"))
    exec(example.replace("rank=8, alpha=16", "rank=2, alpha=6").replace("(q|v)", "(k|v)"), {})
    ours, theirs = (read_safetensors(os.path.join(folder, "adapter_model.safetensors"))
                    for folder in ("same_adapter", os.path.join(golden, "peft")))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key].float()) for key in ours)


def test_names_and_options_exist():
    for name in re.findall(r"`(\w+)\(", README):
        named = hasattr(bilora, name) or name == "Method" and hasattr(methods, name)
        assert named or name in ("closure", "backward"), name
    helps = "".join(methods.parse(script, [])[1].__self__.format_help()  # fail is the parser's
                    for script in (train_glue, train_gsm8k))
    for option in re.findall(r"--[a-z][a-z0-9-]+", README + USAGE):
        assert option in helps or option == "--help", option
    assert all(task in README for task in train_glue.TASKS)


def test_lines_of_code_are_short():
    for part in ("*.py", "notes/*.py", "tests/*.py"):
        for path in glob.glob(os.path.join(ROOT, part)):
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    assert len(line.rstrip("\n")) <= 100, f"{path}:{number}"


def test_readme_is_short():
    assert len(README.split()) <= 1200


def test_the_drawing(tmp_path):
    path = str(tmp_path / "method.png")
    drawing.main([path])
    assert os.path.getsize(path) > 5000 and os.listdir(tmp_path) == ["method.png"]
