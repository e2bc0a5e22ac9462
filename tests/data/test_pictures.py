"""The one reader of users' pictures: what it reads, what it refuses, and what that costs."""

import io
import struct
import zlib

import numpy as np
import pytest

from diffdoctor.data import codec
from diffdoctor.data.codec import UnreadablePicture, decode, open_picture, picture_size
from diffdoctor.maps import MapDataset, PairedTransform, Record, StepBatches, read_map, read_picture
from diffdoctor.runs.errors import UserError
from support.pictures import picture

Image = pytest.importorskip("PIL.Image")

RAMP = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (16, 1))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF"])
def test_each_exact_format_is_read(kind):
    colours = picture()
    assert np.array_equal(decode(encoded(Image.fromarray(colours), kind), "RGB"), colours)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF"])
def test_each_lossy_format_is_read(kind):
    if kind not in codec._formats():
        pytest.skip(f"this Pillow has no {kind}")
    colours = picture()
    found = decode(encoded(Image.fromarray(colours), kind, quality=95), "RGB")
    assert np.abs(found.astype(int) - colours).mean() < 12


def test_of_an_animation_the_first_frame_is_read():
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(data, "RGB") == 10).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_are_scaled_by_every_reader(tmp_path, kind):
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(encoded(Image.fromarray(RAMP), kind))
    truth = np.rint(RAMP / 257.0)
    assert np.array_equal(decode(path, "L"), truth)
    assert np.array_equal(decode(path.read_bytes(), "RGB"), np.repeat(truth[..., None], 3, 2))
    assert np.array_equal(np.asarray(read_picture(path))[..., 0], truth)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(read_picture(image))[..., 1], truth)
    assert np.allclose(read_map(path), RAMP / 65535.0, atol=1e-7)
    item = MapDataset([Record(path)], PairedTransform((16, 64)), check=False)[0]
    assert np.array_equal(((item["pixel_values"][0] + 1) * 127.5).round().numpy(), truth)


def test_twelve_bits_are_scaled_by_their_own_range_and_floats_are_refused():
    tags = {258: 12}
    image = Image.fromarray(RAMP >> 4)
    image.tag_v2 = tags
    assert codec.as_array(image, "L").max() == 255
    for values in (RAMP.astype(np.float32) / 65535, RAMP.astype(np.int32) * 2):
        with pytest.raises(UnreadablePicture, match="no fixed scale"):
            decode(encoded(Image.fromarray(values), "TIFF"), "RGB")


def odd_exif(orientation=6):
    """A JPEG on its side whose resolution is negative, which Pillow reads and cannot write again."""
    plain = encoded(Image.new("RGB", (48, 32), "red"), "JPEG")
    entries = struct.pack("<HHLHH", 0x0112, 3, 1, orientation, 0) + struct.pack("<HHLL", 0x011A, 10, 1, 38)
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4) + struct.pack("<ll", -72, 1)
    exif = b"Exif\0\0" + tiff
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]


def test_odd_exif_data_are_no_fault_of_the_picture(tmp_path):
    (tmp_path / "a.jpg").write_bytes(odd_exif())
    assert decode(odd_exif(), "RGB").shape == (48, 32, 3)
    assert read_picture(tmp_path / "a.jpg").size == (32, 48)
    with open_picture(tmp_path / "a.jpg") as image:
        assert picture_size(image) == (48, 32)
    assert decode(odd_exif(orientation=77), "RGB").shape == (32, 48, 3)
    garbage = encoded(Image.new("RGB", (9, 8)), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert decode(garbage, "RGB").shape == (8, 9, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_the_upright_size_is_that_of_the_pixels(tmp_path, kind):
    for orientation in (1, 3, 6, 7):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"a.{kind.lower()}"
        path.write_bytes(encoded(Image.fromarray(picture()), kind, exif=exif))
        with open_picture(path) as image:
            size = picture_size(image)
        assert size == decode(path, "RGB").shape[:2] == ((32, 24) if orientation > 4 else (24, 32))


BAD = {
    "empty": b"",
    "text": b"<html>404</html>",
    "EPS, whose decoder starts a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "JPEG cut short": encoded(Image.fromarray(picture(80, 80)), "JPEG")[:700],
    "PNG cut short": encoded(Image.fromarray(picture()), "PNG")[:100],
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_is_broken_and_named(tmp_path, name):
    path = tmp_path / "bad.png"
    path.write_bytes(BAD[name])
    with pytest.raises(UnreadablePicture, match="a broken picture"):
        decode(path, "RGB")
    with pytest.raises(UserError, match=r"bad\.png: expected a picture .* got a broken picture"):
        read_picture(path)
    with pytest.raises(UserError, match=r"bad\.png: expected a map"):
        read_map(path)
    with pytest.raises(UserError, match=r"bad\.png"):
        data = MapDataset([Record(path)] * 2, PairedTransform(buckets=[(8, 8), (8, 16)]), check=False)
        next(iter(StepBatches(data, 1, 1)))
        data[0]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("x"), struct.error("y"), ZeroDivisionError()])
def test_any_error_of_a_decoder_is_that_pictures(monkeypatch, error):
    def load(self):
        raise error

    data = encoded(Image.fromarray(picture()), "PNG")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(UnreadablePicture):
        decode(data, "RGB")


def png_header(width, height):
    """The start of a PNG that claims this size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(16320, 12240), (2**27 + 1, 1), (30000, 30000)])
def test_what_is_too_large_is_called_so_and_never_decoded(size, monkeypatch):
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UnreadablePicture, match="a picture of more than 134,217,728 pixels"):
        decode(png_header(*size), "RGB")


def test_a_file_that_is_too_large_or_locked_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(picture()), "PNG"))
    monkeypatch.setattr(codec, "MAX_FILE_BYTES", 20)
    with pytest.raises(UnreadablePicture, match="a file of more than 20 bytes"):
        decode(path, "RGB")
    with pytest.raises(UserError, match=r"b\.png: expected a picture .* a file that cannot be read \(No such file"):
        read_picture(tmp_path / "b.png")


def test_an_npy_map_that_promises_too_much_is_named(tmp_path):
    head = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d, %d), }"
    for shape in ((64, 64), (10**7, 10**7)):
        (tmp_path / "bad.npy").write_bytes((head % shape).ljust(127) + b"\n1234")
        with pytest.raises(UserError, match=r"bad\.npy: expected an \.npy file of numbers"):
            read_map(tmp_path / "bad.npy")
