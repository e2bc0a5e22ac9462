"""The prompt in a picture's own metadata, as A1111 and its kin and ComfyUI write it."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from typing import Any

from diffdoctor.repairs.pictures import Picture

_EXIF_POINTER, _USER_COMMENT = 0x8769, 0x9286
# What A1111's prompts hold beside words: <lora:name:0.8> and (word:1.2).
_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")
_WEIGHT = re.compile(r"(?<!\\)\(([^()]*):\s*[\d.]+\s*\)")
_TEXTS = ("text", "text_g", "t5xxl", "text_l", "clip_l", "prompt", "string", "value")
_MAX_JSON = 2**24


def prompt_of(picture: Picture) -> str | None:
    """The prompt that a picture's metadata name: A1111's `parameters`, ComfyUI's `prompt`; None where there is none.

    A1111's marks for weights and LoRAs are left out, which diffusers does not know.
    """
    parameters = picture.texts.get("parameters") or _user_comment(picture.save_options.get("exif", b""))
    found = from_parameters(parameters) if parameters else from_comfyui(picture.texts.get("prompt", ""))
    return found or None


def from_parameters(text: str) -> str:
    """The prompt of A1111's `parameters`: what stands before the negative prompt and the line of settings."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        if line.startswith("Negative prompt:") or re.match(r"Steps: \d+(,|$)", line):
            break
        lines.append(line)
    prompt = _NETWORK.sub("", "\n".join(lines))
    while prompt != (plainer := _WEIGHT.sub(r"\1", prompt)):
        prompt = plainer
    return re.sub(r"[ \t]+", " ", prompt.replace("\\(", "(").replace("\\)", ")")).strip(" ,\n")


def from_comfyui(text: str) -> str:
    """The prompt of ComfyUI's `prompt`: the text behind the `positive` input of a sampler; "" where none is found.

    Args:
        text: the graph as JSON: {node: {"class_type": …, "inputs": {name: a value or [node, output]}}}.
    """
    if not text or len(text) > _MAX_JSON:
        return ""
    try:
        graph = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(graph, dict):
        return ""
    for node in graph.values():
        positive = _inputs(node).get("positive")
        found = next(_texts_behind(graph, positive), "") if _is_link(graph, positive) else ""
        if found:
            return found
    return ""


def _texts_behind(graph: dict, link: list, seen: frozenset = frozenset()) -> Iterator[str]:
    """The texts of the nodes behind a link, the nearest first."""
    name = str(link[0])
    if name in seen:
        return
    inputs, seen = _inputs(graph[name]), seen | {name}
    for key in _TEXTS:
        value = inputs.get(key)
        if isinstance(value, str) and value.strip():
            yield value.strip()
        elif _is_link(graph, value):
            yield from _texts_behind(graph, value, seen)
    # conditionings that are combined, masked or controlled; not what is negative, nor the models
    for key, value in inputs.items():
        if key.startswith(("conditioning", "positive", "cond")) and _is_link(graph, value):
            yield from _texts_behind(graph, value, seen)


def _inputs(node: Any) -> dict:
    found = node.get("inputs") if isinstance(node, dict) else None
    return found if isinstance(found, dict) else {}


def _is_link(graph: dict, value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and str(value[0]) in graph


def _user_comment(exif: bytes) -> str:
    """EXIF's UserComment, where A1111 writes its `parameters` in JPEG and WebP files; "" where there is none."""
    if not exif:
        return ""
    from PIL import Image

    try:
        found = Image.Exif()
        found.load(exif)
        comment = found.get_ifd(_EXIF_POINTER).get(_USER_COMMENT, b"")
    except (ValueError, TypeError, KeyError, SyntaxError, OSError, struct.error):
        return ""
    if not isinstance(comment, bytes) or len(comment) < 8:
        return ""
    code, text = comment[:8], comment[8:]
    if code == b"UNICODE\0":
        # some write the byte order of the file, most big-endian
        encoding = "utf-16-le" if text[1:2] == b"\0" and text[:1] != b"\0" else "utf-16-be"
        return text.decode(encoding, "ignore").strip("\0 ")
    return text.decode("utf-8", "ignore").strip("\0 ") if code == b"ASCII\0\0\0" else ""
