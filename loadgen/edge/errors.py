"""The one exception a user of the load generator should ever see."""


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, how to fix it. The front door exits with 2."""
