"""How long OpenMP's idle threads spin before they sleep; imports nothing, since it must run before torch is imported.

PyTorch's OpenMP on Linux, libgomp, lets an idle thread spin for a few milliseconds after each parallel region. With
another program on the same cores the threads then wait for one another, and a small training step takes 5 to 10 times
as long. libgomp reads the variable once, when torch loads it.
"""

import os
import sys
from collections.abc import MutableMapping, Sequence

SPIN_COUNT = "10000"


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let idle threads sleep early, here and in child processes, unless the user has chosen.

    Args:
        environment: gets GOMP_SPINCOUNT where it has neither that nor OMP_WAIT_POLICY.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def is_own_program(argv: Sequence[str], original: Sequence[str]) -> bool:
    """Whether this process is one of diffdoctor's programs, rather than a user's that imports the package.

    Args:
        argv: `sys.argv`, perhaps while the package of `python -m` is still being imported.
        original: `sys.orig_argv`.
    """
    if not argv:
        return False
    if argv[0] != "-m":
        return os.path.splitext(os.path.basename(argv[0]))[0] == "diffdoctor"
    # The module of `python -m` is the word before the program's own, perhaps behind its option: -mdiffdoctor.
    word = original[-len(argv)] if len(original) >= len(argv) else ""
    module = word.partition("m")[2] if word.startswith("-") else word
    return module.split(".")[0] == "diffdoctor"


def limit_spinning_of_own_programs() -> None:
    """`limit_spinning` in the command line and its siblings; a user's own program is left as it is."""
    if is_own_program(getattr(sys, "argv", ()), getattr(sys, "orig_argv", ())):
        limit_spinning()
