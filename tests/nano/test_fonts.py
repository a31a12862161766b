"""Fonts of Pheye-nano: there are enough, and none is in both parts."""

import pytest

from pheye.nano.drawing import fonts

pytestmark = pytest.mark.once


def test_packages_alone_bring_enough_families_and_none_is_in_both_parts(monkeypatch):
    monkeypatch.setattr(fonts, "system_fonts", tuple)
    fonts.families.cache_clear()
    training, testing = fonts.families(False), fonts.families(True)
    fonts.families.cache_clear()
    assert len(training) >= 12 and len(testing) >= 4
    assert not set(training) & set(testing)
    assert {file for files in training.values() for file in files}.isdisjoint(
        file for files in testing.values() for file in files
    )
