"""What Python tells the native module goes by the names that its structs have."""

import pytest

from diffdoctor.backends import native
from diffdoctor.backends.native_call import ArtifactArguments, PolicyArguments, plan_fields
from diffdoctor.lowering.plan import LOSS_KINDS, MAX_TERMS
from support import cases

pytestmark = pytest.mark.skipif(native.load() is None, reason="no compiled module")


def described(case: cases.Case) -> dict:
    return plan_fields(cases.lower(cases.build(case)).plan)


def test_the_losses_stand_in_the_same_order():
    assert native.load().loss_kinds == LOSS_KINDS


def test_the_arguments_of_artifact_loss_stand_in_the_same_order():
    assert native.load().artifact_loss_arguments == ArtifactArguments._fields


def test_the_arguments_of_policy_loss_stand_in_the_same_order():
    assert native.load().policy_loss_arguments == PolicyArguments._fields


@pytest.mark.parametrize("target", ["tensor", "flow"])
def test_a_plan_is_read_by_name(target):
    native.load().WeightedLossPlan(described(cases.Case("", target=target, confidence=((2, 9, 4), cases.F32))))


def test_a_field_that_is_missing_or_unknown_is_refused():
    fields = described(cases.Case(""))
    gamma = fields.pop("gamma")
    with pytest.raises(ValueError, match="fields"):
        native.load().WeightedLossPlan(fields)
    with pytest.raises(KeyError, match="gamma"):
        native.load().WeightedLossPlan({**fields, "gama": gamma})
    with pytest.raises(ValueError, match="fields"):
        native.load().WeightedLossPlan({**fields, "gamma": gamma, "another": 1})


def test_a_tuple_of_the_wrong_length_is_refused():
    fields = described(cases.Case(""))
    for name in ("size", "strength", "terms"):
        with pytest.raises(ValueError, match=r"wrong length|too many"):
            native.load().WeightedLossPlan({**fields, name: fields[name] * (MAX_TERMS + 1)})
