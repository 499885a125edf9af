"""Every error adapterops raises on purpose, with the exit code the command line gives it.

AdapterOpsError
├── UsageError          2    options or weights that make no sense together
│   └── OutputExistsError
│       └── FinishedError    it is what was asked for; a batch skips it
├── FormatError         3    a file that is malformed, truncated or not an adapter
│   └── UnsafeFileError      a file that tries something a plain tensor file never needs
├── IncompatibleError   4    inputs that do not go together
│   └── UnsupportedError     an adapter of a kind that has no exact weight delta here
├── NumericsError       5    a check of the numbers failed; nothing was written
│   └── BudgetError          an error bound that was asked for cannot be met
├── FileError           6    missing, unreadable, disk full
│   ├── ChangedError         an input changed while it was read
│   └── MissingInputsError   what an output was made from is not where it is looked for
├── MemoryLimitError    7
└── Interrupted         130  SIGINT or SIGTERM

Each also inherits the builtin a caller would expect (ValueError, OSError, …).
"""

from __future__ import annotations

import os


class AdapterOpsError(Exception):
    """Base class: a message with where it happened and what to do about it."""

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        path: str | os.PathLike[str] | None = None,
        module: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = os.fspath(path) if path is not None else None
        self.module = module
        self.hint = hint

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        what = f"module {self.module}: " if self.module else ""
        todo = f"; {self.hint}" if self.hint else ""
        return f"{where}{what}{self.message}{todo}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.path, self.module, self.hint)

    def to_dict(self) -> dict[str, object]:
        """The error as the JSON object that `--json` prints on stderr."""
        return {
            "code": self.exit_code,
            "type": type(self).__name__,
            "message": self.message,
            "path": self.path,
            "module": self.module,
            "hint": self.hint,
        }


def _rebuild(
    kind: type[AdapterOpsError],
    message: str,
    path: str | None,
    module: str | None,
    hint: str | None,
) -> AdapterOpsError:
    return kind(message, path=path, module=module, hint=hint)


class UsageError(AdapterOpsError, ValueError):
    exit_code = 2


class OutputExistsError(UsageError):
    """The output is already there, or is one of the inputs."""


class FinishedError(OutputExistsError):
    """The output is there, made by this version from these inputs with these options."""


class FormatError(AdapterOpsError, ValueError):
    exit_code = 3


class UnsafeFileError(FormatError):
    """Hostile names, code in a pickle, sizes that do not add up."""


class PickleRefusedError(FormatError):
    """A pickle that nobody allowed to be opened."""


class IncompatibleError(AdapterOpsError, ValueError):
    exit_code = 4


class UnsupportedError(IncompatibleError):
    """Recognised and refused by name."""


class NumericsError(AdapterOpsError, ArithmeticError):
    exit_code = 5


class BudgetError(NumericsError):
    """An error bound or size that no allowed rank can meet."""


class FileError(AdapterOpsError, OSError):
    exit_code = 6


class ChangedError(FileError):
    """Not the file that was opened first."""


class MissingInputsError(FileError):
    """What an output was made from is not where it is looked for."""


class MemoryLimitError(AdapterOpsError, MemoryError):
    exit_code = 7


class Interrupted(AdapterOpsError, KeyboardInterrupt):
    exit_code = 130
