"""The tests. Most of their time goes into compiling small programs, so these are compiled in a hurry."""

import os

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
