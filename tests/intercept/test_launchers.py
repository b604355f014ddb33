"""`lastgood run` below launchers: torchrun, mp.spawn, Lightning's; and what it recognises by itself."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from test_run import posix, start

from lastgood.errors import LastGoodError
from lastgood.intercept import journal, launch, presets

RANKS = """
    import datetime, os, torch
    import torch.distributed as dist
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=100))
    for step in range(1, 4):
        torch.save({"step": step, "rank": dist.get_rank()}, "tmp.pth")
        dist.barrier()
        os.replace("tmp.pth", "last.pth")
        torch.save(dist.get_rank(), f"rng_state_{dist.get_rank()}.pth")
        dist.barrier()
    dist.destroy_process_group()
"""


@posix
def test_torchrun(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(RANKS))
    launcher = "import runpy, sys; sys.argv = ['torchrun', '--standalone', '--nproc-per-node', '2', 'train.py']"
    code, output = start(
        tmp_path, f"{launcher}\nrunpy.run_module('torch.distributed.run', run_name='__main__')", GLOO_SOCKET_IFNAME="lo"
    )
    assert code == 0, output
    assert torch.load(tmp_path / "last.pth") == {"step": 3, "rank": 0}
    assert [torch.load(tmp_path / f"rng_state_{rank}.pth") for rank in range(2)] == [0, 1]
    assert len(journal.verify(tmp_path)) >= 3 and not [f for f in journal.verify(tmp_path) if f.damage]


@posix
def test_the_rank_is_known_from_the_process_group_alone(tmp_path: Path) -> None:
    """Nothing in the environment tells it, and the children are not those of torch.multiprocessing."""
    code, output = start(
        tmp_path,
        """
        import multiprocessing, os, torch
        import torch.distributed as dist
        def child(number):
            dist.init_process_group("gloo", init_method="file://" + os.path.abspath("meet"), rank=number, world_size=2)
            dist.barrier()
            torch.save([number], "last.pth")
            torch.save([number], f"own_{number}.pth")
            dist.barrier()
            assert torch.load("last.pth") == [0]
        if __name__ == "__main__":
            children = [multiprocessing.get_context("fork").Process(target=child, args=(i,)) for i in (0, 1)]
            for one in children: one.start()
            for one in children: one.join(); assert one.exitcode == 0
        """,
        "--save-on",
        "rank0",
        GLOO_SOCKET_IFNAME="lo",
    )
    assert code == 0, output
    assert torch.load(tmp_path / "last.pth") == [0] and torch.load(tmp_path / "own_1.pth") == [1]
    assert "3 files saved" in output and "1 collisions avoided" in output


@pytest.mark.slow
@posix
def test_the_launcher_of_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    code, output = start(
        tmp_path,
        """
        import lightning, os, torch
        # Before any process group: the second process has nothing but Lightning's variables.
        torch.save(os.environ.get("LOCAL_RANK", "0"), "top.pth")
        class Model(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(2, 2)
            def training_step(self, batch, index):
                torch.save(self.global_rank, f"rank_{self.global_rank}.pth")
                return self.layer(batch).sum()
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.1)
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False
        )
        trainer.fit(Model(), torch.utils.data.DataLoader(torch.randn(4, 2)))
        trainer.save_checkpoint("last.ckpt")
        """,
        "--save-on",
        "rank0",
    )
    assert code == 0, output
    assert torch.load(tmp_path / "top.pth") == "0" and "1 collisions avoided" in output
    names = {Path(finding.path).name for finding in journal.verify(tmp_path) if not finding.damage}
    assert {"rank_0.pth", "rank_1.pth", "last.ckpt"} <= names


@posix
@pytest.mark.parametrize("killed", [0, 1])
def test_a_directory_is_finished_when_all_ranks_of_the_trainer_have_written(tmp_path: Path, killed: int) -> None:
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("")
    (tmp_path / "transformers" / "trainer.py").write_text(
        textwrap.dedent(
            """
            import os, torch
            class Trainer:
                args = type("Arguments", (), {"output_dir": "out"})
                def _save_checkpoint(self, rank, killed):
                    if rank == killed: os.kill(os.getpid(), 9)
                    os.makedirs("out/checkpoint-1", exist_ok=True)
                    torch.save([rank], f"out/checkpoint-1/part_{rank}.pth")
            """
        )
    )
    code, output = start(
        tmp_path,
        f"""
        import multiprocessing, os, torch, torch.distributed as dist
        from transformers.trainer import Trainer
        def child(rank):
            dist.init_process_group("gloo", init_method="file://" + os.path.abspath("meet"), rank=rank, world_size=2)
            dist.barrier()
            Trainer()._save_checkpoint(rank, {killed})
        if __name__ == "__main__":
            children = [multiprocessing.get_context("fork").Process(target=child, args=(i,)) for i in (0, 1)]
            for one in children: one.start()
            for one in children: one.join()
        """,
        GLOO_SOCKET_IFNAME="lo",
    )
    assert (tmp_path / "out" / "checkpoint-1").exists(), output
    code, output = start(tmp_path, "import os, safetensors; print(sorted(os.listdir('out')))")
    assert code == 0 and "[]" in output and "not completely written" in output, output


ROTATION = """
    import os, shutil, sys, torch
    import transformers.trainer as trainer
    from transformers.trainer import Trainer

    def kill_when_deleting(event, arguments):
        name = str(arguments[0]) if arguments else ""
        if event in ("os.remove", "os.rmdir") and int(os.environ["KILL_AT"]) == step and "pth" in name:
            kills.append(name)
            if len(kills) == 2: os.kill(os.getpid(), 9)     # One of its two files is gone.
    kills = []
    sys.addaudithook(kill_when_deleting)
    limit = int(os.environ["LIMIT"])
    for step in range(1, limit + 3):
        Trainer()._save_checkpoint(step)
"""


@pytest.mark.parametrize("how", ["method", "function"])
@pytest.mark.parametrize("limit", [1, 2])
def test_a_trainer_killed_while_it_deletes_an_earlier_checkpoint(tmp_path: Path, limit: int, how: str) -> None:
    """The newest is finished before, and of the one that is half deleted nothing is seen."""
    names = {"method": ("delete", "self._rotate_checkpoints"), "function": ("rotate_checkpoints", "rotate_checkpoints")}
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("")
    (tmp_path / "transformers" / "trainer.py").write_text(
        textwrap.dedent(
            """
            import glob, os, shutil, torch
            def FUNCTION():
                for old in sorted(glob.glob("out/checkpoint-*"))[:-int(os.environ["LIMIT"])]:
                    shutil.rmtree(old)
            class Trainer:
                args = type("Arguments", (), {"output_dir": "out"})
                def _save_checkpoint(self, step):
                    os.makedirs(f"out/checkpoint-{step}")
                    for part in ("model", "optimizer"):
                        torch.save([step], f"out/checkpoint-{step}/{part}.pth")
                    CALL()
                if "CALL".startswith("self"):
                    def _rotate_checkpoints(self): FUNCTION()
            """
        )
        .replace("FUNCTION", names[how][0])
        .replace("CALL", names[how][1])
    )
    code, output = start(tmp_path, ROTATION, LIMIT=str(limit), KILL_AT=str(limit + 1))
    assert code == (9 if os.name == "nt" else 128 + 9), output
    seen = "import os, safetensors; print(sorted(os.listdir('out')))"
    code, output = start(tmp_path, seen)
    expected = [f"checkpoint-{step}" for step in range(2, limit + 2)]
    assert str(expected) in output and "not completely" not in output, output
    assert all(torch.load(tmp_path / "out" / name / "optimizer.pth") for name in expected)
    # What was left of it goes when the next is deleted.
    again = ROTATION.replace("range(1, limit + 3)", "(limit + 2,)")
    code, output = start(tmp_path, again, LIMIT=str(limit), KILL_AT="0")
    assert code == 0, output
    assert not list((tmp_path / "out" / ".lastgood").glob("tmp-*")), output


@posix
def test_a_directory_that_lightning_did_not_finish_is_set_aside_without_being_asked(tmp_path: Path) -> None:
    """As sharded strategies write it."""
    pytest.importorskip("lightning")
    code, output = start(
        tmp_path,
        """
        import lightning, os, torch
        from lightning.pytorch.demos.boring_classes import BoringModel
        class Shards(lightning.pytorch.plugins.TorchCheckpointIO):
            def save_checkpoint(self, checkpoint, path, storage_options=None):
                os.makedirs(path)
                for part in ("one", "two"):
                    torch.save(checkpoint, os.path.join(path, f"{part}.pth"))
                    if "second" in str(path): os.kill(os.getpid(), 9)
        trainer = lightning.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, plugins=[Shards()]
        )
        trainer.strategy.connect(BoringModel())
        for name in ("first", "second"): trainer.save_checkpoint(f"{name}.ckpt")
        """,
    )
    assert code == 128 + 9, output
    code, output = start(tmp_path, "import os, safetensors; print(sorted(os.listdir()))")
    assert "['first.ckpt', 'script.py']" in output and "not completely written" in output


SOVITS = """
    import os, sys, torch
    for epoch in (1, 2):
        torch.save([epoch], "G_233333333333.pth")
        if epoch == 2: os.kill(os.getpid(), 9)
        torch.save([epoch], "D_233333333333.pth")
"""


@posix
def test_a_trainer_of_gpt_sovits_is_recognised_wherever_it_is_started(tmp_path: Path) -> None:
    assert presets.recognise(["python", "GPT_SoVITS/s2_train.py", "--config", "x.json"]) == "gpt-sovits"
    (tmp_path / "s2_train.py").write_text(textwrap.dedent(SOVITS))
    # As the web UI starts it.
    code, output = start(tmp_path, "import subprocess, sys; sys.exit(subprocess.call([sys.executable, 's2_train.py']))")
    assert code != 0 and torch.load(tmp_path / "G_233333333333.pth") == [2], output
    code, output = start(tmp_path, "import torch; print(torch.load('G_233333333333.pth'))")
    assert "[1]" in output and "is back, which fits" in output


@pytest.mark.skipif(os.name != "nt", reason="needs Windows")
def test_an_embeddable_python_is_named_and_can_be_fixed(tmp_path: Path) -> None:
    """As portable bundles carry it: a ._pth file beside python.exe says where the modules are."""
    home = tmp_path / "runtime"
    shutil.copytree(sys.base_prefix, home, ignore=shutil.ignore_patterns("site-packages", "__pycache__", "test"))
    (home / "Lib" / "site-packages").mkdir(exist_ok=True)
    (home / "python311._pth").write_text(".\nDLLs\nLib\nLib\\site-packages\n#import site\n")
    python = str(home / "python.exe")
    assert "embeddable Python with a ._pth file" in (launch.blind_python([python, "train.py"]) or "")
    with pytest.raises(LastGoodError, match="import site"):
        launch.install(python)
    (home / "python311._pth").write_text(".\nDLLs\nLib\nLib\\site-packages\nimport site\n")
    assert launch.blind_python([python, "train.py"])
    launch.install(python)
    assert launch.blind_python([python, "train.py"]) is None
    assert launch.uninstall(python)
    assert launch.blind_python([python, "train.py"])
