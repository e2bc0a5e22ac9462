import pytest
import torch
from scipy.linalg import sqrtm

from diffdoctor.evaluate.model.networks import extract_features
from diffdoctor.measures.features import frechet_distance, within_class_variance
from diffdoctor.measures.kernel_distance import _row_sums, cubic, gaussian, kernel_distance, kernel_distances
from diffdoctor.measures.manifold import Manifold


def random_features(count, size, seed, shift=0.0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_frechet_distance_equals_its_formula():
    real, generated = random_features(300, 8, 0), 1.5 * random_features(200, 8, 1, shift=0.3)
    product = sqrtm((real.T.cov() @ generated.T.cov()).numpy()).real
    spread = real.T.cov().trace() + generated.T.cov().trace() - 2 * torch.from_numpy(product).trace()
    expected = (real.mean(0) - generated.mean(0)).square().sum() + spread
    assert frechet_distance(real, generated) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_distance_refuses_other_sizes():
    with pytest.raises(ValueError, match="real, generated: expected"):
        frechet_distance(random_features(10, 4, 0), random_features(10, 5, 0))


def test_within_class_variance_falls_when_a_class_collapses():
    features, labels = random_features(400, 6, 0), torch.arange(400) % 4
    spread = within_class_variance(features, labels)
    assert spread == pytest.approx(6, rel=0.15)
    collapsed = features.clone()
    collapsed[labels == 0] = features[0]
    assert within_class_variance(collapsed, labels) == pytest.approx(0.75 * spread, rel=0.1)


def test_extract_features_is_the_same_in_any_batch_size():
    pictures = torch.randint(0, 256, (7, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def network(batch):
        assert batch.dtype == torch.float32
        assert float(batch.max()) <= 1
        return batch.mean(dim=(2, 3))

    small = extract_features(network, pictures, batch_size=2)
    assert torch.equal(small, extract_features(network, pictures, batch_size=7))


def test_kernel_distance_is_the_librarys_kid_and_its_definition():
    from torchmetrics.image.kid import poly_mmd

    real, generated = random_features(60, 5, 0), random_features(60, 5, 1, shift=0.4)
    value, (low, high) = kernel_distance(real, generated)
    assert value == pytest.approx(float(poly_mmd(real, generated)), rel=1e-12)
    assert low < value < high
    fewer = generated[:40]
    for kernel in (cubic, gaussian):
        inside = [kernel(x, x).fill_diagonal_(0).sum() / (len(x) * (len(x) - 1)) for x in (real, fewer)]
        wanted = float(sum(inside) - 2 * kernel(real, fewer).mean())
        assert kernel_distance(real, fewer, kernel)[0] == pytest.approx(wanted, rel=1e-12)


def test_the_cubic_distance_of_two_gaussians_is_that_of_their_moments():
    """E(x·y/D + 1)³ for x, y ~ N(a, I) and N(b, I): moments of the inner product by hand."""
    size, shift = 4, 0.5

    def moment(a, b):
        # x·y, x = a + u, y = b + v: mean a·b, variance |a|² + |b|² + D, third central moment 6 a·b
        mean, variance, third = a @ b, a @ a + b @ b + size, 6 * (a @ b)
        z = mean / size + 1
        return z**3 + 3 * z * variance / size**2 + third / size**3

    zero, mean = torch.zeros(size, dtype=torch.float64), torch.full((size,), shift, dtype=torch.float64)
    truth = float(moment(zero, zero) + moment(mean, mean) - 2 * moment(zero, mean))
    value, (low, high) = kernel_distance(random_features(4000, size, 0), random_features(4000, size, 1, shift=shift))
    assert low < truth < high
    assert value == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize(("kernel", "shift", "truth"), [(cubic, 0.0, 0.0), (gaussian, 0.0, 0.0), (gaussian, 0.3, None)])
def test_intervals_cover_at_their_rate(kernel, shift, truth):
    if truth is None:
        truth = kernel_distance(random_features(5000, 8, 0), random_features(5000, 8, 1, shift), kernel)[0]
    covered = 0
    for run in range(500):
        real, generated = random_features(60, 8, 2 * run + 10), random_features(50, 8, 2 * run + 11, shift)
        low, high = kernel_distance(real, generated, kernel)[1]
        covered += low <= truth <= high
    # 95 %, and more where two sets do not differ: there the jackknife is too wide
    assert 0.92 <= covered / 500 <= (1.0 if shift == 0 else 0.98)


def test_kernel_distances_of_pairs_know_what_changed():
    real, before = random_features(80, 6, 0), random_features(70, 6, 1, shift=0.6)
    found = kernel_distances(real, before, before - 0.3)
    for name, features in (("before", before), ("after", before - 0.3)):
        value, interval = kernel_distance(real, features)
        assert (found[name], found[f"{name}_interval"]) == (value, pytest.approx(interval, rel=1e-12))
    assert found["difference"] == found["after"] - found["before"]
    assert found["difference_interval"][1] < 0
    # pairs that are alike say more of the change than two sets that are not
    apart = found["before_interval"][1] - found["before_interval"][0]
    assert found["difference_interval"][1] - found["difference_interval"][0] < apart
    same = kernel_distances(real, before, before)
    assert same["difference_interval"] == [0.0, 0.0]
    with pytest.raises(ValueError, match="generated: expected at least 3 rows, got 2"):
        kernel_distance(real, before[:2])
    with pytest.raises(ValueError, match="after: expected as many rows as before, 70, got 69"):
        kernel_distances(real, before, before[1:])


def test_manifolds_are_balls_around_every_row():
    real, generated = random_features(40, 3, 0), 1.2 * random_features(50, 3, 1, shift=0.8)
    wanted = []
    for row in generated:
        inside = False
        for centre in real:
            radius = (real - centre).norm(dim=1).sort().values[3]
            inside |= bool((row - centre).norm() <= radius)
        wanted.append(inside)
    found = Manifold(real, 3).contains(generated)
    assert found.tolist() == wanted
    assert 0 < found.sum() < len(found)
    assert Manifold(real).contains(real).all()
    assert not Manifold(real).contains(generated + 100).any()
    with pytest.raises(ValueError, match="features: expected more than 3 rows, got 3"):
        Manifold(real[:3])


def test_features_may_be_on_another_device():
    x, y = torch.empty(3, 2, device="meta"), torch.empty(4, 2, device="meta")
    assert [sums.device.type for sums in _row_sums(x, y, cubic)] == ["meta", "meta"]
