"""What clients call a sampler, and what is meant."""

from __future__ import annotations

import pytest

from sdfleet.engine.sampler_names import a1111_label, known_samplers, parse_sampler
from sdfleet.errors import InvalidValue, UnknownName


@pytest.mark.parametrize(
    ("spelling", "canonical"),
    [
        ("DPM++ 2M Karras", "dpm++_2m karras"),
        ("DPM++ 2M SDE Exponential", "dpm++_2m_sde exponential"),
        ("Euler a", "euler_a"),
        ("EULER-ANCESTRAL", "euler_a"),
        ("UniPC", "unipc"),
        ("uni_pc_bh2", "unipc"),
        ("DDIM", "ddim"),
        ("PLMS", "pndm"),
        ("LMS", "lms"),
        ("DPM2 a Karras", "dpm2_a karras"),
        ("dpm++2m", "dpm++_2m"),
        ("sample_dpmpp_2m", "dpm++_2m"),
        ("sample_dpmpp_2m_sde", "dpm++_2m_sde"),
        ("k_euler_ancestral", "euler_a"),
        ("k_dpm_2_a", "dpm2_a"),
        ("k_dpmpp_2m_ka", "dpm++_2m karras"),
        ("DPMSolverMultistepScheduler", "dpm++_2m"),
        ("EulerDiscrete", "euler"),
        ("KDPM2AncestralDiscreteScheduler", "dpm2_a"),
        ("FlowMatchEulerDiscreteScheduler", "euler"),
        ("Euler Automatic", "euler"),
        ("dpm++_3m_sde karras", "dpm++_3m_sde karras"),
    ],
)
def test_spellings_of_every_client_are_understood(spelling: str, canonical: str) -> None:
    assert str(parse_sampler(spelling)) == canonical


def test_every_known_sampler_survives_its_own_spellings() -> None:
    for name in known_samplers():
        assert str(parse_sampler(name)) == str(parse_sampler(a1111_label(name))) == name
        assert parse_sampler(parse_sampler(name).class_name).spacing == "default"


def test_unknown_sampler_names_its_neighbours() -> None:
    with pytest.raises(UnknownName, match=r"no sampler named 'dpm\+\+_2x'; did you mean"):
        parse_sampler("dpm++_2x")


def test_spacing_that_a_sampler_does_not_have_is_refused() -> None:
    with pytest.raises(InvalidValue, match="ddim has no karras spacing"):
        parse_sampler("DDIM Karras")
