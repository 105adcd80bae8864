"""Two machines that share nothing but a store: what one has made the other reads, whole or not at all."""

import pytest
from toys import Toy, begun

from vqlib.studies.store import Store
from vqlib.studies.tasks import rows_of

BASE = Toy(2)
NEXT = Toy(3, before=(BASE,))


@pytest.fixture
def store(tmp_path):
    return Store(f"file://{tmp_path}/store")


def machine(tmp_path, name):
    (tmp_path / name).mkdir()
    return tmp_path / name


def test_a_task_reads_what_another_machine_made(tmp_path, store):
    one, two, third = (machine(tmp_path, name) for name in ("one", "two", "third"))
    assert store.attempt(one, BASE, False).state == "made"
    assert store.attempt(two, NEXT, False).state == "made"
    row = rows_of(two).read(*NEXT.made_of())
    assert (row["square"], row["read"]) == (9, ["2"]) and begun(two, 2) == 0
    assert store.fetch_row(third, NEXT) and rows_of(third).read(*NEXT.made_of()) == row
    assert not store.fetch_row(third, Toy(4)) and not list(third.rglob("*fetched*"))


def test_what_is_in_the_store_is_not_made_again(tmp_path, store):
    one, two = machine(tmp_path, "one"), machine(tmp_path, "two")
    assert store.attempt(one, BASE, False).state == "made"
    assert store.attempt(two, BASE, False).state == "there"
    assert (begun(one, 2), begun(two, 2)) == (1, 0)


def test_a_row_stands_for_whole_results(tmp_path, store, monkeypatch):
    """A machine that dies while it puts its files leaves no row; one that cannot reach the store is tried again."""
    one, two = machine(tmp_path, "one"), machine(tmp_path, "two")

    def full(self, path, name):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "_put", full)
    outcome = store.attempt(one, BASE, False)
    assert outcome.state == "lost" and "No space left" in outcome.error
    monkeypatch.undo()
    assert not store.fetch_row(two, BASE)
    put = []
    monkeypatch.setattr(Store, "_put", lambda self, path, name: put.append(name))
    assert store.attempt(one, BASE, False).state == "there"  # what was made is kept now, not made again
    monkeypatch.undo()
    assert put == ["squares/2/root.txt", f"rows/{rows_of(one).path(*BASE.made_of()).name}"] and begun(one, 2) == 1


def test_files_of_an_attempt_that_left_no_row_are_replaced(tmp_path, store):
    one, remains = machine(tmp_path, "one"), tmp_path / "store/squares/2/root.txt"
    remains.parent.mkdir(parents=True)
    remains.write_text("7")  # of the same size
    assert store.attempt(one, BASE, False).state == "made" and remains.read_text() == "2"
    before = remains.stat().st_mtime_ns
    assert store.attempt(one, BASE, False).state == "there" and remains.stat().st_mtime_ns == before


def test_half_a_fetched_folder_is_not_taken_for_a_whole_one(tmp_path, store, monkeypatch):
    one, two = machine(tmp_path, "one"), machine(tmp_path, "two")
    store.attempt(one, BASE, False)
    (tmp_path / "store/squares/2/second.txt").write_text("2")
    from fsspec.implementations.local import LocalFileSystem

    real = LocalFileSystem.get_file

    def torn(self, remote, local, **options):
        if "second" in remote:
            raise OSError(5, "Input/output error")
        return real(self, remote, local, **options)

    monkeypatch.setattr(LocalFileSystem, "get_file", torn)
    outcome = store.attempt(two, NEXT, False)
    assert outcome.state == "lost" and "Input/output error" in outcome.error
    assert not (two / "squares").exists() or not list((two / "squares").iterdir())
    monkeypatch.undo()
    assert store.attempt(two, NEXT, False).state == "made" and (two / "squares/2/second.txt").exists()
