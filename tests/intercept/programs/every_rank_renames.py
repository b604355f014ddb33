"""Each rank saves to a temporary name, the same in all, and renames it to last.pth."""

import os

import torch
from notes import note, note_end

state = {"step": 0, "w": torch.zeros(300)}
if os.path.exists("last.pth"):
    state = torch.load("last.pth")
    assert bool((state["w"] == state["step"]).all())
note("RESUMED", state["step"])
if "RESUME_ONLY" not in os.environ:
    for step in range(state["step"] + 1, 4):
        state = {"step": step, "w": torch.full((300,), float(step))}
        torch.save(state, "last.pth.tmp")
        os.replace("last.pth.tmp", "last.pth")
        if os.environ.get("RANK", "0") == "0":
            note("ACK", step)
if os.environ.get("RANK", "0") == "0":
    note_end({"w": state["w"]})
