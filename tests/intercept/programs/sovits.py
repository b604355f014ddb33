"""GPT-SoVITS's way of saving: stage 2's pair and weights, and stage 1's list-and-delete.

With several ranks, all save the pair, and meet once an epoch, as the training itself makes them.
"""

import glob
import os
import re
import shutil
from io import BytesIO
from time import time as ttime

import torch
from notes import note, note_end

OUT = os.environ["OUT"]
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
FIRST = os.environ.get("RANK", "0") == "0"


def my_save(fea, path):
    dir = os.path.dirname(path)
    name = os.path.basename(path)
    tmp_path = f"{ttime()}.pth"
    torch.save(fea, tmp_path)
    shutil.move(tmp_path, f"{dir}/{name}")


def my_save2(fea, path):
    bio = BytesIO()
    torch.save(fea, bio)
    bio.seek(0)
    data = b"05" + bio.getvalue()[2:]
    with open(path, "wb") as f:
        f.write(data)


def latest_checkpoint_path(dir_path, regex):
    f_list = glob.glob(os.path.join(dir_path, regex))
    f_list.sort(key=lambda f: int("".join(filter(str.isdigit, f.replace(OUT, "")))))
    return f_list[-1]


def check_weights(path):
    with open(path, "rb") as f:
        data = f.read()
    assert torch.load(BytesIO(b"PK" + data[2:]))["weight"].numel() == 300


# Stage 2.
logs = os.path.join(OUT, "logs_s2")
ckpt = os.path.join(OUT, "logs_s1", "ckpt")
weights = os.path.join(OUT, "weights")
for directory in (logs, ckpt, weights):
    os.makedirs(directory, exist_ok=True)
try:
    d = torch.load(latest_checkpoint_path(logs, "D_*.pth"))
    g = torch.load(latest_checkpoint_path(logs, "G_*.pth"))
    assert g["iteration"] == d["iteration"], (g["iteration"], d["iteration"])
    epoch = g["iteration"]
    state = {"G": g["model"], "D": d["model"]}
except IndexError:
    epoch = 0
    state = {}
# Stage 1.
found = [re.match(r"epoch=(\d+)-step=(\d+)\.ckpt", name) for name in os.listdir(ckpt)]
found = [match for match in found if match]
newest = max(found, key=lambda match: int(match.group(1)), default=None)
first = torch.load(os.path.join(ckpt, newest.group(0)))["epoch"] if newest else 0
for name in os.listdir(weights):
    check_weights(os.path.join(weights, name))
assert first in (epoch, epoch + 1), (first, epoch)
note("RESUMED", epoch)
if "RESUME_ONLY" in os.environ:
    if FIRST:
        note_end(state)
else:
    if RANKS > 1:
        torch.distributed.init_process_group("gloo")
    for epoch in range(epoch + 1, 4):  # noqa: B020
        to_clean = list(os.listdir(ckpt)) if FIRST else []
        if FIRST:
            torch.save({"epoch": epoch, "w": torch.zeros(300)}, f"{ckpt}/epoch={epoch}-step={epoch * 5}.ckpt")
        for name in to_clean:
            try:
                os.remove(f"{ckpt}/{name}")
            except Exception:
                print("could not remove", name)
        if RANKS > 1:
            torch.distributed.barrier()
        step = epoch * 5 if "BY_STEP" in os.environ else 233333333333
        state = {"model": torch.full((300,), float(epoch)), "iteration": epoch}
        my_save(state, os.path.join(logs, f"G_{step}.pth"))
        my_save(state, os.path.join(logs, f"D_{step}.pth"))
        if FIRST:
            my_save2({"weight": torch.zeros(300)}, os.path.join(weights, f"voice_e{epoch}.pth"))
            note("ACK", epoch)
