"""What kind of file system a directory is on, and what that kind is known not to do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lastgood import disk
from lastgood.cli.i18n import _

_MOUNTS = Path("/proc/self/mountinfo")
_SYNCHRONISED = (
    "onedrive",
    "dropbox",
    "google drive",
    "googledrive",
    "icloud",
    "mobile documents",
    "nutstore",
    "坚果云",
    "baidunetdisk",
)
"""Folders by these names are copied to a cloud by a program that opens files as soon as they appear. The sixth is
iCloud's on macOS."""
_WINDOWS_DRIVES = {2: "removable", 3: "fixed", 4: "network", 5: "cdrom", 6: "ramdisk"}


@dataclass(frozen=True, slots=True)
class Mount:
    """The file system that a path is on."""

    type: str
    """As the system calls it: ext4, nfs4, NTFS."""
    point: str
    source: str


def mount_of(path: Path) -> Mount | None:
    """The file system of a directory, or None where the system does not tell."""
    if sys.platform == "win32":
        return _windows_mount(path)
    try:
        with disk.open_read(_MOUNTS) as file:
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return parse_mounts(_of_mount(), path.resolve())
    return parse_mountinfo(text, path.resolve())


def _of_mount() -> str:
    """What the command mount prints: macOS has no /proc. Empty where there is no such command."""
    try:
        done = subprocess.run(["mount"], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace")


def parse_mounts(text: str, path: Path) -> Mount | None:
    """The last mount whose point is `path` or above it, in lines as macOS prints them: SOURCE on POINT (TYPE, ...).

    What lies on the data volume under a name of the root counts as the root's, which has the same type.
    """
    best: Mount | None = None
    for line in text.splitlines():
        match = re.fullmatch(r"(.*?) on (/.*) \(([^,()]+)[^()]*\)", line)
        if match and path.is_relative_to(match[2]) and (best is None or len(match[2]) >= len(best.point)):
            best = Mount(match[3], match[2], match[1])
    return best


def parse_mountinfo(text: str, path: Path) -> Mount | None:
    """The last mount whose point is `path` or above it, in the format of proc(5)."""
    best: Mount | None = None
    for line in text.splitlines():
        left, separator, right = line.partition(" - ")
        fields, after = left.split(), right.split()
        if not separator or len(fields) < 5 or len(after) < 2:
            continue
        # Blanks in names are written as \040.
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        if path.is_relative_to(point) and (best is None or len(point) >= len(best.point)):
            best = Mount(after[0], point, after[1])
    return best


def _windows_mount(path: Path) -> Mount | None:
    if sys.platform != "win32":
        return None
    import ctypes

    root = path.resolve().anchor
    name = ctypes.create_unicode_buffer(64)
    if not ctypes.windll.kernel32.GetVolumeInformationW(root, None, 0, None, None, None, name, len(name)):
        return None
    drive = _WINDOWS_DRIVES.get(ctypes.windll.kernel32.GetDriveTypeW(root), "unknown")
    return Mount("cifs" if drive == "network" else name.value, root, drive)


def risk_of(mount: Mount) -> tuple[str, str] | None:
    """What is known against a kind of file system: how bad ("risk" or "broken"), and why and what to do."""
    kind = mount.type.lower()
    if kind in ("tmpfs", "ramfs", "devtmpfs") or mount.source == "ramdisk":
        return "broken", _(
            "{type} is memory: everything on it is gone when the machine stops. Use a directory on a disk.", type=kind
        )
    if kind == "overlay":
        return "risk", _(
            "overlay is the inside of a container: it is gone when the container is removed. Mount a volume for runs."
        )
    if kind.startswith("nfs"):
        return "risk", _(
            "{type} shows changes of other machines late, and loses synced data where the server exports with async. "
            "Ask for an export with sync, and let only one machine's job use a run.",
            type=kind,
        )
    if kind in ("cifs", "smb3", "smbfs"):
        return "risk", _(
            "{type} is a Windows share: whether a sync reaches the disk is up to the server, and a lost connection "
            "fails saves. Train on a local disk, and use the share as mirror=.",
            type=kind,
        )
    if kind in ("vfat", "msdos", "exfat", "fat32", "fat"):
        return "risk", _(
            "{type} has no journal: pulling the plug can damage it as a whole, and FAT32 holds no file above 4 GiB. "
            "Use ext4, XFS, NTFS or APFS.",
            type=kind,
        )
    if kind in ("9p", "virtiofs", "drvfs", "vboxsf", "fakeowner", "grpcfuse"):
        return "risk", _(
            "{type} is a folder of the host, passed through to a virtual machine or container: a sync may not reach "
            "the host's disk, and it is slow. Use a disk of the machine itself.",
            type=kind,
        )
    if kind.startswith("fuse") or kind in ("macfuse", "osxfuse"):
        return "risk", _(
            "{type} is a file system in a program of its own, and promises what that program does; those over object "
            "stores and clouds often replace files in steps. Train on a local disk, and use this one as mirror=.",
            type=kind,
        )
    return None


def synchronised_folder(path: Path) -> str | None:
    """The folder above `path` that a cloud program keeps in step, or None."""
    resolved = path.resolve()
    for name in ("OneDrive", "OneDriveConsumer", "OneDriveCommercial"):
        root = os.environ.get(name)
        if root and resolved.is_relative_to(root):
            return root
    for folder in (resolved, *resolved.parents):
        if folder.name.lower().startswith(_SYNCHRONISED):
            return str(folder)
    return None
