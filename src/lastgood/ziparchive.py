"""The zip files that torch writes, read with every length and checksum verified.

torch's own reader ignores checksums, and a tensor whose bytes rotted loads without a word. Format: PKWARE APPNOTE.TXT
sections 4.3 to 4.5; torch stores members uncompressed below one directory, in caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from lastgood.errors import DamagedError

CHUNK = 1 << 20
MAX_COMPRESSION = 100
"""torch never compresses. A checkpoint packed again by an archiver is read up to this factor."""
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_ENCRYPTED, _UTF8 = 0x1, 0x800


@dataclass(frozen=True)
class Member:
    """One file in the archive."""

    name: str
    """Without the archive's own directory: `data.pkl`, `data/0`."""
    offset: int
    """Of the first byte of its content in the file."""
    size: int
    """Bytes of content."""
    stored: int
    """Bytes in the file; equal to `size` unless compressed."""
    crc: int
    deflated: bool


class ZipArchive:
    """The directory of a torch zip file. Raises `DamagedError` where the directory is missing, contradicts the file,
    or holds what torch never writes."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self.members: dict[str, Member] = {}
        try:
            with zipfile.ZipFile(file) as archive:
                infos, directory = archive.infolist(), archive.start_dir
        except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, EOFError, OverflowError) as error:
            file.seek(max(0, size - (1 << 16) - 22))
            if b"PK\x05\x06" not in file.read():
                raise DamagedError(
                    f"the file is cut off: {size} bytes, the archive's directory is missing; the save that wrote it "
                    "did not finish"
                ) from error
            raise DamagedError(f"the archive's directory is damaged: {error}") from error
        if not infos:
            raise DamagedError("the archive is empty")
        self.prefix = infos[0].orig_filename.partition("/")[0]
        end = 0
        for info in sorted(infos, key=lambda info: info.header_offset):
            if info.header_offset < end or (end == 0 and info.header_offset != 0):
                raise DamagedError(f"{_shown(info)}: starts at byte {info.header_offset}, inside another part")
            member = self._member(info)
            end = member.offset + member.stored
            if end > directory:
                raise DamagedError(f"{_shown(info)}: its {member.stored} bytes reach into the archive's directory")
            if member.name in self.members:
                raise DamagedError(f"{_shown(info)}: two members have this name")
            self.members[member.name] = member
        self.has_checksums = all(member.crc for member in self.members.values() if member.size)
        """False where one is zero: all are after `torch.serialization.set_crc32_options(False)`, and those of storages
        are that `torch.serialization.skip_data` leaves to the program."""

    def _member(self, info: zipfile.ZipInfo) -> Member:
        name = info.orig_filename
        directory, _, rest = name.partition("/")
        if directory != self.prefix or not rest or ".." in rest.split("/") or "\\" in name or "\0" in name:
            raise DamagedError(f"{_shown(info)}: not a name that torch writes below {self.prefix[:100]!r}")
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        if info.flag_bits & _ENCRYPTED or (info.compress_type != zipfile.ZIP_STORED and not deflated):
            raise DamagedError(f"{_shown(info)}: encrypted, or compressed in an unknown way")
        if deflated and info.file_size > MAX_COMPRESSION * info.compress_size:
            raise DamagedError(f"{_shown(info)}: {info.compress_size} bytes that would unpack to {info.file_size}")
        if not deflated and info.file_size != info.compress_size:
            raise DamagedError(f"{_shown(info)}: {info.compress_size} bytes that claim to be {info.file_size}")
        self._file.seek(info.header_offset)
        header = self._file.read(_LOCAL_HEADER.size)
        if len(header) != _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
            raise DamagedError(f"{_shown(info)}: its header is missing at byte {info.header_offset}")
        name_length, extra_length = _LOCAL_HEADER.unpack(header)[-2:]
        if self._file.read(name_length) != name.encode("utf-8" if info.flag_bits & _UTF8 else "cp437"):
            raise DamagedError(f"{_shown(info)}: its header has another name")
        offset = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        return Member(rest, offset, info.file_size, info.compress_size, info.CRC, deflated)

    def chunks(self, member: Member) -> Iterator[bytes]:
        """The content in pieces of at most 1 MiB. Raises `DamagedError` at the end where length or checksum differ."""
        crc = length = 0
        unpack = zlib.decompressobj(-15) if member.deflated else None
        left, position = member.stored, member.offset
        pending = b""
        while True:
            if not pending and left:
                self._file.seek(position)
                pending = self._file.read(min(CHUNK, left))
                if not pending:
                    raise DamagedError(f"{member.name}: the file ends inside it")
                left -= len(pending)
                position += len(pending)
            if unpack is None:
                chunk, pending = pending, b""
            else:
                try:
                    chunk = unpack.decompress(pending, CHUNK)
                except zlib.error as error:
                    raise DamagedError(f"{member.name}: its compressed bytes are damaged") from error
                pending = unpack.unconsumed_tail
            if not chunk and not left and not pending:
                break
            length += len(chunk)
            if length > member.size:
                raise DamagedError(f"{member.name}: longer than the {member.size} bytes that the directory says")
            crc = zlib.crc32(chunk, crc)
            if chunk:
                yield chunk
        if length != member.size:
            raise DamagedError(f"{member.name}: {length} bytes where the directory says {member.size}")
        if member.crc and crc != member.crc:
            raise DamagedError(f"{member.name}: its bytes changed (CRC-32 {crc:08x}, written was {member.crc:08x})")

    def check(self, member: Member) -> None:
        """Reads `member` once, in bounded memory. Raises `DamagedError`."""
        for _ in self.chunks(member):
            pass

    def read(self, name: str, limit: int) -> bytes:
        """The content of a small member. Raises `DamagedError` where it is missing, damaged, or above `limit` bytes."""
        member = self.members.get(name)
        if member is None:
            raise DamagedError(f"{name} is missing from the archive")
        if member.size > limit:
            raise DamagedError(f"{name}: {member.size} bytes, more than {limit}")
        return b"".join(self.chunks(member))


def _shown(info: zipfile.ZipInfo) -> str:
    return repr(info.orig_filename[:200])
