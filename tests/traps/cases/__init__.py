"""The traps by topic. Importing a module adds its traps to `tests.traps.trap.TRAPS`."""
