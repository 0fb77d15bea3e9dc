"""How data become noise."""

REGISTRY = {"process": {"gaussian": "diffusionlab.processes.gaussian:Gaussian"}}
