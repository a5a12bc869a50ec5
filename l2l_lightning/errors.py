"""Everything that can go wrong and that a user can mend: one base class, and a class for each kind."""

import signal


class L2LError(Exception):
    """Something that the user can mend; the message says what, in one line, and what to change.

    Example:
        >>> from l2l_lightning import load
        >>> try:
        ...     load("no-such-rule")
        ... except L2LError as error:
        ...     print(str(error).partition(":")[0])
        no-such-rule
    """


class CommandLineError(L2LError):
    """Something that the user can mend; the message says what and with which option."""


class CheckpointError(L2LError, ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


class CheckpointMismatchError(CheckpointError):
    """A checkpoint does not fit what is configured; the message names the options."""


class CaptureError(L2LError, RuntimeError):
    """CUDA graphs were asked for and cannot be used; the message says why and names the option."""


class DataCorruptedError(L2LError, ValueError):
    """A data set's files are there and are not what they should be."""


class DataError(L2LError, ValueError):
    """Data of the user's own that cannot be used as given; the message names the argument."""


class DataNotFoundError(L2LError, FileNotFoundError):
    """A data set is not where the settings say; the message names the settings."""


class FolderInUseError(L2LError, RuntimeError):
    """Another process's run is in the folder; the message names it."""


class GroupError(L2LError, ValueError):
    """A tensor that a `Grouped` has no rule for; the message names the tensor and the keys."""


class HubError(L2LError, OSError):
    """The Hugging Face Hub cannot be reached, or refuses; the message says what and why."""


class MetaTrainingError(L2LError, RuntimeError):
    """Meta-training cannot go on; the message says what happened and which option to change."""


class MissingPackageError(L2LError, ModuleNotFoundError):
    """What was asked for needs a package of an extra; the message says what to install."""


class ReproductionError(L2LError, ValueError):
    """Experiments cannot be run as asked, or were interrupted; the message says what to do."""


class ResultsError(L2LError, ValueError):
    """Files of a finished run or comparison that cannot be used as asked; the message names the file."""


class RuleError(L2LError, TypeError):
    """A rule that breaks the contract of update rules; the message has the sentence that it breaks."""


class RunStoppedError(L2LError):
    """A signal ended the run after a whole meta-step; the message says how to go on.

    Args:
        number: The signal's.
        step: Meta-steps done.
        command: What to go on with.
    """

    def __init__(self, number: int, step: int, command: str) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} after meta-step {step}; go on with: {command}"
        )
        self.exit_code = 128 + number


class TaskError(L2LError, ValueError):
    """A task that cannot be evaluated; the message names it and says why."""


class WeightsError(L2LError, ValueError):
    """A file of weights that cannot be loaded; the message names the file and what is wrong with it."""
