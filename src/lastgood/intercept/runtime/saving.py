"""One file of a program that knows nothing of us: written beside its place, synced, checked, and put there at once."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from . import journal, ranks, system
from .mirror import Mirror
from .report import Report
from .settings import PRIVATE, Settings
from .units import Units

SYNC_AHEAD = 1 << 20
"""Bytes after which the system is asked to start writing, so that the sync at the end finds little left to do."""


class Known(NamedTuple):
    """What was saved under a name; the inode tells whether it still is that file."""

    size: int
    crc32: int
    inode: int
    time: float
    """When this process began to save it, in seconds since 1970."""
    begins: int
    """As in :class:`journal.Version`."""


class Raw(io.FileIO):
    """The temporary file: counts and checksums what is written from front to back."""

    def __init__(self, path: str, *, like: str, checksum: bool = True, mode: str = "x") -> None:
        super().__init__(path, mode)  # FileIO is always binary and unbuffered.
        system.copy_owner(like, path)  # Before there is anything in it that others are not to read.
        self.crc: int | None = 0 if checksum else None
        self.size = 0
        self.failed: BaseException | None = None
        """Why some of what was to be written is not there, or there twice: a later write does not make that good."""
        self.gaps = False
        """Whether the writer left bytes out, for the program to write later, as torch.serialization.skip_data does."""
        self._ahead = 0

    def write(self, data: Any) -> int:
        try:
            return self._write(data)
        except BaseException as error:
            self.failed = error
            raise

    def seek(self, offset: int, whence: int = 0) -> int:
        position = super().seek(offset, whence)
        # From the beginning it would be room for a header, which is written last.
        self.gaps = self.gaps or (whence == os.SEEK_CUR and position > os.fstat(self.fileno()).st_size)
        return position

    def _write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.crc is not None and self.tell() != self.size:
            self.crc = None  # The writer went back (a zip file does): the file is read once more at the end.
        written = 0
        while written < len(view):
            # In pieces: the checksum finds the bytes in the processor's cache, and Ctrl-C gets through.
            count = super().write(view[written : written + (1 << 22)])
            if not count:
                raise OSError(errno.EIO, "the disk took no bytes and gave no reason", self.name)
            if self.crc is not None:
                self.crc = zlib.crc32(view[written : written + count], self.crc)
            written += count
            self.size += count
            if sys.platform == "linux" and self.size - self._ahead >= SYNC_AHEAD:
                # DONTNEED makes Linux start to write dirty pages, and does not wait for them.
                os.posix_fadvise(self.fileno(), self._ahead, self.size - self._ahead, os.POSIX_FADV_DONTNEED)
                self._ahead = self.size
        return written


class Saver:
    """Everything that is saved by this process goes through here."""

    def __init__(self, settings: Settings, report: Report) -> None:
        self.settings = settings
        self.report = report
        self.units = Units(settings, report)
        self.mirror = Mirror(settings, report)
        self.mine: dict[str, Known] = {}
        """The files that this process saved."""
        self.pretended: dict[str, int] = {}
        """Paths that only look saved to this process, since rank 0 saves for all; and their sizes in bytes."""
        self._rounds: dict[str, tuple[int, float]] = {}
        self._cleared: set[str] = set()
        self._made: set[str] = set()
        self._synced: set[str] = set()
        self.refused: set[str] = set()
        """Files that this process was not given to load, since they or others that belong to them are damaged."""
        self._unsaved: dict[str, str] = {}
        """By target, complete files that the system refused to put there."""

    # Who writes.

    def leaves_to_rank_zero(self, path: str) -> bool:
        """Whether this rank only acts as if it saved. A name that holds the rank's own number is the rank's own."""
        if self.settings.save_on != "rank0":
            return False
        rank = ranks.rank()
        return rank is not None and rank > 0 and not journal.names_rank(path, rank)

    def pretend(self, path: str, size: int) -> None:
        self.pretended[path] = size
        self.report.add(collisions=1)

    # Writing.

    @contextlib.contextmanager
    def writing(self, path: str) -> Iterator[Any]:
        """A new file for `path`, put in place when the block ends well, and gone when it does not.

        It is for torch.save, whose zip has checksums of its own: computing them again would double what a save costs.
        """
        called = time.time()
        temporary = self.temporary(path)
        try:
            raw = Raw(temporary, like=path, checksum=False)
            with io.BufferedWriter(raw, 256 << 10) as file:
                yield file
                self.finish(raw, file)
        except BaseException as error:
            self.abandon(temporary, path, error)
            raise
        begins, crc = 0, raw.crc
        if crc is None:
            begins = journal.zip_directory(temporary)
            _, crc = journal.checksum(temporary, begins)
        self.put(temporary, path, raw.size, crc, called, begins=begins)

    def temporary(self, path: str) -> str:
        directory = os.path.dirname(path)
        if directory not in self._cleared:
            self._cleared.add(directory)
            system.clear_leftovers(directory)
        temporary = system.temporary(path)
        self.units.writes(path, temporary)
        return temporary

    def finish(self, raw: Raw, file: Any) -> None:
        """Flush and sync, and look whether the file has what was written."""
        file.flush()
        system.sync_file(raw.fileno())
        size = os.fstat(raw.fileno()).st_size
        if size != raw.size:
            raw.crc = None  # Written around us through the descriptor, as numpy's tofile does.
            raw.size = size
        if raw.gaps:
            raw.crc = journal.NO_CHECKSUM

    def abandon(self, temporary: str, path: str, error: BaseException, *, aside: bool = False) -> None:
        """Drop what was to be saved under the name `path`, or keep it `aside`."""
        more = ""
        if aside:
            more = f"what was written until then is in {self._keep_aside(temporary, path, 'partial')}; "
        else:
            with contextlib.suppress(OSError):
                system.remove(temporary)
        self.units.wrote(temporary, failed=path)
        if not isinstance(error, GeneratorExit):
            self.report.failed(path, f"{path} was not saved: {error!r}; {more}what had this name before is unchanged")

    @contextlib.contextmanager
    def reporting(self, path: str) -> Iterator[None]:
        """Around what is done in our place to save `path`: where that fails, the program's last save failed."""
        try:
            yield
        except Exception as error:
            self.report.failed(path, f"{path} was not saved: {error!r}")
            raise

    def _keep_aside(self, source: str, target: str, kind: str) -> str:
        """Give a file that was not put in place a name that nothing deletes but the next of its kind; returns it.

        It ends in the kind, so that a program that looks everywhere for `*.pth` does not take it for its own.
        """
        kept = os.path.join(os.path.dirname(target), PRIVATE, kind, f"{os.path.basename(target)}.{kind}")
        try:
            system.make_dirs(os.path.dirname(kept))
            system.replace(source, kept)
        except OSError:
            return source
        return kept

    # Putting in place.

    def put(self, source: str, target: str, size: int, crc: int | None, called: float, *, begins: int = 0) -> bool:
        """As :meth:`_put`, for a source that no other rank knows: where it is gone, the save failed."""
        try:
            return self._put(source, target, size, crc, called, begins=begins)
        except FileNotFoundError as error:
            self.report.failed(target, f"{target} was not saved: {error!r}")
            raise

    def _put(
        self,
        source: str,
        target: str,
        size: int,
        crc: int | None,
        called: float,
        *,
        begins: int = 0,
        operation: Callable[[], Any] | None = None,
        ahead: int | None = None,
        again: bool = False,
    ) -> bool:
        """Give the complete file `source` the name `target`. Returns False where another rank's file is kept instead.

        Args:
            operation: the program's own rename; a replacement by default.
            ahead: by how many rounds rank 0 is ahead, where the content is rank 0's; None: it is this rank's.
            again: this process has saved it before, under another name.

        Raises:
            OSError: the system refused to the end. The complete file stays under the name that the message gives.
        """
        if crc is None:
            size, crc = journal.checksum(source)
        round_, before = self._next_round(target, called)
        rank = ranks.rank()
        if ahead is not None:
            rank = 0
            round_ += ahead
        try:
            with self.units.locked(target):
                inode = os.stat(source).st_ino
                versions = journal.read(target)
                if rank:
                    lies = journal.lying(target, versions)
                    # A later one has never got there, for its writer was killed; or it was taken back.
                    placed = [version for version in versions if lies is not None and version.time <= lies.time]
                    theirs = self._of_rank_zero(placed, round_, before, called)
                    if theirs is not None:
                        self.report.add(collisions=1)
                        system.remove(source)
                        self.units.left(target, theirs.save)
                        self.mine[target] = Known(theirs.size, theirs.crc32, theirs.inode, called, theirs.begins)
                        return False
                save = self.units.begin(target)
                now = time.time()
                if save:
                    versions = journal.read(target)  # What lies there may have got a number.
                versions = self._keep_old(target, self._without_oldest(target, versions))
                program = os.path.basename(sys.argv[0]) if sys.argv else ""
                new = journal.Version(size, crc, now, -1 if rank is None else rank, round_, self.settings.run, program)
                new.inode, new.begins, new.save = inode, begins, save
                journal.write(target, [*versions, new])
                with system.freed_in_background(target):
                    system.patiently(
                        operation or (lambda: system.replace(source, target)), self.settings.patience, self._count_retry
                    )
                    system.sync_dir(os.path.dirname(target))
                self._sync_above(os.path.dirname(target))
                # The next save writes down that it is gone: a second line for each save would cost more than the rest.
                self._without_oldest(target, versions)
                self.units.saved(target)
        except FileNotFoundError:
            raise  # The source was taken away by another rank, or the directory by the program: the caller looks.
        except OSError as error:
            self.units.wrote(source, failed=target)
            raise self._refused(source, target, error) from error
        finally:
            self.units.wrote(source)
        self.mine[target] = Known(size, crc, inode, called, begins)
        self.pretended.pop(target, None)
        if target in self._unsaved:
            with contextlib.suppress(OSError):
                system.remove(self._unsaved.pop(target))  # It waited for somebody to put it here.
        self.report.saved(size, time.time() - called, again=again)
        if self.settings.mirror:
            self.mirror.copy(target)
        return True

    def _sync_above(self, directory: str) -> None:
        """Make the name of a directory durable, and those of the directories above that this process made with it."""
        if directory in self._synced:
            return
        self._synced.add(directory)
        self._made.discard(directory)
        above = os.path.dirname(directory)
        with contextlib.suppress(OSError):  # Not ours to read: then it was not made by this program, either.
            system.sync_dir(above)
        if above in self._made:
            self._sync_above(above)

    def has_made(self, directory: str) -> None:
        """The program made a directory: its name is to be synced, once there is something in it."""
        self._made.add(directory)
        self._synced.discard(directory)

    def _next_round(self, target: str, called: float) -> tuple[int, float]:
        """How often this process has saved `target`, this time included, and when it began the time before."""
        count, before = self._rounds.get(target, (0, 0.0))
        self._rounds[target] = (count + 1, called)
        return count + 1, before

    def _of_rank_zero(
        self, versions: list[journal.Version], round_: int, before: float, called: float
    ) -> journal.Version | None:
        """What rank 0 of this run put here while this rank was saving, or since its last time and in the same round.

        A rank that is late must not put an old state over a newer one: what rank 0 put in a later round counts too,
        if this process was there already, for the rounds of another job are not comparable. Rank 0 itself never looks:
        its file is put in place whatever others did, so that it has the last word.
        """
        for version in reversed(versions):
            since = called
            if version.round >= round_:
                since = before if version.round == round_ else system.started
            if version.run == self.settings.run and version.rank == 0 and version.time >= since:
                return version
        return None

    def _was_moved_for_rank_zero(self, target: str, saved: float) -> bool:
        """Whether this is rank 0, and another rank has put in place what rank 0 began to save at `saved`."""
        if ranks.rank() != 0:
            return False
        with system.locked(target):
            return any(v.run == self.settings.run and v.rank == 0 and v.time >= saved for v in journal.read(target))

    def _what_lies(self, source: str) -> journal.Version | None:
        """The entry of the file that now has the name of one that we saved: another rank may have saved over it."""
        inode = os.stat(source).st_ino
        # The newest entry alone shows nothing: its writer may have been killed before its file was in place.
        entries = [v for v in journal.read(source) if v.inode == inode and v.run == self.settings.run]
        return entries[-1] if entries else None

    def _count_retry(self) -> None:
        self.report.add(retries=1)

    def _refused(self, source: str, target: str, error: OSError) -> OSError:
        if os.path.basename(os.path.dirname(source)) == PRIVATE:
            # A temporary name, which the next start would clear away.
            source = self._unsaved[target] = self._keep_aside(source, target, "unsaved")
        message = (
            f"{target} could not be replaced: {error.strerror or error}. The complete new file is {source}; the "
            f"old one is unchanged. Close the program that has {os.path.basename(target)} open, then rename it by hand"
        )
        self.report.failed(target, message)
        refused = type(error)(error.errno, message)
        if getattr(error, "winerror", None) is not None:
            refused.winerror = error.winerror  # type: ignore[attr-defined,unused-ignore]
        return refused

    def _keep_old(self, target: str, versions: list[journal.Version]) -> list[journal.Version]:
        """Link the file that is about to be replaced into the history."""
        if not self.settings.history or not system.isfile(target):
            return versions
        current = journal.lying(target, versions)
        if current is None:
            if journal.check(target, versions):
                return versions  # It is damaged, and would pass for a version like others.
            current = journal.unknown(target)
            versions = [*versions, current]
        if self.units.is_half_of_a_save(target, current):
            return versions
        name = f"{os.path.basename(target)}.{int(current.time * 1000)}"
        link = journal.history_path(target, name)
        try:
            system.make_dirs(os.path.dirname(link))
            self._link(target, link)
        except FileExistsError:
            pass  # This version has its link: it was kept when a save was cut off after this point.
        except OSError as error:
            self.report.say_once("links", f"earlier versions are not kept: no hard links here ({error})")
            return versions
        current.kept = name
        return versions

    def _link(self, target: str, link: str) -> None:
        try:
            system.link(target, link)
        except FileExistsError:
            raise
        except OSError:
            if self.units.unit_of(target) is None or system.exists(link):
                raise
            # No links on this file system. What belongs together must be taken back together, so that it is copied.
            temporary = system.temporary(target)
            system.copyfile(target, temporary)
            system.sync_path(temporary)
            system.replace(temporary, link)

    def _without_oldest(self, target: str, versions: list[journal.Version]) -> list[journal.Version]:
        """Delete earlier versions beyond those that are to be kept; returns what is still worth knowing."""
        kept = [version for version in versions if version.kept]
        if target in self.refused:
            # The program goes on without it, perhaps from the beginning: what it could have had instead stays.
            kept = [version for version in kept if version.run == self.settings.run]
        for version in kept[: -self.settings.history] if self.settings.history else kept:
            link = journal.history_path(target, version.kept)
            try:
                with system.freed_in_background(link):
                    system.remove(link)
            except FileNotFoundError:
                pass  # Since the last save.
            except OSError:
                continue  # A program has it open: it goes the next time.
            version.kept = ""
        recent = len(versions) - journal.KEEP_ENTRIES
        return [version for number, version in enumerate(versions) if version.kept or number >= recent]

    # Linking and moving.

    def link(self, source: str, target: str, link: Callable[[], Any]) -> None:
        """Give a file one more name by the program's own `link`: what is known of it holds for that name, too."""
        known = journal.lying(source) if system.isfile(source) and not os.path.islink(source) else None
        if known is None or not _takes_files(os.path.dirname(target)):
            link()
            return
        with self.units.locked(target):
            save = self.units.begin(target)
            link()  # First: where it fails, the program may copy the file instead, and nothing is to be undone.
            with contextlib.suppress(OSError):  # Then nothing is known of that name, which is no damage.
                earlier = [version for version in journal.read(target) if version.kept]
                journal.write(target, [*earlier, dataclasses.replace(known, save=save, kept="")])
                system.sync_dir(os.path.dirname(target))
            self.units.saved(target)
        if source in self.mine:
            self.mine[target] = self.mine[source]
        if self.settings.mirror:
            self.mirror.copy(target)

    def move(self, source: str, target: str, rename: Callable[[], Any], *, across: bool) -> bool:
        """Move a file over another, by the program's own `rename` where that can be atomic, else by a whole copy.

        Args:
            across: copy where source and target are on different file systems; else the rename fails there, as ever.

        Returns False where nothing was to be done, since another rank has done it.
        """
        called = time.time()
        if source in self.pretended:
            self.pretended[target] = self.pretended.pop(source)
            return False
        if source == target or not _takes_files(os.path.dirname(target)):
            with self.reporting(target):
                rename()  # Changes nothing, or fails as it would have without us.
            return True
        try:
            # Other ranks may save under the same temporary name: what we saved must not change while we move it.
            with self.units.locked(target, source) if source in self.mine else contextlib.nullcontext():
                return self._move(source, target, rename, called, across)
        except FileNotFoundError as error:
            # Where it is gone, another rank may have moved it, with the lock or, after a deadline, without.
            if system.exists(source):
                self.report.failed(target, f"{target} was not saved: {error!r}")
                raise
            return self._moved_by_another(source, target, rename)

    def _move(self, source: str, target: str, rename: Callable[[], Any], called: float, across: bool) -> bool:
        if not system.exists(source):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), source)
        if self.leaves_to_rank_zero(target):
            self.pretend(target, system.getsize(source))
            system.remove(source)
            return False
        known = self.mine.get(source)
        again = known is not None
        ahead = None
        if known is not None:
            there = self._what_lies(source)
            if there is not None and there.rank == 0:
                ahead = max(0, there.round - self._rounds[source][0])
            # The checksum, since the number of a file that was deleted is given to a new one.
            if there is None or (there.inode, there.crc32) != (known.inode, known.crc32):
                if self._was_moved_for_rank_zero(target, known.time):
                    # What lies there is from a rank that is late, which will find that it is: it is not for us.
                    del self.mine[source]
                    self._next_round(target, called)
                    self.report.add(collisions=1)
                    return False
                known = None
        if across and not _same_file_system(source, target):
            moved = self._move_across(source, target, known, called, ahead, again)
        else:
            if known is None:
                system.sync_path(source)
            size, crc, begins = (known.size, known.crc32, known.begins) if known else (0, None, 0)
            moved = self._put(
                source, target, size, crc, called, begins=begins, operation=rename, ahead=ahead, again=again
            )
        if self.mine.pop(source, None):
            journal.forget(source)
            if self.settings.mirror:
                self.mirror.moved(source)
        return moved

    def _move_across(
        self, source: str, target: str, known: Known | None, called: float, ahead: int | None, again: bool
    ) -> bool:
        with self.copied(source, target) as (temporary, raw):
            saved = [journal.Version(known.size, known.crc32, known.time, begins=known.begins)] if known else []
            if journal.check(temporary, saved):
                raise OSError(
                    errno.EIO, f"the copy of {source} for {target} differs from what was saved; both are kept"
                )
            system.copystat(source, temporary)  # A move changes neither permissions nor times.
        moved = self._put(temporary, target, raw.size, raw.crc, called, ahead=ahead, again=again)
        with contextlib.suppress(FileNotFoundError):  # Another rank that moved it too was faster, after a deadline.
            system.patiently(lambda: system.remove(source), self.settings.patience, self._count_retry)
        return moved

    @contextlib.contextmanager
    def copied(self, source: str, target: str) -> Iterator[tuple[str, Raw]]:
        """A synced copy of `source` under a temporary name beside `target`."""
        try:
            opened = system.open_file(source, "rb", buffering=0)
        except FileNotFoundError:
            raise  # Another rank may have moved it: the caller looks.
        except OSError as error:
            self.report.failed(target, f"{target} was not saved: {error!r}")
            raise
        with opened as reader:
            temporary = self.temporary(target)
            try:
                with Raw(temporary, like=target) as raw:
                    while True:
                        block = reader.read(1 << 22)
                        if not block:
                            break
                        raw.write(block)
                    self.finish(raw, raw)
                yield temporary, raw
            except BaseException as error:
                self.abandon(temporary, target, error)
                raise

    def is_taken(self, source: str, target: str) -> bool:
        """Whether there was a `target` before this one, which is not to be replaced; another rank's is the same one."""
        if source in self.pretended or self.leaves_to_rank_zero(target):
            return target in self.pretended
        newest = journal.read(target)[-1:]
        by_another = target not in self.mine and bool(newest) and newest[0].run == self.settings.run
        return system.exists(target) and not by_another

    def _moved_by_another(self, source: str, target: str, rename: Callable[[], Any]) -> bool:
        """The source is gone. Where both ranks saved one temporary name, the other has moved it: to the same place."""
        known = self.mine.pop(source, None)
        if known is not None:
            # The other renames first and releases the lock after: its journal entry is there when we hold the lock.
            with system.locked(target):
                versions = journal.read(target)
                if any(v.run == self.settings.run and v.time >= known.time for v in versions):
                    self._next_round(target, time.time())
                    self.report.add(collisions=1)
                    return False
        with self.reporting(target):
            rename()  # Fails as it would have without us.
        return True


def _takes_files(directory: str) -> bool:
    try:
        system.private(directory)
    except OSError:
        return False
    return True


def _same_file_system(source: str, target: str) -> bool:
    try:
        return os.stat(source).st_dev == os.stat(os.path.dirname(target)).st_dev
    except OSError:
        return True  # The rename itself will say what is wrong.
