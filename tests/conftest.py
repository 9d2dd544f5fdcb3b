"""What all tests share: one thread, because two wait for each other on models this small."""

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for child processes

import pytest  # noqa: E402

import train_glue  # noqa: E402


@pytest.fixture(scope="session")
def few_sentences(tmp_path_factory):
    """The folder of the demo's data, with 60 of its evaluation sentences."""
    folder = tmp_path_factory.mktemp("sentences")
    shutil.copy(os.path.join(train_glue.DEMO, "train.tsv"), folder)
    with open(os.path.join(train_glue.DEMO, "dev.tsv"), encoding="utf-8") as file:
        (folder / "dev.tsv").write_text("".join(file.readlines()[:60]), encoding="utf-8")
    return str(folder)
