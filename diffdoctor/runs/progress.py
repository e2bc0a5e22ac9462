"""Progress: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
import weakref

_displays: weakref.WeakSet = weakref.WeakSet()


class _PlainProgress:
    """Prints a line at the start, every `every` seconds, and at the end."""

    def __init__(self, total, desc, unit, every=15.0, file=None):
        self.total, self.desc, self.unit = total, desc, unit
        self.done, self.shown, self.resumed, self.note = 0, 0, 0, ""
        self.file = file or sys.stderr
        self.every = every
        self.started = self.printed = time.monotonic()

    def update(self, count=1):
        self.done += count
        now = time.monotonic()
        if now - self.started < 1:
            self.resumed = self.done  # of an earlier attempt: it says nothing of the speed
        if now - self.printed >= self.every:
            self.printed = now
            self._print()

    def set_postfix(self, **values):
        self.note = "  ".join(f"{name} {_short(value)}" for name, value in values.items())

    def close(self):
        if self.done > self.shown:
            self._print()

    def _print(self):
        self.shown = self.done
        of = f"/{self.total}" if self.total is not None else ""
        seconds = time.monotonic() - self.started
        line = f"{self.desc}: {self.done}{of} {self.unit} in {_duration(seconds)}"
        if self.total is not None and self.resumed < self.done < self.total:
            left = (self.total - self.done) * seconds / (self.done - self.resumed)
            line = f"{line}, about {_duration(left)} left"
        print(f"{line}  {self.note}".rstrip(), file=self.file, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _SilentProgress(_PlainProgress):
    def _print(self):
        pass


def _duration(seconds):
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def progress(total=None, *, desc, unit="step", enabled=True):
    """A progress display with `update(count)`, `set_postfix(**values)` and `close()`; also a context manager.

    On a terminal it is a tqdm bar on standard error; elsewhere (logs, pipes) one plain line every 15 seconds, with the
    time left, and one at the end. `total` is in `unit`s and may be None when it is not known; `enabled=False` prints
    nothing.
    """
    display = _display(total, desc, unit) if enabled else _SilentProgress(total, desc, unit)
    _displays.add(display)
    return display


def _display(total, desc, unit):
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            return tqdm(total=total, desc=desc, unit=unit, dynamic_ncols=True, leave=True)
    return _PlainProgress(total, desc, unit)


def close_displays() -> None:
    """Close what an error left open: a generator's display would say its last after the error."""
    for display in list(_displays):
        display.close()


def track(items, *, desc, unit="item", total=None, enabled=True):
    """Iterate over `items` under a `progress` display."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with progress(total, desc=desc, unit=unit, enabled=enabled) as bar:
        for item in items:
            yield item
            bar.update()


def quiet_loaders() -> None:
    """Silence the bars and notices of diffusers and transformers, which would bury the progress."""
    import diffusers
    import transformers

    for module in (diffusers, transformers):
        module.utils.logging.set_verbosity_error()
        module.utils.logging.disable_progress_bar()
