"""The errors a user can meet, all below `RetroError`.

    RetroError
    |-- ConfigError (ValueError)     a setting or argument that cannot work
    |-- CorpusError (ValueError)     a document source that cannot be read
    |-- FormatError                  an artifact that is missing, incomplete, damaged or altered
    |-- MismatchError                two sound artifacts that do not belong together
    |-- StorageError (OSError)       the disk is full or a folder cannot be written
    |-- DependencyError (ImportError)  an optional package is not installed
    `-- TrainingError                training cannot go on (non-finite loss or gradient)

A message says what is wrong, with the values, and what to do. The command line prints it in one line, without a
traceback, and exits with 1.
"""


class RetroError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(RetroError, ValueError):
    """A setting or an argument is unknown, missing, of a wrong type or out of range."""


class CorpusError(RetroError, ValueError):
    """A document source is missing, unreadable or malformed; the message names file and line."""


class FormatError(RetroError):
    """An artifact on disk is missing, incomplete, truncated or altered."""


class MismatchError(RetroError):
    """Two artifacts are sound but do not belong together (another encoder, another tokenizer)."""


class StorageError(RetroError, OSError):
    """Writing failed: no space left, or no permission."""


class DependencyError(RetroError, ImportError):
    """An optional dependency is missing; the message names the extra that brings it."""


class TrainingError(RetroError):
    """Training stopped before it would have damaged the weights."""
