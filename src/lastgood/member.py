"""A rank other than 0 in the two-phase commit: it writes its part, reports, and hears what became of the save."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from lastgood import disk
from lastgood.coordinate import Channel
from lastgood.errors import SaveError
from lastgood.part import (
    Committed,
    Request,
    SkippedError,
    await_directory,
    describe,
    described,
    differing_names,
    message_prefix,
    tree_digest,
    write_file,
)
from lastgood.plan import structure
from lastgood.values import Json
from lastgood.world import World

_log = logging.getLogger("lastgood")
_REMEMBERED = 16
"""Saves of which a rank that was not there keeps the messages: it may only be late."""


class Member:
    """A rank other than 0 in a save."""

    def __init__(self, run: Path, world: World, channel: Channel) -> None:
        self._run, self._world, self._channel = run, world, channel
        self._over: list[str] = []
        channel.on("save/", self._tidy)
        self.directory = ""
        """Name of the directory of the last attempt, and the attempt: to look for when rank 0 falls silent."""
        self.attempt = ""

    def _tidy(self, key: str, _: Json) -> None:
        """Drop the messages of saves to which this rank did not come: it may never call save at all."""
        if key.endswith("/outcome"):
            self._over.append(key.removesuffix("outcome"))
            for prefix in self._over[:-_REMEMBERED]:
                self._channel.forget(prefix)
            del self._over[:-_REMEMBERED]

    def save(self, request: Request, generation: int) -> Committed:
        """Take part in a save. Runs in the background.

        Raises:
            SaveError: the save was given up.
            SkippedError: it was left out.
            PeerError: rank 0 fell silent; whether there is a checkpoint is for the disk to say.
        """
        prefix = message_prefix(generation, request.step, request.tries)
        self.directory = self.attempt = ""
        # First of all what rank 0 needs in order to complete the save should this rank die in it.
        compare = {piece.name: described(piece, request.buffer) for piece in request.layout.compare}
        objects = {name: tree_digest(tree) for name, tree in request.objects.items()}
        self._channel.post(prefix + "holds", {"random": request.random, "compare": compare, "objects": objects})
        # A save that fails before it is called is given up without a call.
        keys = [prefix + "call", prefix + "outcome"]
        key, call = self._channel.receive_any(keys, time.monotonic() + request.deadline)
        if key != keys[0]:
            raise SaveError(call["failed"])
        if "skipped" in call:
            raise SkippedError(call["skipped"])
        self.directory, self.attempt = call["name"], call["attempt"]
        over = self._channel.peek(prefix + "outcome", 0)
        if over is None:
            report: dict[str, Json] = {"random": request.random}
            try:
                report.update(self._write(request, call, prefix, compare, objects))
            except Exception as error:
                report["error"] = f"{type(error).__name__}: {error}"
            self._channel.post(prefix + "report", report)
        elif "failed" in over:
            # Rank 0 clears up after it has heard from everybody who came.
            self._channel.post(prefix + "report", {"error": "the save was given up before this rank began"})
        # Rank 0 has its own deadline and then still has to write: it is given as much again, twice over.
        outcome = self._channel.receive(prefix + "outcome", time.monotonic() + 3 * request.deadline)
        self._channel.forget(prefix)
        if "failed" in outcome:
            raise SaveError(outcome["failed"])
        if self._world.rank in outcome["missing"]:
            self._take_back(self._run / call["name"])
        return Committed(self._run / call["name"], outcome["bytes"], tuple(outcome["missing"]))

    def _take_back(self, directory: Path) -> None:
        """Rank 0 committed without this rank: what it wrote too late belongs to no checkpoint."""
        _log.warning("rank %d came too late to %s: rank 0 completed it", self._world.rank, directory.name)
        for name in (f"{self._world.rank:05d}.safetensors", f"{self._world.rank:05d}-own.safetensors"):
            try:
                disk.remove(directory / name, missing_ok=True)
            except OSError as error:
                _log.warning("the superfluous %s stays until the checkpoint is deleted: %s", directory / name, error)

    def _write(self, request: Request, call: Json, prefix: str, compare: Json, objects: Json) -> Json:
        layout, rank = request.layout, self._world.rank
        if structure(request.tensors) != call["structure"]:
            return {"structure": describe(request.tensors)}
        directory = self._run / call["name"]

        def given_up() -> bool:
            return self._channel.peek(prefix + "outcome", 0) is not None

        files = []
        answer: dict[str, Json] = {}
        # Where rank 0 takes other tensors for frozen, the shares differ: it writes this one from its own copy.
        alike = list(layout.writers) == call["writers"] and sorted(layout.still) == call["frozen"]
        if alike and layout.share:
            try:
                await_directory(directory, request.deadline / 2, given_up)
                answer["share"] = write_file(directory / f"{rank:05d}.safetensors", layout.share, request.buffer)
            except OSError as error:
                answer["refused"] = str(error)
        different = differing_names(compare, call["compare"])
        differing = [piece for piece in layout.compare if piece.name in different]
        own = [*layout.own, *differing]
        if own:
            await_directory(directory, request.deadline / 2, given_up)
            files.append(write_file(directory / f"{rank:05d}-own.safetensors", own, request.buffer))
        request.buffer.confirm()  # Raises when the copy turns out not to be of one moment.
        answer["own"] = files
        answer["local"] = {piece.name: piece.label for piece in own if piece.label != piece.name}
        answer["objects"] = {name: request.objects[name] for name in differing_names(objects, call["objects"])}
        return answer
