"""The demo's stages: made once, whole or not at all."""

import os

import pytest

from diffdoctor.demo.stages import Stages


class TestStages:
    def test_a_finished_stage_is_not_made_again(self, tmp_path):
        calls = []

        def make(folder):
            calls.append(folder)
            (folder / "result").write_text("done")

        for _ in range(2):
            folder = Stages(tmp_path, {"seed": 0}).run("one", make)
            assert (folder / "result").read_text() == "done"
        assert len(calls) == 1

    def test_a_half_written_stage_is_made_again(self, tmp_path):
        def fails(folder):
            (folder / "result").write_text("half")
            raise KeyboardInterrupt

        stages = Stages(tmp_path, {"seed": 0})
        with pytest.raises(KeyboardInterrupt):
            stages.run("one", fails)
        # What kill -9 leaves: a temporary folder, and a stage without its record.
        (tmp_path / "stages" / ".one.diffdoctor-tmp-abcd1234").mkdir()
        (tmp_path / "stages" / "one").mkdir()
        (tmp_path / "stages" / "one" / "result").write_text("half")
        stages = Stages(tmp_path, {"seed": 0})
        folder = stages.run("one", lambda folder: (folder / "result").write_text("whole"))
        assert (folder / "result").read_text() == "whole"
        assert sorted(os.listdir(tmp_path / "stages")) == ["one"]

    def test_what_another_process_is_writing_stays(self, tmp_path):
        def make(folder):
            other = Stages(tmp_path, {"seed": 0}, alone=False)
            assert not other.done("one")
            other.run("two", lambda folder: None)
            (folder / "result").write_text("whole")

        folder = Stages(tmp_path, {"seed": 0}).run("one", make)
        assert (folder / "result").read_text() == "whole"
        assert sorted(os.listdir(tmp_path / "stages")) == ["one", "two"]

    def test_other_settings_are_refused_unless_overwritten(self, tmp_path):
        Stages(tmp_path, {"seed": 0}).run("one", lambda folder: None)
        with pytest.raises(ValueError, match=r"another seed \(expected 0, got 1\); choose another folder"):
            Stages(tmp_path, {"seed": 1})
        assert Stages(tmp_path, {"seed": 0}).done("one")
        assert not Stages(tmp_path, {"seed": 1}, overwrite=True).done("one")
