"""The errors that a user is meant to read."""


class HarnessError(Exception):
    """Bad input. The message is what the user sees: it names the file, key or rank, and says what would be right."""


class ConfigError(HarnessError):
    """A configuration that cannot be used: one line a problem, each naming its key."""
