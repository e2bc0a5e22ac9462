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
    lines = head(f"demo's pipeline, {PICTURES} pictures", "kept: denoiser", "VAE, detector", "in all", "peak", "time")
    for each in rows:
        denoiser, total = each["kept"]["denoiser"], sum(each["kept"].values())
        seconds = (
            "" if each["seconds"] is None else _share(each["seconds"], first["seconds"], f"{each['seconds']:.2f} s")
        )
        lines.append(
            row(
                each["case"],
                _share(denoiser, first["kept"]["denoiser"], size(denoiser)),
                size(total - denoiser),
                _share(total, sum(first["kept"].values()), size(total)),
                _share(each["peak"], first["peak"], size(each["peak"])),
                seconds,
            )
        )
    return "\n".join(lines)


def real_markdown(rows: list[dict]) -> str:
    """`real_rows`' rows as a Markdown table; shares are of the first row of each network."""
    lines = head("one picture", "kept: denoiser", "VAE", "detector", "peak", "operations")
    network = None
    for each in rows:
        if each["network"] != network:
            network, first = each["network"], each
            lines.append(row(f"**{network}**", *[""] * 5))
        kept = each["kept"]
        lines.append(
            row(
                each["case"],
                *(size(kept[place]) for place in ("denoiser", "vae", "detector")),
                _share(each["peak"], first["peak"], size(each["peak"])),
                _share(each["operations"], first["operations"], f"{each['operations'] / 1e12:.0f} T"),
            )
        )
    return "\n".join(lines)


def measured_markdown(rows: list[dict], headed: bool = True) -> str:
    """Rows of `real_rows` and `family_row` that were measured on a GPU, as lines of a Markdown table."""
    lines = head("one picture, or as said", "case", "peak beside the weights", "operations", "time", "per second")
    lines = lines if headed else []
    for each in rows:
        name, case = (each["network"], each["case"]) if "case" in each else (each["family"], "nft, checkpointed")
        if "error" in each:
            lines.append(row(name, case, each["error"], "", "", ""))
            continue
        seconds, operations = each["seconds"], each["operations"] / 1e12
        cells = size(each["peak"]), f"{operations:,.0f} T", f"{seconds:.3f} s", f"{operations / seconds:.0f} T"
        lines.append(row(name, case, *cells))
    return "\n".join(lines)


def judged(demo: list[dict]) -> dict[str, float]:
    """draft_k's shares of full, by the names of `BOUNDS`, and how far 40 sampling steps are from 10."""
    rows = {each["case"]: each for each in demo}
    few, everything, forty = rows["draft_k"], rows["full"], rows["draft_k, 40 sampling steps"]
    total = {name: sum(each["kept"].values()) for name, each in rows.items()}
    shares = {
        "kept in the denoiser": few["kept"]["denoiser"] / everything["kept"]["denoiser"],
        "kept in all": total["draft_k"] / total["full"],
    }
    if few["seconds"] is not None:
        shares["time"] = few["seconds"] / everything["seconds"]
    return shares | {"growth from 10 to 40 sampling steps": sum(forty["kept"].values()) / total["draft_k"] - 1}


def head(*cells: str) -> list[str]:
    """The first two lines of a Markdown table."""
    return [row(*cells), "|---" * len(cells) + "|"]


def row(*cells: str) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def size(count: int) -> str:
    """Bytes in words."""
    return f"{count / MEBIBYTE:,.1f} MiB" if count < 1024 * MEBIBYTE else f"{count / 1024 / MEBIBYTE:,.2f} GiB"


def _share(value, whole, text: str) -> str:
    return f"{text} ({value / whole:.2f})"
