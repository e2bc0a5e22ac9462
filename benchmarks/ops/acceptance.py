"""The figures that the project asks of its kernels, held against a run."""

from dataclasses import dataclass, replace

from benchmarks.ops.table import aligned, grouped, own_implementations, ratio

#: dtype: (times the eager formula, times torch.compile of it)
CPU_SPEED = {"fp32": (5.0, 2.0), "bf16": (8.0, 2.0)}
CPU_COPY_SHARE = 0.75
CUDA_COPY_SHARE = 0.90
OVERHEAD_US = {"elements-16": 10.0, "elements-16-map": 20.0}


@dataclass(frozen=True)
class Check:
    """One figure: what was asked, what came, and whether that is enough (None: it was not measured)."""

    what: str
    asked: str
    got: str
    met: bool | None
    reason: str = ""  # why it was missed, as far as other rows tell


def _at_least(what, asked, got, show) -> Check:
    if got is None:
        return Check(what, f"≥ {show(asked)}", "not measured", None)
    return Check(what, f"≥ {show(asked)}", show(got), got >= asked)


def _times(value):
    return f"{value:.2f}×"


def _percent(value):
    return f"{value:.0%}"


def _speed(group, row, name):
    eager, compiled = CPU_SPEED[row["dtype"]]
    yield _at_least(f"{name}: eager / diffdoctor", eager, ratio(group, "cpu", "eager"), _times)
    yield _at_least(f"{name}: torch.compile / diffdoctor", compiled, ratio(group, "cpu", "compile"), _times)
    kernel = group.get("cpu-kernel", {})
    yield _at_least(f"{name}: kernel, share of a copy's speed", CPU_COPY_SHARE, kernel.get("copy_share"), _percent)


def _held(row, name):
    """One gradient between forward and backward; fp16 keeps none. The loss and per-sample numbers may add a page."""
    if row.get("held_bytes") is None:
        return Check(f"{name}: held between forward and backward", "one gradient", "not measured", None)
    gradient = row["gradient_bytes"] if row["dtype"] != "fp16" else 0
    got = row["held_bytes"]
    asked = f"≤ {gradient / 2**20:.2f} MiB + 4 KiB"
    return Check(f"{name}: held between forward and backward", asked, f"{got / 2**20:.2f} MiB", got <= gradient + 4096)


def checks(rows: list[dict]) -> list[Check]:
    """Every figure of the acceptance checks that the rows can answer."""
    groups = grouped(rows)
    found = []
    for (_, case, dtype), group in groups.items():
        row = next(iter(group.values()))
        name = f"{case} {dtype}"
        if "acceptance" in row["tags"] and row["device"] == "cpu":
            if dtype in CPU_SPEED:
                found.extend(_speed(group, row, name))
            found.append(_held(group.get("cpu", {}) | {"dtype": dtype}, name))
        if "acceptance" in row["tags"] and row["device"] == "cuda" and dtype in ("bf16", "fp16"):
            share = "copy_share_of_passes" if dtype == "fp16" else "copy_share"
            for impl in own_implementations(group):
                found.extend(_copy_share(group, impl, name, share))
        if case == "sd15" and row["device"] == "cuda":
            found.extend(_launches(group, impl, name) for impl in own_implementations(group))
    found.extend(_overhead(groups))
    return found


def _copy_share(group, impl, name, share):
    """The kernel alone before the whole call: what the call misses though its kernel holds is the host's."""
    kernel, call = (group.get(row, {}).get(share) for row in (f"{impl}-kernel", impl))
    one = _at_least(f"{name}: {impl}'s kernel, share of a copy's speed", CUDA_COPY_SHARE, kernel, _percent)
    yield replace(one, reason="issue or memory: see ncu's issue_active" if one.met is False else "")
    both = _at_least(f"{name}: {impl}, share of a copy's speed", CUDA_COPY_SHARE, call, _percent)
    yield replace(both, reason={True: "host", False: "its kernel", None: ""}[one.met] if both.met is False else "")


def _launches(group, impl, name):
    """One forward, one backward, and autograd's own fill of the gradient that backward starts from."""
    launches, waits = (group[impl].get(what) for what in ("launches", "waits"))
    what, asked = f"{name}: {impl}, launches (one is autograd's) and waits", "≤ 3 and 0"
    if launches is None:
        return Check(what, asked, "not measured", None)
    return Check(what, asked, f"{launches} and {waits}", launches <= 3 and waits == 0)


def _overhead(groups):
    plain = groups.get(("weighted_loss", "elements-16", "fp32"), {}).get("eager", {}).get("p20_us")
    for case, limit in OVERHEAD_US.items():
        group = groups.get(("weighted_loss", case, "fp32"), {})
        got = group.get("cpu", {}).get("p20_us")
        if not group or next(iter(group.values()))["device"] != "cpu":
            continue
        more = None if None in (got, plain) else got - plain
        shown = "not measured" if more is None else f"{more:+.1f} µs"
        yield Check(f"{case}: beyond F.mse_loss", f"≤ {limit:.0f} µs", shown, None if more is None else more <= limit)


def text(rows: list[dict]) -> str:
    words = {True: "met", False: "MISSED", None: "not measured"}
    found = checks(rows)
    if not found:
        return "No acceptance case was run."
    return aligned(
        [
            ("figure", "asked", "got", ""),
            *((c.what, c.asked, c.got, words[c.met] + (f" ({c.reason})" if c.reason else "")) for c in found),
        ],
        left=4,
    )
