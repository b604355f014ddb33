"""What :mod:`lastgood.disk` needs of Windows beyond Python's own calls. Nothing else imports this.

``open()`` lets no other program rename or delete the file while it is open, and when it is refused because of another
program, it gives errno 13 for that as for a missing right. CreateFileW does better in both.
"""

from __future__ import annotations

import sys
from typing import Literal

SHARING = (5, 32, 33)
"""Access denied, sharing violation, lock violation. An indexer or a virus scanner that has the file open causes any of
the three, and lets go within a second or so."""
DIR_NOT_EMPTY = 145
"""Of a directory whose files are deleted, but not gone before another program closes them."""
_READ_ONLY = 1

if sys.platform == "win32":
    import ctypes
    import msvcrt
    import os
    import winreg
    from ctypes import wintypes

    _kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    _kernel32.CreateFileW.restype = wintypes.HANDLE
    _kernel32.CreateFileW.argtypes = [
        wintypes.LPCWSTR,
        wintypes.DWORD,
        wintypes.DWORD,
        wintypes.LPVOID,
        wintypes.DWORD,
        wintypes.DWORD,
        wintypes.HANDLE,
    ]
    _kernel32.CloseHandle.argtypes = [wintypes.HANDLE]
    _INVALID = wintypes.HANDLE(-1).value
    _SHARE_ALL = 7  # Others may read, write and delete.
    _WAYS = {
        # The rights that are asked for, and whether the file may be new (OPEN_EXISTING, OPEN_ALWAYS).
        "read": (0x80000000, 3, os.O_RDONLY),
        "append": (0x00100084, 4, os.O_WRONLY | os.O_APPEND),  # FILE_APPEND_DATA: at the end, whoever else writes.
        "write": (0x40000000, 4, os.O_WRONLY),
    }

    def open_shared(path: str, way: Literal["read", "append", "write"]) -> int:
        """A descriptor of a file that others may read, write, rename and delete meanwhile."""
        rights, creation, flags = _WAYS[way]
        handle = _kernel32.CreateFileW(path, rights, _SHARE_ALL, None, creation, 0x80, None)
        if handle == _INVALID:
            code = ctypes.get_last_error()
            raise OSError(0, ctypes.FormatError(code).strip(), path, code)
        try:
            return msvcrt.open_osfhandle(handle, flags | os.O_NOINHERIT)
        except BaseException:
            _kernel32.CloseHandle(handle)
            raise

    def refusal(path: str) -> str | None:
        """Why this name can never be replaced or deleted as it is, or None where waiting may help."""
        try:
            status = os.lstat(path)
        except OSError:
            return None
        if os.path.isdir(path):
            return "there is a directory of this name"
        if status.st_file_attributes & _READ_ONLY:
            return "the file is marked read-only (attrib -r removes the mark)"
        return None

    def machine_guid() -> str:
        """What Windows was given at its installation. Copies of a virtual machine share it, but not their names."""
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"SOFTWARE\Microsoft\Cryptography") as key:
            return str(winreg.QueryValueEx(key, "MachineGuid")[0])

else:

    def open_shared(path: str, way: Literal["read", "append", "write"]) -> int:
        raise NotImplementedError(path)

    def refusal(path: str) -> str | None:
        return None

    def machine_guid() -> str:
        raise OSError("only Windows has one")
