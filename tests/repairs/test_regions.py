"""What is redrawn and how it is put back: regions, crops, masks, colours at the seam."""

import numpy as np
import pytest

pytest.importorskip("scipy")

from diffdoctor.repairs.blend import mask_at, matched, resized, seam_energy
from diffdoctor.repairs.regions import box_of, crop_around, feathered, find_regions


def marked(*places, size=(40, 60), value=0.9):
    confidence = np.full(size, 0.1, np.float32)
    for y, x, h, w in places:
        confidence[y : y + h, x : x + w] = value
    return confidence


def test_components_that_touch_when_grown_are_one_region_and_the_largest_comes_first():
    confidence = marked((5, 5, 4, 4), (5, 13, 4, 4), (20, 40, 10, 10))
    apart = find_regions(confidence, grow=1)
    assert [region.area for region in apart] == [100, 16, 16]
    joined = find_regions(confidence, grow=2)
    assert [region.area for region in joined] == [100, 32]
    assert joined[1].box == (3, 3, 16, 8)
    assert joined[0].score == pytest.approx(confidence[joined[0].mask].mean())
    assert [region.area for region in find_regions(confidence, grow=2, count=1)] == [100]
    assert [region.area for region in find_regions(confidence, grow=1, max_area=50 / 2400)] == [16, 16]
    assert [region.area for region in find_regions(confidence, grow=1, min_area=50 / 2400)] == [100]
    assert find_regions(confidence, threshold=0.95) == []


def test_the_mask_fades_inwards_and_not_at_the_pictures_border():
    mask = find_regions(marked((0, 20, 10, 12)), grow=3)[0].mask
    weight = feathered(mask, 3)
    assert not weight[~mask].any()
    assert (weight[mask] > 0).all()
    assert (weight[0:10, 20:32] == 1).all()  # what is flagged is wholly replaced, up to the border
    assert (np.diff(weight[5, 15:21]) >= 0).all()
    assert (feathered(mask, 0) == mask).all()
    assert (feathered(np.ones((4, 5), bool), 9) == 1).all()


@pytest.mark.parametrize(
    ("box", "picture", "model", "expected"),
    [
        ((100, 120, 40, 20), (512, 768), (64, 64), (80, 70, 100, 100, (64, 64))),  # 2.5 times the longer side
        ((0, 500, 40, 12), (512, 768), (64, 64), (412, 0, 100, 100, (64, 64))),  # moved in at the corner
        ((10, 2, 12, 12), (16, 33), (16, 16), (0, 1, 16, 30, (8, 24))),  # no room: other proportions, the same area
        ((4, 4, 4, 4), (16, 16), (16, 16), (1, 1, 10, 10, (16, 16))),
        ((10, 10, 30, 30), (200, 200), (32, 64), (0, 0, 75, 150, (32, 64))),  # the model's proportions
    ],
)
def test_a_crop_has_context_and_lies_in_the_picture(box, picture, model, expected):
    crop = crop_around(box, picture, context=2.5, size=model, multiple=8)
    assert (crop.top, crop.left, crop.height, crop.width, crop.size) == expected
    x, y, width, height = box
    assert crop.top <= y
    assert crop.top + crop.height >= y + height
    assert crop.left <= x
    assert crop.left + crop.width >= x + width


def test_every_pixel_with_a_part_in_the_mask_is_in_it_at_another_size():
    mask = np.zeros((20, 30), bool)
    mask[7, 11] = True
    assert mask_at(mask, (10, 10))[3, 3]
    assert mask_at(mask, (10, 10)).sum() == 1
    larger = mask_at(mask, (40, 45))
    assert box_of(larger) == (16, 14, 2, 2)
    assert resized(np.zeros((5, 4, 3), np.float32), (5, 4)).shape == (5, 4, 3)


def test_a_shift_of_the_colours_and_a_gradient_of_it_are_taken_back():
    rng = np.random.default_rng(0)
    original = rng.uniform(0.3, 0.6, (40, 40, 3)).astype(np.float32)
    mask = np.zeros((40, 40), bool)
    mask[12:28, 14:30] = True
    shifted = original + np.array([0.1, -0.05, 0.02], np.float32)
    np.testing.assert_allclose(matched(shifted, original, mask, 3), original, atol=1e-5)
    tilted = original + np.linspace(-0.1, 0.1, 40, dtype=np.float32)[None, :, None]
    before, after = (np.abs(each - original)[mask].mean() for each in (tilted, matched(tilted, original, mask, 3)))
    assert after < 0.75 * before
    whole = np.ones((40, 40), bool)
    assert matched(shifted, original, whole, 3) is shifted


def test_the_seams_energy_is_the_mean_over_its_pairs():
    rgb = np.zeros((4, 6, 3), np.uint8)
    mask = np.zeros((4, 6), bool)
    mask[:, 3:] = True
    assert seam_energy(rgb, mask) == (0.0, 4)
    rgb[:, 3:] = 51  # a fifth
    assert seam_energy(rgb, mask) == (pytest.approx(0.04), 4)
    assert seam_energy(rgb, np.zeros((4, 6), bool)) == (0.0, 0)
