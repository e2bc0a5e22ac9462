"""Threads of our own programs do not spin; a user's program is left alone."""

import json
import os
import subprocess
import sys

import pytest

from diffdoctor import openmp


def test_env_runs_as_a_program_whose_threads_do_not_spin():
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-m", "diffdoctor", "env", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["serves"]["cpu"]["weighted_loss"]
    assert found["packages"]["torch"] != "not installed"
    assert found["variables"]["GOMP_SPINCOUNT"] == "10000"


class TestSpinning:
    @pytest.mark.parametrize(
        "environment", [{"GOMP_SPINCOUNT": "infinity"}, {"OMP_WAIT_POLICY": "active"}], ids=["count", "policy"]
    )
    def test_what_the_user_chose_stays(self, environment):
        before = dict(environment)
        openmp.limit_spinning(environment)
        assert environment == before

    @pytest.mark.parametrize(
        ("original", "argv"),
        [
            ("python /usr/bin/diffdoctor env", "/usr/bin/diffdoctor env"),
            ("python C:/Scripts/diffdoctor.exe", "C:/Scripts/diffdoctor.exe"),
            ("python -m diffdoctor env --json", "-m env --json"),
            ("python -Bmdiffdoctor env", "-m env"),
            ("python -u -m diffdoctor.demo.table folder", "-m folder"),
        ],
    )
    def test_our_programs_are_known(self, original, argv):
        assert openmp.is_own_program(argv.split(), original.split())

    @pytest.mark.parametrize(
        ("original", "argv"),
        [
            ("python train.py diffdoctor", "train.py diffdoctor"),
            ("python -m trainer diffdoctor", "-m diffdoctor"),
            ("python -c code -m diffdoctor", "-c -m diffdoctor"),
            ("python", ""),
            ("", "-m a b"),
        ],
    )
    def test_a_user_s_program_is_left_alone(self, original, argv):
        assert not openmp.is_own_program(argv.split(), original.split())
