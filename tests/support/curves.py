"""TensorBoard's curves as they would be shown."""

import os
import shutil
import tempfile


def events_of(folder, **sizes):
    """The events of a run's files, loaded in the order in which the files were last written.

    TensorBoard takes them in the order of their names, which begin with the second and go on with the process and a
    count: files of one second need not be in their order.

    Args:
        folder: a pathlib.Path.
        sizes: events to keep of each kind, 0 for all; see EventAccumulator.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    with tempfile.TemporaryDirectory() as ordered:
        for number, path in enumerate(files):
            shutil.copy(path, os.path.join(ordered, f"events.out.tfevents.{number:010d}"))
        events = EventAccumulator(ordered, size_guidance=sizes)
        events.Reload()
    return events
