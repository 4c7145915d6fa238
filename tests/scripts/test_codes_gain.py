import codes_gain
import pytest

from fastln_kernels.cpu import library

WHY_NOT = library.why_not("activation_codes") or library.why_not("norm")


@pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}")
def test_every_case_has_codes_beside_exact(monkeypatch):
    monkeypatch.setattr(codes_gain, "seconds", lambda step: 2.0)
    cases = codes_gain.cases(3, (65,))
    assert len(cases) == 6
    for subjects in cases.values():
        for forward, backward in subjects.values():
            forward()
            backward()
        assert codes_gain.measure(subjects, 2) == dict.fromkeys(subjects, (2.0, 2.0, 1.0))
        assert next(iter(subjects)) == "exact"
        assert len(subjects) > 1
