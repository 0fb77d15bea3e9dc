"""Folders of which one program at a time is the owner."""

import fcntl

import pytest

from diffusionlab.evals import scratch


def test_a_folder_goes_at_a_good_end_and_stays_at_a_bad_one(tmp_path):
    folder = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt), scratch.own(folder, 10.0) as own:
        (own / "kept").touch()
        raise KeyboardInterrupt
    assert (folder / "kept").is_file()
    with scratch.own(folder, 10.0) as own:
        assert own == folder and (own / "kept").is_file()
    assert not folder.exists()


def test_a_second_program_works_elsewhere(tmp_path):
    folder = tmp_path / "work"
    # Locks belong to open files, so two in one program exclude each other as well.
    with scratch.own(folder, 10.0) as first:
        (first / "mine").touch()
        with scratch.own(folder, 10.0) as second:
            assert second != first and not (second / "mine").exists()
        assert not second.exists() and (first / "mine").is_file()
    assert not folder.exists()


def test_a_folder_that_its_owner_removed_meanwhile_is_not_taken(tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    flock = fcntl.flock

    def late(file, how):
        """As if the owner had ended between the look and the lock."""
        (folder / "lock").unlink()
        monkeypatch.setattr(fcntl, "flock", flock)
        return flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with scratch.own(folder, 10.0) as own:
        assert own != folder


def test_alone_holds_its_lock(tmp_path):
    path = tmp_path / "deep" / "reference.lock"
    alone = scratch.alone(path, "a reference")
    with alone, path.open("a") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
