"""The term of the treatment's loss that comes from the pipeline's own training pairs."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from diffdoctor.data.pictures import to_images
from diffdoctor.detector.confidence import by_frame, confidence_of
from diffdoctor.ops.weighted_loss import weighted_loss
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.progress import progress
from diffdoctor.treat.checks import check_finite
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.encoded_prompts import EncodedPrompts
from diffdoctor.treat.methods import METHODS
from diffdoctor.treat.rows import RowStore
from diffdoctor.treat.sampling import Sampling

Pair = tuple[np.ndarray, str]
Seen = Callable[[list[int], torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass
class OfflinePairs:
    """The pipeline's own N (picture, prompt) pairs, encoded and diagnosed once.

    Attributes:
        encoded: rows of latents (C, h, w) and of keep (1, H, W) uint8: 1 where the training picture may teach, 0 where
            it is flagged; (C, t, h, w) and (1, T, H, W) of videos.
        prompt_rows: (N,) the row of `prompts` of each pair's prompt.
        prompts: the distinct ones, without guidance.
        mask_rows: (N,) the row whose mask each pair has; None: its own.
    """

    encoded: RowStore
    prompt_rows: torch.Tensor
    prompts: EncodedPrompts
    mask_rows: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.encoded)

    def take(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (M, C, h, w) and masks (M, 1, H, W) in {0, 1} of the pairs at index (M,)."""
        found = self.encoded.take(index)
        masks = found["keep"] if self.mask_rows is None else self.encoded.take(self.mask_rows[index])["keep"]
        return found["latents"], masks.float()


def offline_weight(config: TreatConfig) -> float:
    """The weight of the offline term in the loss: 1 where the method samples nothing, since it is all there is."""
    method = METHODS[config.method]
    return method.offline_weight if config.offline_weight is None or not method.samples else config.offline_weight


def with_anchor(config: TreatConfig, offline: PairSource | None) -> TreatConfig:
    """The options with `anchor_weight` and `kl_weight`, where they leave them open.

    Without pairs nothing else holds the method to what its model could do before.

    Args:
        config: of the treatment.
        offline: its pairs; None: none.
    """
    left_open = [name for name in ("anchor_weight", "kl_weight") if getattr(config, name) is None]
    method = METHODS[config.method]
    return replace(config, **{name: getattr(method, name) if offline is None else 0.0 for name in left_open})


class PairSource:
    """Pairs that can be read again and again, and are never held as a whole.

    Args:
        pairs: gives (picture, prompt) from the first to the last, at each call.
        names: of the pairs, filled while they are read; None: they have none.
        facts: gives what identifies each pair where that costs less than to read it; None: its pixels do.
        chosen: gives the samples of some names alone; None: all are read for them.
    """

    def __init__(
        self,
        pairs: Callable[[], Iterable[Pair]],
        names: list[str] | None = None,
        facts: Callable[[], Iterable[bytes]] | None = None,
        chosen: Callable[[set[str]], Iterable[dict]] | None = None,
    ):
        self._pairs, self._names, self._facts, self._chosen = pairs, names, facts, chosen

    def digest(self) -> str:
        """A hash of all pairs."""
        found = hashlib.sha256()
        if self._facts is not None:
            for fact in self._facts():
                found.update(fact)
            return found.hexdigest()
        for picture, prompt in self:
            found.update(repr((picture.shape, prompt)).encode("utf-8"))
            found.update(np.ascontiguousarray(picture))
        return found.hexdigest()

    def named(self, wanted: set[str]) -> Iterator[tuple[str, np.ndarray]]:
        """(name, picture (H, W, 3) uint8) of the pairs of these names, and perhaps of others; of a video the frame in
        its middle."""
        if self._chosen is not None:
            found = ((sample["name"], sample["picture"]) for sample in self._chosen(wanted))
        else:
            found = ((self.name(number), picture) for number, (picture, _) in enumerate(self))
        for name, picture in found:
            yield name, picture if picture.ndim == 3 else picture[len(picture) // 2]

    def name(self, number: int) -> str:
        """What the pair of this number is called, once it has been read; its number where it has no name."""
        return self._names[number] if self._names and self._names[number] else f"{number:06d}"

    def __iter__(self) -> Iterator[Pair]:
        found, frames = False, None
        for picture, prompt in self._pairs():
            found = True
            if picture.dtype != np.uint8 or picture.ndim not in (3, 4) or picture.shape[-1] != 3:
                what = "uint8 pictures (H, W, 3) or videos (T, H, W, 3)"
                raise UserError(expected("offline", what, f"{picture.dtype} {picture.shape}"))
            frames = picture.shape[:-3] if frames is None else frames
            if picture.shape[:-3] != frames:
                what = "pictures alone, or videos of one length"
                raise UserError(expected("offline", what, f"{_in_words(frames)} and {_in_words(picture.shape[:-3])}"))
            yield picture, str(prompt)
        if not found:
            raise UserError(expected("offline", "as many pictures as prompts, and at least one", "0 and 0"))


def _in_words(frames: tuple[int, ...]) -> str:
    return f"a video of {frames[0]} frames" if frames else "a picture"


def checked_pairs(offline, config: TreatConfig) -> PairSource | None:
    """The offline argument of `treat` as pairs, or None where the treatment has no use for them.

    Args:
        offline: (pictures uint8 (N, H, W, 3), prompts), or dicts with "picture" (H, W, 3) uint8 and "prompt": a
            sequence, or whatever can be iterated over again and again; None: there are none. Videos have T frames
            before H. It may have `facts` and `chosen`, see `PairSource`.
        config: says whether they are needed.

    Raises:
        UserError: if they are needed and missing or empty, or the two differ in length.
    """
    optional = config.offline_weight is None and not METHODS[config.method].needs_pairs
    if offline_weight(config) == 0 or (offline is None and optional):
        return None
    if offline is None:
        raise UserError(expected("offline", "(pictures, prompts) pairs, since offline_weight > 0", None))
    if isinstance(offline, tuple):
        pictures, prompts = offline
        if len(pictures) != len(prompts) or not len(pictures):
            counts = f"{len(pictures)} and {len(prompts)}"
            raise UserError(expected("offline", "as many pictures as prompts, and at least one", counts))
        return PairSource(lambda: zip(pictures, prompts, strict=True))
    if iter(offline) is offline:
        what = "pairs that can be read more than once, such as a list or a dataset"
        raise UserError(expected("offline", what, type(offline).__name__))
    names: list[str] = []
    more = (getattr(offline, name, None) for name in ("facts", "chosen"))
    return PairSource(lambda: _named_pairs(offline, names), names, *more)


def _named_pairs(samples, names: list[str]) -> Iterator[Pair]:
    for number, sample in enumerate(_each(samples)):
        if number == len(names):
            names.append(str(sample.get("name") or ""))
        yield sample["picture"], sample["prompt"]


def _each(samples) -> Iterator[dict]:
    # a dataset of PyTorch need not raise IndexError beyond its end
    if hasattr(samples, "__len__") and hasattr(samples, "__getitem__"):
        return (samples[index] for index in range(len(samples)))
    return iter(samples)


@torch.no_grad()
def prepare_offline(
    sampling: Sampling,
    pairs: Iterable[Pair],
    config: TreatConfig,
    *,
    store: Callable[[str], RowStore],
    height: int,
    width: int,
    device: torch.device,
    chunk: int,
    show: bool = False,
) -> OfflinePairs:
    """Encode and diagnose the offline pairs.

    Args:
        sampling: its family encodes, its detector diagnoses.
        pairs: from `checked_pairs`.
        config: of the masks.
        store: makes an empty store of a name.
        height: of the pictures, in pixels; those of another size are resized, after a crop at the centre to its
            proportions.
        width: as height.
        device: where the networks are.
        chunk: pictures at a time.
        show: whether to show bars.
    """
    family, encoded = sampling.family, store("pairs")
    row_of: dict[str, int] = {}
    rows: list[int] = []

    def encode(part: Sequence[Pair]) -> dict[str, torch.Tensor]:
        pictures = [picture for picture, _ in part]
        if pictures[0].ndim == 4:
            family.frame_count(len(pictures[0]))
        batch = resized_images(pictures, height, width).to(device)
        latents = family.encode(batch).float().cpu()
        check_finite(family, latents, "encodes the offline pictures")
        return {"latents": latents, "keep": keep_mask(sampling, batch, config).to("cpu", torch.uint8)}

    with progress(desc="offline pairs", unit="pair", enabled=show) as bar:
        remaining = iter(pairs)
        while part := list(itertools.islice(remaining, chunk)):
            rows += [row_of.setdefault(prompt, len(row_of)) for _, prompt in part]
            encoded.add(len(part), lambda part=part: encode(part))
            bar.update(len(part))
    prompts = EncodedPrompts(
        family,
        list(row_of),
        store("captions"),
        batch_size=config.encode_batch_size,
        device=device,
        show=show,
        guidance_scale=1.0,
        height=height,
        width=width,
    )
    order = None
    if config.map_source == "shuffled":
        order = _other_rows(len(rows), config.seed)
    return OfflinePairs(encoded, torch.tensor(rows), prompts, order)


def _other_rows(count: int, seed: int) -> torch.Tensor:
    """(count,) for each row a random other one, each once: one cycle through all of them."""
    cycle = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(1))


def offline_term(
    sampling: Sampling,
    pairs: OfflinePairs,
    *,
    draws: Sequence[int],
    total: int,
    seen: Seen | None = None,
) -> torch.Tensor:
    """The denoising loss on some of the pairs, with a graph.

    Each draw chooses its own pair, time and noise, so that several processes together compute what one would.

    Args:
        sampling: its family predicts, its sampler says which times and targets.
        pairs: to choose from.
        draws: seeds, one per chosen pair.
        total: what the sum over the chosen pairs is divided by.
        seen: told of the chosen pairs' numbers, and for each its loss (mean over what is not masked out), the share of
            its picture that is masked out, and its noise level in [0, 1].
    """
    family = sampling.family
    # not the denoiser's: FSDP may keep its weights on the CPU
    device = pairs.prompts.device
    generators = [torch.Generator().manual_seed(seed) for seed in draws]
    index = torch.stack([torch.randint(len(pairs), (), generator=generator) for generator in generators])
    latents, mask = pairs.take(index)
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators]).to(device)
    uniform = torch.stack([torch.rand((), generator=generator) for generator in generators])
    pair = sampling.sampler.training_pair(latents.to(device), noise, uniform, sampling.own_times)
    model_input, timesteps, target = pair
    inputs = pairs.prompts.rows(pairs.prompt_rows[index]).positive
    prediction = family.run_denoiser(model_input, timesteps, inputs)
    kept = mask.flatten(1).mean(1)
    mask = family.maps_for_latents(mask.to(device))
    loss = weighted_loss(prediction, target, mask=mask, reduction="sample")
    if seen is not None:
        seen(index.tolist(), loss.detach() / kept.clamp_min(1e-3).to(device), 1 - kept, uniform)
    return loss.sum() / total


def keep_mask(sampling: Sampling, pictures: torch.Tensor, config: TreatConfig) -> torch.Tensor:
    """(B, 1, H, W), 0 where pictures (B, 3, H, W) are flagged, with a rim, 1 where they may teach; of videos too."""
    if config.map_source == "uniform":
        return torch.ones(len(pictures), 1, *pictures.shape[2:])
    maps = confidence_of(sampling.detector, pictures, frames_per_call=sampling.frames_per_call)
    flagged, reach = (maps >= config.offline_confidence).float(), config.offline_dilation
    if reach:
        flagged = by_frame(lambda frames: F.max_pool2d(frames, 2 * reach + 1, 1, reach), flagged)
    return 1 - flagged


def resized_images(pictures: Sequence[np.ndarray], height: int, width: int) -> torch.Tensor:
    """Pictures uint8 (H, W, 3) as (B, 3, height, width) in [0, 1], resized where they are of another size.

    Those of other proportions are cropped at their centre: squeezed ones would teach the model to squeeze. Videos
    (T, H, W, 3) as (B, 3, T, height, width).
    """
    batch = []
    for picture in pictures:
        is_video = np.ndim(picture) == 4
        image = to_images(np.asarray(picture) if is_video else [np.asarray(picture)])
        if image.shape[2:] != (height, width):
            image = _cropped(image, height, width)
            image = F.interpolate(image, (height, width), mode="bilinear", align_corners=False, antialias=True)
        batch.append(image.transpose(0, 1)[None] if is_video else image)
    return torch.cat(batch)


def _cropped(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The largest part (B, C, h, w) of images, about their centre, in the proportions of height and width."""
    h, w = image.shape[2:]
    rows, columns = min(h, max(1, round(w * height / width))), min(w, max(1, round(h * width / height)))
    top, left = (h - rows) // 2, (w - columns) // 2
    return image[:, :, top : top + rows, left : left + columns]
