"""Feature networks: from images or videos to the vectors that metrics compare."""

REGISTRY = {
    "extractor": {
        "classifier": "diffusionlab.features.classifier:ClassifierRun",
        "clip": "diffusionlab.features.clip:Clip",
        "digits": "diffusionlab.features.digits:Digits",
        "dinov2": "diffusionlab.features.dinov2:DinoV2",
        "i3d": "diffusionlab.features.i3d:I3D",
        "inception": "diffusionlab.features.inception:Inception",
        "pixels": "diffusionlab.features.pixels:Pixels",
    }
}
