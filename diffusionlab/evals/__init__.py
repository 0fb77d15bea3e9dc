"""Evaluators: from samples, data and losses to named numbers and pictures."""

REGISTRY = {
    "evaluator": {
        "denoising_loss": "diffusionlab.evals.denoising_loss:DenoisingLoss",
        "elbo": "diffusionlab.evals.elbo:Elbo",
        "image_to_image": "diffusionlab.evals.image_to_image:ImageToImage",
        "inpainting": "diffusionlab.evals.inpainting:Inpainting",
        "inversion": "diffusionlab.evals.inversion:Inversion",
        "likelihood": "diffusionlab.evals.likelihood:Likelihood",
        "mixture": "diffusionlab.evals.mixture:Mixture",
        "paired_images": "diffusionlab.evals.paired_images:PairedImages",
        "sample_quality": "diffusionlab.evals.sample_quality:SampleQuality",
        "sample_variance": "diffusionlab.evals.sample_variance:SampleVariance",
        "sampler_comparison": (
            "diffusionlab.evals.sampler_comparison:SamplerComparison"
        ),
        "samples": "diffusionlab.evals.samples:Samples",
        "text_quality": "diffusionlab.evals.text_quality:TextQuality",
    }
}
