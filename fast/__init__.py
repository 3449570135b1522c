"""The root's method, faster: the same classes and functions with the same names of parameters and
the same signatures.

``engine.backend`` chooses between this package and the plain root. Nothing in the root but main.py
knows of it: delete this folder and everything still works, slower, and equal to rounding. README.md
in this folder says where the speed comes from.
"""
