"""Just enough of torch for a Python that has none."""

import pickle

__version__ = "2.1.0"


class serialization:
    save = load = None


def save(obj, f):
    if isinstance(f, str):
        f = open(f, "wb")  # noqa: SIM115 - closed by the end of the call, as sloppy programs have it
    f.write(pickle.dumps(obj))


def load(f):
    if isinstance(f, str):
        with open(f, "rb") as file:
            return pickle.load(file)
    return pickle.load(f)
