"""The terms of a step, computed again by hand from its positions and vectors."""

import jax
import numpy as np
import pytest

from seqpe_jax.training.trainer import Trainer
from tests.tiny import random_params, tiny_config

LOGITS = {"objective__contrastive__space": "logits", "objective__distillation__weight": 0.0, "model__layers": 2}


@pytest.mark.parametrize("scales", [(1.0, 4.0), ()])
def test_each_head_has_its_scale_in_the_contrastive_loss(scales):
    fields = {"encoding__qk": "multi", "model__heads": 3, "encoding__position_heads": 2, "encoding__feature_width": 5}
    fields |= LOGITS | {"objective__contrastive__scale": 1.5, "encoding__scalar_scale": 10.0}
    run = Trainer.of(tiny_config(objective__contrastive__head_scales=scales, **fields), jax.devices()[:1])
    objective, params = run.objective, random_params(run, 0.5)["encoding"]
    draws = jax.jit(objective.draw)(jax.random.PRNGKey(2), 5)

    @jax.jit
    def terms_and_vectors(params):
        found = objective.vectors_and_terms(params, draws, jax.random.PRNGKey(0), True)[1]
        pairs = draws.contrastive.pivots_BA, draws.contrastive.candidates_BCA.reshape(-1, 1)
        return found, [objective.architecture.encoding.apply({"params": params}, part, method="vectors") for part in pairs]

    terms, (pivots_BE, candidates_RE) = terms_and_vectors(params)
    kernel, bias = (np.asarray(params["qk_map"][name], np.float64) for name in ("kernel", "bias"))
    batch, labels, losses = len(pivots_BE), np.asarray(draws.contrastive.labels_B), []
    for layer, head, pivot in np.ndindex(2, 2, batch):
        columns = slice(5 * head, 5 * head + 5)
        query = (np.asarray(pivots_BE[pivot]) @ kernel[layer] + bias[layer])[:10][columns]
        near = np.asarray(candidates_RE).reshape(batch, -1, 24)[pivot]
        keys = (near @ kernel[layer] + bias[layer])[:, 10:][:, columns]
        logits = 1.5 * (scales[head] if scales else 1.0) * 10.0 * keys @ query / np.sqrt(24 // 3)
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[labels[pivot]])
    assert np.ptp(losses) > 0.1
    assert float(terms["contrastive"]) == pytest.approx(np.mean(losses), rel=1e-4)
