"""The user's settings and model file -> `Settings` and a `Case`."""
