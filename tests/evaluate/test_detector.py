"""`evaluate detector` in parts: the figures of all maps at once, memory that does not grow, and sets of odd make-up."""

import json
import math
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffdoctor.cli import main
from diffdoctor.data.shard_writer import write_shards
from diffdoctor.data.shards import ShardData
from diffdoctor.detector import ConvDetector, load_detector
from diffdoctor.detector.predict import diagnose_data
from diffdoctor.detector.samples import JoinedData
from diffdoctor.engine.options import EngineConfig
from diffdoctor.evaluate.detector import parts as detector_parts
from diffdoctor.evaluate.detector import sorted_pixels
from diffdoctor.evaluate.detector.command import EvaluateDetectorConfig, run_evaluate_detector
from diffdoctor.evaluate.detector.compare import paired_differences
from diffdoctor.evaluate.detector.measure import evaluate_maps, measure
from diffdoctor.evaluate.detector.sorted_pixels import SortedChunk
from diffdoctor.measures import curves as detector_pixels
from diffdoctor.measures import statistics as detector_statistics
from diffdoctor.measures.curves import average_precision_of_chunks, encode, pixel_curves
from diffdoctor.measures.pixels import average_precision_of
from diffdoctor.measures.statistics import PictureStatistics
from diffdoctor.runs.errors import UserError

pytest.importorskip("pyarrow")
pytest.importorskip("accelerate")
pytest.importorskip("pycocotools")
pytest.importorskip("matplotlib")


def samples(count, damaged=0.5, side=16, seed=0, categories=("cat", "dog", ""), generators=("a", "b"), kinds=False):
    """Pictures of noise, of which a share has a bright square that is marked; two kinds of damage and two of change."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        picture = rng.integers(0, 120, (side, side, 3), dtype=np.uint8)
        mask = np.zeros((side, side), np.float32)
        if index < damaged * count:
            y, x = rng.integers(0, side - 6, 2)
            mask[y : y + 6, x : x + 6] = rng.uniform(0.4, 1)
            picture[y : y + 6, x : x + 6] += 40 if kinds and index % 2 else 100
        names = {"category": categories[index % len(categories)], "generator": generators[index % len(generators)]}
        if kinds:
            names["kind"] = (("tint", "warp") if mask.any() else ("", "benign:grain"))[index % 2]
        yield {"picture": picture, "mask": mask, **names}


@pytest.fixture
def detector(tmp_path, monkeypatch):
    """A detector that marks what is bright, more or less."""
    import torch

    def network(self, pixel_values):
        bright = torch.nn.functional.avg_pool2d(pixel_values.mean(dim=1, keepdim=True), 3, 1, 1)
        return 6 * bright + 2 * pixel_values[:, :1]

    monkeypatch.setattr(ConvDetector, "network", network)
    ConvDetector((8, 16)).save_pretrained(tmp_path / "detector")
    return tmp_path / "detector"


def evaluated(tmp_path, detector, sets, name="out", **options):
    config = EvaluateDetectorConfig(
        str(detector), [str(folder) for folder in sets], str(tmp_path / name), **{"bootstrap": 10, **options}
    )
    return run_evaluate_detector(config)


def assert_close(got, expected, path=""):
    """The same nested figures; null for NaN."""
    if isinstance(expected, dict):
        assert list(got) == list(expected), path
        for name in expected:
            assert_close(got[name], expected[name], f"{path}/{name}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), path
        for index, pair in enumerate(zip(got, expected, strict=True)):
            assert_close(*pair, f"{path}/{index}")
    elif isinstance(expected, float) and math.isnan(expected):
        assert got is None, path
    elif "auprc" in path:
        # The same sum in another order.
        assert got == pytest.approx(expected, abs=1e-12), path
    else:
        assert got == expected, path


@pytest.mark.cpu
@pytest.mark.parametrize("small", [False, True], ids=["one run", "many runs"])
def test_in_parts_every_figure_is_that_of_all_maps_at_once(tmp_path, detector, monkeypatch, small):
    if small:
        monkeypatch.setattr(detector_statistics, "SLICE_PIXELS", 600)
        monkeypatch.setattr(sorted_pixels, "PIXELS_IN_CHUNK", 1500)
        monkeypatch.setattr(average_precision_of_chunks, "__defaults__", (97,))
    for name, seed in (("first", 0), ("second", 1)):
        write_shards(samples(23, seed=seed, kinds=True), tmp_path / name, shard_size=5)
    sets = [tmp_path / "first", tmp_path / "second"]
    whole = diagnose_data(load_detector(detector), JoinedData([ShardData(one) for one in sets]), batch_size=4)
    expected = measure(whole, bootstrap=10)
    assert 0 < expected["overall"]["map50"] < 1
    assert 0.05 < expected["overall"]["auprc"] < 0.95
    result = evaluated(tmp_path, detector, sets, batch_size=4)
    assert_close({name: result[name] for name in expected}, expected)
    assert set(result["per_category"]) == {"", "cat", "dog"}
    assert set(result["per_kind"]) == {"tint", "warp"}
    assert not (tmp_path / "out" / ".parts").exists()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.sampled_from([0.0, 1e-6, 0.25, 0.5, 0.7, 1.0]), st.booleans())), max_size=5),
    st.integers(1, 9),
    st.integers(0, 1000),
)
def test_the_area_from_sorted_runs_is_that_of_all_scores(tmp_path_factory, groups, most, seed):
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("runs") / "pixels"
    runs, place, scores, labels = [], 0, [], []
    with open(path, "wb") as file:
        for group in groups:
            values = np.array([score for score, _ in group], np.float32)
            # Some ties, some scores that are nearly alike.
            values = np.where(rng.uniform(size=values.shape) < 0.5, values, values * np.float32(0.99999))
            truths = np.array([label for _, label in group], bool)
            codes = encode(values, truths)
            file.write(codes.tobytes())
            runs.append(SortedChunk(path, place, place + len(codes)))
            place += len(codes)
            scores.append(values)
            labels.append(truths)
    scores, labels = np.concatenate([np.zeros(0, np.float32), *scores]), np.concatenate([np.zeros(0, bool), *labels])
    expected = average_precision_of(scores, labels)
    assert average_precision_of_chunks(runs, int(labels.sum()), most) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_codes_sort_as_scores_do_and_hold_the_label():
    scores = np.array([0.0, -0.0, 1e-45, 0.3, 0.3, 1.0], np.float32)
    codes = encode(scores, np.array([0, 1, 0, 1, 0, 1]))
    assert codes.dtype == np.uint32
    assert (codes & 1).tolist() == [0, 1, 0, 0, 1, 1]
    assert (codes >> 1).view(np.float32).tolist() == sorted(abs(scores).tolist())


def test_curves_are_the_same_added_up_in_parts():
    rng = np.random.default_rng(0)
    confidence, mask = rng.uniform(size=(2, 30, 9, 11)).astype(np.float32)
    parts = detector_pixels.PixelCurves()
    for first in range(0, 30, 7):
        one = detector_pixels.PixelCurves()
        one.add(confidence[first : first + 7], mask[first : first + 7])
        parts.merge(one)
    for name, values in pixel_curves(confidence, mask).items():
        np.testing.assert_allclose(parts.result()[name], values, rtol=1e-12)


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path, detector, monkeypatch):
    from accelerate import PartialState

    monkeypatch.setattr(sorted_pixels, "PIXELS_IN_CHUNK", 2**13)
    monkeypatch.setattr(average_precision_of_chunks, "__defaults__", (2**13,))
    write_shards(samples(200, side=64), tmp_path / "set", shard_size=100)
    state, model, peaks = PartialState(cpu=True), load_detector(detector), []
    data = ShardData(tmp_path / "set")
    # The first one pays for what is made once and kept.
    for count in (20, 20, 200):
        part = ShardData(tmp_path / "set")
        for name in ("keys", "categories", "generators", "labels", "shards", "mask_max", "sizes", "byte_ranges"):
            setattr(part, name, getattr(data, name)[:count])
        options = {"batch_size": 8, "size": None, "strict": False}
        tracemalloc.start()
        found = detector_parts.evaluate_in_parts(model, [part], tmp_path / f"parts-{len(peaks)}", {}, state, **options)
        found.auprc("", "", np.arange(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(found.statistics) == count
    # The maps and masks of the other 180 pictures alone are 5.9 MB; their statistics and places are 0.3.
    assert peaks[2] - peaks[1] < 180 * 8000


def test_each_kind_of_damage_and_of_benign_change_has_its_figures_where_kinds_are_known(tmp_path, detector, capsys):
    write_shards(samples(40, kinds=True), tmp_path / "set")
    found = diagnose_data(load_detector(detector), ShardData(tmp_path / "set"))
    result = evaluated(tmp_path, detector, [tmp_path / "set"])
    marked, true = found.confidence >= 0.5, found.masks >= 0.5
    flags = marked.mean((1, 2)) >= 0.02
    for key, rate, kinds in (
        ("per_kind", "hit_rate", ["tint", "warp"]),
        ("clean_per_kind", "false_positive_rate", ["", "benign:grain", "tint", "warp"]),
    ):
        assert sorted(result[key]) == kinds
        for kind, figures in result[key].items():
            # A mask that nowhere reaches 0.5 marks nothing: such a picture is clean, whatever was done to it.
            of = (np.array(found.kinds) == kind) & (true.any((1, 2)) == (key == "per_kind"))
            assert figures["pictures"] == of.sum() > 0
            assert figures[rate] == flags[of].mean()
            low, high = figures[f"{rate}_interval"]
            assert 0 <= low <= figures[rate] <= high <= 1
            if key == "per_kind":
                both = (marked & true)[of].sum()
                assert figures["iou"] == pytest.approx(both / (marked | true)[of].sum())
                assert figures["recall"] == pytest.approx(both / true[of].sum())
                assert figures["precision"] == pytest.approx(both / marked[of].sum())
                assert figures["map50"] == evaluate_maps(found.confidence[of], found.masks[of], bootstrap=0)["map50"]
    assert result["per_kind"]["warp"]["hit_rate"] < result["per_kind"]["tint"]["hit_rate"]
    page, said = (tmp_path / "out" / "report.html").read_text(), capsys.readouterr().err
    assert "Per kind of damage" in page
    assert "<td>grain</td>" in page
    assert all(f"{kind} {result['per_kind'][kind]['hit_rate']:.1%}" in said for kind in ("tint", "warp"))
    write_shards(samples(4), tmp_path / "without")
    result = evaluated(tmp_path, detector, [tmp_path / "without"], name="other")
    assert result["per_kind"] == result["clean_per_kind"] == {}
    assert "kind of damage" not in (tmp_path / "other" / "report.html").read_text() + capsys.readouterr().err


@pytest.mark.parametrize(
    ("bias", "sentence"),
    [
        (-9.0, "the detector is blind: it flags none of the damaged pictures"),
        (9.0, "the detector is of no use: it flags all of the clean ones"),
    ],
)
def test_a_detector_that_sees_nothing_is_said_to_be_blind(tmp_path, capsys, bias, sentence):
    import torch

    blind = ConvDetector((8, 8))
    torch.nn.init.zeros_(blind.head.weight)
    torch.nn.init.constant_(blind.head.bias, bias)
    blind.save_pretrained(tmp_path / "blind")
    write_shards(samples(4), tmp_path / "set")
    assert evaluated(tmp_path, tmp_path / "blind", [tmp_path / "set"])["doubts"] == [sentence]
    assert capsys.readouterr().err.endswith(f"warning: {sentence}\n")
    # At the head of the page, before the measures.
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.index(sentence[4:]) < page.index("<h2>Measures")
    words = [str(tmp_path / "set"), f"--detector={tmp_path / 'blind'}", f"--output={tmp_path / 'strict'}"]
    assert main(["evaluate", "detector", *words, "--bootstrap=0", "--strict=true"]) == 3
    assert capsys.readouterr().err.endswith(f"{sentence}\n")
    assert json.loads((tmp_path / "strict" / "metrics.json").read_text())["doubts"] == [sentence]


# Nothing is marked there either.
NO_TRUTH = ("map50", "auprc", "average_precision", "iou", "f1", "precision", "recall", "kld", "cc", "sim")


@pytest.mark.parametrize(
    ("options", "empty"),
    [
        ({"count": 1, "damaged": 1}, ("mse_empty", "false_positive_rate", "auroc")),
        ({"count": 1, "damaged": 0}, ("mse_nonempty", "hit_rate", "auroc", *NO_TRUTH)),
        ({"count": 5, "damaged": 0}, ("mse_nonempty", "hit_rate", "auroc", *NO_TRUTH)),
        ({"count": 5, "damaged": 1}, ("mse_empty", "false_positive_rate", "auroc")),
        ({"count": 4, "damaged": 0.5, "categories": ("a", "b", "c", "d")}, ()),
    ],
    ids=["one damaged", "one clean", "none damaged", "none clean", "categories of one"],
)
def test_sets_without_one_kind_are_measured_where_they_can_be(tmp_path, detector, options, empty):
    write_shards(samples(**options), tmp_path / "set")
    result = evaluated(tmp_path, detector, [tmp_path / "set"])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == result
    overall = result["overall"]
    figures = {name for name, value in overall.items() if not isinstance(value, list) and value is None}
    assert figures == set(empty)
    page = (tmp_path / "out" / "report.html").read_text()
    assert ("Worst misses" in page) == (options["damaged"] > 0)
    assert ("Worst false positives" in page) == (options["damaged"] < 1)
    assert not re.search(r"\bnan\b", re.sub('"data:[^"]*"', "", page), re.IGNORECASE)


def test_pictures_of_several_sizes_are_refused_before_the_work_or_brought_to_one(tmp_path, detector):
    write_shards(samples(3), tmp_path / "small")
    write_shards(samples(3, side=24), tmp_path / "large")
    sets = [tmp_path / "small", tmp_path / "large"]
    with pytest.raises(UserError, match=r"^size: expected a side.*2 sizes \(16x16, 24x24\)"):
        evaluated(tmp_path, detector, sets)
    assert not (tmp_path / "out").exists()
    assert evaluated(tmp_path, detector, sets, size=16)["overall"]["pictures"] == 6


def test_what_lies_in_the_output_folder_is_left_alone(tmp_path, detector):
    write_shards(samples(3), tmp_path / "set")
    for folder in ("parts", ".parts"):
        (tmp_path / "out" / folder).mkdir(parents=True)
        (tmp_path / "out" / folder / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"\.parts: .*'mine\.txt', which is none of the files"):
        evaluated(tmp_path, detector, [tmp_path / "set"])
    assert (tmp_path / "out" / ".parts" / "mine.txt").is_file()
    (tmp_path / "out" / ".parts" / "mine.txt").unlink()
    evaluated(tmp_path, detector, [tmp_path / "set"])
    assert (tmp_path / "out" / "parts" / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "out" / ".parts").exists()


def test_an_evaluation_that_failed_before_its_first_part_does_not_bind_the_next(tmp_path, detector, monkeypatch):
    write_shards(samples(3), tmp_path / "set")
    monkeypatch.setattr(detector_parts, "diagnosed_batches", lambda *_, **__: iter([None]))
    with pytest.raises(AttributeError):
        evaluated(tmp_path, detector, [tmp_path / "set"], size=24)
    monkeypatch.undo()
    ConvDetector((8, 16)).save_pretrained(tmp_path / "detector")
    assert evaluated(tmp_path, detector, [tmp_path / "set"], size=16)["overall"]["pictures"] == 3


@pytest.mark.parametrize("option", ["batch_size", "size"])
def test_sizes_below_one_are_refused_by_name(option):
    with pytest.raises(UserError, match=f"^{option}: expected >= 1, got 0"):
        EvaluateDetectorConfig("d", ["set"], "out", **{option: 0})
    with pytest.raises(UserError, match=r"^seed: expected >= 0, got -1"):
        EvaluateDetectorConfig("d", ["set"], "out", seed=-1)


def test_no_pictures_are_refused():
    with pytest.raises(ValueError, match="confidence: expected at least one picture"):
        evaluate_maps(np.zeros((0, 4, 4)), np.zeros((0, 4, 4)))


def test_two_detectors_are_compared_on_the_same_pictures():
    rng = np.random.default_rng(5)
    masks = np.zeros((40, 16, 16), np.float32)
    masks[:20, 3:9, 3:9] = 1
    worse = np.clip(masks * rng.uniform(0.3, 0.8, (40, 1, 1)) + 0.02, 0, 1)
    better = np.clip(masks * 0.9 + 0.02, 0, 1)
    statistics = [PictureStatistics.of(each, masks) for each in (worse, better)]
    found = paired_differences(*statistics, bootstrap=200)
    for name in ("map50", "hit_rate", "false_positive_rate"):
        values = [each.measures(np.arange(40))[name] for each in statistics]
        assert [found[name]["before"], found[name]["after"]] == pytest.approx(values)
        assert found[name]["difference"] == pytest.approx(values[1] - values[0])
    low, high = found["map50"]["difference_interval"]
    assert 0 < low < found["map50"]["difference"] < high and (found["pictures"], found["damaged"]) == (40, 20)
    # what both have in common does not widen the interval
    same = paired_differences(statistics[0], statistics[0], bootstrap=50)
    assert same["map50"]["difference_interval"] == same["hit_rate"]["difference_interval"] == [0, 0]
    clean = [PictureStatistics.of(each[20:], masks[20:]) for each in (worse, better)]
    assert np.isnan(paired_differences(*clean, bootstrap=50)["map50"]["difference"])


def test_processes_make_the_same_report_and_go_on_where_another_was_stopped(tmp_path, monkeypatch):
    import torch

    write_shards(samples(40), tmp_path / "set")
    torch.manual_seed(0)
    ConvDetector((8, 16)).save_pretrained(tmp_path / "detector")
    options = {"batch_size": 3, "examples": 3}
    (tmp_path / "one" / ".parts-engine").mkdir(parents=True)  # of a run with an engine that was killed
    expected = evaluated(tmp_path, tmp_path / "detector", [tmp_path / "set"], "one", **options)
    assert not (tmp_path / "one" / ".parts-engine").exists()
    with monkeypatch.context() as patched:
        patched.setattr(detector_parts, "_joined", lambda paths: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluated(tmp_path, tmp_path / "detector", [tmp_path / "set"], **options)
    parts = tmp_path / "out" / ".parts"
    assert len(list(parts.glob("part-*.npz"))) == 4
    for number in (1, 2):
        (parts / f"part-00000{number}.npz").unlink()
    joined, kept = detector_parts._joined, (parts / "part-000003.npz").stat().st_mtime_ns

    def look(paths):
        assert [path.stat().st_mtime_ns <= kept for path in paths] == [True, False, False, True]
        return joined(paths)

    engine = EngineConfig(kind="processes", actors=1, cpus=torch.get_num_threads())
    monkeypatch.setattr(detector_parts, "_joined", look)
    assert evaluated(tmp_path, tmp_path / "detector", [tmp_path / "set"], engine=engine, **options) == expected
    names = ("report.html", "metrics.json")
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "one" / name).read_bytes() for name in names)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, "config.yaml"}
