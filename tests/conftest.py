"""What all tests share: one thread, because two wait for each other on models this small; demos
with few rows; pictures that are drawn quickly."""

import itertools
import json
import os
import re
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for child processes

import matplotlib  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import train_glue  # noqa: E402
import train_gsm8k  # noqa: E402
from model import (read_json, read_safetensors, write_safetensors,  # noqa: E402
                   write_text)

DEMOS = ((train_glue.TASKS["demo"].settings, {"train.tsv": 200, "dev.tsv": 30}),
         (train_gsm8k.TASKS["demo"], {"train.jsonl": 40, "test.jsonl": 10}))
DRAW = train_glue.draw_curves
TICKS = ("xtick.bottom", "xtick.labelbottom", "ytick.left", "ytick.labelleft")


@pytest.fixture
def batch():
    """(x, y) of eight rows, for the network of test_steps.py."""
    torch.manual_seed(7)
    return torch.randn(8, 6, dtype=torch.float64), torch.randint(0, 3, (8,))


@pytest.fixture(scope="session")
def small_folders(tmp_path_factory):
    """The folders of both scripts' demos again, with the model's first block and few rows alone."""
    folders = []
    for settings, files in DEMOS:
        source, folder = settings["model"], tmp_path_factory.mktemp("demo")
        shutil.copy(os.path.join(source, "tokenizer.json"), folder)
        config = read_json(os.path.join(source, "config.json"))
        write_text(str(folder / "config.json"), json.dumps({**config, "num_hidden_layers": 1}))
        tensors = read_safetensors(os.path.join(source, "model.safetensors"))
        first = {name: tensor for name, tensor in tensors.items()
                 if not re.search(r"\.[1-9]\.", name)}
        write_safetensors(folder / "model.safetensors", first)
        for name, count in files.items():
            with open(os.path.join(source, name), encoding="utf-8") as file:
                text = "".join(itertools.islice(file, count))
            (folder / name).write_text(text, encoding="utf-8")
        folders.append(str(folder))
    return folders


@pytest.fixture(scope="module")
def small_demos(small_folders):
    """The demos of both scripts with a smaller model and few rows."""
    with pytest.MonkeyPatch.context() as patch:
        for (settings, _), folder in zip(DEMOS, small_folders):
            patch.setitem(settings, "model", folder)
            patch.setitem(settings, "data", folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def pictures_without_ticks():
    """Ticks and their labels take two thirds of a picture's time; `ticks` draws them again."""
    with matplotlib.rc_context(dict.fromkeys(TICKS, False)):
        yield


@pytest.fixture(scope="session", autouse=True)
def pictures_of_runs_are_short():
    """A run's picture takes longer than its steps do here: a file without a drawing stands for it.
    `DRAW` is the real function."""
    def stand_in(results, path, majority=()):
        with open(path, "wb") as file:
            file.write(b"no picture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_glue, "draw_curves", stand_in)
        yield


@pytest.fixture
def ticks():
    with matplotlib.rc_context({name: matplotlib.rcParamsDefault[name] for name in TICKS}):
        yield
