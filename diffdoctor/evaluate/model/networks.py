"""The networks that measure pictures beside the detectors: features for FID and variance, CLIP, a classifier.

Nothing is downloaded but what is named by its hub id.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from diffdoctor.data.pictures import to_images
from diffdoctor.runs.errors import UserError, expected, first_line
from diffdoctor.training.devices import device_of
from diffdoctor.training.pretrained import load_from_transformers, load_processor, load_script

INCEPTION_SIZES = (64, 192, 768, 2048)
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
THUMBNAIL = 8


@dataclass
class FeatureNetwork:
    """A network whose features FID and variance are taken from.

    Attributes:
        name: for reports.
        extract: callable from uint8 pictures (B, 3, H, W) on the network's device to features (B, D).
        module: the network that must be on that device; None: none.
        note: a caveat for the report; empty: none.
    """

    name: str
    extract: Callable[[torch.Tensor], torch.Tensor]
    module: torch.nn.Module | None = None
    note: str = ""

    def to(self, device: torch.device) -> FeatureNetwork:
        """Move the network."""
        if self.module is not None:
            self.module.to(device)
        return self

    @torch.no_grad()
    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features (B, D), float32 on the CPU, of uint8 pictures (B, 3, H, W)."""
        if self.module is not None:
            pictures = pictures.to(device_of(self.module))
        return self.extract(pictures).float().cpu()


class Clip:
    """Pictures and prompts in one space, by a CLIP model of transformers.

    Args:
        source: a folder or a hub id.
        processor: the same of its processor, where the model's own files have none.

    Raises:
        UserError: there is no such model.
    """

    option = "--clip"

    def __init__(self, source: str, processor: str | None = None):
        self.source, option = source, self.option
        own = None if processor else "AutoProcessor"
        self.model, self.processor = load_from_transformers(option, source, "AutoModel", own)
        if processor:
            self.processor = load_processor(f"{option}_processor", processor)
        if not (hasattr(self.model, "get_image_features") and hasattr(self.model, "get_text_features")):
            what = "a model of pictures and texts such as CLIP"
            raise UserError(expected(f"{option} {source}", what, type(self.model).__name__))

    def to(self, device: torch.device) -> Clip:
        """Move the model."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, D) of uint8 pictures (B, 3, H, W)."""
        inputs = _prepared(self.processor, pictures, self.model.device)
        return _tensor(self.model.get_image_features(pixel_values=inputs)).float()

    @torch.no_grad()
    def prompts(self, prompts: list[str]) -> torch.Tensor:
        """Embeddings (B, D) of prompts, cut at the model's token limit."""
        # SigLIP was trained on padded texts; CLIP's embeddings do not depend on padding.
        options = {"padding": "max_length", "truncation": True, "max_length": self._token_limit()}
        tokens = self.processor(text=prompts, return_tensors="pt", **options)
        return _tensor(self.model.get_text_features(**tokens.to(self.model.device))).float()

    def _token_limit(self) -> int | None:
        # That of a tokenizer whose files state none is 10^30.
        stated = getattr(getattr(self.processor, "tokenizer", None), "model_max_length", math.inf)
        text = getattr(self.model.config, "text_config", self.model.config)
        limit = min(stated, getattr(text, "max_position_embeddings", math.inf))
        return int(limit) if limit < 10**9 else None

    def scores(self, pictures: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """The CLIP score of each picture and its prompt: 100 times their cosine, at least 0.

        Source: J. Hessel et al., CLIPScore, arXiv 2104.08718, with weight 100 as in torchmetrics.

        Args:
            pictures: uint8 (B, 3, H, W) on the model's device.
            prompts: B.

        Returns:
            (B,) float32 on the CPU.
        """
        return (100 * self.cosines(pictures, prompts)).clamp_min(0).cpu()

    def cosines(self, pictures: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """The cosine (B,) of each picture, uint8 (B, 3, H, W), and its prompt."""
        # Each text is embedded once, however many pictures it has.
        texts = sorted(set(prompts))
        embeddings = self.prompts(texts)[[texts.index(prompt) for prompt in prompts]]
        return torch.nn.functional.cosine_similarity(self.pictures(pictures), embeddings)


class Preference(Clip):
    """How much people would like a picture of a prompt, by a CLIP model that was tuned on their choices: PickScore.

    Source: Y. Kirstain et al., Pick-a-Pic, arXiv 2305.01569. Other such models have other scales; differences count.
    """

    option = "--preference"

    @torch.no_grad()
    def scores(self, pictures: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """The model's own logit scale times the cosine of each picture and its prompt.

        Args:
            pictures: uint8 (B, 3, H, W) on the model's device.
            prompts: B.

        Returns:
            (B,) float32 on the CPU. Of two pictures of a prompt, the first is preferred with a probability of
            sigmoid(difference).
        """
        scale = getattr(self.model, "logit_scale", None)
        scale = 100.0 if scale is None else scale.float().exp()
        return (scale * self.cosines(pictures, prompts)).cpu()


class Classifier:
    """Tells whether a picture shows its label, by a model of transformers or a TorchScript file.

    Args:
        source: a folder, a hub id, or a TorchScript file from pictures (B, 3, H, W) in [0, 1] to logits.

    Raises:
        UserError: there is no such model.
    """

    def __init__(self, source: str):
        self.source, self.processor, self.class_indices = source, None, {}
        if Path(source).is_file():
            self.model = load_script("--classifier", source)
        else:
            names = "AutoModelForImageClassification", "AutoImageProcessor"
            self.model, self.processor = load_from_transformers("--classifier", source, *names)
            self.class_indices = {str(name): index for index, name in self.model.config.id2label.items()}

    def to(self, device: torch.device) -> Classifier:
        """Move the model."""
        self.model.to(device)
        return self

    def class_index(self, label: str) -> int:
        """Index of a label's logit.

        Raises:
            UserError: the classifier has no such label.
        """
        if label in self.class_indices:
            return int(self.class_indices[label])
        if label.isdigit() and not self.class_indices:
            return int(label)
        known = ", ".join(sorted(self.class_indices)[:10]) or "whole numbers"
        raise UserError(expected("--prompts", f"labels of the classifier {self.source} ({known})", repr(label)))

    @torch.no_grad()
    def right(self, pictures: torch.Tensor, class_indices: torch.Tensor) -> torch.Tensor:
        """Whether each picture's largest logit is the expected one.

        Args:
            pictures: uint8 (B, 3, H, W) on the model's device.
            class_indices: (B,) index of the expected logit.

        Returns:
            (B,) bool on the CPU.
        """
        if self.processor is None:
            logits = self.model(to_images(pictures))
        else:
            logits = self.model(pixel_values=_prepared(self.processor, pictures, self.model.device)).logits
        return logits.argmax(dim=1).cpu() == class_indices


def load_features(name: str, clip: Clip | None = None) -> FeatureNetwork | None:
    """The feature network of the option `--features`.

    Args:
        name: auto, none, pixels, clip, inception, inception-64 (-192, -768, -2048), a folder or hub id of a vision
            model of transformers, or a TorchScript file.
        clip: the model of `--clip`, for "clip" and for "auto" where Inception's weights are not there.

    Returns:
        The network, or None for "none".

    Raises:
        UserError: there is no such network.
    """
    if name == "none":
        return None
    if name == "auto":
        name = "inception" if inception_weights() is not None else "clip" if clip is not None else "pixels"
    if name == "pixels":
        return FeatureNetwork(
            f"thumbnails of {THUMBNAIL} x {THUMBNAIL} pixels",
            thumbnails,
            note="The features are tiny thumbnails, which show layout and colour but no detail. Their distance is not "
            "FID in the usual sense, and small damage hardly changes it; the variance still shows a collapse. Give a "
            "feature network with --features.",
        )
    if name == "clip":
        if clip is None:
            raise UserError(expected("--features clip", "the model as --clip", "none"))
        return FeatureNetwork(f"image embeddings of {clip.source}", clip.pictures, clip.model)
    if name.partition("-")[0] == "inception":
        return _inception(name)
    if Path(name).is_file():
        module = load_script("--features", name)
        return FeatureNetwork(name, lambda pictures: module(to_images(pictures)), module)
    model, processor = load_from_transformers("--features", name, "AutoModel", "AutoImageProcessor")

    def extract(pictures):
        inputs = _prepared(processor, pictures, model.device)
        if hasattr(model, "get_image_features"):
            return _tensor(model.get_image_features(pixel_values=inputs))
        return _pooled(model(pixel_values=inputs))

    return FeatureNetwork(name, extract, model)


def extract_features(
    network: Callable[[torch.Tensor], torch.Tensor], pictures: torch.Tensor, *, batch_size: int = 256
) -> torch.Tensor:
    """Compute the features of pictures in batches and without gradient.

    Args:
        network: a callable from float pictures (B, 3, H, W) in [0, 1] to features (B, D).
        pictures: uint8 (N, 3, H, W), or float in [0, 1].
        batch_size: pictures at a time.

    Returns:
        float64 (N, D) on the CPU.
    """
    rows = []
    with torch.no_grad():
        for batch in pictures.split(batch_size):
            batch = to_images(batch) if batch.dtype == torch.uint8 else batch
            rows.append(network(batch).double().cpu())
    return torch.cat(rows)


def thumbnails(pictures: torch.Tensor) -> torch.Tensor:
    """Antialiased thumbnails (B, 3 · 8 · 8) in [0, 1] of pictures uint8 (B, 3, H, W)."""
    small = torch.nn.functional.interpolate(
        to_images(pictures), (THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True
    )
    return small.flatten(1)


def inception_weights() -> Path | None:
    """The file of Inception's weights in torch's cache, or None where it is not there."""
    path = _inception_path()
    return path if path.is_file() else None


def _inception_path() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def _inception(name: str) -> FeatureNetwork:
    size = name.partition("-")[2] or "2048"
    if size not in map(str, INCEPTION_SIZES):
        sizes = ", ".join(f"inception-{number}" for number in INCEPTION_SIZES)
        raise UserError(expected("--features", f"one of {sizes}", name))
    path = inception_weights()
    if path is None:
        raise UserError(
            f"--features {name}: Inception's weights are not on this machine and are not downloaded automatically: "
            f"save {INCEPTION_URL} as {_inception_path()}, or give another network"
        )
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        # torch_fidelity unpickles the file without any check, so it must contain nothing but weights.
        torch.load(path, weights_only=True)
        network = NoTrainInceptionV3("inception-v3-compat", [size], str(path))
    except ImportError:
        raise UserError(f"--features {name}: run `pip install torch-fidelity torchvision`") from None
    except Exception as error:
        raise UserError(f"--features {name}: {path} cannot be read ({first_line(error)})") from error
    return FeatureNetwork(f"Inception v3, {size} features", network, network)


def _prepared(processor, pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Pictures uint8 (B, 3, H, W), preprocessed by the model's own processor."""
    processor = getattr(processor, "image_processor", processor)
    arrays = list(pictures.cpu().permute(0, 2, 3, 1).numpy())
    return processor(images=arrays, return_tensors="pt")["pixel_values"].to(device)


def _tensor(output) -> torch.Tensor:
    # transformers 4 returns the embeddings themselves, 5 an output object.
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def _pooled(output) -> torch.Tensor:
    """(B, D) of a vision model's output: its own pooling, else the mean over positions."""
    pooled = getattr(output, "pooler_output", None)
    if pooled is not None:
        return pooled.flatten(1)
    hidden = output.last_hidden_state
    return hidden.mean(dim=1) if hidden.ndim == 3 else hidden.flatten(2).mean(dim=2)
