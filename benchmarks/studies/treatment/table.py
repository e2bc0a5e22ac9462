"""What each method must reach, and the table of what it reached."""

from __future__ import annotations

from pathlib import Path

from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import atomic_write_text

START, END = "<!-- table of python -m benchmarks.studies.treatment -->", "<!-- end of table -->"
LIMITS = {"draft_k": 0.1, "drtune": 0.1, "nft": 0.1, "weighted": 0.5, "guide": 0.2}
LIMITS |= {"nft-alone": 0.12, "grpo-alone": 0.35}
ACCURACY_MAY_FALL = 0.01
LEAST_VARIANCE = {"nft": 0.8, "nft-alone": 0.75}
NAMES = {"sd": "U-Net, v-prediction (SD)", "flux": "transformer, flow matching (FLUX)"}
NAMES |= {f"cfg{scale}": f"U-Net, dropped captions, guidance {scale}" for scale in (1, 4)}
HEADER = (
    "pipeline", "method", "judge's rate before → after (95 % interval)", "ratio", "detector's rate",
    "accuracy", "FID", "variance", "seconds", "peak memory", "must be",
)  # fmt: skip


def missed(row: dict) -> list[str]:
    """What a row of `Study.measure` misses; empty when it holds, or when nothing is asked of the method.

    Asked of it: the judge's rate after as a share of before, accuracy not lower by more than a point, FID not higher;
    of `nft` also a share of the variance.
    """
    limit = LIMITS.get(row["method"])
    if limit is None:
        return []
    rate = row["artifact_rate"]["judge"]
    checks = {
        "ratio": rate["after"] <= limit * rate["before"],
        "accuracy": row["accuracy"]["after"] >= row["accuracy"]["before"] - ACCURACY_MAY_FALL,
        "FID": row["fid"]["after"] <= row["fid"]["before"],
        "variance": row["variance"]["after"] >= LEAST_VARIANCE.get(row["method"], 0.0) * row["variance"]["before"],
    }
    return [name for name, holds in checks.items() if not holds]


def markdown(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [HEADER, ("---",) * len(HEADER), *(_cells(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def put_into(path: str | Path, text: str, start: str = START, end: str = END) -> None:
    """Replace what stands between two lines of a page.

    Args:
        path: of the page.
        text: to stand there.
        start: the line before.
        end: the line behind.

    Raises:
        UserError: if the page cannot be read or lacks one of the lines.
    """
    try:
        page = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--docs {path}: cannot be read ({error.strerror})") from None
    head, found, rest = page.partition(start)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise UserError(f"--docs {path}: the lines {start!r} and {end!r} were expected")
    atomic_write_text(path, f"{head}{start}\n{text}\n{end}{tail}")


def _cells(row):
    judge, detector = row["artifact_rate"]["judge"], row["artifact_rate"]["detector"]
    low, high = judge["after_interval"]
    limit, faults = LIMITS.get(row["method"]), missed(row)
    if limit is None:
        verdict = "–"
    else:
        verdict = f"≤ {limit}: " + ("holds" if not faults else "missed (" + ", ".join(faults) + ")")
    seconds = f"{row['seconds']:.0f}"
    if row["method"] == "guide":
        seconds += f", sampling ({row['sampling_seconds']:.0f} without)"
    return (
        NAMES[row["pipeline"]],
        f"`{row['method']}`",
        f"{_percent(judge['before'])} → {_percent(judge['after'])} ({_percent(low)} to {_percent(high)})",
        f"{judge['after'] / judge['before']:.3f}" if judge["before"] else "–",
        f"{_percent(detector['before'])} → {_percent(detector['after'])}",
        f"{_percent(row['accuracy']['before'])} → {_percent(row['accuracy']['after'])}",
        f"{row['fid']['before']:.2f} → {row['fid']['after']:.2f}",
        f"{row['variance']['before']:.1f} → {row['variance']['after']:.1f}",
        seconds,
        f"{row['peak_mib']:.0f} MiB",
        verdict,
    )


def _percent(share):
    return f"{100 * share:.1f} %"
