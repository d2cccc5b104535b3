"""Evidence and `Thresholds` -> `Verdict`: the only place that says pass, fail or unchecked."""
