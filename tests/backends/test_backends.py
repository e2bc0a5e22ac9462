"""Which backend serves a call, and why not another."""

import sys

import pytest
import torch

import diffdoctor
from benchmarks.ops import history, host, prefer
from diffdoctor.backends import native, preferences, select
from diffdoctor.backends.cuda import device as cuda_device
from diffdoctor.backends.select import NAMES, BackendUnavailable, describe, for_device, pick, why_not
from diffdoctor.cli import main as command
from diffdoctor.ops import OPS
from support.backends import HAS_CPU, needs_cpu
from support.warm import warm_program


@pytest.fixture(scope="module")
def first_calls():
    """A process in which no call was made, forked for each test."""
    yield from warm_program("first_calls.py")


def test_every_backend_is_usable_or_says_why_not():
    found = diffdoctor.available_backends()
    assert tuple(found) == NAMES
    assert found["reference"] is None
    assert all(reason is None or (isinstance(reason, str) and len(reason) > 8) for reason in found.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA")
def test_without_a_gpu_the_gpu_backends_say_so():
    x = torch.ones(1, 1, 2, 2)
    for name in ("cuda", "triton"):
        with pytest.raises(BackendUnavailable, match=f"'{name}' cannot be used here: .+"):
            diffdoctor.weighted_loss(x, x, backend=name)


@needs_cpu
def test_a_cpu_tensor_goes_to_the_compiled_module():
    assert for_device("cpu", "weighted_loss").__name__ == "diffdoctor.backends.cpu.weighted_loss"
    assert pick(None, "weighted_loss", "cpu") is for_device("cpu", "weighted_loss")
    assert pick("reference", "weighted_loss", "cpu") is None


@needs_cpu
def test_a_backend_refuses_a_tensor_on_another_device():
    with pytest.raises(BackendUnavailable, match="serves CPU tensors, got a tensor on cuda"):
        pick("cpu", "weighted_loss", "cuda")


def test_a_cuda_tensor_on_the_reference_warns_once(monkeypatch):
    module = sys.modules["diffdoctor.backends.select"]
    monkeypatch.setattr(module, "_chosen", {("cuda", "weighted_loss"): None})
    monkeypatch.setattr(module, "_warned", set())
    with pytest.warns(UserWarning, match="served by the slow reference"):
        assert pick(None, "weighted_loss", "cuda") is None
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick(None, "weighted_loss", "cuda") is None


def test_environment_variable(monkeypatch):
    x, y = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    monkeypatch.setenv("DIFFDOCTOR_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=r"DIFFDOCTOR_BACKEND: expected one of .* got 'nonsense'"):
        diffdoctor.weighted_loss(x, y)
    monkeypatch.setenv("DIFFDOCTOR_BACKEND", "reference")
    leaf = x.clone().requires_grad_()
    assert "SavedGradLoss" not in type(diffdoctor.weighted_loss(leaf, y).grad_fn).__name__
    monkeypatch.delenv("DIFFDOCTOR_BACKEND")
    if HAS_CPU:
        assert "SavedGradLoss" in type(diffdoctor.weighted_loss(leaf, y).grad_fn).__name__


def test_a_plan_that_is_known_hides_nothing(monkeypatch):
    x, y = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    diffdoctor.weighted_loss(x, y)
    for bad, error in (("", ValueError), ("gpu", ValueError), (0, TypeError), (False, TypeError)):
        with pytest.raises(error, match="backend: expected "):
            diffdoctor.weighted_loss(x, y, backend=bad)
    with pytest.raises(TypeError, match="return_stats: expected a bool"):
        diffdoctor.weighted_loss(x, y, return_stats=0)
    with pytest.raises(ValueError, match="target: expected a tensor that requires no gradient"):
        diffdoctor.weighted_loss(x, y.clone().requires_grad_())
    monkeypatch.setenv("DIFFDOCTOR_BACKEND", "reference")
    leaf = x.clone().requires_grad_()
    assert "SavedGradLoss" not in type(diffdoctor.weighted_loss(leaf, y).grad_fn).__name__


@needs_cpu
def test_a_call_on_the_cuda_backend_calls_few_functions(monkeypatch):
    monkeypatch.setattr(cuda_device, "native", cuda_device.native)
    host.stub_cuda()
    with host.served_by("cuda"):
        found = host.count()
    assert all(found[what] <= most for what, most in host.CALLS["cuda"].items()), found


def fake_rows(**times: tuple[float, float]) -> list[dict]:
    """Rows of the history: {side of a picture: (p20 on cuda, on triton)}."""
    return [
        {
            "device": "cuda", "op": "weighted_loss", "case": "sweep", "dtype": "bf16", "backend": backend,
            "shape": [4, 4, int(side[1:]), int(side[1:])], "p20_us": us, "p50_us": us, "machine": {"gpu": "A GPU"},
            "commit": "c0de",
        }
        for side, pair in times.items()
        for backend, us in zip(("cuda", "triton"), pair, strict=True)
    ]  # fmt: skip


def test_the_table_of_backends_is_what_the_benchmarks_write(tmp_path, monkeypatch):
    assert prefer.TARGET.read_text() == prefer.text(prefer.table([]), preferences.SOURCE)
    # Where the two are within a twentieth of each other, the backend of the smaller size stays.
    history.append(tmp_path / "rows.jsonl", fake_rows(s16=(9, 8), s64=(9, 8.8), s256=(50, 52), s512=(100, 150)))
    assert prefer.main([str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "table.py")]) == 0
    found = {}
    exec((tmp_path / "table.py").read_text(), found)
    assert found["SOURCE"] == "measured on A GPU, commit c0de"
    assert found["FIRST"]["cuda", "weighted_loss"] == ((0, "triton"), (4 * 4 * 512 * 512, "cuda"))
    assert found["FIRST"]["cuda", "artifact_loss"] == ((0, "cuda"),)

    monkeypatch.setattr(select, "FIRST", found["FIRST"])
    monkeypatch.setattr(select, "_chosen", {})
    monkeypatch.setattr(select, "why_not", lambda name, op=None: None)
    monkeypatch.setattr(select, "_load", lambda name, op: name)
    assert [pick(None, "weighted_loss", "cuda", elements=n) for n in (1, 4194303, 4194304)] == ["triton"] * 2 + ["cuda"]
    assert select._servers("cuda", "weighted_loss") == "triton, from 4194304 elements cuda"
    assert select._servers("cuda", "artifact_loss") == "cuda"


def test_rows_of_no_gpu_make_no_table(tmp_path, capsys):
    rows = [row | {"device": "cpu"} for row in fake_rows(s16=(1, 2))]
    history.append(tmp_path / "rows.jsonl", rows)
    assert prefer.main([str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "table.py")]) == 1
    assert "has no rows of cuda or triton on a GPU" in capsys.readouterr().err
    assert not (tmp_path / "table.py").exists()


def test_description_has_what_env_prints():
    found = describe(OPS)
    assert set(found["backends"]) == set(NAMES)
    assert set(found["serves"]["cpu"]) == set(OPS)
    assert found["serves"]["cpu"]["weighted_loss"] == ("cpu" if HAS_CPU else "reference")
    if HAS_CPU:
        assert found["native"]["instruction_set"] in ("generic", "avx2", "avx512")


@pytest.mark.parametrize(
    ("value", "served"),
    [
        ("reference", "reference"),
        ("nope", "nothing: DIFFDOCTOR_BACKEND: expected one of cuda, triton, cpu, reference, got 'nope'"),
        pytest.param("cpu", "cpu", marks=needs_cpu),
        pytest.param(
            "cuda",
            "nothing: backend 'cuda' cannot be used here: ",
            marks=pytest.mark.skipif(why_not("cuda") is None, reason="a machine without CUDA"),
        ),
    ],
)
def test_description_knows_the_environment_variable(monkeypatch, value, served):
    monkeypatch.setenv("DIFFDOCTOR_BACKEND", value)
    found = describe(OPS)["serves"]["cpu"]
    assert set(found) == set(OPS)
    assert all(said == served or (served.endswith(": ") and said.startswith(served)) for said in found.values())
    x = torch.ones(1, 1, 2, 2)
    if served.startswith("nothing: "):
        with pytest.raises((ValueError, BackendUnavailable)) as refused:
            diffdoctor.weighted_loss(x, x)
        assert found["weighted_loss"] == f"nothing: {refused.value}"
    else:
        diffdoctor.weighted_loss(x, x)


def test_env_prints_what_the_environment_variable_does(monkeypatch, capsys):
    monkeypatch.setenv("DIFFDOCTOR_BACKEND", "nope")
    command(["env"])
    assert "weighted_loss: nothing: DIFFDOCTOR_BACKEND: expected one of" in capsys.readouterr().out


@needs_cpu
@pytest.mark.parametrize("value", ["foo", "AVX2", "generic", ""])
def test_an_instruction_set_that_is_none_is_said_once(value, first_calls, tmp_path):
    said, used = first_calls.run("instruction_set", output=tmp_path / "said", DIFFDOCTOR_CPU_ISA=value).splitlines()
    warned = (tmp_path / "said.0.err").read_text()
    expected = f"DIFFDOCTOR_CPU_ISA: expected one of generic, avx2, avx512, got {value!r}; {used} is used"
    if value in ("generic", ""):
        assert said == "None"
        assert "DIFFDOCTOR_CPU_ISA" not in warned
    else:
        assert said == expected
        assert warned.count(expected) == 1


def test_an_instruction_set_that_is_not_there_is_said(monkeypatch):
    class Module:
        @staticmethod
        def instruction_set():
            return "avx2"

    monkeypatch.setenv("DIFFDOCTOR_CPU_ISA", "avx512")
    sentence = "DIFFDOCTOR_CPU_ISA: expected one that this CPU and this build have, got 'avx512'; avx2 is used"
    assert native._ignored_instruction_set(Module) == sentence
    monkeypatch.setenv("DIFFDOCTOR_CPU_ISA", "avx2")
    assert native._ignored_instruction_set(Module) is None


def test_import_is_light_and_touches_no_device(first_calls, tmp_path):
    assert first_calls.run("imports", output=tmp_path / "said") == "\n"


def test_without_the_compiled_module_the_reference_serves(first_calls, tmp_path):
    refused = first_calls.run("without_module", output=tmp_path / "said")
    assert "backend 'cpu' cannot be used here" in refused


def test_native_module_remembers_its_reason():
    module, reason = native.load(), native.reason()
    assert (module is None) == (reason is not None)
    assert native.load() is module
