"""A ledger's entries: kept in order, and whole after a line that a kill cut short."""

from diffdoctor.runs.ledger import Ledger


def test_entries_come_back_in_order(tmp_path):
    ledger = Ledger(tmp_path / "new" / "ledger.jsonl")
    assert ledger.entries() == []
    for number in range(3):
        ledger.append({"number": number, "value": float("nan")})
    assert Ledger(ledger.path).entries() == [{"number": number, "value": None} for number in range(3)]


def test_a_line_that_was_cut_short_is_none_and_harms_no_other(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append({"number": 0})
    whole = ledger.path.read_bytes()
    for cut in (b"\n", b'{"num', b'{"number": 1}', b"\xff", b"1\n"):
        ledger.path.write_bytes(whole + cut)
        assert ledger.entries() == [{"number": 0}]
        ledger.append({"number": 2})
        assert ledger.entries() == [{"number": 0}, {"number": 2}]
