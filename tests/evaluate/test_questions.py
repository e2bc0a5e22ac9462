"""Yes-or-no questions about pictures, to a small random model of pictures and text."""

import doctest
import json
import shutil

import numpy as np
import pytest
import torch

from diffdoctor.evaluate.model import questions as module
from diffdoctor.evaluate.model.questions import Questioner, picture_scores, questions_from, read_questions
from diffdoctor.runs.errors import UserError
from support.model_evaluation import evaluate
from support.tiny_pipelines import PROMPTS
from support.tiny_vlm import save_tiny_vlm

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    save_tiny_vlm(folder, ["Does the picture show a cat and is there red? Answer with yes or no.", *PROMPTS])
    return str(folder)


def test_questions_are_made_of_the_prompts_words():
    assert doctest.testmod(module).failed == 0
    assert questions_from("A cat with a hat, a cat;\n a  cat, 8, and") == [
        f"Does the picture show {part}?" for part in ("A cat", "a hat", "a cat")
    ]
    assert questions_from("...") == []


def test_a_file_of_questions(tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [{"prompt": "a", "questions": ["Is it a?", "Is it red?"]}, {"prompt": "b", "questions": ["Is it b?"]}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_questions(path, ["b", "b"]) == {"b": ["Is it b?"]}
    with pytest.raises(UserError, match="questions for every prompt, got 1 without, the first of them 'c'"):
        read_questions(path, ["a", "c"])
    for line in ("[]", '{"prompt": "a", "questions": "Is it?"}', '{"prompt": "a", "questions": [" "]}', "{"):
        path.write_text(line)
        with pytest.raises(UserError, match="a list `questions` in line 1"):
            read_questions(path, ["a"])
    path.write_text(json.dumps({"prompt": "a", "questions": ["x"] * 33}))
    with pytest.raises(UserError, match="1 to 32 questions in line 1, got 33"):
        read_questions(path, ["a"])


def test_the_probability_is_that_of_the_next_tokens_logits(vlm):
    """Each question by itself, without the padding that a batch of questions of unequal length brings."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    asked = {"p": ["Does the picture show a cat?", "Is there red in the picture, and a cat, and red?", "cat?"]}
    questioner, pictures = Questioner(vlm, asked), torch.randint(0, 256, (2, 3, 40, 48), dtype=torch.uint8)
    found = questioner.scores(pictures, ["p", "a cat"], 4)
    assert found.shape == (2, 4) and found.isnan().tolist() == [[False] * 3 + [True], [False] + [True] * 3]
    model = LlavaForConditionalGeneration.from_pretrained(vlm).eval()
    processor = AutoProcessor.from_pretrained(vlm)
    vocabulary = processor.tokenizer.get_vocab()
    for picture, row, texts in zip(pictures, found, (asked["p"], ["Does the picture show a cat?"]), strict=True):
        for probability, text in zip(row, texts, strict=False):
            text = f"<image>\n{text} Answer with yes or no."
            inputs = processor(images=[picture.permute(1, 2, 0).numpy()], text=[text], return_tensors="pt")
            with torch.no_grad():
                logits = model(**inputs).logits[0, -1]
            expected = logits[[vocabulary["yes</w>"], vocabulary["no</w>"]]].softmax(0)[0]
            torch.testing.assert_close(probability, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(picture_scores(found)[0], found[0, :3].prod() ** (1 / 3))
    assert picture_scores(torch.full((1, 2), torch.nan)).tolist() == [1.0]


def test_an_evaluation_asks_and_keeps_every_answer(files, evaluated, vlm, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    output = tmp_path / "again"
    shutil.copytree(evaluated[0], output)  # its pictures are measured again
    metrics = evaluate(files, output, vqa=vlm)
    rows = parquet.read_table(output / "pictures.parquet").to_pylist()
    for row in rows:
        assert row["questions"] == questions_from(row["prompt"]) and len(row["answers"]) == len(row["questions"])
        assert row["vqa"] == pytest.approx(np.exp(np.mean(np.log(row["answers"]))), rel=1e-4)
    before = [row["vqa"] for row in rows if row["side"] == "before"]
    assert metrics["vqa"]["before"] == pytest.approx(np.mean(before)) and len({*before}) > 1
    assert "chance of yes" in (output / "report.html").read_text()


def test_what_is_no_such_model_is_refused_in_one_line(files, tmp_path):
    for source in (str(files / "judge"), str(tmp_path)):
        with pytest.raises(UserError, match=r"--vqa .* cannot be loaded") as error:
            Questioner(source, {})
        assert "\n" not in str(error.value)
