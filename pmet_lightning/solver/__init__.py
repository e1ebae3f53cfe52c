"""The closed-form update: linear algebra on tensors, without a model."""
