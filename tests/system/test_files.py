import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from vqlib.system.files import write_bytes, write_tensors


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_bytes(tmp_path / "new folder" / "t.csv", b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    whole = torch.arange(6.0).view(2, 3)
    tensors = {"whole": whole, "turned": whole.t(), "same": whole, "part": whole[1], "empty": torch.empty(0)}
    path = write_tensors(tmp_path / "t.safetensors", tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], value) for name, value in tensors.items())


def test_a_tilde_is_the_home_folder_and_a_link_stays_a_link(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert write_bytes("~/deep/t.csv", b"1") == tmp_path / "deep" / "t.csv"
    link = tmp_path / "link.csv"
    link.symlink_to(tmp_path / "deep" / "t.csv")
    write_bytes(link, b"2")
    assert link.is_symlink() and (tmp_path / "deep" / "t.csv").read_bytes() == b"2"


FULL = """
import errno, resource, sys, torch
from vqlib.system.files import write_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_tensors(sys.argv[1], {"a": torch.zeros(4000)})
except OSError as error:
    assert error.errno == errno.EFBIG and error.filename == sys.argv[1], error
    print("refused")
"""


def test_tensors_that_the_disk_refuses_are_an_os_error_with_its_number(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "t")], capture_output=True, text=True)
    assert done.stdout == "refused\n" and not list(tmp_path.iterdir()), done.stderr
