"""Objectives that train a student: from a teacher, or to sample in a few steps."""

REGISTRY = {
    "objective": {
        "multistep_consistency": (
            "diffusionlab.distillation.multistep_consistency:MultistepConsistency"
        ),
        "consistency_distillation": (
            "diffusionlab.distillation.consistency:ConsistencyDistillation"
        ),
        "consistency_training": (
            "diffusionlab.distillation.consistency:ConsistencyTraining"
        ),
        "continuous_consistency": (
            "diffusionlab.distillation.continuous_consistency:ContinuousConsistency"
        ),
        "moment_matching": "diffusionlab.distillation.moment_matching:MomentMatching",
        "moment_matching_instant": (
            "diffusionlab.distillation.moment_matching_instant:MomentMatchingInstant"
        ),
        "em_distillation": "diffusionlab.distillation.em_distillation:EmDistillation",
        "diff_instruct": "diffusionlab.distillation.diff_instruct:DiffInstruct",
        "distribution_matching": (
            "diffusionlab.distillation.distribution_matching:DistributionMatching"
        ),
        "distribution_matching_2": (
            "diffusionlab.distillation.distribution_matching_2:DistributionMatching2"
        ),
        "f_divergence": "diffusionlab.distillation.f_divergence:FDivergence",
        "score_identity": "diffusionlab.distillation.score_identity:ScoreIdentity",
        "progressive": "diffusionlab.distillation.progressive:Progressive",
        "guided": "diffusionlab.distillation.guided:Guided",
        "tract": "diffusionlab.distillation.tract:Tract",
        "boot": "diffusionlab.distillation.boot:Boot",
        "reflow": "diffusionlab.distillation.reflow:Reflow",
        "discrete_moment_matching": (
            "diffusionlab.distillation.discrete_moment_matching:DiscreteMomentMatching"
        ),
        "self_distillation_through_time": (
            "diffusionlab.distillation.self_distillation_through_time:"
            "SelfDistillationThroughTime"
        ),
    },
}
