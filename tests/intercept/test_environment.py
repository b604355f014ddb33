"""`lastgood run` reaches every Python below it, whatever it is, and says what it cannot do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_run import posix, start

from lastgood.cli.run import run as command
from lastgood.intercept import launch, presets


def test_children_of_every_kind_are_reached(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import multiprocessing, os, subprocess, sys
        import torch, torch.multiprocessing
        def child(index, name):
            torch.save([index], f"{name}.pth")
        class Data(torch.utils.data.Dataset):
            def __len__(self): return 1
            def __getitem__(self, index):
                torch.save([index], "worker.pth"); return 0
        if __name__ == "__main__":
            torch.multiprocessing.spawn(child, args=("spawn",), nprocs=1)
            if os.name != "nt":
                process = multiprocessing.get_context("fork").Process(target=child, args=(0, "fork"))
                process.start(); process.join()
            list(torch.utils.data.DataLoader(Data(), num_workers=1))
            subprocess.run([sys.executable, "-c", "import torch; torch.save([1], 'subprocess.pth')"], check=True)
        """,
    )
    assert code == 0, output
    names = ["spawn", "worker", "subprocess", *(["fork"] if os.name != "nt" else [])]
    for name in names:
        assert (tmp_path / ".lastgood" / f"{name}.pth.jsonl").exists(), (name, output)
    assert f"{len(names)} files saved" in output


def test_a_sitecustomize_of_the_user_runs_too(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text("print('the own one ran')")
    path = os.pathsep.join([str(tmp_path / "own"), os.environ.get("PYTHONPATH", "")])
    code, output = start(tmp_path, "import sys; print(sys.modules['sitecustomize'].__file__)", PYTHONPATH=path)
    assert code == 0
    assert "the own one ran" in output and os.path.join("own", "sitecustomize.py") in output


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, []), ("", []), (os.pathsep.join(["a", "", "b"]), ["a", "", "b"]), ("a" + os.pathsep, ["a", ""])],
)
def test_the_entries_of_pythonpath_stay_as_they_are(before: str | None, after: list[str]) -> None:
    base = {} if before is None else {"PYTHONPATH": before}
    first = launch.environment(launch.Settings(), base)
    again = launch.environment(launch.Settings(), first)
    assert (
        first["PYTHONPATH"].split(os.pathsep) == again["PYTHONPATH"].split(os.pathsep) == [str(launch.INJECT), *after]
    )


def test_nothing_is_loaded_before_torch_is(tmp_path: Path) -> None:
    code, output = start(tmp_path, "import sys; print([n for n in sys.modules if n.startswith('_lastgood_run')])")
    assert code == 0
    assert "[]" in output


SAVE = "def save(obj, f): open(f, 'w').write('plain')\n"
LOAD = "def load(f): pass\n"
SERIALIZATION = "class serialization: save, load = save, load\n"


@pytest.mark.parametrize(
    ("version", "source", "sentence"),
    [
        ("1.13.1", SAVE + LOAD + SERIALIZATION, "needs torch 2.0 or newer (found 1.13.1)"),
        ("3.0.0", SAVE + LOAD + SERIALIZATION, "does not know this torch (found 3.0.0)"),
        ("nonsense", SAVE + LOAD + SERIALIZATION, "does not know this torch (found nonsense)"),
        ("2.99.0", SAVE.replace("obj", "state") + LOAD + SERIALIZATION, "does not know this torch (found 2.99.0)"),
        ("2.99.0", SAVE + LOAD.replace("(f)", "(path)") + SERIALIZATION, "does not know this torch (found 2.99.0)"),
        ("2.99.0", SAVE + LOAD, "does not know this torch (found 2.99.0)"),
        ("2.99.0", SAVE + LOAD + "class serialization: save = save\n", "does not know this torch (found 2.99.0)"),
    ],
)
def test_an_unknown_torch_switches_it_off_with_one_warning(
    tmp_path: Path, version: str, source: str, sentence: str
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n{source}")
    code, output = start(
        tmp_path,
        """
        import os, subprocess, sys
        before = [os.rename, os.listdir, open]
        import torch
        assert before == [os.rename, os.listdir, open]
        torch.save(1, "a.pth")
        assert open("a.pth").read() == "plain"
        if len(sys.argv) == 1: subprocess.run([sys.executable, __file__, "again"], check=True)
        """,
    )
    assert code == 0, output
    assert output.count("NOT made safe") == 1 and sentence in output
    assert not (tmp_path / ".lastgood").exists()


def test_a_newer_torch_whose_functions_are_as_they_were_is_made_safe(tmp_path: Path) -> None:
    stub = (Path(__file__).parent / "programs" / "stub_torch.py").read_text()
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(stub.replace("2.1.0", "2.99.0"))
    code, output = start(
        tmp_path,
        "import torch\ntorch.save([1], 'last.pth')\nassert torch.load('last.pth') == [1] and '99' in torch.__version__",
    )
    assert code == 0 and "1 files saved" in output and "NOT made safe" not in output, output


@pytest.mark.parametrize(
    "order", ["torch, safetensors, transformers.trainer", "safetensors, torch, transformers.trainer"]
)
def test_an_unknown_torch_switches_off_what_other_libraries_would_bring(tmp_path: Path, order: str) -> None:
    sources = {
        "torch": "__version__ = '3.0.0'\ndef save(obj, f): pass\ndef load(f): pass\n",
        "safetensors": "def safe_open(filename): return filename\n",
        "transformers": "",
        "transformers/trainer": "class Trainer:\n  def _save_checkpoint(self): return 'plain'\n",
    }
    for name, source in sources.items():
        path = tmp_path / name / "__init__.py"
        path.parent.mkdir()
        path.write_text(source)
    code, output = start(
        tmp_path,
        f"""
        import builtins, io, json, os, shutil
        before = [os.rename, os.mkdir, os.listdir, os.stat, open, io.open, json.dump, shutil.move, os.path.exists]
        import {order}
        assert before == [
            os.rename, os.mkdir, os.listdir, os.stat, open, io.open, json.dump, shutil.move, os.path.exists
        ]
        with open("last.pth", "wb") as file: file.write(b"1"); assert os.path.exists("last.pth")
        safetensors.safe_open("last.pth")
        assert "_lastgood" not in transformers.trainer.Trainer._save_checkpoint.__code__.co_filename
        assert not hasattr(transformers.trainer.Trainer._save_checkpoint, "__wrapped__")
        """,
        "--save-on",
        "rank0",
    )
    assert code == 0, output
    assert output.count("NOT made safe") == 1
    assert not (tmp_path / ".lastgood").exists()


@pytest.mark.parametrize(("ending", "code"), [("pass", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), 15)", 143)])
@posix
def test_the_exit_code_is_the_programs(tmp_path: Path, ending: str, code: int) -> None:
    assert start(tmp_path, f"import os, sys\n{ending}")[0] == code


@posix
def test_a_python_that_ignores_us_is_named_and_can_be_fixed(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "v")], check=True)
    python = str(tmp_path / "v" / "bin" / "python")
    assert launch.blind_python([python, "script.py"]) is None
    assert "--install" in (launch.blind_python([python, "-I", "script.py"]) or "")
    assert "ignores PYTHONPATH" in (launch.blind_python([python, "-E", "script.py"]) or "")
    for flags in (["-X", "utf8", "-I"], ["-W", "ignore", "-I"], ["-uIX", "utf8"], ["-X", "utf8", "-Im"], ["-Ic"]):
        assert "--install" in (launch.blind_python([python, *flags, "script.py"]) or ""), flags
    for flags in (["-X", "utf8"], ["-W", "ignore"], ["-m", "venv", "-I"], ["-c", "0", "-I"], ["-WSyntaxWarning"]):
        assert launch.blind_python([python, *flags, "script.py"]) is None, flags
    for flags in (["-I", "-S"], ["-S"], ["-uS"]):
        found = launch.blind_python([python, *flags, "script.py"]) or ""
        assert "-S" in found and "--install" not in found, flags
    result = CliRunner().invoke(command, ["--install", python])
    assert result.exit_code == 0, result.output
    assert launch.blind_python([python, "-I", "script.py"]) is None
    assert launch.blind_python([python, "-E", "script.py"]) is None
    result = CliRunner().invoke(command, ["--uninstall", python])
    assert "was removed" in result.output
    assert launch.blind_python([python, "-I", "script.py"]) is not None
    assert "nothing of ours" in CliRunner().invoke(command, ["--uninstall", python]).output


def test_a_command_that_does_not_exist() -> None:
    result = CliRunner().invoke(command, ["--", "no-such-program-here"])
    assert result.exit_code == 127


def test_a_file_of_directories_for_python_s_own_path_is_no_checkpoint(tmp_path: Path) -> None:
    """The web page of GPT-SoVITS writes one, or is refused it, after it has imported torch."""
    code, output = start(
        tmp_path,
        """
        import os, torch
        os.makedirs("lib/site-packages")
        for file in "lib/site-packages/users.pth", "lib/missing/site-packages/users.pth":
            try:
                with open(file, "w") as file: file.write("/opt/program")
            except OSError:
                print("REFUSED")
        """,
    )
    assert code == 0 and "REFUSED" in output and " 0 files saved" in output and "0 failed" in output, output
    assert os.listdir(tmp_path / "lib" / "site-packages") == ["users.pth"]


def test_doctor_names_the_preset_of_the_trainers_that_a_web_page_starts(tmp_path: Path) -> None:
    (tmp_path / "GPT_SoVITS").mkdir()
    (tmp_path / "GPT_SoVITS" / "s2_train.py").touch()
    result = CliRunner().invoke(command, ["--doctor", "--", sys.executable, str(tmp_path / "webui.py")])
    assert result.exit_code == 0 and "Preset gpt-sovits in the trainers" in result.output, result.output


@pytest.mark.parametrize("defects", [presets.DEFECTS, presets.DEFECTS[1:3], ()], ids=len)
def test_doctor_names_a_gpt_sovits_checkout_and_its_defects(tmp_path: Path, defects: Any) -> None:
    for name in {name for name, _, _ in presets.DEFECTS}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\n".join(text for at, text, _ in defects if at == name))
    script = str(tmp_path / "GPT_SoVITS" / "s2_train.py")
    result = CliRunner().invoke(command, ["--doctor", "--", sys.executable, script])
    assert result.exit_code == 0, result.output
    assert f"{len(defects)} known saving defects" in result.output and "Preset gpt-sovits" in result.output
    for name, _, says in presets.DEFECTS:
        assert (f"{name}: {says}" in result.output) == any(found[2] == says for found in defects)


def test_settings_that_cannot_be_read_are_no_crash(tmp_path: Path) -> None:
    code, output = start(tmp_path, "import torch; torch.save([1], 'a.pth')", protected=False, LASTGOOD_RUN="{")
    assert code == 0, output
    environment = {**launch.environment(launch.Settings()), "LASTGOOD_RUN": json.dumps([])}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "NOT made safe" in done.stderr


def starts(python: str) -> bool:
    """Whether there is a Python behind the name: a version manager's stand-ins are on the PATH without one."""
    return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


NAMES = [f"python3.{minor}" for minor in range(6, 16)]
FOUND = [path for name in NAMES if (path := shutil.which(name)) and starts(path)]


@pytest.mark.parametrize("python", FOUND or [sys.executable])
def test_the_runtime_runs_in_other_pythons_without_our_packages(tmp_path: Path, python: str) -> None:
    version = subprocess.run([python, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True)
    assert version.returncode == 0
    (tmp_path / "torch").mkdir()
    stub = Path(__file__).parent / "programs" / "stub_torch.py"
    (tmp_path / "torch" / "__init__.py").write_text(stub.read_text())
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, os, shutil, sys, torch, zipfile
            for i in range(3): torch.save([i], "last.pth")
            torch.save([9], "a.pth")
            shutil.move("a.pth", "last.pth"); os.replace("last.pth", "b.pth"); shutil.copy("b.pth", "last.pth")
            with open("x.json", "w") as file: json.dump(1, file)
            with zipfile.ZipFile("z.npz", "w") as archive: archive.writestr("a", "b")
            os.makedirs("checkpoint-1"); torch.save([1], "checkpoint-1/m.pth")
            assert torch.load("last.pth") == [9]
            from pathlib import Path
            Path("sub").mkdir()
            Path("sub/one.pth").write_bytes(b"1")
            Path("sub/one.pth").replace("sub/two.pth"); Path("sub/two.pth").rename("sub/three.pth")
            with Path("sub/four.json").open("w") as file: file.write("4"); assert not os.path.exists("sub/four.json")
            Path("sub/five.pth").write_text("5"); Path("sub/five.pth").unlink()
            assert sorted(path.name for path in Path("sub").iterdir()) == ["four.json", "three.pth"]
            if hasattr(os, "fork"):
                if os.fork() == 0:
                    Path("sub/checkpoint-2").mkdir()
                    torch.save([2], "sub/checkpoint-2/m.pth")
                    os._exit(9)
                os.wait()
                assert os.path.exists("sub/checkpoint-2") and not list(Path("sub").glob("checkpoint-*"))
            assert sorted(name for name in os.listdir("sub/.lastgood") if name.endswith(".jsonl")) == [
                "four.json.jsonl", "three.pth.jsonl"
            ]
            print(sorted(name for name in os.listdir(".lastgood") if name.endswith(".jsonl")))
            """
        )
    )
    variables = launch.environment(
        launch.Settings(run="r", complete=["checkpoint-*"], save_on="rank0"), dict(os.environ)
    )
    variables["PYTHONPATH"] = str(launch.INJECT)
    done = subprocess.run([python, str(script)], cwd=tmp_path, env=variables, capture_output=True, text=True)
    if tuple(int(part) for part in version.stdout.split()) < (3, 8):
        assert "3.8 or newer is needed" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['b.pth.jsonl', 'last.pth.jsonl', 'x.json.jsonl', 'z.npz.jsonl']"
    script.write_text(
        "import torch\nfrom pathlib import Path\nleft = Path('left.pth')\nleft.write_bytes(b'left')\n"
        "assert left.exists() and left.is_file() and left.stat().st_size == 4\nleft.unlink()\nassert not left.exists()"
    )
    done = subprocess.run(
        [python, str(script)], cwd=tmp_path, env={**variables, "RANK": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
