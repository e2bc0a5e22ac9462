"""A small digit classifier: is the digit that a prompt asked for still there? Its features serve FID."""

import torch
from torch import nn

from diffdoctor.data.pictures import to_images
from diffdoctor.training.seeds import seeded


class DigitClassifier(nn.Module):
    """Four convolutions and two linear layers on pictures (B, 3, 16, 16) in [0, 1].

    `features` gives (B, 64), after the ReLU of the first linear layer; `forward` gives logits (B, 10).
    """

    def __init__(self):
        super().__init__()

        def block(inputs, outputs, stride):
            return [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.GroupNorm(8, outputs), nn.ReLU()]

        layers = [*block(3, 32, 1), *block(32, 32, 2), *block(32, 64, 1), *block(64, 64, 2)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def features(self, images):
        """Images (B, 3, 16, 16) in [0, 1] to features (B, 64)."""
        return self.body(2 * images - 1)

    def forward(self, images):
        """Images (B, 3, 16, 16) in [0, 1] to logits (B, 10)."""
        return self.head(self.features(images))


def _shifted(images, generator):
    # One pixel of shift in each direction: the digits of the set are centred, those of a generator need not be.
    padded = nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
    top, left = torch.randint(0, 3, (2,), generator=generator).tolist()
    return padded[:, :, top : top + images.shape[2], left : left + images.shape[3]]


def _occluded(images, generator):
    """Cover a rectangle in each picture: with another picture's part, with shuffled pixels, or with noise.

    A classifier that has not met damage spreads its features over every kind of it; the spread within a class would
    then fall as damage is cured, and tell nothing about a collapse.
    """
    count, _, height, width = images.shape
    shuffled = images.flatten(2)[..., torch.randperm(height * width, generator=generator)].view_as(images)
    noise = torch.rand(count, 1, height, width, generator=generator).expand_as(images)
    covers = images[torch.randperm(count, generator=generator)], shuffled, noise
    images = images.clone()
    for i, cover in enumerate(covers):
        h, w = torch.randint(height // 3, 2 * height // 3, (2,), generator=generator).tolist()
        top = int(torch.randint(0, height - h + 1, (), generator=generator))
        left = int(torch.randint(0, width - w + 1, (), generator=generator))
        part = slice(i * count // 3, (i + 1) * count // 3), slice(None), slice(top, top + h), slice(left, left + w)
        images[part] = cover[part]
    return images


def train_classifier(pictures, labels, *, steps=800, batch_size=64, learning_rate=3e-3, seed=0, on_step=None):
    """Train a `DigitClassifier` that reads digits also where a part of them is damaged.

    Args:
        pictures: uint8 (N, 3, 16, 16), clean and damaged ones.
        labels: (N,) integers 0 to 9.
        steps: of AdamW.
        batch_size: pictures of a step.
        learning_rate: the peak of a one-cycle schedule.
        seed: of the weights, the batches, the shifts and the covers.
        on_step: called with (step, loss) after each step.

    Returns:
        The classifier in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        classifier = DigitClassifier()
    images = to_images(pictures)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(0, len(images), (batch_size,), generator=generator)
        logits = classifier(_occluded(_shifted(images[chosen], generator), generator))
        loss = nn.functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, loss.item())
    return classifier.eval().requires_grad_(False)
