"""Write the Triton kernels and the reference as a kernel repository of the Hugging Face Hub.

    python -m tools.hub --output dist/hub

`kernels.get_local_kernel(Path("dist/hub"))` then gives the public operations, without an installation of diffdoctor.
The sources are copied with their imports made relative and their operators in a namespace of this commit's, so that
several versions, and an installed diffdoctor, can be loaded beside each other.
"""

import argparse
import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("backends", "lowering", "ops", "reference")
# beside them: (in the repository, in the kernel)
FILES = (
    *((f"diffdoctor/{name}", name) for name in ("runs/__init__.py", "runs/errors.py", "version.py")),
    *((f"kernels/{path.name}", f"kernels/{path.name}") for path in sorted((ROOT / "kernels").glob("*.py"))),
)
# Triton's kernels and the reference serve tensors of both.
BACKENDS = ("cpu", "cuda")
LEFT_OUT = "a kernel repository of the Hub holds the Triton kernels and the reference alone"
INIT = '''"""The operations of diffdoctor: Triton kernels and the PyTorch reference."""

from . import ops as _ops
from .backends.select import available_backends
from .version import __version__

_public = _ops.public()
globals().update(_public)
__all__ = [*_public, "__version__", "available_backends"]
'''
CARD = """---
license: apache-2.0
library_name: kernels
tags: [kernels, triton, diffusion]
---
# diffdoctor

Losses of diffusion models weighted pixel by pixel, with their gradients in the same pass: `weighted_loss`,
`modulate_gradient`, `artifact_loss`, `policy_loss` and what they take. On CUDA tensors Triton kernels serve them, on
all others plain PyTorch. The CUDA and CPU kernels, detectors, treatment and evaluation are in the package diffdoctor.

```python
from kernels import get_kernel

diffdoctor = get_kernel("OWNER/diffdoctor", version=0, trust_remote_code=True)
loss = diffdoctor.weighted_loss(model_pred, target, confidence, artifact_weight=2.0)
```

Python 3.10, torch 2.8 and Triton 3.4 or newer. Made by `python -m tools.hub` from commit COMMIT.
"""


def write(output: Path, commit: str) -> None:
    """Write the repository into a folder, in place of one that stands there.

    Args:
        output: the folder.
        commit: of the sources, as `head` gives it; names the operators' namespace.

    Raises:
        SystemExit: the folder holds something else.
    """
    ours = (output / "build" / "torch-cpu" / "metadata.json").is_file()
    if output.exists() and not ours and (not output.is_dir() or any(output.iterdir())):
        sys.exit(f"--output {output}: expected a new folder or one that this command wrote, got other files in it")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        made = Path(temporary) / "hub"
        for backend in BACKENDS:
            write_variant(made / "build" / f"torch-{backend}", backend, f"_diffdoctor_{backend}_{commit}")
        (made / "README.md").write_text(CARD.replace("COMMIT", commit))
        shutil.copy(ROOT / "LICENSE", made)
        if output.exists():
            shutil.rmtree(output)
        made.rename(output)


def write_variant(folder: Path, backend: str, name: str) -> None:
    """Write one build variant: its sources, and the metadata by which `kernels` knows it."""
    sources = [(ROOT / source, target) for source, target in FILES]
    for package in PACKAGES:
        for path in (ROOT / "diffdoctor" / package).rglob("*.py"):
            sources.append((path, path.relative_to(ROOT / "diffdoctor").as_posix()))
    texts = {target: relative(path.read_text(encoding="utf-8"), target, name) for path, target in sources}
    texts["__init__.py"] = INIT
    texts["_build_info.json"] = json.dumps(
        {"requested": "none", "built": [], "left_out": dict.fromkeys(("cpu", "cuda"), LEFT_OUT)}, indent=2
    )
    digests = {}
    for target, text in sorted(texts.items()):
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        digests[target] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    metadata = {
        "name": "diffdoctor",
        "id": name,
        "version": 0,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def relative(text: str, target: str, name: str) -> str:
    """A source with imports relative to its place in the kernel, and operators in the namespace `name`."""
    up = "." * len(Path(target).parts)
    text = re.sub(r"^(\s*)from diffdoctor import ", rf"\1from {up} import ", text, flags=re.MULTILINE)
    text = re.sub(r"^(\s*)from diffdoctor\.", rf"\1from {up}", text, flags=re.MULTILINE)
    text = text.replace("torch.ops.diffdoctor.", f"torch.ops.{name}.").replace('"diffdoctor::', f'"{name}::')
    return text.replace('Library("diffdoctor"', f'Library("{name}"').replace(
        '"diffdoctor._native"', f'"{name}._native"'
    )


def head() -> str:
    """The checkout's commit in seven digits, with `_dirty` behind them where a file of it was changed."""
    commit, changes = (
        subprocess.run(["git", "-C", ROOT, *words], check=True, capture_output=True, text=True).stdout.strip()
        for words in (("rev-parse", "--short=7", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    )
    return f"{commit}_dirty" if changes else commit


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0."""
    command = argparse.ArgumentParser(prog="python -m tools.hub", description=__doc__)
    command.add_argument("--output", type=Path, default=ROOT / "dist" / "hub", help="folder (dist/hub)")
    options = command.parse_args(arguments)
    write(options.output.resolve(), head())
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
