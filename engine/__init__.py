"""What surrounds the algorithm: flags, backend, run folder, state, signals, logs, processes."""

import utils  # noqa: F401 - its settings are for PyTorch, which is imported later
