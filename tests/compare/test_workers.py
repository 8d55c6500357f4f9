"""Workers: the devices of each."""

import pytest

from aesl_trl.compare.workers import split_devices


@pytest.mark.parametrize(
    "devices, workers, shares",
    [
        ([], 2, [None, None]),
        (["0", "1"], 1, [None]),
        (["0", "1"], 2, ["0", "1"]),
        (["4", "5", "6", "7"], 2, ["4,5", "6,7"]),
        (["0", "1", "2"], 2, ["0", "1"]),
        (["3"], 3, ["3", "3", "3"]),
        (["0", "1"], 3, ["0", "1", "0"]),
    ],
)
def test_devices_of_each_worker(devices, workers, shares):
    assert split_devices(devices, workers) == shares
