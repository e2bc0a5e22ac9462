"""`diffdoctor set dedup`: pictures that sets hold twice or nearly, and those of a test set among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffdoctor.data.columns import ParquetColumns, pyarrow_modules, write_parquet
from diffdoctor.data.store_path import absolute
from diffdoctor.data.text import readable
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import atomic_write_json
from diffdoctor.runs.record import METRICS, RunFolder, versions
from diffdoctor.runs.summary import print_summary
from diffdoctor.sets.config import SetDedupConfig
from diffdoctor.sets.duplicates import clusters_of
from diffdoctor.sets.opened import open_sets

DUPLICATES = "duplicates.parquet"


def run_set_dedup(config: SetDedupConfig) -> dict:
    """Run `diffdoctor set dedup`.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: a set cannot be read, or a picture of a test set is among the others.
    """
    sets = open_sets([*config.sets, *config.test])
    identity = {name: getattr(config, name) for name in ("sets", "test", "distance")}
    with RunFolder(config.output, "set dedup", identity, {DUPLICATES: None}) as run:
        run.check(overwrite=True)
        found = [each.identities() for each in sets]
        keys, uids, hashes = (np.concatenate(columns) for columns in zip(*found, strict=True))
        numbers = np.repeat(np.arange(len(sets)), [len(columns[0]) for columns in found])
        is_test = numbers >= len(config.sets)
        # The lowest uid comes first, and so is what is kept of a cluster; test pictures are all kept.
        order = np.lexsort((numbers, uids.astype(str)))
        clusters = np.empty(len(order), np.int64)
        clusters[order] = order[clusters_of(uids[order], hashes[order], config.distance)]
        kept = is_test.copy()
        training = order[~is_test[order]]
        kept[training[np.unique(clusters[training], return_index=True)[1]]] = True
        leaks = ~is_test & np.isin(clusters, clusters[is_test])
        exact = len(uids[~is_test]) - len(np.unique(uids[~is_test].astype(str)))
        metrics = {
            "pictures": int((~is_test).sum()),
            "test_pictures": int(is_test.sum()),
            "equal": exact,
            "superfluous": int((~kept).sum()),
            "leaks": int(leaks.sum()),
            "largest_cluster": int(np.bincount(clusters).max()) if len(clusters) else 0,
            "versions": versions(),
        }
        run.begin(config, overwrite=True)
        folders = np.array([readable(absolute(each.folder)) for each in sets], object)[numbers]
        _write(run.path / DUPLICATES, folders, keys, clusters, kept)
        atomic_write_json(run.path / METRICS, metrics)
    line = f"{metrics['superfluous']} of {metrics['pictures']} pictures are superfluous, {exact} of them equal"
    print_summary(f"{line}: {run.path / DUPLICATES}")
    if leaks.any():
        first = int(np.flatnonzero(leaks)[0])
        what = "no picture, or near-duplicate, of a test set among the others"
        raise UserError(expected("test", what, f"{metrics['leaks']}, such as {keys[first]} in {folders[first]}"))
    return metrics


def _write(path: Path, folders: np.ndarray, keys: np.ndarray, clusters: np.ndarray, kept: np.ndarray) -> None:
    """Write a row for each picture that is in a cluster with others."""
    pa, _ = pyarrow_modules()
    several = np.bincount(clusters, minlength=len(clusters))[clusters] > 1
    columns = {"set": folders, "key": keys.astype(str), "cluster": clusters, "kept": kept.astype(np.int8)}
    write_parquet(path, pa.table({name: pa.array(column[several]) for name, column in columns.items()}))


def superfluous(folder: str | Path) -> dict[str, set[str]]:
    """{absolute path of a set, as Unicode: keys} of the pictures that another one makes superfluous.

    Args:
        folder: output folder of `set dedup`.

    Raises:
        UserError: it is none.
    """
    with ParquetColumns(Path(folder) / DUPLICATES) as table:
        sets, keys = table.texts("set", longest=2**15), table.texts("key", longest=1024)
        kept = table.numbers("kept")
    found: dict[str, set[str]] = {}
    for name, key in zip(sets[kept == 0], keys[kept == 0], strict=True):
        found.setdefault(name, set()).add(key)
    return found
