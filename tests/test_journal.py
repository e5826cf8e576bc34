"""Rows on disk: taken up again, cut lines dropped, other settings refused."""

from __future__ import annotations

import pytest

from vltprune.journal import Journal

SETTINGS = {"model": "a", "images": None, "batch_size": 2}


def test_it_goes_on_where_it_stopped(tmp_path):
    journal = Journal(tmp_path, SETTINGS)
    journal.add([{"index": 0, "kept": (1.5, 2)}, {"index": 1}])
    again = Journal(tmp_path, SETTINGS)
    assert again.rows == [{"index": 0, "kept": [1.5, 2]}, {"index": 1}]
    again.add([{"index": 2}])
    assert [row["index"] for row in Journal(tmp_path, SETTINGS).rows] == [0, 1, 2]


def test_a_row_cut_short_is_written_anew(tmp_path):
    Journal(tmp_path, SETTINGS).add([{"index": 0}, {"index": 1}])
    file = tmp_path / "results.jsonl"
    file.write_bytes(file.read_bytes()[:-4])
    journal = Journal(tmp_path, SETTINGS)
    assert journal.rows == [{"index": 0}]
    journal.add([{"index": 1}])
    assert file.read_text() == '{"index": 0}\n{"index": 1}\n'


def test_other_settings_are_refused(tmp_path):
    Journal(tmp_path, SETTINGS).add([{"index": 0}])
    with pytest.raises(ValueError, match=r"other settings \(model: 'a' there, 'b' now\): choose another --output"):
        Journal(tmp_path, SETTINGS | {"model": "b"})
    with pytest.raises(ValueError, match=r"\(device: None there, 'cuda' now\)"):
        Journal(tmp_path, SETTINGS | {"device": "cuda"})


def test_nothing_is_written_before_the_first_row(tmp_path):
    Journal(tmp_path, SETTINGS)
    assert not list(tmp_path.iterdir())
    (tmp_path / "results.jsonl").write_text('{"index": "of a run whose settings are lost"}\n')
    Journal(tmp_path, SETTINGS).add([{"index": 0}])
    assert Journal(tmp_path, SETTINGS).rows == [{"index": 0}]
