"""Whether a folder is that of the run to go on with."""

import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.training.workdir import check_same_run
from tests.tiny import tiny_config
from tests.training.test_trainer import written


@pytest.mark.parametrize("variant", ["seqpe", "rotary"])
def test_an_older_run_goes_on(tmp_path, variant):
    """Its file lacks fields that were added since, and holds values that nothing reads."""
    unread = {"theta": 100.0} if variant == "seqpe" else {"width": 96, "qk": "multi", "scalar_scale": 2.0}
    settings, added = tiny_config(variant=variant), dict.fromkeys(("fraction_digits", "resize", "log_scaling"))
    written(tmp_path, settings, **added, **unread)
    check_same_run(settings, tmp_path, 2)
    with pytest.raises(InputError, match="it differs in encoding.log_scaling: False -> True. Use a new --workdir"):
        check_same_run(tiny_config(variant=variant, encoding__log_scaling=True), tmp_path, 2)
