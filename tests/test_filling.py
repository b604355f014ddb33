"""Whoever waits for bytes of the buffer is woken when they are there, in whatever order threads copy and wait."""

from __future__ import annotations

import ctypes
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import pytest
import torch

from lastgood.errors import SaveError
from lastgood.filling import Filling, Late
from lastgood.watch import Samples, Watch


class Copying:
    """Parts of memory of random sizes, and a buffer that they are copied to."""

    def __init__(self, chance: random.Random, filling: Filling) -> None:
        self.sources = [
            torch.randint(256, (64 * chance.randint(1, 3000),)).to(torch.uint8) for _ in range(chance.randint(1, 30))
        ]
        sizes = [source.numel() for source in self.sources]
        self.ends = list(accumulate(sizes))
        self.size = self.ends[-1]
        self.buffer = torch.zeros(self.size, dtype=torch.uint8)
        addresses = [source.data_ptr() for source in self.sources]
        begins = [end - size for end, size in zip(self.ends, sizes, strict=True)]
        names = [str(number) for number in range(len(sizes))]
        watch = Watch(names, self.sources, Samples(addresses, sizes))
        filling.reset(self.buffer.data_ptr(), self.size)
        filling.put_off(Late(watch, list(zip(begins, addresses, sizes, strict=True))))

    def is_there(self, end: int) -> bool:
        return torch.equal(self.buffer[:end], torch.cat(self.sources)[:end])


def test_everybody_who_waits_is_woken_and_finds_what_he_waited_for() -> None:
    chance = random.Random(3)
    filling = Filling()
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(200):
                copying = Copying(chance, filling)
                ends = [sorted(chance.randint(0, copying.size) for _ in range(chance.randint(1, 8))) for _ in range(3)]

                def follow(ends: list[int], patient: bool, pause: float, copying: Copying = copying) -> list[bool]:
                    threading.Event().wait(pause)
                    found = []
                    for end in ends:
                        filling.await_bytes(end, patient=patient)
                        found.append(copying.is_there(end))
                    filling.confirm()
                    return [*found, copying.is_there(copying.size)]

                pauses = [chance.choice([0.0, 0.0, 0.0005, 0.002]) for _ in range(4)]
                waiting = [pool.submit(follow, each, bool(n % 2), pauses[n]) for n, each in enumerate(ends)]
                filling.begin()
                threading.Event().wait(pauses[3])
                filling.wait()
                for one in waiting:
                    assert all(one.result(30))
    finally:
        filling.close()


def test_whoever_waits_hears_of_a_tensor_that_was_changed() -> None:
    chance = random.Random(4)
    filling = Filling()
    try:
        with ThreadPoolExecutor(2) as pool:
            copying = Copying(chance, filling)
            waiting = [pool.submit(filling.await_bytes, copying.size, patient=patient) for patient in (False, True)]
            copying.sources[-1].add_(1)
            filling.begin()
            for one in waiting:
                with pytest.raises(SaveError, match="was changed while it was being copied"):
                    one.result(30)
            assert not filling.overlap
            with pytest.raises(SaveError):
                filling.confirm()
    finally:
        filling.close()


def test_what_is_there_can_be_written_while_the_rest_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(5)
    filling = Filling()
    real, go = ctypes.memmove, [threading.Event() for _ in range(3)]
    try:
        with ThreadPoolExecutor(2) as pool:
            copying = Copying(chance, filling)
            steps = iter(go)

            def memmove(target: int, source: int, size: int) -> None:
                assert next(steps, go[-1]).wait(30)
                real(target, source, size)

            monkeypatch.setattr(ctypes, "memmove", memmove)
            waiting = [pool.submit(filling.await_bytes, end, patient=False) for end in copying.ends[:2]]
            time.sleep(0.05)
            filling.begin()
            for number, one in enumerate(waiting):
                assert not one.done()
                go[number].set()
                one.result(30)
                assert copying.is_there(copying.ends[number])
            assert not copying.is_there(copying.size)
            go[2].set()
            filling.confirm()
            assert copying.is_there(copying.size)
    finally:
        for event in go:
            event.set()
        filling.close()
