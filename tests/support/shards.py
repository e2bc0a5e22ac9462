"""Shards for tests: written ones, and archives member by member."""

import io
import json
import tarfile

import numpy as np

from diffdoctor.data import codec


def samples_of(count, size=(12, 17), seed=0):
    """So many samples as `write_shards` takes them: every second one with a mask."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        mask = rng.uniform(size=size).astype(np.float32) * (i % 2)
        yield {
            "picture": rng.integers(0, 256, (*size, 3), dtype=np.uint8),
            "mask": mask,
            "prompt": f"a picture of ünïcode № {i}",
            "category": ("cat", "dog")[i % 2],
            "generator": "test",
            "label": ("real", "injected")[i % 2],
            "round": i // 3,
            "extra": {"seed": i, "list": [1, 2]},
        }


def members_of(key, **changes):
    """A good sample's members {name: bytes}, with changes: extension with dots as __, None leaves it out."""
    picture = np.full((20, 20, 3), 7, np.uint8)
    members = {
        f"{key}.png": codec.encode_picture(picture, "png"),
        f"{key}.mask.png": codec.encode_mask(np.zeros((20, 20), np.uint8)),
        f"{key}.json": json.dumps({"label": "injected"}).encode(),
    }
    for extension, data in changes.items():
        name = f"{key}.{extension.replace('__', '.')}"
        members = {k: v for k, v in members.items() if k != name} | ({name: data} if data is not None else {})
    return members


def write_tar(path, entries):
    """entries: (TarInfo or name, bytes) in order."""
    with tarfile.open(path, "w") as tar:
        for info, data in entries:
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


#: The members of two good samples.
GOOD = [*members_of("first").items()], [*members_of("last").items()]
