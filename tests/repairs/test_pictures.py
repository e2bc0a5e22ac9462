"""Stored pictures: every mode and its metadata round-trip; what cannot be kept is refused by name."""

import io
import json

import numpy as np
import pytest

pytest.importorskip("PIL")
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

from diffdoctor.data.codec import UnreadablePicture
from diffdoctor.repairs.metadata import from_comfyui, from_parameters, prompt_of
from diffdoctor.repairs.pictures import as_picture, png_chunks, read_picture
from support.repairs import blocks

PARAMETERS = (
    "a (red:1.2) square, \\(signed\\) <lora:fine:0.8>\non ((grey:1.1):1.3)\nNegative prompt: blurry\n"
    "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1"
)
GRAPH = {
    "3": {"class_type": "KSampler", "inputs": {"positive": ["8", 0], "negative": ["7", 0], "model": ["4", 0]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x"}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["9", 0], "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
    "8": {"class_type": "ControlNetApply", "inputs": {"conditioning": ["6", 0], "strength": 1.0}},
    "9": {"class_type": "PrimitiveString", "inputs": {"value": "a red square"}},
}


def stored(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


def in_mode(mode):
    image = Image.fromarray(blocks(20, 24, ((4, 5, 8, 9),)))
    if mode == "I;16":
        return Image.fromarray(np.random.default_rng(0).integers(0, 65536, (20, 24), dtype=np.uint16))
    if mode == "P":
        return image.quantize(9)
    image = image.convert(mode)
    if mode.endswith("A"):
        alpha = np.full((20, 24), 200, np.uint8)
        alpha[:6] = 0
        image.putalpha(Image.fromarray(alpha))
    return image


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "I;16"])
def test_a_change_inside_a_mask_leaves_every_other_bit(mode):
    image = in_mode(mode)
    picture = read_picture(stored(image))
    weight = np.zeros((10, 12), np.float32)
    weight[2:8, 3:9] = 1
    changed = picture.blended(np.full((10, 12, 3), 0.25, np.float32), weight, (slice(0, 10), slice(4, 16)))
    again = Image.open(io.BytesIO(changed.png()))
    assert again.mode == mode
    old, new = np.asarray(image), np.asarray(again)
    assert old.dtype == new.dtype
    mask = np.zeros((20, 24), bool)
    mask[2:8, 7:13] = True
    assert (old[~mask] == new[~mask]).all()
    if mode.endswith("A"):
        assert (old[..., -1] == new[..., -1]).all()
        assert (old[:6] == new[:6]).all()  # wholly transparent pixels keep their hidden colours
        mask[:6] = False
    expected = {"I;16": round(0.25 * 65535)}.get(mode, 64)
    grey = np.asarray(again.convert("RGB")) if mode == "P" else new
    assert np.abs(grey[mask][..., : 3 if "RGB" in mode else 1].astype(int) - expected).max() <= (
        16 if mode == "P" else 0
    )
    assert (picture.pixels == old).all()
    assert (changed.rgb()[~mask] == picture.rgb()[~mask]).all()


def test_a_transparent_colour_is_neither_made_nor_unmade():
    pixels = blocks(20, 24, ())
    pixels[3, 8], key = (64, 64, 64), (64, 64, 64)
    picture = read_picture(stored(Image.fromarray(pixels), transparency=key))
    weight = np.ones((10, 12), np.float32)
    changed = picture.blended(np.full((10, 12, 3), 64 / 255, np.float32), weight, (slice(0, 10), slice(4, 16)))
    again = Image.open(io.BytesIO(changed.png())).convert("RGBA")
    assert (np.argwhere(np.asarray(again)[..., 3] == 0) == [[3, 8]]).all()
    image = in_mode("P")
    index = int(np.asarray(image)[0, 0])
    picture = read_picture(stored(image, transparency=index))
    changed = picture.blended(np.full((20, 24, 3), 0.25, np.float32), np.ones((20, 24), np.float32), (slice(None),) * 2)
    assert ((changed.pixels == index) == (picture.pixels == index)).all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_picture_is_turned_upright_and_says_so(turn):
    image = Image.fromarray(blocks(20, 24, ((4, 5, 8, 9),)))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = turn, "a description"
    exif.get_ifd(0x8769)[0x927C] = b"maker's own"
    data = stored(image, format="JPEG", exif=exif, quality=95)
    picture = read_picture(data)
    again = Image.open(io.BytesIO(picture.png()))
    again.load()
    assert again.getexif()[0x0112] == 1
    assert again.getexif()[0x010E] == "a description"
    assert again.getexif().get_ifd(0x8769)[0x927C] == b"maker's own"
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (np.asarray(again) == np.asarray(upright)).all()


def test_metadata_are_kept_byte_for_byte():
    texts = PngInfo()
    texts.add_text("parameters", PARAMETERS)
    texts.add_text("prompt", json.dumps(GRAPH), zip=True)
    texts.add_itxt("workflow", json.dumps({"nodes": "é" * 9}), "de", "Ablauf")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = stored(in_mode("RGBA"), pnginfo=texts, icc_profile=profile, dpi=(300, 300))
    again = read_picture(data).png()
    kept = (b"tEXt", b"zTXt", b"iTXt", b"pHYs")
    assert [chunk for chunk in png_chunks(again) if chunk[0] in kept] == [
        chunk for chunk in png_chunks(data) if chunk[0] in kept
    ]
    opened = Image.open(io.BytesIO(again))
    assert opened.info["icc_profile"] == profile
    assert opened.text["parameters"] == PARAMETERS
    webp = stored(in_mode("RGB"), format="WEBP", lossless=True, icc_profile=profile, xmp=b"<x:xmpmeta/>")
    info = Image.open(io.BytesIO(read_picture(webp).png())).info
    assert info["icc_profile"] == profile
    assert info["XML:com.adobe.xmp"] == "<x:xmpmeta/>"


def test_prompts_are_found_in_metadata():
    assert from_parameters(PARAMETERS) == "a red square, (signed) \non grey"
    assert from_parameters("two\nlines\nSteps: 4") == "two\nlines"
    assert from_comfyui(json.dumps(GRAPH)) == "a red square"
    loop = {"1": {"inputs": {"positive": ["2", 0]}}, "2": {"inputs": {"conditioning": ["2", 0]}}}
    for odd in ("", "{", "[]", '{"1": 2}', '{"1": {"inputs": {"positive": ["9", 0]}}}', json.dumps(loop)):
        assert from_comfyui(odd) == ""
    texts = PngInfo()
    texts.add_text("prompt", json.dumps(GRAPH))
    assert prompt_of(read_picture(stored(in_mode("RGB"), pnginfo=texts))) == "a red square"
    for encoding in ("utf-16-be", "utf-16-le"):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + PARAMETERS.encode(encoding)
        data = stored(in_mode("RGB"), format="JPEG", exif=exif)
        assert prompt_of(read_picture(data)) == "a red square, (signed) \non grey"
    assert prompt_of(as_picture(blocks())) is None


def deep_png():
    """A PNG file of 16 bits a colour, which Pillow cannot write."""
    import struct
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + bytes(6 * 8) for _ in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


REFUSED = {
    "CMYK": lambda: stored(in_mode("RGB").convert("CMYK"), format="JPEG"),
    "several frames": lambda: stored(
        in_mode("P"), format="GIF", save_all=True, append_images=[in_mode("P").rotate(90)]
    ),
    "more than 8 bits a colour": deep_png,
    "one bit a pixel": lambda: stored(in_mode("L").convert("1")),
    "floats": lambda: stored(in_mode("L").convert("F"), format="TIFF"),
    "broken": lambda: b"\x89PNG but broken",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_kept_is_refused_by_name(reason):
    with pytest.raises(UnreadablePicture, match=reason):
        read_picture(REFUSED[reason]())


def test_what_is_no_picture_is_refused():
    with pytest.raises(TypeError, match="pictures: expected arrays, images of Pillow's or paths, got int"):
        as_picture(3)
    with pytest.raises(ValueError, match=r"pictures: expected uint8 \(H, W, 3\), got float32 \(4, 4, 3\)"):
        as_picture(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(UnreadablePicture, match="CMYK"):
        as_picture(in_mode("RGB").convert("CMYK"))
