"""Uses of a trained model: results, tables, plots, traces, exports and predictions."""
