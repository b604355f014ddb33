"""The start of a job on a run: rank 0 takes it, all ranks find each other and see that they see the same disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import secrets
import socket
import time
from pathlib import Path

from lastgood import catalog, disk, generation
from lastgood.coordinate import Channel
from lastgood.errors import LastGoodError, PeerError, RunHeldError
from lastgood.generation import BEAT_SECONDS, Holder
from lastgood.program import Events
from lastgood.values import Json
from lastgood.world import World, default_store, job_id

_log = logging.getLogger("lastgood")
_joined: dict[tuple[Path, int], int] = {}
"""By run and rank, the last generation that this process joined: a later Checkpointer waits for a later one."""
_tries: dict[tuple[Path, int], int] = {}
"""By run and rank, how often this process tried to take part in a job on it. The ranks of a program try alike."""
_PROBE = ".lastgood-write-test-"
"""Begins the name of the empty file by which a start sees that it may write. One that was killed leaves it behind."""
_DISK_SECONDS = 10.0
"""A network file system may show a new file so much later."""


class Session:
    """This process's part in one life of a job on a run."""

    def __init__(
        self, run: Path, world: World, deadline: float, mirror: Path | None, group: int | None, stale: float
    ) -> None:
        self._run, self._world, self._mirror, self._group = run, world, mirror, group
        self.channel = Channel(world)
        self.holder: Holder | None = None
        self.generation = 0
        _tries[run, world.rank] = _tries.get((run, world.rank), 0) + 1
        try:
            if world.rank == 0:
                self._open(deadline, stale)
            else:
                self._join(deadline, stale)
        except BaseException:
            self.close()
            raise
        _joined[run, world.rank] = self.generation

    # -- rank 0 ---------------------------------------------------------------------------------------------------

    def _open(self, deadline: float, stale: float) -> None:
        try:
            invitation = self._take(stale)
        except Exception as error:
            if self._world.size > 1:
                _refuse(self._run, error)
            raise
        # Not before: to watch the heart of a job on another machine takes its own time.
        end = time.monotonic() + deadline
        assert self.holder is not None
        self.generation = self.holder.number
        self.channel.every(BEAT_SECONDS, self.holder.beat)
        self.channel.start()
        if self._world.size == 1:
            return
        _publish(self._run, {**invitation, "generation": self.generation})
        others = range(1, self._world.size)
        joined = self.channel.collect("joined", others, end)
        problem = None
        blind = [rank for rank, answer in joined.items() if not answer["sees"]]
        absent = [rank for rank in others if rank not in joined]
        if blind:
            problem = (
                f"rank {blind[0]} on {joined[blind[0]]['host']} does not see {self._run} as rank 0 sees it: the ranks "
                "do not share this disk. Use a directory on storage that all machines mount."
            )
        elif absent:
            why = self.channel.why_gone(absent[0]) or "it did not come in time"
            problem = (
                f"rank {absent[0]} of {self._world.size} did not make its Checkpointer on {self._run}: {why}. Every "
                "rank must make one, at the same point of the program."
            )
        self.channel.post("start", {"problem": problem, "generation": self.generation})
        self.channel.admit_no_more()
        if problem:
            raise PeerError(problem)

    def _take(self, stale: float) -> dict[str, Json]:
        """Take the run. Returns how the other ranks reach this one."""
        make_run(self._run, self._group)
        invitation: dict[str, Json] = {}
        if self._world.size > 1:
            addresses = self.channel.listen()
            invitation = {"addresses": addresses, "port": self.channel.port, "token": self.channel.token}
        self.holder = Holder.take(
            self._run, self._world, invitation, at_least=self._lowest(), group=self._group, stale=stale
        )
        return invitation

    def _lowest(self) -> int:
        """The lowest generation after all that is here: also in a run that was copied without its `generations`, or a
        new one beside an old mirror.
        """
        here = catalog.entries(self._run)
        lowest = max((entry.generation for entry in here), default=0) + 1
        if self._mirror is None:
            return lowest
        try:
            disk.make_dirs(self._mirror)
            there = catalog.entries(self._mirror)
            notes = generation.highest_note(self._mirror)
        except OSError as error:
            if any(entry.is_committed() for entry in here):
                _log.warning("the mirror %s cannot be reached: %s", self._mirror, error)
                return lowest
            raise LastGoodError(
                f"{self._run} holds no checkpoint, and the mirror {self._mirror} cannot be reached ({error}). It may "
                "hold the training's past, so nothing is started anew: bring the mirror back, or leave out mirror= for "
                "a new run."
            ) from error
        return max([lowest, notes + 1, *(entry.generation + 1 for entry in there)])

    def advance(self) -> None:
        """Begin the next generation: after a roll-back."""
        assert self.holder is not None
        self.holder.advance(self._world)
        self.generation = _joined[self._run, self._world.rank] = self.holder.number

    def clear_left_overs(self, events: Events) -> None:
        """Delete what saves of earlier lives left behind: directories without a manifest, which nobody will finish."""
        assert self.holder is not None
        for name in disk.names(self._run):
            if name.startswith(_PROBE):
                with contextlib.suppress(OSError):
                    disk.remove(self._run / name, missing_ok=True)
        for entry in catalog.entries(self._run):
            if entry.generation < self.generation and not entry.is_committed():
                self.holder.check()
                try:
                    catalog.delete(entry)
                except OSError as error:
                    _log.warning("the left-over %s could not be deleted: %s", entry.path, error)
                    continue
                events.report("delete", entry, "left over from a save that did not finish")

    # -- another rank ---------------------------------------------------------------------------------------------

    def _join(self, deadline: float, stale: float) -> None:
        check_place(self._run)
        after = _joined.get((self._run, self._world.rank), 0)

        def find() -> list[Json]:
            seen = [published := _published(self._run)]
            if published and "refused" in published:
                self._tell_refusal(published)
            taken = generation.generations(self._run)
            if taken:
                record = generation.record(self._run, taken[-1])
                seen.append(None if record is None else {**record, "generation": taken[-1]})
            return [who for who in seen if who and who.get("port") and who["generation"] > after]

        end = time.monotonic() + deadline
        try:
            invitation = self.channel.join(find, end)
        except PeerError as error:
            who = generation.holder(self._run)
            if who is not None:
                raise PeerError(
                    f"{error} The run is held by {generation.holder_name(who)}: where that is not rank 0 of this job, "
                    "wait for the end of the other one, or use another directory."
                ) from error
            if not generation.is_open(self._run):
                raise
            # Its job ended without a word: on another machine than that one's, rank 0 watches for so long.
            invitation = self.channel.join(find, end + stale)
        self.channel.start()
        self.generation = int(invitation["generation"])
        self.channel.post("joined", {"sees": self._sees(invitation), "host": socket.gethostname()})
        start = self.channel.receive("start", time.monotonic() + deadline + _DISK_SECONDS)
        if start["problem"]:
            raise PeerError(start["problem"])
        self.generation = start["generation"]

    def _tell_refusal(self, published: Json) -> None:
        """Raise what rank 0 was refused with, unless it was at an earlier try, or in an earlier life of the job."""
        if published["job"] == job_id() and published["tries"] >= _tries[self._run, self._world.rank]:
            kind = RunHeldError if published["held"] else LastGoodError
            raise kind(f"rank 0 could not take the run: {published['refused']}")

    def _sees(self, invitation: Json) -> bool:
        """Whether the run directory here is the one that rank 0 has taken."""
        until = time.monotonic() + _DISK_SECONDS
        while time.monotonic() < until:
            record = generation.record(self._run, self.generation)
            if record is not None:
                return bool(record.get("token") == invitation["token"])
            time.sleep(0.05)
        return False

    def leave(self) -> None:
        """Tell rank 0 that this rank has come to its end as it should: it is not one that died."""
        if self._world.rank != 0:
            self.channel.post("left", True)

    def close(self) -> None:
        """Close the connections and give the run back."""
        self.channel.close()
        if self.holder is not None:
            try:
                self.holder.release()
            except LastGoodError as error:
                _log.warning("%s", error)


def check_place(run: Path) -> None:
    """Raise LastGoodError where a file has the name of the run."""
    if disk.exists(run) and not disk.is_dir(run):
        raise LastGoodError(f"{run} is a file: a run is a directory. Move the file away or choose another name.")


def make_run(run: Path, group: int | None) -> None:
    """Make the run directory where it does not exist. Raises LastGoodError where that cannot be."""
    check_place(run)
    try:
        disk.make_dirs(run)
        disk.sync_names(run)
        if group is not None:
            disk.give_to_group(run, group)
        probe = run / f"{_PROBE}{secrets.token_hex(8)}"
        with disk.NewFile(probe):
            pass
        disk.remove(probe, missing_ok=True)
    except OSError as error:
        raise LastGoodError(
            f"{run} cannot be written: {error}. Choose a directory that this user may write to, on a disk with space."
        ) from error


def _store_key(run: Path) -> str:
    return "lastgood/" + hashlib.sha256(str(run).encode()).hexdigest()[:16]


def _publish(run: Path, invitation: Json) -> None:
    """Tell the address through the training's store too: ranks that do not see the disk can then say so at once."""
    store = default_store()
    if store is not None:
        store.set(_store_key(run), json.dumps(invitation))


def _refuse(run: Path, error: Exception) -> None:
    """Tell through the training's store why there will be no invitation: the others need not wait for one."""
    held = isinstance(error, RunHeldError)
    with contextlib.suppress(Exception):  # Whatever befalls the store: what the run was refused with is to be seen.
        _publish(run, {"refused": str(error), "held": held, "tries": _tries[run, 0], "job": job_id()})


def _published(run: Path) -> Json | None:
    store = default_store()
    if store is None or not store.check([_store_key(run)]):
        return None
    return json.loads(store.get(_store_key(run)))
