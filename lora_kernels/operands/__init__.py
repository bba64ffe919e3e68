"""Records of tensors that operators, kernels and reference share."""
