"""What surrounds the algorithm: flags, run folders, checkpoints, evaluation, tables, plots,
recording and prediction.
"""
