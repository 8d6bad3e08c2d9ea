"""Errors that are shown to the user as one message, without a traceback."""


class UserError(Exception):
    """Something the user can mend: the message names the key or file, the value, what is allowed and what to do."""


class ConfigError(UserError):
    """A config that cannot be run; the message lists every problem found."""


class DataError(UserError):
    """A dataset file or row that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint directory that cannot be read, written or resumed from."""


class LaunchError(UserError):
    """A launch that does not fit the machine or the output directory."""


class LostRankError(LaunchError):
    """Another rank has ended; whoever notices says so at once."""


class TrainingError(UserError):
    """A run that cannot go on, such as one whose loss is no longer finite."""
