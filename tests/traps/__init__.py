"""Small models that break under native mixed precision, and must hold under ours."""
