"""Plans: validation, and the JSON that names vectors by file and content hash."""

import json

import pytest
import torch

import pvcore as pv
from pvcore.errors import PlanError, PvcoreError, SiteError, SpanError, VectorError
from tests.subjects import prompts, subject


def vector(trait="evil", *, seed=1, width=64, model_id="tiny/qwen2"):
    generator = torch.Generator().manual_seed(seed)
    return pv.PersonaVector(
        trait=trait,
        sites=[pv.resid_post(layer) for layer in range(3)],
        directions=torch.randn(3, width, generator=generator),
        model_id=model_id,
    )


def full_plan():
    evil, humor = vector(), vector("humor", seed=2)
    return pv.Plan(
        pv.Add(evil, coeff={0: [1.0, -2.0], 2: 0.5}, layers=[0, 2], span="prompt"),
        pv.Ablate([evil, humor], layers=[1]),
        pv.Cap(humor, min=-1.0, max=8.0, layers=[2], span="all"),
        monitor=pv.VectorBank([evil, humor], layers=[1, 2]),
    )


def test_saved_and_loaded_plans_act_alike(tmp_path):
    plan, model = full_plan(), subject("qwen2").model
    plan.save(tmp_path / "guard.json")
    loaded = pv.Plan.load(tmp_path / "guard.json")
    assert loaded == plan
    chats = prompts([6, 4])
    results = []
    for one in (plan, loaded):
        with model.arm(one) as seen:
            model.generate_ids(chats, max_new_tokens=3, do_sample=False)
        results.append(seen["evil"].steps)
    with model.monitor(plan.monitor) as seen:
        model.generate_ids(chats, max_new_tokens=3, do_sample=False)
    assert torch.equal(results[0], results[1])
    assert (results[0] - seen["evil"].steps).abs().max() > 1e-2


def test_json_names_vectors_by_file_and_hash(tmp_path):
    evil = vector()
    evil.save(tmp_path / "evil.safetensors")
    plan = pv.Plan(pv.Add(pv.PersonaVector.load(tmp_path / "evil.safetensors"), coeff=1.0))
    (tmp_path / "plans").mkdir()
    plan.save(tmp_path / "plans" / "guard.json")
    document = json.loads((tmp_path / "plans" / "guard.json").read_text())
    (entry,) = document["vectors"].values()
    assert entry == {"file": "../evil.safetensors", "sha256": evil.content_hash}
    assert not list((tmp_path / "plans").glob("*.vectors"))
    assert pv.Plan.load(tmp_path / "plans" / "guard.json") == plan


def test_vectors_without_a_file_are_written_beside_the_plan(tmp_path):
    full_plan().save(tmp_path / "guard.json")
    assert len(list((tmp_path / "guard.vectors").glob("*.safetensors"))) == 2
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "guard.json").rename(moved / "guard.json")
    (tmp_path / "guard.vectors").rename(moved / "guard.vectors")
    assert pv.Plan.load(moved / "guard.json") == full_plan()


def test_two_vectors_of_one_trait_keep_apart(tmp_path):
    plan = pv.Plan(pv.Add(vector(seed=1), coeff=1.0), pv.Add(vector(seed=2), coeff=1.0))
    plan.save(tmp_path / "guard.json")
    assert pv.Plan.load(tmp_path / "guard.json") == plan


def test_a_changed_vector_file_is_refused(tmp_path):
    full_plan().save(tmp_path / "guard.json")
    for file in (tmp_path / "guard.vectors").iterdir():
        vector(seed=9).save(file)
    with pytest.raises(PlanError, match=r"was saved with .*: restore that file"):
        pv.Plan.load(tmp_path / "guard.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("format"),
        lambda d: d.update(format=99),
        lambda d: d.pop("vectors"),
        lambda d: d["interventions"][0].update(kind="melt"),
        lambda d: d["interventions"][0].update(sites=["resid_post.-1"]),
        lambda d: d["interventions"][0].update(span="everywhere"),
        lambda d: d["interventions"][0].update(vectors=["nobody"]),
        lambda d: d["interventions"][0].update(coeff="much"),
        lambda d: d["interventions"].append(3),
        lambda d: d.update(interventions=None),
        lambda d: d["monitor"].update(sites=3),
        lambda d: d.update(vectors={"x": {"file": "gone.safetensors", "sha256": ""}}),
    ],
)
def test_damaged_plans_are_one_typed_error(tmp_path, change):
    full_plan().save(tmp_path / "guard.json")
    document = json.loads((tmp_path / "guard.json").read_text())
    change(document)
    (tmp_path / "guard.json").write_text(json.dumps(document))
    with pytest.raises(PvcoreError):
        pv.Plan.load(tmp_path / "guard.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": 1}'])
def test_files_that_are_no_plans(tmp_path, content):
    (tmp_path / "guard.json").write_bytes(content)
    with pytest.raises(PlanError):
        pv.Plan.load(tmp_path / "guard.json")


def test_missing_and_unwritable_paths(tmp_path):
    with pytest.raises(PlanError, match="cannot be read as a plan"):
        pv.Plan.load(tmp_path / "none.json")
    with pytest.raises(PvcoreError):
        full_plan().save(tmp_path / "no" / "such" / "folder.json")


def test_plans_refuse_what_is_no_intervention():
    with pytest.raises(PlanError, match="got an empty plan"):
        pv.Plan()
    with pytest.raises(PlanError, match="all of them must be given for the same batch"):
        pv.Plan(pv.Add(vector(), coeff=[1.0]), pv.Cap(vector(), max=[1.0, 2.0]))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: pv.Add(vector(), coeff=float("nan")), PlanError, "got nan in coeff"),
        (lambda: pv.Add(vector(), coeff=[1.0, float("inf")]), PlanError, "got inf in coeff"),
        (lambda: pv.Add(vector(), coeff=[]), PlanError, "got no numbers for coeff"),
        (lambda: pv.Add(vector(), coeff={}), PlanError, "got an empty mapping for coeff"),
        (lambda: pv.Add(vector(), coeff={1: 2.0}), PlanError, "give one entry for each"),
        (lambda: pv.Add(vector(), coeff=torch.ones(2, 2)), PlanError, "wanted one number per row"),
        (
            lambda: pv.Add(vector(), coeff=torch.ones(2, requires_grad=True)),
            PlanError,
            "requires grad",
        ),
        (lambda: pv.Add(vector(), coeff=1.0, layers=[-1]), SiteError, "got layer -1"),
        (lambda: pv.Add(vector(), coeff=1.0, layers=[7]), VectorError, "resid_post.7"),
        (lambda: pv.Add(vector(), coeff=1.0, span="reply"), SpanError, "got span 'reply'"),
        (lambda: pv.Cap(vector()), PlanError, "got a Cap without bounds"),
        (lambda: pv.Cap(vector(), min=2.0, max=1.0), PlanError, "min is above its max"),
        (
            lambda: pv.Cap(vector(), min=[0.0, 2.0], max=[1.0, 1.0]),
            PlanError,
            "min is above its max",
        ),
        (lambda: pv.Cap(vector(), min=[0.0], max=[1.0, 1.0]), PlanError, "1 values of min and 2"),
        (lambda: pv.Ablate([]), VectorError, "one at least"),
        (lambda: pv.Ablate([vector(), vector(seed=3)]), VectorError, "evil"),
    ],
)
def test_interventions_check_themselves(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("plan", "error", "text"),
    [
        (
            lambda: pv.Plan(pv.Add(vector(width=32), coeff=1.0)),
            PlanError,
            "of width 32; this model's residual stream has width 64",
        ),
        (
            lambda: pv.Plan(pv.Add(vector(model_id="Qwen/Qwen2.5-7B-Instruct"), coeff=1.0)),
            PlanError,
            "made for Qwen/Qwen2.5-7B-Instruct; this model is tiny/qwen2",
        ),
        (
            lambda: pv.Plan(
                pv.Ablate([vector(), vector("twin", seed=1) * 1.5], layers=[1]),
            ),
            PlanError,
            r"nearly dependent vectors \(evil, twin",
        ),
    ],
)
def test_plans_that_do_not_fit_arm_nothing(plan, error, text):
    model = subject("qwen2").model
    (ids,) = prompts([5])
    base = model.hf(ids[None]).logits
    with pytest.raises(error, match=text), model.arm(plan()):
        pytest.fail("the block must not be entered")
    assert torch.equal(model.hf(ids[None]).logits, base)


def test_model_ids_agree_by_their_last_part_or_on_demand():
    model = subject("qwen2").model
    (ids,) = prompts([5])
    for model_id in ("", "copies/Qwen2"):
        with model.steer(pv.Add(vector(model_id=model_id), coeff=1.0)):
            model.hf(ids[None])
    with model.steer(pv.Add(vector(model_id="other/llama"), coeff=1.0), check_model=False):
        model.hf(ids[None])
