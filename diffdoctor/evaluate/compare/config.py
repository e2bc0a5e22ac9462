"""The options of `diffdoctor evaluate compare`."""

from __future__ import annotations

import dataclasses

from diffdoctor.runs.errors import UserError, check_least, expected
from diffdoctor.web.serve import check_address


@dataclasses.dataclass
class EvaluateCompareConfig:
    """Options of `diffdoctor evaluate compare`.

    Attributes:
        a: a folder of pictures or shards, a pattern, or a Parquet file with a column `path` and perhaps `name` and
            `prompt`.
        b: the same of the pictures that are compared with those of `a`: two of one name are a pair.
        output: the folder to make: compare.jsonl (every answer), compare.json, report.html. The same command goes on
            with the pairs that are left.
        raters: names of the people who get a link each.
        question: what the page asks.
        names: what a and b are called in the report, which raters do not see; null: their folders' names.
        pairs: number of pairs, chosen by lot; null: all.
        answers: people who are asked about each pair.
        overlap: share of the pairs that one more person is asked about, for the agreement of raters.
        scores: Parquet file with a column `file` and numbers, with which the answers are compared; null: the
            pictures.parquet of `evaluate model` where a and b are two of its folders.
        lower: names of the scores of which less is better.
        judge: folder or hub id of a detector, whose flagged area is compared with the answers; null: none.
        preference: folder or hub id of a CLIP model of transformers that was tuned on people's choices, likewise; null:
            none.
        seed: of the order, the sides and the choice of pairs.
        serve: serve the page; else only write the report anew.
        host: address to listen at.
        port: to listen at; 0: any that is free.
        open: open the page in a browser here, as the first of the raters.
        allow_remote: let other machines reach the server, at a host that is not this machine's own loopback.
        hosts: further names by which browsers reach it, such as labels.example.org.
        certificate: file of a TLS certificate; null: plain HTTP, over which tokens can be read on the way.
        key: file of its key.
        device: for `judge` and `preference`, such as cpu or cuda:1; null: the fastest there is.
    """

    a: str
    b: str
    output: str
    raters: list[str] = dataclasses.field(default_factory=lambda: ["me"])
    question: str = "Which picture is better?"
    names: list[str] | None = None
    pairs: int | None = None
    answers: int = 1
    overlap: float = 0.1
    scores: str | None = None
    lower: list[str] = dataclasses.field(default_factory=lambda: ["judge", "detector"])
    judge: str | None = None
    preference: str | None = None
    seed: int = 0
    serve: bool = True
    host: str = "127.0.0.1"
    port: int = 8643
    open: bool = False
    allow_remote: bool = False
    hosts: list[str] | None = None
    certificate: str | None = None
    key: str | None = None
    device: str | None = None

    def __post_init__(self):
        check_least(self, pairs=1, answers=1, seed=0)
        check_address(self)
        if not 0 <= self.overlap <= 1:
            raise UserError(expected("overlap", "a share in [0, 1]", self.overlap))
        if not self.raters or len({*self.raters}) < len(self.raters):
            raise UserError(expected("raters", "at least one name, each once", self.raters))
        for name in self.raters:
            if not name.strip() or len(name) > 80 or not name.isprintable():
                raise UserError(expected("raters", "names of up to 80 printable characters", repr(name)))
        if self.names is not None and (len(self.names) != 2 or len({*self.names}) < 2):
            raise UserError(expected("names", "two names, of a and of b", self.names))
