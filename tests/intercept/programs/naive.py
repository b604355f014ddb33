"""Overwrites last.pth in place, as most scripts do."""

import json
import os

import torch
from notes import note, note_end

state = {"step": 0, "w": torch.zeros(300)}
if os.path.exists("last.pth"):
    state = torch.load("last.pth")
    assert bool((state["w"] == state["step"]).all())
    with open("state.json") as file:
        json.load(file)
note("RESUMED", state["step"])
if "RESUME_ONLY" not in os.environ:
    for step in range(state["step"] + 1, 4):
        with open("state.json", "w") as file:
            json.dump({"step": step, "text": "x" * 1000}, file)
        state = {"step": step, "w": torch.full((300,), float(step))}
        torch.save(state, "last.pth")
        if os.environ.get("RANK", "0") == "0":
            note("ACK", step)
if os.environ.get("RANK", "0") == "0":
    note_end({"w": state["w"]})
