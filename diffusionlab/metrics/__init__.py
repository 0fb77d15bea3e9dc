"""Statistics of samples against a reference: pure functions of features, in float64."""

REGISTRY = {
    "metric": {
        "class_frechet": "diffusionlab.metrics.class_frechet:ClassFrechet",
        "cmmd": "diffusionlab.metrics.kernel:Cmmd",
        "density_coverage": "diffusionlab.metrics.neighbours:DensityCoverage",
        "frechet": "diffusionlab.metrics.frechet:Frechet",
        "frechet_infinity": "diffusionlab.metrics.extrapolation:FrechetInfinity",
        "inception_score": "diffusionlab.metrics.inception_score:InceptionScore",
        "inception_score_infinity": (
            "diffusionlab.metrics.extrapolation:InceptionScoreInfinity"
        ),
        "kernel": "diffusionlab.metrics.kernel:Kernel",
        "memorization": "diffusionlab.metrics.memorization:Memorization",
        "precision_recall": "diffusionlab.metrics.neighbours:PrecisionRecall",
        "sliced_wasserstein": (
            "diffusionlab.metrics.sliced_wasserstein:SlicedWasserstein"
        ),
        "spatial_frechet": "diffusionlab.metrics.frechet:SpatialFrechet",
        "vendi": "diffusionlab.metrics.vendi:Vendi",
    },
    "paired_metric": {
        "lpips": "diffusionlab.metrics.lpips:Lpips",
        "psnr": "diffusionlab.metrics.psnr:Psnr",
        "ssim": "diffusionlab.metrics.ssim:Ssim",
    },
}
