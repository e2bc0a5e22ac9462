"""`diffdoctor evaluate compare`: serve the page on which people choose, and write what they said."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffdoctor.data.pictures import as_batch
from diffdoctor.evaluate.compare.answers import ANSWERS, PEOPLE, Answers, People, Queue
from diffdoctor.evaluate.compare.config import EvaluateCompareConfig
from diffdoctor.evaluate.compare.pairs import Pair, chosen_pairs, find_pairs
from diffdoctor.evaluate.compare.report import verdict, write_report
from diffdoctor.evaluate.compare.summary import summarise
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import atomic_write_json
from diffdoctor.runs.progress import progress
from diffdoctor.runs.record import RunFolder, versions
from diffdoctor.runs.strict_json import nan_to_none
from diffdoctor.web.serve import needs_starlette, serve_until_interrupted

RESULT, REPORT = "compare.json", "report.html"


def run_evaluate_compare(config: EvaluateCompareConfig) -> dict:
    """Run `diffdoctor evaluate compare`; returns what compare.json holds.

    Raises:
        UserError: an option or a file does not fit, the output folder is another comparison's, or the address cannot be
            listened at.
    """
    build = _build() if config.serve else None
    found = find_pairs(config.a, config.b, config.scores, config.output)
    pairs = chosen_pairs(found, config.pairs, config.seed)
    measure = _measures(config)
    identity = {"pictures": _digest(found), "question": config.question, "seed": config.seed}
    comparison = hashlib.sha256(strict_json.dumps(identity).encode()).hexdigest()[:16]
    results = dict.fromkeys((ANSWERS, PEOPLE, RESULT, REPORT))
    output = Path(config.output)
    with RunFolder(output, "evaluate compare", identity, results) as folder:
        folder.check()
        folder.begin(config)
        answers = Answers(output / ANSWERS)
        people = People(output / PEOPLE, config.raters)
        queue = Queue(pairs, answers, needed=config.answers, overlap=config.overlap, seed=config.seed)
        if config.serve:

            def links(url: str) -> list[str]:
                return [f"{name}: {url}/#token={token}" for name, token in people.new_tokens().items()]

            def app(hosts: list[str], scheme: str) -> Any:
                return build(queue, people, config.question, hosts, scheme=scheme, comparison=comparison)

            _tell_of_sizes(pairs)
            serve_until_interrupted(config, app, links, config.hosts)
        return _finish(config, measure(pairs), answers)


def _build():
    with needs_starlette():
        from diffdoctor.evaluate.compare.server import build_app
    return build_app


def _digest(pairs: Sequence[Pair]) -> str:
    """Of all that raters see: names, prompts, and the files by name and size."""
    seen = [
        [pair.name, pair.prompt, *((place.file.name, place.offset, place.size) for place in (pair.a, pair.b))]
        for pair in pairs
    ]
    return hashlib.sha256(strict_json.dumps(seen).encode()).hexdigest()


def _tell_of_sizes(pairs: Sequence[Pair]) -> None:
    from diffdoctor.data.codec import UnreadablePicture, open_picture, picture_size

    first, sizes = pairs[0], []
    for place in (first.a, first.b):
        if place.offset == 0:
            with suppress(UnreadablePicture), open_picture(place.file) as image:
                sizes.append(picture_size(image))
    if len({*sizes}) > 1:
        print(f"notice: {first.name}: the two pictures differ in size, by which raters may know them", file=sys.stderr)


def _measures(config: EvaluateCompareConfig):
    """From pairs to the same with the scores that are measured here, by networks that are loaded at once."""
    networks: dict[str, Any] = {}
    if config.judge is not None:
        from diffdoctor.detector.models.load import open_detector

        networks["judge"] = open_detector(config.judge)
    if config.preference is not None:
        from diffdoctor.evaluate.model.networks import Preference

        networks["preference"] = Preference(config.preference)

    def measured(pairs: Sequence[Pair]) -> list[Pair]:
        if not networks:
            return list(pairs)
        from diffdoctor.detector.predict import diagnose_pictures
        from diffdoctor.measures.pixels import flagged_share
        from diffdoctor.training.devices import open_device

        device = open_device(config.device)
        for network in networks.values():
            network.to(device)
        found = []
        with progress(len(pairs), desc="measure", unit="pair") as bar:
            for pair in pairs:
                scores = dict(pair.scores)
                try:
                    pictures = [as_batch([place.read()]) for place in (pair.a, pair.b)]
                except UserError as error:
                    print(f"notice: {pair.name}: not measured; {error}", file=sys.stderr)
                    found.append(pair)
                    bar.update(1)
                    continue
                for name, network in networks.items():
                    if name == "judge":
                        values = [flagged_share(diagnose_pictures(network, p, name="judge")) for p in pictures]
                    else:
                        values = [network.scores(p.to(device), [pair.prompt]) for p in pictures]
                    scores[name] = float(values[0]), float(values[1])
                found.append(dataclasses.replace(pair, scores=scores))
                bar.update(1)
        return found

    return measured


def _finish(config: EvaluateCompareConfig, pairs: Sequence[Pair], answers: Answers) -> dict:
    output = Path(config.output)
    found = summarise(pairs, answers, config.lower, config.seed)
    names = config.names or _names(config)
    found = nan_to_none({"names": names, "question": config.question, **found, "versions": versions()})
    found["doubts"] = _doubts(found)
    atomic_write_json(output / RESULT, found)
    write_report(output / REPORT, found, pairs, answers, config.question)
    print(f"{verdict(found)} {output / REPORT}")
    for doubt in found["doubts"]:
        print(f"warning: {doubt}", file=sys.stderr)
    return found


def _names(config: EvaluateCompareConfig) -> list[str]:
    """The last parts of the two paths in which they differ."""
    for a, b in zip(reversed(Path(config.a).parts), reversed(Path(config.b).parts), strict=False):
        if a != b:
            return [a, b]
    return ["a", "b"]


def _doubts(found: dict[str, Any]) -> list[str]:
    low, high = found["left"]["interval"]
    doubts = []
    if not low <= 0.5 <= high:
        doubts.append(f"raters chose the {'left' if low > 0.5 else 'right'} picture too often for sides dealt by lot")
    alpha = found["agreement"]["alpha"]
    if alpha is not None and alpha <= 0:
        doubts.append("raters agree no more than by chance")
    return doubts
