"""Detectors that are no network of ours: functions, boxes, servers, and our own served to others."""

import io
import json
import os
import socket
import struct
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from diffdoctor import guide
from diffdoctor.detector import FunctionDetector, HttpDetector, from_boxes
from diffdoctor.detector.commands.diagnose import DiagnoseConfig, run_diagnose
from diffdoctor.detector.commands.serve import DetectorServer, ServeDetectorConfig
from diffdoctor.detector.external import as_detector, regions_to_map, same_detector
from diffdoctor.detector.models.load import open_detector
from diffdoctor.runs.errors import UserError
from diffdoctor.treat import treat
from support.gpu import on_gpu
from support.pictures import write_shapes
from support.tiny_pipelines import PROMPTS, tiny_pipeline
from support.treatment import pairs, random_detector, small


def brightness(pictures):
    """What is bright is broken, at half the size."""
    return torch.nn.functional.avg_pool2d(pictures.mean(1, keepdim=True), 2)


@pytest.fixture
def serve():
    """Starts a server of a class in a thread; ends it after the test."""
    running = []

    def start(server):
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


def png(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return buffer.getvalue()


def post(url, body, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30) as answer:
        return answer.headers.get_content_type(), answer.read()


def test_a_functions_maps_are_resized_to_the_pictures():
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    kinds = (lambda x: brightness(x)[:, 0], lambda x: brightness(x).numpy(), lambda x: list(brightness(x)))
    for function in (brightness, *kinds):
        maps = FunctionDetector(function).confidence(images, value_range=(-1, 1))
        assert maps.shape == (2, 1, 8, 12)
        want = torch.nn.functional.interpolate(brightness(images / 2 + 0.5), (8, 12), mode="bilinear")
        torch.testing.assert_close(maps, want)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: brightness(x)[:1], r"maps \(2, 1, h, w\), one a picture, got \(1, 1, 4, 4\)"),
        (lambda x: x, r"got \(2, 3, 8, 8\)"),
        (lambda x: 2.5, r"got \(\)"),
        (lambda x: None, r"maps \(2, 1, h, w\), one a picture, got NoneType"),
        (lambda x: "a map", "got str"),
        (lambda x: [[0.5], [0.5, 0.5]], "got list"),
    ],
    ids=["fewer", "channels", "number", "none", "text", "ragged"],
)
def test_an_answer_that_is_no_map_is_refused(function, message):
    with pytest.raises(UserError, match=message):
        FunctionDetector(function).confidence(torch.rand(2, 3, 8, 8))


def test_logits_and_what_is_no_function_are_refused():
    with pytest.raises(UserError, match="detector brightness: expected one with a gradient"):
        FunctionDetector(brightness)(torch.rand(1, 3, 8, 8))
    with pytest.raises(TypeError, match="detector: expected a detector, or a function"):
        as_detector(3)
    network = random_detector()
    assert as_detector(network) is network


def test_regions_become_the_largest_score_that_holds_a_pixel():
    found = regions_to_map([((2, 1, 6, 4), 0.5), ([(4, 0), (8, 0), (8, 8), (4, 8)], 0.25)], (8, 10))
    want = np.zeros((8, 10), np.float32)
    want[:, 4:8] = 0.25
    want[1:4, 2:6] = 0.5
    np.testing.assert_array_equal(found, want)
    soft = regions_to_map([((2, 2, 4, 4), 0.8)], (6, 8), edge=2)
    np.testing.assert_allclose(soft[2], [0, 0.4, 0.8, 0.8, 0.4, 0, 0, 0], atol=1e-6)


def test_boxes_and_scores_may_be_on_a_gpu():
    box, score = on_gpu([0.0, 0.0, 4.0, 8.0]), on_gpu(0.5)
    corners = [(on_gpu(4.0), on_gpu(0.0)), (on_gpu(8.0), on_gpu(0.0)), (on_gpu(8.0), on_gpu(8.0))]
    for region in (box, list(box), corners):
        found = regions_to_map([(region, score)], (8, 10))
        plain = [[float(value) for value in point] if isinstance(point, tuple) else float(point) for point in region]
        np.testing.assert_array_equal(found, regions_to_map([(plain, 0.5)], (8, 10)))


def test_from_boxes_is_a_detector():
    detector = from_boxes(lambda pictures: [[((0, 0, 4, 8), float(p.mean()))] for p in pictures])
    images = torch.stack([torch.full((3, 8, 8), 0.25), torch.full((3, 8, 8), 0.75)])
    maps = detector.confidence(images)
    assert maps[:, 0, :, :4].flatten(1).tolist() == [[0.25] * 32, [0.75] * 32]
    assert maps[:, 0, :, 4:].abs().sum() == 0
    with pytest.raises(UserError, match="regions of 2 pictures, got 1"):
        from_boxes(lambda pictures: [[]]).confidence(images)
    with pytest.raises(UserError, match="region: expected a box"):
        from_boxes(lambda pictures: [[((0, 0, 4), 1.0)]] * 2).confidence(images)
    with pytest.raises(UserError, match=r"region: expected pixels, .*, got coordinates in \[0, 1\]"):
        from_boxes(lambda pictures: [[((0.1, 0.2, 0.5, 0.9), 1.0)]] * 2).confidence(images)
    assert not from_boxes(lambda pictures: [[((0, 0, 0, 0), 1.0)]] * 2).confidence(images).any()
    with pytest.raises(UserError, match=r"score: expected a number in \[0, 1\], got 1.5"):
        from_boxes(lambda pictures: [[((0, 0, 4, 4), 1.5)]] * 2).confidence(images)


def test_the_same_function_is_known_again_and_another_is_not():
    assert same_detector(FunctionDetector(brightness), FunctionDetector(brightness))
    assert not same_detector(FunctionDetector(brightness), FunctionDetector(png))
    assert not same_detector(random_detector(), random_detector())


def test_nft_takes_a_function_and_other_methods_name_it(tmp_path):
    pipeline = tiny_pipeline("sd", prediction_type="v_prediction")
    result = treat(pipeline, brightness, PROMPTS, small(method="nft", steps=1), output_dir=tmp_path, progress=False)
    assert result.history[0]["grad_norm"] > 0
    assert json.loads((tmp_path / "run.json").read_text())["identity"]["anchor_weight"] == 0.4  # no pairs
    assert "\nanchor_weight: null\n" in (tmp_path / "config.yaml").read_text()  # what was asked
    pipeline = tiny_pipeline("sd", prediction_type="v_prediction")
    with pytest.raises(UserError, match=r"for method draft_k \(grpo, nft, weighted need none\), got a function"):
        treat(pipeline, brightness, PROMPTS, small(), offline=pairs(), progress=False)
    with pytest.raises(UserError, match="monitor: expected a detector with other weights"):
        treat(pipeline, brightness, PROMPTS, small(method="nft"), monitor=brightness, progress=False)
    with pytest.raises(UserError, match="strength: expected 0"), guide(pipeline, brightness, height=16, width=16):
        pass
    with guide(pipeline, brightness, strength=0, rewinds=1, height=16, width=16) as log:
        pipeline(list(PROMPTS[:1]), num_inference_steps=3, height=16, width=16, output_type="np")
    assert len(log.final_area) == 1


def test_a_file_and_a_function_on_the_command_line(tmp_path):
    tmp_path /= os.fsdecode(b"K\xe4se")  # no Unicode
    tmp_path.mkdir()
    (tmp_path / "mine.py").write_text("def dark(pictures):\n    return 1 - pictures.mean(1, keepdim=True)\n")
    (tmp_path / "pictures").mkdir()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "pictures" / "black.png")
    run_diagnose(DiagnoseConfig([str(tmp_path / "pictures")], f"{tmp_path}/mine.py:dark", str(tmp_path / "out")))
    row = json.loads((tmp_path / "out" / "diagnosis.jsonl").read_text())
    assert row["max"] == row["flagged_share"] == 1.0
    for source, message in {
        f"{tmp_path}/none.py:dark": "no such file",
        f"{tmp_path}/mine.py:light": "expected the name of a function in the file, got 'light'",
    }.items():
        with pytest.raises(UserError, match=message):
            open_detector(source)
    (tmp_path / "broken.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(UserError, match="cannot be run"):
        open_detector(f"{tmp_path}/broken.py:dark")


def test_a_batch_that_does_not_fit_is_diagnosed_one_by_one_and_that_is_said_once(tmp_path, caplog):
    write_shapes(tmp_path / "pictures")
    file = tmp_path / "large.py"
    file.write_text(
        "import torch\n"
        "def large(pictures):\n"
        "    if len(pictures) > 1:\n"
        "        raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "    return pictures.mean(1)\n"
    )
    config = DiagnoseConfig([str(tmp_path / "pictures")], f"{file}:large", str(tmp_path / "out"), batch_size=3)
    metrics = run_diagnose(config)
    assert (metrics["pictures"], metrics["skipped"]) == (8, {})
    assert caplog.text.count("out of memory for 3 pictures at a time") == 1


def test_a_lost_gpu_is_no_fault_of_a_picture(tmp_path):
    write_shapes(tmp_path / "pictures")
    file = tmp_path / "lost.py"
    file.write_text("import torch\ndef lost(pictures):\n    raise torch.AcceleratorError('lost')\n")
    with pytest.raises(torch.AcceleratorError):
        run_diagnose(DiagnoseConfig([str(tmp_path / "pictures")], f"{file}:lost", str(tmp_path / "out")))


def test_our_server_gives_the_detectors_map_to_our_client(serve):
    detector = random_detector()
    server = DetectorServer(detector, ServeDetectorConfig("mine", port=0))
    url = serve(server)
    images = torch.randint(0, 256, (2, 3, 16, 20)).float() / 255
    got = open_detector(f"{url}/map").confidence(images)
    torch.testing.assert_close(got, detector.confidence(images), rtol=0, atol=1 / 65535)
    assert json.loads(post(url, None)[1]) == {"detector": "mine"}


def test_our_server_gives_regions_and_a_reward(serve):
    def left(pictures):
        return (torch.arange(16) < 6).float().expand(len(pictures), 1, 16, 16)

    url = serve(DetectorServer(FunctionDetector(left), ServeDetectorConfig("left", port=0)))
    body = png(np.zeros((16, 16, 3), np.uint8))
    assert json.loads(post(f"{url}/regions", body)[1]) == {"regions": [{"box": [0, 0, 6, 16], "score": 1.0}]}
    assert json.loads(post(f"{url}/reward", body)[1]) == {"reward": 0.625, "flagged": True}
    again = HttpDetector(f"{url}/regions").confidence(torch.zeros(1, 3, 16, 16))
    torch.testing.assert_close(again, left(again))


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/map", b"no picture", 400, "body: expected a picture"),
        ("/map", png(np.zeros((50, 50, 3), np.uint8)), 413, "at most 1,000 pixels, got 50 x 50"),
        ("/map", b"x" * 5000, 413, "body: expected at most 4,000 bytes, got 5,000"),
        # more than the connection holds: the client is still sending when it is refused
        ("/map", b"x" * 20_000_000, 413, "body: expected at most 4,000 bytes, got 20,000,000"),
        ("/other", b"", 404, "path: expected /map, /regions or /reward"),
        ("/other", b"x" * 20_000_000, 404, "path: expected /map, /regions or /reward"),
    ],
    ids=["text", "pixels", "bytes", "many bytes", "path", "path with bytes"],
)
def test_a_bad_request_is_one_line_and_the_server_goes_on(serve, path, body, status, message):
    config = ServeDetectorConfig("x", port=0, max_pixels=1000, max_bytes=4000)
    url = serve(DetectorServer(FunctionDetector(brightness), config))
    with pytest.raises(urllib.error.HTTPError) as error:
        post(url + path, body)
    said = error.value.read().decode()
    assert error.value.code == status
    assert message in said
    assert said.count("\n") == 1
    assert post(url, png(np.zeros((8, 8, 3), np.uint8)))[0] == "image/png"


def test_a_picture_that_the_network_does_not_take_is_refused(serve):
    detector = random_detector()
    detector.takes = lambda height, width, tile=None: width < 20
    url = serve(DetectorServer(detector, ServeDetectorConfig("x", port=0)))
    with pytest.raises(urllib.error.HTTPError) as error:
        post(f"{url}/map", png(np.zeros((16, 20, 3), np.uint8)))
    said = error.value.read().decode()
    assert (error.value.code, said) == (413, "picture: expected a size that the detector takes whole, got 20 x 16\n")
    assert post(f"{url}/map", png(np.zeros((16, 19, 3), np.uint8)))[0] == "image/png"


def test_a_client_that_goes_away_prints_nothing(serve, capfd):
    url = serve(DetectorServer(FunctionDetector(brightness), ServeDetectorConfig("x", port=0)))
    body = png(np.zeros((8, 8, 3), np.uint8))
    for sent in (body[:9], body):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed by a reset
            client.sendall(b"POST /map HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + sent)
    for _ in range(3):
        assert post(f"{url}/map", body)[0] == "image/png"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("kind", "answer", "message"),
    [
        ("text/html", b"<p>", "answer of type image/png or application/json, got 'text/html'"),
        ("application/json", b"[", "expected a PNG or regions as JSON"),
        ("application/json", b'{"regions": [{"score": 1}]}', "KeyError"),
        ("application/json", b'{"regions": [{"box": [0, 0, 1, 1], "score": 7}]}', "score: expected"),
        ("image/png", b"no", "expected a PNG"),
        ("image/png", png(np.zeros((64, 64), np.uint8)), "a map of about the picture's size, 8 x 8"),
        (
            "image/png",
            png(np.eye(8, dtype=np.uint8)[..., None] * np.array([200, 0, 0], np.uint8)),
            "a grey picture .*mode RGB with colours",
        ),
    ],
    ids=["html", "half", "key", "score", "no png", "large", "coloured"],
)
def test_a_strangers_answer_is_checked(serve, kind, answer, message):
    url = serve(HTTPServer(("127.0.0.1", 0), answering(200, kind, answer)))
    with pytest.raises(UserError, match=message) as error:
        HttpDetector(url).confidence(torch.zeros(1, 3, 8, 8))
    assert url in str(error.value)


def test_errors_of_the_server_are_tried_again_and_those_of_the_client_are_not(serve):
    counts = []
    for code in (503, 400):
        handler = answering(code, "text/plain", b"why")
        url = serve(HTTPServer(("127.0.0.1", 0), handler))
        with pytest.raises(UserError, match=f"answered {code}: why"):
            HttpDetector(url, retries=1).confidence(torch.zeros(1, 3, 8, 8))
        counts.append(handler.count)
    assert counts == [2, 1]
    with pytest.raises(UserError, match="no answer"):
        HttpDetector("http://127.0.0.1:9", retries=0).confidence(torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match="url: expected http://"):
        HttpDetector("file:///etc/passwd")


def answering(code, kind, body):
    class Handler(BaseHTTPRequestHandler):
        count = 0

        def do_POST(self):
            Handler.count += 1
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return Handler
