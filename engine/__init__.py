"""What a training needs besides the algorithm: flags, backend, run folder, state, signals, logs, ranks."""

import utils  # noqa: F401 - its settings are for PyTorch, which is imported later
