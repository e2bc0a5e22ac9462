"""What is printed, and what must hold."""

from __future__ import annotations

from benchmarks.studies.treat_memory.demo import PICTURES

MEBIBYTE = 2**20


BOUNDS = {"kept in the denoiser": 0.31, "kept in all": 0.45, "time": 0.7}
"""`draft_k`'s shares of `full` at the most."""
GROWTH = 0.02
"""By how much what is kept may differ between 10 and 40 sampling steps."""


def demo_markdown(rows: list[dict]) -> str:
    """`demo_table`'s rows as a Markdown table; shares are of the first row."""
    first = rows[0]
    lines = _head(f"demo's pipeline, {PICTURES} pictures", "kept: denoiser", "VAE, detector", "in all", "peak", "time")
    for row in rows:
        denoiser, total = row["kept"]["denoiser"], sum(row["kept"].values())
        seconds = "" if row["seconds"] is None else _share(row["seconds"], first["seconds"], f"{row['seconds']:.2f} s")
        lines.append(
            _row(
                row["case"],
                _share(denoiser, first["kept"]["denoiser"], _size(denoiser)),
                _size(total - denoiser),
                _share(total, sum(first["kept"].values()), _size(total)),
                _share(row["peak"], first["peak"], _size(row["peak"])),
                seconds,
            )
        )
    return "\n".join(lines)


def real_markdown(rows: list[dict]) -> str:
    """`real_rows`' rows as a Markdown table; shares are of the first row of each network."""
    lines = _head("one picture", "kept: denoiser", "VAE", "detector", "peak", "operations")
    network = None
    for row in rows:
        if row["network"] != network:
            network, first = row["network"], row
            lines.append(_row(f"**{network}**", *[""] * 5))
        kept = row["kept"]
        lines.append(
            _row(
                row["case"],
                *(_size(kept[place]) for place in ("denoiser", "vae", "detector")),
                _share(row["peak"], first["peak"], _size(row["peak"])),
                _share(row["operations"], first["operations"], f"{row['operations'] / 1e12:.0f} T"),
            )
        )
    return "\n".join(lines)


def judged(demo: list[dict]) -> dict[str, float]:
    """draft_k's shares of full, by the names of `BOUNDS`, and how far 40 sampling steps are from 10."""
    rows = {row["case"]: row for row in demo}
    few, everything, forty = rows["draft_k"], rows["full"], rows["draft_k, 40 sampling steps"]
    total = {name: sum(row["kept"].values()) for name, row in rows.items()}
    shares = {
        "kept in the denoiser": few["kept"]["denoiser"] / everything["kept"]["denoiser"],
        "kept in all": total["draft_k"] / total["full"],
    }
    if few["seconds"] is not None:
        shares["time"] = few["seconds"] / everything["seconds"]
    return shares | {"growth from 10 to 40 sampling steps": sum(forty["kept"].values()) / total["draft_k"] - 1}


def _head(*cells: str) -> list[str]:
    return [_row(*cells), "|---" * len(cells) + "|"]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _size(count: int) -> str:
    return f"{count / MEBIBYTE:,.1f} MiB" if count < 1024 * MEBIBYTE else f"{count / 1024 / MEBIBYTE:,.2f} GiB"


def _share(value, whole, text: str) -> str:
    return f"{text} ({value / whole:.2f})"
