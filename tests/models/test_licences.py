"""Licences are read from a card's front matter and from nowhere else."""

import pytest

from prefixkit.models.licences import find_licence, licence_of_card


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\ntags: [x]\nlicense: 'apache-2.0'  # ours\n---\ntext", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: qwen-research\n---\n", "qwen-research"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlanguage: en\n---\nlicense: mit", "unknown"),
        ("license: mit", "unknown"),
        ("", "unknown"),
    ],
)
def test_licence_of_card(card, licence):
    assert licence_of_card(card) == licence


def test_folder_without_a_card_and_hub_out_of_reach_are_unknown(tmp_path):
    assert find_licence(folder=tmp_path) == "unknown"
    assert find_licence(hub_id="nobody/no-such-model") == "unknown"
