"""Methods that are not the paper's, on the root as any user would have it."""
