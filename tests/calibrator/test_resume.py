"""A run killed at the worst moments - inside the write of a checkpoint, right before its rename, between a record and its
checkpoint - goes on and ends bit-equal."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import test_calibrate as calibration
import torch

from vqlib.calibrator.calibrate import calibrate
from vqlib.calibrator.runs import read_records

SETTINGS = calibration.SETTINGS.replace(iterations=12, checkpoint_every=3)
CHILD = """
import os, signal, sys, torch, test_calibrate, test_resume
from vqlib.calibrator import runs
torch.set_num_threads(1)
folder, moment, countdown = sys.argv[1], sys.argv[2], int(sys.argv[3])

def deadly(function):
    def call(*args, **kwargs):
        global countdown
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

if moment == "append":
    runs.RunFolder.append = deadly(runs.RunFolder.append)
elif moment != "never":
    setattr(os, moment, deadly(getattr(os, moment)))
pipe, student = test_calibrate.prepared()
test_resume.calibrate(pipe, student, test_resume.SETTINGS, out=folder).finish()
torch.save(test_calibrate.trained_tensors(student), folder + ".pt")
"""


def run_child(folder, moment, countdown):
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": f"{here}{os.pathsep}{here.parents[1]}" + f"{os.pathsep}{here.parent}",
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), moment, str(countdown)], env=environment
    ).returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody kills."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run_child(folder, "never", 0) == 0
    return folder


def test_killed_at_the_worst_moments_a_run_ends_bit_equal(whole, tmp_path):
    """The first os.replace writes run.json, the second the start, the later ones checkpoints and the cut of records.jsonl at a resume."""
    folder, draw = tmp_path / "killed", random.Random(0)
    for moment, countdown in (("replace", 3), ("fsync", draw.randint(3, 4)), ("append", draw.randint(2, 6))):
        assert run_child(folder, moment, countdown) == -signal.SIGKILL, moment
        assert 0 < len(read_records(folder)) < SETTINGS.iterations
    assert run_child(folder, "never", 0) == 0
    expected, found = (torch.load(f"{path}.pt", weights_only=True) for path in (whole, folder))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    a, b = read_records(whole), read_records(folder)
    assert [r.iteration for r in b] == list(range(1, SETTINGS.iterations + 1))
    assert [(r.block_losses, r.ratio_loss) for r in a] == [(r.block_losses, r.ratio_loss) for r in b]


def test_a_finished_run_is_only_read(whole):
    pipe, student = calibration.prepared()
    before = (whole / "records.jsonl").read_bytes()
    run = calibrate(pipe, student, SETTINGS, out=whole)
    assert run.remaining == 0 and list(run) == []
    run.close()
    expected = torch.load(f"{whole}.pt", weights_only=True)
    assert all(torch.equal(expected[name], value) for name, value in calibration.trained_tensors(student).items())
    assert (whole / "records.jsonl").read_bytes() == before
