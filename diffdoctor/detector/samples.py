"""The samples of training steps: which pictures, freshly damaged or not, as a function of (seed, step, slot)."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from diffdoctor.data.mapped import CodedTexts
from diffdoctor.data.pictures import as_mask, resize_pair
from diffdoctor.detector.config import AugmentConfig
from diffdoctor.detector.damage.benign import benign
from diffdoctor.detector.damage.drawing import blur
from diffdoctor.detector.damage.injection import MIN_SIDE, NoVisibleDamage, inject
from diffdoctor.measures.pixels import refuse_zero_one
from diffdoctor.runs.errors import UserError, expected

if TYPE_CHECKING:
    import torch

    from diffdoctor.detector.block_plan import WeightedBlocks

# In a training mask, of a pixel that has no say in the loss.
NOT_DECIDED = -1.0


class DetectorData(Protocol):
    """A set of labelled pictures: `len(data)`, and `data[i]` as a dict.

    The dict holds `picture` (H, W, 3) uint8 and `mask` (H, W) float32 in [0, 1], and may hold `category`, `generator`,
    `prompt`, `label` (real, injected, human, pseudo), `round` and `ignore` (H, W) bool, where it is not decided. A set
    may also have `fingerprint()`, a text that differs between sets, so that a training does not resume with other data.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class ArrayData:
    """A set in memory.

    Args:
        pictures: (N, H, W, 3) uint8, or a sequence of (H, W, 3) uint8.
        masks: (N, H, W) in [0, 1] float or uint8 0..255, or a sequence of such; None: all pictures are clean.
        **fields: further columns of length N, such as category=[...], prompt=[...].

    Raises:
        ValueError: a column has another length; masks of uint8 that are 0 and 1, which would be 0 and 1/255; at
            `data[i]`, a picture or mask of another shape or dtype.
    """

    def __init__(
        self,
        pictures: np.ndarray | Sequence[np.ndarray],
        masks: np.ndarray | Sequence[np.ndarray] | None = None,
        **fields: Sequence,
    ):
        self.pictures, self.masks, self.fields = pictures, masks, fields
        for name, column in {"masks": masks, **fields}.items():
            if column is not None and len(column) != len(pictures):
                raise ValueError(expected(name, f"one entry for each of {len(pictures)} pictures", len(column)))
        if isinstance(masks, np.ndarray):
            refuse_zero_one(masks, "masks")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = np.asarray(self.pictures[index])
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            got = f"{picture.shape} {picture.dtype} at {index}"
            raise ValueError(expected("pictures", "(H, W, 3) uint8", got))
        mask = np.zeros(picture.shape[:2], np.float32) if self.masks is None else as_mask(self.masks[index])
        if mask.shape != picture.shape[:2]:
            raise ValueError(expected("masks", str(picture.shape[:2]), f"{mask.shape} at {index}"))
        return {"picture": picture, "mask": mask, **{name: column[index] for name, column in self.fields.items()}}


class JoinedData:
    """Several sets as one, or some of their pictures.

    Args:
        sets: the columns that all of them have (keys, categories, mask_max) are joined too, when they are asked for.
        chosen: (n,) indices into the joined set; None: all.
        shares: a positive number per set: in which proportion training draws from the sets, whatever their sizes; None:
            each set counts as much as it has pictures.

    Raises:
        ValueError: `shares` are not one positive number per set.
    """

    def __init__(
        self,
        sets: Sequence[DetectorData],
        chosen: np.ndarray | None = None,
        *,
        shares: Sequence[float] | None = None,
    ):
        self.sets = list(sets)
        self.shares = None if shares is None else [float(share) for share in shares]
        positive = all(0 < share < math.inf for share in self.shares or ())
        if self.shares is not None and (len(self.shares) != len(self.sets) or not positive):
            what = f"one positive number for each of {len(self.sets)} sets"
            raise ValueError(expected("shares", what, self.shares))
        self.ends = np.cumsum([len(each) for each in self.sets])
        total = int(self.ends[-1]) if len(self.ends) else 0
        self.chosen = np.arange(total) if chosen is None else np.asarray(chosen)
        self._is_all = chosen is None

    def __getattr__(self, name: str) -> np.ndarray:
        # Not kept: a column may be as large as the set is long.
        if name not in ("keys", "categories", "mask_max") or not self.sets:
            raise AttributeError(name)
        columns = [np.asarray(getattr(each, name)) for each in self.sets]
        column = columns[0] if len(columns) == 1 else np.concatenate(columns)
        return column if self._is_all else column[self.chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        joined_index = int(self.chosen[index])
        number = int(np.searchsorted(self.ends, joined_index, side="right"))
        return self.sets[number][joined_index - int(self.ends[number - 1] if number else 0)]

    @property
    def shard_numbers(self) -> np.ndarray:
        """(N,) a number for each picture, the same for those that follow one another in a shard.

        Raises:
            UserError: a set does not lie in shards.
        """
        parts, start = [], 0
        for each in self.sets:
            if not hasattr(each, "shards"):
                raise UserError(expected("order", "shuffled for a set that does not lie in shards", "blocks"))
            names = each.shards.codes if isinstance(each.shards, CodedTexts) else np.asarray(each.shards, object)
            changes = np.concatenate([[1], names[1:] != names[:-1]]) if len(names) else np.zeros(0)
            parts.append(start + np.cumsum(changes, dtype=np.int64))
            start += len(names)
        return np.concatenate(parts)[self.chosen]

    @property
    def numbers(self) -> np.ndarray:
        """(N,) the number of the set that each picture is from."""
        return np.searchsorted(self.ends, self.chosen, side="right")

    def fingerprint(self) -> str:
        """A hash of the sets, their shares and the chosen indices."""
        digest = hashlib.sha256(" ".join(map(str, map(fingerprint_of, self.sets))).encode())
        digest.update(np.ascontiguousarray(self.chosen).tobytes())
        if self.shares is not None:
            digest.update(repr(self.shares).encode())
        return digest.hexdigest()

    def where(self, chosen: np.ndarray) -> JoinedData:
        """The pictures that a boolean mask (N,) or an index array (n,) chooses."""
        return JoinedData(self.sets, self.chosen[chosen], shares=self.shares)


def fingerprint_of(data: DetectorData) -> str | int:
    """A set's `fingerprint()`, or its length where it has none."""
    return data.fingerprint() if hasattr(data, "fingerprint") else len(data)


def augment(
    picture: np.ndarray, mask: np.ndarray, config: AugmentConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Apply `AugmentConfig` to one picture and its mask.

    Args:
        picture: (H, W, 3) uint8.
        mask: (H, W) float32 in [0, 1], or negative where it is not decided.
        config: the augmentation.
        rng: of all draws.

    Returns:
        The changed picture and mask, of the same shapes and dtypes.

    Raises:
        UserError: the picture is too small to be damaged or changed.
    """
    if (config.inject_share or config.benign_share) and min(mask.shape) < MIN_SIDE:
        what = f"pictures of at least {MIN_SIDE} x {MIN_SIDE} pixels (or inject_share and benign_share 0)"
        raise UserError(expected("data", what, f"one of {mask.shape[0]} x {mask.shape[1]}; see training.size"))
    if not (mask > 0).any():
        if rng.uniform() < config.shrink_share:
            picture, mask = shrink_and_pad(picture, mask, rng)
        if rng.uniform() < config.inject_share:
            try:
                damaged = inject(picture, rng, config.kinds, config.strength, config.area, visible=config.visible)
                picture, mask = damaged.picture, np.where((mask < 0) & (damaged.mask == 0), mask, damaged.mask)
            except NoVisibleDamage:
                pass
        elif rng.uniform() < config.benign_share:
            picture = benign(picture, rng).picture
    if rng.uniform() < config.flip_share:
        picture, mask = picture[:, ::-1], mask[:, ::-1]
    if config.shift:
        picture, mask = _shift(picture, mask, config.shift, rng)
    if config.blur and rng.uniform() < 0.5:
        soft = blur(picture.astype(np.float32), rng.uniform(0.3, 1.0) * config.blur, truncate=3.0)
        picture = np.rint(soft).astype(np.uint8)
    if config.exposure or config.noise:
        values = picture.astype(np.float32) * (1 + config.exposure * rng.uniform(-1, 1))
        values += 255 * config.noise * rng.uniform() * rng.standard_normal(picture.shape, dtype=np.float32)
        picture = np.rint(np.clip(values, 0, 255)).astype(np.uint8)
    return picture, mask


def shrink_and_pad(picture: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Shrink a picture to 40..90 % and pad it back to its size at a random position with its mean border colour.

    Args:
        picture: (H, W, 3) uint8, clean.
        mask: (H, W) float32, 0, or negative where it is not decided.
        rng: of size and position.

    Returns:
        Picture and mask, of the same shapes; the padding is decided.
    """
    from PIL import Image

    height, width = picture.shape[:2]
    scale = rng.uniform(0.4, 0.9)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    small = np.asarray(Image.fromarray(picture).resize((w, h), Image.Resampling.BOX))
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    result = np.empty_like(picture)
    result[:] = np.rint(border.mean(axis=0)).astype(np.uint8)
    y, x = rng.integers(height - h + 1), rng.integers(width - w + 1)
    result[y : y + h, x : x + w] = small
    if (undecided := mask < 0).any():
        mask = np.zeros_like(mask)
        inside = np.asarray(Image.fromarray(undecided * np.float32(1)).resize((w, h), Image.Resampling.BOX)) > 0
        mask[y : y + h, x : x + w][inside] = NOT_DECIDED
    return result, mask


def _shift(picture: np.ndarray, mask: np.ndarray, share: float, rng: np.random.Generator):
    height, width = mask.shape
    dy, dx = (int(np.rint(rng.uniform(-share, share) * side)) for side in (height, width))
    rows = np.clip(np.arange(height) + dy, 0, height - 1)
    columns = np.clip(np.arange(width) + dx, 0, width - 1)
    return picture[rows][:, columns], mask[rows][:, columns]


class StepSamples:
    """The samples of every training step: slot i of step s is a function of (seed, s, i) alone.

    It is a map-style torch dataset whose index is (step, slot), so that workers and processes change nothing.

    Args:
        data: the labelled pictures.
        batch_size: pictures in a step, over all processes.
        seed: of all draws.
        config: augmentation.
        weights: (N,) sampling weights, as `balance.sampling_weights` gives them; None: shuffled passes over the data.
        size: side in pixels that every picture is resized to (squares); None: pictures keep their size and must agree.
        blocks: the order of the pictures, in place of `weights` and of shuffled passes.

    Raises:
        ValueError: no pictures, or weights that cannot be sampled from.
    """

    def __init__(
        self,
        data: DetectorData,
        batch_size: int,
        seed: int,
        config: AugmentConfig,
        weights: np.ndarray | None = None,
        size: int | None = None,
        blocks: WeightedBlocks | None = None,
    ):
        if not len(data):
            raise ValueError(expected("data", "at least one picture", "none"))
        self.data, self.batch_size, self.seed, self.config, self.size = data, batch_size, seed, config, size
        self.cumulative, self.blocks = None, blocks
        if weights is not None:
            weights = np.asarray(weights, np.float64)
            if (
                weights.shape != (len(data),)
                or not np.isfinite(weights).all()
                or weights.min() < 0
                or not weights.sum()
            ):
                what = f"{len(data)} finite weights >= 0 with a positive sum"
                raise ValueError(expected("weights", what, f"shape {weights.shape} with a sum of {weights.sum()}"))
            self.cumulative = np.cumsum(weights / weights.sum())
        self._pass = (-1, None)

    def index_of(self, step: int, slot: int) -> int:
        """Index in the data of the picture in this slot of this step."""
        if self.blocks is not None:
            return self.blocks.row(step * self.batch_size + slot)
        if self.cumulative is not None:
            draw = np.random.default_rng([self.seed, 1, step, slot]).uniform()
            return int(min(np.searchsorted(self.cumulative, draw, side="right"), len(self.data) - 1))
        number, offset = divmod(step * self.batch_size + slot, len(self.data))
        if self._pass[0] != number:
            self._pass = (number, np.random.default_rng([self.seed, 2, number]).permutation(len(self.data)))
        return int(self._pass[1][offset])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(picture (3, H, W) uint8, mask (1, H, W) float32) of (step, slot)."""
        step, slot = key
        rng = np.random.default_rng([self.seed, 3, step, slot])
        return training_pair(self.data[self.index_of(step, slot)], self.size, self.config, rng)


def training_pair(
    sample: dict[str, Any], size: int | None, config: AugmentConfig, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Resize and augment a sample for training; a clean one that a person labelled is not damaged.

    Args:
        sample: `picture` (H, W, 3) uint8 and `mask` (H, W), see `DetectorData`; `ignore` (H, W) bool where it is not
            decided what is broken.
        size: side in pixels of the square that they are resized to; None keeps their size.
        config: the augmentation.
        rng: of its draws.

    Returns:
        Picture (3, H, W) uint8 and mask (1, H, W) float32, negative where it is not decided.
    """
    import torch

    if sample.get("label") == "human":
        # somebody looked for what is broken: with damage put in, its sound parts would teach nothing new
        config = dataclasses.replace(config, inject_share=0.0)
    picture, mask = resize_pair(sample["picture"], as_mask(sample["mask"]), size)
    if sample.get("ignore") is not None:
        _, ignore = resize_pair(sample["picture"], as_mask(sample["ignore"]), size)
        mask = np.where(ignore > 0, np.float32(NOT_DECIDED), mask)
    picture, mask = augment(picture, mask, config, rng)
    # Copies: what augmentation returns may be a view with negative strides, or the caller's own array.
    picture, mask = np.array(picture.transpose(2, 0, 1), order="C"), np.array(mask[None], np.float32, order="C")
    return torch.from_numpy(picture), torch.from_numpy(mask)
