"""Other methods than the paper's, built on the root as a user's own would be."""
