"""A row is found by all that made it, made by one process, and never believed from a damaged or foreign file."""

from dataclasses import dataclass

import numpy as np
import pytest
from filelock import FileLock

from vqlib.config import SamplingConfig
from vqlib.studies.rows import Rows, content_key


@dataclass(frozen=True)
class A:
    bits: int
    sampling: SamplingConfig = SamplingConfig()


@dataclass(frozen=True)
class B:
    bits: int
    sampling: SamplingConfig = SamplingConfig()


@pytest.fixture
def rows(tmp_path):
    return Rows(tmp_path / "rows")


def test_a_row_is_made_once_and_found_by_every_field_and_by_the_class(rows):
    assert rows.read(A(2), "cpu") is None and rows.keys() == set()
    assert rows.make(lambda folder: {"fd": 0.1}, A(2), "cpu") is True
    assert rows.make(lambda folder: pytest.fail("made again"), A(2), "cpu") is False
    assert rows.read(A(2), "cpu") == {"fd": 0.1} and rows.keys() == {content_key(A(2), "cpu")}
    others = (A(3), "cpu"), (B(2), "cpu"), (A(2), "cuda"), (A(2, SamplingConfig(steps=51)), "cpu"), (A(2),)
    assert [rows.read(*made_of) for made_of in others] == [None] * 5
    assert len({content_key(*made_of) for made_of in (*others, (A(2), "cpu"))}) == 6


def test_mappings_are_found_again_whatever_their_order_and_tuples(rows):
    assert rows.make(lambda folder: {"fd": 0.1}, {"side": (1, 2), "name": "a"}) is True
    assert rows.make(lambda folder: pytest.fail("made again"), {"name": "a", "side": (1, 2)}) is False
    assert rows.read({"name": "a", "side": [1, 2]}) == {"fd": 0.1} and rows.read({"name": "a", "side": [1]}) is None


@pytest.mark.parametrize("content", [b"", b'{"made_of"', b"[1]", b"\xff\xfe", b'{"row": {"fd": 0}}'])
def test_a_damaged_file_counts_as_none_and_is_made_again(rows, content):
    rows.make(lambda folder: {"fd": 0.1}, A(2))
    rows.path(A(2)).write_bytes(content)
    assert rows.read(A(2)) is None
    assert rows.make(lambda folder: {"fd": 0.2}, A(2)) is True and rows.read(A(2)) == {"fd": 0.2}


def test_another_rows_file_under_this_name_counts_as_none(rows):
    rows.make(lambda folder: {"fd": 0.1}, A(2))
    rows.path(A(2)).rename(rows.path(A(3)))
    assert rows.read(A(3)) is None


def test_unfinished_work_survives_a_failure_and_goes_with_the_row(rows):
    seen = []

    def make(folder):
        folder.mkdir(parents=True, exist_ok=True)
        seen.append(sorted(path.name for path in folder.iterdir()))
        (folder / str(len(seen))).touch()
        if len(seen) == 1:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        rows.make(make, A(2))
    assert rows.read(A(2)) is None and rows.make(make, A(2)) and seen == [[], ["1"]]
    assert not list((rows.folder / "unfinished").iterdir())


def test_a_row_that_another_process_makes_is_left_to_it(rows):
    rows.folder.mkdir()
    with FileLock(rows.path(A(2)).with_suffix(".lock")):
        assert rows.make(lambda folder: pytest.fail("made twice"), A(2)) is False


def test_numpys_numbers_are_pythons_and_what_is_no_json_is_told(rows):
    assert rows.make(lambda folder: {"fd": 0.1}, A(np.int64(2)), np.float64(0.5))
    assert rows.read(A(2), 0.5) == {"fd": 0.1}
    with pytest.raises(TypeError, match="set is not JSON serializable"):
        rows.read(A(2), {0.5})
