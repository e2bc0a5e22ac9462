"""Builds the native module with CMake; see docs/install.md for DIFFDOCTOR_BUILD."""

import importlib.util
import pathlib

from setuptools import Extension, find_packages, setup

here = pathlib.Path(__file__).resolve().parent
# build_native.py lies beside this file and is not on sys.path under PEP 517.
spec = importlib.util.spec_from_file_location("build_native", here / "csrc" / "build_native.py")
build_native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_native)

native = build_native.requested() != "none"
setup(
    packages=[*find_packages(include=["diffdoctor", "diffdoctor.*"]), "diffdoctor.kernels"],
    package_dir={"diffdoctor.kernels": "kernels"},
    package_data={
        "diffdoctor": ["_build_info.json"],
        "diffdoctor.viz": ["*.html"],
        "diffdoctor.annotate": ["static/*"],
        "diffdoctor.evaluate.compare": ["static/*"],
        "diffdoctor.web": ["static/*"],
    },
    ext_modules=[Extension("diffdoctor._native", sources=[], optional=True)] if native else [],
    cmdclass={"build_ext": build_native.BuildNative, "build_py": build_native.BuildPython},
)
