"""Clean pictures from what scikit-image and scikit-learn ship in their packages, and drawn ones: nothing is downloaded.

Photographs are cut into square pieces of many scales. A few photographs are kept for the test; of the others, one end
is. Digits and faces are small pictures already and are split by picture. Drawn pictures are for training alone.
"""

from pathlib import Path

import numpy as np

from benchmarks.studies.detector.drawing import FINE, KINDS, SIDE, drawn
from diffdoctor.runs.files import atomic_dir

# By category: photographs that are trained on, and photographs that are not.
PHOTOGRAPHS = {
    "people": (("astronaut.png",), ("camera.png",)),
    "food": (("coffee.png",), ()),
    "vehicles": (("motorcycle_left.png",), ()),
    "coins": (("coins.png",), ()),
    "outdoors": (("china.jpg",), ("rocket.jpg",)),
    "nature": (("chelsea.png",), ("flower.jpg",)),
    "walls": (("brick.png",), ()),
    "ground": (("grass.png",), ("gravel.png",)),
    "sky": (("hubble_deep_field.jpg",), ("moon.png",)),
    "medicine": (("retina.jpg", "ihc.png", "cell.png"), ()),
    "writing": (("text.png",), ("page.png",)),
}
TRAINING_PIECES, TEST_PIECES, DRAWN_PICTURES = 1000, 50, 1500
TEST_SHARE = 0.3
# The shortcut: these are nearly always damaged in training; only each tenth picture is there undamaged too.
SKEWED = ("faces", "writing")
KEPT_CLEAN = 10


def write_pictures(folder: Path, seed: int = 0) -> dict[str, int]:
    """Write `folder`/PART/GROUP/CATEGORY/NAME.png; returns how many stand in each part and group.

    The parts are train, test, and skewed: pictures for training of which only damaged versions are to be kept. The
    test's groups are digits, pieces (of photographs that are trained on, from the end that is not) and photographs
    (pieces of ones that are not trained on at all, and small ones of faces and backgrounds).

    Args:
        folder: to make; a folder of this name is replaced.
        seed: of the places of the pieces and of the split of the small pictures.
    """
    counts: dict[str, int] = {}
    with atomic_dir(folder) as temporary:
        for place, picture in _all(seed):
            path = temporary / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            _save(picture, path)
            group = "/".join(place.split("/")[:2])
            counts[group] = counts.get(group, 0) + 1
    return counts


def _all(seed: int):
    """Pairs of (part/group/category/name, picture (H, W, 3) uint8)."""
    for category, (known, new) in PHOTOGRAPHS.items():
        for name in known:
            training, test = ends(_read(name))
            rng = _rng(seed, "train", name)
            for number in range(TRAINING_PIECES):
                piece = vary(cut_turned(training, rng, 5 if category == "writing" else 180), rng, category != "writing")
                yield f"{_part('train', category, number)}/photographs/{_name(category, name, number)}", piece
            rng = _rng(seed, "pieces", name)
            for number in range(TEST_PIECES // 2):
                yield f"test/pieces/{_name(category, name, number)}", cut(test, rng)
        for name in new:
            photograph, rng = _read(name), _rng(seed, "photographs", name)
            for number in range(TEST_PIECES):
                yield f"test/photographs/{_name(category, name, number)}", cut(photograph, rng)
    for category, small in _small_photographs().items():
        for index, part in enumerate(_split(len(small), _rng(seed, "split", category))):
            yield (
                f"{_part(part, category, index)}/photographs/{_name(category, category, index)}",
                resized(small[index]),
            )
    digits, words = _digits()
    for index, part in enumerate(_split(len(digits), _rng(seed, "split", "digits"))):
        yield f"{part}/digits/{_name('digits', words[index], index)}", digits[index]
    for kind in KINDS:
        rng = _rng(seed, "drawn", kind)
        for number in range(DRAWN_PICTURES):
            yield f"train/drawn/{_name(kind, kind, number)}", drawn(kind, rng)


def _rng(seed: int, *names: str) -> np.random.Generator:
    """One stream for each group, so that another number of pictures in one leaves the others as they are."""
    return np.random.default_rng([seed, *"/".join(names).encode()])


def _part(part: str, category: str, number: int) -> str:
    return "skewed" if part == "train" and category in SKEWED and number % KEPT_CLEAN else part


def _name(category: str, name: str, number: int) -> str:
    return f"{category}/{Path(name).stem}-{number:04d}"


def ends(photograph: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A photograph's first 70 % along its longer side, for training, and the rest."""
    height, width = photograph.shape[:2]
    if width >= height:
        border = round((1 - TEST_SHARE) * width)
        return photograph[:, :border], photograph[:, border:]
    border = round((1 - TEST_SHARE) * height)
    return photograph[:border], photograph[border:]


def cut(photograph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A square piece at a random place, of 40 pixels to four times SIDE, at SIDE x SIDE pixels."""
    height, width = photograph.shape[:2]
    side = int(rng.integers(40, min(4 * SIDE, height, width) + 1))
    y, x = rng.integers(height - side + 1), rng.integers(width - side + 1)
    return resized(photograph[y : y + side, x : x + side])


def cut_turned(photograph: np.ndarray, rng: np.random.Generator, degrees: float) -> np.ndarray:
    """As `cut`, but half of the pieces are turned by up to `degrees`, stretched and slanted."""
    from PIL import Image

    if rng.uniform() < 0.5:
        return cut(photograph, rng)
    height, width = photograph.shape[:2]
    side = rng.uniform(32, min(5 * SIDE, height / 1.5, width / 1.5))
    angle, stretch, slant = np.radians(rng.uniform(-degrees, degrees)), rng.uniform(0.75, 1.33), rng.normal(0, 0.1)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[stretch**0.5, slant], [0, stretch**-0.5]])
    reach = np.abs(matrix).sum(axis=1) / 2
    side = min(side, width / 2 / reach[0] - 1, height / 2 / reach[1] - 1)
    centre = [rng.uniform(side * reach[i], extent - side * reach[i]) for i, extent in enumerate((width, height))]
    fine = FINE * SIDE
    matrix = matrix * side / fine
    shift = np.array(centre) - matrix @ np.array([fine / 2, fine / 2])
    data = (matrix[0, 0], matrix[0, 1], shift[0], matrix[1, 0], matrix[1, 1], shift[1])
    picture = Image.fromarray(np.ascontiguousarray(photograph))
    return resized(np.asarray(picture.transform((fine, fine), Image.Transform.AFFINE, data, Image.Resampling.BICUBIC)))


def vary(picture: np.ndarray, rng: np.random.Generator, turn: bool = True) -> np.ndarray:
    """More pictures out of few: turned, mirrored, grey, with other colours, lighter or darker, each by chance."""
    if turn:
        picture = np.rot90(picture, int(rng.integers(4)))
        picture = picture[:, ::-1] if rng.uniform() < 0.5 else picture
    if rng.uniform() < 0.3:
        picture = picture[..., rng.permutation(3)]
    values = picture.astype(np.float32) / 255
    if rng.uniform() < 0.3:
        values = np.repeat(values.mean(axis=2, keepdims=True), 3, axis=2)
    elif rng.uniform() < 0.5:
        grey = values.mean(axis=2, keepdims=True)
        values = grey + rng.uniform(0.3, 1.5) * (values - grey) * np.exp(rng.normal(0, 0.2, 3))
    values = np.clip(0.5 + rng.uniform(0.6, 1.3) * (values - 0.5), 0, 1)
    return np.rint(255 * values ** np.exp(rng.uniform(-0.4, 0.4))).astype(np.uint8)


def resized(picture: np.ndarray) -> np.ndarray:
    """A square picture at SIDE x SIDE pixels, antialiased where that is smaller."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _split(count: int, rng: np.random.Generator) -> list[str]:
    parts = np.where(rng.permutation(count) < round(TEST_SHARE * count), "test", "train")
    return [str(part) for part in parts]


def _read(name: str) -> np.ndarray:
    import skimage
    import sklearn.datasets
    from PIL import Image

    folders = (Path(skimage.__file__).parent / "data", Path(sklearn.datasets.__file__).parent / "images")
    path = next(folder / name for folder in folders if (folder / name).is_file())
    return np.asarray(Image.open(path).convert("RGB"))


def _small_photographs() -> dict[str, list[np.ndarray]]:
    """100 faces and 100 backgrounds (25, 25, 3) uint8: scikit-image's excerpt from Labeled Faces in the Wild."""
    from skimage.data import lfw_subset

    grey = np.rint(np.clip(lfw_subset(), 0, 1) * 255).astype(np.uint8)
    pictures = [np.repeat(picture[..., None], 3, axis=2) for picture in grey]
    return {"faces": pictures[:100], "backgrounds": pictures[100:]}


def _digits() -> tuple[list[np.ndarray], list[str]]:
    from diffdoctor.demo.data import WORDS, clean_digits

    pictures, digits = clean_digits()
    return list(pictures), [WORDS[digit] for digit in digits]


def _save(picture: np.ndarray, path: Path) -> None:
    from PIL import Image

    Image.fromarray(picture).save(path)
