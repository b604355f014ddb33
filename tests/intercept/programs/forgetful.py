"""Writes down its step before it saves it: after a crash in between, the diary has that step twice."""

import os

import torch
from notes import note

step = torch.load("last.pth") if os.path.exists("last.pth") else 0
note("RESUMED", step)
for step in range(step + 1, 4):  # noqa: B020
    with open("diary.txt", "a") as file:
        file.write(f"{step}\n")
    torch.save(step, "last.pth")
    note("ACK", step)
with open("diary.txt") as file:
    note("ENDED", "-".join(file.read().split()))
