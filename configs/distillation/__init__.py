"""Students: each method on any teacher; see common.distillation."""
