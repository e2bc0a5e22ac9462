"""The networks that measure pictures beside the detectors: features for FID and variance, CLIP, a classifier.

Nothing is fetched here that was not asked for by its hub id.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from diffdoctor.data.pictures import to_images
from diffdoctor.runs.errors import UserError, first_line, missing_extra

INCEPTION_SIZES = (64, 192, 768, 2048)
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
THUMBNAIL = 8


@dataclass
class FeatureNetwork:
    """A network whose features FID and variance are taken from.

    Attributes:
        name: for reports.
        extract: from uint8 pictures (B, 3, H, W) on the network's device to features (B, D).
        module: what must be on that device; None: nothing.
        note: what to keep in mind of figures made with it; empty: nothing.
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
        return self.extract(pictures).float().cpu()


class Clip:
    """Pictures and prompts in one space, by a CLIP model of transformers.

    Args:
        source: a folder or a hub id.

    Raises:
        UserError: if no such model is there.
    """

    def __init__(self, source: str):
        self.source = source
        self.model, self.processor = _from_transformers("--clip", source, "AutoModel", "AutoProcessor")
        if not (hasattr(self.model, "get_image_features") and hasattr(self.model, "get_text_features")):
            raise UserError(f"--clip {source}: a model of pictures and texts such as CLIP was expected")

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
        # SigLIP was trained on padded texts, CLIP does not mind them.
        tokens = self.processor(text=prompts, return_tensors="pt", padding="max_length", truncation=True)
        return _tensor(self.model.get_text_features(**tokens.to(self.model.device))).float()

    def scores(self, pictures: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """The CLIP score of each picture and its prompt, (B,) on the CPU: 100 times their cosine, at least 0.

        Source: J. Hessel et al., CLIPScore, arXiv 2104.08718, with weight 100 as in torchmetrics.
        """
        # One text is embedded once, however many pictures it has.
        names = sorted(set(prompts))
        of_names = self.prompts(names)
        of_prompts = of_names[[names.index(prompt) for prompt in prompts]]
        cosine = torch.nn.functional.cosine_similarity(self.pictures(pictures), of_prompts)
        return (100 * cosine).clamp_min(0).cpu()


class Classifier:
    """Says whether a picture shows its label: a model of transformers for that, or a TorchScript or .pt2 file.

    Args:
        source: a folder, a hub id, or a TorchScript or .pt2 file from pictures (B, 3, H, W) in [0, 1] to logits.

    Raises:
        UserError: if no such model is there.
    """

    def __init__(self, source: str):
        self.source, self.processor, self.places = source, None, {}
        if Path(source).is_file():
            self.model = _saved_network("--classifier", source)
        else:
            names = "AutoModelForImageClassification", "AutoImageProcessor"
            self.model, self.processor = _from_transformers("--classifier", source, *names)
            self.places = {str(name): place for place, name in self.model.config.id2label.items()}

    def to(self, device: torch.device) -> Classifier:
        """Move the model."""
        self.model.to(device)
        return self

    def place(self, label: str) -> int:
        """Which logit stands for a label.

        Raises:
            UserError: if none does.
        """
        if label in self.places:
            return int(self.places[label])
        if label.isdigit() and not self.places:
            return int(label)
        known = ", ".join(sorted(self.places)[:10]) or "whole numbers"
        raise UserError(f"--prompts: {label!r} is no label of the classifier {self.source}, which knows {known}")

    @torch.no_grad()
    def right(self, pictures: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Whether each picture's largest logit is the one at `places` (B,): (B,) bool on the CPU."""
        if self.processor is None:
            logits = self.model(to_images(pictures))
        else:
            logits = self.model(pixel_values=_prepared(self.processor, pictures, self.model.device)).logits
        return logits.argmax(dim=1).cpu() == places


def load_features(name: str, clip: Clip | None = None) -> FeatureNetwork | None:
    """The feature network of the option `--features`.

    Args:
        name: auto, none, pixels, clip, inception, inception-64 (-192, -768, -2048), a folder or hub id of a vision
            model of transformers, or a TorchScript or .pt2 file.
        clip: the model of `--clip`, for "clip" and for "auto" where Inception's weights are not there.

    Returns:
        The network, or None for "none".

    Raises:
        UserError: if it is not there.
    """
    if name == "none":
        return None
    if name == "auto":
        name = "inception" if inception_weights() is not None else "clip" if clip is not None else "pixels"
    if name == "pixels":
        return FeatureNetwork(
            f"thumbnails of {THUMBNAIL} x {THUMBNAIL} pixels",
            thumbnails,
            note="The features are tiny thumbnails: they see layout and colour, no detail. A distance of them is no "
            "FID in the usual sense, and small damage hardly moves it; the variance still tells a collapse. Name a "
            "feature network with --features.",
        )
    if name == "clip":
        if clip is None:
            raise UserError("--features clip: needs --clip, the model whose features are meant")
        return FeatureNetwork(f"image embeddings of {clip.source}", clip.pictures, clip.model)
    if name.partition("-")[0] == "inception":
        return _inception(name)
    if Path(name).is_file():
        module = _saved_network("--features", name)
        return FeatureNetwork(name, lambda pictures: module(to_images(pictures)), module)
    model, processor = _from_transformers("--features", name, "AutoModel", "AutoImageProcessor")

    def extract(pictures):
        inputs = _prepared(processor, pictures, model.device)
        if hasattr(model, "get_image_features"):
            return _tensor(model.get_image_features(pixel_values=inputs))
        return _pooled(model(pixel_values=inputs))

    return FeatureNetwork(name, extract, model)


def extract_features(network, pictures, *, batch_size=256):
    """The features of pictures, in batches and without gradient.

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
    """Pictures uint8 (B, 3, H, W) as antialiased thumbnails (B, 3 · 8 · 8) in [0, 1]."""
    small = torch.nn.functional.interpolate(
        to_images(pictures), (THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True
    )
    return small.flatten(1)


def inception_weights() -> Path | None:
    """Where Inception's weights lie on this machine, or None; torch's own cache is where they are looked for."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    return path if path.is_file() else None


def _inception(name: str) -> FeatureNetwork:
    size = name.partition("-")[2] or "2048"
    if size not in map(str, INCEPTION_SIZES):
        sizes = ", ".join(f"inception-{number}" for number in INCEPTION_SIZES)
        raise UserError(f"--features {name}: one of {sizes} was expected")
    path = inception_weights()
    if path is None:
        place = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
        raise UserError(
            f"--features {name}: Inception's weights are not on this machine and are never fetched unasked: put "
            f"{INCEPTION_URL} at {place}, or name another network"
        )
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        # torch_fidelity unpickles the file without restraint; a file that is not plain weights must not get there.
        torch.load(path, weights_only=True)
        network = NoTrainInceptionV3("inception-v3-compat", [size], str(path))
    except ImportError:
        raise UserError(f"--features {name}: run `pip install torch-fidelity torchvision`") from None
    except Exception as error:
        raise UserError(f"--features {name}: {path} cannot be read ({first_line(error)})") from error
    return FeatureNetwork(f"Inception v3, {size} features", network, network)


def _saved_network(option: str, source: str):
    try:
        if source.endswith(".pt2"):
            return torch.export.load(source).module()
        with warnings.catch_warnings():
            # torch 2.13 calls TorchScript deprecated; the files that exist are of that kind.
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(source, map_location="cpu").eval()
    except Exception as error:
        raise UserError(
            f"{option} {source}: a TorchScript file or a .pt2 file of torch.export was expected ({first_line(error)})"
        ) from error


def _from_transformers(option: str, source: str, model_class: str, processor_class: str):
    try:
        import transformers
    except ImportError:
        raise missing_extra("transformers", "stages") from None
    if not Path(source).is_dir() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise UserError(f"{option} {source}: no such file or folder, and no hub id such as owner/name")
    try:
        model = getattr(transformers, model_class).from_pretrained(source)
        processor = getattr(transformers, processor_class).from_pretrained(source)
    except Exception as error:  # the hub client and each model class raise their own
        raise UserError(f"{option} {source}: cannot be loaded ({first_line(error)})") from error
    return model.eval(), processor


def _prepared(processor, pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Pictures uint8 (B, 3, H, W) as the model's own processor hands them to it."""
    processor = getattr(processor, "image_processor", processor)
    arrays = list(pictures.cpu().permute(0, 2, 3, 1).numpy())
    return processor(images=arrays, return_tensors="pt")["pixel_values"].to(device)


def _tensor(output) -> torch.Tensor:
    # transformers 4 returns the embeddings themselves, 5 an output that holds them.
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def _pooled(output) -> torch.Tensor:
    """(B, D) of a vision model's output: its own pooling, else the mean over positions."""
    pooled = getattr(output, "pooler_output", None)
    if pooled is not None:
        return pooled.flatten(1)
    hidden = output.last_hidden_state
    return hidden.mean(dim=1) if hidden.ndim == 3 else hidden.flatten(2).mean(dim=2)
