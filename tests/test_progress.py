"""The clock that every long job tells its progress by."""

import time

from comfyui_quantpress.quant_core.progress import Clock


def test_the_time_left_is_that_of_the_bytes_left_at_the_speed_so_far():
    state = Clock(4, 1000, started=time.monotonic() - 10).advance("a", 250)
    assert (state.layer, state.done_layers, state.total_layers) == ("a", 1, 4)
    assert (state.done_bytes, state.total_bytes) == (250, 1000)
    assert state.eta_s == 3 * state.elapsed_s and state.elapsed_s >= 10


def test_before_the_first_byte_no_time_left_is_told():
    clock = Clock(4, 1000)
    assert clock.state("a").eta_s is None
    assert clock.advance("a", 10, layers=0).done_layers == 0
    assert clock.state("b").eta_s is not None


def test_an_empty_job_divides_by_nothing():
    assert Clock(1, 0).advance("a", 0).eta_s is None
    assert Clock(1, 10, done_bytes=10).state("a").eta_s == 0
