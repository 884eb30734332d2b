"""The streaming statistics against direct float64 computation, and their merging."""

import pytest
import torch
from comfyui_quantpress.quant_core.calibration.evidence import to_evidence
from comfyui_quantpress.quant_core.calibration.statistics import histogram as hist
from comfyui_quantpress.quant_core.calibration.statistics.hessian import (
    PANEL,
    FullHessian,
    HessianKind,
    Placement,
    SketchHessian,
    add_gram,
    mirror,
    pack_triangle,
    unpack_triangle,
)
from comfyui_quantpress.quant_core.calibration.statistics.layer import LayerStatistics, StatisticsSettings
from comfyui_quantpress.quant_core.calibration.statistics.reservoir import Reservoir, draw_keys
from comfyui_quantpress.quant_core.calibration.statistics.selection import Part
from comfyui_quantpress.quant_core.errors import RequestError
from hypothesis import given, settings
from hypothesis import strategies as st


def inputs(rows=700, k=48, seed=0, dtype=torch.float32):
    """Correlated and heavy-tailed, with two strong channels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=g) @ torch.randn(k, k, generator=g) / k**0.5 + 0.3
    x = x * torch.randn(rows, k, generator=g).abs()
    x[:, 5] *= 30
    x[:, 11] -= 8
    return x.to(dtype)


def gather(x, pieces=7, weight=1.0, **options):
    statistics = LayerStatistics(x.shape[-1], "cpu", **options)
    for piece in x.tensor_split(pieces):
        statistics.see(piece)
        statistics.add(piece.clone(), weight)
    return statistics


def close(found, wanted, tolerance=1e-5):
    wanted = wanted.double()
    assert float((found.double() - wanted).norm()) <= tolerance * float(wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pieces", [1, 60])
def test_sums_in_chunks_equal_one_float64_computation(dtype, pieces):
    x = inputs(rows=3000, dtype=dtype)
    statistics, exact = gather(x, pieces), x.double()
    evidence = to_evidence(statistics)
    close(evidence.hessian, exact.T @ exact / len(x))
    close(evidence.hessian_diagonal, exact.square().mean(0))
    close(evidence.mean, exact.mean(0))
    assert torch.equal(evidence.absmax, x.float().abs().amax(0))
    assert evidence.count == len(x) == statistics.seen


def test_long_accumulation_stays_within_one_in_a_hundred_thousand():
    k, calls = 32, 800
    g = torch.Generator().manual_seed(3)
    statistics, exact = LayerStatistics(k, "cpu"), torch.zeros(k, k, dtype=torch.float64)
    for _ in range(calls):
        x = torch.randn(16, k, generator=g) + 1
        statistics.add(x.clone())
        exact += x.double().T @ x.double()
    close(statistics.hessian_sum(), exact)


def test_weights_multiply_every_sum():
    x, y = inputs(seed=1), inputs(seed=2)
    statistics = LayerStatistics(48, "cpu")
    statistics.add(x.clone(), 0.25, "cond")
    statistics.add(y.clone(), 2.0, "uncond")
    evidence = to_evidence(statistics)
    total = 0.25 * len(x) + 2.0 * len(y)
    close(evidence.hessian, (0.25 * x.double().T @ x.double() + 2 * y.double().T @ y.double()) / total)
    close(evidence.mean, (0.25 * x.double().sum(0) + 2 * y.double().sum(0)) / total)
    assert statistics.labels == {"cond": len(x), "uncond": len(y)}


@pytest.mark.parametrize("placement", [Placement.HOST, Placement.DISK])
def test_a_hessian_that_lies_elsewhere_equals_the_one_on_the_device(placement, tmp_path):
    x = inputs(rows=1100)
    near = gather(x, 11)
    far = gather(x, 11, placement=placement, folder=tmp_path)
    close(far.hessian_sum(), near.hessian_sum(), 1e-6)
    assert list(tmp_path.iterdir()) == ([tmp_path / "hessian.bin"] if placement is Placement.DISK else [])


def test_rows_with_nan_or_inf_are_left_out_and_counted():
    x = inputs(rows=100)
    x[3, 2], x[50, 7] = float("nan"), float("-inf")
    statistics = gather(x, pieces=4)
    clean = x[torch.isfinite(x).all(1)].double()
    assert int(statistics.nonfinite) == 2 and int(statistics.count) == 98
    close(to_evidence(statistics).hessian, clean.T @ clean / 98)
    # NaN hides its channel for that call; Inf is a magnitude, which whoever chooses a scale from it refuses.
    assert not torch.isnan(statistics.absmax).any() and torch.isinf(statistics.absmax).nonzero().tolist() == [[7]]


def test_no_rows_at_all_give_no_evidence():
    statistics = LayerStatistics(8, "cpu")
    statistics.see(torch.empty(0, 8))
    statistics.add(torch.empty(0, 8))
    evidence = to_evidence(statistics)
    assert evidence.hessian is None and evidence.rows is None and evidence.absmax is None and evidence.count == 0
    assert statistics.percentile(50) == 0.0


def test_input_is_not_written_to():
    x = inputs(rows=20)
    x[0, 0] = float("nan")
    before = x.clone()
    gather(x, 1)
    assert torch.equal(x.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("staged_rows", [1, 7, 64, 10_000])
def test_staged_rows_end_in_the_same_sums_as_rows_added_at_once(staged_rows):
    x, g = inputs(rows=300), torch.Generator().manual_seed(0)
    staged = LayerStatistics(48, "cpu", settings=StatisticsSettings(staged_rows=staged_rows, reservoir_rows=500))
    direct = LayerStatistics(48, "cpu", settings=StatisticsSettings(reservoir_rows=500))
    for _ in range(10):
        index, keys = torch.randperm(300, generator=g)[:20], draw_keys(4, 1.0, g)
        staged.stage(x, index, [Part("cond", 1.0, 10), Part("uncond", 0.5, 6), Part("cond", 1.0, 4, keys)])
        direct.add(x[index[:10]], 1.0, "cond")
        direct.add(x[index[10:16]], 0.5, "uncond")
        direct.reservoir.offer(x, index[16:], keys)
    staged.flush()
    assert staged.labels == direct.labels == {"cond": 100, "uncond": 60} and int(staged.count) == 160
    assert torch.equal(staged.reservoir.filled(), direct.reservoir.filled())
    close(staged.hessian_sum(), direct.hessian_sum())
    close(staged.sum, direct.sum)
    assert float(staged.weight) == float(direct.weight) == 130


def test_staging_rows_of_two_types_keeps_both_exact():
    x = inputs(rows=40)
    staged = LayerStatistics(48, "cpu")
    staged.stage(x, torch.arange(20), [Part("", 1.0, 20)])
    staged.stage(x.bfloat16(), torch.arange(20, 40), [Part("", 1.0, 20)])
    staged.flush()
    rows = torch.cat([x[:20].double(), x[20:].bfloat16().double()])
    close(staged.hessian_sum(), rows.T @ rows)


# --- merging -------------------------------------------------------------------------------------------------------

whole = st.lists(st.integers(-60, 60), min_size=6, max_size=6)
batches = st.lists(whole, min_size=0, max_size=9)


def of_integers(rows, seed):
    """Sums of integers are exact in float32, so equal means equal.

    Square sums go through a root, and are rounded back.
    """
    x = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    statistics = LayerStatistics(6, "cpu", settings=StatisticsSettings(reservoir_rows=4))
    statistics.see(x)
    statistics.add(x.clone())
    g = torch.Generator().manual_seed(seed)
    statistics.reservoir.offer(x, torch.arange(len(x)), draw_keys(len(x), 1.0, g))
    return statistics


def contents(statistics):
    rows = statistics.reservoir.filled().float().tolist()
    return [
        statistics.hessian_sum().tolist(),
        statistics.sum.tolist(),
        statistics.square_sum.round().tolist(),
        rows,
        statistics.absmax.tolist(),
        statistics.histogram.tolist(),
        int(statistics.count),
        statistics.seen,
    ]


@settings(max_examples=60, deadline=None)
@given(batches, batches, batches)
def test_merging_is_associative_commutative_and_equal_to_one_capture(a, b, c):
    left = of_integers(a, 1)
    left.merge(of_integers(b, 2), "layer")
    left.merge(of_integers(c, 3), "layer")
    right = of_integers(b, 2)
    right.merge(of_integers(c, 3), "layer")
    first = of_integers(a, 1)
    first.merge(right, "layer")
    swapped = of_integers(c, 3)
    swapped.merge(of_integers(a, 1), "layer")
    swapped.merge(of_integers(b, 2), "layer")
    assert contents(left) == contents(first) == contents(swapped)
    direct = of_integers(a + b + c, 9)
    assert torch.equal(left.hessian_sum(), direct.hessian_sum()) and torch.equal(left.histogram, direct.histogram)


def test_merging_refuses_other_widths_and_other_kinds():
    with pytest.raises(RequestError, match="blocks.3: in_features is 8 .* 16"):
        LayerStatistics(8, "cpu").merge(LayerStatistics(16, "cpu"), "blocks.3")
    with pytest.raises(RequestError, match="full Hessian, the other a diagonal"):
        LayerStatistics(8, "cpu").merge(LayerStatistics(8, "cpu", HessianKind.DIAGONAL), "blocks.3")


# --- percentiles ---------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(2.0**-39, 2.0**23, width=32), min_size=1, max_size=200), st.floats(0, 100))
def test_percentile_is_within_its_stated_error_of_the_order_statistic(values, percent):
    x = torch.tensor(values, dtype=torch.float32)
    counts = hist.new_histogram("cpu")
    for piece in x.split(7):
        hist.count_into(counts, piece)
    rank = min(len(values), max(1, -(-percent * len(values) // 100)))
    exact = float(x.sort().values[int(rank) - 1])
    found = hist.percentile(counts, percent, float(x.max()))
    # On a tie of percent * n with a whole number, floating point may pick the neighbour.
    near = {float(x.sort().values[min(len(values), max(1, int(rank) + d)) - 1]) for d in (-1, 0, 1)}
    assert any(abs(found - value) <= hist.RELATIVE_ERROR * value * (1 + 1e-6) for value in {exact} | near)


def test_percentile_ends():
    counts = hist.new_histogram("cpu")
    hist.count_into(counts, torch.tensor([0.0, -3.0, 1e-20, 1e30]))
    assert counts.sum() == 4 and counts[0] == 2 and counts[-1] == 1
    assert hist.percentile(counts, 100, 1e30) == pytest.approx(1e30)
    assert hist.percentile(counts, 25, 1e30) == 0.0


def test_percentile_of_a_normal_is_the_known_one():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    counts = hist.new_histogram("cpu")
    hist.count_into(counts, x)
    assert hist.percentile(counts, 99.9, float(x.abs().max())) == pytest.approx(3.2905, rel=0.03)


# --- held-out rows -------------------------------------------------------------------------------------------------


def test_reservoir_is_a_uniform_sample():
    g, hits = torch.Generator().manual_seed(0), torch.zeros(40)
    x = torch.arange(40.0)[:, None]
    for _ in range(600):
        reservoir = Reservoir(8, 1, "cpu")
        for at in range(0, 40, 10):
            reservoir.offer(x, torch.arange(at, at + 10), draw_keys(10, 1.0, g))
        kept = reservoir.filled().flatten().long()
        assert len(set(kept.tolist())) == 8
        hits[kept] += 1
    assert (hits - 120).abs().max() < 45  # mean 120, standard deviation below 10


def test_heavier_rows_are_kept_more_often():
    g, heavy = torch.Generator().manual_seed(1), 0
    for _ in range(300):
        reservoir = Reservoir(10, 1, "cpu")
        reservoir.offer(torch.zeros(100, 1), torch.arange(100), draw_keys(100, 1.0, g))
        reservoir.offer(torch.ones(100, 1), torch.arange(100), draw_keys(100, 4.0, g))
        heavy += int(reservoir.filled().sum())
    assert 0.7 < heavy / 3000 < 0.88  # about 4/5


def test_reservoir_gives_back_no_row_with_nan():
    reservoir = Reservoir(4, 2, "cpu")
    reservoir.offer(torch.tensor([[1.0, float("nan")], [2.0, 3.0]]), torch.arange(2), torch.tensor([-1.0, -2.0]))
    assert reservoir.filled().tolist() == [[2.0, 3.0]]


# --- sketch, triangle ----------------------------------------------------------------------------------------------


def low_rank(rows=1500, k=96, seed=4):
    g = torch.Generator().manual_seed(seed)
    spectrum = 1.5 ** -torch.arange(k, dtype=torch.float32)
    return (torch.randn(rows, k, generator=g) * spectrum) @ torch.linalg.qr(torch.randn(k, k, generator=g))[0]


def test_sketch_stays_within_its_bound_below_the_true_hessian():
    x = low_rank()
    sketch = SketchHessian(96, 16, "cpu")
    for piece in x.split(100):
        sketch.add(piece, 1.0)
    sketch.flush()
    missing = x.double().T @ x.double() - sketch.rows.double().T @ sketch.rows.double()
    eigenvalues = torch.linalg.eigvalsh(missing)
    top = float(torch.linalg.eigvalsh(x.double().T @ x.double())[-1])
    assert eigenvalues[0] > -1e-5 * top
    assert eigenvalues[-1] <= sketch.shrinkage + 1e-5 * top
    assert sketch.shrinkage < 0.01 * top


def test_merged_sketches_keep_the_bound_and_statistics_the_exact_diagonal():
    x = low_rank()
    options = {"kind": HessianKind.SKETCH, "settings": StatisticsSettings(sketch_size=16)}
    one, other = gather(x[:900], 5, **options), gather(x[900:], 3, **options)
    one.merge(other, "layer")
    exact = x.double().T @ x.double()
    found = one.hessian_sum().double()
    close(found.diagonal(), exact.diagonal())
    off = lambda h: h - torch.diag(h.diagonal())  # noqa: E731
    assert torch.linalg.matrix_norm(off(found - exact), 2) <= 2 * one.hessian.shrinkage + 1e-5 * exact.norm()
    assert torch.linalg.eigvalsh(found)[0] > -1e-5 * exact.norm()


def test_gram_in_panels_equals_the_whole(monkeypatch):
    monkeypatch.setattr("comfyui_quantpress.quant_core.calibration.statistics.hessian.PANEL", 10)
    x, total = inputs(), torch.zeros(48, 48)
    add_gram(total, x, 0.5)
    assert not total[10:, :10].any() and total[:10].all()  # what lies below the panels is left to mirror
    mirror(total)
    close(total, 0.5 * x.double().T @ x.double())


def test_reading_adding_and_merging_in_any_order_gives_the_whole_hessian(monkeypatch):
    monkeypatch.setattr("comfyui_quantpress.quant_core.calibration.statistics.hessian.PANEL", 10)
    x, one, other, loaded = inputs(rows=90), FullHessian(48, "cpu"), FullHessian(48, "cpu"), FullHessian(48, "cpu")
    one.add(x[:30], 1.0)
    one.total()
    one.add(x[30:60], 1.0)
    other.add(x[60:], 1.0)
    one.merge(other)
    loaded.load(one.tensors())
    for found in (loaded.total(), one.total(), one.total()):
        close(found, x.double().T @ x.double())


def test_the_hessian_of_16_bit_inputs_is_right_to_one_in_ten_thousand_in_every_entry():
    for dtype in (torch.bfloat16, torch.float16):
        x = inputs(rows=4096, k=64, dtype=dtype)
        exact = x.double().T @ x.double()
        size = exact.diagonal().sqrt()
        found = gather(x, 16).hessian_sum().double()
        assert float(((found - exact).abs() / (size[:, None] * size)).max()) < 1e-5
        assert float((found.diagonal() / exact.diagonal() - 1).abs().max()) < 1e-5


@pytest.mark.parametrize("panel", [4, 17, 50])
def test_triangle_packing_is_lossless_for_symmetric_matrices(panel, monkeypatch):
    monkeypatch.setattr("comfyui_quantpress.quant_core.calibration.statistics.hessian.PANEL", panel)
    x = inputs(rows=30, k=17)
    h = x.T @ x
    h = (h + h.T) / 2
    back = torch.empty(17, 17)
    unpack_triangle(pack_triangle(h), back)
    assert torch.equal(back, h)


def test_a_hessian_on_disk_needs_a_folder():
    with pytest.raises(ValueError, match="folder"):
        FullHessian(4, "cpu", Placement.DISK)


@pytest.mark.parametrize(
    ("field", "value"), [("staged_rows", 0), ("histogram_rows", 0), ("reservoir_rows", -1), ("sketch_size", 0)]
)
def test_settings_refuse_nonsense(field, value):
    with pytest.raises(RequestError, match=field):
        StatisticsSettings(**{field: value})


# --- on a GPU ------------------------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("placement", [Placement.DEVICE, Placement.HOST])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gpu_products_are_right_in_every_entry_also_beyond_one_panel(dtype, placement):
    x = inputs(rows=900, k=PANEL + 80, dtype=dtype)
    hessian = FullHessian(x.shape[1], "cuda", placement)
    for piece in x.cuda().split(300):
        hessian.add(piece, 0.5)
    exact = 0.5 * x.double().T @ x.double()
    size = exact.diagonal().sqrt()
    assert float(((hessian.total().cpu().double() - exact).abs() / (size[:, None] * size)).max()) < 1e-5


@needs_cuda
def test_gpu_counts_the_histogram_that_the_cpu_counts():
    x = torch.cat([inputs().flatten(), torch.tensor([0.0, 1e-20, 1e30, -3.0])])
    found, wanted = hist.new_histogram("cuda"), hist.new_histogram("cpu")
    hist.count_into(found, x.cuda())
    hist.count_into(wanted, x)
    assert torch.equal(found.cpu(), wanted)
