"""The output of a run that is made in units: a folder, or a place in a store with a folder here beside it."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from diffdoctor.data.manifest import MANIFEST
from diffdoctor.data.store import is_url
from diffdoctor.data.store_cache import cache_folder, made_folder
from diffdoctor.data.store_path import StorePath, at
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.record import CONFIG, METRICS, RUN, RunFolder


def run_folder(output: str | Path, kind: str, identity: dict[str, Any], results, *, main: bool = True) -> RunFolder:
    """The output of a run, which may be a URL; see `RunFolder`."""
    made = StoreRun if is_url(output) else RunFolder
    return made(output, kind, identity, results, main=main)


class StoreRun(RunFolder):
    """The output of a run in a store. What the main process writes lies in a folder of this machine until it ends.

    A second run on this machine is refused, as in a folder; one on another machine does no harm, since each unit's
    commit is created exclusively.

    Args:
        url: of the output.
        kind: see `RunFolder`.
        identity: likewise.
        results: likewise.
        main: likewise.
    """

    def __init__(self, url: str, kind: str, identity: dict[str, Any], results, *, main: bool = True):
        self._place = at(url)
        folder = cache_folder() / "runs" / hashlib.sha256(self._place.url.encode()).hexdigest()[:16]
        advice = "choose another output or delete it"
        super().__init__(folder, kind, identity, results, advice=advice, main=main)

    @property
    def place(self) -> StorePath:
        """Where the work is committed."""
        return self._place

    def open(self) -> None:
        """Keep the folder to this process, and empty it: what counts is in the store."""
        if self.main:
            made_folder(f"runs/{self.path.name}")
        super().open()
        if self.main:
            self._empty()
            self._take_record()

    def _empty(self) -> None:
        for entry in self.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _take_record(self) -> None:
        try:
            (self.path / RUN).write_bytes((self.place / RUN).read_bytes())
        except FileNotFoundError:
            (self.path / RUN).unlink(missing_ok=True)

    def check(self, *, overwrite: bool = False) -> bool:
        """See `RunFolder.check`; errors name the URL."""
        try:
            return super().check(overwrite=overwrite)
        except UserError as error:
            raise UserError(str(error).replace(str(self.path), self.place.url)) from error

    def _present(self) -> str:
        """The results that lie in the store, as words."""
        names = {name.split("/")[0] for name in self.place.store.listing(self.place.url, deep=True)}
        # Of whatever was listed, run.json says whose it is: it was there first, if only since a moment ago.
        self._take_record()
        return ", ".join(name for name in self.results if any(fnmatch.fnmatchcase(each, name) for each in names))

    def begin(self, config: Any = None, *, overwrite: bool = False) -> list[str]:
        """Make the place this run's; see `RunFolder.begin`.

        Raises:
            UserError: see there; or another process has begun another run there.
        """
        known = self._record()
        self._seen = None  # that another machine has begun the same run since does no harm
        deleted = super().begin(config, overwrite=overwrite)
        store, record = self.place.store, (self.place / RUN).url
        if known is not None and self._differences(known):
            # Of a run of which nothing is there.
            store.write(record, (self.path / RUN).read_bytes())
        elif not store.create(record, (self.path / RUN).read_bytes()):
            theirs = json.loads(store.read(record))
            if self._differences(theirs):
                raise UserError(f"{self.place}: another process has begun another run there meanwhile")
        if config is not None:
            store.put(self.path / CONFIG, (self.place / CONFIG).url)
        return deleted

    def publish(self) -> None:
        """Put all that was written here into the store, the manifest and then metrics.json last."""
        files = sorted(path for path in self.path.rglob("*") if path.is_file() and path.name not in (RUN, CONFIG))
        last = {MANIFEST: 1, METRICS: 2}
        for path in sorted(files, key=lambda path: last.get(path.relative_to(self.path).as_posix(), 0)):
            self.place.store.put(path, (self.place / path.relative_to(self.path).as_posix()).url)

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None and self.main:
                self.publish()
            if self.main:
                self._empty()
        finally:
            self.close()
