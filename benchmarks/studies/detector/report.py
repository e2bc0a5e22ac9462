"""What the study found: metrics.json, tables in Markdown, and one page with pictures."""

import math
from pathlib import Path

import numpy as np

from benchmarks.studies.detector.parts import SEEN, TESTS, UNSEEN
from benchmarks.studies.detector.pictures import SIDE, SKEWED
from diffdoctor.runs.files import atomic_write_bytes, atomic_write_json, atomic_write_text

REQUIRED_MAP50, ALLOWED_FALSE_POSITIVES = 0.70, 0.02
MAIN = "detector-seed-0"


def write(output: Path, sets: dict, results: dict, seconds: float) -> dict:
    """Write metrics.json, tables.md, report.html and found.png; returns the metrics."""
    from diffdoctor.runs.record import versions

    metrics = {
        "runs": results,
        "kinds": {"seen": SEEN, "unseen": UNSEEN},
        "sets": {name: entry["pictures"] for name, entry in sets.items()},
        "mask_area": {name: entry["mask_area"] for name, entry in sets.items() if "mask_area" in entry},
        "without_visible_damage": {name: entry.get("without_visible_damage", 0) for name, entry in sets.items()},
        "seconds": seconds,
        "versions": versions(),
    }
    if MAIN in results:
        overall = results[MAIN]["seen"]["all"]
        metrics["acceptance"] = {
            "map50": overall["map50"] >= REQUIRED_MAP50,
            "false_positive_rate": overall["false_positive_rate"] <= ALLOWED_FALSE_POSITIVES,
        }
        atomic_write_bytes(output / "found.png", found_picture(output))
    atomic_write_json(output / "metrics.json", metrics)
    atomic_write_text(output / "tables.md", text(metrics))
    _page(output, metrics)
    return metrics


def one_line(result: dict) -> str:
    """A training's result in a line."""
    seen, unseen = result["seen"]["all"], result["unseen"]["all"]
    return (
        f"mAP@0.5 {seen['map50']:.2f}, kinds never seen {unseen['map50']:.2f}; "
        f"clean pictures flagged {seen['false_positive_rate']:.1%}"
    )


def tables(metrics: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of every table."""
    result = []
    if MAIN in metrics["runs"]:
        main = metrics["runs"][MAIN]
        result.append(("The detector, by what it is tested on", *_main_table(main)))
        result.append(("All held-out pictures, kinds that were trained on, with moved logits", *_shift_table(main)))
        result.append(("By kind of damage", *_kind_table(main)))
        result.append(("By category, kinds that were trained on", *_category_table(main)))
    ablation = [entry for name, entry in metrics["runs"].items() if name != MAIN]
    if ablation:
        result.append(("Without one thing each", *_ablation_table(ablation)))
    return result


def _main_table(main: dict):
    header = ["held-out pictures", "kinds", "mAP@0.5", "IoU", "clean flagged", "damaged flagged"]
    rows = []
    for part, name in (("seen", "trained on"), ("unseen", "never seen")):
        for group in ("all", *TESTS):
            found = main[part][group]
            low, high = found["map50_interval"]
            rows.append(
                [
                    group,
                    name,
                    f"{found['map50']:.2f} ({low:.2f} … {high:.2f})",
                    f"{found['iou']:.2f}",
                    f"{found['false_positive_rate']:.1%}",
                    f"{found['hit_rate']:.1%}",
                ]
            )
    rows.append(["all, shrunk and padded", "–", "–", "–", f"{main['small']:.1%}", "–"])
    return header, rows


def _shift_table(main: dict):
    rows = [
        [
            f"{found['shift']:+.1f}",
            f"{found['map50']:.2f}",
            f"{found['false_positive_rate']:.1%}",
            f"{found['hit_rate']:.1%}",
        ]
        for found in main["shifted"]
    ]
    return ["moved by", "mAP@0.5", "clean flagged", "damaged flagged"], rows


def _kind_table(main: dict):
    rows = []
    for part, name in (("seen", "trained on"), ("unseen", "never seen")):
        for kind, found in sorted(main[part]["per_kind"].items(), key=lambda item: -item[1]["map50"]):
            rows.append([kind, name, str(found["pictures"]), f"{found['map50']:.2f}", f"{found['hit_rate']:.0%}"])
    return ["kind", "", "pictures", "mAP@0.5", "damaged flagged"], rows


def _category_table(main: dict):
    rows = [
        [name, str(found["pictures"]), f"{found['map50']:.2f}", f"{found['false_positive_rate']:.1%}"]
        for name, found in main["seen"]["per_category"].items()
    ]
    return ["category", "pictures", "mAP@0.5", "clean flagged"], rows


def _ablation_table(entries: list[dict]):
    columns = {
        "mAP@0.5": (lambda e: e["seen"]["all"]["map50"], "{:.2f}"),
        "kinds never seen": (lambda e: e["unseen"]["all"]["map50"], "{:.2f}"),
        "damaged flagged": (lambda e: e["seen"]["all"]["hit_rate"], "{:.1%}"),
        "clean flagged": (lambda e: e["seen"]["all"]["false_positive_rate"], "{:.1%}"),
        f"of {' and '.join(SKEWED)}": (_skewed_false_positives, "{:.1%}"),
        "small clean flagged": (lambda e: e["small"], "{:.1%}"),
    }
    rows = []
    for variant in dict.fromkeys(entry["variant"] for entry in entries):
        chosen = sorted((entry for entry in entries if entry["variant"] == variant), key=lambda entry: entry["seed"])
        rows.append([variant, *(_spread([value(e) for e in chosen], form) for value, form in columns.values())])
    return ["", *columns], rows


def _skewed_false_positives(entry: dict) -> float:
    """The mean over the skewed categories of the share of their clean pictures that is flagged."""
    found = entry["seen"]["per_category"]
    return float(np.mean([found[name]["false_positive_rate"] for name in SKEWED]))


def _spread(values: list[float], form: str) -> str:
    """The mean over the seeds; with several, the smallest and the largest too."""
    if any(value is None or math.isnan(value) for value in values):
        return "–"
    mean = form.format(np.mean(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} … {form.format(max(values))})"


def text(metrics: dict) -> str:
    """All tables in Markdown."""
    parts = []
    for title, header, rows in tables(metrics):
        lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
        parts.append(f"**{title}**\n\n" + "\n".join(lines) + "\n")
    for name, reached in metrics.get("acceptance", {}).items():
        parts.append(f"acceptance, {name}: {'reached' if reached else 'NOT reached'}\n")
    return "\n".join(parts)


def _page(output: Path, metrics: dict) -> None:
    from diffdoctor.viz.report import Report

    report = Report("Detector study")
    if MAIN in metrics["runs"]:
        report.lead(one_line(metrics["runs"][MAIN]))
    for title, header, rows in tables(metrics):
        report.heading(title)
        report.table(header, rows)
    if MAIN in metrics["runs"]:
        report.heading("Held-out pictures")
        caption = "Damaged and clean pictures; each with its truth and what the detector marks. Never seen kinds below."
        report.image((output / "found.png").read_bytes(), caption)
    for part in ("seen", "unseen"):
        for group in TESTS:
            report.heading(f"Damage, {group}, kinds {part}")
            sheet = output / "sets" / f"{group}-{part}" / "contact_sheet.png"
            report.image(sheet.read_bytes(), "Clean, damaged, mask.", pixels=False)
    report.write(output / "report.html")


def found_picture(output: Path) -> bytes:
    """PNG bytes: held-out pictures, each beside its truth and what the detector marks; drawn, not chosen.

    Four rows of damage of kinds that were trained on, two of kinds never seen, one of clean pictures; in a row three
    photographs never seen, two pieces of known ones and a digit.
    """
    from diffdoctor.data.shards import ShardData
    from diffdoctor.detector.models.load import load_detector
    from diffdoctor.viz.draw import grid, png_bytes

    detector = load_detector(output / "runs" / MAIN / "detector")
    rng = np.random.default_rng(0)
    rows = []
    for part, damaged, count in (("seen", True, 4), ("unseen", True, 2), ("seen", False, 1)):
        columns = []
        for group, width in (("photographs", 3), ("pieces", 2), ("digits", 1)):
            data = ShardData(output / "sets" / f"{group}-{part}")
            places = rng.permutation(np.flatnonzero((data.mask_max > 0) == damaged))
            for column in places[: width * count].reshape(width, count):
                columns.append([_views(detector, data[int(index)]) for index in column])
        rows += [[view for views in line for view in views] for line in zip(*columns, strict=True)]
    return png_bytes(grid(rows))


def _views(detector, sample: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    import torch

    from diffdoctor.data.pictures import resize_pair
    from diffdoctor.viz.draw import enlarge, overlay

    picture, mask = resize_pair(sample["picture"], sample["mask"], SIDE)
    images = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255.0
    with torch.no_grad():
        confidence = detector.confidence(images)[0, 0].numpy()
    return tuple(enlarge(view, 2) for view in (picture, overlay(picture, mask), overlay(picture, confidence)))
