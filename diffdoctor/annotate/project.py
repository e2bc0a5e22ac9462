"""A project's folder: its settings, its guidelines, and the pictures that its database names."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np

from diffdoctor.annotate.store import Store
from diffdoctor.data.codec import UnreadablePicture, decode
from diffdoctor.data.identity import picture_uid
from diffdoctor.data.store import is_url
from diffdoctor.data.store_path import at
from diffdoctor.data.text import read_text
from diffdoctor.measures.pixels import FLAG_CONFIDENCE
from diffdoctor.runs.errors import UserError, check_least, expected, missing_extra
from diffdoctor.runs.files import atomic_write_text
from diffdoctor.runs.record import CONFIG, write_config

GUIDELINES = "guidelines.md"
_MOST_TEXT = 2**20
_FIRST_GUIDELINES = """# What to mark

Mark every pixel of what is broken, as a viewer would point it out: melted hands, extra or missing limbs, scrambled
letters, textures that belong to nothing.

- Mark the whole broken thing, not its rim alone; a rough outline is enough.
- Style, blur of the background and an odd composition are not broken.
- What you cannot decide: `ignore here`.
- Nothing broken: `clean`. A picture that cannot be judged at all: `unusable`.
"""


@dataclasses.dataclass
class ProjectSettings:
    """A project's `config.yaml`, to be edited by hand.

    Attributes:
        threshold: confidence from which a pixel of the detector's map is proposed, in (0, 1].
        lease_seconds: how long a task is a rater's alone after the last sign of work on it.
        training: tasks of known truth that a new rater gets first.
        gold_window: last gold tasks of a rater that are looked at.
        gold_share: of these that must be right; below it the rater is paused.
        gold_marked: clean gold pictures among these that a rater may mark before being paused, less one.
    """

    threshold: float = FLAG_CONFIDENCE
    lease_seconds: float = 600.0
    training: int = 10
    gold_window: int = 20
    gold_share: float = 0.7
    gold_marked: int = 2

    def __post_init__(self):
        check_least(self, lease_seconds=1, training=0, gold_window=1, gold_marked=1)
        if not 0 < self.threshold <= 1:
            raise UserError(expected("threshold", "a number in (0, 1]", self.threshold))
        if not 0 <= self.gold_share <= 1:
            raise UserError(expected("gold_share", "a share in [0, 1]", self.gold_share))

    @property
    def threshold_byte(self) -> int:
        """The smallest byte of an 8-bit map that is proposed, in 1..255."""
        return max(1, int(np.ceil(self.threshold * 255)))


class Project:
    """An annotation project.

    Args:
        folder: of the project.
        create: make it where there is none.

    Attributes:
        settings: from config.yaml.
        store: the database.

    Raises:
        UserError: see `Store`; or config.yaml is not as `ProjectSettings`.
    """

    def __init__(self, folder: str | Path, *, create: bool = False):
        if is_url(folder):
            raise UserError(expected("project", "a folder", folder))
        self.folder = Path(folder)
        if create:
            try:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None
        self.store = Store(self.folder, create=create)
        if create and not (self.folder / CONFIG).exists():
            write_config(self.folder, ProjectSettings())
        if create and not (self.folder / GUIDELINES).exists():
            atomic_write_text(self.folder / GUIDELINES, _FIRST_GUIDELINES)
        self.settings = self._settings()

    def _settings(self) -> ProjectSettings:
        try:
            import yaml
        except ImportError:
            raise missing_extra("pyyaml", "stages") from None
        path = self.folder / CONFIG
        try:
            values = yaml.safe_load(read_text(path, limit=_MOST_TEXT)) or {}
            return ProjectSettings(**values)
        except (yaml.YAMLError, TypeError) as error:
            names = ", ".join(field.name for field in dataclasses.fields(ProjectSettings))
            raise UserError(expected(path, f"a mapping of {names}", str(error).splitlines()[0])) from None

    def guidelines(self) -> tuple[str, str]:
        """The text that raters are shown, and its sha256."""
        path = self.folder / GUIDELINES
        text = read_text(path, limit=_MOST_TEXT) if path.exists() else ""
        return text, hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def picture(self, picture_id: int) -> np.ndarray:
        """A picture (H, W, 3) uint8, as it was added.

        Raises:
            UserError: its file is gone or has been replaced.
        """
        row = self.store.one("SELECT uid, place FROM picture WHERE id = ?", picture_id)
        place = json.loads(row["place"])
        try:
            picture = read_place(place)
        except (UnreadablePicture, OSError) as error:
            raise UserError(f"{place['file']}: can no longer be read ({error})") from error
        if picture_uid(picture) != row["uid"]:
            raise UserError(f"{place['file']}: is not the picture that was added; put that one back")
        return picture


def read_place(place: dict) -> np.ndarray:
    """The picture (H, W, 3) uint8 at a place.

    Args:
        place: `file`; of a shard's picture `offset` and `size` of its member; `crop`: [x0, y0, x1, y1] of a part.

    Raises:
        UnreadablePicture, OSError: it cannot be read.
    """
    source: bytes | str = place["file"]
    if "offset" in place:
        with at(place["file"]).open("rb") as file:
            file.seek(place["offset"])
            source = file.read(place["size"])
    picture = decode(source, "RGB")
    if "crop" in place:
        x0, y0, x1, y1 = place["crop"]
        picture = np.ascontiguousarray(picture[y0:y1, x0:x1])
    return picture
