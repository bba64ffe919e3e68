"""Search for hyper-parameters with optuna."""
