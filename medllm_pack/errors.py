"""Everything that can go wrong, as one tree; the command line maps it to text and an exit code.

MedllmError                 1   could not be done
├── UsageError              2   the request itself is wrong: unknown recipe, variant, style
├── RecipeError             1   a recipe file has problems (all of them are listed)
├── SourceError             1   a folder or hub repository cannot be read as asked
├── CheckpointError         1   the weights are not what a LLaMA checkpoint must be
├── AdapterError            1   the adapter cannot be applied, or not as a whole
├── VocabularyError         1   tokenizer and weights do not fit together
├── ImportanceError         1   an importance matrix is missing, damaged or of another model
├── ModelfileError          1   a text would not survive the Modelfile unharmed
├── GGUFError               1   a GGUF file breaks the format's rules
├── DigestError             1   a text that should be a SHA-256 digest is not one
├── PlanError               1   the build cannot start (all reasons are listed)
├── WriteError              1   the output could not be written
│   └── StoreAccessError    1   an Ollama store is another user's
├── DeviceError             1   a device is missing, fails, or has not llama.cpp's bytes
├── WorkerError             1   llama.cpp, in a process of its own, did not do a job
├── ServerError             1   an Ollama server cannot be reached or does not answer as documented
├── TransferError           1   a registry, or the way to it, does not let bytes or a login through
├── CheckFailedError        3   done, but a check says no
└── GateError               3   a pack may not be published (all reasons are listed)

A message names the thing, the fact and the next step, in one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class MedllmError(Exception):
    """Base of all errors that are meant to be read by the user."""

    exit_code: ClassVar[int] = 1

    def lines(self) -> tuple[str, ...]:
        """Return the message, one line a problem."""
        return (str(self),)


class UsageError(MedllmError):
    """What was asked for does not exist or contradicts itself."""

    exit_code = 2


class SourceError(MedllmError):
    """A folder or a hub repository cannot be read as asked."""


class CheckpointError(MedllmError):
    """The weights are not what a LLaMA checkpoint must be."""


class AdapterError(MedllmError):
    """The adapter cannot be applied, or not as a whole."""


class VocabularyError(MedllmError):
    """Tokenizer and weights do not fit together."""


class ImportanceError(MedllmError):
    """An importance matrix is missing, damaged or of another model."""


class ModelfileError(MedllmError):
    """A text would not survive the Modelfile unharmed."""


class GGUFError(MedllmError):
    """A GGUF file breaks the format's rules."""


class DigestError(MedllmError):
    """A text that should be a SHA-256 digest is not one."""


class WriteError(MedllmError):
    """The output could not be written."""


class WorkerError(MedllmError):
    """llama.cpp did not do a job; the message says how it ended."""


class ServerError(MedllmError):
    """An Ollama server cannot be reached, or does not answer as documented."""


class TransferError(MedllmError):
    """A registry, or the way to it, does not let bytes or a login through."""


class StoreAccessError(WriteError):
    """An Ollama store is another user's; there may be another way to its server."""


class DeviceError(MedllmError):
    """A device is missing, fails, or does not give llama.cpp's bytes."""


class CheckFailedError(MedllmError):
    """The work was done, but a check says no."""

    exit_code = 3


class ProblemsError(MedllmError):
    """Several problems of one thing, found in one go.

    Args:
        subject: what the problems belong to, such as a recipe's path.
        problems: one full sentence each; at least one.
    """

    def __init__(self, subject: str, problems: Sequence[str]) -> None:
        self.subject = subject
        self.problems = tuple(problems)
        super().__init__(f"{subject}: {'; '.join(self.problems)}")

    def lines(self) -> tuple[str, ...]:
        """Return each problem as its own line, headed by the subject."""
        return tuple(f"{self.subject}: {problem}" for problem in self.problems)


class RecipeError(ProblemsError):
    """A recipe file has problems."""


class PlanError(ProblemsError):
    """The build cannot start."""


class GateError(ProblemsError):
    """A pack may not be published as it is."""

    exit_code = 3


def shown(text: object) -> str:
    r"""Quote foreign text for a message, with control and invisible characters escaped.

    >>> shown("model\x1b[31m")
    "'model\\x1b[31m'"
    """
    # repr() escapes what str.isprintable() refuses: control characters, bidirectional
    # overrides, line separators. A terminal must not be driven by a tensor's name.
    return repr(str(text))
