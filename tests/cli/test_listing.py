"""`list` from end to end: kinds under headings, one kind for pipes, and what is not found."""

from __future__ import annotations

import pytest

from vltprune.cli import main as cli


@pytest.fixture
def listed(capsys):
    """Runs `list`; the names below each heading."""

    def run(*argv: str) -> dict[str, list[str]]:
        assert cli.main(["list", *argv]) == 0
        sections = capsys.readouterr().out.strip().split("\n\n")
        lines = [section.splitlines() for section in sections]
        assert all(line.startswith("  ") for _, *below in lines for line in below)
        return {heading.split()[0]: [line.split()[0] for line in below] for heading, *below in lines}

    return run


def test_a_name_is_found_in_every_kind(listed):
    found = listed("madtp")
    assert {"madtp"} <= set(found["presets"]) and {"madtp", "distinct_madtp"} <= set(found["scorers"])
    assert "blip_nlvr_tiny_madtp.p80" in found["weights"] and not {"models", "tasks"} & set(found)
    assert "clip_vit_b_32.openai" in listed("openai")["weights"]
    assert listed("nlvr")["tasks"] == ["nlvr"]


def test_without_a_pattern_every_kind_is_listed(listed):
    found = listed()
    assert [*found] == [
        "models",
        "weights",
        "presets",
        "scorers",
        "keepers",
        "selectors",
        "reducers",
        "guides",
        "tasks",
    ]
    assert set(listed("--library", "timm")) == {"models", "weights"}


@pytest.mark.parametrize("pattern", ["vit-b-32", "VIT_B_32", "ViT-B-32", "clip_vit_b_32", "CLIP_ViT_*_32"])
def test_case_and_spelling_do_not_matter(pattern, listed):
    assert "clip_vit_b_32" in listed(pattern)["models"]


def test_one_kind_is_listed_as_plain_names(capsys):
    for argv, wanted in (
        (["--models", "vit_*_DINOv2", "--library", "timm"], "vit_small_patch14_dinov2"),
        (["--models", "nlvr"], "blip_nlvr_base"),
        (["--tags", "ViT-B-32"], "clip_vit_b_32.openai"),
        (["--presets"], "evit"),
        (["--scorers", "RANDOM"], "random"),
    ):
        assert cli.main(["list", *argv]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert wanted in lines and not any(" " in line for line in lines)


def test_parts_say_what_they_are(capsys):
    assert cli.main(["list", "madtp"]) == 0
    line = next(one for one in capsys.readouterr().out.splitlines() if one.startswith("  madtp "))
    assert "arXiv 2403.02991" in line


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["atention"], "did you mean attention"),
        (["blip_bass"], "no name matches 'blip_bass'; did you mean blip_base"),
        (["--presets", "EVITT"], "did you mean evit"),
        (["--tags", "blip_vqa_tiny"], "there are such models, and no weights of them"),
        (["resnet18"], "of those that can be pruned; resnet18"),
        (["CoCa"], "cannot"),
    ],
)
def test_what_is_not_found(argv, says, fails):
    assert says in fails("list", *argv)
