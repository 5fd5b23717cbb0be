"""The buffers of resident plans: what they cost, and how their scores reach the host."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pvcore as pv
from pvcore import resident, resident_moves
from pvcore.errors import HookError
from pvcore.frames import Call, Frame
from pvcore.programs import compile_programs
from pvcore.resident import Decode, Met, Resident, Watch
from pvcore.sessions import Session
from pvcore.transport import Transport
from tests.subjects import fresh, prompts, trio

MIB = 1 << 20
LAYERS, WIDTH, VECTORS = 28, 3584, 128


class Keeping:
    """A reader of residuals that makes no scores."""

    before = False

    def __init__(self, n_sites: int) -> None:
        self.sites = tuple(pv.resid_post(layer) for layer in range(n_sites))

    def begin(self, frame: object) -> Callable[[int, Tensor], None]:
        return lambda place, h: None

    def end(self, frame: object) -> None: ...

    def close(self, call: Call, outcome: object) -> None: ...


class Taking(Keeping):
    """A scorer that keeps what it is handed."""

    def __init__(self, n_sites: int, n_vec: int, d_model: int) -> None:
        super().__init__(n_sites)
        self.n_vec, self.d_model = n_vec, d_model
        self.taken: list[Tensor] = []

    def units(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        shape = (len(self.sites), self.n_vec, self.d_model)
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def settle(self, call: Call, fetch: Callable[[], None]) -> None: ...

    def receive(self, call: Call, steps: Tensor) -> None:
        self.taken.append(steps)


def call(batch: int) -> Call:
    mask = torch.ones(batch, 1, dtype=torch.bool)
    return Call(rows=torch.arange(batch), n_chats=batch, mask=mask, last=None, generating=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_buffers_compute_what_the_reference_computes(dtype: torch.dtype):
    """Bit for bit, for plans of one structure written into the same buffers one after another."""
    site = pv.resid_post(0)
    one, two, three = trio(site)
    met = {site: Met(device=torch.device("cpu"), dtype=dtype)}
    made: Resident | None = None
    results = []
    for turn in range(4):
        vectors = [[one, two, three], [three, one, two]][turn % 2]
        interventions = [
            pv.Add(vectors[:2], coeff=[0.5 * turn, -1.0, 2.0]),
            pv.Cap(vectors[1:], min=-0.5 + 0.1 * turn, max=[0.1, 0.2, 0.3 + turn]),
            pv.Ablate(vectors[0]),
            pv.Cap(vectors[2], **({"max": 0.1} if turn < 2 else {"min": 0.4})),
            pv.Add(vectors[2], coeff=0.25, span="all"),
            pv.Add(vectors[2], coeff=9.0, span="prompt"),
        ]
        session = Session(compile_programs(interventions))
        request = call(3)
        plan = Decode.of(session, request, met)
        made = made or Resident(0, plan, 64, torch.device("cpu"))
        made.write(plan)
        h = torch.randn(3, 1, 64).to(dtype)
        (program,) = session.programs[site]
        wanted = program.apply(h, Frame(request, 3, 1, 1, True))
        got = made.fire(str(site), h)
        assert torch.equal(got, wanted)
        results.append(got - h)
    assert all(not torch.equal(results[a], results[b]) for a in range(4) for b in range(a))


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_128_vectors_at_all_layers_of_a_7b_take_less_than_64_mib_beside_the_bank(batch: int):
    """Qwen2.5-7B in bfloat16, however many tokens: the ring is full after 64 steps."""
    met = Met(device=torch.device("meta"), dtype=torch.bfloat16)
    watch = Watch(Taking(LAYERS, VECTORS, WIDTH), met, batch, WIDTH)
    assert watch.units.shape == (LAYERS, VECTORS, WIDTH)
    assert watch.ring.shape[1:] == (LAYERS, batch, VECTORS)
    assert 16 <= len(watch.ring) <= 64
    in_float32 = LAYERS * batch * WIDTH * 4
    newest = LAYERS * batch * VECTORS * 4
    assert watch.beside_bank == in_float32 // 2 + len(watch.ring) * newest
    assert watch.beside_bank + in_float32 + newest < 64 * MIB


def test_a_ring_too_large_for_its_bytes_keeps_two_steps():
    met = Met(device=torch.device("meta"), dtype=torch.bfloat16)
    assert len(Watch(Taking(LAYERS, 512, WIDTH), met, 256, WIDTH).ring) == 2


@pytest.mark.parametrize("paced", [False, True])
@pytest.mark.parametrize(("slots", "steps"), [(2, 7), (5, 3), (5, 23), (64, 100), (64, 0)])
def test_every_step_reaches_the_host_once_and_in_order(monkeypatch, slots, steps, paced):
    monkeypatch.setattr(resident, "RING_STEPS", slots)
    met = Met(device=torch.device("cpu"), dtype=torch.bfloat16)
    scorers = [Taking(3, 4, 8), Taking(2, 1, 8)]
    watches = [Watch(scorer, met, 2, 8) for scorer in scorers]
    transport = Transport(call(2), scorers, watches, paced=paced)
    wanted: list[list[Tensor]] = [[], []]
    for watch, scorer in zip(watches, scorers, strict=True):
        watch.write(scorer)
    for step in range(steps):
        for k, watch in enumerate(watches):
            watch.rows.copy_(torch.randn(watch.rows.shape))
            watch.score(torch.tensor(step))
            scores = torch.einsum("srd,skd->srk", watch.rows.double(), watch.units.double())
            wanted[k].append(scores)
        transport.step()
        if paced:
            assert len(scorers[0].taken) == step + 1
    transport.finish()
    for k, scorer in enumerate(scorers):
        got = [row for block in scorer.taken for row in block]
        assert len(got) == steps == transport.made
        for one, other in zip(got, wanted[k], strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_readers_that_keep_residuals_and_sites_far_apart_are_refused():
    site, other = pv.resid_post(0), pv.resid_post(1)
    plain = Met(device=torch.device("cpu"), dtype=torch.float32)
    keeping = Keeping(1)
    with pytest.raises(HookError, match="a reader that keeps residuals"):
        Decode.of(Session({}, readers=[keeping]), call(2), {site: plain})
    far = Met(device=torch.device("meta"), dtype=torch.float32)
    programs = compile_programs([pv.Add(trio(site, other)[0], coeff=1.0)])
    with pytest.raises(HookError, match="armed sites on cpu, meta"):
        Decode.of(Session(programs), call(2), {site: plain, other: far})


def test_a_traced_joint_step_multiplies_by_an_op_alone_where_tf32_could_round_it(monkeypatch):
    """On CUDA; here the op is asked for on a CPU, where it multiplies the same."""
    found, site = fresh("qwen2"), pv.resid_post(1)
    one, two, three = trio(site)
    plan = pv.Plan(pv.Add(one, coeff=0.5), pv.Cap([two, three], max=0.05), pv.Ablate(one))
    settings = {"max_new_tokens": 6, "do_sample": False}
    nodes: list[str] = []

    def backend(module, _inputs):
        nodes.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    def tokens(engine):
        with found.model.arm(plan):
            return torch.stack(found.model.generate_ids(prompts([4]), engine=engine, **settings))

    plain = torch.stack(found.model.generate_ids(prompts([4]), **settings))
    wanted = tokens("eager")
    monkeypatch.setattr(
        resident_moves, "times_on", lambda _device: resident_moves.routes.ops().product.default
    )
    got = tokens(pv.Graph(backend=backend))
    assert torch.equal(got, wanted)
    assert not torch.equal(got, plain)
    assert nodes.count("pvcore.product.default") == 6
    assert not any("matmul" in node for node in nodes)
