"""What README shows is what the code does: its lines are the functions' lines, and its example runs."""

import inspect
import os
import re
import shutil
import sys
from collections import OrderedDict

import torch
import torch.nn as nn
from tokenizers import Tokenizer, models, pre_tokenizers

import bilora
from model import Transformer, read_safetensors
import train_glue
import train_gsm8k
from train_glue import TASKS, main

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "notes"))
import sharpness  # noqa: E402

README = open(os.path.join(os.path.dirname(__file__), "..", "README.md"), encoding="utf-8").read()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_steps_are_the_functions_lines():
    for block, function in zip(BLOCKS, (bilora.lora_step, bilora.lora_sam_step, bilora.bilora_step, bilora.bilora_power_step), strict=False):
        source = inspect.getsource(function)
        for line in block.splitlines():
            assert line.split("#")[0].strip() in source, (function.__name__, line)


def test_the_example_trains_a_model():
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(a=nn.Linear(4, 8), b=nn.Tanh(), classifier=nn.Linear(8, 8)))
    batches = [(torch.randn(16, 4), torch.randint(0, 8, (16,)))] * 60
    losses = []

    def backward(model, batch):
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        losses.append(loss.item())
        return loss

    model.eval()
    example = BLOCKS[4].replace("lr=5e-4", "lr=5e-2").replace("rank=8", "rank=4")  # small layers, few steps
    exec(example, {**vars(bilora), "model": model, "batches": batches, "backward": backward})
    assert losses[-1] < 0.7 * losses[0]


def test_the_adapter_of_a_run_predicts(tmp_path, monkeypatch, capsys):
    """The example, on the tiny BERT, with what a run of the script left."""
    monkeypatch.chdir(tmp_path)
    name = str(tmp_path / "bert")
    shutil.copytree(os.path.join(os.path.dirname(__file__), "golden", "bert"), name)
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "rain": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(name + "/tokenizer.json")
    for file in ("train.tsv", "dev.tsv"):
        with open(file, "w") as out:
            out.write("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + "1\t1\t2\ta rain\train\n0\t1\t2\ta\tb\n" * 4)
    main(["--task", "mrpc", "--model", name, "--data", ".", "--method", "bi-lora", "--seeds", "0", "--rank", "2", "--aux-rank", "2",
          "--max-length", "12", "--merge", "--lr", "0.1", "--epochs", "2", "--device", "cpu"])
    capsys.readouterr()
    example = BLOCKS[5].replace("sentence-transformers/all-MiniLM-L6-v2", name).replace("rank=8", "rank=2")
    scope = {}
    exec(example, scope)
    merged = Transformer.from_pretrained("runs/mrpc/bi-lora-seed0/merged", num_labels=2)
    ids = torch.tensor([scope["row"].ids])
    torch.testing.assert_close(scope["model"](ids), merged(ids), rtol=0, atol=1e-5)
    assert "tensor([[" in capsys.readouterr().out


def test_the_adapter_of_peft_goes_through(tmp_path, monkeypatch):
    golden = os.path.join(os.path.dirname(__file__), "golden", "qwen2")
    monkeypatch.chdir(tmp_path)
    example = BLOCKS[7].replace("meta-llama/Llama-3.2-1B", golden).replace("peft_adapter", os.path.join(golden, "peft"))
    exec(example.replace("rank=8, alpha=16", "rank=2, alpha=6").replace("(q|v)", "(k|v)"), {})
    assert torch.load("same_adapter/adapter_model.bin", weights_only=True).keys() == read_safetensors(
        os.path.join(golden, "peft", "adapter_model.safetensors")).keys()


def test_names_and_options_exist():
    for name in re.findall(r"`(\w+)\(", README):
        assert hasattr(bilora, name) or name in ("closure", "backward"), name
    helps = [module.parse_arguments(argv)[0].format_help() for module, argv in (
        (train_glue, []), (train_gsm8k, []), (sharpness, ["RUN"]))]
    for option in re.findall(r"--[a-z][a-z0-9-]+", re.sub("<!--|-->", "", README)):
        assert any(option in text for text in helps), option
    assert all(task in README for task in TASKS)
