"""Everything that is measured: lastgood, its peers, each in its documented best configuration, and the bare disk.

A contender's ``save`` returns when training may go on, ``before_step`` when the weights may change, and ``finish``
when it promises nothing more: for those that sync, when the checkpoint would survive a power loss.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import torch

import lastgood
from benchmarks.states import Job
from lastgood.aside import aside

_BLOCK = 16 << 20
_KEPT = 2
# Checkpoints.


class Contender:
    """One way to save a job. `durable`: whether finish() means that the bytes are on the disk."""

    name: ClassVar[str]
    promises: ClassVar[str]
    durable: ClassVar[bool] = True

    def __init__(self, job: Job, directory: Path) -> None:
        self.job, self.directory = job, directory
        directory.mkdir(parents=True)

    def save(self, step: int) -> None:
        raise NotImplementedError

    def before_step(self) -> None:
        """Return when the optimizer may change the weights."""

    def finish(self) -> None:
        """Return when the save is complete."""

    def settle(self) -> None:
        """Return when nothing goes on in the background any more."""

    def restore(self) -> None:
        raise NotImplementedError

    def forget(self, step: int) -> None:
        """Delete the save of `step`, for contenders that keep everything."""
        path = self.path(step)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step}"

    def close(self) -> None:
        """Give everything back."""


class Lastgood(Contender):
    name = "lastgood"
    promises = "fsync, checksums, atomic, verified before the older is deleted"

    def __init__(self, job: Job, directory: Path) -> None:
        super().__init__(job, directory)
        self._checkpointer = lastgood.Checkpointer(directory, keep=lastgood.Keep(last=_KEPT), **job.objects())
        self._handle: Any = None

    def save(self, step: int) -> None:
        self._handle = self._checkpointer.save(step)

    def before_step(self) -> None:
        self._checkpointer.wait_snapshot()

    def finish(self) -> None:
        self._handle.result()

    def settle(self) -> None:
        self._checkpointer._finish_save()

    def restore(self) -> None:
        self._checkpointer.restore()

    def forget(self, step: int) -> None:
        """Retention does it."""

    def close(self) -> None:
        self._checkpointer.close()


class Raw(Contender):
    name = "disk alone"
    promises = "fsync; O_DIRECT, one file of the same size, nothing else"

    def __init__(self, job: Job, directory: Path) -> None:
        super().__init__(job, directory)
        self._size = -(-job.bytes() // 4096) * 4096
        self._files: list[Path] = []
        self._block = memoryview(mmap.mmap(-1, _BLOCK))
        torch.frombuffer(self._block, dtype=torch.uint8).random_()

    def save(self, step: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            file = os.open(self.path(step), flags | getattr(os, "O_DIRECT", 0))
        except OSError:
            file = os.open(self.path(step), flags)
        try:
            for at in range(0, self._size, _BLOCK):
                os.write(file, self._block[: min(_BLOCK, self._size - at)])
            os.fsync(file)
        finally:
            os.close(file)
        self._files.append(self.path(step))

    def forget(self, step: int) -> None:
        """Keep as many as lastgood does: to write the same blocks again and again would be faster than any disk."""
        while len(self._files) > _KEPT:
            self._files.pop(0).unlink()

    def restore(self) -> None:
        self.read(self._files[-1], self._block)

    @staticmethod
    def read(path: Path, block: memoryview | None = None) -> None:
        """Read a file from its beginning to its end, past the cache."""
        block = memoryview(mmap.mmap(-1, _BLOCK)) if block is None else block
        file = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        try:
            while os.readv(file, [block]):
                continue
        finally:
            os.close(file)


class RawBehind(Raw):
    """The same while training goes on: what the machine takes for its disk."""

    _writing: Future[None] | None = None

    def save(self, step: int) -> None:
        self._writing = aside(functools.partial(super().save, step), "raw")

    def finish(self) -> None:
        if self._writing is not None:
            self._writing.result()


def _sync(path: Path) -> None:
    for target in (path, path.parent):
        descriptor = os.open(target, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class TorchSave(Contender):
    name = "torch.save + fsync"
    promises = "fsync; zip CRC32 that torch.load does not check"

    def save(self, step: int) -> None:
        torch.save(self.job.state_dict(), self.path(step))
        _sync(self.path(step))
        self._last = self.path(step)

    def restore(self) -> None:
        # With mmap the bytes would only be read when they are copied: the same work in another order.
        state = torch.load(self._last, weights_only=True, map_location="cpu")
        self.job.model.load_state_dict(state["model"])
        self.job.optimizer.load_state_dict(state["optimizer"])


class Safetensors(Contender):
    name = "safetensors + fsync"
    promises = "fsync; no checksums; tensors only"

    def save(self, step: int) -> None:
        from safetensors.torch import save_file

        tensors = {f"{index}": tensor for index, tensor in enumerate(self.job.tensors())}
        save_file(tensors, self.path(step))
        _sync(self.path(step))
        self._last = self.path(step)

    def restore(self) -> None:
        from safetensors.torch import load_file

        loaded = load_file(self._last)
        with torch.no_grad():
            for index, tensor in enumerate(self.job.tensors()):
                tensor.copy_(loaded[f"{index}"])


class Dcp(Contender):
    name = "torch.distributed.checkpoint.save"
    promises = "fsync; no checksums"

    def _writer(self, step: int) -> Any:
        import torch.distributed.checkpoint as dcp

        return dcp.FileSystemWriter(self.path(step), single_file_per_rank=True, thread_count=2, sync_files=True)

    def save(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(self.job.state_dict(), storage_writer=self._writer(step), no_dist=True)
        self._last = self.path(step)

    def restore(self) -> None:
        import torch.distributed.checkpoint as dcp

        state = self.job.state_dict()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, checkpoint_id=self._last, no_dist=True)
        self.job.optimizer.load_state_dict(state["optimizer"])


class DcpAsync(Dcp):
    """Stages in the calling thread, writes in a thread."""

    name = "torch.distributed.checkpoint.async_save"
    promises = "fsync; no checksums"
    process: ClassVar[bool] = False
    in_background: ClassVar[bool] = False

    def __init__(self, job: Job, directory: Path) -> None:
        super().__init__(job, directory)
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        # Pinned memory needs a GPU; memory that is shared is what a process needs.
        pinned = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(pinned, self.process, self.in_background, pinned))
        self._staged: Any = None
        self._future: Any = None

    def save(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        kind = AsyncCheckpointerType.PROCESS if self.process else AsyncCheckpointerType.THREAD
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            begun: Any = dcp.async_save(
                self.job.state_dict(),
                storage_writer=self._writer(step),
                async_stager=self._stager,
                async_checkpointer_type=kind,
                no_dist=True,
            )
        self._staged = getattr(begun, "staging_completion", None)
        self._future = getattr(begun, "upload_completion", begun)
        self._last = self.path(step)

    def before_step(self) -> None:
        if self._staged is not None:
            self._staged.result()

    def finish(self) -> None:
        self._future.result()

    def close(self) -> None:
        self._stager.close()


class DcpStaged(DcpAsync):
    """Stages in the background, too."""

    name = "torch.distributed.checkpoint.async_save, async staging"
    in_background = True


class DcpProcess(DcpAsync):
    """Stages into shared memory, from which another process writes."""

    name = "torch.distributed.checkpoint.async_save, process"
    process = True

    def __init__(self, job: Job, directory: Path) -> None:
        # Else it holds a descriptor for each tensor, and with 20,000 of them nothing can be opened any more.
        torch.multiprocessing.set_sharing_strategy("file_system")
        super().__init__(job, directory)
        if not torch.distributed.is_initialized():
            # The process makes itself a group like this one's, and finds it by these names.
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            torch.distributed.init_process_group("gloo", rank=0, world_size=1)

    def close(self) -> None:
        super().close()
        torch.multiprocessing.set_sharing_strategy("file_descriptor")
        torch.distributed.destroy_process_group()
        for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)


class TorchCheckpointing(Contender):
    name = "torch_checkpointing"
    promises = "no fsync, no checksums; renamed into place"
    durable = False

    def __init__(self, job: Job, directory: Path) -> None:
        super().__init__(job, directory)
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        # Its direct writes are not aligned: version 0.1.1 fails with EINVAL on ext4 and xfs.
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager.Config(storage_config=storage).build()
        self._manager.prewarm_staging(job.state_dict())

    def save(self, step: int) -> None:
        self._future = self._manager.save(str(self.path(step)), self.job.state_dict())
        self._last = self.path(step)

    def before_step(self) -> None:
        with self._manager.lock():
            return

    def finish(self) -> None:
        self._future.result()

    def restore(self) -> None:
        state = self.job.state_dict()
        loaded: Any = self._manager.load(str(self._last), into=state)
        self.job.model.load_state_dict(loaded["model"])
        self.job.optimizer.load_state_dict(loaded["optimizer"])

    def close(self) -> None:
        self._manager.close()


class Lightning(Contender):
    name = "lightning AsyncCheckpointIO"
    promises = "no fsync, no checksums"
    durable = False

    def save(self, step: int) -> None:
        from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

        self._io = AsyncCheckpointIO(TorchCheckpointIO())
        if hasattr(self._io, "setup"):
            self._io.setup()
        self._io.save_checkpoint(self.job.state_dict(), str(self.path(step)))
        self._last = self.path(step)

    def finish(self) -> None:
        self._io.teardown()

    restore = TorchSave.restore


class Torchsnapshot(Contender):
    name = "torchsnapshot async_take"
    promises = "no fsync, no checksums"
    durable = False

    def save(self, step: int) -> None:
        from torchsnapshot import Snapshot

        state: Any = {"model": self.job.model, "optimizer": self.job.optimizer}
        self._pending = Snapshot.async_take(str(self.path(step)), state)

    def finish(self) -> None:
        self._snapshot = self._pending.wait()

    def restore(self) -> None:
        state: Any = {"model": self.job.model, "optimizer": self.job.optimizer}
        self._snapshot.restore(state)


class Moonclip(Contender):
    name = "moonclip"
    promises = "fsync, checksums, compressed; unchanged tensors are not written"

    def __init__(self, job: Job, directory: Path) -> None:
        super().__init__(job, directory)
        from moonclip.pytorch import CheckpointManager

        self._manager = CheckpointManager(
            str(directory), compression_level=1, max_full_snapshots=2, world_size=1, rank=0
        )

    def save(self, step: int) -> None:
        self._last = self._manager.save(step=step, model=self.job.model, optimizer=self.job.optimizer)

    def finish(self) -> None:
        self._manager._mgr.flush()

    def restore(self) -> None:
        self._manager.resume(model=self.job.model, optimizer=self.job.optimizer)

    def forget(self, step: int) -> None:
        """Its own retention does it."""


ALL: tuple[type[Contender], ...] = (
    Lastgood,
    Raw,
    TorchSave,
    Safetensors,
    Dcp,
    DcpAsync,
    DcpStaged,
    DcpProcess,
    TorchCheckpointing,
    Lightning,
    Torchsnapshot,
    Moonclip,
)


def drop_cache(directory: Path) -> None:
    """Make the system forget what it has cached of all files under `directory`, so that the disk is read."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def trim() -> None:
    """Give freed memory back to the system, so that one contender does not profit from another's."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        return
