"""The package as it is installed: the kernels' place, wheels from an sdist, DIFFDOCTOR_BUILD."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support.paths import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs a checkout")


def run(*command, cwd=None, env=None, check=True):
    environment = {**os.environ, **(env or {})}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if check and done.returncode:
        pytest.fail(f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """An sdist of a copy of the checkout's tracked files, unpacked."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    copy = tmp_path_factory.mktemp("checkout")
    for name in run("git", "ls-files", cwd=ROOT).stdout.split("\n"):
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    # What running the tests leaves behind.
    for name in ("tests/runs/__pycache__/test_files.cpython-311.pyc", "tests/cuda_shim/module.so"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).touch()
    code = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
    (copy / "dist").mkdir()
    run(sys.executable, "-c", code, cwd=copy)
    unpacked = tmp_path_factory.mktemp("sdist")
    shutil.unpack_archive(next((copy / "dist").glob("*.tar.gz")), unpacked)
    return next(unpacked.iterdir())


def wheel(sdist, folder, **env):
    run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(folder), str(sdist),
        env=env,
    )  # fmt: skip
    return next(folder.glob("*.whl"))


def quick_compiler(folder):
    """A C++ compiler that does not optimise, which is a fifth of the work: what is built has to run, not to be fast."""
    path = folder / "quick-c++"
    path.write_text(
        '#!/bin/sh\nfor word; do shift; [ "$word" = -O3 ] && word=-O0; set -- "$@" "$word"; done\n'
        f'exec {os.environ.get("CXX", "c++")} "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


def unpack(path, folder):
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return json.loads((folder / "diffdoctor" / "_build_info.json").read_text())


def outside(folder, code, cwd):
    """Run code with the unpacked wheel first on sys.path, away from the checkout."""
    return run(sys.executable, "-c", code, cwd=cwd, env={"PYTHONPATH": str(folder)}).stdout.split("\n")


def test_kernels_is_no_package_of_that_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    # With the root on sys.path, as it is here, transformers and diffusers must not take our folder for the Hugging Face
    # package.
    assert str(ROOT) in sys.path[: next(i for i, path in enumerate(sys.path) if "site-packages" in path)]
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel
    from transformers import SegformerForSemanticSegmentation

    assert all(map(callable, (FluxTransformer2DModel, UNet2DConditionModel, SegformerForSemanticSegmentation)))
    spec = importlib.util.find_spec("diffdoctor.kernels.weighted_loss")
    assert Path(spec.origin).parent == ROOT / "kernels"


def test_nothing_under_kernels_registers_operators():
    for path in (ROOT / "kernels").glob("*.py"):
        text = path.read_text()
        assert "torch.library" not in text, path.name
        assert "custom_op" not in text, path.name


def test_the_sdist_holds_what_is_tracked_and_nothing_built(sdist):
    tracked = {name for name in run("git", "ls-files", cwd=ROOT).stdout.split("\n") if name and (ROOT / name).is_file()}
    found = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    assert tracked - found == {".gitignore"}
    added = {name for name in found - tracked if not name.startswith("diffdoctor.egg-info/")}
    assert added == {"PKG-INFO", "setup.cfg"}


@pytest.mark.slow
def test_a_wheel_from_the_sdist_holds_everything(sdist, tmp_path):
    path = wheel(sdist, tmp_path, DIFFDOCTOR_BUILD="cpu", CXX=quick_compiler(tmp_path))
    info = unpack(path, tmp_path / "site")
    assert info["built"] == ["cpu"]
    names = {path.name for path in (tmp_path / "site" / "diffdoctor" / "kernels").glob("*.py")}
    assert names == {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert (tmp_path / "site" / "diffdoctor" / "viz" / "report.html").is_file()
    assert len(list((tmp_path / "site" / "diffdoctor").glob("*diffdoctor_kernels.*"))) == 1
    for package in ("annotate", "evaluate/compare", "web"):
        static = f"diffdoctor/{package}/static"
        assert {file.name for file in (tmp_path / "site" / static).iterdir()} == set(os.listdir(ROOT / static))
    tracked = run("git", "ls-files", "diffdoctor/**.py", cwd=ROOT).stdout.split()
    assert len(tracked) > 50
    assert not [name for name in tracked if not (tmp_path / "site" / name).is_file()]
    code = (
        "import torch, diffdoctor\n"
        "print(diffdoctor.__file__)\n"
        "x = torch.randn(2, 4, 8, 8, requires_grad=True)\n"
        "loss = diffdoctor.weighted_loss(x, torch.zeros_like(x), backend='cpu')\n"
        "print(bool(torch.isclose(loss, x.square().mean())))"
    )
    where, right = outside(tmp_path / "site", code, tmp_path)[:2]
    assert where.startswith(str(tmp_path))
    assert right == "True"


def test_build_none_is_pure_python(sdist, tmp_path):
    path = wheel(sdist, tmp_path, DIFFDOCTOR_BUILD="none")
    assert path.name.endswith("-none-any.whl")
    assert unpack(path, tmp_path / "site")["left_out"]["cpu"] == "DIFFDOCTOR_BUILD=none was asked for"
    code = (
        "import torch, diffdoctor\n"
        "x = torch.randn(2, 4, 8, 8, requires_grad=True)\n"
        "diffdoctor.weighted_loss(x, torch.zeros_like(x), torch.rand(2, 8, 8), artifact_weight=0.0).backward()\n"
        "print(bool(x.grad.isfinite().all()))\n"
        "try:\n    diffdoctor.weighted_loss(x, torch.zeros_like(x), backend='cpu')\n"
        "except Exception as error:\n    print(type(error).__name__, error)"
    )
    finite, refusal = outside(tmp_path / "site", code, tmp_path)[:2]
    assert finite == "True"
    assert "DIFFDOCTOR_BUILD=none" in refusal


@pytest.fixture
def bare_path(tmp_path):
    """A PATH without compilers and nvcc, with what the build itself calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("cmake", "ninja", "git"):
        found = shutil.which(tool)
        if found:
            (folder / tool).symlink_to(found)
    return {"PATH": str(folder), "CXX": "", "CUDACXX": "", "CUDA_HOME": "", "CUDA_PATH": ""}


def test_auto_without_a_compiler_installs_and_says_so(sdist, tmp_path, bare_path):
    info = unpack(wheel(sdist, tmp_path, DIFFDOCTOR_BUILD="auto", **bare_path), tmp_path / "site")
    assert info["built"] == []
    assert "no C++ compiler was found" in info["left_out"]["cpu"]


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [
        ("cpu", "DIFFDOCTOR_BUILD=cpu needs a C++ compiler"),
        ("cuda", "DIFFDOCTOR_BUILD=cuda needs"),
        ("gpu", "DIFFDOCTOR_BUILD: expected one of auto, cpu, cuda, none, got 'gpu'"),
    ],
)
def test_what_cannot_be_built_stops_with_one_sentence(sdist, tmp_path, bare_path, mode, sentence):
    code = "import setuptools.build_meta as b; b.build_wheel('.')"
    done = run(sys.executable, "-c", code, cwd=sdist, env={**bare_path, "DIFFDOCTOR_BUILD": mode}, check=False)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("mode", ["cpu", "auto"])
def test_a_compiler_that_cxx_names_and_is_not_there_is_named(sdist, tmp_path, mode):
    environment = {"DIFFDOCTOR_BUILD": mode, "CXX": "/nonexistent/g++"}
    sentence = "no C++ compiler was found (CXX names '/nonexistent/g++', which is not there)"
    if mode == "auto":
        info = unpack(wheel(sdist, tmp_path, **environment), tmp_path / "site")
        assert info["left_out"]["cpu"] == info["left_out"]["cuda"] == sentence
        assert "compiler" not in info
    else:
        code = "import setuptools.build_meta as b; b.build_wheel('.')"
        done = run(sys.executable, "-c", code, cwd=sdist, env=environment, check=False)
        assert done.returncode != 0
        assert f"DIFFDOCTOR_BUILD=cpu needs a C++ compiler: {sentence}" in done.stderr


@pytest.fixture
def build_native():
    spec = importlib.util.spec_from_file_location("build_native", ROOT / "csrc" / "build_native.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (
            "-- Detecting\nCMake Error at /a/Determine.cmake:48 (message):\n  Could not find compiler set in CXX:\n\n"
            "  /nonexistent.\n\nCall Stack (most recent call first):\n",
            "CMake Error at /a/Determine.cmake:48 (message): Could not find compiler set in CXX: /nonexistent.",
        ),
        (
            "CMake Error at CMakeLists.txt:3 (message):\n\n  first line\n  second line\n\n  another paragraph\n",
            "CMake Error at CMakeLists.txt:3 (message): first line second line",
        ),
        ("a.cpp:3:5: error: expected ';'\n    3 | int\n", "a.cpp:3:5: error: expected ';'"),
        ("CMake Error at CMakeLists.txt:3 (message):", "CMake Error at CMakeLists.txt:3 (message):"),
        ("nothing of the kind", "see the log"),
        ("", "see the log"),
    ],
    ids=["paragraphs", "lines", "compiler", "cut off", "none", "empty"],
)
def test_what_a_failed_build_says(build_native, monkeypatch, tmp_path, output, sentence):
    monkeypatch.setattr(build_native.tempfile, "tempdir", str(tmp_path))
    code = f"import sys; sys.stdout.write({output!r}); sys.exit(1)"
    with pytest.raises(RuntimeError) as failed:
        build_native.BuildNative._run([sys.executable, "-c", code])
    (log,) = tmp_path.glob("*.log")
    assert str(failed.value) == f"{sentence} (whole output in {log})"
    assert log.read_text() == output


def test_a_compiler_with_arguments_is_taken(build_native, monkeypatch):
    monkeypatch.setattr(build_native.shutil, "which", lambda name: name if name == "ccache" else None)
    monkeypatch.setenv("CXX", "ccache g++ -m64")
    assert build_native.find_compiler() == "ccache g++ -m64"
    monkeypatch.setenv("CXX", "  ")
    assert build_native.find_compiler() is None


def test_visual_studio_need_not_be_on_the_path(build_native, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PROGRAMFILES(X86)", str(tmp_path))
    assert not build_native.has_visual_studio()
    installer = tmp_path / "Microsoft Visual Studio" / "Installer"
    installer.mkdir(parents=True)
    (installer / "vswhere.exe").touch()
    assert build_native.has_visual_studio()


def test_cuda_without_nvcc_names_nvcc(build_native, monkeypatch):
    module = build_native
    which = shutil.which
    monkeypatch.setattr(module.shutil, "which", lambda name: None if "nvcc" in name else which(name))
    monkeypatch.setattr(module, "find_compiler", lambda: "c++")
    with pytest.raises(module.BuildError, match="DIFFDOCTOR_BUILD=cuda needs nvcc, which was not found"):
        module.BuildNative._build(None, None, "cuda", {"left_out": {}})


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_the_build_with_sanitizers_can_be_configured(tmp_path):
    pytest.importorskip("pybind11")
    from programs.sanitize_cpu import configure

    configure(tmp_path)  # raises where CMake does not end well
    assert "DIFFDOCTOR_SANITIZE:STRING=address,undefined" in (tmp_path / "CMakeCache.txt").read_text()
