class SovitsError(Exception):
    """What went wrong in the trainer, with which file, and what to do about it."""
