"""The specification against float64 written out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pvcore_kernels as kernels
from pvcore_kernels import reference

# Rounding once costs half an ulp; the rest is the float32 sum over d_model (measured 2e-7).
TOLERANCE = {torch.float32: 5e-7, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def relative(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


def draw(rows, width, n_vec, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, width, generator=generator).to(dtype)
    v = torch.randn(n_vec, width, generator=generator, dtype=torch.float64)
    return h, v, v / v.norm(dim=1, keepdim=True)


def inverse(units, index):
    return kernels.joint_inverse(units[list(index)])[0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [1, 63, 64, 1000])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_project_and_add_match_float64(dtype, width, rows):
    h, v, units = draw(rows, width, 3, dtype)
    scores = kernels.project(h, units.float())
    wanted = h.double() @ units.T
    assert scores.dtype == torch.float32
    assert torch.allclose(scores.double(), wanted, atol=1e-6 * max(1.0, width**0.5))
    moved = kernels.add(h, (2.5 * v[:1]).float())
    assert moved.dtype == dtype
    if rows:
        assert relative(moved, h.double() + 2.5 * v[:1]) < TOLERANCE[dtype]
        assert relative(moved, h.double()) > 0.1


def test_float64_in_gives_float64_out():
    h, _v, units = draw(5, 32, 2, torch.float64)
    assert kernels.project(h, units).dtype == torch.float64
    step = kernels.AblateStep(index=(0, 1), gram_inverse=inverse(units, (0, 1)))
    moved = kernels.intervene(h, units, units @ units.T, [step])
    assert moved.dtype == torch.float64
    assert (moved @ units.T).abs().max() < 1e-14
    assert (h @ units.T).abs().max() > 0.1


def test_joint_ablation_differs_from_one_by_one():
    h, _v, units = draw(6, 16, 3, torch.float64)
    units[1] = (units[0] + 0.8 * units[1]) / (units[0] + 0.8 * units[1]).norm()
    step = kernels.AblateStep(index=(0, 1), gram_inverse=inverse(units, (0, 1)))
    joint = kernels.intervene(h, units, units @ units.T, [step])
    single = h.clone()
    for k in (0, 1):
        single = single - (single @ units[k])[:, None] * units[k]
    assert (joint @ units[:2].T).abs().max() < 1e-13
    assert (single @ units[0]).abs().max() > 1e-2


def test_cap_lands_where_it_was_sent_and_holds_the_others():
    h, _v, units = draw(40, 16, 3, torch.float64)
    before = h @ units.T
    step = kernels.CapStep(index=(0, 2), gram_inverse=inverse(units, (0, 2)), low=-0.5, high=0.25)
    moved = kernels.intervene(h, units, units @ units.T, [step])
    wanted = before[:, [0, 2]].clamp(-0.5, 0.25)
    assert torch.allclose((moved @ units.T)[:, [0, 2]], wanted, atol=1e-13)
    untouched = ((before[:, [0, 2]] == wanted).all(1)).nonzero()[:, 0]
    assert 0 < len(untouched) < 40
    assert torch.equal(moved[untouched], h[untouched])
    again = kernels.intervene(moved, units, units @ units.T, [step])
    assert torch.allclose(again, moved, atol=1e-13)


def test_steps_run_in_declared_order():
    h, _v, units = draw(4, 16, 2, torch.float64)
    gram = units @ units.T
    shift = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    add = kernels.AddStep(shift=shift)
    cap = kernels.CapStep(index=(0,), gram_inverse=inverse(units, (0,)), high=1.0)
    add_last = kernels.intervene(h, units, gram, [cap, add])
    cap_last = kernels.intervene(h, units, gram, [add, cap])
    assert (cap_last @ units[0] <= 1.0 + 1e-12).all()
    assert torch.allclose(add_last @ units[0], (h @ units[0]).clamp(max=1.0) + 3.0, atol=1e-12)


def test_masked_rows_stay_bit_identical():
    h, v, _units = draw(6, 16, 2, torch.float32)
    h[2] = -0.0
    mask = torch.tensor([True, False, False, True, True, False])[:, None]
    moved = kernels.add(h, v[:1].float(), mask)
    assert torch.equal(moved[~mask[:, 0]].view(torch.int32), h[~mask[:, 0]].view(torch.int32))
    assert not torch.equal(moved[0], h[0])


def test_bound_per_row_reaches_its_row():
    h, _v, units = draw(3, 16, 1, torch.float64)
    high = torch.tensor([[-5.0], [0.0], [5.0]], dtype=torch.float64)
    step = kernels.CapStep(index=(0,), gram_inverse=inverse(units, (0,)), high=high)
    moved = kernels.intervene(h, units, units @ units.T, [step])
    assert torch.allclose(moved @ units.T, torch.minimum(h @ units.T, high), atol=1e-13)


def test_gradients_flow_through_every_step():
    h, _v, units = draw(4, 8, 2, torch.float64)
    gram = units @ units.T
    steps = [
        kernels.AddStep(shift=torch.tensor([[0.5, -1.0]], dtype=torch.float64)),
        kernels.CapStep(index=(0,), gram_inverse=inverse(units, (0,)), high=0.1),
        kernels.AblateStep(index=(1,), gram_inverse=inverse(units, (1,))),
    ]
    h.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kernels.intervene(x, units, gram, steps), (h,))


def test_segment_mean_is_exact_to_float64():
    h = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(1)) * 1e3
    means = kernels.segment_mean(h, [0, 2, 8], [9, 3, 9])
    assert means.dtype == torch.float64
    for row, (start, end) in enumerate([(0, 9), (2, 3), (8, 9)]):
        assert torch.allclose(means[row], h[row, start:end].double().mean(0), atol=0, rtol=1e-15)


def test_nearly_dependent_vectors_are_measured():
    units = torch.eye(4, dtype=torch.float64)[:2].clone()
    units[1] = units[0] + 1e-3 * units[1]
    units[1] /= units[1].norm()
    assert kernels.joint_inverse(units)[1] > 1e5
    assert kernels.joint_inverse(units[[0, 0]])[1] == float("inf")
    assert kernels.joint_inverse(torch.eye(3))[1] == pytest.approx(1.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 24), st.integers(1, 5))
def test_layers_scored_together_equal_layers_scored_alone(seed, width, rows):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(3, rows, width, generator=generator)
    units = torch.randn(3, 4, width, generator=generator)
    together = kernels.project_layers(h, units)
    for site in range(3):
        alone = h[site].double() @ units[site].double().T
        assert torch.allclose(together[site].double(), alone, atol=1e-5)


def test_a_gate_opens_a_step_on_the_rows_it_finds_beyond_its_bound():
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(6, 5, 32, generator=generator, dtype=torch.float64)
    units = torch.nn.functional.normalize(
        torch.randn(3, 32, generator=generator, dtype=torch.float64), dim=-1
    )
    gram = units @ units.mT
    shift = torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64)
    bound = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None, None]
    gates = (
        kernels.Gate(index=1, sign=1.0, bound=bound),
        kernels.Gate(index=2, sign=-1.0, bound=0.5),
    )
    steps = [
        kernels.AddStep(shift=shift),
        kernels.AddStep(shift=torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), gates=gates),
    ]
    moved = kernels.intervene(rows, units, gram, steps)
    after = rows + 2 * units[1]
    opened = (after @ units[1] > bound[..., 0]) & (after @ units[2] < 0.5)
    assert 0 < int(opened.sum()) < opened.numel()
    torch.testing.assert_close(moved, torch.where(opened[..., None], after + units[0], after))


def test_a_gate_is_a_constant_for_gradients():
    units = torch.eye(2, 4, dtype=torch.float64)
    rows = torch.tensor([[2.0, 1.0, 0.0, 0.0], [-2.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    rows.requires_grad_()
    gate = kernels.Gate(index=0, sign=1.0, bound=0.0)
    ablate = kernels.AblateStep(index=(1,), gram_inverse=torch.eye(1).double(), gates=(gate,))
    kernels.intervene(rows, units, units @ units.mT, [ablate]).sum().backward()
    assert rows.grad is not None
    assert rows.grad.tolist() == [[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]


CUDA, SETTINGS = torch.device("cuda"), torch.backends


@pytest.fixture
def _restored():
    """The precisions of the process, as they are before anybody sets one."""
    before = SETTINGS.fp32_precision, SETTINGS.cuda.matmul.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    SETTINGS.fp32_precision, SETTINGS.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("way", ["its own", "inherited", "of the older flag"])
def test_tf32_is_forbidden_within_and_allowed_again_after(way):
    matmul = SETTINGS.cuda.matmul
    if way == "its own":
        matmul.fp32_precision = "tf32"
    elif way == "inherited":
        SETTINGS.fp32_precision, matmul.fp32_precision = "tf32", "none"
    else:
        torch.set_float32_matmul_precision("high")
    assert matmul.fp32_precision == "tf32"
    with reference.precise(CUDA), reference.precise(CUDA):
        assert matmul.fp32_precision == "ieee"
    with pytest.raises(KeyError), reference.precise(CUDA):
        raise KeyError
    assert matmul.fp32_precision == "tf32"
    if way == "of the older flag":
        assert torch.get_float32_matmul_precision() == "high"
    if way == "inherited":
        SETTINGS.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"


def test_what_is_precise_is_exact_too():
    a = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with reference.precise(a.device):
            assert (a @ a).dtype == torch.float32
    before = SETTINGS.cuda.matmul.fp32_precision
    with reference.precise(CUDA):
        assert SETTINGS.cuda.matmul.fp32_precision == before
