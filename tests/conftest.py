"""What all tests share: one thread, for on models this small two wait for each other, and no pictures where none is looked at."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start

import pytest  # noqa: E402

import train_glue  # noqa: E402


@pytest.fixture(autouse=True)
def empty_pictures(request, monkeypatch):
    """A quarter of the suite's time would go into drawing curves.  A test marked with `pictures` has the real ones."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr(train_glue, "draw_curves", lambda results, metric, path: open(path, "w").close())
