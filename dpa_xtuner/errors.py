"""The error that is meant for the person at the keyboard."""


class DPAError(ValueError):
    """A user's mistake or a full disk: shown as one message, without a traceback.

    The message says what was wrong (argument, value, file or record id), what was
    expected, and what to do.
    """
