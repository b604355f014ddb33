"""The one exception of the trainer."""


class SovitsError(Exception):
    """Something that the user can mend: the message says what is wrong with which file or value, and what to do."""
