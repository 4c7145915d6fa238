"""The devices that a plan knows by name."""

import pytest

from fastln.devices import DEVICES, find_device
from fastln.errors import FastLNError


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060"),
        ("Tesla T4", "T4"),
        ("a100", "A100 SXM 80 GB"),
        ("A100-SXM4-40GB", "A100 SXM 40 GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_a_device_is_found_under_its_names(name, found):
    assert find_device(name).name == found


def test_no_two_devices_share_a_name():
    names = [name for device in DEVICES.values() for name in (device.name, *device.aliases)]
    assert [find_device(name).name for name in names] == [
        device.name for device in DEVICES.values() for _ in (device.name, *device.aliases)
    ]


def test_an_unknown_device_is_told_with_its_neighbours():
    with pytest.raises(FastLNError, match=r"unknown device 'RTX 4080'; did you mean .*'RTX 4090'.*and cpu for this"):
        find_device("RTX 4080")


def test_rates_are_dense_and_rise_as_numbers_get_shorter():
    for device in DEVICES.values():
        rates = device.rates
        assert rates["float32"] < rates["float16"] < rates["int8"]
        assert rates.get("bfloat16", rates["float16"]) == rates["float16"]
        assert rates["int8"] < 2.01 * rates["float16"] or device.name.startswith("RTX")  # GeForce halves 16-bit ones
        assert device.source


def test_products_without_units_run_in_those_of_float32():
    assert find_device("T4").rate("bfloat16") == (8.1e12, "float32")
    assert find_device("H100").rate("bfloat16") == (989e12, "bfloat16")
