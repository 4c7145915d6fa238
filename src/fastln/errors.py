"""The exception that fastln raises for errors that the user can fix."""


class FastLNError(ValueError):
    """Invalid input. The message says what is wrong, where, and how to fix it.

    The command line prints only the message and exits with status 2. Library users can catch it as a `ValueError`.
    """
