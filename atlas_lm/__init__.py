"""Memory-augmented language models that train so that no failure stays silent."""

import os

# Before torch loads OpenMP: threads that wait must sleep. Spinning ones starve every other process on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
