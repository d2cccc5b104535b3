"""The two graphs of a model: for inference and for training."""

from __future__ import annotations

from enum import StrEnum


class Mode(StrEnum):
    """A module's mode, as in `module.train()` and `module.eval()`."""

    EVAL = "eval"
    TRAIN = "train"

    @property
    def is_training(self) -> bool:
        """What `module.training` is in it."""
        return self is Mode.TRAIN

    @classmethod
    def of(cls, training: bool) -> Mode:
        """The mode of a module whose `training` is this."""
        return cls.TRAIN if training else cls.EVAL
