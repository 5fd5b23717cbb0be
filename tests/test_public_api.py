"""The names users build on."""

import inspect

import pvcore as pv

PUBLIC = {
    "Ablate",
    "Above",
    "Activations",
    "Add",
    "Alarm",
    "Below",
    "Calibration",
    "Cap",
    "Controls",
    "Extraction",
    "FinetuningShift",
    "Flags",
    "Graph",
    "HookedModel",
    "Judge",
    "JudgeFailure",
    "Moments",
    "Monitor",
    "PersonaVector",
    "Plan",
    "PreventionCallback",
    "ProjectionStreamer",
    "Provenance",
    "PvcoreError",
    "Seen",
    "Selection",
    "ShiftCallback",
    "Site",
    "Step",
    "Threshold",
    "Trait",
    "TraitScores",
    "TraitSummary",
    "VectorBank",
    "calibrate",
    "evaluate",
    "extract",
    "finetuning_shift",
    "flag",
    "fused_norms",
    "prevent",
    "resid_mid",
    "resid_post",
    "resid_pre",
    "select",
    "shift_trajectory",
}


def test_public_names_are_pinned():
    visible = {name for name, value in vars(pv).items() if not name.startswith("_")}
    assert {name for name in visible if not inspect.ismodule(getattr(pv, name))} == PUBLIC


def test_no_name_is_both_a_function_and_a_module():
    modules = {name for name, value in vars(pv).items() if inspect.ismodule(value)}
    assert not modules & PUBLIC
    assert "extraction" in modules


def test_every_public_name_is_documented():
    assert all(inspect.getdoc(getattr(pv, name)) for name in PUBLIC)
