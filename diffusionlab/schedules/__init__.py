"""Noise schedules and the laws of training times."""

REGISTRY = {
    "schedule": {
        "alpha_linear": "diffusionlab.schedules.alpha:Linear",
        "alpha_log_linear": "diffusionlab.schedules.alpha:LogLinear",
        "alpha_cosine": "diffusionlab.schedules.alpha:Cosine",
        "alpha_polynomial": "diffusionlab.schedules.alpha:Polynomial",
        "alpha_nichol_cosine": "diffusionlab.schedules.alpha:NicholCosine",
        "cosine": "diffusionlab.schedules.cosine:Cosine",
        "shifted_cosine": "diffusionlab.schedules.cosine:ShiftedCosine",
        "interpolated_cosine": "diffusionlab.schedules.cosine:InterpolatedCosine",
        "linear_beta": "diffusionlab.schedules.linear_beta:LinearBeta",
        "linear_logsnr": "diffusionlab.schedules.linear_logsnr:LinearLogsnr",
        "edm": "diffusionlab.schedules.edm:Edm",
        "flow": "diffusionlab.schedules.flow:Flow",
        "discrete_beta": "diffusionlab.schedules.discrete_beta:DiscreteBeta",
        "sigmoid": "diffusionlab.schedules.sigmoid:Sigmoid",
        "variance_exploding": (
            "diffusionlab.schedules.variance_exploding:VarianceExploding"
        ),
    },
    "times": {
        "uniform": "diffusionlab.schedules.times:Uniform",
        "logit_normal": "diffusionlab.schedules.times:LogitNormal",
        "log_normal": "diffusionlab.schedules.times:LogNormal",
        "logsnr_uniform": "diffusionlab.schedules.times:LogsnrUniform",
        "discrete": "diffusionlab.schedules.times:Discrete",
        "importance": "diffusionlab.schedules.importance:Importance",
    },
}
