"""Commands that are killed (-9) at random moments, again and again, end in the bits of an undisturbed run."""

import json

import numpy as np
import pytest

from support.paths import PROGRAMS

pytest.importorskip("accelerate")
pytest.importorskip("pyarrow")
pytest.importorskip("tensorboard")


def things(count, seed, side=16):
    """Labelled pictures of discs, every other one with a bright damaged square."""
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[0:side, 0:side]
    for index in range(count):
        y, x = rng.uniform(4, side - 4, 2)
        picture = np.repeat((200 * np.clip(5 - np.hypot(ys - y, xs - x), 0, 1))[..., None], 3, axis=2).astype(np.uint8)
        mask = np.zeros((side, side), np.float32)
        if index % 2:
            mask[4:9, 5:11] = 1
            picture[4:9, 5:11] = rng.integers(0, 256, (5, 6, 3))
        category = ("cat", "dog")[index % 2]
        yield {"key": f"{index:04d}-{seed}", "picture": picture, "mask": mask, "category": category}


@pytest.fixture
def folder(tmp_path):
    import torch
    from PIL import Image

    from diffdoctor.data.shard_writer import write_shards
    from diffdoctor.detector import ConvDetector

    write_shards(things(10, 0), tmp_path / "data", shard_size=4)
    write_shards(things(6, 1), tmp_path / "validation")
    for index, sample in enumerate(things(7, 2)):
        place = tmp_path / "pictures" / f"{index:02d}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(sample["picture"][: 16 - 2 * (index == 4)]).save(place)
    (tmp_path / "pictures" / "03.png").write_bytes(b"\x89PNG but broken")
    torch.manual_seed(0)
    ConvDetector((8, 16)).save_pretrained(tmp_path / "detector")
    return tmp_path


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.timeout(2400)  # dozens of attempts, one after another
@pytest.mark.parametrize(
    ("command", "brief"),
    [
        *((command, False) for command in ("inject", "diagnose", "evaluate", "train")),
        ("label", True),
        *(pytest.param(command, False, marks=pytest.mark.study) for command in ("label", "join", "train_resampled")),
    ],
)
def test_killed_at_random_moments_a_run_ends_in_the_same_bits(commands, folder, command, brief):
    program = PROGRAMS / "detector_killed.py"
    said = commands.run(command, folder, 0, brief, output=folder / "said", program=program)
    report = json.loads(said.splitlines()[-1])
    assert report["operations"] > 30
    assert report["points"] >= 20
    assert sum(report["kills"]) >= (1 if brief else 2)
    assert report["processes"][-1] == (2 if command in ("diagnose", "label", "join", "evaluate") else 1)
