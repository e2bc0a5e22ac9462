"""Runs a command in a child for each line of standard input, so that what it imports is imported once.

Prints each child's pid, and when it has ended its exit code, or minus the signal that killed it.
"""

import os
import sys

import diffdoctor.evaluate.compare.server  # noqa: F401
from diffdoctor.cli import main

for _ in sys.stdin:
    child = os.fork()
    if not child:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
