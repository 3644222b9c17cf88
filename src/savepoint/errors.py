"""The errors a user can meet. Each subclasses the nearest builtin, so code that knows only Python
catches it too.

    SavepointError
    ├── ConfigError(ValueError)                      a config, a flag or a value in it
    ├── ConfigMismatchError(ValueError)              a resume that does not fit its checkpoint
    ├── DataError(ValueError)                        files of a data set: missing or damaged
    ├── RunExistsError(FileExistsError)              a new run under a name that is taken
    ├── RunLockedError(RuntimeError)                 another process trains in this run directory
    ├── RunDirectoryError(OSError)                   a run directory that cannot be written
    ├── MirrorError(OSError)                         a mirror that is not reached, or refuses
    ├── CheckpointNotFoundError(FileNotFoundError)   nothing there to load
    ├── CheckpointCorruptError(ValueError)           a checkpoint that does not verify
    ├── CheckpointForeignError(ValueError)           a readable file that Savepoint did not write
    ├── CheckpointVersionError(ValueError)           written by a newer Savepoint
    ├── CheckpointContentError(TypeError)            a value that cannot be read back safely
    ├── CheckpointSaveError(OSError)                 a failed save; the previous one is intact
    ├── ClientStateError(ValueError)                 a federated client's state: lost or another one
    ├── FederatedError(RuntimeError)                 a round that too few clients took part in
    └── NonFiniteLossError(ArithmeticError)          the training loss became NaN or infinite

Every message reads `<what happened>: <path or value>. <what was expected>. <what to do>.`
"""

from pathlib import Path


class SavepointError(Exception):
    """At the command line: its message without a traceback, and `exit_code`: 2 for what the user
    can mend, 1 for a failure.
    """

    exit_code = 2


class ConfigError(SavepointError, ValueError): ...


class ConfigMismatchError(SavepointError, ValueError): ...


class DataError(SavepointError, ValueError): ...


class RunExistsError(SavepointError, FileExistsError): ...


class RunLockedError(SavepointError, RuntimeError): ...


class RunDirectoryError(SavepointError, OSError): ...


class MirrorError(SavepointError, OSError):
    """`refused`: the server has answered, and waiting changes nothing."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class CheckpointError(SavepointError):
    """An error about one file, `path`."""

    def __init__(self, message: str, path: Path | str) -> None:
        super().__init__(message)
        self.path = Path(path)


class CheckpointNotFoundError(CheckpointError, FileNotFoundError): ...


class CheckpointCorruptError(CheckpointError, ValueError):
    """`reason` says in words what is wrong, without the path: "truncated: 43 % of 312 kB"."""

    def __init__(self, message: str, path: Path | str, reason: str) -> None:
        super().__init__(message, path)
        self.reason = reason


class CheckpointForeignError(CheckpointError, ValueError):
    """`reason` says in words what the file is, without the path; `advice`, what to do with it;
    `has_weights`, whether it seems to hold any.
    """

    def __init__(
        self,
        message: str,
        path: Path | str,
        *,
        reason: str = "",
        advice: str = "",
        has_weights: bool = False,
    ) -> None:
        super().__init__(message, path)
        self.reason = reason
        self.advice = advice
        self.has_weights = has_weights


class CheckpointVersionError(CheckpointError, ValueError): ...


class CheckpointContentError(CheckpointError, TypeError):
    """`key` is the place of the value in the checkpoint, such as `hyper_parameters.root`."""

    def __init__(self, message: str, path: Path | str, key: str) -> None:
        super().__init__(message, path)
        self.key = key


class CheckpointSaveError(CheckpointError, OSError):
    exit_code = 1


class NonFiniteLossError(SavepointError, ArithmeticError):
    exit_code = 1


class ClientStateError(SavepointError, ValueError): ...


class FederatedError(SavepointError, RuntimeError):
    exit_code = 1
