"""Prompts and pairs that do not fit into memory: the same treatment from files, and nothing encoded twice."""

import pytest
import torch

from diffdoctor.runs.errors import UserError
from diffdoctor.treat import treat
from diffdoctor.treat.encoded_prompts import EncodedPrompts
from diffdoctor.treat.families import Conditioning, family_of
from diffdoctor.treat.rows import RowStore
from support.tiny_pipelines import PROMPTS, tiny_pipeline
from support.treatment import pairs, random_detector, small

MANY = [f"{prompt} {number}" for prompt in PROMPTS for number in range(3)]


def filled(store, made=None):
    """Seven rows in three additions; what had to be made is appended to `made`."""
    generator = torch.Generator().manual_seed(0)
    values, halves = torch.randn(7, 2, 3, generator=generator), torch.randn(7, generator=generator).bfloat16()
    for start, end in ((0, 3), (3, 6), (6, 7)):

        def make(start=start, end=end):
            if made is not None:
                made.append(start)
            return {"values": values[start:end], "halves": halves[start:end], "same": torch.ones(end - start, 2)}

        store.add(end - start, make)
    return values, halves


@pytest.mark.parametrize("limit", [0, 40, 10_000])
def test_rows_are_taken_in_any_order(tmp_path, limit):
    store = RowStore("some", limit, tmp_path)
    values, halves = filled(store)
    assert len(store) == 7
    assert store.in_files == (limit < 10_000)
    assert len(list(tmp_path.iterdir())) == (3 if store.in_files else 0)
    index = torch.tensor([6, 0, 3, 0, 5])
    taken = store.take(index)
    assert torch.equal(taken["values"], values[index])
    assert torch.equal(taken["halves"], halves[index])
    assert torch.equal(taken["same"], torch.ones(5, 2))


def test_a_temporary_folder_goes_with_the_store():
    store = RowStore("some", 0)
    values, _ = filled(store)
    folder = store._path(0).parent
    assert torch.equal(store.take(torch.tensor([4]))["values"], values[4:5])
    assert folder.is_dir()
    del store
    assert not folder.exists()


def test_what_a_run_wrote_is_not_made_again(tmp_path):
    filled(RowStore("some", 0, tmp_path))
    (tmp_path / "some-000000003.safetensors").unlink()
    made = []
    store = RowStore("some", 1e9, tmp_path)
    values, _ = filled(store, made)
    assert made == [3]
    assert torch.equal(store.take(torch.arange(7))["values"], values)


def test_processes_of_a_machine_write_a_part_each(tmp_path):
    made = [[], []]
    stores = [RowStore("some", 0, tmp_path, (number, 2)) for number in range(2)]
    for store, of_process in zip(stores, made, strict=True):
        values, _ = filled(store, of_process)
    assert made == [[0, 6], [3]]
    for store in stores:
        assert torch.equal(store.take(torch.arange(7))["values"], values)


def run(pipeline, folder=None, **options):
    config = small(steps=2, encode_batch_size=4, guidance_scale=3.0, evaluate_every=0, **options)
    return treat(pipeline, random_detector(), MANY, config, offline=pairs(), output_dir=folder, progress=False)


@pytest.mark.cpu
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_files_change_no_bit(tmp_path, family):
    losses = [
        [row["loss"] for row in run(tiny_pipeline(family), folder, embedding_cache=cache).history]
        for folder, cache in ((None, 1.0), (None, 0.0), (tmp_path / "out", 0.0))
    ]
    assert losses[0] == losses[1] == losses[2]
    # what was only for the way is gone
    assert not (tmp_path / "out" / "encoded").exists()


def test_nothing_is_encoded_twice_after_a_stop(tmp_path, monkeypatch):
    pipeline = tiny_pipeline("sd")
    family = type(family_of(pipeline))
    encoded, original = [], family.encode_prompts

    def counted(self, prompts, **options):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(list(prompts))
        return original(self, prompts, **options)

    monkeypatch.setattr(family, "encode_prompts", counted)
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, tmp_path, embedding_cache=0.0)
    assert encoded == [MANY[:4], MANY[4:8]]
    again = []
    monkeypatch.setattr(family, "encode_prompts", lambda self, p, **o: again.append(list(p)) or original(self, p, **o))
    run(tiny_pipeline("sd"), tmp_path, embedding_cache=0.0)
    assert again[0] == MANY[8:]
    assert not any(prompt in part for part in again for prompt in MANY[:8])


def test_pairs_that_can_be_read_once_are_refused():
    samples = ({"picture": picture, "prompt": prompt} for picture, prompt in zip(*pairs(), strict=True))
    with pytest.raises(UserError, match=r"offline: expected pairs that can be read more than once.*got generator"):
        treat(tiny_pipeline("sd"), random_detector(), PROMPTS, small(), offline=samples, progress=False)


def test_pairs_are_read_one_at_a_time():
    class Samples:
        """Holds no picture."""

        def __len__(self):
            return 6

        def __getitem__(self, index):
            pictures, prompts = pairs()
            return {"picture": pictures[index], "prompt": prompts[index]}

    config = small(steps=1, evaluate_every=0)
    a, b = (
        treat(tiny_pipeline("sd"), random_detector(), PROMPTS, config, offline=offline, progress=False)
        for offline in (Samples(), pairs())
    )
    assert a.history == b.history


def test_conditioning_is_what_the_family_encodes():
    family, cpu = family_of(tiny_pipeline("sdxl")), torch.device("cpu")
    options = {"guidance_scale": 3.0, "height": 16, "width": 16}
    store = RowStore("prompts", 0)
    encoded = EncodedPrompts(family, MANY, store, batch_size=len(MANY), device=cpu, **options)
    expected = family.encode_prompts(MANY, device=cpu, **options).rows(torch.tensor([5, 1]))
    found = encoded.rows(torch.tensor([5, 1]))
    assert isinstance(found, Conditioning)
    for theirs, ours in ((expected.positive, found.positive), (expected.negative, found.negative)):
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize("limit", [0, 1e9])
@pytest.mark.parametrize("name", ["z_image", "qwen_image", "krea2"])
def test_prompts_of_unequal_length_meet(name, limit):
    family, cpu = family_of(tiny_pipeline(name)), torch.device("cpu")
    family.max_sequence_length = 32
    prompts = ["a red square", "a photo of a red square and a photo of a blue triangle", "a", "blue"]
    options = {"guidance_scale": 3.0, "height": 16, "width": 16}
    encoded = EncodedPrompts(family, prompts, RowStore("prompts", limit), batch_size=2, device=cpu, **options)
    index = torch.tensor([2, 1, 0])
    together = encoded.rows(index)
    text = "cap_feats" if name == "z_image" else "encoder_hidden_states"
    assert not together.positive[text + "_mask"].all()
    latents, time = torch.randn(3, *family.latent_shape(16, 16)), torch.full((), 500.0)
    for scale in (0.0, 3.0):
        found = family.predict(latents, time, together, scale)
        for row, number in enumerate(index.tolist()):
            alone = encoded.rows(torch.tensor([number]))
            assert text + "_mask" not in alone.positive
            wanted = family.predict(latents[row : row + 1], time, alone, scale)
            torch.testing.assert_close(found[row : row + 1], wanted, atol=1e-5, rtol=1e-4)
    assert (found[:1] - family.predict(latents[:1], time, encoded.rows(index[1:2]), 3.0)).abs().max() > 1e-4
