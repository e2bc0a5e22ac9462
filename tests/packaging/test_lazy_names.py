"""Packages whose public names are imported when they are asked for."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

PACKAGES = ("diffdoctor.treat", "diffdoctor.detector", "diffdoctor.evaluate.model", "diffdoctor.repairs")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_public_name_is_never_a_module(name):
    # importing a module sets the package's attribute of its name, and the public name would be gone
    package = importlib.import_module(name)
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert modules
    assert not modules & set(package.__all__)


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_is_found(name):
    for module in ("diffusers", "peft", "accelerate", "transformers"):
        pytest.importorskip(module)
    package = importlib.import_module(name)
    assert set(package.__all__) <= set(dir(package))
    for public in package.__all__:
        assert callable(getattr(package, public)), public
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        _ = package.nothing


def test_a_package_brings_no_module_along():
    code = (
        f"import sys, importlib\nfor name in {PACKAGES}: importlib.import_module(name)\n"
        "print([name for name in sys.modules if name.startswith(('diffdoctor.treat.', 'diffdoctor.detector.'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_guide_is_the_function_from_everywhere():
    pytest.importorskip("diffusers")
    import diffdoctor
    from diffdoctor.treat import guide, guided_sampling

    assert guide is guided_sampling.guide is diffdoctor.guide
