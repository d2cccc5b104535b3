"""Sizes that a trace would fix, and those that the user says vary."""
