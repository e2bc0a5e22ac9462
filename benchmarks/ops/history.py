"""The history: JSON lines in benchmarks/results/, one row per case and implementation, appended and never rewritten."""

import json
import pathlib

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results"
KEY = ("device", "op", "case", "dtype", "shape", "backend")


def append(path: pathlib.Path, rows: list[dict]) -> None:
    """Append rows in one write, so that an interrupted run leaves whole lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def read(path: pathlib.Path) -> list[dict]:
    """The rows of a file. Raises ValueError that names the line which is not a row."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from None
        if not isinstance(row, dict) or "case" not in row:
            raise ValueError(f"{path}:{number} is not a benchmark row: expected an object with a 'case'")
        rows.append(row)
    return rows


def everything(folder: pathlib.Path = RESULTS) -> list[dict]:
    return [row for path in sorted(folder.glob("*.jsonl")) for row in read(path)]


def select(name: str, folder: pathlib.Path = RESULTS) -> list[dict]:
    """Rows of a file, or of a commit named by at least four characters of its hash, or of a run by its id."""
    path = pathlib.Path(name)
    if path.is_file():
        return read(path)
    rows = everything(folder)
    if len(name) >= 4:
        found = [row for row in rows if (row.get("commit") or "").startswith(name) or row.get("run") == name]
        if found:
            return found
    known = sorted({(row.get("commit") or "none")[:10] for row in rows})
    raise ValueError(f"{name!r} is neither a file nor a commit or run in {folder} (commits there: {known or 'none'})")


def latest(rows: list[dict]) -> dict[tuple, dict]:
    """The last row of each key that was timed; a key holds what makes two rows comparable."""
    return {key(row): row for row in rows if row.get("p50_us") is not None}


def key(row: dict) -> tuple:
    return tuple(tuple(row[name]) if isinstance(row.get(name), list) else row.get(name) for name in KEY)
