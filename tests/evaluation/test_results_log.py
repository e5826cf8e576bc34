"""Rows on disk: taken up again, cut lines dropped, other settings refused."""

from __future__ import annotations

import pytest

from vltprune.evaluation.results_log import ResultsLog

SETTINGS = {"model": "a", "images": None, "batch_size": 2}


def test_it_resumes_where_it_stopped(tmp_path):
    log = ResultsLog(tmp_path, SETTINGS)
    log.add([{"index": 0, "kept": (1.5, 2)}, {"index": 1}])
    again = ResultsLog(tmp_path, SETTINGS)
    assert again.rows == [{"index": 0, "kept": [1.5, 2]}, {"index": 1}]
    again.add([{"index": 2}])
    assert [row["index"] for row in ResultsLog(tmp_path, SETTINGS).rows] == [0, 1, 2]


def test_a_row_cut_short_is_written_anew(tmp_path):
    ResultsLog(tmp_path, SETTINGS).add([{"index": 0}, {"index": 1}])
    file = tmp_path / "results.jsonl"
    file.write_bytes(file.read_bytes()[:-4])
    log = ResultsLog(tmp_path, SETTINGS)
    assert log.rows == [{"index": 0}]
    log.add([{"index": 1}])
    assert file.read_text() == '{"index": 0}\n{"index": 1}\n'


def test_other_settings_are_refused(tmp_path):
    ResultsLog(tmp_path, SETTINGS).add([{"index": 0}])
    with pytest.raises(ValueError, match=r"other settings \(model: 'a' there, 'b' now\): choose another --output"):
        ResultsLog(tmp_path, SETTINGS | {"model": "b"})
    with pytest.raises(ValueError, match=r"\(device: None there, 'cuda' now\)"):
        ResultsLog(tmp_path, SETTINGS | {"device": "cuda"})


def test_nothing_is_written_before_the_first_row(tmp_path):
    ResultsLog(tmp_path, SETTINGS)
    assert not list(tmp_path.iterdir())
    (tmp_path / "results.jsonl").write_text('{"index": "of a run whose settings are lost"}\n')
    ResultsLog(tmp_path, SETTINGS).add([{"index": 0}])
    assert ResultsLog(tmp_path, SETTINGS).rows == [{"index": 0}]


def test_a_log_without_a_folder_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = ResultsLog(None, SETTINGS)
    log.add([{"index": 0}])
    log.add([{"index": 1}])
    assert [row["index"] for row in log.rows] == [0, 1] and not list(tmp_path.iterdir())
