"""Training: `ConvertedModel` and a recipe -> `TrainingParity`."""
