"""One step of a small model in float64, cut free of its encoders: losses can then be compared with plain references."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batch_helpers import exact_features


@pytest.fixture
def build_model(model_config):
    """A function (config changes) -> a float64 model without a zero that would hide a path."""

    def build(**changes):
        from nemo_slam.models.pretraining import SLAMPretrainingModel

        torch.manual_seed(0)
        model = SLAMPretrainingModel(model_config(**changes)).double().train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.features = exact_features
        return model

    return build


@pytest.fixture
def detached():
    """A function (model, batch) -> StepOutputs whose features, contexts and hidden rows are leaves."""

    def build(model, batch):
        outputs = model(batch)
        leaves = {k: getattr(outputs, k).detach().requires_grad_() for k in ("features", "contexts", "hidden")}
        return replace(outputs, **leaves)

    return build
