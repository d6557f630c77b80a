"""The one exception that a user's mistake raises."""


class BasedError(Exception):
    """Bad input: the message is one line that says what is wrong and what to do."""
