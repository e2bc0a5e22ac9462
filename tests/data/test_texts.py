"""Text files of users: prompts, captions and metadata in the encodings that editors write."""

import json

import pytest

from diffdoctor.data.captions import captions_of, read_caption, read_metadata
from diffdoctor.data.prompts import MAX_CHARACTERS, read_prompt_file
from diffdoctor.data.tar import SkipCounts
from diffdoctor.data.text import read_text, split_lines
from diffdoctor.runs.errors import UserError


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-sig"])
def test_unicode_is_read_with_and_without_a_mark(tmp_path, encoding):
    text = "café \u2028 手\r\nb\rc\n"
    data = b"\xfe\xff" + text.encode("utf-16-be") if encoding == "utf-16-be-sig" else text.encode(encoding)
    (tmp_path / "a.txt").write_bytes(data)
    assert read_text(tmp_path / "a.txt", limit=1000) == text
    assert split_lines(text) == ["café \u2028 手", "b", "c", ""]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("a\r\ncaf\xe9".encode("cp1252"), r"a\.txt, line 2: expected text in UTF-8.* got the byte 0xe9"),
        (b"\xef\xbb\xbfa\nb\nc\xff", r"a\.txt, line 3: expected text in UTF-8.* got the byte 0xff"),
        ("a cat\nb".encode("utf-16-le"), r"a\.txt, line 1: expected text in UTF-8.* got the byte 0x00"),
        ("a".encode("utf-32"), r"a\.txt, line 1: expected text in UTF-8"),
        (b"x" * 1001, r"a\.txt: expected a text of at most 1,000 bytes, got a larger file"),
    ],
    ids=["cp1252", "broken after a mark", "utf-16 without a mark", "utf-32", "too large"],
)
def test_other_files_are_refused_by_name_and_line(tmp_path, data, words):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=words):
        read_text(tmp_path / "a.txt", limit=1000)
    with pytest.raises(UserError, match=r"b\.txt: cannot be read \(No such file"):
        read_text(tmp_path / "b.txt", limit=1000)


def prompts_of(tmp_path, data, name="prompts.txt"):
    (tmp_path / name).write_bytes(data)
    return [prompt.text for prompt in read_prompt_file(tmp_path / name)]


def test_a_prompt_ends_where_its_line_does(tmp_path):
    odd = "a cat\u2028in\x85a\x0bhat\x0c\x1cnow\u2029"
    assert prompts_of(tmp_path, f"{odd}\r\na dog\ra cow\n\n".encode()) == [odd.strip(), "a dog", "a cow"]
    assert prompts_of(tmp_path, "ein Käse\na dog".encode("utf-16")) == ["ein Käse", "a dog"]
    row = json.dumps({"prompt": odd, "label": 3}, ensure_ascii=False)
    assert prompts_of(tmp_path, f"\ufeff{row}\r\n".encode(), "a.jsonl") == [odd.strip()]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        (
            "p.txt",
            b"a cat\n" + b"x" * (MAX_CHARACTERS + 1),
            r"up to 20,000 characters as `prompt` in row 2, got 20,001",
        ),
        ("p.txt", "caf\xe9".encode("cp1252"), r"--prompts .*p\.txt, line 1: expected text in UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\\ud800 cat"}', r"Unicode as `prompt` in row 2"),
        ("p.jsonl", b'{"prompt": "cat", "category": "\\ud800"}', r"Unicode as `category` in row 1"),
        ("p.jsonl", b'{"prompt": "cat", "label": {"a": 1}}', r"text as `label` in row 1, got {'a': 1}"),
        ("p.jsonl", b'{"prompt":' + b"[" * 100_000, r"a JSON object in line 1"),
        ("p.parquet", b"PAR1 not at all", r"expected a Parquet file"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_named(tmp_path, name, data, words):
    with pytest.raises(UserError, match=words):
        prompts_of(tmp_path, data, name)


def test_prompts_in_parquet_are_checked_before_they_are_made(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table({"prompt": ["a cat", None, "a dog"], "label": [1, 2, None], "other": [b"\xff"] * 3})
    parquet.write_table(table, tmp_path / "p.parquet")
    found = read_prompt_file(tmp_path / "p.parquet")
    assert [(prompt.text, prompt.label) for prompt in found] == [("a cat", "1"), ("a dog", "")]
    for column, words in (
        (pa.array(["a", "x" * (4 * MAX_CHARACTERS + 1)]), "up to 20,000 characters"),
        (pa.array([["a"]]), "text in the column prompt"),
        (pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"], pa.binary()).buffers()), "UTF-8 in the column"),
    ):
        parquet.write_table(pa.table({"prompt": column}), tmp_path / "p.parquet")
        with pytest.raises(UserError, match=words):
            read_prompt_file(tmp_path / "p.parquet")


def test_metadata_of_other_systems(tmp_path):
    rows = [
        {"file_name": "./a.png", "text": "a\u2028b"},
        {"file_name": "sub\\b.png", "caption": "b"},
        {"file_name": "sub/caf\u00e9.png", "prompt": "c"},
        {"file_name": "gone.png", "text": "d"},
    ]
    text = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_bytes(text.encode())
    counts = SkipCounts()
    found = captions_of(tmp_path, ["a.png", "sub/b.PNG", "sub/cafe\u0301.png"], counts)
    assert found == {"a.png": "a\u2028b", "sub/b.PNG": "b", "sub/cafe\u0301.png": "c"}
    assert counts.examples == {"a caption in metadata.jsonl whose picture is not there": "gone.png"}
    for row, words in (
        (b'{"file_name": 5}', "line 1"),
        (b'{"file_name": "a", "text": 5}', "line 1: expected text as text"),
    ):
        (tmp_path / "metadata.jsonl").write_bytes(row)
        with pytest.raises(UserError, match=rf"metadata\.jsonl, {words}"):
            read_metadata(tmp_path)


def test_a_caption_is_the_whole_of_its_file(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeff a cat,\r\nin a hat \n".encode())
    assert read_caption(tmp_path / "a.txt") == "a cat,\r\nin a hat"
