"""One thread: on models this small two wait for each other, longest where the machine has other work."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start
