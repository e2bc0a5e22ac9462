"""Every score of every generated picture, as one Parquet file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from diffdoctor.data.columns import pyarrow_modules, write_parquet
from diffdoctor.evaluate.model.store import PICTURES, TABLE, PictureFiles
from diffdoctor.evaluate.model.summary import PictureMeasures
from diffdoctor.measures.pixels import is_flagged

if TYPE_CHECKING:
    from diffdoctor.data.prompts import Prompt

_SCORES = ("judge", "detector", "clip_score", "preference", "vqa", "right")


def write_table(
    folder: Path,
    prompt: Callable[[int], Prompt],
    seed: int,
    before: PictureMeasures,
    after: PictureMeasures,
    picture_type: str = "png",
    questions: Callable[[str], list[str]] | None = None,
) -> Path:
    """Write pictures.parquet: a row for each generated picture, two for each index.

    Columns: `index`, `side` (before or after), `file` (below the evaluation's folder), `prompt`, `category`, `label`,
    `seed`, `flagged` (by the judge), and of `judge`, `detector`, `clip_score`, `preference`, `vqa` and `right` those
    that were measured, as in `PictureMeasures`; where questions were asked, lists of `questions` and `answers`.

    Args:
        folder: of the evaluation.
        prompt: callable from a picture's index to its prompt.
        seed: of the first picture.
        before: measures of the pictures before the treatment.
        after: measures of the same pictures after it.
        picture_type: of their files.
        questions: from a prompt to what was asked about it; None: nothing was.
    """
    pa, _ = pyarrow_modules()
    tables = []
    for side, measures in (("before", before), ("after", after)):
        indices = range(len(measures.judge))
        files = PictureFiles(folder / PICTURES / side, picture_type)
        prompts = [prompt(index) for index in indices]
        columns = {
            "index": list(indices),
            "side": pa.array([side] * len(indices)),
            "file": [files.path(index).relative_to(folder).as_posix() for index in indices],
            "prompt": pa.array([p.text for p in prompts], pa.string()),
            "category": pa.array([p.category for p in prompts], pa.string()),
            "label": pa.array([p.label for p in prompts], pa.string()),
            "seed": [seed + index for index in indices],
            "flagged": is_flagged(measures.judge).numpy(),
        }
        scores = {name: getattr(measures, name) for name in _SCORES}
        columns |= {name: values.numpy() for name, values in scores.items() if values is not None}
        if questions is not None and measures.answers is not None:
            asked = [questions(p.text) for p in prompts]
            answers = [row[: len(each)] for row, each in zip(measures.answers.tolist(), asked, strict=True)]
            columns["questions"] = pa.array(asked, pa.list_(pa.string()))
            columns["answers"] = pa.array(answers, pa.list_(pa.float32()))
        tables.append(pa.table(columns))
    path = folder / TABLE
    write_parquet(path, pa.concat_tables(tables))
    return path
