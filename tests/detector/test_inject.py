"""Damage injection: exact masks, visible change, same seed same result, no damage where none was asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffdoctor.detector import benign, damage_kind, damage_kinds, inject
from diffdoctor.detector.damage import registry
from diffdoctor.detector.damage.injection import CHANGE_EPS, Injected, NoVisibleDamage, mask_of_change

KINDS = damage_kinds()


def picture_of(height, width, seed=0):
    """A picture (H, W, 3) uint8 with shapes, colours and texture."""
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[0:height, 0:width] / max(height, width)
    waves = np.stack([np.sin(2 * np.pi * (a * ys + b * xs) + c) for a, b, c in rng.uniform(0.5, 4, (3, 3))], axis=-1)
    disc = (np.hypot(ys - 0.5, xs - 0.4) < 0.25)[..., None]
    return np.clip(128 + 70 * waves + 60 * disc + rng.normal(0, 5, waves.shape), 0, 255).astype(np.uint8)


def test_there_are_at_least_ten_kinds():
    assert len(KINDS) >= 10
    named = {"warp", "swirl", "patch_permutation", "duplicate", "removal", "smear", "glyph_scramble", "watermark"}
    assert named <= set(KINDS)


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (96, 64)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_mask_marks_exactly_what_changed(kind, size):
    clean = picture_of(*size)
    for seed in range(6):
        damaged = inject(clean, np.random.default_rng(seed), [kind], area=(0.05, 0.33), visible=0.12)
        assert damaged.kind == kind
        assert damaged.picture.dtype == np.uint8
        assert damaged.picture.shape == clean.shape
        assert damaged.mask.dtype == np.float32
        assert damaged.mask.shape == size
        change = np.abs(damaged.picture.astype(int) - clean.astype(int)).max(axis=2) / 255
        changed = change > CHANGE_EPS
        assert changed.sum() >= 6
        assert change[changed].mean() >= 0.12
        # Every changed pixel is marked, and no pixel farther than the rim and the closing from one is.
        assert damaged.mask[changed].min() > 0.5
        rows, columns = np.nonzero(damaged.mask > 0)
        where = np.argwhere(changed)
        for y, x in zip(rows, columns, strict=True):
            assert np.abs(where - (y, x)).max(axis=1).min() <= 3
        assert not (damaged.mask >= 0.5).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(16, 40), st.integers(16, 40), st.integers(0, 2**32 - 1), st.floats(0.01, 0.9), st.floats(0.05, 1))
def test_any_size_seed_area_and_strength(height, width, seed, area, strength):
    clean = picture_of(height, width, seed % 7)
    before = clean.copy()
    try:
        damaged = inject(clean, np.random.default_rng(seed), strength=strength, area=area)
    except NoVisibleDamage:
        return
    assert np.array_equal(clean, before)
    assert 0 <= damaged.mask.min() <= damaged.mask.max() <= 1
    assert damaged.mask.any()


def test_the_same_state_gives_the_same_result_and_another_state_another():
    clean = picture_of(32, 32)
    first, again, other = (inject(clean, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert np.array_equal(first.picture, again.picture)
    assert np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.picture, other.picture)


def test_what_is_injected_by_default_can_be_seen_and_flagged():
    clean = picture_of(96, 64)
    found = [inject(clean, np.random.default_rng(seed)) for seed in range(60)]
    for damaged in found:
        change = np.abs(damaged.picture.astype(int) - clean.astype(int)).max(axis=2) / 255
        assert change[change > CHANGE_EPS].mean() >= 0.2 * registry.visible_share(damaged.kind)
    # A picture counts as flagged from 2 % of its pixels on.
    assert np.mean([(damaged.mask >= 0.5).mean() >= 0.02 for damaged in found]) > 0.9


@pytest.mark.parametrize("kind", ["over_smooth", "pixelate"])
def test_damage_that_changes_little_is_visible_as_often_as_other_kinds(kind):
    data = pytest.importorskip("skimage.data")
    seen = 0
    for name in ("astronaut", "chelsea", "coffee"):
        photograph = getattr(data, name)()
        for number in range(8):
            rng = np.random.default_rng(number)
            y, x = rng.integers(0, photograph.shape[0] - 192), rng.integers(0, photograph.shape[1] - 192)
            try:
                # Every third pixel, of one draw.
                inject(np.ascontiguousarray(photograph[y : y + 192 : 3, x : x + 192 : 3]), rng, [kind], attempts=1)
                seen += 1
            except NoVisibleDamage:
                continue
    # Without shares of their own it is 7 and 6 of 24.
    assert seen >= 12


def test_float_pictures_stay_float():
    clean = picture_of(24, 24).astype(np.float64) / 255
    damaged = inject(clean, np.random.default_rng(0))
    assert damaged.picture.dtype == np.float64
    assert 0 <= damaged.picture.min() <= damaged.picture.max() <= 1
    changed = np.abs(damaged.picture - clean).max(axis=2) > CHANGE_EPS + 1 / 255
    assert damaged.mask[changed].min() > 0.5


def test_the_area_option_bounds_the_region():
    clean = picture_of(64, 64)
    small = [inject(clean, np.random.default_rng(s), area=0.02).mask.mean() for s in range(20)]
    large = [inject(clean, np.random.default_rng(s), area=0.3).mask.mean() for s in range(20)]
    assert max(small) < 0.12
    assert np.median(large) > 3 * np.median(small)


def test_damage_falls_on_content_rather_than_on_flat_background():
    clean = np.zeros((64, 64, 3), np.uint8)
    clean[4:20, 4:20] = picture_of(16, 16)
    inside = 0
    for seed in range(30):
        mask = inject(clean, np.random.default_rng(seed), ["texture_noise"], area=0.02).mask
        y, x = np.argwhere(mask > 0.5).mean(axis=0)
        inside += y < 26 and x < 26
    # The square and its rim are 16 % of the picture.
    assert inside >= 20


def test_a_flat_picture_cannot_be_warped_but_can_be_stained():
    flat = np.full((32, 32, 3), 90, np.uint8)
    with pytest.raises(NoVisibleDamage, match="warp"):
        inject(flat, np.random.default_rng(0), ["warp"])
    assert inject(flat, np.random.default_rng(0), ["tint"]).mask.any()


def test_benign_changes_are_mild_everywhere_and_marked_nowhere():
    clean = picture_of(32, 32)
    names = set()
    for seed in range(60):
        result = benign(clean, np.random.default_rng(seed))
        names.add(result.kind)
        assert not result.mask.any()
        assert result.picture.shape == clean.shape
        assert not np.array_equal(result.picture, clean)
    assert len(names) >= 5


def test_a_user_s_kind_is_registered_and_used():
    @damage_kind("test_black_hole")
    def black_hole(picture, region, rng, strength):
        assert picture.dtype == np.float32
        assert region.alpha.shape == picture.shape[:2]
        return np.zeros_like(picture)

    try:
        assert "test_black_hole" in damage_kinds()
        damaged = inject(picture_of(32, 32), np.random.default_rng(1), ["test_black_hole"])
        assert isinstance(damaged, Injected)
        assert damaged.picture[damaged.mask == 1].mean() < 60
        with pytest.raises(ValueError, match="registered already"):
            damage_kind("test_black_hole")(lambda *_: None)
    finally:
        del registry._KINDS["test_black_hole"]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((picture_of(16, 16)[:15],), ValueError, "picture: expected .H, W, 3."),
        ((picture_of(16, 16)[..., 0],), ValueError, "picture"),
        ((picture_of(16, 16).astype(int),), TypeError, "picture: expected uint8"),
        ((picture_of(16, 16).astype(np.float32),), ValueError, r"\[0, 1\]"),
        (([1, 2],), TypeError, "numpy array"),
    ],
)
def test_bad_pictures_are_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        inject(*arguments, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"kinds": ["melt"]}, ValueError, "kinds: .*melt"),
        ({"kinds": "warp"}, TypeError, "kinds"),
        ({"kinds": []}, ValueError, "kinds"),
        ({"strength": 0.0}, ValueError, "strength"),
        ({"strength": (0.8, 0.2)}, ValueError, "strength"),
        ({"area": 1.5}, ValueError, "area"),
    ],
)
def test_bad_options_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        inject(picture_of(16, 16), np.random.default_rng(0), **options)


def test_gaps_in_the_change_are_closed_and_a_rim_is_added():
    changed = np.zeros((20, 20), bool)
    changed[8, 6:13:2] = True
    mask = mask_of_change(changed)
    assert (mask[7:10, 5:14] >= 0.5).all()
    assert not (mask[:5] > 0).any()
    assert not (mask[12:] > 0).any()
