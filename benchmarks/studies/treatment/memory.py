"""The most memory that a process held inside a block, beyond what it held before."""

import gc
import resource
import sys


class PeakMemory:
    """Context manager; `mib` afterwards is the block's peak of resident memory less what was resident at its start.

    Linux's high-water mark is reset at the start. Where that cannot be, the mark is the process's so far, so that the
    block has to be what needs most in it: the study gives every part a process of its own.
    """

    mib = 0.0

    def __enter__(self):
        # what only waits to be collected would hide as much of the block's own memory
        gc.collect()
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:
            pass
        self._before = _resident("VmRSS")
        return self

    def __exit__(self, *_):
        self.mib = max(0.0, _resident("VmHWM") - self._before)


def _resident(name: str) -> float:
    """VmRSS (now) or VmHWM (the peak) in MiB; the peak where the system does not tell the two apart."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(name + ":"):
                    return int(line.split()[1]) / 1024
    except OSError:
        pass
    # kilobytes, but bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
