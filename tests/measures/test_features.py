import pytest
import torch
from scipy.linalg import sqrtm

from diffdoctor.evaluate.model.networks import extract_features
from diffdoctor.measures.features import frechet_distance, within_class_variance


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
