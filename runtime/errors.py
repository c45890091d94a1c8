"""Errors that a user can act on: each message says what was wrong and what to do."""


class KinoraError(Exception):
    """Base of every error that Kinora raises on purpose."""


class InputError(KinoraError, ValueError):
    """An image, sound, size or option that cannot be used."""


class CheckpointError(KinoraError):
    """Missing checkpoint files, or files whose tensors do not fit the model."""


class OutputError(KinoraError):
    """A file that cannot be written, or that was written and does not pass its check."""
