"""The one exception that fastln raises for what a user can put right."""


class FastLNError(ValueError):
    """Bad input: the message says what was wrong, where, and what would be right.

    The command line prints the message alone and exits with status 2; library users catch it as a `ValueError`.
    """
