"""What looks at a trained model: tables, pictures, traces, export and prediction."""
