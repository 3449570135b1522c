"""Uses of a trained model: results, tables, pictures, traces, exports and predictions."""
