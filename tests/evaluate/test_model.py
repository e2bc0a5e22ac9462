"""The parts of `diffdoctor evaluate model`: networks, prompts, stored measures, and the summary of both sides."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffdoctor.data.pictures import cover_crop
from diffdoctor.data.prompts import Prompt, read_prompt_file
from diffdoctor.detector import ConvDetector, write_shards
from diffdoctor.evaluate.model import networks
from diffdoctor.evaluate.model.measure import Measurer, count_real, damage_pictures, read_unit, real_units
from diffdoctor.evaluate.model.networks import Classifier, Clip, FeatureNetwork, Preference, load_features
from diffdoctor.evaluate.model.store import EvaluationFolder, FeatureFiles, MeasureFiles
from diffdoctor.evaluate.model.summary import PictureMeasures, summarise, summarise_groups
from diffdoctor.measures.features import frechet_distance, frechet_distance_of_blocks, within_class_variance
from diffdoctor.measures.rates import paired_mean
from diffdoctor.runs.errors import UserError
from diffdoctor.training.weights import same_weights, weights_digest
from support.tiny_clip import save_tiny_clip

PROMPTS = ("a photo of a red square", "a photo of a green circle")


def random_pictures(count, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_tiny_clip(folder, PROMPTS)
    return str(folder)


class TestNetworks:
    def test_features_that_are_not_finite_are_refused(self):
        features = FeatureNetwork("own", lambda pictures: pictures.flatten(1).float() / 0)
        detector = ConvDetector((8, 8))
        with pytest.raises(UserError, match="--features: expected a network whose features are finite"):
            Measurer(detector, detector, features).measure(random_pictures(2))

    def test_clip_score_is_100_times_the_cosine(self, clip_folder):
        from transformers import CLIPModel, CLIPProcessor

        clip, pictures = Clip(clip_folder), random_pictures(4, 32)
        prompts = [PROMPTS[i % 2] for i in range(4)]
        scores = clip.scores(pictures, prompts)
        model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
        inputs = processor(text=prompts, images=list(pictures), return_tensors="pt", padding=True)
        with torch.no_grad():
            # The model's own logits are its temperature times the cosine.
            expected = model(**inputs).logits_per_image.diagonal() / model.logit_scale.exp() * 100
        torch.testing.assert_close(scores, expected.clamp_min(0), atol=1e-4, rtol=1e-5)
        assert scores.std() > 0

    def test_preference_is_the_models_own_logit(self, clip_folder, tmp_path):
        from transformers import CLIPModel, CLIPProcessor

        # as PickScore's repository: a model without a processor
        CLIPModel.from_pretrained(clip_folder).save_pretrained(tmp_path / "model")
        preference, pictures = Preference(str(tmp_path / "model"), str(clip_folder)), random_pictures(4, 32)
        prompts = [PROMPTS[i % 2] for i in range(4)]
        inputs = CLIPProcessor.from_pretrained(clip_folder)(
            text=prompts, images=list(pictures), return_tensors="pt", padding=True
        )
        with torch.no_grad():
            expected = preference.model(**inputs).logits_per_image.diagonal()
        torch.testing.assert_close(preference.scores(pictures, prompts), expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(UserError, match=r"--preference .* cannot be loaded"):
            Preference(str(tmp_path / "model"))
        with pytest.raises(UserError, match="--preference_processor nowhere: expected a folder or a hub id"):
            Preference(str(tmp_path / "model"), "nowhere")

    def test_prompts_beyond_clips_limit_are_cut(self, clip_folder):
        long = " ".join(["square"] * 200)
        clip, pictures, texts = Clip(clip_folder), random_pictures(2), [long, PROMPTS[0]]
        stated = clip.scores(pictures, texts)
        assert stated.shape == (2,)
        # As of a folder whose tokenizer_config.json says nothing: the model's limit counts.
        clip.processor.tokenizer.model_max_length = int(1e30)
        torch.testing.assert_close(clip.scores(pictures, texts), stated)

    def test_a_detector_is_no_clip(self, tmp_path):
        ConvDetector((8, 8)).save_pretrained(tmp_path / "detector")
        with pytest.raises(UserError, match=r"--clip .* cannot be loaded"):
            Clip(str(tmp_path / "detector"))
        with pytest.raises(UserError, match="--clip nowhere: expected a file, a folder or a hub id"):
            Clip("nowhere")

    def test_classifier_of_transformers_knows_its_labels(self, tmp_path):
        from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

        names = {0: "cat", 1: "dog"}
        config = ViTConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            image_size=16, patch_size=8, id2label=names, label2id={v: k for k, v in names.items()},
        )  # fmt: skip
        model = ViTForImageClassification(config).eval()
        model.save_pretrained(tmp_path)
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
        classifier, pictures = Classifier(str(tmp_path)), random_pictures(6)
        assert [classifier.class_index(name) for name in ("cat", "dog")] == [0, 1]
        with torch.no_grad():
            guesses = model(pixel_values=pictures.float() / 127.5 - 1).logits.argmax(1)
        assert torch.equal(classifier.right(pictures, guesses), torch.ones(6, dtype=torch.bool))
        assert torch.equal(classifier.right(pictures, 1 - guesses), torch.zeros(6, dtype=torch.bool))
        with pytest.raises(
            UserError, match=r"--prompts: expected labels of the classifier .* \(cat, dog\), got 'bird'"
        ):
            classifier.class_index("bird")
        features = load_features(str(tmp_path))
        assert features(pictures).shape == (6, 16)

    def test_features_and_classifier_from_a_file(self, tmp_path):
        class Mean(torch.nn.Module):
            def forward(self, pictures):
                return pictures.mean(dim=(2, 3))

        path = str(tmp_path / "mean.pt")
        torch.jit.script(Mean()).save(path)
        pictures = random_pictures(5)
        expected = (pictures.float() / 255).mean(dim=(2, 3))
        torch.testing.assert_close(load_features(path)(pictures), expected)
        classifier = Classifier(path)
        assert classifier.class_index("2") == 2
        assert torch.equal(classifier.right(pictures, torch.full((5,), 2)), expected.argmax(1) == 2)
        (tmp_path / "text.pt").write_text("no network")
        with pytest.raises(UserError, match="or a TorchScript file, got a file of another format"):
            load_features(str(tmp_path / "text.pt"))

    def test_features_without_a_network_are_thumbnails(self, monkeypatch):
        monkeypatch.setattr(networks, "inception_weights", lambda: None)
        features = load_features("auto")
        pictures = random_pictures(2, 64)
        pictures[1] = 51
        assert features(pictures).shape == (2, 192)
        torch.testing.assert_close(features(pictures)[1], torch.full((192,), 0.2))
        assert "not FID in the usual sense" in features.note
        assert load_features("none") is None

    def test_clip_serves_as_features(self, clip_folder, monkeypatch):
        monkeypatch.setattr(networks, "inception_weights", lambda: None)
        clip = Clip(clip_folder)
        assert load_features("auto", clip)(random_pictures(3)).shape == (3, 16)
        with pytest.raises(UserError, match="--features clip: expected the model as --clip, got none"):
            load_features("clip")

    def test_inception_is_never_fetched(self, monkeypatch, tmp_path):
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

        def download(*args, **kwargs):
            raise AssertionError("a download was tried")

        monkeypatch.setattr(torch.hub, "download_url_to_file", download)
        with pytest.raises(UserError, match="not on this machine and are not downloaded automatically: save https"):
            load_features("inception")
        with pytest.raises(UserError, match="one of inception-64"):
            load_features("inception-100")
        # A pickle that would run code is refused before anything unpickles it.
        (tmp_path / "checkpoints").mkdir()
        torch.save(Prompt("not weights"), tmp_path / "checkpoints" / networks.INCEPTION_FILE)
        with pytest.raises(UserError, match="--features inception: "):
            load_features("inception")
        assert load_features("pixels").module is None


class TestSameWeights:
    def test_a_copy_in_another_precision_is_the_same_detector(self):
        torch.manual_seed(0)
        one, other, copy = ConvDetector((8, 8)), ConvDetector((8, 8)), ConvDetector((8, 8))
        copy.load_state_dict({k: v.bfloat16().float() for k, v in one.state_dict().items()})
        assert weights_digest(copy) != weights_digest(one)
        assert same_weights(copy, one)
        assert not same_weights(other, one)
        assert not same_weights(ConvDetector((8, 16)), one)


class TestPrompts:
    def test_all_three_kinds_of_file(self, tmp_path):
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        (tmp_path / "a.txt").write_text("one\n\n  two \n", encoding="utf-8")
        assert read_prompt_file(tmp_path / "a.txt") == [Prompt("one"), Prompt("two")]
        rows = [{"prompt": "one", "category": "hands", "label": 3}, {"prompt": "two", "category": None, "seed": 7}]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        expected = [Prompt("one", "hands", "3"), Prompt("two")]
        assert read_prompt_file(tmp_path / "a.jsonl") == expected
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
        assert read_prompt_file(str(tmp_path / "a.parquet")) == expected

    def test_what_editors_leave_in_a_file(self, tmp_path):
        (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\r\n".encode())
        assert read_prompt_file(tmp_path / "a.txt") == [Prompt("one"), Prompt("two")]
        (tmp_path / "a.jsonl").write_bytes('\ufeff{"prompt": "one\u2028more"}\r\n\r\n{"prompt": "two"}\r\n'.encode())
        assert read_prompt_file(tmp_path / "a.jsonl") == [Prompt("one\u2028more"), Prompt("two")]

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.txt", "\n \n", "expected at least one prompt, got none"),
            ("a.jsonl", '{"prompt": "one"}\nnonsense', "expected a JSON object in line 2, got 'nonsense'"),
            ("a.jsonl", '{"text": "one"}', "expected `prompt` in row 1, got text"),
            ("a.jsonl", '{"prompt": "one"}\n{"text": "two"}', "expected `prompt` in row 2, got text"),
            ("a.jsonl", '{"prompt": ["one"]}', r"expected text as `prompt` in row 1, got \['one'\]"),
            ("a.parquet", "nonsense", "expected a Parquet file"),
        ],
        ids=["empty", "broken-line", "other-column", "column-that-ends", "no-text", "no-parquet"],
    )
    def test_what_is_wrong_is_said(self, tmp_path, name, text, message):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            read_prompt_file(tmp_path / name)


class TestStore:
    def test_features_on_the_disk_give_the_figures_of_features_in_memory(self, tmp_path):
        features = torch.randn(500, 5, generator=torch.Generator().manual_seed(0))
        store, units = MeasureFiles(tmp_path), []
        for number, part in enumerate(features.split(37)):
            units.append(f"{number:04d}")
            values = {"judge": part[:, 0].numpy(), "detector": part[:, 1].numpy(), "features": part.numpy()}
            assert not store.is_done(units[-1])
            store.save(units[-1], values)
            assert store.is_done(units[-1])
        found = store.load(units)
        assert torch.equal(found.judge, features[:, 0])
        numbers = torch.tensor([499, 0, 37, 36, 250, 0])
        assert torch.equal(found.features[numbers], features[numbers])
        labels = torch.arange(500) % 7
        assert within_class_variance(found.features, labels) == pytest.approx(within_class_variance(features, labels))
        expected = frechet_distance(features[:200], features[200:])
        halves = (found.features[torch.arange(200)],), (found.features[torch.arange(200, 500)],)
        assert frechet_distance_of_blocks(*halves) == pytest.approx(expected)

    def test_few_files_are_open_however_many_there_are(self, tmp_path):
        paths = []
        for number in range(300):
            paths.append(tmp_path / f"{number}.npy")
            np.save(paths[-1], np.full((2, 3), number, np.float32))
        rows = FeatureFiles(paths, [2] * 300)
        everything = rows[torch.arange(600)]
        assert torch.equal(everything[:, 0], torch.arange(300).repeat_interleave(2).float())
        assert rows._open.cache_info().currsize <= 128

    @pytest.mark.parametrize("run", [None, "[]", '{"pictures": 5}', "not JSON"])
    def test_what_something_else_left_is_never_replaced(self, tmp_path, run):
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures" / "holiday.jpg").write_bytes(b"mine")
        if run is not None:
            (tmp_path / "run.json").write_text(run)
        for overwrite in (False, True):
            with pytest.raises(UserError, match="holds something else"):
                EvaluationFolder(tmp_path, {"seed": 0}).check(overwrite=overwrite)

    def test_a_folder_whose_first_file_was_cut_short_by_a_kill_is_gone_on_with(self, tmp_path):
        (tmp_path / ".run.json.diffdoctor-tmp-abcd1234.json").write_text("{")
        folder = EvaluationFolder(tmp_path, {"seed": 0})
        folder.check()
        folder.begin()
        assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
        folder.pictures("before").save(0, torch.zeros(3, 2, 2, dtype=torch.uint8))
        with pytest.raises(UserError, match="another seed"):
            EvaluationFolder(tmp_path, {"seed": 1}).check()
        EvaluationFolder(tmp_path, {"seed": 1}).check(overwrite=True)

    def test_a_folder_that_is_taken_away_is_known_until_the_end(self, tmp_path, monkeypatch):
        folder, unlink = EvaluationFolder(tmp_path / "out", {"seed": 0}), Path.unlink
        folder.begin()
        (tmp_path / "out" / "config.yaml").write_text("")

        def killed(path, missing_ok=False):
            unlink(path, missing_ok)
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.discard_if_empty()
        EvaluationFolder(tmp_path / "out", {"seed": 0}).check()
        monkeypatch.undo()
        folder.discard_if_empty()
        assert not (tmp_path / "out").exists()

    def test_units_without_a_picture_are_passed_over(self, tmp_path):
        store = MeasureFiles(tmp_path)
        assert store.load_all() is None
        store.save("00", {})
        store.save("01", {"judge": np.ones(2, np.float32), "detector": np.zeros(2, np.float32)})
        assert len(store.load_all().judge) == 2
        assert store.load_all().features is None


class TestRealPictures:
    def test_labelled_shards_are_told_apart(self, tmp_path):
        from diffdoctor.data.tar import SkipCounts

        pictures = random_pictures(6).permute(0, 2, 3, 1).numpy()
        mask = np.zeros((16, 16), np.float32)
        kinds = ["", "", "recompress", "tint", "tint", ""]
        samples = [
            {"picture": p, "mask": mask + (kind == "tint"), "kind": kind}
            for p, kind in zip(pictures, kinds, strict=True)
        ]
        write_shards(samples, tmp_path / "shards")
        units = real_units([str(tmp_path / "shards")])
        counts = SkipCounts()
        clean = [p for unit in units for p in read_unit(unit, (16, 16), counts, damaged=False)]
        broken = [p for unit in units for p in read_unit(unit, (16, 16), counts, damaged=True)]
        assert np.array_equal(clean, pictures[[0, 1, 5]])
        assert np.array_equal(broken, pictures[[3, 4]])
        assert count_real(units, damaged=True) == 2

    def test_a_picture_is_cut_at_its_middle(self):
        picture = np.zeros((16, 32, 3), np.uint8)
        picture[:, 8:24] = 200
        assert cover_crop(picture, (16, 16)).shape == (16, 16, 3)
        assert (cover_crop(picture, (16, 16)) == 200).all()
        assert cover_crop(picture, (16, 32)) is picture

    def test_damage_depends_on_the_index_alone(self):
        pictures = list(random_pictures(6, 32).permute(0, 2, 3, 1).numpy())
        together, apart = (
            damage_pictures(pictures, 1, 2, 0),
            damage_pictures(pictures[:2], 1, 2, 0) + damage_pictures(pictures[2:], 1, 2, 2),
        )
        assert np.array_equal(together, apart)
        assert all((a != b).any() for a, b in zip(together, pictures, strict=True))
        with pytest.raises(UserError, match="at least 16 pixels"):
            damage_pictures([np.zeros((8, 8, 3), np.uint8)], 0, 0, 0)


class TestSummary:
    def measures(self, shares, **values):
        shares = torch.tensor(shares)
        return PictureMeasures(judge=shares, detector=shares / 2, **values)

    def test_figures_by_hand(self):
        before = self.measures([0.5, 0.03, 0.0, 0.0], clip_score=torch.tensor([20.0, 22.0, 30.0, 32.0]))
        after = self.measures([0.0, 0.03, 0.0, 0.01], clip_score=torch.tensor([24.0, 22.0, 30.0, 30.0]))
        labels = torch.tensor([0, 1, 0, 1])
        metrics = summarise(before, after, labels, real=self.measures([0.0, 0.2]), damaged=self.measures([0.9]))
        judge = metrics["artifact_rate"]["judge"]
        assert (judge["before"], judge["after"], judge["ratio"]) == (0.5, 0.25, 0.5)
        assert (judge["real"], judge["damaged"]) == (0.5, 1.0)
        assert metrics["artifact_rate"]["detector"]["before"] == 0.25
        assert metrics["flagged_area"]["judge"] == pytest.approx({"before": 0.1325, "after": 0.01})
        score = metrics["clip_score"]
        assert (score["before"], score["after"], score["difference"]) == (26.0, 26.5, 0.5)
        # The last two were clean before.
        assert (score["clean_before"], score["clean_after"]) == (31.0, 30.0)
        assert "fid" not in metrics
        assert "variance" not in metrics

    def test_a_collapse_shows_in_the_variance_not_in_the_rate(self):
        features = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(40) % 4
        before = self.measures([0.5] * 20 + [0.0] * 20, features=features)
        after = self.measures([0.0] * 40, features=features[labels])
        metrics = summarise(before, after, labels, real=PictureMeasures(features=features + 0.1))
        assert metrics["artifact_rate"]["judge"]["after"] == 0
        assert metrics["variance"]["after"] < 1e-6 < metrics["variance"]["before"]
        assert metrics["fid"]["before"] == pytest.approx(0.03, abs=1e-4)
        assert metrics["fid"]["after"] > metrics["fid"]["before"]
        assert metrics["recall"]["after"] < 0.5 < metrics["recall"]["before"]
        assert metrics["kid"]["difference_interval"][1] > 0
        fewer = summarise(before, after, labels, real=PictureMeasures(features=features[:4]), fid=False)
        assert "fid" not in fewer
        assert set(fewer["mmd"]) >= {"before", "after", "difference", "before_interval"}

    def test_prompts_drawn_once_have_no_variance(self):
        side = self.measures([0.0, 0.0], features=torch.randn(2, 3))
        assert summarise(side, side, torch.arange(2))["variance"] == {"before": None, "after": None}

    def test_groups(self):
        before, after = self.measures([0.5, 0.5, 0.0]), self.measures([0.0, 0.5, 0.0])
        groups = summarise_groups(before, after, ["hands", "text", "hands"])
        assert {name: group["pictures"] for name, group in groups.items()} == {"hands": 2, "text": 1}
        assert groups["hands"]["artifact_rate"]["judge"]["before"] == 0.5
        assert groups["text"]["artifact_rate"]["judge"]["ratio"] == 1.0


def test_paired_mean_respects_the_pairing():
    rng = np.random.default_rng(0)
    before = rng.normal(0, 10, 300)
    change = paired_mean(before, before + 0.1)
    assert change["difference"] == pytest.approx(0.1)
    assert change["difference_interval"] == pytest.approx([0.1, 0.1])
    noisy = paired_mean(before, before + rng.normal(0.5, 1, 300))
    low, high = noisy["difference_interval"]
    assert low < noisy["difference"] < high
    assert high - low == pytest.approx(2 * 1.96 / 300**0.5, rel=0.2)
    with pytest.raises(ValueError, match=r"\(N,\)"):
        paired_mean([1.0], [1.0, 2.0])
