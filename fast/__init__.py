"""The root's method, faster: the same classes and functions with the same signatures.

``engine.backend`` chooses between this package and the plain root; nothing else imports it. Delete
this folder and everything still works, slower, and equal up to rounding. See README.md.
"""

import utils  # noqa: F401 - its settings are for PyTorch, which is imported later
