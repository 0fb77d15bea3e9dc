"""Guidance: transforms of `predict(z_t, t, cond)`; `base.py` says in which order."""

REGISTRY = {
    "guidance": {
        "classifier_free": "diffusionlab.guidance.classifier_free:ClassifierFree",
        "autoguidance": "diffusionlab.guidance.references:Autoguidance",
        "classifier": "diffusionlab.guidance.references:Classifier",
        "dynamic_threshold": "diffusionlab.guidance.clipping:DynamicThreshold",
        "clip_x": "diffusionlab.guidance.clipping:ClipX",
        "cads": "diffusionlab.guidance.cads:Cads",
    }
}
