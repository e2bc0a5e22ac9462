"""What Windows, macOS and other processors need of sources that are tested on Linux x86-64."""

import re

import pytest

from diffdoctor.backends import native
from diffdoctor.runs import files
from diffdoctor.runs.files import file_name
from support.paths import ROOT

# Where a compiler's own words stand behind a check of the compiler, or of an instruction set that only it has here.
CHOOSING = {
    "common/export.h", "common/platform.h", "common/resample.h", "cpu/compiler.h", "cpu/dispatch.cpp", "cpu/tiles/l2.h"
}  # fmt: skip


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs a checkout")
def test_the_cpu_kernels_and_their_binding_leave_a_compilers_own_words_to_a_few_files():
    words = re.compile(r"__builtin_|__attribute__|__asm__|#pragma omp simd|__restrict|\bssize_t\b|\blong\b|\bM_PI\b")
    found = {
        path.relative_to(ROOT / "csrc").as_posix()
        for folder in ("common", "cpu", "bind")
        for path in (ROOT / "csrc" / folder).rglob("*")
        if path.suffix in (".h", ".cpp") and words.search(re.sub("//.*", "", path.read_text(encoding="utf-8")))
    }
    assert found == CHOOSING


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shard/key", "shard/key.png"),
        ("C:secret", r"C_secret-[0-9a-f]{16}\.png"),
        ("a/12:30?", r"a/12_30_-[0-9a-f]{16}\.png"),
        (r"..\..\up", r"\.\._\.\._up-[0-9a-f]{16}\.png"),
        ("end.", r"end_-[0-9a-f]{16}\.png"),
        ("a/Con.b/Nul", r"a/_Con\.b-[0-9a-f]{16}/_Nul-[0-9a-f]{16}\.png"),
        ("console", "console.png"),
    ],
)
def test_a_result_has_a_file_name_that_windows_takes(monkeypatch, name, expected):
    assert file_name(name, ".png") == f"{name}.png"
    monkeypatch.setattr(files, "_IS_WINDOWS", True)
    assert re.fullmatch(expected, file_name(name, ".png"))


def test_names_that_windows_writes_alike_stay_apart(monkeypatch):
    monkeypatch.setattr(files, "_IS_WINDOWS", True)
    assert len({file_name(name, ".png") for name in ("a_b", "a:b", "a?b")}) == 3


@pytest.mark.parametrize(
    ("message", "system", "advice"),
    [
        ("libgomp.so.1: cannot open shared object file: No such file or directory", "linux", "libgomp1"),
        ("libstdc++.so.6: version `GLIBCXX_3.4.32' not found", "linux", "a newer system"),
        ("DLL load failed while importing _native: The specified module could not be found.", "win32", "vc_redist"),
    ],
)
def test_a_module_that_cannot_be_loaded_says_what_to_install(monkeypatch, message, system, advice):
    monkeypatch.setattr(native.sys, "platform", system)
    reason = native._not_loaded(ImportError(message))
    assert reason.startswith(f"the compiled module cannot be loaded ({message}); ")
    assert advice in reason


def test_a_module_that_was_not_built_is_not_there():
    assert "is not there" in native._not_loaded(ModuleNotFoundError("No module named 'diffdoctor._native'"))
