"""What the programs note for the one that kills them: their steps, and what they end with."""

import hashlib
import os
import signal


def note(variable, text):
    with open(os.environ[variable], "a") as file:
        file.write(f"{text}\n")
    if variable == "ACK" and os.environ.get("END_AFTER") == str(text):
        os.kill(os.getpid(), signal.SIGKILL)  # A quiet moment: nothing is being saved.


def note_end(tensors):
    """Note a checksum of all bytes of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    note("ENDED", digest.hexdigest())
