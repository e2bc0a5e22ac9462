"""The CUDA kernels on the CPU, launched from several threads under the compilers' sanitizers."""

import pytest

from support.cuda_shim import ROOT, build_race, compiler, run


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"), ("-fsanitize=thread", "-DCUDA_SHIM_THREADS")],
    ids=["address-undefined", "thread"],
)
def test_sanitizers_find_nothing(tmp_path, flags):
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    try:
        run(compiler(), *flags[:1], probe, "-o", tmp_path / "probe")
        run(tmp_path / "probe")
    except pytest.fail.Exception as error:
        pytest.skip(f"this compiler cannot build or run {flags[0]}: {str(error).splitlines()[-1]}")
    # Optimising would take twice as long as all the rest, and hide accesses from the sanitizers.
    assert "all equal" in run(build_race(*flags, "-O0", "-g1"), cwd=ROOT)
