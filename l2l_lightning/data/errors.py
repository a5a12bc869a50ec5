"""What can be wrong with a data set."""


class DataNotFoundError(FileNotFoundError):
    """A data set is not where the settings say; the message names the settings."""


class DataCorruptedError(ValueError):
    """A data set's files are there and are not what they should be."""
