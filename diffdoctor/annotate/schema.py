"""The tables of an annotation project, in one SQLite file."""

VERSION = 1
# STRICT tables, which refuse values of another type than the column's.
OLDEST_SQLITE = (3, 37, 0)
KINDS = ("normal", "audit", "gold", "training")
VERDICTS = ("damaged", "clean", "unusable", "skipped")
ROLES = ("annotator", "reviewer", "admin")
# Every rater gets tasks of these kinds, once: their truth is known.
KNOWN_KINDS = ("gold", "training")


def _one_of(column: str, values: tuple[str, ...]) -> str:
    return f"CHECK({column} IN ({', '.join(repr(value) for value in values)}))"


_TABLES = f"""
CREATE TABLE picture(
    id INTEGER PRIMARY KEY,
    uid TEXT NOT NULL UNIQUE,       -- sha256 of size and decoded pixels
    place TEXT NOT NULL,            -- JSON: file, and for a shard's picture its member's offset and size; crop
    height INTEGER NOT NULL, width INTEGER NOT NULL,
    category TEXT NOT NULL, generator TEXT NOT NULL, prompt TEXT NOT NULL,
    phash INTEGER NOT NULL
) STRICT;
CREATE TABLE mask(
    sha TEXT PRIMARY KEY,           -- sha256 of size, bits and pixels
    height INTEGER NOT NULL, width INTEGER NOT NULL,
    bits INTEGER NOT NULL CHECK(bits IN (1, 8)),
    data BLOB NOT NULL              -- zlib; of 1 bit a pixel packed row by row, the highest bit first
) STRICT;
CREATE TABLE task(
    id INTEGER PRIMARY KEY,
    picture INTEGER NOT NULL REFERENCES picture,
    round INTEGER NOT NULL,
    proposal TEXT REFERENCES mask,  -- the detector's map, 8 bits
    truth TEXT REFERENCES mask,     -- of gold and training tasks
    weights TEXT NOT NULL,          -- digest of the detector
    kind TEXT NOT NULL {_one_of("kind", KINDS)},
    blind INTEGER NOT NULL, needed INTEGER NOT NULL, done INTEGER NOT NULL DEFAULT 0,
    priority REAL NOT NULL, reason TEXT NOT NULL,
    state TEXT NOT NULL {_one_of("state", ("open", "done", "conflict", "reviewed", "unusable"))},
    UNIQUE(picture, round)
) STRICT;
CREATE INDEX task_order ON task(state, priority DESC, id);
CREATE TABLE annotator(
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
    role TEXT NOT NULL {_one_of("role", ROLES)},
    token_hash TEXT NOT NULL UNIQUE, -- sha256
    disabled INTEGER NOT NULL DEFAULT 0,
    paused TEXT,                     -- why; NULL: not
    resumed INTEGER NOT NULL DEFAULT 0 -- gold answers up to this annotation no longer count towards a pause
) STRICT;
CREATE TABLE lease(
    task INTEGER NOT NULL REFERENCES task, annotator INTEGER NOT NULL REFERENCES annotator,
    fence TEXT NOT NULL, since REAL NOT NULL, until REAL NOT NULL, PRIMARY KEY(task, annotator)
) STRICT;
CREATE INDEX lease_annotator ON lease(annotator, until);
CREATE TABLE draft(
    task INTEGER NOT NULL REFERENCES task, annotator INTEGER NOT NULL REFERENCES annotator,
    version INTEGER NOT NULL, envelope BLOB NOT NULL, -- zlib, as the page sent it
    at REAL NOT NULL, PRIMARY KEY(task, annotator)
) STRICT;
CREATE TABLE annotation(
    id INTEGER PRIMARY KEY,
    task INTEGER NOT NULL REFERENCES task, annotator INTEGER NOT NULL REFERENCES annotator,
    version INTEGER NOT NULL, verdict TEXT NOT NULL {_one_of("verdict", VERDICTS)},
    mask TEXT REFERENCES mask, "ignore" TEXT REFERENCES mask, tags TEXT NOT NULL,
    threshold INTEGER, accepted INTEGER NOT NULL, refused INTEGER NOT NULL, drawn INTEGER NOT NULL,
    active_ms INTEGER NOT NULL, wall_ms INTEGER NOT NULL,
    guidelines TEXT NOT NULL, late INTEGER NOT NULL, at REAL NOT NULL,
    UNIQUE(task, annotator, version)
) STRICT;
CREATE INDEX annotation_annotator ON annotation(annotator, task);
CREATE TABLE review(
    id INTEGER PRIMARY KEY,
    task INTEGER NOT NULL REFERENCES task, reviewer INTEGER NOT NULL REFERENCES annotator,
    decision TEXT NOT NULL {_one_of("decision", ("accept", "edit", "reject"))},
    annotation INTEGER REFERENCES annotation,
    verdict TEXT, mask TEXT REFERENCES mask, "ignore" TEXT REFERENCES mask,
    comment TEXT NOT NULL, at REAL NOT NULL
) STRICT;
CREATE INDEX review_task ON review(task);
CREATE TABLE gold(                  -- how answers to tasks of known truth compare with it
    annotation INTEGER PRIMARY KEY REFERENCES annotation,
    hit INTEGER NOT NULL, iou REAL, -- NULL where neither marks anything
    marked INTEGER NOT NULL         -- a clean picture was marked
) STRICT;
CREATE TABLE event(
    id INTEGER PRIMARY KEY, at REAL NOT NULL,
    actor INTEGER, task INTEGER, kind TEXT NOT NULL, detail TEXT NOT NULL,
    chain BLOB NOT NULL             -- sha256 of the chain before and this row
) STRICT;
"""
# What is written once stays: a correction is a further row.
_KEPT = ("mask", "annotation", "review", "event")
_TRIGGERS = "".join(
    f"CREATE TRIGGER {table}_{verb.lower()} BEFORE {verb} ON {table} "
    f"BEGIN SELECT RAISE(ABORT, '{table}: nothing is overwritten'); END;\n"
    for table in _KEPT
    for verb in ("UPDATE", "DELETE")
)
SCHEMA = f"BEGIN IMMEDIATE;{_TABLES}{_TRIGGERS}PRAGMA user_version = {VERSION};COMMIT;"
