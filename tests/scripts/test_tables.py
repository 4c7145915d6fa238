"""The generated blocks of README and docs/ are what the committed results give."""

import re

import pytest
import tables

ABSOLUTE = re.compile(r'["\s:,=]/(?:home|mnt|opt|root|tmp|Users|work)/')


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: str(page.relative_to(tables.ROOT)))
def test_the_blocks_are_up_to_date(page):
    text = page.read_text()
    assert tables.filled(text) == text, "run `make readme-tables`"


@pytest.mark.parametrize("path", sorted(tables.RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_committed_rows_name_no_folder_of_the_machine_that_measured_them(path):
    found = ABSOLUTE.search(path.read_text())
    assert found is None, f"{found}: write the path as it is seen from the checkout"


def test_every_block_has_a_place_and_every_place_a_block():
    text = "\n".join(page.read_text() for page in tables.pages())
    assert {match["name"] for match in tables._BLOCK.finditer(text)} == set(tables.BLOCKS)
    assert text.count("<!-- generated:") == text.count("<!-- /generated:") == len(tables._BLOCK.findall(text))


def test_a_block_is_made_anew_and_the_rest_stays():
    page = "before\n<!-- generated: stored -->\nold\n<!-- /generated: stored -->\nafter\n"
    filled = tables.filled(page)
    assert filled.startswith("before\n<!-- generated: stored -->\n| model | stock |")
    assert filled.endswith("|\n<!-- /generated: stored -->\nafter\n")
    assert tables.filled(filled) == filled


def test_losses_count_the_cases_that_both_have():
    cases = {
        ("bf16", "a"): {"fastln": 0.5, "liger": 0.75},
        ("bf16", "b"): {"fastln": 0.5, "liger": 0.25},
        ("bf16", "c"): {"fastln": 0.5},
    }
    assert tables._losses(cases) == "1 of 2, by up to 25"
    assert tables._losses({("bf16", "c"): {"fastln": 0.5}}) == "no case to compare"
