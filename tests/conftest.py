"""What all tests share: one thread, because two wait for each other on models this small; demos
with few rows; pictures that are drawn quickly."""

import itertools
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for child processes

import matplotlib  # noqa: E402
import pytest  # noqa: E402

import train_glue  # noqa: E402
import train_gsm8k  # noqa: E402

DEMOS = ((train_glue.TASKS["demo"].settings, {"train.tsv": 200, "dev.tsv": 60}),
         (train_gsm8k.TASKS["demo"], {"train.jsonl": 40, "test.jsonl": 10}))
TICKS = ("xtick.bottom", "xtick.labelbottom", "ytick.left", "ytick.labelleft")


@pytest.fixture(scope="module")
def small_demos(tmp_path_factory):
    """The demos of both scripts, with the first rows of their data."""
    with pytest.MonkeyPatch.context() as patch:
        for settings, files in DEMOS:
            folder = tmp_path_factory.mktemp("demo")
            for name, count in files.items():
                with open(os.path.join(settings["data"], name), encoding="utf-8") as file:
                    text = "".join(itertools.islice(file, count))
                (folder / name).write_text(text, encoding="utf-8")
            patch.setitem(settings, "data", str(folder))
        yield


@pytest.fixture(scope="session", autouse=True)
def pictures_without_ticks():
    """Ticks and their labels take two thirds of a picture's time; `ticks` draws them again."""
    with matplotlib.rc_context(dict.fromkeys(TICKS, False)):
        yield


@pytest.fixture
def ticks():
    with matplotlib.rc_context({name: matplotlib.rcParamsDefault[name] for name in TICKS}):
        yield
