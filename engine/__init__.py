"""What surrounds a training: flags, backend, run folder, state, signals, logs, ranks.

Import it before PyTorch: OpenMP and cuBLAS read these settings when they start.
"""

import os

# deterministic cuBLAS needs a workspace of fixed size
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# by default OpenMP's threads spin while they wait, which slows down whatever runs beside them
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
