"""The functions of other modules that are replaced, and what each does instead."""

from __future__ import annotations

import builtins
import glob
import inspect
import io
import json
import os
import pathlib
import pickle
import shutil
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from . import files, journal, system
from .fallback import Fallback
from .report import Report
from .saving import Saver
from .settings import PRIVATE, Settings, from_environment

_settings: Settings = from_environment()
_report = Report(_settings.state)
saver = Saver(_settings, _report)
_fallback = Fallback(saver.units, _report, saver.refused, wanted=_settings.fallback)
_done: set[str] = set()
_replaced: list[tuple[Any, str, Any]] = []
"""What was replaced where: the owner, the name, and what was there."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_report.reset)
    os.register_at_fork(after_in_child=saver.units.after_fork)
    os.register_at_fork(after_in_child=saver.mirror.reset)


def patch(module: ModuleType) -> None:
    """Patch a module that was imported just now; the file functions with the first of them."""
    name = module.__name__
    if name in _done or "off" in _done:
        return
    _done.add(name)
    if name == "torch" and not _known_torch(module):
        _switch_off()
        return
    if "os" not in _done:
        _done.add("os")
        _patch_system()
        if os.path.basename(sys.argv[0] if sys.argv else "").startswith(("s2_train", "s1_train")):
            _add_complete("G_*.pth,D_*.pth")
    if name == "torch":
        _patch_torch(module)
    elif name in ("safetensors", "safetensors.torch"):
        _patch_safetensors(module)
    elif name == "transformers.trainer":
        _patch_trainer(module)
    elif name.endswith("trainer.trainer"):
        _patch_lightning(module)


def _known_torch(torch: Any) -> bool:
    version = str(getattr(torch, "__version__", "?"))
    try:
        parameters = (
            list(inspect.signature(torch.save).parameters)[:2],
            list(inspect.signature(torch.load).parameters)[:1],
        )
        for name in ("save", "load"):
            vars(torch.serialization)[name]  # There they are replaced, too.
    except (AttributeError, KeyError, TypeError, ValueError):
        parameters = [], []
    if version.split(".")[0] == "2" and parameters == (["obj", "f"], ["f"]):
        return True
    what = "needs torch 2.0 or newer" if version[:2] in ("0.", "1.") else "does not know this torch"
    _report.say_once("torch", f"{what} (found {version}): saves are NOT made safe in this program")
    return False


def _set(owner: Any, name: str, new: Any) -> None:
    _replaced.append((owner, name, vars(owner)[name]))
    setattr(owner, name, new)


def _switch_off() -> None:
    """Undo what was replaced for safetensors or another library that came first, and replace nothing more."""
    _done.add("off")
    while _replaced:
        owner, name, original = _replaced.pop()
        setattr(owner, name, original)


def _add_complete(pattern: str) -> None:
    if pattern not in saver.units.patterns:
        saver.units.patterns.append(pattern)


# torch and safetensors.


def _patch_torch(torch: Any) -> None:
    original_save, original_load = torch.save, torch.load

    def save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> Any:
        path = files.target_of(f)
        if path is None:
            name = files.absolute(f)
            with files.writing_to(f) if name is None else saver.reporting(name):
                return original_save(obj, f, *args, **kwargs)
        if saver.leaves_to_rank_zero(path):
            sink = files.Counting()
            original_save(obj, sink, *args, **kwargs)
            saver.pretend(path, sink.size)
            return None
        with saver.writing(path) as file:
            return original_save(obj, file, *args, **kwargs)

    def load(f: Any, *args: Any, **kwargs: Any) -> Any:
        name = f if isinstance(f, (str, os.PathLike)) else getattr(f, "name", None)
        instead = _intact(name)
        return original_load(f if instead is None else instead, *args, **kwargs)

    for patched, original in ((save, original_save), (load, original_load)):
        _dress(patched, original)
    for owner in (torch, torch.serialization):
        _set(owner, "save", save)
        _set(owner, "load", load)


def _patch_safetensors(module: Any) -> None:
    if module.__name__ == "safetensors":
        original_open = module.safe_open

        def safe_open(filename: Any, *args: Any, **kwargs: Any) -> Any:
            return original_open(_intact(filename) or filename, *args, **kwargs)

        _set(module, "safe_open", safe_open)
        return
    original_save, original_load = module.save_file, module.load_file

    def save_file(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> Any:
        path = files.target_of(filename)
        if path is None:
            with saver.reporting(str(filename)):
                return original_save(tensors, filename, *args, **kwargs)
        if saver.leaves_to_rank_zero(path):
            saver.pretend(path, sum(t.numel() * t.element_size() for t in tensors.values()))
            return None
        called = time.time()
        temporary = saver.temporary(path)
        try:
            result = original_save(tensors, temporary, *args, **kwargs)
            system.copy_owner(path, temporary)
            system.sync_path(temporary)
            size, crc = journal.checksum(temporary)
        except BaseException as error:
            saver.abandon(temporary, path, error)
            raise
        saver.put(temporary, path, size, crc, called)
        return result

    def load_file(filename: Any, *args: Any, **kwargs: Any) -> Any:
        return original_load(_intact(filename) or filename, *args, **kwargs)

    for patched, original in ((save_file, original_save), (load_file, original_load)):
        _dress(patched, original)
    _set(module, "save_file", save_file)
    _set(module, "load_file", load_file)


def _dress(patched: Any, original: Any) -> None:
    # Programs look at torch.save's signature and pickle functions by name.
    patched.__name__ = original.__name__
    patched.__qualname__ = original.__qualname__
    patched.__module__ = original.__module__
    patched.__doc__ = original.__doc__
    patched.__wrapped__ = original


def _intact(name: Any) -> str | None:
    """Check a file that is about to be loaded. Returns another path where that is to be loaded instead.

    Raises:
        DamagedFileError: it is not what was saved, and names the newest file that is.
    """
    if "off" in _done or not isinstance(name, (str, os.PathLike)) or not isinstance(os.fspath(name), str):
        return None
    path = os.path.abspath(os.fspath(name))
    target = os.path.realpath(path)
    unit = saver.units.unit_of(target)
    for directory in {os.path.realpath(os.path.dirname(path)), *([unit.directory] if unit is not None else [])}:
        saver.units.settle(directory)
    if target in saver.pretended:
        _await(target)
    return _fallback.instead_of(path, target)


def _await(path: str) -> None:
    """Wait for the file that rank 0 saves in our place, for half a minute at most."""
    deadline = time.monotonic() + 30
    while not system.exists(path) and time.monotonic() < deadline:
        time.sleep(0.01)


# Frameworks.


def _patch_trainer(module: Any) -> None:
    """Hugging Face: a checkpoint is a directory, finished when the method that writes it has, and before it deletes."""
    _add_complete("checkpoint-*")
    original = module.Trainer._save_checkpoint
    postponed: list[Callable[[], Any]] = []
    saving: list[bool] = []

    def _save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        saving.append(True)
        try:
            with saver.units.of_framework():
                result = original(self, *args, **kwargs)
                # Each rank writes its own part, and none knows when the others have: without this, a rank that is done
                # early would call the directory finished of which another, killed in between, has written nothing.
                _wait_for_all_ranks()
            # No rank's mark may be left when the earlier checkpoint goes: the new one is all there is then.
            _wait_for_all_ranks()
        finally:
            saving.pop()
            deletions = postponed[:]
            postponed.clear()
        for delete in deletions:
            delete()
        return result

    _dress(_save_checkpoint, original)
    _set(module.Trainer, "_save_checkpoint", _save_checkpoint)
    # A method before version 5, a function since.
    for holder, name in ((module.Trainer, "_rotate_checkpoints"), (module, "rotate_checkpoints")):
        if hasattr(holder, name):
            _set(holder, name, _postponed_while(saving, postponed, getattr(holder, name)))


def _postponed_while(saving: list[bool], postponed: list[Callable[[], Any]], original: Any) -> Any:
    def rotate(*args: Any, **kwargs: Any) -> None:
        if saving:
            postponed.append(lambda: original(*args, **kwargs))
        else:
            original(*args, **kwargs)

    _dress(rotate, original)
    return rotate


def _wait_for_all_ranks() -> None:
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


def _patch_lightning(module: Any) -> None:
    """Lightning: sharded strategies write a directory whose name ends in .ckpt."""
    _add_complete("*.ckpt")
    original = module.Trainer.save_checkpoint

    def save_checkpoint(self: Any, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        with saver.units.of_framework():
            return original(self, filepath, *args, **kwargs)

    _dress(save_checkpoint, original)
    _set(module.Trainer, "save_checkpoint", save_checkpoint)


# The file functions.


def _patch_system() -> None:
    files.use(saver, _intact)
    functions: dict[str, Any] = {
        "rename": _rename(system.rename),
        "replace": _rename(system.replace),
        "link": _link,
        "remove": _remove,
        "unlink": _remove,
        "mkdir": _mkdir,
        "rmdir": _rmdir,
        "listdir": _listdir,
        "scandir": _scandir,
    }
    if saver.settings.save_on == "rank0":
        functions["stat"] = files.stat
        _set(shutil, "copymode", _unless_pretended(system.copymode))
        _set(shutil, "copystat", _unless_pretended(system.copystat))
        # Written in C, past os.stat, in newer Pythons.
        exists, isfile = os.path.exists, os.path.isfile
        _set(os.path, "exists", lambda path: files.is_pretended(path) or exists(path))
        _set(os.path, "isfile", lambda path: files.is_pretended(path) or isfile(path))
    for name, function in functions.items():
        _set(os, name, function)
    _set(builtins, "open", files.open)
    _set(io, "open", files.open)
    _set(json, "dump", _dump(json.dump, "fp"))
    _set(pickle, "dump", _dump(pickle.dump, "file"))
    _set(shutil, "move", _move)
    _set(shutil, "copyfile", _copyfile)
    _set(shutil, "rmtree", _rmtree)
    _set(sys, "exit", _exit)
    _set(os, "_exit", _leave)
    # These took the functions of os when they were imported: pathlib until 3.10, and glob for pathlib since 3.13.
    accessor = getattr(pathlib, "_NormalAccessor", None)
    if accessor is not None:
        for name in set(functions) & set(vars(accessor)):
            _set(accessor, name, staticmethod(functions[name]))
        if vars(accessor)["open"] is system.open_file:
            _set(accessor, "open", staticmethod(files.open))
    globber = getattr(glob, "_StringGlobber", None)
    if globber is not None and "scandir" in vars(globber):
        _set(globber, "scandir", staticmethod(_scandir))
    if sys.version_info >= (3, 13):  # It lists through scandir, which shows our directory, and no more through listdir.
        _set(pathlib.Path, "iterdir", _iterdir(pathlib.Path.iterdir))


def _dump(original: Callable[..., None], keyword: str) -> Callable[..., None]:
    """A function that writes to a file, its second argument."""

    def dump(*args: Any, **kwargs: Any) -> None:
        with files.writing_to(args[1] if len(args) > 1 else kwargs.get(keyword)):
            original(*args, **kwargs)

    _dress(dump, original)
    return dump


def _rename(original: Callable[..., None]) -> Callable[..., None]:
    def rename(src: Any, dst: Any, **kwargs: Any) -> None:
        source, target = files.absolute(src), files.absolute(dst)
        if kwargs or source is None or target is None or not files.is_checkpoint_move(source, target):
            return original(src, dst, **kwargs)
        saver.move(source, target, lambda: original(src, dst), across=False)
        return None

    return rename


def _link(src: Any, dst: Any, **kwargs: Any) -> None:
    source, target = files.absolute(src), files.absolute(dst)
    if source is None or target is None or not {"src_dir_fd", "dst_dir_fd"}.isdisjoint(kwargs):
        return system.link(src, dst, **kwargs)
    if source in saver.pretended:
        saver.pretend(target, saver.pretended[source])
        return None
    saver.link(source, target, lambda: system.link(src, dst, **kwargs))
    return None


def _move(src: Any, dst: Any, copy_function: Any = shutil.copy2) -> Any:
    source, target = files.absolute(src), files.absolute(dst)
    if source is not None and target is not None and os.path.isdir(target):
        target = os.path.join(target, os.path.basename(source))
        if saver.is_taken(source, target):
            raise shutil.Error(f"Destination path '{target}' already exists")  # As the original says it.
    if source is None or target is None or not files.is_checkpoint_move(source, target):
        return system.move(src, dst, copy_function)
    saver.move(source, target, lambda: system.replace(source, target), across=True)
    return dst if not os.path.isdir(dst) else os.path.join(dst, os.path.basename(source))


def _copyfile(src: Any, dst: Any, *, follow_symlinks: bool = True) -> Any:
    source, target = files.absolute(src), files.target_of(dst)
    if target is not None and files.is_pretended(src):
        saver.pretend(target, saver.pretended[os.path.realpath(src)])
        return dst
    if source is None or target is None or not follow_symlinks or not system.isfile(source):
        return system.copyfile(src, dst, follow_symlinks=follow_symlinks)
    if not files.is_checkpoint(target) or os.path.realpath(source) == target:
        return system.copyfile(src, dst, follow_symlinks=follow_symlinks)
    if saver.leaves_to_rank_zero(target):
        saver.pretend(target, system.getsize(source))
        return dst
    called = time.time()
    with saver.copied(source, target) as (temporary, raw):
        size, crc = raw.size, raw.crc
    saver.put(temporary, target, size, crc, called)
    return dst


def _unless_pretended(original: Callable[..., None]) -> Callable[..., None]:
    """What shutil.copy does to the copy after :func:`_copyfile`: rank 0 does it to the one that is there."""

    def copy(src: Any, dst: Any, **kwargs: Any) -> None:
        if not files.is_pretended(dst):
            original(src, dst, **kwargs)

    _dress(copy, original)
    return copy


def _remove(path: Any, **kwargs: Any) -> None:
    name = None if kwargs else files.absolute(path)
    try:
        system.remove(path, **kwargs)
    except FileNotFoundError:
        if name is None or saver.pretended.pop(name, None) is None:
            raise
        return
    if name is not None and system.exists(os.path.join(os.path.dirname(name), PRIVATE)):
        # Whoever deletes a checkpoint wants its space: the earlier versions go with it.
        saver.mine.pop(name, None)
        for version in journal.read(name):
            if version.kept and system.exists(journal.history_path(name, version.kept)):
                system.remove(journal.history_path(name, version.kept))
        journal.forget(name)


def _mkdir(path: Any, mode: int = 0o777, **kwargs: Any) -> None:
    name = None if kwargs else files.absolute(path)
    if name is not None and saver.units.patterns and os.path.isdir(os.path.dirname(name)) and not system.exists(name):
        # Before the directory: an empty one without a mark would be taken for a checkpoint.
        try:
            saver.units.begin(os.path.join(name, ""))
        except OSError:
            pass  # It says itself what is wrong with the directory above.
    system.mkdir(path, mode, **kwargs)
    if name is not None:
        saver.has_made(name)


def _rmdir(path: Any, **kwargs: Any) -> None:
    name = None if kwargs else files.absolute(path)
    if name is not None:
        hidden = os.path.join(name, PRIVATE)
        try:
            if system.listdir(name) == [PRIVATE]:
                shutil.rmtree(hidden)  # The program sees an empty directory, so it is one.
        except OSError:
            return system.rmdir(path, **kwargs)
    return system.rmdir(path, **kwargs)


def _directory(path: Any) -> str | None:
    name = files.absolute("." if path is None else path)
    return None if name is None else os.path.realpath(name)


def _rmtree(path: Any, *args: Any, **kwargs: Any) -> Any:
    """A checkpoint that is a directory goes at once: what is left of one that is half deleted is not to be found."""
    name = None if kwargs.get("dir_fd") is not None else files.absolute(path)
    if name is not None and saver.units.is_directory(name) and os.path.isdir(name) and not os.path.islink(name):
        system.clear_leftovers(os.path.dirname(name))
        saver.units.is_deleting(name)
        try:
            hidden = system.temporary(name)
            system.rename(name, hidden)
        except OSError:
            return system.rmtree(path, *args, **kwargs)  # On Windows: a program has a file in it open.
        saver.units.deleted(name)
        path = hidden
    return system.rmtree(path, *args, **kwargs)


_dress(_rmtree, system.rmtree)
_rmtree.avoids_symlink_attacks = system.rmtree.avoids_symlink_attacks  # type: ignore[attr-defined, unused-ignore]


def _exit(status: Any = None) -> Any:
    if threading.current_thread() is threading.main_thread():
        saver.units.exit_status = status
    system.exit_program(status)


def _leave(status: int) -> Any:
    # Children of multiprocessing end here, and no function of atexit is called in them.
    if status == 0:
        saver.units.exit_status = None
        saver.units.at_exit()
    system.leave(status)


def _listdir(path: Any = None) -> Any:
    names = system.listdir(path)
    name = _directory(path)
    if name is None or PRIVATE not in names:
        return names
    hidden = saver.units.settle(name)
    return [entry for entry in system.listdir(path) if entry != PRIVATE and entry not in hidden]


def _iterdir(original: Callable[..., Any]) -> Callable[..., Any]:
    def iterdir(self: Any) -> Any:
        found = original(self)
        return (path for path in found if path.name != PRIVATE)

    return iterdir


def _scandir(path: Any = None) -> Any:
    name = _directory(path)
    hidden = saver.units.settle(name) if name is not None else set()
    entries = system.scandir(path)
    # rmtree goes through here: it must see our directory, or it could not delete the one above.
    return files.Entries(entries, hidden) if hidden else entries
